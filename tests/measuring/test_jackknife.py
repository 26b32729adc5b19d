"""Standard errors: every replicate against the twin without that group, and coverage in simulation."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise

import brute_force as bf
import numpy as np
import pytest
import torch
from scipy.stats import t as student

import ib_callback as ib
from ib_callback.measuring import accumulate
from ib_callback.measuring.accumulate import Accumulator, Sums
from ib_callback.measuring.plan import batches, jackknife
from ib_callback.measuring.plan.jackknife import group_sequences
from ib_callback.measuring.plan.null import LabelCounts, SubsetCurve
from ib_callback.measuring.planner import make_plan
from ib_callback.measuring.readout import read_out
from ib_callback.results.metrics import PLANE_ERRORS, PLANE_SCALARS
from ib_callback.results.points import FeaturePoint, PlanePoint
from ib_callback.results.uncertainty import (
    baseline_gradient,
    jackknife_error,
    replicates_of,
    with_errors,
)

ORDERS = {"token": 1, "bigram": 2}
GROUPS = 5


def make_probe(num_sequences=22, length=14, vocabulary=7, labels=None):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (num_sequences, length), generator=generator)
    mask = torch.arange(length) < torch.randint(5, length + 1, (num_sequences, 1), generator=generator)
    mask[3, 2:] = False  # no valid position
    return ib.Probe.from_tokens(ids, mask, labels=labels)


def table_of(probe, num_layers=2, num_bins=5):
    """[N, S, L, n] soft assignments that depend on the token, its sequence and chance."""
    generator = torch.Generator().manual_seed(1)
    number, length = probe.input_ids.shape
    of_token = torch.randn(int(probe.input_ids.max()) + 1, num_layers, num_bins, generator=generator)
    of_sequence = torch.randn(number, 1, num_layers, num_bins, generator=generator)
    noise = torch.randn(number, length, num_layers, num_bins, generator=generator)
    return torch.softmax(2 * of_token[probe.input_ids] + of_sequence + noise, -1)


def sums_of(plan, table, layers=slice(None)):
    accumulator = Accumulator(plan, *table[0, 0, layers].shape, weighting="empirical", device=torch.device("cpu"))
    for batch in plan.batches:
        accumulator.add(batch, table[batch.sequences, : batch.width].flatten(0, 1)[batch.positions][:, layers])
    return accumulator.sums()


def measurement_of(plan, sums):
    names = [f"h.{i}" for i in range(sums.kept.shape[1])]
    settings = {"primary": "token"}
    return read_out(
        plan, sums, step=0, layers=names, weighting="empirical", primary="token", settings=settings, seconds=0.0
    )


def groups_of(probe, number, paired=False):
    """The twin of `group_sequences`: the sequences of each group."""
    used = sorted({b for b, _ in bf.valid_positions(probe.attention_mask.numpy(), 2)})
    units = [sorted(u) for u in ({b, b ^ 1} for b in used)] if paired else [[b] for b in used]
    units = [unit for i, unit in enumerate(units) if unit not in units[:i]]
    cuts = [g * len(units) // number for g in range(number + 1)]
    return [{b for unit in units[a:z] for b in unit} for a, z in pairwise(cuts)]


def twin(probe, table, order, side, without, widest=2):
    """Information by its definition, of the positions outside some sequences, mean over layers."""
    ids = probe.input_ids.numpy()
    positions = [p for p in bf.valid_positions(probe.attention_mask.numpy(), widest) if p[0] not in without]
    label = bf.input_label if side == "complexity" else bf.output_label
    labels = [label(ids, position, ORDERS[order]) for position in positions]
    rows = np.array([table[b, s].double().numpy() for b, s in positions])
    return math.fsum(bf.mutual_information(rows[:, i], labels) for i in range(rows.shape[1])) / rows.shape[1]


def error_by_hand(value, omitted):
    """The formula of jackknife.py in loops."""
    one, two = omitted[:GROUPS], omitted[GROUPS:]
    variance = (GROUPS - 1) / GROUPS * sum((x - sum(one) / GROUPS) ** 2 for x in one)
    q = [GROUPS * value - (GROUPS - 1) * (one[g] + one[g + 1]) + (GROUPS - 2) * two[g] for g in range(GROUPS - 1)]
    spread = sum((x - sum(q) / len(q)) ** 2 for x in q) / (len(q) - 1)
    return math.sqrt(max(variance - 0.5 * (1 - 2 / GROUPS) ** 2 * spread, variance / 2))


@pytest.mark.parametrize(("batch_size", "many", "rows"), [(1, 64, 1024), (3, 64, 7), (100, 64, 1024), (1, 2, 1024)])
def test_replicates_are_the_numbers_without_each_group(monkeypatch, batch_size, many, rows):
    monkeypatch.setattr(batches, "MANY_BATCHES", many)  # 2: nearly every label is summed in kept histograms
    monkeypatch.setattr(accumulate, "ROWS", rows)
    probe = make_probe()
    table = table_of(probe)
    plan = make_plan(probe, ORDERS, (), batch_size=batch_size, null=False, seed=0, num_groups=GROUPS)
    assert (len(plan.late.sets) > 0) == (many == 2)
    point_of = measurement_of(plan, sums_of(plan, table)).orders
    groups = groups_of(probe, GROUPS)
    groups += [a | b for a, b in pairwise(groups)]
    for order in ORDERS:
        point = point_of[order]
        values = {side: [twin(probe, table, order, side, g) for g in groups] for side in ("complexity", "expressivity")}
        assert point.complexity_jackknife == pytest.approx(values["complexity"], abs=1e-7)
        assert point.expressivity_jackknife == pytest.approx(values["expressivity"], abs=1e-7)
        c, e = np.array(values["complexity"]), np.array(values["expressivity"])
        for name, v in (("complexity", c), ("expressivity", e), ("optimality", e / c), ("distance_to_bound", c - e)):
            assert getattr(point, f"{name}_se") == pytest.approx(error_by_hand(getattr(point, name), v), rel=1e-3)
        assert point.complexity_above_null_se is None


@pytest.mark.parametrize(("many", "most"), [(64, 60_000), (2, 60_000), (64, 3), (2, 3)])
def test_what_is_held_in_16_bits_changes_errors_by_less_than_half_a_per_cent(monkeypatch, many, most):
    monkeypatch.setattr(batches, "MANY_BATCHES", many)
    probe = make_probe(num_sequences=80, length=30, vocabulary=25)
    table = table_of(probe)

    def measured():
        plan = make_plan(probe, ORDERS, (), batch_size=3, null=True, seed=0, num_groups=GROUPS)
        return plan, measurement_of(plan, sums_of(plan, table))

    exact_plan, exact = measured()
    monkeypatch.setattr(jackknife, "MANY_HELD", 0)
    monkeypatch.setattr(jackknife, "MOST_IN_HALF", most)
    plan, short = measured()
    assert exact_plan.jackknife.scale is None
    assert (plan.jackknife.scale == 1.0) == (most == 60_000)
    assert plan.memory(2, 5) < exact_plan.memory(2, 5)
    for order in ORDERS:
        for name in PLANE_SCALARS:
            value = getattr(exact[order], name)
            assert getattr(short[order], name) == value, "only errors are of what is held"
        for side in ("complexity", "expressivity"):
            values = getattr(exact[order], f"{side}_jackknife")
            assert getattr(short[order], f"{side}_jackknife") == pytest.approx(values, rel=0, abs=2e-5), (
                "of 1,250 labels at most"
            )
            error = getattr(exact[order], f"{side}_se")
            assert getattr(short[order], f"{side}_se") == pytest.approx(error, rel=5e-3)


def test_nothing_else_changes_and_layers_may_be_measured_in_groups():
    probe = make_probe(num_sequences=20)
    table = table_of(probe)
    plain = make_plan(probe, ORDERS, (), batch_size=2, null=True, seed=0)
    plan = make_plan(probe, ORDERS, (), batch_size=2, null=True, seed=0, num_groups=3)
    whole = measurement_of(plan, sums_of(plan, table)).to_dict()
    parts = [sums_of(plan, table, slice(i, i + 1)) for i in range(2)]
    joined = measurement_of(plan, Sums.join(parts)).to_dict()
    without = measurement_of(plain, sums_of(plain, table)).to_dict()
    for order in ORDERS:
        for name, value in without["orders"][order].items():
            if name in PLANE_ERRORS or name.endswith("_jackknife"):
                assert value is None or value == []
            else:
                assert whole["orders"][order][name] == pytest.approx(value, abs=1e-7)
            assert joined["orders"][order][name] == pytest.approx(whole["orders"][order][name], abs=1e-9)


def test_the_numbers_are_bitwise_those_without_errors_where_batches_are_the_same():
    generator = torch.Generator().manual_seed(0)
    probe = ib.Probe.from_tokens(torch.randint(0, 9, (16, 12), generator=generator))
    table = table_of(probe)
    plain, plan = (make_plan(probe, ORDERS, (), batch_size=2, null=True, seed=0, num_groups=g) for g in (0, 4))
    assert [b.sequences for b in plan.batches] == [b.sequences for b in plain.batches]
    bare, full = (measurement_of(p, sums_of(p, table)).to_dict() for p in (plain, plan))
    for order in ORDERS:
        for name in (name for name in bare["orders"][order] if name not in PLANE_ERRORS and "_jackknife" not in name):
            assert full["orders"][order][name] == bare["orders"][order][name]


def test_null_replicates_follow_counts_and_scale():
    """Against the null that is measured on the probe without the group, from other subsets."""
    probe = make_probe(num_sequences=60, length=24, vocabulary=40)
    table = table_of(probe)
    plan = make_plan(probe, ORDERS, (), batch_size=4, null=True, seed=0, num_groups=GROUPS)
    point = measurement_of(plan, sums_of(plan, table)).orders["token"]
    groups = groups_of(probe, GROUPS)
    for g, group in [*enumerate(groups), (GROUPS + 2, groups[2] | groups[3])]:
        rest = [b for b in range(len(probe)) if b not in group]
        smaller = ib.Probe.from_tokens(probe.input_ids[rest], probe.attention_mask[rest])
        other = make_plan(smaller, ORDERS, (), batch_size=4, null=True, seed=1)
        expected = measurement_of(other, sums_of(other, table[rest])).orders["token"]
        tolerance = 4 * math.hypot(expected.complexity_null_se, point.complexity_null_se) + 5e-4
        assert point.complexity_null_jackknife[g] == pytest.approx(expected.complexity_null, abs=tolerance)
    # Documents of 24 tokens have no baseline of their own.
    known = [name for name in PLANE_ERRORS if getattr(point, name.removesuffix("_se")) is not None]
    assert len(known) == 8
    assert all(getattr(point, name) > 0 for name in known)


def test_features_have_an_error_and_pairs_stay_together():
    topic = torch.arange(22).unsqueeze(1).expand(22, 14) % 3
    preference = torch.arange(22).unsqueeze(1).expand(22, 14) % 2
    probe = make_probe(labels={"topic": topic, "preference": preference})
    table = table_of(probe)
    features = ("topic", "preference")
    plan = make_plan(probe, ORDERS, features, batch_size=2, null=True, seed=0, num_groups=GROUPS)
    measured = measurement_of(plan, sums_of(plan, table))
    groups = groups_of(probe, GROUPS, paired=True)
    groups += [a | b for a, b in pairwise(groups)]
    positions = bf.valid_positions(probe.attention_mask.numpy(), 2)
    for name in features:
        values = []
        for group in groups:
            here = [(b, s) for b, s in positions if b not in group]
            rows = np.array([table[b, s].double().numpy() for b, s in here])
            labels = [int(probe.labels[name][p]) for p in here]
            values.append(np.mean([bf.mutual_information(rows[:, i], labels) for i in range(2)]))
        feature = measured.features[name]
        assert feature.information_se == pytest.approx(error_by_hand(feature.information, values), rel=1e-3)
        assert feature.information_jackknife == pytest.approx(values, abs=1e-6)
    assert measured.metrics()["ib/topic/information_se"] == measured.features["topic"].information_se


def test_a_feature_that_one_group_has_alone_has_no_error():
    topic = torch.full((22, 14), -1)
    topic[0] = torch.arange(14) % 2
    probe = make_probe(labels={"topic": topic})
    plan = make_plan(probe, ORDERS, ("topic",), batch_size=2, null=True, seed=0, num_groups=GROUPS)
    feature = measurement_of(plan, sums_of(plan, table_of(probe))).features["topic"]
    assert feature.information_se is None
    assert feature.information_jackknife == ()


# --- groups


def test_groups_are_of_neighbours_and_batches_never_cross_them():
    groups = group_sequences(np.array([0, 1, 2, 4, 5, 7, 8, 9]), 10, 3, 2, paired=False)
    # Used are 0 1 | 2 4 5 | 7 8 9.
    assert groups.sequence_bounds.tolist() == [0, 2, 7, 10]
    assert groups.batch_bounds.tolist() == [0, 2, 3, 5, 7, 8, 10]
    assert groups.of_sequence(np.arange(10)).tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
    pairs = group_sequences(np.array([0, 1, 3, 4, 5, 6, 7]), 8, 3, 8, paired=True)
    assert pairs.sequence_bounds.tolist() == [0, 2, 4, 8]
    assert group_sequences(np.array([2, 5]), 6, 16, 4, paired=False).sequence_bounds.tolist() == [0, 5, 6]


def test_two_sequences_are_too_few():
    probe = ib.Probe.from_tokens(torch.arange(40).view(2, 20))
    with pytest.raises(ib.ProbeError, match=r"at least three sequences .* for standard errors, got 2 sequences"):
        ib.Meter(probe, standard_errors=True).plan()


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"standard_errors": 2}, ValueError, "standard_errors: expected an integer of at least 3, got 2"),
        ({"standard_errors": 33}, ValueError, "standard_errors: expected at most 32 groups, got 33"),
        ({"standard_errors": 2.5}, TypeError, "standard_errors: expected an integer"),
        (
            {"standard_errors": True, "weighting": "uniform"},
            ValueError,
            "expected weighting='empirical', got 'uniform'",
        ),
    ],
)
def test_bad_settings(keywords, error, message):
    with pytest.raises(error, match=message):
        ib.Meter(make_probe(), **keywords)


def test_the_excess_of_a_quadratic_statistic_is_taken_off():
    """θ = |mean of x|² around mean 0: all of its variance is that of pairs, and V alone expects twice as much."""
    draw = np.random.default_rng(0)
    values, corrected, plain = [], [], []
    for _ in range(800):
        x = draw.normal(size=(16, 30))
        one = [(np.delete(x, g, 0).mean(0) ** 2).sum() for g in range(16)]
        two = [(np.delete(x, [g, g + 1], 0).mean(0) ** 2).sum() for g in range(15)]
        values.append((x.mean(0) ** 2).sum())
        corrected.append(jackknife_error(values[-1], [*one, *two]) ** 2)
        plain.append(15 * np.var(one))
    assert np.mean(plain) / np.var(values) == pytest.approx(2.0, abs=0.3)
    assert 1.0 < np.mean(corrected) / np.var(values) < 1.5


def test_three_sequences_are_enough():
    probe = ib.Probe.from_tokens(torch.randint(0, 4, (3, 12), generator=torch.Generator().manual_seed(0)))
    plan = ib.Meter(probe, orders="token", standard_errors=True).plan()
    point = measurement_of(plan, sums_of(plan, table_of(probe))).orders["token"]
    one = [twin(probe, table_of(probe), "token", "complexity", {g}, widest=1) for g in range(3)]
    assert point.complexity_jackknife[:3] == pytest.approx(one, abs=1e-7)
    assert point.complexity_se == pytest.approx(math.sqrt(2 * np.var(one)), rel=1e-4)


def test_settings_mean_a_number_of_groups():
    probe = make_probe()
    assert [ib.Meter(probe, standard_errors=s).standard_errors for s in (False, True, 4)] == [0, 16, 4]
    assert ib.Meter(probe, orders="token", standard_errors=4).plan().jackknife.taken.shape[1] == 4
    plan = ib.Meter(probe, standard_errors=4).plan()
    bare = dataclasses.replace(plan, jackknife=None)
    added = plan.memory(2, 5) - bare.memory(2, 5)
    assert added == 2 * 5 * plan.jackknife.bytes_per_bin() > 4 * 2 * 5 * plan.jackknife.num_snapshots
    assert ib.Meter(probe).plan().jackknife is None


# --- numbers


def test_error_of_three_groups():
    assert jackknife_error(2.5, [1.0, 2.0, 4.0, 0.0, 0.0]) == pytest.approx(math.sqrt(2 / 3 * (16 + 1 + 25) / 9))


NULL = dict.fromkeys(("complexity_null", "expressivity_null"), 0.1)
NULL |= dict.fromkeys(("complexity_null_se", "expressivity_null_se"), 0.001)


def point_with(**changes):
    values = {
        "complexity_jackknife": (0.5, 0.52, 0.48, 0.5, 0.5),
        "expressivity_jackknife": (0.25, 0.24, 0.26, 0.25, 0.25),
        "complexity_null_jackknife": (0.1, 0.11, 0.1, 0.1, 0.1),
        "expressivity_null_jackknife": (0.1, 0.1, 0.09, 0.1, 0.1),
    }
    return dataclasses.replace(PlanePoint.from_layers([0.5], [0.25], **NULL), **values | changes)


def test_error_of_the_null_adds_to_what_is_above_it():
    point = point_with()
    errors = with_errors(point, lambda weights: math.hypot(*weights.values()) * 0.01)
    ratios = np.array([0.15 / 0.4, 0.14 / 0.41, 0.17 / 0.38])
    u, v = 0.15 / 0.4**2, -1 / 0.4
    assert errors.optimality_above_null_se == pytest.approx(
        math.hypot(math.sqrt(2 * ratios.var()), math.hypot(u, v) * 0.01)
    )
    assert errors.optimality_se == pytest.approx(math.sqrt(2 * np.var([0.5, 0.24 / 0.52, 0.26 / 0.48])))
    assert baseline_gradient(point, "complexity_above_null") == {"complexity_null": -1.0}
    assert baseline_gradient(point, "distance_above_null") == {"complexity_null": -1.0, "expressivity_null": 1.0}
    assert baseline_gradient(point, "complexity") == {}


def test_gradient_of_the_null_is_that_of_the_formula():
    def above(null_c, null_e):
        return (0.25 - null_e) / (0.5 - null_c)

    step = 1e-6
    u = (above(0.1 + step, 0.1) - above(0.1 - step, 0.1)) / (2 * step)
    v = (above(0.1, 0.1 + step) - above(0.1, 0.1 - step)) / (2 * step)
    expected = {"complexity_null": u, "expressivity_null": v}
    assert baseline_gradient(point_with(), "optimality_above_null") == pytest.approx(expected, rel=1e-6)


def test_undefined_numbers_have_no_error():
    point = point_with()
    with pytest.raises(ValueError, match=r"metric: expected one of complexity, .*got 'entropy'"):
        replicates_of(point, "entropy")
    assert replicates_of(PlanePoint.from_layers([0.5], [0.25]), "complexity") is None
    assert replicates_of(dataclasses.replace(point, optimality_above_null=None), "optimality_above_null") is None
    assert replicates_of(point_with(complexity_jackknife=(0.5, 0.0, 0.5, 0.5, 0.5)), "optimality") is None


def test_distance_to_a_curve():
    point = point_with().against(math.sqrt)
    assert replicates_of(point, "distance_to_bound") is None  # the replicates know the diagonal only
    c, e = np.array(point.complexity_jackknife), np.array(point.expressivity_jackknife)
    curved = with_errors(point, lambda _: 0.0, math.sqrt)
    assert curved.distance_to_bound_se == pytest.approx(jackknife_error(0.5**0.5 - 0.25, np.sqrt(c) - e))
    assert with_errors(point_with().against(None), lambda _: 0.0).distance_to_bound_se is None


def test_combined_error_of_two_nulls_of_one_curve():
    curve = SubsetCurve(np.array([1.0, 2, 4]), np.array([0.3, 0.2, 0.0]), np.array([0.0, 0.01, 0.0]), np.zeros(3))
    a, b = LabelCounts.of(np.array([2, 2])), LabelCounts.of(np.array([1, 1, 2]))
    error = curve.error_of({"a": a, "b": b})
    assert error({"a": 1.0, "another kind of baseline": 7.0}) == pytest.approx(curve.null(a)[1])
    assert error({"a": -1.0, "b": 1.0}) == pytest.approx(0.5 * 0.01)
    assert curve.error_of({"a": a, "b": a})({"a": -1.0, "b": 1.0}) == 0.0
    single = SubsetCurve(np.array([1.0]), np.array([0.0]), np.array([0.0]), np.zeros(1))
    assert single.error_of({"a": a, "b": b})({"a": 1.0, "b": 1.0}) == 0.0


# --- storage


def test_measurements_of_old_files_load_and_new_ones_come_back():
    probe = make_probe()
    plan = make_plan(probe, ORDERS, (), batch_size=4, null=True, seed=0, num_groups=GROUPS)
    measured = measurement_of(plan, sums_of(plan, table_of(probe)))
    data = json.loads(json.dumps(measured.to_dict()))
    assert ib.Measurement.from_dict(data) == measured
    del data["views"]
    for order in data["orders"].values():
        for name in (*PLANE_ERRORS, *(name for name in list(order) if name.endswith("_jackknife"))):
            del order[name]
    old = ib.Measurement.from_dict(data)
    assert old["token"].complexity_se is None
    assert old["token"].complexity_jackknife == ()
    assert not any(name.endswith("_se") and not name.endswith("_null_se") for name in old.metrics())
    assert measured.metrics()["ib/token/optimality_se"] == measured["token"].optimality_se
    assert FeaturePoint.from_layers([0.1], num_positions=3).information_se is None
    assert not set(PLANE_ERRORS) & set(PLANE_SCALARS)
    with pytest.raises(ValueError, match=r"one value for each omission, got \[9, 1, 9, 9\] values"):
        dataclasses.replace(measured["token"], expressivity_jackknife=(0.1,))


# --- coverage


@pytest.mark.parametrize(("vocabulary", "spread"), [(20, 0.5), (400, 1.0)])
def test_coverage_of_the_interval(vocabulary, spread):
    """Small twin of benchmarks/coverage.py: well-sampled and undersampled labels, sequences that are alike within."""
    groups, number, length, bins, repeats = 16, 32, 14, 8, 200
    generator = torch.Generator().manual_seed(vocabulary)
    of_token = torch.randn(vocabulary, bins, generator=generator)
    frequency = 1.0 / torch.arange(1, vocabulary + 1)
    names = ("complexity", "expressivity", "optimality", "distance_to_bound", "complexity_above_null")
    values, errors = [], []
    for _ in range(repeats):
        topic = torch.randn(number, vocabulary, generator=generator)
        ids = torch.multinomial(frequency * (spread * topic).exp(), length, replacement=True, generator=generator)
        shift = spread * torch.randn(number, 1, bins, generator=generator)
        noise = torch.randn(number, length, bins, generator=generator)
        table = torch.softmax(of_token[ids] + shift + noise, -1).unsqueeze(2)
        probe = ib.Probe.from_tokens(ids)
        plan = make_plan(probe, {"token": 1}, (), batch_size=2, null=True, seed=0, num_groups=groups)
        point = measurement_of(plan, sums_of(plan, table)).orders["token"]
        values.append([getattr(point, name) for name in names])
        errors.append([getattr(point, f"{name}_se") for name in names])
    values, errors = np.array(values), np.array(errors)
    inside = np.abs(values - values.mean(0)) < student.ppf(0.975, groups - 1) * errors
    covered = dict(zip(names, inside.mean(0).tolist(), strict=True))
    assert all(0.90 <= share <= 0.99 for share in covered.values()), covered
