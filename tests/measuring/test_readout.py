"""A further kind of label set is one class: it registers with the builder, and reads itself out."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny_models import make_probe

import ib_callback as ib
from ib_callback.measuring.accumulate import Accumulator
from ib_callback.measuring.plan.builder import Builder
from ib_callback.measuring.planner import make_plan
from ib_callback.measuring.readout import Found, Readings
from ib_callback.probe.ngrams import valid_positions, value_segments
from ib_callback.results.points import FeaturePoint


@dataclass
class Parity:
    """Information about whether a position is an even one."""

    number: int

    @classmethod
    def plan(cls, builder):
        builder.add_segments(value_segments(builder.positions.offset % 2, builder.num_label_sets), [("parity", "all")])
        return cls(builder.num_label_sets - 1)

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
    for quantity in plan.quantities:
        quantity.read(Readings(plan, sums_of(plan, tables), "empirical"), found)
    # The same labels as a feature of the probe.
    parity = (torch.arange(16) % 2).expand(10, 16)
    labelled = ib.Probe.from_tokens(probe.input_ids, probe.attention_mask, labels={"parity": parity})
    other = make_plan(labelled, {"token": 1}, ("parity",), batch_size=4, null=False, seed=0)
    expected = Found("token")
    readings = Readings(other, sums_of(other, tables), "empirical")
    for quantity in other.quantities:
        quantity.read(readings, expected)
    assert found.features["parity"].information_by_layer == expected.features["parity"].information_by_layer
    assert 0 < found.features["parity"].information < 0.1
    assert expected.orders["token"].complexity == pytest.approx(
        float((readings.entropy - readings.given(0)).mean()), abs=1e-15
    )
