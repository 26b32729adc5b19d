"""Complexity and expressivity: information about the n-grams before and after each position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ib_callback.measuring.plan.builder import Builder
from ib_callback.measuring.plan.plan import Wanted
from ib_callback.measuring.readout import Found, Readings
from ib_callback.probe.ngrams import context_segments


@dataclass(frozen=True)
class Orders:
    """The planes of all orders.

    sets: for each order the numbers of its two label sets: preceding and trailing contexts.
    """

    sets: dict[str, tuple[int, int]]
    turn: ClassVar[int] = 0
    of_orders: ClassVar[bool] = True

    @classmethod
    def plan(cls, builder: Builder, wanted: Wanted) -> list[Orders]:
        """Register the labels of all orders."""
        if not wanted.orders:
            return []
        positions = builder.positions
        names = sorted(wanted.orders, key=wanted.orders.__getitem__)
        widths = [wanted.orders[name] for name in names]
        steps = np.arange(widths[-1])
        for quantity, columns in (("complexity", -steps), ("expressivity", 1 + steps)):
            contexts = wanted.probe.input_ids.numpy()[positions.sequence[:, None], positions.offset[:, None] + columns]
            segments = context_segments(contexts, widths, first_bit=len(builder.label_sets))
            builder.add_segments(segments, [(quantity, name) for name in names])
        # Needed for the ceiling, and for the null of labels that occur once.
        builder.single = True
        return [cls({name: (number, len(names) + number) for number, name in enumerate(names)})]

    def read(self, readings: Readings, found: Found) -> None:
        """Begin the point of each order."""
        for order, sets in self.sets.items():
            draft = found.drafts[order]
            for name, number in zip(("complexity", "expressivity"), sets, strict=True):
                draft.layers[name] = readings.information(number).tolist()
                if readings.left_out is not None:
                    draft.replicates[name] = readings.left_out.information(number)
