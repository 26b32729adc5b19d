"""How groups of positions lie over batches: cut into pieces within a batch, kept in slots across batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ib_callback.probe.ngrams import Segments

# A piece is added up by one worker, so long groups are cut: it bounds rounding error and keeps a GPU busy.
PIECE = 64
# A float32 sum over more batches than this would err by more than 1e-7 of itself.
MANY_BATCHES = 64


@dataclass(frozen=True)
class Pieces:
    """Runs of at most PIECE members of one group within one batch, sorted by batch, then group. All int32.

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
        batch_of: [T] batch of each position, ascending.
        num_batches: number of batches.
    """
    # Numbers of 16 bits are sorted in linear time, and each batch then fits into the cache.
    batch = batch_of.astype(np.uint16 if num_batches < 1 << 16 else np.int32)[members]
    order = np.argsort(batch, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(batch, minlength=num_batches))])
    del batch
    first_position = np.searchsorted(batch_of, np.arange(num_batches + 1))
    sorted_members = np.empty(len(members), np.int32)
    starts, groups, number = [], [], np.zeros(num_batches + 1, np.int32)
    for b in range(num_batches):
        here = slice(bounds[b], bounds[b + 1])
        first, span = first_position[b], first_position[b + 1] - first_position[b]
        key = group[order[here]].astype(np.int64) * span + (members[order[here]] - first)
        key.sort()
        of_group = key // max(span, 1)
        sorted_members[here] = key - of_group * span + first
        run_start = np.flatnonzero(first_of_run(of_group))
        within_run = np.arange(len(key)) - np.repeat(run_start, np.diff(run_start, append=len(key)))
        start = np.flatnonzero(within_run % PIECE == 0)
        starts.append((start + here.start).astype(np.int32))
        groups.append(of_group[start].astype(np.int32))
        number[b + 1] = len(start)
    offsets = np.concatenate([*starts, np.array([len(members)], np.int32)])
    return Pieces(sorted_members, offsets, np.concatenate(groups), np.cumsum(number))


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
    opens = np.full(num_groups, num_batches, np.int32)
    closes = np.full(num_groups, -1, np.int32)
    np.minimum.at(opens, group[is_label], batch[is_label])
    np.maximum.at(closes, group[is_label], batch[is_label])
    spanning = np.flatnonzero(opens < closes)
    by_open = spanning[np.argsort(opens[spanning], kind="stable")]
    by_close = spanning[np.argsort(closes[spanning], kind="stable")]
    open_bounds = np.searchsorted(opens[by_open], np.arange(num_batches + 1))
    close_bounds = np.searchsorted(closes[by_close], np.arange(num_batches + 1))
    slot = np.full(num_groups, -1, np.int32)
    free = np.empty(0, np.int32)
    number = 0
    for b in range(num_batches):
        starting = by_open[open_bounds[b] : open_bounds[b + 1]]
        reused, free = free[: len(starting)], free[len(starting) :]
        fresh = np.arange(number, number + len(starting) - len(reused), dtype=np.int32)
        slot[starting] = np.concatenate([reused, fresh])
        number += len(fresh)
        free = np.concatenate([free, slot[by_close[close_bounds[b] : close_bounds[b + 1]]]])
    return Slots(slot, opens, closes, number)


class Layout:
    """All groups of positions over all batches: groups of labels first, after them *bundles*.

    Label groups are summed in slots, in float32; those in many batches are *late*: summed in kept histograms, in
    float64, and finished at the end. A bundle goes into one or several kept histograms.

    pieces: of all groups, and [pieces] `is_first`, whether a piece is the first of its group in its batch.
    slots: of label groups.
    counts, sets: [labels] positions of each label group, and its label sets (bits).
    alone: [T] label sets in which a position is the only one of its label.
    late: numbers of the late label groups, and `row_of_late`, [labels] their place in it or -1.
    late_kept: their kept histograms.

    Args:
        segments: the label groups.
        bundles: [number of each] positions.
        targets: of each bundle the kept histograms that it goes into.
        num_kept: kept histograms so far; the late labels take the next ones.
        batch_of: [T] batch of each position.
        num_batches: number of batches.
    """

    def __init__(
        self,
        segments: Sequence[Segments],
        bundles: Sequence[np.ndarray],
        targets: Sequence[np.ndarray],
        num_kept: int,
        batch_of: np.ndarray,
        num_batches: int,
    ) -> None:
        self.num_batches = num_batches
        self.counts = np.concatenate([s.stop - s.start for s in segments])
        self.sets = np.concatenate([s.sets for s in segments])
        self.alone = np.bitwise_or.reduce([s.alone for s in segments])
        members = [s.order[ranges(s.start, s.stop)].astype(np.int32) for s in segments]
        sizes = np.concatenate([self.counts, np.array([len(bundle) for bundle in bundles], np.int64)])
        group = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        self.pieces = cut(group, np.concatenate([*members, *bundles], dtype=np.int32), batch_of, num_batches)
        del members, group
        self.batch_of_piece = np.repeat(np.arange(num_batches, dtype=np.int32), np.diff(self.pieces.batch_start))
        self.is_first = first_of_run(self.batch_of_piece, self.pieces.group)
        num_labels = len(self.counts)

        group = self.pieces.group[self.is_first]
        self.late = np.flatnonzero(np.bincount(group, minlength=len(sizes))[:num_labels] > MANY_BATCHES)
        self.late_kept = slice(num_kept, num_kept + len(self.late))
        self.row_of_late = np.full(num_labels, -1, np.int32)
        self.row_of_late[self.late] = np.arange(len(self.late))
        # Bundle of each group, -1 for labels in slots; late labels are the last bundles.
        self._bundle = np.arange(len(sizes), dtype=np.int32) - np.int32(num_labels)
        self._bundle[:num_labels] = np.where(self.row_of_late < 0, -1, len(bundles) + self.row_of_late)
        self._targets = np.concatenate([*targets, np.arange(num_kept, self.late_kept.stop)])
        self._num_targets = np.array([*map(len, targets), *[1] * len(self.late)])
        self._first_target = np.cumsum(self._num_targets) - self._num_targets

        in_slots = self._bundle[group] < 0
        batch = self.batch_of_piece[self.is_first]
        self.slots = assign_slots(group[in_slots], batch[in_slots], num_labels, num_batches)

    def work(self, number: int, first_position: int) -> dict[str, np.ndarray]:
        """What `Batch` says of pieces, groups and slots, for one batch."""
        begin, end = self.pieces.batch_start[number], self.pieces.batch_start[number + 1]
        offsets = self.pieces.offsets[begin : end + 1]
        # The groups of this batch, each once, with their first piece and number of pieces.
        first = np.flatnonzero(self.is_first[begin:end])
        length = np.diff(first, append=end - begin)
        group = self.pieces.group[begin:end][first]

        bundle = self._bundle[group]
        is_label = bundle < 0
        label, piece = group[is_label], first[is_label]
        is_long = is_label & (length > 1)
        opens, closes = self.slots.opens[label], self.slots.closes[label]
        done = (opens == number) & (closes == number)
        opening, going_on = (opens == number) & ~done, opens < number
        closing = label[going_on & (closes == number)]
        target, kept_piece = self._kept(bundle[~is_label], first[~is_label], length[~is_label])
        target_start = np.flatnonzero(first_of_run(target))
        return {
            "members": self.pieces.members[offsets[0] : offsets[-1]] - first_position,
            "offsets": offsets - offsets[0],
            "long_members": ranges(first[is_long], first[is_long] + length[is_long]),
            "long_offsets": np.concatenate([[0], np.cumsum(length[is_long])]),
            "long_target": first[is_long],
            "done_piece": piece[done],
            "done_sets": self.sets[label[done]],
            "done_count": self.counts[label[done]],
            "open_piece": piece[opening],
            "open_slot": self.slots.slot[label[opening]],
            "more_piece": piece[going_on],
            "more_slot": self.slots.slot[label[going_on]],
            "close_slot": self.slots.slot[closing],
            "close_sets": self.sets[closing],
            "close_count": self.counts[closing],
            "kept_members": kept_piece,
            "kept_offsets": np.append(target_start, len(target)),
            "kept_target": target[target_start],
        }

    def _kept(self, bundle: np.ndarray, first: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(kept histogram, piece) pairs of the bundles of one batch, sorted by histogram."""
        pairs = length * self._num_targets[bundle]
        run = np.repeat(np.arange(len(bundle)), pairs)
        within = ranges(np.zeros_like(pairs), pairs)
        target = self._targets[self._first_target[bundle[run]] + within // length[run]]
        piece = first[run] + within % length[run]
        order = np.argsort(target, kind="stable")
        return target[order], piece[order]


def first_of_run(*keys: np.ndarray) -> np.ndarray:
    """Where any of the sorted keys differs from its predecessor."""
    first = np.zeros(len(keys[0]), bool)
    first[:1] = True
    for key in keys:
        first[1:] |= key[1:] != key[:-1]
    return first


def int64(values: np.ndarray) -> torch.Tensor:
    """As a tensor of int64."""
    return torch.from_numpy(values.astype(np.int64))


def int32(values: np.ndarray) -> torch.Tensor:
    """As a tensor of int32, for numbers that fit; a plan holds many."""
    return torch.from_numpy(values.astype(np.int32))


def ranges(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Concatenation of arange(start[i], stop[i])."""
    length = stop - start
    ends = np.cumsum(length)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(start - (ends - length), length)
