"""A further kind of label set is one class: it registers with the builder, and reads itself out."""

import math
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny_models import llama, make_probe

import ib_callback as ib
from ib_callback.measuring import quantities
from ib_callback.measuring.accumulate import Accumulator
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
