"""A further kind of label set is one class: it registers with the builder, and reads itself out."""

import math
import sys
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny_models import llama, make_probe

import ib_callback as ib
from ib_callback.measuring import quantities
from ib_callback.measuring.accumulate import Accumulator
from ib_callback.measuring.model.capture import Quantiser
from ib_callback.measuring.plan.builder import Builder
from ib_callback.measuring.planner import make_plan
from ib_callback.measuring.readout import Found, Readings
from ib_callback.probe.ngrams import valid_positions, value_segments
from ib_callback.results.points import FeaturePoint
from ib_callback.results.uncertainty import jackknife_error


@dataclass
class Parity:
    """Information about whether a position is an even one."""

    number: int

    @classmethod
    def plan(cls, builder):
        builder.add_segments(value_segments(builder.positions.offset % 2, len(builder.label_sets)), [("parity", "all")])
        return cls(len(builder.label_sets) - 1)

    def read(self, readings, found):
        information = readings.entropy - readings.given(self.number)
        found.features["parity"] = FeaturePoint.from_layers(
            information.tolist(), num_positions=readings.plan.num_positions
        )


def sums_of(plan, tables):
    accumulator = Accumulator(plan, *tables[0].shape[1:], weighting="empirical", device=torch.device("cpu"))
    for batch, table in zip(plan.batches, tables, strict=True):
        accumulator.add(batch, table)
    return accumulator.sums()


def test_a_quantity_of_ones_own():
    probe = make_probe()
    mask = probe.attention_mask.numpy()
    builder = Builder(valid_positions(mask, 1), None)
    total = builder.keep_total(np.arange(len(builder.positions)))
    plan = builder.build(mask, np.array([0, 4, 8, 10]), total, (Parity.plan(builder),))
    generator = torch.Generator().manual_seed(1)
    tables = [torch.rand(len(b.positions), 2, 6, generator=generator).softmax(-1) for b in plan.batches]
    found = Found("token")
    found.add(Readings(plan, sums_of(plan, tables), "empirical"))
    # The same labels as a feature of the probe.
    parity = (torch.arange(16) % 2).expand(10, 16)
    labelled = ib.Probe.from_tokens(probe.input_ids, probe.attention_mask, labels={"parity": parity})
    other = make_plan(labelled, {"token": 1}, ("parity",), batch_size=4, null=False, seed=0)
    expected = Found("token")
    readings = Readings(other, sums_of(other, tables), "empirical")
    expected.add(readings)
    assert found.features["parity"].information_by_layer == expected.features["parity"].information_by_layer
    assert 0 < found.features["parity"].information < 0.1
    assert expected.drafts["token"].point().complexity == pytest.approx(
        float((readings.entropy - readings.given(0)).mean()), abs=1e-15
    )


# A baseline of both sides of every order: information about parities of positions. Its error is made up.
PARITIES = """
from dataclasses import dataclass
from typing import ClassVar

from ib_callback.probe.ngrams import value_segments


@dataclass
class Parities:
    numbers: dict[str, int]
    turn: ClassVar[int] = 10
    of_orders: ClassVar[bool] = True

    @classmethod
    def plan(cls, builder, wanted):
        numbers = {}
        for name, divisor in (("complexity_null", 2), ("expressivity_null", 3)):
            numbers[name] = len(builder.label_sets)
            labels = builder.positions.offset % divisor
            builder.add_segments(value_segments(labels, numbers[name]), [("parity", name)])
        return [cls(numbers)]

    def read(self, readings, found):
        for draft in found.drafts.values():
            for name, number in self.numbers.items():
                draft.measured[name] = float((readings.entropy - readings.given(number)).mean())
                draft.measured[f"{name}_se"] = 1e-4
                if readings.left_out is not None:
                    draft.replicates[name] = readings.left_out.information(number)
            # As if both sides always erred alike.
            draft.baseline_errors.append(lambda weights: 1e-4 * abs(sum(weights.values())))
"""


@pytest.mark.parametrize("standard_errors", [False, 5])
def test_a_baseline_of_ones_own(monkeypatch, tmp_path, standard_errors):
    probe = make_probe()
    (tmp_path / "parities.py").write_text(PARITIES)
    monkeypatch.setattr(quantities, "__path__", [*quantities.__path__, str(tmp_path)])
    meter = ib.Meter(probe, orders=("token", "bigram"), num_bins=20, null=False, standard_errors=standard_errors)
    measured = meter.measure(llama().eval())
    # The same as features.
    offset = torch.arange(16).expand(10, 16)
    labelled = ib.Probe.from_tokens(
        probe.input_ids, probe.attention_mask, labels={"complexity": offset % 2, "expressivity": offset % 3}
    )
    monkeypatch.undo()
    del sys.modules[f"{quantities.__name__}.parities"]
    plain = ib.measure(
        llama().eval(), labelled, orders=("token", "bigram"), num_bins=20, null=False, standard_errors=standard_errors
    )
    for order in ("token", "bigram"):
        point = measured[order]
        for side in ("complexity", "expressivity"):
            value, null = getattr(plain[order], side), plain.features[side].information
            assert getattr(point, side) == value
            assert getattr(point, f"{side}_null") == pytest.approx(null, abs=1e-15)
            assert getattr(point, f"{side}_above_null") == pytest.approx(value - null, abs=1e-15)
        if not standard_errors:
            assert point.complexity_above_null_se is None
            continue
        above = [np.subtract(getattr(point, f"{side}_jackknife"), getattr(point, f"{side}_null_jackknife"))
                 for side in ("complexity", "expressivity")]  # fmt: skip
        error = jackknife_error(point.complexity_above_null, above[0])
        assert point.complexity_above_null_se == pytest.approx(math.hypot(error, 1e-4), rel=1e-12)
        # The errors of both sides cancel in a difference.
        error = jackknife_error(point.distance_above_null, above[0] - above[1])
        assert point.distance_above_null_se == pytest.approx(error, rel=1e-12)


# --- what is below the rounding error of its own sums

MANY = ib.Probe.from_tokens(
    torch.randint(0, 30, (72, 40), generator=torch.Generator().manual_seed(0)),
    labels={"half": (torch.arange(72) % 2)[:, None].expand(72, 40).clone()},
)


def information_of_equal_states(probe, batch_size, *, num_bins=100, temperature, weighting="empirical", noise=0.0):
    """About all labels, and the ceiling: 24 states as so many layers."""
    random = torch.Generator().manual_seed(3)
    states = torch.randn(24, 24, generator=random)
    quantiser = Quantiser(num_bins, temperature, 0)
    null = weighting == "empirical"
    features = tuple(probe.labels)
    plan = make_plan(probe, {"token": 1, "bigram": 2}, features, batch_size=batch_size, null=null, seed=0)
    accumulator = Accumulator(plan, 24, num_bins, weighting=weighting, device=torch.device("cpu"))
    for batch in plan.batches:
        shape = (len(batch.positions), 24, 24)
        rows = states.expand(shape) * (1 + noise * torch.randn(shape, generator=random)) if noise else states
        assignments = quantiser(rows.reshape(-1, 24))[0].view(-1, 24, num_bins)
        accumulator.add(batch, assignments.expand(len(batch.positions), -1, -1))
    readings = Readings(plan, accumulator.sums(), weighting)
    return [readings.information(number) for number in range(len(plan.label_sets))], readings.ceiling


@pytest.mark.parametrize("temperature", ["calibrated", 1.0, 0.002])
@pytest.mark.parametrize(
    ("batch_size", "weighting", "noise"),
    [(1, "empirical", 0.0), (8, "empirical", 0.0), (72, "empirical", 1e-7), (24, "uniform", 0.0)],
)
def test_equal_states_say_nothing(temperature, batch_size, weighting, noise):
    """Whatever the state, the counts of the labels and their order."""
    information, ceiling = information_of_equal_states(
        MANY, batch_size, temperature=temperature, weighting=weighting, noise=noise
    )
    assert not np.any(information)
    assert ceiling == 0


@pytest.mark.parametrize("temperature", ["calibrated", 1.0])
def test_equal_states_say_nothing_in_long_sums(temperature):
    """Equal numbers err to the same side: by more than the root of their number where one label is everywhere."""
    ids = torch.randint(0, 3, (512, 128), generator=torch.Generator().manual_seed(0))
    probe = ib.Probe.from_tokens(ids, labels={"tenth": (torch.arange(128) % 10 == 0).long().expand(512, 128).clone()})
    information, _ = information_of_equal_states(probe, 512, num_bins=6, temperature=temperature)
    assert not np.any(information)


class OneState(torch.nn.Module):
    """One state at all positions, moved by the token before it with some strength."""

    def __init__(self, strength=0.0, dtype=torch.float32, dim=256):
        super().__init__()
        random = torch.Generator().manual_seed(5)
        self.state = torch.nn.Parameter(torch.randn(dim, generator=random).to(dtype))
        self.embed = torch.nn.Embedding.from_pretrained(torch.randn(30, dim, generator=random).to(dtype))
        self.stack = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
        self.strength = strength

    def forward(self, input_ids, attention_mask):
        states = self.state + self.strength * self.embed(input_ids)
        for layer in self.stack:
            states = layer(states)
        return states


class OneDeadLayer(OneState):
    def forward(self, input_ids, attention_mask):
        self.stack[0](self.state.expand(*input_ids.shape, -1))
        return self.stack[1](self.embed(input_ids))


@pytest.mark.parametrize("temperature", ["calibrated", 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_ratio_to_what_equal_states_say(temperature, dtype):
    meter = ib.Meter(MANY, layers=["stack.*"], orders=("token", "bigram"), temperature=temperature, standard_errors=4)
    with pytest.warns(RuntimeWarning, match="the rounding error of the sums.*dead or has collapsed"):
        measured = meter.measure(OneState(dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        meter.measure(OneState(dtype=dtype))
    assert measured.ceiling == 0
    for point in measured.orders.values():
        assert (point.complexity, point.expressivity, point.distance_to_bound) == (0, 0, 0)
        assert (point.optimality, point.optimality_se, point.optimality_above_null) == (None, None, None)
        assert abs(point.distance_above_null) < 1e-9
    feature = measured.features["half"]
    assert (feature.information, feature.ratio, feature.information_p_value) == (0, None, 1.0)
    assert "optimality undefined" in measured.summary()


@pytest.mark.parametrize(("temperature", "strength", "least"), [("calibrated", 0.01, 1e-6), (1.0, 0.01, 2e-8)])
def test_what_is_small_but_true_is_measured(temperature, strength, least, recwarn):
    """At temperature 1 that is less than the rounding error at the calibrated one."""
    model = OneState(strength)
    measured = ib.measure(model, MANY, layers=["stack.*"], orders="token", temperature=temperature)
    with torch.no_grad():
        states = model.double()(MANY.input_ids, None)
    where, labels = ib.ngram_labels(MANY, "token")
    true = ib.soft_mutual_information(states[where[:, 0], where[:, 1]], labels, temperature=temperature)
    assert least < true < 20 * least
    assert measured.complexity == pytest.approx(float(true), rel=0.3)
    assert measured.optimality is not None
    assert not [one for one in recwarn if "rounding" in str(one.message)]


def test_a_dead_layer_among_others_is_named_and_the_mean_is_that_of_all():
    meter = ib.Meter(MANY, layers=["stack.*"], orders="token")
    with pytest.warns(RuntimeWarning, match=r"hidden states of 'stack\.0' nearly coincide.*is given as 0"):
        measured = meter.measure(OneDeadLayer())
    point = measured["token"]
    assert point.complexity_by_layer[0] == 0
    assert point.complexity == point.complexity_by_layer[1] / 2 > 0.1
    assert measured.optimality == point.expressivity / point.complexity
    with pytest.warns(RuntimeWarning, match="of all layers.*undefined"):
        meter.measure(OneState())
