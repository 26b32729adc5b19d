"""Complexity and expressivity: information about the n-grams before and after each position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ib_callback.measuring.plan.builder import Builder
from ib_callback.measuring.plan.null import SubsetCurve
from ib_callback.measuring.plan.plan import NullPlan
from ib_callback.measuring.readout import Found, LeftOut, Readings
from ib_callback.probe.ngrams import context_segments
from ib_callback.probe.probe import Probe
from ib_callback.results.points import PlanePoint
from ib_callback.results.uncertainty import with_errors


@dataclass(frozen=True)
class Orders:
    """The planes of all orders.

    sets: for each order the numbers of its label sets, preceding and trailing contexts.
    null: of all of them, since it depends on the label counts only; None if it is not wanted.
    """

    sets: dict[str, tuple[int, int]]
    null: NullPlan | None

    @classmethod
    def plan(
        cls, builder: Builder, probe: Probe, orders: dict[str, int], total: int, *, null: bool, seed: int
    ) -> Orders:
        """Register the labels of all orders and the null.

        Args:
            builder: of the plan.
            probe: whose valid positions the builder has.
            orders: names and widths.
            total: kept histogram over all positions.
            null: whether to plan for null information.
            seed: of the random subsets.
        """
        positions = builder.positions
        names = sorted(orders, key=orders.__getitem__)
        widths = [orders[name] for name in names]
        steps = np.arange(widths[-1])
        for quantity, columns in (("complexity", -steps), ("expressivity", 1 + steps)):
            contexts = probe.input_ids.numpy()[positions.sequence[:, None], positions.offset[:, None] + columns]
            segments = context_segments(contexts, widths, first_bit=builder.num_label_sets)
            builder.add_segments(segments, [(quantity, name) for name in names])
        # The ceiling, and the null of labels that occur once.
        builder.single = True
        return cls(
            sets={name: (number, len(names) + number) for number, name in enumerate(names)},
            null=builder.keep_subsets(total, np.arange(len(positions)), builder.counts, seed) if null else None,
        )

    def read(self, readings: Readings, found: Found) -> None:
        """Add the point of each order."""
        curve = None
        if self.null is not None:
            curve = readings.curve(self.null, readings.ceiling)
        for name, sets in self.sets.items():
            found.orders[name] = _point(readings, sets, curve)


def _point(readings: Readings, sets: tuple[int, int], curve: SubsetCurve | None) -> PlanePoint:
    complexity, expressivity = ((readings.entropy - readings.given(number)).tolist() for number in sets)
    left_out = readings.left_out
    if curve is None:
        point = PlanePoint.from_layers(complexity, expressivity)
        return point if left_out is None else with_errors(_with_replicates(point, left_out, sets), lambda _: 0.0)
    a, b = (readings.plan.counts[number] for number in sets)
    (null_a, error_a), (null_b, error_b) = curve.null(a), curve.null(b)
    point = PlanePoint.from_layers(
        complexity,
        expressivity,
        complexity_null=null_a,
        complexity_null_se=error_a,
        expressivity_null=null_b,
        expressivity_null_se=error_b,
    )
    if left_out is None:
        return point
    null_c, null_e = (tuple(left_out.null(number, curve, readings.ceiling)) for number in sets)
    point = replace(
        _with_replicates(point, left_out, sets), complexity_null_jackknife=null_c, expressivity_null_jackknife=null_e
    )

    def of_nulls(weights: Mapping[str, float]) -> float:
        return curve.combined_error(a, b, weights.get("complexity_null", 0.0), weights.get("expressivity_null", 0.0))

    return with_errors(point, of_nulls)


def _with_replicates(point: PlanePoint, left_out: LeftOut, sets: tuple[int, int]) -> PlanePoint:
    complexity, expressivity = (tuple(left_out.information(number)) for number in sets)
    return replace(point, complexity_jackknife=complexity, expressivity_jackknife=expressivity)
