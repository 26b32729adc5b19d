"""Choose positions where measuring all would cost too much: spread evenly over the probe, and the same every time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ib_callback.measuring.quantities.documents import FEWEST, long_enough
from ib_callback.probe.ngrams import Positions
from ib_callback.probe.probe import Probe

# The least number of positions for the loss, and the largest number for next-token distributions.
POSITIONS = 8192
# Positions of a sequence, if an even choice over all sequences would leave too few in each for labels from far away
# (quantities/documents.py).
OF_SEQUENCE = 64


def evenly(total: int, number: int, seed: int | Sequence[int]) -> np.ndarray:
    """Choose `number` of `total` things, in ascending order: a random one from each of `number` equal stretches.

    >>> evenly(3, 5, seed=0)
    array([0, 1, 2])
    """
    if number >= total:
        return np.arange(total)
    edges = np.arange(number + 1) * total // max(1, number)
    within = np.random.RandomState(seed).random_sample(number)
    return edges[:-1] + (within * np.diff(edges)).astype(np.int64)


def neighbours(probe: Probe) -> Positions:
    """The first of each pair of neighbouring real tokens."""
    return Positions(*(probe.attention_mask[:, :-1] & probe.attention_mask[:, 1:]).numpy().nonzero())


def pairs_for_loss(probe: Probe, number: int, seed: int) -> Positions:
    """Choose `number` pairs of neighbouring real tokens, at least 8,192 if there are as many, evenly over the probe.

    The choice for any number contains the same 8,192 pairs, so next-token distributions always use the same positions.
    """
    pairs = neighbours(probe)
    chosen = evenly(len(pairs), min(number, POSITIONS), seed)
    if number > len(chosen):
        left = np.ones(len(pairs), bool)
        left[chosen] = False
        others = np.flatnonzero(left)
        chosen = np.union1d(chosen, others[evenly(len(others), number - len(chosen), seed)])
    return Positions(pairs.sequence[chosen], pairs.offset[chosen])


def positions_for_prediction(probe: Probe, valid: Positions, seed: int) -> Positions:
    """Choose at most 8,192 of the valid positions: all, or a choice that is even over the probe.

    If most pairs that the loss always uses are valid positions, the choice consists of these. A document baseline needs
    48 positions in a sequence. If most valid positions are in sequences that long, but most of an even choice would not
    be, up to 64 positions are taken from each of 128 such sequences, evenly over both.
    """
    if len(valid) <= POSITIONS:
        return valid
    pairs = neighbours(probe)
    even = evenly(len(pairs), POSITIONS, seed)
    width = probe.input_ids.shape[1]
    place = valid.sequence * width + valid.offset
    chosen = np.flatnonzero(np.isin(place, pairs.sequence[even] * width + pairs.offset[even]))
    if 2 * len(chosen) < POSITIONS:
        chosen = evenly(len(valid), POSITIONS, seed)
    if _mostly_long(valid) and not _mostly_long(Positions(valid.sequence[chosen], valid.offset[chosen])):
        sequence, first, length = np.unique(valid.sequence, return_index=True, return_counts=True)
        long = np.flatnonzero(length >= FEWEST)
        some = long[evenly(len(long), POSITIONS // OF_SEQUENCE, seed)]
        of_each = [first[i] + evenly(int(length[i]), OF_SEQUENCE, [seed, int(sequence[i])]) for i in some]
        chosen = np.concatenate(of_each)
    return Positions(valid.sequence[chosen], valid.offset[chosen])


def _mostly_long(positions: Positions) -> bool:
    return 2 * len(long_enough(positions)) >= len(positions)
