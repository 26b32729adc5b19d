"""How groups of positions lie over batches: cut into pieces within a batch, kept in slots across batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A piece is added up by one worker, so long groups are cut: it bounds rounding error and keeps a GPU busy.
PIECE = 64


@dataclass(frozen=True)
class Pieces:
    """Runs of at most PIECE members of one group within one batch, sorted by batch, then group.

    members: [M] positions; piece i holds members[offsets[i]:offsets[i + 1]], all of group[i].
    batch_start: [num_batches + 1] first piece of each batch.
    """

    members: np.ndarray
    offsets: np.ndarray
    group: np.ndarray
    batch_start: np.ndarray


def cut(group: np.ndarray, members: np.ndarray, batch_of: np.ndarray, num_batches: int) -> Pieces:
    """Cut groups into pieces.

    Args:
        group: [M] group of each pair of a group and a position in it.
        members: [M] position of each pair.
        batch_of: [T] batch of each position.
        num_batches: number of batches.
    """
    batch = batch_of[members]
    order = np.lexsort((members, group, batch))
    group, members, batch = group[order], members[order], batch[order]
    run_start = np.flatnonzero(first_of_run(batch, group))
    within_run = np.arange(len(members)) - np.repeat(run_start, np.diff(run_start, append=len(members)))
    starts = np.flatnonzero(within_run % PIECE == 0)
    return Pieces(
        members=members,
        offsets=np.append(starts, len(members)),
        group=group[starts],
        batch_start=np.searchsorted(batch[starts], np.arange(num_batches + 1)),
    )


@dataclass(frozen=True)
class Slots:
    """slot: [G] slot of each group that spans batches, else -1; opens, closes: [G] its first and last batch."""

    slot: np.ndarray
    opens: np.ndarray
    closes: np.ndarray
    number: int


def assign_slots(group: np.ndarray, batch: np.ndarray, num_groups: int, num_batches: int) -> Slots:
    """Give each of the label groups (numbers below `num_groups`) that spans batches a slot from first to last."""
    is_label = group < num_groups
    opens = np.full(num_groups, num_batches, np.int64)
    closes = np.full(num_groups, -1, np.int64)
    np.minimum.at(opens, group[is_label], batch[is_label])
    np.maximum.at(closes, group[is_label], batch[is_label])
    spanning = np.flatnonzero(opens < closes)
    by_open = spanning[np.argsort(opens[spanning], kind="stable")]
    by_close = spanning[np.argsort(closes[spanning], kind="stable")]
    open_bounds = np.searchsorted(opens[by_open], np.arange(num_batches + 1))
    close_bounds = np.searchsorted(closes[by_close], np.arange(num_batches + 1))
    slot = np.full(num_groups, -1, np.int64)
    free = np.empty(0, np.int64)
    number = 0
    for b in range(num_batches):
        starting = by_open[open_bounds[b] : open_bounds[b + 1]]
        reused, free = free[: len(starting)], free[len(starting) :]
        fresh = np.arange(number, number + len(starting) - len(reused))
        slot[starting] = np.concatenate([reused, fresh])
        number += len(fresh)
        free = np.concatenate([free, slot[by_close[close_bounds[b] : close_bounds[b + 1]]]])
    return Slots(slot, opens, closes, number)


def first_of_run(*keys: np.ndarray) -> np.ndarray:
    """Where any of the sorted keys differs from its predecessor."""
    first = np.zeros(len(keys[0]), bool)
    first[:1] = True
    for key in keys:
        first[1:] |= key[1:] != key[:-1]
    return first


def ranges(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Concatenation of arange(start[i], stop[i])."""
    length = stop - start
    ends = np.cumsum(length)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(start - (ends - length), length)
