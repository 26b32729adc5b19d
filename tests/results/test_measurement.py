from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from ib_callback.results.measurement import Measurement, settings_differences
from ib_callback.results.metrics import FEATURE_SCALARS, PLANE_ERRORS
from ib_callback.results.points import FeaturePoint, OrderIncrement, PlanePoint

NULLS = {
    "complexity_null": 0.125, "expressivity_null": 0.0625,
    "complexity_null_se": 0.001, "expressivity_null_se": 0.002,
}  # fmt: skip
SETTINGS = {
    "probe": "9f2c", "K": 2, "orders": ("token", "bigram"), "primary": "token", "layers": "hidden_states",
    "num_bins": 100, "temperature": "calibrated", "seed": 0, "weighting": "empirical", "bound": "diagonal",
    "dtype": "float32", "version": "0.1.0",
}  # fmt: skip
# Without standard errors.
UNCERTAINTY: dict[str, Any] = {
    **dict.fromkeys(PLANE_ERRORS),
    **{f"{name}_jackknife": () for name in ("complexity", "expressivity", "complexity_null", "expressivity_null")},
}


def measurement(**changes: Any) -> Measurement:
    values: dict[str, Any] = {
        "step": 500,
        "entropy": 0.75,
        "ceiling": 0.5,
        "orders": {
            "token": PlanePoint.from_layers([0.25, 0.5], [0.125, 0.25], **NULLS),
            "bigram": PlanePoint.from_layers([0.5, 0.5], [0.25, 0.5]),
        },
        "features": {
            "preference": FeaturePoint.from_layers(
                [0.0, 0.03],
                num_positions=640,
                complexity=0.375,
                information_null=0.01,
                information_null_std=0.004,
                information_p_value=0.01,
            )
        },
        "layers": ("h.0", "h.1"),
        "entropy_by_layer": (0.7, 0.8),
        "num_positions": 9810,
        "seconds": 1.5,
        "settings": SETTINGS,
    }
    return Measurement(**values | changes)


# --- PlanePoint


def test_plane_point_derives_every_quantity_from_the_layers():
    point = PlanePoint.from_layers([0.25, 0.5], [0.125, 0.25], **NULLS)
    expected = {
        "complexity": 0.375,
        "expressivity": 0.1875,
        "optimality": 0.5,
        "distance_to_bound": 0.1875,
        "complexity_null": 0.125,
        "expressivity_null": 0.0625,
        "complexity_null_se": 0.001,
        "expressivity_null_se": 0.002,
        "complexity_above_null": 0.25,
        "expressivity_above_null": 0.125,
        "optimality_above_null": 0.5,
        "distance_above_null": 0.125,
        "bound_ratio": None,
        "complexity_by_layer": (0.25, 0.5),
        "expressivity_by_layer": (0.125, 0.25),
        **UNCERTAINTY,
    }
    assert {name: getattr(point, name) for name in expected} == expected


def test_without_a_null_what_depends_on_it_is_none():
    point = PlanePoint.from_layers([0.5], [0.75])
    assert (point.optimality, point.distance_to_bound) == (1.5, -0.25)
    values = {name: value for name, value in dataclasses.asdict(point).items() if "null" in name}
    assert set(values.values()) == {None, ()}


def test_the_distance_to_another_bound_replaces_that_to_the_diagonal():
    diagonal = PlanePoint.from_layers([0.25, 0.5], [0.125, 0.25], **NULLS)
    point = diagonal.against(lambda complexity: complexity / 1.5)
    assert (point.distance_to_bound, point.bound_ratio) == (0.0625, 0.75)
    changed = {"distance_to_bound": diagonal.distance_to_bound, "bound_ratio": None}
    assert dataclasses.replace(point, **changed) == diagonal


def test_without_a_bound_there_is_neither_distance_nor_ratio():
    point = PlanePoint.from_layers([0.25, 0.5], [0.125, 0.25]).against(None)
    assert (point.distance_to_bound, point.bound_ratio, point.optimality) == (None, None, 0.5)


def test_a_bound_of_zero_gives_a_distance_but_no_ratio():
    point = PlanePoint.from_layers([0.0], [0.0]).against(lambda complexity: 0.0)
    assert (point.distance_to_bound, point.bound_ratio) == (0.0, None)


def test_with_the_curve_as_bound_the_other_orders_have_no_distance_among_their_numbers():
    point = PlanePoint.from_layers([0.25, 0.5], [0.125, 0.25])
    of_curve = measurement(
        orders={"token": point.against(lambda c: c), "bigram": point.against(None)},
        settings={"primary": "token", "bound": "ib_curve"},
    )
    names = {name for name in of_curve.scalars() if "bound" in name}
    assert names == {"distance_to_bound", "token/distance_to_bound", "token/bound_ratio"}
    assert of_curve.metrics()["ib/token/bound_ratio"] == 0.5
    assert Measurement.from_dict(of_curve.to_dict()) == of_curve
    older = of_curve.to_dict()
    for saved in older["orders"].values():
        del saved["bound_ratio"]
    assert Measurement.from_dict(older)["token"].bound_ratio is None


@pytest.mark.parametrize(
    ("complexity", "optimality"), [(0.0, None), (9e-13, None), (-9e-13, None), (2e-12, 0.5), (-0.5, 0.5)]
)
def test_optimality_is_none_where_complexity_is_rounding_error(complexity, optimality):
    point = PlanePoint.from_layers([complexity], [complexity / 2])
    assert point.optimality == optimality
    assert point.distance_to_bound == complexity / 2


@pytest.mark.parametrize(("standard_error", "expected"), [(0.03, 0.5), (0.05, None), (0.0, 0.5)])
def test_optimality_above_null_needs_three_standard_errors_of_the_null(standard_error, expected):
    point = PlanePoint.from_layers(
        [0.5], [0.4375], complexity_null=0.375, expressivity_null=0.375,
        complexity_null_se=standard_error, expressivity_null_se=9.0,
    )  # fmt: skip
    assert point.complexity_above_null == 0.125
    assert point.optimality_above_null == expected
    assert point.distance_above_null == 0.0625


@pytest.mark.parametrize("null", [0.5, 0.625])
def test_optimality_above_null_is_none_at_and_below_an_exact_null(null):
    point = PlanePoint.from_layers(
        [0.5], [0.25], complexity_null=null, expressivity_null=0.0, complexity_null_se=0.0,
        expressivity_null_se=0.0,
    )  # fmt: skip
    assert point.optimality_above_null is None
    assert point.distance_above_null == 0.25 - null


def test_numbers_of_any_kind_become_python_floats():
    point = PlanePoint.from_layers(
        np.array([0.25, 0.5], np.float32), torch.tensor([0.125, 0.25]),
        complexity_null=np.float64(0.125), complexity_null_se=torch.tensor(0.0),
    )  # fmt: skip
    numbers = [value for value in dataclasses.asdict(point).values() if not isinstance(value, tuple)]
    numbers += [*point.complexity_by_layer, *point.expressivity_by_layer]
    assert {type(value) for value in numbers} == {float, type(None)}
    plain = {"complexity_null": 0.125, "complexity_null_se": 0}
    assert point == PlanePoint.from_layers([0.25, 0.5], [0.125, 0.25], **plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "complexity_by_layer must have at least one layer"),
        (([0.5, 0.5], [0.5]), r"one value for each layer, got \[2, 1\]"),
    ],
)
def test_layers_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PlanePoint.from_layers(*arguments)


def test_what_is_not_measured_is_refused():
    with pytest.raises(
        TypeError, match=r"expected names of measured values, got complexity_nul. Known are complexity_null, "
    ):
        PlanePoint.from_layers([0.5], [0.5], complexity_nul=0.1)
    with pytest.raises(TypeError, match=r"got optimality\. Known are information_null, .*information_se"):
        FeaturePoint.from_layers([0.5], num_positions=7, optimality=0.1)


# --- FeaturePoint


def test_feature_point_is_the_mean_over_layers_and_its_ratio_to_complexity():
    point = FeaturePoint.from_layers([0.125, 0.375], num_positions=np.int64(7), complexity=0.5)
    assert (point.information, point.ratio) == (0.25, 0.5)
    assert (point.information_null, point.information_null_std) == (None, None)
    assert (point.num_positions, type(point.num_positions)) == (7, int)


@pytest.mark.parametrize("complexity", [None, 0.0])
def test_feature_ratio_is_none_without_complexity(complexity):
    assert FeaturePoint.from_layers([0.25], num_positions=7, complexity=complexity).ratio is None


# --- Measurement


def test_quantities_are_those_of_the_primary_order():
    m = measurement()
    assert (m.complexity, m.expressivity, m.optimality, m.distance_to_bound) == (0.375, 0.1875, 0.5, 0.1875)
    m = measurement(settings=SETTINGS | {"primary": "bigram"})
    assert (m.complexity, m.expressivity, m.optimality, m.distance_to_bound) == (0.5, 0.375, 0.75, 0.125)


def test_orders_by_name():
    m = measurement()
    assert m["bigram"] is m.orders["bigram"]
    assert "bigram" in m
    assert "trigram" not in m
    assert list(m) == ["token", "bigram"]
    with pytest.raises(KeyError, match=r"order 'trigram' was not measured\. Measured orders: token, bigram"):
        m["trigram"]
    with pytest.raises(KeyError, match=r"'preference' is a feature.*features"):
        m["preference"]


def test_metrics_are_named_as_documented_and_leave_out_what_is_undefined():
    metrics = measurement(overhead=0.02, tokens_seen=1000).metrics()
    of_point = (
        "complexity expressivity optimality distance_to_bound complexity_null expressivity_null "
        "complexity_null_se expressivity_null_se optimality_null distance_null complexity_above_null "
        "expressivity_above_null optimality_above_null distance_above_null"
    ).split()
    assert set(metrics) == {
        *(f"ib/{name}" for name in of_point[:4]), "ib/entropy", "ib/ceiling",
        *(f"ib/token/{name}" for name in of_point),
        *(f"ib/bigram/{name}" for name in of_point[:4]),
        *(f"ib/preference/{name}" for name in FEATURE_SCALARS if name != "ratio_above_null"),  # it needs a null
        "ib/seconds", "ib/overhead", "ib/tokens_seen",
    }  # fmt: skip
    assert {type(value) for value in metrics.values()} == {float}
    assert metrics["ib/token/complexity_above_null"] == 0.25
    assert metrics["ib/bigram/optimality"] == 0.75
    assert metrics["ib/tokens_seen"] == 1000.0
    assert metrics["ib/preference/ratio"] == pytest.approx(0.04)


def test_metrics_under_another_prefix():
    plain, prefixed = measurement().metrics(prefix=""), measurement().metrics(prefix="probe/")
    assert plain["optimality"] == 0.5
    assert prefixed == {f"probe/{name}": value for name, value in plain.items()}


def test_to_dict_mirrors_the_attributes():
    d = measurement().to_dict()
    assert list(d)[:6] == ["step", "entropy", "complexity", "expressivity", "optimality", "distance_to_bound"]
    assert (d["step"], d["entropy"], d["complexity"], d["optimality"]) == (500, 0.75, 0.375, 0.5)
    assert d["orders"]["token"]["complexity_null"] == 0.125
    assert d["orders"]["bigram"]["complexity_null"] is None
    assert d["features"]["preference"]["information_by_layer"] == [0.0, 0.03]
    assert d["layers"] == ["h.0", "h.1"]
    assert d["settings"]["orders"] == ["token", "bigram"]
    assert (d["error"], d["tokens_seen"], d["overhead"]) == (None, None, None)


@pytest.mark.parametrize(
    "original",
    [
        measurement(),
        measurement(step=None, overhead=0.1, tokens_seen=2**60, entropy_by_layer=(0.1 + 0.2, 1e-300)),
        measurement(orders={}, features={}, ceiling=None, seconds=None),
        Measurement.failed(7, "NaN in h.1", settings=SETTINGS, layers=("h.0", "h.1"), seconds=0.5),
    ],
)
def test_round_trip_is_exact_directly_and_through_strict_json(original):
    assert Measurement.from_dict(original.to_dict()) == original
    assert Measurement.from_dict(json.loads(json.dumps(original.to_dict(), allow_nan=False))) == original


def test_unknown_keys_of_newer_files_are_ignored():
    d = measurement().to_dict()
    d["curvature"] = 1.0
    d["orders"]["token"]["some_later_number"] = 0.5
    d["features"]["preference"]["p_value"] = 0.01
    assert Measurement.from_dict(d) == measurement()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("entropy",), r"measurement lacks the required key entropy\."),
        (("settings",), r"measurement lacks the required key settings\."),
        (("orders", "token", "optimality"), r"orders.token lacks the required key optimality\."),
        (("features", "preference", "num_positions"), r"features.preference lacks the .* num_positions\."),
    ],
)
def test_a_missing_key_is_named(path, message):
    d = measurement().to_dict()
    inner = d
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    with pytest.raises(ValueError, match=message):
        Measurement.from_dict(d)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("orders", "token", "complexity"), "high", "orders.token.complexity must be .*, got 'high'"),
        (("orders", "token", "complexity"), 10**400, "orders.token.complexity must be a finite number or None"),
        (("orders", "token", "complexity_null"), True, "orders.token.complexity_null must be .*, got True"),
        (("orders", "token", "optimality"), math.nan, "orders.token.optimality must be a finite number.*got nan"),
        (("orders", "token", "complexity_by_layer"), [0.5, math.nan], "complexity_by_layer must be .* finite numbers"),
        (("orders", "token", "complexity_by_layer"), [0.5, None], "complexity_by_layer must be a list of finite.*None"),
        (
            ("orders", "token", "complexity_by_layer"),
            ["0.5", 0.5],
            "complexity_by_layer must be a list.*'0.5'",
        ),
        (("orders", "token", "complexity_by_layer"), 0.5, "complexity_by_layer must be a list of finite.*got 0.5"),
        (
            ("orders", "token", "complexity_by_layer"),
            [0.5],
            "orders.token: .*for each layer, got .1, 2. values",
        ),
        (("features", "preference", "num_positions"), -1, "num_positions must be an integer >= 0, got -1"),
        (("features", "preference", "num_positions"), 1.5, "num_positions must be an integer >= 0, got 1.5"),
        (("features", "preference", "num_positions"), True, "num_positions must be an integer >= 0, got True"),
        (("features", "preference", "num_positions"), None, "num_positions must be an integer >= 0, got None"),
        (("entropy",), math.inf, "entropy must be a finite number or None, got inf"),
        (("seconds",), "1.5", "seconds must be a finite number or None, got '1.5'"),
        (("orders",), [], r"orders must be an object with one entry per name, got \[\]"),
        (("features", "preference"), 3, "features.preference must be an object, got 3"),
        (("layers",), "h.0", "layers must be a list of names"),
        (("step",), 1.5, "step must be an integer >= 0 or None, got 1.5"),
        (("step",), -1, "step must be an integer >= 0 or None, got -1"),
        (("settings",), None, "settings must be an object, got None"),
        (("error",), "", "error must be a text or None, got ''"),
    ],
)
def test_a_wrong_value_is_named(path, value, message):
    d = measurement().to_dict()
    inner = d
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        Measurement.from_dict(d)


def test_a_record_that_is_no_object_is_refused():
    with pytest.raises(ValueError, match=r"measurement must be an object, got \[1\]"):
        Measurement.from_dict([1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": SETTINGS | {"primary": "trigram"}}, r"orders \(token, bigram\), got 'trigram'"),
        ({"layers": ("h.0",)}, r"one value per layer \(1\), but entropy_by_layer has 2, orders.token has 2"),
        ({"settings": SETTINGS | {"temperature": math.nan}}, "settings must hold JSON values only"),
        ({"settings": SETTINGS | {"dtype": torch.float32}}, "settings must hold JSON values only.*dtype"),
        ({"error": "out of memory"}, "a measurement with an error must have no numbers.*out of memory"),
    ],
)
def test_inconsistent_measurements_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        measurement(**changes)


def test_a_number_that_is_not_finite_is_in_no_file():
    with pytest.raises(ValueError, match="a measurement must hold JSON values only"):
        measurement(entropy=math.nan).to_dict()


def test_settings_are_a_copy():
    settings = copy.deepcopy(SETTINGS) | {"features": {"preference": "ab12"}}
    m = measurement(settings=settings)
    settings["features"]["preference"] = "changed"
    m.to_dict()["settings"]["features"]["preference"] = "changed"
    assert m.settings["features"]["preference"] == "ab12"


def test_a_measurement_is_changed_only_by_replacing_it():
    m = measurement()
    with pytest.raises(dataclasses.FrozenInstanceError, match="overhead"):
        m.overhead = 0.1  # type: ignore[misc]
    changed = dataclasses.replace(m, overhead=0.1)
    assert (m.overhead, changed.overhead, changed.orders) == (None, 0.1, m.orders)
    assert len({m, measurement(), changed}) == 2


def test_a_failed_point_has_a_reason_and_no_numbers():
    reason = "NaN at 7 positions\nof layer h.3"
    m = Measurement.failed(32, reason, settings=SETTINGS, layers=("h.3",), seconds=0.25)
    assert (m.step, m.error, m.layers) == (32, reason, ("h.3",))
    assert {m.entropy, m.complexity, m.expressivity, m.optimality, m.distance_to_bound, m.ceiling} == {None}
    assert (m.orders, m.features, m.num_positions) == ({}, {}, None)
    assert m.metrics() == {"ib/seconds": 0.25}
    assert str(m) == "step 32: not measured: NaN at 7 positions of layer h.3"
    with pytest.raises(KeyError, match=r"this point was not measured.*NaN at 7 positions"):
        m["token"]


def test_summary_says_what_chance_and_the_document_leave():
    local = {f"{side}_baseline_by_layer": [0.2, 0.2] for side in ("complexity", "expressivity")}
    local |= {"complexity_local_by_layer": [0.05, 0.25], "expressivity_local_by_layer": [0.01, 0.02]}
    for noise, ratio in ((0.01, "0.1"), (0.1, "undefined")):
        point = PlanePoint.from_layers([0.25, 0.45], [0.21, 0.22], **NULLS, **local, noise=noise)
        text = measurement(orders={"token": point}).summary()
        assert f"local complexity 0.15, local expressivity 0.015, local optimality {ratio}" in text


def test_summary_begins_with_what_the_study_chose():
    local = {"complexity_local_by_layer": [0.1], "expressivity_local_by_layer": [0.05]}
    point = PlanePoint.from_layers([0.3], [0.2], **local, noise=0.01)
    text = measurement(step=8, views={"prediction": {"token": point}}, loss=4.5, bits_per_byte=1.25).summary()
    begin = "step 8: prediction score 0.025, complexity 0.1, expressivity 0.05, loss 4.5 (1.25 bits per byte), token "
    assert text.startswith(begin)


def test_summary_is_one_line_with_the_nulls():
    assert str(measurement(step=12000)) == (
        "step 12,000: token complexity 0.375 (null 0.125), expressivity 0.1875 (null 0.0625), "
        "optimality 0.5 (null 0.5), distance to bound 0.1875 (null 0.0625), preference 0.015 (null 0.01), 1.5 s"
    )
    by_chance = dataclasses.replace(measurement().features["preference"], information_p_value=0.08)
    assert "preference 0.015 (null 0.01), which may be chance (p 0.08)" in str(
        measurement(features={"preference": by_chance})
    )
    # The null is not on a curve.
    curved = measurement(settings=SETTINGS | {"bound": "ib_curve"})
    assert "optimality 0.5 (null 0.5), distance to bound 0.1875, " in str(curved)
    without = measurement(step=None, orders={}, features={}, seconds=None)
    assert str(without) == "no step: nothing measured"
    collapsed = measurement(orders={"token": PlanePoint.from_layers([0.0, 0.0], [0.0, 0.0])})
    assert "optimality undefined" in str(collapsed)


# --- comparing settings


def test_settings_that_differ_are_named_with_both_values():
    a = measurement()
    b = measurement(settings=SETTINGS | {"num_bins": 64, "orders": ["token", "trigram"], "extra": {"x": 1}})
    assert settings_differences(a, b) == [
        'orders[1]: "bigram" vs "trigram"', "num_bins: 100 vs 64", 'extra: absent vs {"x": 1}',
    ]  # fmt: skip
    assert settings_differences(a, SETTINGS) == []
    assert settings_differences({"f": {"x": 1, "y": 2}}, {"f": {"x": 1}}) == ["f.y: 2 vs absent"]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (None, {"path": "head", "positions": 9}, []),  # of an earlier version, or loss=False
        ({"path": "head", "positions": 9}, {"path": "logits", "positions": 9}, []),
        ({"path": "head", "positions": 9}, {"path": "none: no head", "positions": None}, []),
        ({"positions": 9}, {"path": "head", "positions": 9}, []),
        ({"path": "head", "positions": 9}, {"path": "head", "positions": 5}, ["loss.positions: 9 vs 5"]),
    ],
)
def test_only_other_positions_of_the_loss_make_a_difference(first, second, expected):
    settings = [{"seed": 0} | ({} if loss is None else {"loss": loss}) for loss in (first, second)]
    assert settings_differences(*settings) == expected
    settings[1]["probe"] = "another"
    assert settings_differences(*settings) == ['probe: absent vs "another"']


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({}, {"center": True, "last_block": True, "companions/last": ["rankme"]}, []),
        ({}, {"draws": 4}, []),  # the plain numbers are those of the first
        ({"companions/last": ["rankme"]}, {"companions/all": ["rankme", "alpha_req"]}, []),
        ({"draws": 2}, {"draws": 4}, ["draws: 2 vs 4"]),
        ({"center": True}, {"center": True, "draws": 4}, ["draws: absent vs 4"]),  # centred is the mean over them
        ({"center": True}, {"draws": 4}, ["draws: absent vs 4"]),
    ],
)
def test_what_is_measured_besides_makes_no_difference(first, second, expected):
    assert settings_differences({"seed": 0} | first, {"seed": 0} | second) == expected


def test_the_loss_goes_to_files_and_logs():
    known = measurement(loss=3.25, loss_se=0.02, bits_per_byte=1.25, predictive_information=2.5, loss_jackknife=(3.0,))
    data = json.loads(json.dumps(known.to_dict(), allow_nan=False))
    assert Measurement.from_dict(data) == known
    names = ("loss", "loss_se", "bits_per_byte", "predictive_information")
    assert {f"ib/{name}" for name in names} <= {*known.metrics()}
    assert "loss 3.25 (1.25 bits per byte)" in str(known)
    for name in (*names, "loss_jackknife"):
        del data[name]
    older = Measurement.from_dict(data)
    assert older == measurement() and not {f"ib/{name}" for name in names} & {*older.metrics()}
    assert "loss" not in str(older)


@pytest.mark.parametrize(
    "wrapped",
    [
        "base_model.model.h.0",
        "_orig_mod.h.0",
        "h.0._orig_mod.attn",
        "_forward_module.h.0",
        "_forward_module.module.h.0",
        "_forward_module._orig_mod.base_model.model.h.0:final",
        "_fsdp_wrapped_module.h.0._fsdp_wrapped_module._checkpoint_wrapped_module.attn",
    ],
)
def test_layers_recorded_with_the_wrapper_are_the_same(wrapped):
    bare = "h.0.attn" if wrapped.endswith("attn") else "h.0:final" if wrapped.endswith(":final") else "h.0"
    settings = {"layers": [wrapped], "seed": 0}
    assert settings_differences(settings, {"layers": [bare], "seed": 0}) == []
    assert settings_differences(settings, {"layers": [bare], "seed": 1}) == ["seed: 0 vs 1"]
    assert len(settings_differences(settings, {"layers": ["module." + bare], "seed": 0})) == 1


def test_long_settings_are_shortened():
    (difference,) = settings_differences({"layers": ["h"] * 100}, {"layers": ["h"] * 99})
    assert difference.startswith('layers: ["h", "h"')
    assert len(difference) < 160


# --- increments


def test_increments_are_in_the_file_where_they_were_tested_alone():
    tested = OrderIncrement(
        narrower="token", information=0.3, null=0.26, null_std=0.01, p_value=0.04, num_permutations=20,
        num_positions=500,
    )  # fmt: skip
    point = measurement(increments={"complexity": {"bigram": tested}, "expressivity": {}})
    data = json.loads(json.dumps(point.to_dict()))
    assert Measurement.from_dict(data) == point
    assert "increments" not in measurement().to_dict()
    assert Measurement.from_dict(measurement().to_dict()).increments is None
    assert not settings_differences(point, measurement())
    data["increments"]["complexity"]["bigram"]["null"] = "much"
    with pytest.raises(ValueError, match=r"increments.complexity.bigram.null must be a finite number, got 'much'"):
        Measurement.from_dict(data)
