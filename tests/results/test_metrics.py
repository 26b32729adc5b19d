"""The table of quantities: what derives from it, and each of its numbers against one worked out on its own."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import quantities as q

from ib_callback.results import points, uncertainty
from ib_callback.results.measurement import Measurement
from ib_callback.results.metrics import (
    BOOKKEEPING,
    FEATURE,
    PLANE,
    PRIMARY_SCALARS,
    TRAINING,
    VIEWS,
    WHOLE,
    Quantity,
    better_direction,
    metric_names,
    plane_scalars,
    resolve_metric,
)
from ib_callback.results.points import FeaturePoint, PlanePoint
from ib_callback.results.uncertainty import replicates_of, with_errors

PAGE = Path(__file__).parents[2] / "docs" / "quantities.md"
WORLD = q.world()
SUMS = q.sums_of(WORLD)
GROUPS = 8
BASELINE_ERROR = 0.002
BASELINES = [quantity.name for quantity in PLANE if quantity.kind == "baseline"]
REPLICATED = [quantity.name for quantity in PLANE if quantity.kind in ("layers", "baseline")]
FEATURE_SUMS = {
    "information": 0.25, "information_null": 0.125, "information_null_std": 0.03, "information_p_value": 0.01,
    "complexity": SUMS["complexity"],
    "complexity_above_null": SUMS["complexity"] - SUMS["complexity_null"],
    "complexity_null_se": SUMS["complexity_null_se"],
}  # fmt: skip


def by_name(quantity: Quantity) -> str:
    return quantity.name


def bare_point(layers: dict[str, list[float]]) -> PlanePoint:
    """Without errors."""
    given = {x.name: SUMS[x.name] for x in PLANE if x.kind in ("baseline", "error")}
    by_layer: dict[str, Any] = {f"{name}_by_layer": values for name, values in layers.items()}
    return PlanePoint.from_layers(**by_layer, **given, ceiling=q.CEILING, noise=q.NOISE)


def plane_point() -> PlanePoint:
    """From sums of the world, with errors."""
    point = bare_point(q.by_layer(WORLD))
    omitted = [q.sums_of(WORLD.without(left_out)) for left_out in q.omissions(GROUPS)]
    jackknife: dict[str, Any] = {f"{name}_jackknife": tuple(s[name] for s in omitted) for name in REPLICATED}
    return with_errors(
        dataclasses.replace(point, **jackknife), lambda weights: BASELINE_ERROR * math.hypot(*weights.values())
    )


def feature_point() -> FeaturePoint:
    given = {x.name: FEATURE_SUMS[x.name] for x in FEATURE if x.kind == "measured"}
    given |= {name: value for name, value in FEATURE_SUMS.items() if name.startswith("complexity")}
    return FeaturePoint.from_layers([0.125, 0.375], num_positions=9, **given)


POINT = plane_point()


def measurement() -> Measurement:
    names = ("h.0", "h.1", "h.2")
    feature = FeaturePoint.from_layers([0.25] * 3, num_positions=9, complexity=SUMS["complexity"], information_se=0.01)
    return Measurement(
        step=3, entropy=0.9, ceiling=0.8, orders={"token": POINT}, features={"preference": feature}, layers=names,
        entropy_by_layer=(0.9,) * 3, num_positions=96, seconds=1.0, settings={"primary": "token"},
        views={view: {"token": POINT} for view in VIEWS},
    )  # fmt: skip


# --- what derives from the table


def fields_of(table: tuple[Quantity, ...], *, replicates: bool) -> set[str]:
    names = {x.name for x in table}
    names |= {f"{x.name}_se" for x in table if x.has_error or x.kind == "baseline"}
    names |= {f"{x.name}_by_layer" for x in table if x.kind in ("layers", "baseline")}
    replicated = [x.name for x in table if replicates and x.kind in ("layers", "baseline")]
    return names | {f"{name}_{of}" for name in replicated for of in ("jackknife", "draws")}


def test_the_points_have_a_field_for_all_that_the_table_names_and_no_other():
    assert {f.name for f in dataclasses.fields(PlanePoint)} == {
        *fields_of(PLANE, replicates=True),
        "num_positions_local",
    }
    features = {f.name for f in dataclasses.fields(FeaturePoint)} - {"num_positions", "information_jackknife"}
    assert features == fields_of(FEATURE, replicates=False)
    whole = {f.name for f in dataclasses.fields(Measurement)}
    assert {*fields_of(WHOLE, replicates=False), *fields_of(TRAINING, replicates=False), *BOOKKEEPING} <= whole
    assert all(isinstance(getattr(Measurement, name), property) for name in PRIMARY_SCALARS)


def test_a_file_has_the_quantities_in_the_order_of_the_table():
    names = [f.name for f in dataclasses.fields(PlanePoint) if f.name in {x.name for x in PLANE}]
    assert names == [x.name for x in PLANE]
    assert list(measurement().to_dict()["orders"]["token"])[:4] == list(PRIMARY_SCALARS)


def test_all_of_them_are_logged_and_known_before():
    names = metric_names(["token"], ["preference"], primary="token")
    scalars = measurement().scalars()
    errors = [f"token/{x.name}_se" for x in PLANE if x.has_error]
    errors += [f"preference/{x.name}_se" for x in FEATURE if x.has_error]
    errors += [f"{view}/token/{x.name}_se" for view in VIEWS for x in PLANE if x.viewed]
    assert [name for name in scalars if name not in (*errors, *BOOKKEEPING)] == names
    assert set(errors) < set(scalars)
    for bound, order, missing in (
        ("diagonal", "token", {"curve"}), ("ib_curve", "token", set()), ("ib_curve", "bigram", {"curve", "any"}),
    ):  # fmt: skip
        expected = [x.name for x in PLANE if x.bound not in missing]
        assert list(plane_scalars(order, primary="token", bound=bound)) == expected


@pytest.mark.parametrize("quantity", [*PLANE, *FEATURE, *WHOLE, *TRAINING], ids=by_name)
def test_each_is_defined_and_is_on_the_page(quantity):
    assert quantity.definition.endswith(".")
    assert (quantity.formula is None) == (quantity.kind != "derived")
    assert better_direction(f"token/{quantity.name}") == quantity.direction == better_direction(quantity.name)
    assert not quantity.beside or quantity.beside in {x.name for x in PLANE}
    assert not quantity.drawn_of or (quantity.viewed and quantity.label)
    better = {"min": "low", "max": "high", None: ""}[quantity.direction]
    error = "yes" if quantity.has_error else ""
    row = " ".join(f"| `{quantity.name}` | {quantity.definition} | {better} | {error} |".split())
    assert row in [" ".join(line.split()) for line in PAGE.read_text(encoding="utf-8").splitlines()]


def test_what_the_training_told_is_logged_and_better_low():
    known = dataclasses.replace(measurement(), train_loss=3.5)
    assert {*known.scalars()} - {*measurement().scalars()} == {"train_loss"} == {x.name for x in TRAINING}
    assert Measurement.from_dict(known.to_dict()).metrics()["ib/train_loss"] == 3.5


def test_a_name_that_is_none_is_that_of_a_feature():
    assert better_direction("preference") == "max"
    assert better_direction("preference/unknown") is None


def test_formulas_take_what_comes_before_them():
    # The complexity of a feature is that of the primary order.
    known = {"bound", "ceiling", "complexity", "complexity_above_null"}
    for table in (PLANE, FEATURE):
        for quantity in table:
            assert quantity.formula is None or {*quantity.formula.inputs} <= known
            known.add(quantity.name)


@pytest.mark.parametrize(("error", "resolved"), [(0.001, True), (1.0, False)])
def test_a_ratio_can_be_resolved_by_the_error_of_its_own_divisor(monkeypatch, error, resolved):
    ratio = next(x for x in PLANE if x.name == "optimality_above_null")
    own = dataclasses.replace(ratio, formula=dataclasses.replace(ratio.formula, resolved_by="complexity_above_null_se"))
    table = tuple(own if x is ratio else x for x in PLANE)
    monkeypatch.setattr(points, "PLANE", table)
    monkeypatch.setattr(uncertainty, "PLANE", table)
    bare = bare_point(q.by_layer(WORLD))
    assert bare.optimality_above_null is None, "its error is not known"
    replicates = {f"{name}_jackknife": getattr(POINT, f"{name}_jackknife") for name in REPLICATED}
    point = with_errors(dataclasses.replace(bare, **replicates), lambda weights: error)
    assert (point.optimality_above_null == POINT.optimality_above_null) == resolved
    assert (point.optimality_above_null is None) == (point.optimality_above_null_se is None) == (not resolved)


# --- each quantity


def test_each_has_a_value_of_its_own_to_be_compared_with():
    assert list(q.PLANE) == [x.name for x in PLANE]
    assert set(q.FEATURE) == {x.name for x in FEATURE}


@pytest.mark.parametrize("quantity", PLANE, ids=by_name)
def test_a_point_of_the_plane_is_what_its_definition_says(quantity):
    expected = q.expected_of(quantity.name, SUMS)
    assert getattr(POINT, quantity.name) == (None if expected is None else pytest.approx(expected, rel=1e-12))


@pytest.mark.parametrize("quantity", [x for x in PLANE if x.bound], ids=by_name)
def test_so_it_is_with_the_curve_as_bound(quantity):
    curve = POINT.against(math.sqrt)
    expected = q.PLANE[quantity.name]({**SUMS, "bound": math.sqrt(SUMS["complexity"])})
    assert getattr(curve, quantity.name) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("quantity", FEATURE, ids=by_name)
def test_a_feature_is_what_its_definition_says(quantity):
    expected = q.FEATURE[quantity.name](FEATURE_SUMS)
    assert getattr(feature_point(), quantity.name) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("quantity", [x for x in PLANE if x.has_error], ids=by_name)
def test_a_standard_error_is_that_of_the_formula(quantity):
    omitted = [q.PLANE[quantity.name](q.sums_of(WORLD.without(left_out))) for left_out in q.omissions(GROUPS)]
    assert replicates_of(POINT, quantity.name) == pytest.approx(omitted, rel=1e-12)
    error = q.jackknife_error(getattr(POINT, quantity.name), omitted, GROUPS)
    # Independent errors of the baselines, which the plain numbers do not depend on.
    error = math.hypot(error, q.baseline_error(quantity.name, SUMS, BASELINES, BASELINE_ERROR))
    assert getattr(POINT, f"{quantity.name}_se") == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("quantity", PLANE, ids=by_name)
def test_without_baselines_what_depends_on_them_is_undefined(quantity):
    layers = q.by_layer(WORLD)
    bare = PlanePoint.from_layers(layers["complexity"], layers["expressivity"])
    expected = q.expected_of(quantity.name, {name: SUMS[name] for name in ("complexity", "expressivity", "bound")})
    assert getattr(bare, quantity.name) == (None if expected is None else pytest.approx(expected, rel=1e-12))


@pytest.mark.parametrize("quantity", PLANE, ids=by_name)
def test_the_order_of_layers_and_of_groups_does_not_matter(quantity):
    layers = {name: values[::-1] for name, values in q.by_layer(WORLD).items()}
    assert getattr(bare_point(layers), quantity.name) == getattr(POINT, quantity.name)
    if quantity.has_error:
        backwards = {}
        for name in REPLICATED:
            omitted = getattr(POINT, f"{name}_jackknife")
            backwards[f"{name}_jackknife"] = omitted[:GROUPS][::-1] + omitted[GROUPS:][::-1]
        reversed_groups = with_errors(
            dataclasses.replace(POINT, **backwards), lambda weights: BASELINE_ERROR * math.hypot(*weights.values())
        )
        error = getattr(POINT, f"{quantity.name}_se")
        assert getattr(reversed_groups, f"{quantity.name}_se") == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("quantity", [*PLANE, *FEATURE, *WHOLE], ids=by_name)
def test_files_hold_each_exactly_and_an_absent_error_is_none(quantity):
    whole = measurement()
    data = json.loads(json.dumps(whole.to_dict(), allow_nan=False))
    loaded = Measurement.from_dict(data)
    q.assert_same(loaded, whole, tolerance=0.0)
    saved, original = data, whole
    if quantity in PLANE:
        saved, original = data["orders"]["token"], whole["token"]
    elif quantity in FEATURE:
        saved, original = data["features"]["preference"], whole.features["preference"]
    assert saved[quantity.name] == getattr(original, quantity.name)
    if quantity.has_error:
        del saved[f"{quantity.name}_se"]
        older = Measurement.from_dict(data)
        point = older["token"] if quantity in PLANE else older.features["preference"]
        assert getattr(point, f"{quantity.name}_se") is None


# --- spellings


NAMES = ["complexity", "optimality", "bigram/complexity_null", "preference/information", "token/distance_local"]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("optimality", "optimality"), ("ib/optimality", "optimality"), ("ib_optimality", "optimality"),
        ("eval_ib_optimality", "optimality"), ("eval_ib/optimality", "optimality"),
        ("ib/bigram/complexity_null", "bigram/complexity_null"),
        ("ib_bigram_complexity_null", "bigram/complexity_null"),
        ("ib/preference", "preference/information"), ("eval_ib_preference_information", "preference/information"),
        ("ib_token_distance_local", "token/distance_local"),
    ],
)  # fmt: skip
def test_a_metric_may_be_spelled_as_loggers_spell_it(given, name):
    assert resolve_metric(given, NAMES) == name
    assert better_direction(given) == better_direction(name)


@pytest.mark.parametrize(
    ("given", "close"),
    [
        ("optimallity", "optimality"),
        ("ib/optimalty", "optimality"),
        ("bigram/complexity_nul", "bigram/complexity_null"),
    ],
)
def test_a_name_that_does_not_exist_is_answered_with_close_ones(given, close):
    with pytest.raises(ValueError, match=rf"no metric '{given}' is measured.*Did you mean {close}.*\?$"):
        resolve_metric(given, NAMES)


def test_nothing_is_made_up_for_a_name_that_is_like_none():
    with pytest.raises(ValueError, match=r"Measured metrics: complexity, .*token/distance_local$"):
        resolve_metric("zzz", NAMES)
