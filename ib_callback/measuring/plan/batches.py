"""Lay out groups of positions over batches: cut them into pieces within a batch, keep them in slots across batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ib_callback.probe.ngrams import Segments

# One worker adds up a piece. Long groups are cut, which bounds rounding error and keeps a GPU busy.
PIECE = 64
# A float32 sum over more batches than this would have a relative error above 1e-7.
MANY_BATCHES = 64


@dataclass(frozen=True)
class Pieces:
    """Runs of at most PIECE members of one group within one batch. All are int32 except `content`.

    Groups with the same members in a batch share their pieces. For example, a token, a bigram and a quadgram that each
    occur once in a batch, at the same position, have the same members. A *part* is one use of a piece by one group.

    members: [M] positions; piece i holds members[offsets[i]:offsets[i + 1]].
    piece_start: [num_batches + 1] first piece of each batch.
    group, piece: [P] group and piece of each part; sorted by batch, then group.
    content: [P] uint64, a random number that stands for the positions in the part: equal for equal parts; the number of
        a union of parts is the sum of their numbers.
    part_start: [num_batches + 1] first part of each batch.
    """

    members: np.ndarray
    offsets: np.ndarray
    piece_start: np.ndarray
    group: np.ndarray
    piece: np.ndarray
    content: np.ndarray
    part_start: np.ndarray


def cut(group: np.ndarray, members: np.ndarray, batch_of: np.ndarray, num_batches: int) -> Pieces:
    """Cut groups into pieces.

    Args:
        group: [M] group of each pair of a group and a position in it.
        members: [M] position of each pair.
        batch_of: [T] batch of each position, ascending.
        num_batches: number of batches.
    """
    order, bounds = sort_by_batch(batch_of.astype(np.int32)[members], num_batches)
    first_position = np.searchsorted(batch_of, np.arange(num_batches + 1))
    # 64 bits, so the probability that any two of 10^8 sums agree by chance is 3e-4.
    mark = np.random.RandomState(0).randint(0, 1 << 63, len(batch_of), np.uint64) << np.uint64(1) | np.uint64(1)
    found: list[tuple[np.ndarray, ...]] = []
    for b in range(num_batches):
        here = order[bounds[b] : bounds[b + 1]]
        first, span = first_position[b], first_position[b + 1] - first_position[b]
        found.append(_cut_batch(group[here], members[here] - first, span, mark[first : first + span]))
    del order
    num_members, num_pieces, num_parts = (np.array([len(part[i]) for part in found]) for i in range(3))
    columns = [list(column) for column in zip(*found, strict=True)]
    found.clear()
    # One after the other; each is freed before the next.
    members_of, length, group_of, piece, content = (np.concatenate(columns.pop(0)) for _ in range(5))
    starts = [np.concatenate([[0], np.cumsum(number)]) for number in (num_pieces, num_parts)]
    members_of += np.repeat(first_position[:-1].astype(np.int32), num_members)
    piece += np.repeat(starts[0][:-1].astype(np.int32), num_parts)
    return Pieces(
        members=members_of,
        offsets=np.concatenate([[0], np.cumsum(length)]).astype(np.int32),
        piece_start=starts[0],
        group=group_of,
        piece=piece,
        content=content,
        part_start=starts[1],
    )


def sort_by_batch(batch: np.ndarray, num_batches: int) -> tuple[np.ndarray, np.ndarray]:
    """Stable order [M] of things by their batch, int32, and [num_batches + 1] where each batch begins in that order."""
    # 16-bit numbers are sorted in linear time, and the things of one batch then fit into the cache.
    short = batch.astype(np.uint16 if num_batches < 1 << 16 else np.int32)
    bounds = np.concatenate([[0], np.cumsum(np.bincount(short, minlength=num_batches))])
    return np.argsort(short, kind="stable").astype(np.int32), bounds


def _cut_batch(group: np.ndarray, row: np.ndarray, span: int, mark: np.ndarray) -> tuple[np.ndarray, ...]:
    """Members and lengths of the pieces of one batch, and group, piece and content of its parts."""
    key = group.astype(np.int64) * span + row
    key.sort()
    group = key // max(span, 1)
    row = key - group * span
    run_start = np.flatnonzero(first_of_run(group))
    within_run = np.arange(len(key)) - np.repeat(run_start, np.diff(run_start, append=len(key)))
    start = np.flatnonzero(within_run % PIECE == 0)
    length = np.diff(start, append=len(key))
    content = np.add.reduceat(mark[row], start) if len(start) else np.zeros(0, np.uint64)
    # The sum of a long run is stored in place of its first piece, so only long runs may share that piece.
    of_run = np.searchsorted(run_start, start, side="right") - 1
    is_long = np.bincount(of_run, minlength=len(run_start))[of_run] > 1
    whole = np.zeros(len(run_start), np.uint64)
    np.add.at(whole, of_run, content)
    identity = np.where(is_long, content * np.uint64(3) + (whole[of_run] ^ np.uint64(1)), content)
    _, chosen, piece = np.unique(identity, return_index=True, return_inverse=True)
    members = row[ranges(start[chosen], start[chosen] + length[chosen])]
    parts = (members, length[chosen], group[start], piece)
    return (*(part.astype(np.int32) for part in parts), content)


def assign_slots(opens: np.ndarray, closes: np.ndarray, num_times: int) -> tuple[np.ndarray, int]:
    """[G] the slot of each of G things that are held from one time to a later one; and the number of slots needed."""
    by_open, by_close = np.argsort(opens, kind="stable"), np.argsort(closes, kind="stable")
    open_bounds = np.searchsorted(opens[by_open], np.arange(num_times + 1))
    close_bounds = np.searchsorted(closes[by_close], np.arange(num_times + 1))
    slot = np.full(len(opens), -1, np.int32)
    free = np.empty(0, np.int32)
    number = 0
    for b in range(num_times):
        starting = by_open[open_bounds[b] : open_bounds[b + 1]]
        reused, free = free[: len(starting)], free[len(starting) :]
        fresh = np.arange(number, number + len(starting) - len(reused), dtype=np.int32)
        slot[starting] = np.concatenate([reused, fresh])
        number += len(fresh)
        free = np.concatenate([free, slot[by_close[close_bounds[b] : close_bounds[b + 1]]]])
    return slot, number


@dataclass(frozen=True)
class Entries:
    """Where labels that span batches occur: one entry for each label and batch, sorted by label, then batch.

    The sum of a label up to a batch is a running sum. Labels with the same positions so far share a running sum, and so
    share its slot. Running sums do not change: the next one gets another slot. The slot of a sum that is no longer
    needed is free from the next batch on.

    label, batch, part: [E] number of the label, batch, and first of the label's parts in the batch.
    sum_of: [E] number of the running sum after the entry.
    first_of: [sums] one of the entries that lead to each sum.
    slot: [sums] slot of each sum; number: number of slots.
    """

    label: np.ndarray
    batch: np.ndarray
    part: np.ndarray
    sum_of: np.ndarray
    first_of: np.ndarray
    slot: np.ndarray
    number: int

    @property
    def is_first(self) -> np.ndarray:
        """[E] whether the label occurs here for the first time."""
        return first_of_run(self.label)

    @property
    def is_last(self) -> np.ndarray:
        """[E] whether the label occurs here for the last time."""
        return np.append(first_of_run(self.label)[1:], True)[: len(self.label)]


def share_slots(
    label: np.ndarray, batch: np.ndarray, part: np.ndarray, content: np.ndarray, num_batches: int
) -> Entries:
    """Give each running sum a slot.

    Args:
        label: [E] label of each entry, as in `Entries`.
        batch: [E] batch of each entry.
        part: [E] first part of each entry.
        content: [E] uint64, `Pieces.content` summed over the parts of each entry.
        num_batches: number of batches.
    """
    first = first_of_run(label)
    running = np.cumsum(content, dtype=np.uint64)
    start = np.flatnonzero(first)
    running -= np.repeat(running[start] - content[start], np.diff(start, append=len(label)))
    del content
    # Sums of the same positions are complete in the same batch.
    order, bounds = sort_by_batch(batch, num_batches)
    sum_of, firsts, number = np.empty(len(label), np.int32), [np.empty(0, np.int32)], 0
    for b in range(num_batches):
        here = order[bounds[b] : bounds[b + 1]]
        _, chosen, place = np.unique(running[here], return_index=True, return_inverse=True)
        sum_of[here] = place + number
        firsts.append(here[chosen])
        number += len(chosen)
    del running, order
    first_of = np.concatenate(firsts)
    ends = np.append(first[1:], True)[: len(label)]
    closes = np.zeros(len(first_of), np.int32)
    np.maximum.at(closes, sum_of, np.where(ends, batch, np.append(batch[1:], np.int32(0))))
    # Each batch counts as two times, because a sum that is made and read in one batch needs a slot too.
    slot, number = assign_slots(2 * batch[first_of], 2 * closes + 1, 2 * num_batches + 2)
    return Entries(label, batch, part, sum_of, first_of, slot, number)


class Layout:
    """All groups of positions over all batches: first groups of labels, then *bundles*.

    Label groups are summed in slots, in float32. Labels in many batches are *late*: they are summed in kept histograms,
    in float64, and finished at the end. A bundle is a group of positions that is added to one or several kept
    histograms.

    pieces: pieces of all groups; `is_first`: [parts] whether a part is the first of its group in its batch.
    opens, closes: [labels] first and last batch of each label that is not late.
    entries: entries of labels that span batches.
    counts, sets: [labels] number of positions of each label group, and its label sets (bits).
    alone: [T] label sets in which a position is the only one of its label.
    late: numbers of the late label groups; `row_of_late`: [labels] place of each label in `late`, or -1.
    late_kept: kept histograms of the late labels.

    Args:
        segments: the label groups.
        bundles: the positions of each bundle.
        targets: for each bundle, the kept histograms to which it is added.
        num_kept: number of kept histograms so far; late labels take the next ones.
        batch_of: [T] batch of each position, ascending.
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
        sizes = np.concatenate([self.counts, np.array([len(bundle) for bundle in bundles], np.int64)])
        self.pieces = self._cut(segments, bundles, sizes, batch_of)
        self.batch_of_part = np.repeat(np.arange(num_batches, dtype=np.int32), np.diff(self.pieces.part_start))
        self.is_first = first_of_run(self.batch_of_part, self.pieces.group)
        num_labels = len(self.counts)

        first = np.flatnonzero(self.is_first).astype(np.int32)
        group, batch = self.pieces.group[first], self.batch_of_part[first]
        self.late = np.flatnonzero(np.bincount(group, minlength=len(sizes))[:num_labels] > MANY_BATCHES)
        self.late_kept = slice(num_kept, num_kept + len(self.late))
        self.row_of_late = np.full(num_labels, -1, np.int32)
        self.row_of_late[self.late] = np.arange(len(self.late))
        # Bundle of each group; -1 for labels in slots. Late labels are the last bundles.
        self._bundle = np.arange(len(sizes), dtype=np.int32) - np.int32(num_labels)
        self._bundle[:num_labels] = np.where(self.row_of_late < 0, -1, len(bundles) + self.row_of_late)
        self._targets = np.concatenate([*targets, np.arange(num_kept, self.late_kept.stop)])
        self._num_targets = np.array([*map(len, targets), *[1] * len(self.late)])
        self._first_target = np.cumsum(self._num_targets) - self._num_targets

        self.opens = np.full(num_labels, num_batches, np.int32)
        self.closes = np.full(num_labels, -1, np.int32)
        in_slots = self._bundle[group] < 0
        np.minimum.at(self.opens, group[in_slots], batch[in_slots])
        np.maximum.at(self.closes, group[in_slots], batch[in_slots])
        self.entries = self._enter(first, group, batch, in_slots)
        by_batch, bounds = sort_by_batch(self.entries.batch, num_batches)
        self._entries_of = np.split(by_batch, bounds[1:-1])

    def _cut(
        self, segments: Sequence[Segments], bundles: Sequence[np.ndarray], sizes: np.ndarray, batch_of: np.ndarray
    ) -> Pieces:
        group = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        members = np.empty(len(group), np.int32)
        begin = 0
        for positions in (*(s.order[ranges(s.start, s.stop)] for s in segments), *bundles):
            members[begin : begin + len(positions)] = positions
            begin += len(positions)
        return cut(group, members, batch_of, self.num_batches)

    def _enter(
        self,
        first: np.ndarray,
        group: np.ndarray,
        batch: np.ndarray,
        in_slots: np.ndarray,
    ) -> Entries:
        content = np.add.reduceat(self.pieces.content, first) if len(first) else self.pieces.content
        self.pieces = replace(self.pieces, content=content[:0])  # no longer needed
        spans = in_slots.copy()
        spans[in_slots] = self.opens[group[in_slots]] < self.closes[group[in_slots]]
        here = np.flatnonzero(spans).astype(np.int32)
        here = here[np.argsort(group[here], kind="stable")]
        label, batch, content = group[here], batch[here], content[here]
        return share_slots(label, batch, first[here], content, self.num_batches)

    def work(self, number: int, first_position: int) -> dict[str, np.ndarray]:
        """The fields of `Batch` about pieces, groups and slots, for one batch."""
        pieces, entries = self.pieces, self.entries
        begin, end = pieces.piece_start[number], pieces.piece_start[number + 1]
        offsets = pieces.offsets[begin : end + 1]
        # The groups of this batch, each once, with their first part and number of parts.
        here = slice(pieces.part_start[number], pieces.part_start[number + 1])
        first = np.flatnonzero(self.is_first[here])
        length = np.diff(first, append=here.stop - here.start)
        group, piece = pieces.group[here][first], pieces.piece[here] - begin

        bundle = self._bundle[group]
        is_label = bundle < 0
        label, done_piece = group[is_label], piece[first[is_label]]
        is_long = is_label & (length > 1)
        done = (self.opens[label] == number) & (self.closes[label] == number)
        closing = label[~done & (self.closes[label] == number)]
        target, kept_part = self._kept(bundle[~is_label], first[~is_label], length[~is_label])
        target_start = np.flatnonzero(first_of_run(target))

        entry = self._entries_of[number]
        # Each running sum once.
        made = entry[entries.first_of[entries.sum_of[entry]] == entry]
        opens = self.opens[entries.label[made]] == number
        opening, going_on = made[opens], made[~opens]
        ending = entry[self.closes[entries.label[entry]] == number]
        close_slot, close_row = np.unique(entries.slot[entries.sum_of[ending]], return_inverse=True)
        finished, done_row = np.unique(done_piece[done], return_inverse=True)
        return {
            "members": pieces.members[offsets[0] : offsets[-1]] - first_position,
            "offsets": offsets - offsets[0],
            "long_members": piece[ranges(first[is_long], first[is_long] + length[is_long])],
            "long_offsets": np.concatenate([[0], np.cumsum(length[is_long])]),
            "long_target": piece[first[is_long]],
            "done_piece": finished,
            "done_row": done_row,
            "done_sets": self.sets[label[done]],
            "done_count": self.counts[label[done]],
            "open_piece": pieces.piece[entries.part[opening]] - begin,
            "open_slot": entries.slot[entries.sum_of[opening]],
            "more_piece": pieces.piece[entries.part[going_on]] - begin,
            "more_slot": entries.slot[entries.sum_of[going_on - 1]],
            "more_to": entries.slot[entries.sum_of[going_on]],
            "close_slot": close_slot,
            "close_row": close_row,
            "close_sets": self.sets[closing],
            "close_count": self.counts[closing],
            "kept_members": piece[kept_part],
            "kept_offsets": np.append(target_start, len(target)),
            "kept_target": target[target_start],
        }

    def _kept(self, bundle: np.ndarray, first: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(kept histogram, part) pairs of the bundles of one batch, sorted by histogram."""
        pairs = length * self._num_targets[bundle]
        run = np.repeat(np.arange(len(bundle)), pairs)
        within = ranges(np.zeros_like(pairs), pairs)
        target = self._targets[self._first_target[bundle[run]] + within // length[run]]
        part = first[run] + within % length[run]
        order = np.argsort(target, kind="stable")
        return target[order], part[order]


def first_of_run(*keys: np.ndarray) -> np.ndarray:
    """Where any of the sorted keys differs from its predecessor."""
    first = np.zeros(len(keys[0]), bool)
    first[:1] = True
    for key in keys:
        first[1:] |= key[1:] != key[:-1]
    return first


def int64(values: np.ndarray) -> torch.Tensor:
    """Make a tensor of int64."""
    return torch.from_numpy(values.astype(np.int64))


def int32(values: np.ndarray) -> torch.Tensor:
    """Make a tensor of int32, for numbers that fit: a plan holds many, and this halves their memory."""
    return torch.from_numpy(values.astype(np.int32))


def ranges(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Concatenation of arange(start[i], stop[i])."""
    length = stop - start
    ends = np.cumsum(length)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(start - (ends - length), length)
