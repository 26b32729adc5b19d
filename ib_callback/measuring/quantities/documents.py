"""The document baseline: the information that labels from far away in the same document give.

The representations of one document are similar, and so are its labels. The representations of an untrained model say
little else. Labels that are shifted along their own document keep this similarity, but nothing of the local context.
Information above this baseline is called local. It is a difference, not a conditional information given the document.

By default labels are shifted along a circle. If text drifts along the document, this also breaks the drift, which then
looks local (Harris, "Nonsense correlations in neuroscience", bioRxiv 2020.11.29.402719). A linear shift pairs each
position with the labels of a position at a fixed distance in one direction, and leaves out positions without a partner.

(E14 of docs/mathematics.md)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ib_callback.measuring.plan.builder import Builder
from ib_callback.measuring.plan.plan import Baseline, Wanted
from ib_callback.measuring.readout import Found, Readings
from ib_callback.probe.ngrams import Positions, Segments, context_segments

# Labels come from at least this many valid positions away, in both directions, because closer ones share context.
NEAREST = 16
# Sequences with fewer valid positions offer too few places from which labels can come.
FEWEST = 48
# If a smaller share of all positions is left, local and plain numbers would describe different text.
_LEAST_KEPT = 0.5


@dataclass(frozen=True)
class Documents:
    """The document baseline of all orders, over the positions of sequences that are long enough.

    baselines: for each order the number of its shifted label set, which serves both sides; -1 without one.
    plain: for each order the numbers of the sets of preceding and trailing contexts over the same positions.
    total: number of the kept histogram over these positions.
    num_positions: number of these positions. If they are too few, there is no baseline.
    """

    baselines: dict[str, int]
    plain: dict[str, tuple[int, int]]
    total: int
    num_positions: int
    turn: ClassVar[int] = 25  # after the nulls, because these label sets have none
    of_orders: ClassVar[bool] = True

    @classmethod
    def plan(cls, builder: Builder, wanted: Wanted) -> list[Documents]:
        """Register the shifted labels and, if sequences are left out, the plain labels of the others."""
        positions = builder.positions
        if wanted.baseline is None or not wanted.orders:
            return []
        kept, shifted = _pairs(positions, wanted.baseline, wanted.seed)
        if len(kept) < _LEAST_KEPT * len(positions):
            return [cls(dict.fromkeys(wanted.orders, -1), {}, wanted.total, len(kept))]
        everything = len(kept) == len(positions)
        names = sorted(wanted.orders, key=wanted.orders.__getitem__)
        widths = [wanted.orders[name] for name in names]
        steps = np.arange(widths[-1])

        def register(side: str, taken: np.ndarray, columns: np.ndarray) -> list[int]:
            """Label the kept positions with the contexts of the `taken` ones; return the numbers of the sets."""
            first = len(builder.label_sets)
            rows, offsets = positions.sequence[taken, None], positions.offset[taken, None] + columns
            segments = context_segments(wanted.probe.input_ids.numpy()[rows, offsets], widths, first_bit=first)
            builder.add_segments(_among(segments, kept, len(positions)), [(side, name) for name in names])
            return list(range(first, len(builder.label_sets)))

        if everything:
            of = {label_set.name: number for number, label_set in enumerate(builder.label_sets)}
            sides = [[of[side, name] for name in names] for side in ("complexity", "expressivity")]
            total = wanted.total
        else:
            sides = [register("complexity", kept, -steps), register("expressivity", kept, 1 + steps)]
            total = builder.keep_total(kept)
        baselines = dict(zip(names, register("baseline", shifted, -steps), strict=True))
        plain = {name: (sides[0][place], sides[1][place]) for place, name in enumerate(names)}
        return [cls(baselines, plain, total, len(kept))]

    def read(self, readings: Readings, found: Found) -> None:
        """Add baselines and local information of each order."""
        for order, number in self.baselines.items():
            draft = found.drafts[order]
            draft.num_positions_local = self.num_positions
            if not self.plain:
                continue
            baseline = readings.information(number, self.total)
            left_out = readings.left_out
            without = None if left_out is None else left_out.information(number, self.total)
            for side, plain in zip(("complexity", "expressivity"), self.plain[order], strict=True):
                draft.layers[f"{side}_baseline"] = baseline.tolist()
                draft.layers[f"{side}_local"] = (readings.information(plain, self.total) - baseline).tolist()
                if left_out is not None and without is not None:
                    draft.replicates[f"{side}_baseline"] = without
                    draft.replicates[f"{side}_local"] = left_out.information(plain, self.total) - without


def has_baseline(positions: Positions, baseline: Baseline) -> bool:
    """Whether enough of the positions get a label from far away."""
    return len(_pairs(positions, baseline, seed=0)[0]) >= _LEAST_KEPT * len(positions)


def long_enough(positions: Positions) -> np.ndarray:
    """Numbers of the positions whose sequences have at least 48 of them."""
    return np.flatnonzero(np.bincount(positions.sequence)[positions.sequence] >= FEWEST)


def _pairs(positions: Positions, baseline: Baseline, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the positions that are kept, and of the positions whose labels they get."""
    kept = long_enough(positions)
    if not len(kept):
        return kept, kept
    sequences = positions.sequence[kept]
    if baseline.shift == "circular":
        return kept, kept[shift(sequences, seed)]
    assert baseline.offset is not None
    places, partners = linear_shift(sequences, baseline.offset)
    return kept[places], kept[partners]


def linear_shift(sequences: np.ndarray, offset: int | str) -> tuple[np.ndarray, np.ndarray]:
    """Pair each position with the one that is `offset` further on in the same sequence.

    All shifts have the same direction, because a drift that all documents share would differ between two directions.

    Args:
        sequences: [T] number of the sequence of each position, ascending.
        offset: distance in positions; "half": half of the positions of the sequence.

    Returns:
        [P] places in `sequences` that have such a partner, ascending, and [P] their partners.
    """
    _, number, length = np.unique(sequences, return_inverse=True, return_counts=True)
    partner = np.arange(len(sequences)) + (length[number] // 2 if offset == "half" else int(offset))
    there = np.flatnonzero(partner < np.cumsum(length)[number])
    return there, partner[there]


def shift(sequences: np.ndarray, seed: int) -> np.ndarray:
    """Pair each position with another one of its sequence, so far away that contexts do not overlap.

    The positions of a sequence form a circle, and all of them are shifted by the same offset. It is drawn uniformly
    from the offsets of at least 16 positions in both directions. It depends on the seed and the number of the sequence.

    Args:
        sequences: [T] number of the sequence of each position, ascending; each occurs at least 33 times.
        seed: the seed of the meter.

    Returns:
        [T] places in `sequences`, a permutation.
    """
    numbers, first, length = np.unique(sequences, return_index=True, return_counts=True)
    uniform = np.random.RandomState([seed, NEAREST]).random_sample(int(numbers[-1]) + 1)[numbers]
    offset = NEAREST + np.floor(uniform * (length - 2 * NEAREST + 1)).astype(np.int64)
    start, size, step = (np.repeat(values, length) for values in (first, length, offset))
    return start + (np.arange(len(sequences)) - start + step) % size


def _among(segments: Segments, kept: np.ndarray, num_positions: int) -> Segments:
    """Turn segments of the kept positions into segments of all positions."""
    alone = np.zeros(num_positions, np.int64)
    alone[kept] = segments.alone
    return Segments(kept[segments.order], segments.start, segments.stop, segments.sets, alone)
