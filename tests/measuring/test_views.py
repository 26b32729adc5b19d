"""Views: draws of reference points, mean states removed, the last layers; against loops over float64 states."""

from __future__ import annotations

import dataclasses
import json
from statistics import fmean

import brute_force as bf
import numpy as np
import pytest
import quantities as q
import torch
from tiny_models import llama, make_probe
from torch import nn

import ib_callback as ib
from ib_callback.measuring.views import Views
from ib_callback.results.metrics import metric_names

BINS = 12
LAYERS = 5
# Steps of 2^32 / golden ratio from the seed, which is 4.
SEEDS = (4, 2654435773, 1013904246)
ORDERS = ("token", "bigram")
SETTINGS = {"orders": ORDERS, "num_bins": BINS, "seed": 4, "batch_size": 3, "standard_errors": 5}
EVERYTHING = {
    "draws": 3, "center": True, "last_block": True, "companions": ("rankme", "alpha_req"), "companion_layers": "all",
}  # fmt: skip
PROBE = make_probe(highest=8)
MODEL = llama(num_hidden_layers=LAYERS).eval()


@pytest.fixture(scope="module")
def measured() -> ib.Measurement:
    return ib.measure(MODEL, PROBE, **SETTINGS, **EVERYTHING)


@pytest.fixture(scope="module")
def plain() -> ib.Measurement:
    return ib.measure(MODEL, PROBE, **SETTINGS)


@pytest.fixture(scope="module")
def states() -> dict[str, list[np.ndarray]]:
    """[T, dim] in float64 of the valid positions: of each layer, and of the last block before the norm."""
    seen = []
    handle = MODEL.model.layers[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        found = MODEL(
            input_ids=PROBE.input_ids, attention_mask=PROBE.attention_mask.long(), output_hidden_states=True
        ).hidden_states[1:]
    handle.remove()
    raw = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]
    where = tuple(np.array(bf.valid_positions(PROBE.attention_mask.numpy(), 2)).T)
    every, before = ([table.double().numpy()[where] for table in tables] for tables in (found, [*found[:-1], raw]))
    return {"after": every, "before": before}


def information(states: np.ndarray, order: str, side: str, seed: int, *, centred: bool = False) -> float:
    unit = states / np.sqrt((states**2).sum(1, keepdims=True))
    used = unit - unit.mean(0) if centred else unit
    points, temperature = bf.reference_points(16, BINS, seed), bf.calibrated_temperature(16, BINS)
    ids, positions = PROBE.input_ids.numpy(), bf.valid_positions(PROBE.attention_mask.numpy(), 2)
    label = {"complexity": bf.input_label, "expressivity": bf.output_label}[side]
    labels = [label(ids, position, bf.order_width(order)) for position in positions]
    return bf.mutual_information(np.array([bf.soft_assignment(z, points, temperature) for z in used]), labels)


@pytest.mark.parametrize("side", ["complexity", "expressivity"])
@pytest.mark.parametrize("order", ORDERS)
def test_by_definition(measured, states, order, side):
    after, before = states["after"], states["before"]
    for variant, seeds in (("", SEEDS[:1]), ("averaged", SEEDS), ("centred", SEEDS)):
        start = f"{variant}/" if variant else ""
        # The last quarter of five layers are two.
        parts = {
            "": after,
            "late": after[-2:],
            "last": after[-1:],
            "late_blocks": before[-2:],
            "last_block": before[-1:],
        }
        for part, layers in parts.items():
            name = "/".join(filter(None, (variant, part, order)))
            expected = [
                fmean(information(z, order, side, s, centred=variant == "centred") for s in seeds) for z in layers
            ]
            assert getattr(measured[name], f"{side}_by_layer") == pytest.approx(expected, abs=1e-6), name
            assert getattr(measured[name], side) == pytest.approx(fmean(expected), abs=1e-6), name
        assert measured[f"{start}late/{order}"].optimality == pytest.approx(
            measured[f"{start}late/{order}"].expressivity / measured[f"{start}late/{order}"].complexity
        )


def test_plain_numbers_are_those_without_views(measured, plain):
    assert numbers(measured.orders) == pytest.approx(numbers(plain.orders), rel=0, abs=1e-12)
    assert measured.entropy_by_layer == plain.entropy_by_layer
    assert list(plain.views) == ["late", "last", "readout", "prediction"]
    assert plain.averaged == plain.orders
    assert plain.centred == {}
    assert "draws" not in plain.settings


@pytest.mark.parametrize("budget", [4 * 10**6, 8 * 10**6], ids=["layer by layer", "some layers at once"])
def test_groups_of_layers_do_not_matter(measured, budget):
    meter = ib.Meter(PROBE, **SETTINGS, **EVERYTHING, memory_budget=budget)
    assert 3 <= meter.preflight(MODEL).passes <= LAYERS + 2  # one more for the mean states
    parts = meter.measure(MODEL)
    assert parts.dispersion_by_layer == measured.dispersion_by_layer
    assert list(parts.views) == list(measured.views)
    for found, expected in [
        (parts.orders, measured.orders),
        *((parts.views[name], measured.views[name]) for name in measured.views),
        *((parts.companions[name], measured.companions[name]) for name in measured.companions),
    ]:
        assert numbers(found) == pytest.approx(numbers(expected), rel=0, abs=1e-10)


def numbers(points: dict) -> list[float]:
    """All numbers of points, or the values, in one list."""
    values = [dataclasses.astuple(p) if dataclasses.is_dataclass(p) else (p,) for p in points.values()]
    flat = [number for value in values for part in value for number in (part if isinstance(part, tuple) else (part,))]
    return [-1.0 if number is None else number for number in flat]


def test_the_last_layers_have_nulls_and_baselines_of_their_own(plain):
    for view, layers in (("late", slice(-2, None)), ("last", slice(-1, None))):
        part, whole = plain[f"{view}/token"], plain["token"]
        for name in ("complexity", "expressivity", "complexity_null", "expressivity_null"):
            values = getattr(whole, f"{name}_by_layer")[layers]
            # A null is interpolated for the mean over layers.
            assert getattr(part, name) == pytest.approx(fmean(values), abs=2e-3 if "null" in name else 1e-12)
        assert part.optimality_se > 0
        assert part.optimality == pytest.approx(part.expressivity / part.complexity)


def test_an_average_over_draws_is_that_of_meters_with_these_seeds(measured):
    single = [ib.measure(MODEL, PROBE, **SETTINGS | {"seed": seed}) for seed in SEEDS]
    for order in ORDERS:
        point, points = measured.averaged[order], [m[order] for m in single]
        for name in ("complexity", "expressivity", "distance_to_bound"):
            values = [getattr(each, name) for each in points]
            assert getattr(point, name) == pytest.approx(fmean(values), abs=1e-12)
            assert point.spread(name) == pytest.approx(np.std(values, ddof=1), rel=1e-9)
        means = {side: [getattr(each, side) for each in points] for side in ("complexity", "expressivity")}
        assert point.optimality == pytest.approx(fmean(means["expressivity"]) / fmean(means["complexity"]))
        # Each draw left out of both means.
        left = [
            (sum(means["expressivity"]) - e) / (sum(means["complexity"]) - c)
            for c, e in zip(means["complexity"], means["expressivity"], strict=True)
        ]
        error_of_draws = (2 / 3 * sum((value - fmean(left)) ** 2 for value in left)) ** 0.5
        assert point.spread("optimality") == pytest.approx(3**0.5 * error_of_draws, rel=1e-9)
        omitted = np.mean([np.array(each.complexity_jackknife) for each in points], axis=0)
        of_text = q.jackknife_error(point.complexity, omitted.tolist(), 5)
        of_draws = point.spread("complexity") / 3**0.5
        assert point.complexity_se == pytest.approx(np.hypot(of_text, of_draws), rel=1e-6)


def test_of_two_models_the_same_draws_are_compared(measured):
    torch.manual_seed(5)
    other = ib.measure(llama(num_hidden_layers=LAYERS).eval(), PROBE, **SETTINGS, **EVERYTHING)
    assert ib.difference(measured, measured, "averaged/token/complexity").standard_error == 0
    found = ib.difference(other, measured, "centred/late/token/complexity")
    a, b = other["centred/late/token"], measured["centred/late/token"]
    assert found.value == a.complexity - b.complexity
    omitted = np.array(a.complexity_jackknife) - np.array(b.complexity_jackknife)
    of_text = q.jackknife_error(found.value, omitted.tolist(), 5)
    draws = np.array(a.complexity_draws) - np.array(b.complexity_draws)
    assert found.standard_error == pytest.approx(np.hypot(of_text, (2 * draws.var()) ** 0.5), rel=1e-9)


def test_dispersion_is_the_mean_cosine_distance_of_two_positions(measured, plain, states):
    expected = []
    for z in states["after"]:
        unit = z / np.sqrt((z**2).sum(1, keepdims=True))
        cosines = unit @ unit.T
        expected.append(1 - (cosines.sum() - np.trace(cosines)) / (len(z) * (len(z) - 1)))
    assert plain.dispersion_by_layer == pytest.approx(expected, abs=1e-6)
    assert plain.dispersion == pytest.approx(fmean(expected), abs=1e-6)
    assert measured.dispersion_by_layer == plain.dispersion_by_layer
    assert plain.metrics()["ib/dispersion"] == plain.dispersion


def test_companions_by_singular_values(measured, states):
    for name, z in zip(measured.layers, states["after"], strict=True):
        singular = np.linalg.svd(z, compute_uv=False)
        share = singular / singular.sum()
        assert measured.companions["rankme"][name] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)
        spectrum = np.linalg.svd(z - z.mean(0), compute_uv=False) ** 2
        rank = np.arange(1, len(spectrum) + 1)
        slope = np.polyfit(np.log(rank), np.log(spectrum), 1, w=np.sqrt(1 / rank))[0]
        assert measured.companions["alpha_req"][name] == pytest.approx(-slope, rel=1e-5)
    mean = fmean(measured.companions["rankme"].values())
    assert measured.metrics()["ib/rankme"] == pytest.approx(mean)
    last = ib.measure(MODEL, PROBE, **SETTINGS, companions="rankme").companions["rankme"]
    assert list(last) == [measured.layers[-1]]


@pytest.mark.parametrize(
    ("keywords", "passes"), [({}, 1), ({"draws": 4, "last_block": True}, 1), ({"center": True}, 2)]
)
def test_how_often_the_model_runs(keywords, passes):
    calls = []
    model = llama(num_hidden_layers=LAYERS).eval()
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    meter = ib.Meter(PROBE, orders=["token"], batch_size=5, **keywords)
    meter.measure(model)
    calls.clear()
    meter.measure(model)
    assert len(calls) == 2 * passes


class Constant(nn.Module):
    """The same state everywhere, but for as much noise as float32 leaves."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.weight = nn.Parameter(torch.arange(1.0, 17.0) / 10)
        self.noise = noise

    def forward(self, input_ids, attention_mask=None):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(*input_ids.shape, 16, generator=generator)
        return self.layer(self.weight + self.noise * noise)


@pytest.mark.parametrize("noise", [0.0, 1e-8, 1e-7])
def test_of_collapsed_states_nothing_is_left_without_their_mean(noise):
    found = ib.measure(Constant(noise), PROBE, orders=["token"], layers=["layer"], num_bins=BINS, center=True)
    assert found.centred["token"].complexity == 0
    assert found.centred["token"].optimality is None
    assert 0 <= found.dispersion < 1e-6


def test_a_common_direction_is_removed():
    class Offset(Constant):
        def forward(self, input_ids, attention_mask=None):
            table = torch.nn.functional.one_hot(input_ids % 16, 16).float()
            return self.layer(table + self.noise * self.weight)

    with_offset, without = (
        ib.measure(Offset(size), PROBE, orders=["token"], layers=["layer"], num_bins=BINS, center=True)
        for size in (10.0, 0.0)
    )
    assert with_offset["token"].complexity < 0.05 * without["token"].complexity
    assert with_offset["centred/token"].complexity > 0.5 * without["centred/token"].complexity


def test_what_padding_holds_does_not_matter():
    class Padded(Constant):
        def forward(self, input_ids, attention_mask=None):
            table = torch.nn.functional.one_hot(input_ids % 16, 16).float()
            return self.layer(torch.where(attention_mask.bool().unsqueeze(-1), table, self.noise))

    probe = ib.Probe.from_tokens(PROBE.input_ids, PROBE.attention_mask)
    assert not probe.attention_mask.all()
    a, b = (
        ib.measure(Padded(held), probe, orders=["token"], layers=["layer"], center=True, companions="rankme")
        for held in (0.0, float("inf"))
    )
    assert dataclasses.replace(a, seconds=0) == dataclasses.replace(b, seconds=0)
    assert a.dispersion > 0


def test_assignments_and_feature_probes_are_of_the_first_draw():
    labels = {"parity": torch.where(PROBE.attention_mask, PROBE.input_ids % 2, -1)}
    other = ib.Probe.from_tokens(PROBE.input_ids, PROBE.attention_mask, labels=labels)
    meters = [ib.Meter(PROBE, orders=["token"], feature_probes=other, **more) for more in ({}, EVERYTHING)]
    (first, second) = (dict(meter.assignments(MODEL)) for meter in meters)
    assert all(torch.equal(first[name], second[name]) for name in first)
    (a, b) = (meter.measure(MODEL).features["parity"] for meter in meters)
    assert a.information_by_layer == pytest.approx(b.information_by_layer, abs=1e-12)


def test_names(measured, plain):
    assert measured["late/token"] == measured.late["token"]
    assert "centred/last/token" in measured
    assert "centred/token" not in plain
    with pytest.raises(
        KeyError,
        match=r"'centred/token' was not measured\. Measured orders: token, bigram, also in each of .* late, last",
    ):
        plain["centred/token"]
    meter = ib.Meter(PROBE, **SETTINGS, **EVERYTHING)
    known = metric_names(ORDERS, primary="token", views=meter.view_names)
    scalars = measured.scalars()
    assert set(known) <= set(scalars)
    assert scalars["late/optimality"] == scalars["late/token/optimality"] == measured.late["token"].optimality
    assert scalars["centred/token/optimality_spread"] == measured.centred["token"].spread("optimality")
    assert scalars["centred/token/optimality_se"] == measured.centred["token"].optimality_se
    assert ib.Measurement.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured
    settings = measured.settings
    assert (settings["draws"], settings["center"], settings["last_block"]) == (3, True, True)


@pytest.mark.parametrize("length", [16, 60])
@pytest.mark.parametrize(
    "settings", [{}, {"null": False}, {"baseline": False}, {"loss": False}, {"weighting": "uniform"}], ids=str
)
@pytest.mark.parametrize("num_bytes", [None, 300])
def test_what_is_left_out_is_known_before(length, settings, num_bytes):
    probe = make_probe(length=length, highest=8, num_bytes=num_bytes)
    model = llama(max_position_embeddings=64)
    meter = ib.Meter(probe, orders="token", num_bins=BINS, center=True, **settings)
    known = metric_names(meter.orders, primary="token", views=meter.view_names, without=meter.unmeasured)
    defined = {name for name, value in meter.measure(model).scalars().items() if value is not None}
    assert defined - {"seconds"} <= set(known)
    assert {name for name in known if not name.endswith(("_local", "optimality_above_null"))} <= defined


def test_with_the_curve_as_bound_and_uniform_weights():
    curve = ib.measure(MODEL, PROBE, orders=ORDERS, num_bins=BINS, bound="ib_curve")
    assert curve.late["token"].bound_ratio is not None
    assert curve.late["bigram"].distance_to_bound is None
    assert "late/bigram/distance_to_bound" not in curve.scalars()
    uniform = ib.measure(MODEL, PROBE, orders=ORDERS, num_bins=BINS, weighting="uniform", draws=2, center=True)
    assert uniform["centred/late/token"].complexity_null is None
    assert uniform["averaged/token"].complexity == pytest.approx(
        fmean(ib.measure(MODEL, PROBE, orders=ORDERS, num_bins=BINS, weighting="uniform", seed=s)["token"].complexity
              for s in (0, 2654435769))
    )  # fmt: skip


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"draws": 0}, "draws: expected an integer of at least 1, got 0; 1 is the default"),
        ({"last_block": True, "layers": "blocks"}, 'last_block: expected layers="hidden_states"'),
        ({"companions": "rank"}, "companions: expected some of 'rankme', 'alpha_req', got 'rank'"),
        ({"companions": None}, r"companions: expected some of 'rankme', 'alpha_req', or \(\), got None"),
        ({"companion_layers": "first"}, "companion_layers: expected one of 'last', 'late', 'all', got 'first'"),
    ],
)
def test_settings_that_cannot_be(keywords, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ib.Meter(PROBE, **keywords)


@pytest.mark.parametrize(("layers", "late"), [(1, 1), (4, 1), (5, 2), (30, 8)])
def test_the_last_quarter(layers, late):
    assert Views(layers).layers == {"late": list(range(layers - late, layers)), "last": [layers - 1]}
