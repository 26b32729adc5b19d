"""Which positions are looked at where all would cost too much: even over the probe, and the same ones every time."""

from __future__ import annotations

import numpy as np

from ib_callback.measuring.quantities.documents import long_enough
from ib_callback.probe.ngrams import Positions
from ib_callback.probe.probe import Probe

# Positions that are always looked at: of the loss at least, of next-token distributions at most.
NUMBER = 8192
# Of a sequence, where those of all sequences would be too few for labels from far away (quantities/documents.py).
OF_SEQUENCE = 64


def evenly(total: int, number: int, seed: int) -> np.ndarray:
    """Numbers of `number` out of `total` things, ascending: one from each of as many equal stretches, by chance.

    >>> evenly(3, 5, seed=0)
    array([0, 1, 2])
    """
    if number >= total:
        return np.arange(total)
    within = np.random.RandomState(seed).random_sample(number)
    return np.minimum(((np.arange(number) + within) * total / number).astype(np.int64), total - 1)


def neighbours(probe: Probe) -> Positions:
    """The first of each pair of neighbouring real tokens."""
    return Positions(*(probe.attention_mask[:, :-1] & probe.attention_mask[:, 1:]).numpy().nonzero())


def pairs_for_loss(probe: Probe, number: int, seed: int) -> Positions:
    """So many pairs of neighbouring real tokens, at least 8,192 where there are as many, even over the probe.

    Those of several numbers share 8,192, so that next-token distributions are those of the same positions.
    """
    pairs = neighbours(probe)
    chosen = evenly(len(pairs), min(number, NUMBER), seed)
    if number > len(chosen):
        left = np.ones(len(pairs), bool)
        left[chosen] = False
        others = np.flatnonzero(left)
        chosen = np.union1d(chosen, others[evenly(len(others), number - len(chosen), seed)])
    return Positions(pairs.sequence[chosen], pairs.offset[chosen])


def positions_for_prediction(probe: Probe, valid: Positions, seed: int) -> Positions:
    """At most 8,192 of the valid positions: all, or as many, even over the probe.

    A document baseline needs 48 positions of a sequence. Where even ones are fewer of most sequences, there are 64 of
    each of 128 sequences that have them, even over these.
    """
    pairs = neighbours(probe)
    even = evenly(len(pairs), NUMBER, seed)
    width = probe.input_ids.shape[1]
    place = valid.sequence * width + valid.offset
    chosen = np.flatnonzero(np.isin(place, pairs.sequence[even] * width + pairs.offset[even]))
    thinned = Positions(valid.sequence[chosen], valid.offset[chosen])
    if len(thinned) < len(valid) and 2 * len(long_enough(thinned)) < len(thinned):
        _, first, length = np.unique(valid.sequence, return_index=True, return_counts=True)
        long = np.flatnonzero(length >= OF_SEQUENCE)
        some = long[evenly(len(long), NUMBER // OF_SEQUENCE, seed)]
        share = NUMBER // max(1, len(some))
        of_each = [first[one] + evenly(int(length[one]), share, seed) for one in some]
        chosen = np.concatenate(of_each) if of_each else chosen
    return Positions(valid.sequence[chosen], valid.offset[chosen])
