"""Correlations with scores: against scipy, against regressions, and on data whose correlation is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from synthetic_runs import entry, model

from ib_callback.analysis.comparison import Entry
from ib_callback.analysis.correlation import (
    conclusion_of,
    correlate,
    decision_accuracy,
    holm,
    metrics_to_test,
    partial,
    pearson,
    power_of,
    smallest_significant,
    spearman,
)


def pair(number: int, r: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Normally distributed numbers of a known correlation."""
    x, noise = np.random.default_rng(seed).standard_normal((2, number))
    return x, r * x + math.sqrt(1 - r * r) * noise


@pytest.mark.parametrize("number", [4, 12, 60])
def test_pearson_is_that_of_scipy(number: int) -> None:
    x, y = pair(number, 0.6, number)
    known, found = stats.pearsonr(x, y), pearson(x, y)
    interval = known.confidence_interval(0.95)
    assert [found.value, found.p, found.low, found.high] == pytest.approx(
        [known.statistic, known.pvalue, interval.low, interval.high], rel=1e-9
    )


def test_spearman_is_that_of_scipy_and_exact_for_few() -> None:
    x, y = pair(40, 0.6, 0)
    known, found = stats.spearmanr(x, y), spearman(x, y)
    assert [found.value, found.p] == pytest.approx([known.statistic, known.pvalue])
    x, y = pair(6, 0.9, 1)
    rho = stats.spearmanr(x, y).statistic
    all_of_them = [abs(stats.spearmanr(x, y[list(order)]).statistic) for order in itertools.permutations(range(6))]
    assert spearman(x, y).p == pytest.approx(np.mean(np.array(all_of_them) >= abs(rho) - 1e-12))


def test_intervals_of_the_bootstrap_cover() -> None:
    true = 6 / math.pi * math.asin(0.6 / 2)  # Spearman's of normal numbers with r .6
    covered = []
    for seed in range(60):
        found = spearman(*pair(40, 0.6, 100 + seed))
        assert found.low is not None
        assert found.high is not None
        covered.append(found.low <= true <= found.high)
    assert np.mean(covered) > 0.85  # 95 % less two standard errors, and what percentiles of 40 lack


def test_decision_accuracy_follows_from_kendall() -> None:
    x, y = pair(25, 0.5, 3)
    tau = stats.kendalltau(x, y).statistic
    assert decision_accuracy(x, y).value == pytest.approx((1 + tau) / 2)
    assert decision_accuracy(x, y, "min").value == pytest.approx((1 - tau) / 2)
    # Of three pairs with different scores one is right, one is a tie, one is wrong.
    tied = decision_accuracy(np.array([1.0, 2.0, 2.0]), np.array([1.0, 3.0, 0.0]))
    assert tied.value == pytest.approx((1 + 0 + 0.5) / 3)


def test_partial_is_the_correlation_of_residuals() -> None:
    rng = np.random.default_rng(5)
    z = rng.standard_normal(20)
    x, y = z + rng.standard_normal(20), 2 * z + rng.standard_normal(20)
    rests = [each - np.polyval(np.polyfit(z, each, 1), z) for each in (x, y)]
    known = np.corrcoef(*rests)[0, 1]
    a, b, c = (np.corrcoef(*each)[0, 1] for each in ((x, y), (x, z), (y, z)))
    assert known == pytest.approx((a - b * c) / math.sqrt((1 - b * b) * (1 - c * c)))
    found = partial(x, y, z[:, None])
    t = known * math.sqrt(17 / (1 - known**2))
    assert [found.value, found.p] == pytest.approx([known, 2 * stats.t.sf(abs(t), 17)])
    # A control that says nothing new takes no degree of freedom; one that does not vary is none.
    assert partial(x, y, np.stack([z, 3 * z + 1], axis=1)).p == pytest.approx(found.p)
    assert partial(x, y, np.ones((20, 1))).value is None
    assert partial(z, y, z[:, None]).value is None


def test_holm_steps_down() -> None:
    p = [0.04, 0.01, 0.02, 0.5]
    # 4 × .01; 3 × .02; 2 × .04; .5.
    assert holm(p) == pytest.approx([0.08, 0.04, 0.06, 0.5])
    assert holm([]) == []
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_what_few_models_can_tell() -> None:
    limit = smallest_significant(12)
    assert limit is not None
    assert 2 * stats.t.sf(limit * math.sqrt(10 / (1 - limit**2)), 10) == pytest.approx(0.05)
    draws = [stats.pearsonr(*pair(12, 0.64, seed)).pvalue < 0.05 for seed in range(1500)]
    assert power_of(0.64, 12) == pytest.approx(np.mean(draws), abs=0.035)
    assert smallest_significant(2) is None
    assert power_of(0.64, 3) is None


@pytest.mark.parametrize(("r", "p"), [(0.64, 0.024), (-0.15, 0.649), (-0.04, 0.897)])
def test_the_published_p_values_are_those_of_twelve_models(r: float, p: float) -> None:
    # As far as r is known, which is given with two digits.
    ends = [2 * stats.t.sf(abs(each) * math.sqrt(10 / (1 - each**2)), 10) for each in (r - 0.005, r + 0.005)]
    assert min(ends) - 0.0005 <= p <= max(ends) + 0.0005


def models(number: int, seed: int = 0) -> tuple[list[Entry], list[float]]:
    """The score is the loss with noise; the complexity too, and the expressivity is noise alone."""
    rng = np.random.default_rng(seed)
    loss, *noise = rng.standard_normal((4, number))
    points = [
        entry(
            f"model{i}",
            model(0.5 + 0.05 * (loss[i] + 0.3 * noise[0][i]), 0.3 + 0.02 * noise[1][i], loss=4 + loss[i]),
            family=("a", "b", "c")[i % 3],
            num_parameters=10 ** (6 + i % 4),
        )
        for i in range(number)
    ]
    return points, [float(-each - 0.3 * n) for each, n in zip(loss, noise[2], strict=True)]


def test_what_the_loss_explains_is_gone_given_the_loss() -> None:
    entries, scores = models(60)
    found = {each.metric: each for each in correlate(entries, scores, ["complexity", "ib/expressivity", "loss"])}
    assert list(found) == ["complexity", "expressivity", "loss"]
    of_loss = found["complexity"]
    assert of_loss.pearson.value == pytest.approx(-1 / 1.09, abs=0.05)  # of loss + .3 noise, on both sides
    assert abs(of_loss.given_loss.value or 1) < 0.3
    assert (of_loss.given_loss.p or 0) > 0.05
    assert abs(of_loss.given_size.value or 0) > 0.8
    assert found["loss"].given_loss.value is None
    p = [each.pearson.p for each in found.values()]
    assert [each.p_fdr for each in found.values()] == pytest.approx(stats.false_discovery_control(p))
    assert [each.p_holm for each in found.values()] == pytest.approx(holm([x or 0.0 for x in p]))
    told = conclusion_of(list(found.values()), entries, "mmlu")
    assert "After Holm's correction, these correlations differ significantly from 0: " in told
    assert "Given the loss, no correlation differs significantly from 0" in told


def test_within_and_across_families() -> None:
    # Higher families have both higher, and within each one the more of one the less of the other.
    x = [0.30, 0.32, 0.34, 0.40, 0.42, 0.44, 0.50, 0.52, 0.54]
    scores = [3.0, 2.0, 1.0, 13.0, 12.0, 11.0, 23.0, 22.0, 21.0]
    entries = [entry(f"m{i}", model(value, 0.2), family="abc"[i // 3]) for i, value in enumerate(x)]
    (found,) = correlate(entries, scores, ["complexity"])
    assert found.within.value == pytest.approx(-1)
    assert found.across.value == pytest.approx(1)
    assert found.families == 3
    assert (found.pearson.value or 0) > 0.9
    # Without families nothing is known of either.
    (found,) = correlate([entry(each.name, each.point) for each in entries], scores, ["complexity"])
    assert (found.within.value, found.across.value) == (None, None)


def test_what_is_undefined_is_left_out_and_counted() -> None:
    entries, scores = models(8)
    lacking = entry("lacking", model(0.125, 0.1))  # no loss, and nothing above chance
    found = {m.metric: m for m in correlate([*entries, lacking], [*scores, 0.5])}
    assert found["complexity"].num_models == 9
    assert found["loss"].num_models == 8
    assert found["token/optimality_above_null"].num_models == 8
    # One under two names, and errors, are no tests of their own.
    assert "token/complexity" not in found
    assert not any(name.endswith("_se") for name in found)
    with pytest.raises(ValueError, match="Did you mean optimality"):
        metrics_to_test(entries, ["optimalty"])


def test_too_few_say_nothing() -> None:
    entries, scores = models(3)
    assert "Nothing can be concluded" in conclusion_of(correlate(entries, scores), entries, "mmlu")
    entries, _ = models(12)
    noise = np.random.default_rng(9).standard_normal(12).tolist()
    told = conclusion_of(correlate(entries, noise, ["complexity", "expressivity"]), entries, "mmlu")
    assert "|r| must be at least 0.58 to differ significantly from 0" in told
    assert "nothing can be concluded" in told
    same = [entries[0], *entries[:-1]]
    assert "not independent" in conclusion_of(correlate(same, noise, ["complexity"]), same, "mmlu")
