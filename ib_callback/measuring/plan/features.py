"""Feature labels: which positions carry one, and how their null is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ib_callback.probe.ngrams import Positions

# At least 50 by definition; the mean's standard error is then 1/10 of the spread.
NUM_PERMUTATIONS = 100


@dataclass(frozen=True)
class Feature:
    """One feature over the T valid positions of a probe.

    name: the probe's name for it.
    values: [T] labels renumbered from 0, -1 where the position carries none.
    num_labels: number of distinct labels in the probe, V.
    permuted: [R, N] label of each sequence (renumbered, -1 for none) under R random permutations of whole
        sequences; None where the label varies within sequences, so that positions are what is exchangeable.
    """

    name: str
    values: np.ndarray
    num_labels: int
    permuted: np.ndarray | None


def make_feature(name: str, table: np.ndarray, positions: Positions, seed: int) -> Feature:
    """Read a feature off the probe's label table [N, S] at the valid positions."""
    names, numbers = np.unique(table[table >= 0], return_inverse=True)
    renumbered = np.full(table.shape, -1, np.int64)
    renumbered[table >= 0] = numbers
    values = renumbered[positions.sequence, positions.offset]
    by_sequence = _label_of_sequence(values, positions.sequence, len(table))
    if by_sequence is None:
        return Feature(name, values, len(names), None)
    # The other member of a pair may be too short to have a valid position, but its label is still known.
    rows, columns = np.nonzero(renumbered >= 0)
    whole = _label_of_sequence(renumbered[rows, columns], rows, len(table))
    random = np.random.RandomState(seed)
    if name == "preference" and whole is not None and _are_pairs(whole):
        permuted = _swapped_pairs(whole, random)
    else:
        permuted = _permuted(by_sequence, random)
    return Feature(name, values, len(names), permuted)


def _label_of_sequence(values: np.ndarray, sequence: np.ndarray, num_sequences: int) -> np.ndarray | None:
    """[N] the one label that a sequence carries, -1 where it carries none; None if some sequence carries several."""
    labelled = values >= 0
    highest = np.full(num_sequences, -1, np.int64)
    np.maximum.at(highest, sequence[labelled], values[labelled])
    if (values[labelled] != highest[sequence[labelled]]).any():
        return None
    return highest


def _permuted(labels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """[R, N] labels permuted over the sequences that carry one."""
    carriers = np.flatnonzero(labels >= 0)
    permuted = np.repeat(labels[None], NUM_PERMUTATIONS, axis=0)
    for row in permuted:
        row[carriers] = labels[random.permutation(carriers)]
    return permuted


def _swapped_pairs(labels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """[R, N] labels swapped within a random half of the pairs.

    Members of a pair share their prompt; what is exchangeable is which of the two was preferred.
    """
    other = labels.reshape(-1, 2)[:, ::-1].reshape(-1)
    swapped = random.random_sample((NUM_PERMUTATIONS, len(labels) // 2)) < 0.5
    return np.where(np.repeat(swapped, 2, axis=1), other, labels)


def _are_pairs(labels: np.ndarray) -> bool:
    """Whether sequences 2i and 2i + 1 carry different labels throughout, or neither carries one."""
    if len(labels) % 2:
        return False
    first, second = labels.reshape(-1, 2).T
    return bool(((first != second) | ((first < 0) & (second < 0))).all() and ((first < 0) == (second < 0)).all())
