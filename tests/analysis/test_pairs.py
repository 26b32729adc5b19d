"""What changed between two models, and whether its interval leaves out zero."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats
from synthetic_runs import entry, model

from ib_callback.analysis.pairs import (
    NO_ERROR,
    NO_ERRORS,
    change,
    changes,
    conclusion_of_changes,
    main_metrics,
    table_of_changes,
)
from ib_callback.results.measurement import Measurement
from ib_callback.results.points import FeaturePoint
from ib_callback.results.uncertainty import difference, jackknife_error

GROUPS = 8
OWN = {"feature_probes": {"preference": "f" * 64}}


def replicates(value: float, spread: float, seed: int) -> list[float]:
    """[2 G - 1] values of a mean over groups, without each and without each two neighbouring ones."""
    groups = value + spread * np.random.default_rng(seed).standard_normal(GROUPS)
    groups += value - groups.mean()
    one = [(groups.sum() - g) / (GROUPS - 1) for g in groups]
    return one + [(groups.sum() - groups[i] - groups[i + 1]) / (GROUPS - 2) for i in range(GROUPS - 1)]


def with_preference(
    information: float, complexity: float, *, seed: int, spread: float = 0.001, p: float = 0.01,
    settings: dict[str, Any] = OWN, errors: bool = True,
) -> Measurement:  # fmt: skip
    without = replicates(information, spread, seed) if errors else []
    feature = FeaturePoint.from_layers(
        [information] * 2, num_positions=100, complexity=complexity, information_jackknife=without,
        information_null=0.001, information_null_std=0.001, information_p_value=p,
    )  # fmt: skip
    jackknife = [replicates(complexity, 0.01, seed + 1), replicates(0.2, 0.0, 0)] if errors else [[], []]
    return model(complexity, 0.2, preference=feature, settings=settings, jackknife=(jackknife[0], jackknife[1]))


def test_the_change_of_a_plain_number_is_its_difference() -> None:
    base, post = with_preference(0.01, 0.5, seed=1), with_preference(0.02, 0.45, seed=2)
    found, known = change(base, post, "complexity"), difference(post, base, "complexity")
    assert (found.change, found.standard_error) == (pytest.approx(-0.05), known.standard_error)
    assert (found.low, found.high) == known.interval
    assert found.paired


def test_the_change_of_a_ratio_takes_both_probes_into_account() -> None:
    base, post = with_preference(0.01, 0.5, seed=1), with_preference(0.02, 0.4, seed=3)
    found = change(base, post, "preference/ratio")
    assert (found.base, found.post, found.change) == (0.02, pytest.approx(0.05), pytest.approx(0.03))
    # Each probe's groups are left out of the ratios of both models, while the other probe stays whole.
    i = [np.array(m.features["preference"].information_jackknife) for m in (base, post)]
    c = [np.array(m["token"].complexity_jackknife) for m in (base, post)]
    of_pairs = jackknife_error(0.03, i[1] / 0.4 - i[0] / 0.5)
    of_texts = jackknife_error(0.03, 0.02 / c[1] - 0.01 / c[0])
    error = math.hypot(of_pairs, of_texts)
    assert found.standard_error == pytest.approx(error, rel=0.02)
    reach = stats.t.ppf(0.975, GROUPS - 1) * (found.standard_error or 0)
    assert (found.low, found.high) == (pytest.approx(0.03 - reach), pytest.approx(0.03 + reach))
    assert found.verdict == "resolved"
    # The same groups of the same text: on the main probe the ratio of each omission is known.
    main = [with_preference(i, c, seed=s, settings={}) for i, c, s in ((0.01, 0.5, 1), (0.02, 0.4, 3))]
    assert change(main[0], main[1], "preference/ratio").standard_error == pytest.approx(
        jackknife_error(0.03, i[1] / c[1] - i[0] / c[0])
    )


def test_not_resolved_and_not_told_from_chance() -> None:
    base, post = (
        with_preference(0.01, 0.5, seed=1, spread=0.02),
        with_preference(0.011, 0.5, seed=2, spread=0.02, p=0.4),
    )
    found, cautions = changes(entry("base", base), entry("post", post), ["preference"])
    (of_preference,) = found
    assert of_preference.metric == "preference/information"
    assert of_preference.verdict == "not resolved"
    assert of_preference.note == "information not told from chance (p 0.01, 0.4)"
    assert cautions == []
    assert "nothing can be concluded" in conclusion_of_changes("base", "post", found)
    assert "not resolved (information not told from chance (p 0.01, 0.4))" in table_of_changes(found)


def test_other_tokenizers_are_not_paired() -> None:
    base = with_preference(0.01, 0.5, seed=1)
    post = with_preference(0.02, 0.4, seed=3, settings={"probe": "b" * 64, "feature_probes": {"preference": "g" * 64}})
    found, cautions = changes(entry("base", base), entry("post", post), ["preference/ratio"])
    assert found[0].paired is False
    assert "taken as independent" in found[0].note
    assert "other tokenizers" in cautions[0]
    paired = change(base, with_preference(0.02, 0.4, seed=3), "preference/information").standard_error
    errors = [jackknife_error(m.features["preference"].information or 0, m.features["preference"].information_jackknife)
              for m in (base, post)]  # fmt: skip
    assert change(base, post, "preference/information").standard_error == pytest.approx(math.hypot(*errors))
    assert paired is not None


def test_without_errors_there_is_no_interval() -> None:
    base, post = (with_preference(i, 0.5, seed=1, errors=False) for i in (0.01, 0.02))
    for name in ("preference/ratio", "preference/information", "complexity"):
        found = change(base, post, name)
        assert (found.verdict, found.low) == (NO_ERRORS, None)
        assert found.change is not None
    assert change(base, post, "entropy").verdict == NO_ERROR
    assert change(base, post, "preference/information_null").verdict == NO_ERROR
    assert change(base, post, "token/bound_ratio").verdict == "undefined"
    told = conclusion_of_changes("a", "b", [change(base, post, "complexity")])
    assert "nothing can be concluded, because no interval is known" in told


def test_other_pairs_of_the_same_model_are_no_change() -> None:
    base = with_preference(0.01, 0.5, seed=1)
    post = with_preference(0.02, 0.5, seed=1, settings={"feature_probes": {"preference": "g" * 64}})
    assert change(base, post, "preference/ratio").verdict == "no interval: measured on other texts"


def test_preference_comes_first() -> None:
    names = main_metrics(*[with_preference(0.01, 0.5, seed=1)] * 2)
    assert names[:2] == ["preference/ratio", "preference/information"]
    assert {"loss", "optimality", "token/optimality_local"} <= {*names}
