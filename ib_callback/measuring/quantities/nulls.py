"""The nulls of orders: the information of labels with the same counts, permuted over positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ib_callback.measuring.plan.builder import Builder
from ib_callback.measuring.plan.plan import NullPlan, Wanted
from ib_callback.measuring.readout import Found, Readings


@dataclass(frozen=True)
class Nulls:
    """The nulls of all orders and both sides.

    sets: for each order the numbers of its label sets, by the name of their null.
    null: one null for all of them, because a null depends only on label counts.
    """

    sets: dict[str, dict[str, int]]
    null: NullPlan
    turn: ClassVar[int] = 20  # it assumes that all label sets so far belong to orders
    of_orders: ClassVar[bool] = True

    @classmethod
    def plan(cls, builder: Builder, wanted: Wanted) -> list[Nulls]:
        """Register the random subsets that the label counts of all orders need."""
        if not (wanted.null and wanted.orders):
            return []
        sets: dict[str, dict[str, int]] = {order: {} for order in wanted.orders}
        for number, label_set in enumerate(builder.label_sets):
            quantity, order = label_set.name
            sets[order][f"{quantity}_null"] = number
        everywhere = np.arange(len(builder.positions))
        return [cls(sets, builder.keep_subsets(wanted.total, everywhere, builder.counts, wanted.seed))]

    def read(self, readings: Readings, found: Found) -> None:
        """Add the nulls of each order."""
        curve = readings.curve(self.null, readings.ceiling)
        by_layer = [
            readings.curve(self.null, single, layer=layer)
            for layer, single in enumerate(readings.ceiling_by_layer.tolist())
        ]
        for order, sets in self.sets.items():
            draft = found.drafts[order]
            counts = {name: readings.plan.counts[number] for name, number in sets.items()}
            for name, number in sets.items():
                draft.measured[name], draft.measured[f"{name}_se"] = curve.null(counts[name])
                draft.layers[name] = [each.null_alone(counts[name]) for each in by_layer]
                if readings.left_out is not None:
                    draft.replicates[name] = readings.left_out.null(number, curve, readings.ceiling)
            draft.baseline_errors.append(curve.error_of(counts))
            # For labels that say nothing, the plain and the shifted labels are two independent draws.
            draft.noise = math.sqrt(2.0) * curve.spread_of_null(counts["complexity_null"])
