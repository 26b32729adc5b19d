"""Which positions are looked at where all would cost too much: even over the probe, and the same ones every time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ib_callback.measuring.quantities.documents import FEWEST, long_enough
from ib_callback.probe.ngrams import Positions
from ib_callback.probe.probe import Probe

# Positions that are always looked at: of the loss at least, of next-token distributions at most.
POSITIONS = 8192
# Of a sequence, where those of all sequences would be too few for labels from far away (quantities/documents.py).
OF_SEQUENCE = 64


def evenly(total: int, number: int, seed: int | Sequence[int]) -> np.ndarray:
    """Numbers of `number` out of `total` things, ascending: one from each of as many equal stretches, by chance.

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
    """So many pairs of neighbouring real tokens, at least 8,192 where there are as many, even over the probe.

    Those of several numbers share 8,192, so that next-token distributions are those of the same positions.
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
    """At most 8,192 of the valid positions: all, or even ones over the probe.

    Those of the pairs that the loss is of in any case, where these are mostly valid positions. A document baseline
    needs 48 positions of a sequence: where most valid positions are in sequences that have these, and most of the even
    ones are not, there are up to 64 of each of 128 of these sequences, even over both.
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
