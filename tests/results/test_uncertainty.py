"""Differences between measurements, paired, unpaired and refused, and information corrected for chance."""

from __future__ import annotations

import dataclasses
import math

import brute_force as bf
import numpy as np
import pytest
from scipy.stats import t as student

import ib_callback as ib
from ib_callback.measuring.plan.jackknife import omissions_of
from ib_callback.results.metrics import PLANE, PLANE_BY_NAME, PRIMARY_SCALARS
from ib_callback.results.points import PlanePoint
from ib_callback.results.uncertainty import adjusted, adjusted_information, jackknife_error

GROUPS = 8


def measured(contributions, *, null_se=0.0, points=None, **settings):
    """A measurement whose complexity and expressivity are means of the groups' contributions, [G, 2]."""
    kept = ~omissions_of(len(contributions))
    omitted = kept @ contributions / kept.sum(1, keepdims=True)
    c, e = contributions.mean(0)
    nulls = {"complexity_null": 0.1, "expressivity_null": 0.1}
    point = PlanePoint.from_layers([c], [e], **nulls, complexity_null_se=null_se, expressivity_null_se=null_se)
    jackknife = {"complexity_jackknife": tuple(omitted[:, 0]), "expressivity_jackknife": tuple(omitted[:, 1])}
    flat = dict.fromkeys(("complexity_null_jackknife", "expressivity_null_jackknife"), (0.1,) * len(omitted))
    point = dataclasses.replace(point, **jackknife, **flat)
    above = math.hypot(jackknife_error(point.complexity_above_null, omitted[:, 0] - 0.1), null_se)
    settings = {"primary": "token", "probe": "9f2c", "K": 1, "orders": ["token"], "num_bins": 100} | settings
    return ib.Measurement(
        step=1, entropy=0.5, ceiling=0.5, features={}, layers=("h.0",), entropy_by_layer=(0.5,),
        num_positions=points or 100, seconds=1.0, settings=settings,
        orders={"token": dataclasses.replace(point, complexity_above_null_se=above)},
    )  # fmt: skip


def groups(seed, mean=(0.5, 0.25), spread=0.05):
    return np.random.default_rng(seed).normal(mean, spread, size=(GROUPS, 2))


def test_paired_differences_lose_what_the_text_does_to_both():
    text = groups(0)
    change = np.random.default_rng(1).normal((0.01, 0.002), 0.002, size=(GROUPS, 2))
    found = ib.difference(measured(text + change), measured(text), "complexity")
    # For a mean, the jackknife is the textbook's paired t test.
    c = change[:, 0]
    error = c.std(ddof=1) / math.sqrt(GROUPS)
    assert found.paired
    assert found.value == pytest.approx(c.mean())
    assert found.standard_error == pytest.approx(error)
    reach = student.ppf(0.975, GROUPS - 1) * error
    assert found.interval == pytest.approx((c.mean() - reach, c.mean() + reach))
    assert found.significant
    assert found.metric == "token/complexity"
    assert "real" in str(found)
    assert found.note == ""


def test_on_different_probes_the_errors_add_up():
    text = groups(0)
    a, b = measured(text + 0.01), measured(text, probe="77aa", points=90)
    found = ib.difference(a, b, "complexity")
    error = math.sqrt(2 / GROUPS) * text[:, 0].std(ddof=1)
    assert not found.paired
    assert not found.significant
    assert found.standard_error == pytest.approx(error)
    assert found.degrees_of_freedom == pytest.approx(2 * (GROUPS - 1))  # Welch, of equal variances
    assert found.note == "different probes of 100 and 90 positions; the size alone changes the number"
    # Above null too: docs/reading-the-numbers.md has one that doubles with the probe.
    assert ib.difference(a, b, "complexity_above_null").note == found.note
    assert "unpaired): within the error (different probes" in str(found)


def test_same_probe_with_other_groups_is_unpaired():
    found = ib.difference(measured(groups(0)), measured(groups(1)[:4]), "complexity")
    assert not found.paired
    assert "upper estimate" in found.note


def test_the_same_text_is_paired_whatever_else_was_measured_on_it():
    text = groups(0)
    a, b = measured(text + 0.01), measured(text, orders=["token", "bigram"])
    assert ib.difference(a, b, "complexity").paired  # K decides which positions are valid
    for other in ({"K": 2}, {"groups": {"texts": "0a"}}):
        assert not ib.difference(a, dataclasses.replace(b, settings=b.settings | other), "complexity").paired


def test_other_sources_of_the_sequences_are_other_groups():
    text = groups(0)
    a, b = measured(text + 0.01), measured(text, groups={"texts": "ab12"})
    found = ib.difference(a, b, "complexity")
    assert not found.paired
    assert "upper estimate" in found.note
    assert ib.difference(b, measured(text + 0.01, groups={"texts": "ab12"}), "complexity").paired


def test_views_by_their_logged_names():
    text = groups(0)
    with_view = [
        dataclasses.replace(m, views={"centred/late": m.orders}) for m in (measured(text + 0.01), measured(text))
    ]
    found = ib.difference(*with_view, "centred/late/complexity")
    assert found == ib.difference(*with_view, "complexity", order="centred/late/token")
    assert found.metric == "centred/late/token/complexity"
    with pytest.raises(
        ValueError, match=r"a: order 'averaged/token' was not measured\. .* each of the views centred/late$"
    ):
        ib.difference(*with_view, "averaged/token/complexity")


@pytest.mark.parametrize("prefix", ["ib/", "ib_", "eval_ib_"])
def test_numbers_may_be_spelled_as_loggers_do(prefix):
    a, b = measured(groups(1)), measured(groups(2))
    for name in ("optimality", "token/complexity_above_null"):
        spelled = prefix + (name if prefix == "ib/" else name.replace("/", "_"))
        assert ib.difference(a, b, spelled) == ib.difference(a, b, name)
    with pytest.raises(ValueError, match=r"got 'optimallity'\. Did you mean optimality"):
        ib.difference(a, b, f"{prefix}optimallity")


def test_other_layers_are_said():
    text = groups(0)
    a, b = measured(text + 0.01), dataclasses.replace(measured(text), layers=("h.1",))
    assert ib.difference(a, b, "complexity").note == "means over different layers"


def test_above_null_the_distance_is_to_the_diagonal_whatever_the_bound():
    text = groups(0)
    a, b = measured(text + 0.01, bound="ib_curve"), measured(text, bound="diagonal")
    assert ib.difference(a, b, "distance_above_null").value == pytest.approx(0.0)


def test_optimality_is_the_default_and_sign_follows_the_arguments():
    a, b = measured(groups(0, (0.5, 0.25))), measured(groups(0, (0.5, 0.20)))
    found = ib.difference(a, b)
    assert found.metric == "token/optimality"
    assert found.value == pytest.approx(a.optimality - b.optimality)
    assert ib.difference(b, a, "token/optimality").value == pytest.approx(-found.value)
    assert ib.difference(a, b, "optimality", order="token") == found


def test_error_of_the_nulls_is_added_above_null():
    text = groups(0)
    a, b = measured(text + 0.01, null_se=0.003), measured(text, null_se=0.004)
    found = ib.difference(a, b, "complexity_above_null")
    assert found.standard_error == pytest.approx(0.005, rel=1e-6)  # the same shift in every group has no other error


def test_coverage_of_paired_differences():
    """Independent groups, a real difference of 0.01: the interval holds it about 19 times in 20."""
    draw = np.random.default_rng(5)
    inside = []
    for _ in range(300):
        text = draw.normal((0.5, 0.25), 0.05, size=(16, 2))
        change = draw.normal((0.01, 0.0), 0.01, size=(16, 2))
        low, high = ib.difference(measured(text + change), measured(text), "complexity").interval
        inside.append(low <= 0.01 <= high)
    assert 0.90 <= np.mean(inside) <= 0.99


# --- a plain difference against its forms above chance

# Numbers with a form above chance, and of which kind that is.
HELD = [
    (quantity.name, "local" if form.endswith("local") else "above_null")
    for quantity in PLANE if quantity.has_error
    for form in quantity.above_chance
]  # fmt: skip
# Complexity and expressivity above chance, of a and of b. Every number of a is the higher one otherwise.
HIGHER, LOWER = (0.5, 0.25), (0.4, 0.175)
SAME, OTHER = ((0.3, 0.15), (0.2, 0.08)), ((0.2, 0.06), (0.3, 0.14))
SAME_DISTANCE, OTHER_DISTANCE = ((0.3, 0.09), (0.2, 0.08)), ((0.2, 0.08), (0.3, 0.09))


def held(plain, *, error=0.0, settings=(), above_null=None, local=None):
    """A measurement with errors, and with what is above null or local, [C, E]; each `error` is that of both."""
    text = np.random.default_rng(0).normal(0, 1e-3, size=(GROUPS, 2))
    bare = measured(np.array(plain) + text, **dict(settings))
    sides, given = ("complexity", "expressivity"), {}
    replicates = {f"{side}_jackknife": getattr(bare["token"], f"{side}_jackknife") for side in sides}
    if above_null is not None:
        for side, value, part in zip(sides, plain, above_null, strict=True):
            given |= {f"{side}_null": value - part, f"{side}_null_se": error}
            replicates[f"{side}_null_jackknife"] = (value - part,) * (2 * GROUPS - 1)
    if local is not None:
        given |= {f"{side}_local_by_layer": [value] for side, value in zip(sides, local, strict=True)}
        given["noise"] = error
    point = PlanePoint.from_layers(*(getattr(bare["token"], f"{side}_by_layer") for side in sides), **given)
    return dataclasses.replace(bare, orders={"token": dataclasses.replace(point, **replicates)})


def above_chance(metric, kind, case):
    """What of `a` and of `b` is above chance."""
    shares = (SAME, OTHER)
    if metric.startswith("distance") and kind == "local":  # a share of the local complexity, 1 - ratio
        shares = (SAME_DISTANCE, OTHER_DISTANCE)
    given = [{kind: values} for values in shares[case == "other way"]]
    if metric.endswith("above_null"):
        for each, plain in zip(given, (HIGHER, LOWER), strict=True):
            each["above_null"] = tuple(value - 0.1 for value in plain)
    return given


@pytest.mark.parametrize("case", ["same way", "other way", "absent in one", "absent in both"])
@pytest.mark.parametrize(("metric", "kind"), HELD)
def test_a_difference_that_is_one_of_chance_is_not_called_real(metric, kind, case):
    above = above_chance(metric, kind, case)
    for each in above[: {"absent in one": 1, "absent in both": 2}.get(case, 0)]:
        del each[kind]
    found = ib.difference(*(held(plain, **of) for plain, of in zip((HIGHER, LOWER), above, strict=True)), metric)
    assert found.interval[0] > 0
    form = next(name for name in PLANE_BY_NAME[metric].above_chance if name.endswith(kind))
    assert found.contradicted_by == ((form,) if case == "other way" else ())
    assert found.significant == (case != "other way")
    if case == "other way":
        assert f"not confirmed above chance (the difference in {form} is -0." in str(found)
    else:
        assert str(found).endswith("): real")


@pytest.mark.parametrize("sides", ["a", "b", "ab"])
@pytest.mark.parametrize(
    ("metric", "kind"),
    [
        ("optimality", "above_null"), ("optimality", "local"), ("distance_to_bound", "local"),
        ("distance_above_null", "local"),
    ],
)  # fmt: skip
def test_nor_is_one_that_is_undefined_above_chance(metric, kind, sides):
    above = above_chance(metric, kind, "same way")
    a, b = (
        held(plain, error=0.2 if name in sides else 0.0, **of)
        for name, plain, of in zip("ab", (HIGHER, LOWER), above, strict=True)
    )
    found = ib.difference(a, b, metric)
    form = next(name for name in PLANE_BY_NAME[metric].above_chance if name.endswith(kind))
    assert found.contradicted_by == (form,)
    assert not found.significant
    assert f"{form} is undefined in {' and '.join(sides)} because too little is above chance there" in str(found)


def test_within_the_error_there_is_nothing_to_contradict():
    a, b = (held(HIGHER, local=of) for of in OTHER)
    found = ib.difference(a, b)
    assert (found.significant, found.contradicted_by) == (False, ())
    assert str(found).endswith("within the error")


def test_every_plain_number_has_forms_above_chance():
    assert {metric for metric, kind in HELD if kind == "above_null"} == {*PRIMARY_SCALARS}
    assert all({*quantity.above_chance} <= {*PLANE_BY_NAME} for quantity in PLANE)
    assert len(PLANE_BY_NAME["bound_ratio"].above_chance) == 2


def test_baselines_of_two_kinds_are_not_compared():
    a, b = (held((0.5, 0.2), local=of, settings=s) for of, s in zip(OTHER, ({"baseline": "linear"}, {}), strict=True))
    assert ib.difference(a, b, "complexity").contradicted_by == ()
    with pytest.raises(ValueError, match='different definitions \\(baseline: "linear" vs absent\\)'):
        ib.difference(a, b, "complexity_local")


@pytest.mark.parametrize(
    ("b", "keywords", "message"),
    [
        (measured(groups(0), num_bins=64), {}, r"different definitions \(num_bins: 100 vs 64\)"),
        (measured(groups(0)), {"metric": "entropy"}, "metric: expected one of complexity, .*got 'entropy'"),
        (measured(groups(0)), {"order": "bigram"}, r"a: order 'bigram' was not measured\. Measured orders: token"),
        (measured(groups(0)), {"metric": "bigram/complexity"}, "a: order 'bigram' was not measured"),
        (ib.Measurement.failed(3, "NaN in layer 2", settings={}), {}, "b: expected a measured point.*NaN in layer 2"),
    ],
)
def test_what_cannot_be_compared(b, keywords, message):
    with pytest.raises(ValueError, match=message):
        ib.difference(measured(groups(0)), b, **keywords)


def test_distance_to_a_curve_is_refused():
    a = measured(groups(0))
    curved = dataclasses.replace(a, orders={"token": a["token"].against(lambda _: 0.9)})
    with pytest.raises(
        ValueError, match=r"b: there is no standard error of distance_to_bound .* would need the curve of the bound"
    ):
        ib.difference(a, curved, "distance_to_bound")


def test_bound_is_part_of_the_definition_of_a_distance():
    a, b = measured(groups(0), bound="diagonal"), measured(groups(1), bound="ib_curve")
    assert ib.difference(a, b, "complexity").paired
    with pytest.raises(ValueError, match="bound: "):
        ib.difference(a, b, "distance_to_bound")


def test_points_without_errors_say_what_to_do():
    a = measured(groups(0))
    bare = dataclasses.replace(a, orders={"token": PlanePoint.from_layers([0.5], [0.25])})
    with pytest.raises(
        ValueError, match=r"b: there is no standard error of optimality .* Use Meter\(standard_errors=True\)"
    ):
        ib.difference(a, bare)
    with pytest.raises(
        ValueError, match="b: there is no standard error of complexity_above_null because it is undefined"
    ):
        ib.difference(a, bare, "complexity_above_null")
    unresolved = held((0.5, 0.2), error=0.2, local=(0.3, 0.15))
    cause = "a: .* of optimality_local because it is undefined: too little is above chance there. Defined numbers"
    with pytest.raises(ValueError, match=cause + ": complexity, .*complexity_local, expressivity_local"):
        ib.difference(unresolved, a, "optimality_local")


# --- corrected for chance

NULLS = {"complexity_null": 0.2, "expressivity_null": 0.1, "complexity_null_se": 0.001, "expressivity_null_se": 0.001}


def with_ceiling(ceiling=0.8, **changes):
    return ib.Measurement(
        step=0, entropy=0.9, ceiling=ceiling, features={}, layers=("h.0",), entropy_by_layer=(0.9,), num_positions=9,
        seconds=0.1, settings={"primary": "token"},
        orders={"token": PlanePoint.from_layers([0.5], [0.3], **NULLS | changes)},
    )  # fmt: skip


def test_it_solves_plain_for_the_truth():
    truth, null, ceiling = 0.3, 0.2, 0.8
    plain = truth + null * (1 - truth / ceiling)
    assert adjusted_information(plain, null, ceiling) == pytest.approx(truth)
    assert adjusted_information(null, null, ceiling) == 0.0
    assert adjusted_information(ceiling, null, ceiling) == pytest.approx(ceiling)


@pytest.mark.parametrize(("null", "ceiling"), [(0.75, 0.8), (0.8, 0.8), (0.0, 0.0)])
def test_undefined_where_nearly_every_label_occurs_once(null, ceiling):
    assert adjusted_information(0.79, null, ceiling) is None


def test_of_a_measurement():
    point = adjusted(with_ceiling())
    assert point.complexity == pytest.approx(0.3 / 0.75)
    assert point.expressivity == pytest.approx(0.2 / 0.875)
    assert point.optimality == pytest.approx(0.2 / 0.875 / 0.4)
    assert point.distance == pytest.approx(0.4 - 0.2 / 0.875)
    # No ratio where what is above the null is within its error.
    assert adjusted(with_ceiling(complexity_null=0.499)).optimality is None
    assert adjusted(with_ceiling(ceiling=0.21)) == ib.Adjusted(None, pytest.approx(0.2 / (1 - 0.1 / 0.21)), None, None)


def test_it_needs_nulls():
    bare = dataclasses.replace(with_ceiling(), orders={"token": PlanePoint.from_layers([0.5], [0.3])})
    for measurement in (bare, with_ceiling(ceiling=None)):
        with pytest.raises(ValueError, match=r"expected a measurement with nulls\. Use null=True"):
            adjusted(measurement)
    with pytest.raises(KeyError, match="'bigram' was not measured"):
        adjusted(with_ceiling(), "bigram")
    with pytest.raises(ValueError, match=r"expected an n-gram order, got 'late/token'.* the ceilings of views"):
        adjusted(with_ceiling(), "late/token")


def test_truth_is_nearer_than_plain_and_above_null():
    """300 labels, 900 positions: assignments are softmaxes of normal scores, and the truth is that of many draws."""
    draw = np.random.default_rng(0)
    bins, kinds = 10, 300
    vectors = draw.normal(size=(kinds, bins))

    def assign(labels):
        p = np.exp(vectors[labels] + draw.normal(size=(len(labels), bins)))
        return p / p.sum(1, keepdims=True)

    given = np.array([assign(np.full(2000, label)).mean(0) for label in range(kinds)])
    truth = bf.efficiency(given.mean(0)) - np.mean([bf.efficiency(row) for row in given])
    labels = draw.integers(kinds, size=900)
    p = assign(labels)
    plain, ceiling = bf.mutual_information(p, labels.tolist()), bf.ceiling(p)
    null = bf.permutation_null([p], labels.tolist(), repeats=30).mean
    value = adjusted_information(plain, null, ceiling)
    assert abs(value - truth) < 0.08 * truth < 0.2 * truth < min(plain - truth, truth - (plain - null))
