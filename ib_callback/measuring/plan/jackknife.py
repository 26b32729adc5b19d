"""What a measurement must remember so that each group of sequences can be left out of it afterwards.

Sequences are exchangeable, but positions within a sequence are not. So the probe is cut into groups of neighbouring
sequences, and batches never cross a group. A label's histogram without group g is its whole histogram minus its share
in g. For a label that occurs in one group only, the number of the group is enough. A label that spans k groups has a
running sum at the end of each group. All but the last of these sums are held, from the label's first batch in the next
group until the label is finished. Shares are differences of successive sums. Labels with the same positions so far
share the held sums, as they share slots (batches.py). For late labels, which are finished at the end, the shares
themselves are held.

At the scale of the paper, the held histograms would take nearly twice the memory of the slots. If there are more than a
million, they are held in 16 bits. Bins then have independent relative errors of 2.5e-4 on average. Only sums over very
many labels are read from them, which hardly change. With 400 documents and 140,000 held histograms, replicates changed
by at most 5e-6, standard errors by at most .4 % and mostly .01 %, and no other number changed.

Each group is left out alone, and each two neighbouring groups together (results/uncertainty.py says why). This gives
2 G - 1 *omissions*, numbered in this order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import torch

from ib_callback.measuring.plan.batches import Layout, assign_slots, first_of_run, int32, int64, ranges
from ib_callback.measuring.plan.null import LabelCounts

# Omissions are stored as bits of an int64.
MAX_GROUPS = 32
# The histograms of this many shares are formed at a time.
ROWS = 1024
# With more histograms than the first number, they are held in 16 bits. The second is the largest value these can hold.
MANY_HELD = 1 << 20
MOST_IN_HALF = 60_000


@dataclass(frozen=True)
class Groups:
    """Groups of neighbouring sequences.

    sequence_bounds: [G + 1] first sequence of each group, and the end.
    batch_bounds: first sequence of each batch, and the end.
    """

    sequence_bounds: np.ndarray
    batch_bounds: np.ndarray

    @property
    def number(self) -> int:
        """The number of groups G."""
        return len(self.sequence_bounds) - 1

    def of_sequence(self, sequence: np.ndarray) -> np.ndarray:
        """Group of each sequence."""
        return np.searchsorted(self.sequence_bounds, sequence, side="right") - 1


def group_sequences(
    used: np.ndarray,
    num_sequences: int,
    num_groups: int,
    batch_size: int,
    *,
    paired: bool,
    sources: Sequence[int] | None = None,
) -> Groups:
    """Cut a probe into groups of neighbouring sequences of nearly equal size, and the groups into batches.

    Args:
        used: sequences that have valid positions, ascending.
        num_sequences: number of sequences N.
        num_groups: wanted number of groups; there are fewer if fewer sequences are used.
        batch_size: largest number of sequences in a batch.
        paired: whether sequences 2i and 2i + 1 belong together (preference pairs).
        sources: source of each sequence. Sequences of one source, and all between them, stay together. None: each
            sequence has its own source.
    """
    parted = np.ones(num_sequences, bool)  # whether a cut is allowed between a sequence and the one before it
    if paired:
        parted[1::2] = False
    if sources is not None:
        _, first, source = np.unique(np.array(sources), return_index=True, return_inverse=True)
        last = np.zeros_like(first)
        np.maximum.at(last, source, np.arange(num_sequences))
        spanning = np.zeros(num_sequences + 1, np.int64)
        np.add.at(spanning, first + 1, 1)
        np.add.at(spanning, last + 1, -1)
        parted &= spanning[:-1].cumsum() == 0
    starts_of_runs = np.flatnonzero(parted)
    units = starts_of_runs[np.unique(np.searchsorted(starts_of_runs, used, side="right") - 1)]
    number = min(num_groups, len(units))
    starts = units[np.arange(number) * len(units) // number]
    bounds = np.concatenate([[0], starts[1:], [num_sequences]])
    parts = [
        np.linspace(begin, end, -(-(end - begin) // batch_size), endpoint=False).astype(np.int64)
        for begin, end in pairwise(bounds.tolist())
    ]
    return Groups(bounds, np.append(np.concatenate(parts), num_sequences))


@dataclass(frozen=True)
class Shares:
    """Shares of labels in groups: one entry for each label and each group, or two neighbouring groups, where it occurs.

    row: number of the label among the finished ones.
    omissions: bits of the omissions that remove exactly this share from the label.
    before, after: numbers of the held running sums before and after the share. For the label's first share `before` is
        the last row, which holds zeros; for its last share `after` is -1. For late labels they are numbers of sums of
        the label's shares, counted from its first.
    rest: number of positions of the label outside the share.
    """

    row: torch.Tensor
    omissions: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    rest: torch.Tensor

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, which: slice | torch.Tensor) -> Shares:
        return Shares(*(getattr(self, column.name)[which] for column in fields(self)))


@dataclass(frozen=True)
class GroupedBatch:
    """For one batch: its group, what must be saved before it, and the shares of the labels that it finishes.

    omissions: numbers of the omissions that remove the group.
    slot_from, slot_to: slots to copy, and the places where the copies are held.
    late_from, late_to: late labels, by row, whose share in an earlier group is complete, and the places of the shares.
    confined: which of the labels that end here (`Batch.close_sets`) occur in this group only.
    shares: shares of the other labels that end here.
    """

    group: int
    omissions: torch.Tensor
    slot_from: torch.Tensor
    slot_to: torch.Tensor
    late_from: torch.Tensor
    late_to: torch.Tensor
    confined: torch.Tensor
    shares: Shares


@dataclass(frozen=True)
class JackknifePlan:
    """What a pass needs for leaving out groups.

    sequence_bounds: [G + 1] first sequence of each group, and the end.
    num_held: largest number of running sums held at a time.
    first_late_share: [late labels + 1] number of the first held share of each late label, and the number of shares.
    scale: factor of held histograms in 16 bits; None: they are in 32 bits.
    batches: one entry for each batch, by its number.
    late: shares of the labels in `LateLabels`, by their row there, ascending.
    totals, shares_of_totals: kept histograms of the whole and of features, and their [G] shares.
    taken: [2 G - 1, G] 0/1, which groups each omission removes.
    rest: [2 G - 1] number of valid positions outside each omission.
    rest_of_set: [label sets, 2 G - 1] number of positions with a label of the set outside each omission.
    counts: for each label set and omission, the label counts outside the omission.
    """

    sequence_bounds: np.ndarray
    num_held: int
    first_late_share: np.ndarray
    scale: float | None
    batches: dict[int, GroupedBatch]
    late: Shares
    totals: tuple[int, ...]
    shares_of_totals: tuple[slice, ...]
    taken: np.ndarray
    rest: np.ndarray
    rest_of_set: np.ndarray
    counts: list[list[LabelCounts]]

    def bytes_per_bin(self) -> int:
        """Bytes for each layer and bin: held histograms, and scratch memory for forming the histograms of shares."""
        most = max(len(self.late), *(len(batch.shares) for batch in self.batches.values()))
        held = self.num_held + self.num_snapshots
        return (4 if self.scale is None else 2) * held + 4 * len(self.first_late_share) + 28 * min(ROWS, most)

    @property
    def num_snapshots(self) -> int:
        """Number of held shares of late labels."""
        return int(self.first_late_share[-1])


def plan_jackknife(
    layout: Layout, groups: Groups, sequence: np.ndarray, num_sets: int, totals: list[tuple[int, slice]]
) -> JackknifePlan:
    """Plan snapshots and shares for the label groups of a layout.

    Args:
        layout: layout of label groups over batches.
        groups: groups of sequences.
        sequence: [T] sequence of each position.
        num_sets: number of label sets.
        totals: kept histograms of the whole and of features, each with the histograms of its shares.
    """
    counts, entries, row_of_late = layout.counts, layout.entries, layout.row_of_late
    num_batches = layout.num_batches
    group_of_batch = groups.of_sequence(groups.batch_bounds[:-1])
    group_of_position = groups.of_sequence(sequence)
    is_label = layout.pieces.group < len(counts)
    label, batch = layout.pieces.group[is_label], layout.batch_of_part[is_label]
    size = np.diff(layout.pieces.offsets)[layout.pieces.piece[is_label]]

    # Each label in each group, sorted: number of positions, and first batch.
    order = np.lexsort((batch, label))
    label, batch, size = label[order], batch[order], size[order]
    start = np.flatnonzero(first_of_run(label, group_of_batch[batch]))
    share = np.add.reduceat(size, start) if len(start) else np.zeros(0, np.int64)
    label, first_batch = label[start], batch[start]
    group = group_of_batch[first_batch]
    is_first = first_of_run(label)
    is_last = np.append(is_first[1:], True)[: len(label)]

    is_late = row_of_late[label] >= 0
    # Running sums at the end of each group except the last; they are held from the label's next batch on.
    group_of_entry = group_of_batch[entries.batch]
    leaves = np.flatnonzero((entries.label[1:] == entries.label[:-1]) & (group_of_entry[1:] != group_of_entry[:-1]))
    sums, held_as = entries.sum_of[leaves], np.empty(len(leaves), np.int32)
    opens, until = entries.batch[leaves + 1], layout.closes[entries.label[leaves]]
    # Labels share one copy if they need it at the same time: overlapping intervals of one sum are merged.
    order = np.lexsort((opens, sums))
    sums, opens, until = sums[order], opens[order], until[order]
    of_sum = sums.astype(np.int64) * (num_batches + 1)  # larger than any number of the sums before
    reach = np.maximum.accumulate(until + of_sum) - of_sum
    begins = np.append(True, (sums[1:] != sums[:-1]) | (opens[1:] > reach[:-1]))[: len(sums)]
    held_as[order] = np.cumsum(begins) - 1
    ends = np.append(begins[1:], True)[: len(sums)]
    sums, opens, until = sums[begins], opens[begins], reach[ends].astype(np.int32)
    # Each batch counts as two times: sums are copied before it, and those of finished labels are freed after it.
    place, num_held = assign_slots(2 * opens, 2 * until + 1, 2 * num_batches + 2)
    held_in = _by_batch(np.arange(len(sums)), opens, num_batches)

    spans = ~is_late & (layout.opens[label] < layout.closes[label])
    snapped = np.flatnonzero(is_late & ~is_last)
    taken_in = first_batch[snapped + 1]
    after = np.full(len(label), -1, np.int64)
    after[spans & ~is_last] = place[held_as]
    after[snapped] = np.arange(len(snapped))
    before = np.where(is_first, np.where(is_late, len(snapped), num_held), np.roll(after, 1))
    of_late = np.bincount(row_of_late[label[snapped]], minlength=len(layout.late))
    largest = max(share[is_late].max(initial=0), counts[label[spans]].max(initial=0))
    many = num_held + len(snapped) > MANY_HELD

    # Labels that end in a batch are sorted by number, as in `Batch.close_sets`.
    closes = layout.closes
    ending = np.flatnonzero(layout.opens < closes)
    ending = ending[np.argsort(closes[ending], kind="stable")]
    row = row_of_late.copy()
    row[ending] = ranges(np.zeros(num_batches, int), np.bincount(closes[ending], minlength=num_batches))
    is_confined = np.zeros(len(counts), bool)
    is_confined[label[is_first & is_last]] = True

    # First shares in single groups; then shares in two neighbouring groups, for labels that occur in both.
    both = np.flatnonzero(~is_last & (np.append(group[1:], -1)[: len(group)] == group + 1))
    of_label = np.concatenate([label, label[both]])
    positions = np.concatenate([share, share[both] + share[both + 1]])
    every = Shares(
        row=int32(row[of_label]),
        omissions=int64(_omissions(group, both, groups.number)),
        before=int32(np.concatenate([before, before[both]])),
        after=int32(np.concatenate([after, after[both + 1]])),
        rest=int32(counts[of_label] - positions),
    )

    taken = omissions_of(groups.number)
    late_shares = np.flatnonzero(row_of_late[of_label] >= 0)
    spanning = np.flatnonzero((row[of_label] >= 0) & ~is_confined[of_label] & (row_of_late[of_label] < 0))
    confined = np.flatnonzero(is_confined & (row >= 0) & (row_of_late < 0))
    closing_in = _by_batch(spanning, closes[of_label[spanning]], num_batches)
    confined_in = _by_batch(confined, closes[confined], num_batches)
    snapped_in = _by_batch(snapped, taken_in, num_batches)
    batches = {}
    for number in range(num_batches):
        late = snapped_in[number]
        batches[number] = GroupedBatch(
            group=int(group_of_batch[number]),
            omissions=int64(np.flatnonzero(taken[:, group_of_batch[number]])),
            slot_from=int32(entries.slot[sums[held_in[number]]]),
            slot_to=int32(place[held_in[number]]),
            late_from=int32(row_of_late[label[late]]),
            late_to=int32(after[late]),
            confined=int32(row[confined_in[number]]),
            shares=every[int64(closing_in[number])],
        )
    outside = _counts_outside(every, of_label, layout, taken[:, group_of_position], num_sets)
    return JackknifePlan(
        sequence_bounds=groups.sequence_bounds,
        num_held=num_held,
        first_late_share=np.concatenate([[0], np.cumsum(of_late)]),
        scale=min(1.0, 2.0 ** -math.ceil(math.log2(max(largest, 1) / MOST_IN_HALF))) if many else None,
        batches=batches,
        late=every[int64(late_shares[np.argsort(row_of_late[of_label[late_shares]], kind="stable")])],
        totals=tuple(total for total, _ in totals),
        shares_of_totals=tuple(parts for _, parts in totals),
        taken=taken,
        rest=(~taken) @ np.bincount(group_of_position, minlength=groups.number),
        rest_of_set=np.array([[number @ np.arange(len(number)) for number in by] for by in outside]),
        counts=[[LabelCounts.of_numbers(number) for number in by_omission] for by_omission in outside],
    )


def omissions_of(num_groups: int) -> np.ndarray:
    """[2 G - 1, G] bool, which groups each omission removes: first single groups, then pairs of neighbours."""
    one = np.eye(num_groups, dtype=bool)
    return np.concatenate([one, one[:-1] | one[1:]])


def _omissions(group: np.ndarray, both: np.ndarray, num_groups: int) -> np.ndarray:
    """Bits of the omissions that remove exactly each share from its label.

    Args:
        group: [R] group of each share in a single group; the shares of one label follow each other.
        both: [P] shares that form a share of two neighbouring groups together with the label's next share.
        num_groups: number of groups G.
    """
    # Omission G + g removes g and g + 1. From a label that occurs in only one of them, it removes a single share.
    bit = np.int64(1)
    previous_too, next_too = np.zeros((2, len(group)), bool)
    previous_too[both + 1] = next_too[both] = True
    single = bit << group
    single |= np.where(previous_too | (group == 0), 0, bit << np.maximum(num_groups + group - 1, 0))
    single |= np.where(next_too | (group == num_groups - 1), 0, bit << np.minimum(num_groups + group, 62))
    return np.concatenate([single, bit << (num_groups + group[both])])


def _by_batch(values: np.ndarray, batch: np.ndarray, num_batches: int) -> list[np.ndarray]:
    """The values of each batch, in the given order."""
    order = np.argsort(batch, kind="stable")
    return np.split(values[order], np.searchsorted(batch[order], np.arange(1, num_batches)))


def _counts_outside(
    shares: Shares, of_label: np.ndarray, layout: Layout, takes_position: np.ndarray, num_sets: int
) -> list[list[np.ndarray]]:
    """For each label set and omission: entry c is the number of labels that occur c times outside the omission.

    `of_label` is the label of each share; `takes_position` [2 G - 1, T] says which positions each omission removes.
    """
    share_sets, count = layout.sets[of_label], layout.counts[of_label]
    rest, omissions = shares.rest.numpy(), shares.omissions.numpy()
    outside = []
    for bit in range(num_sets):
        counts = layout.counts[(layout.sets >> bit) & 1 == 1]
        once = (layout.alone >> bit) & 1 == 1
        length = int(counts.max(initial=1)) + 1
        everywhere = np.bincount(counts, minlength=length)
        everywhere[1] += once.sum()
        in_set = (share_sets >> bit) & 1 == 1
        by_omission = []
        for number, takes in enumerate(takes_position):
            changed = in_set & ((omissions >> number) & 1 == 1)
            left = everywhere - np.bincount(count[changed], minlength=length)
            left += np.bincount(rest[changed], minlength=length)
            left[1] -= (once & takes).sum()
            left[0] = 0
            by_omission.append(left)
        outside.append(by_omission)
    return outside
