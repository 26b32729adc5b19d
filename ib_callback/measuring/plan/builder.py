"""From groups of positions and kept histograms to what is done after each batch: the making of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from ib_callback.measuring.plan.batches import Pieces, Slots, assign_slots, cut, first_of_run, ranges
from ib_callback.measuring.plan.jackknife import Groups, JackknifePlan, plan_jackknife
from ib_callback.measuring.plan.null import LabelCounts, design_subsets
from ib_callback.measuring.plan.plan import Batch, LateLabels, NullPlan, Plan, Quantity
from ib_callback.probe.ngrams import LabelSet, Positions, Segments

_MAX_LABEL_SETS = 62
# A float32 sum over more batches than this would err by more than 1e-7 of itself.
MANY_BATCHES = 64


@dataclass
class Builder:
    """Collects what quantities need of a pass, then lays it out over batches.

    Histograms of labels are finished one by one and only their entropies are added up; those that are *kept* are there
    as a whole at the end, in float64.

    positions: valid positions.
    groups: of sequences, to be left out in turn; None without standard errors.
    single: whether the mean entropy of a single assignment is wanted.
    """

    positions: Positions
    groups: Groups | None
    single: bool = False
    label_sets: list[LabelSet] = field(default_factory=list)
    counts: list[LabelCounts] = field(default_factory=list)
    nulls: list[NullPlan] = field(default_factory=list)
    num_kept: int = 0

    def __post_init__(self) -> None:
        self._segments: list[Segments] = []
        # Bundles are groups of positions that go into kept histograms, several of them perhaps.
        self._bundles: list[np.ndarray] = []
        self._bundle_targets: list[np.ndarray] = []
        # Kept histograms of wholes, and of each group's share.
        self._totals: list[tuple[int, slice]] = []

    @property
    def num_label_sets(self) -> int:
        """Label sets so far, which is the number of the next one."""
        return len(self.label_sets)

    def add_segments(self, segments: Segments, names: list[tuple[str, str]]) -> None:
        """Register the label sets that `segments` groups by, from the number `num_label_sets` on."""
        self._segments.append(segments)
        for name in names:
            bit = self.num_label_sets
            if bit >= _MAX_LABEL_SETS:
                raise ValueError(f"expected at most {_MAX_LABEL_SETS} label sets (two per order, one per feature).")
            grouped = (segments.stop - segments.start)[(segments.sets >> bit) & 1 == 1]
            alone = int(((segments.alone >> bit) & 1).sum())
            counts = np.concatenate([grouped, np.ones(alone, np.int64)])
            self.label_sets.append(LabelSet(name, int(counts.sum()), len(counts)))
            self.counts.append(LabelCounts.of(counts))

    def reserve(self, number: int) -> int:
        """Numbers for so many kept histograms; returns the first."""
        self.num_kept += number
        return self.num_kept - number

    def bundle(self, members: np.ndarray, targets: np.ndarray) -> None:
        """Sum these positions into each of the kept histograms `targets`."""
        self._bundles.append(members)
        self._bundle_targets.append(targets)

    def keep(self, parts: Sequence[np.ndarray]) -> slice:
        """Keep one histogram over the positions of each part."""
        first = self.reserve(len(parts))
        for number, members in enumerate(parts, start=first):
            self.bundle(members, np.array([number]))
        return slice(first, self.num_kept)

    def keep_total(self, members: np.ndarray) -> int:
        """Keep one histogram over these positions and, for standard errors, one for each group of sequences."""
        if self.groups is None:
            return self.keep([members]).start
        total = self.reserve(1 + self.groups.number)
        self._totals.append((total, slice(total + 1, self.num_kept)))
        group = self.groups.of_sequence(self.positions.sequence[members])
        for g in np.unique(group):
            self.bundle(members[group == g], np.array([total, total + 1 + g]))
        return total

    def keep_subsets(self, total: int, members: np.ndarray, counts: list[LabelCounts], seed: int) -> NullPlan:
        """Keep the random subsets of `members` that a null of labels with these counts needs.

        `total` is the kept histogram over all members.
        """
        design = design_subsets(len(members), counts, seed)
        subsets, parts = (self.keep([members[part] for part in group]) for group in (design.subsets, design.parts))
        self.nulls.append(NullPlan(len(self.nulls), design, total, subsets, parts))
        return self.nulls[-1]

    def build(self, mask: np.ndarray, bounds: np.ndarray, total: int, quantities: tuple[Quantity, ...]) -> Plan:
        """The plan, when all quantities are registered.

        Args:
            mask: [N, S] bool, real tokens.
            bounds: first sequence of each batch, and N.
            total: kept histogram over all positions.
            quantities: what is read from the sums.
        """
        batch_of = np.searchsorted(bounds, self.positions.sequence, side="right") - 1
        layout = self._layout(batch_of, len(bounds) - 1)
        return Plan(
            num_positions=len(self.positions),
            label_sets=tuple(self.label_sets),
            counts=tuple(self.counts),
            batches=tuple(_batches(layout, mask, self.positions, bounds)),
            num_slots=layout.slots.number,
            num_kept=self.num_kept,
            late=layout.late,
            total=total,
            single=self.single,
            nulls=tuple(self.nulls),
            quantities=quantities,
            jackknife=layout.jackknife,
        )

    def _layout(self, batch_of: np.ndarray, num_batches: int) -> _Layout:
        """Cut label groups, and after them bundles, into pieces, and give groups their slots or kept histograms.

        Args:
            batch_of: [T] batch of each position.
            num_batches: number of batches.
        """
        counts = np.concatenate([s.stop - s.start for s in self._segments])
        members = [s.order[ranges(s.start, s.stop)] for s in self._segments] + self._bundles
        sizes = np.concatenate([counts, [len(bundle) for bundle in self._bundles]])
        pieces = cut(np.repeat(np.arange(len(sizes)), sizes), np.concatenate(members), batch_of, num_batches)
        batch_of_piece = np.repeat(np.arange(num_batches), np.diff(pieces.batch_start))
        is_first = first_of_run(batch_of_piece, pieces.group)

        # Sums over many batches need float64, which kept histograms have and slots have not.
        late = np.flatnonzero(np.bincount(pieces.group[is_first], minlength=len(sizes))[: len(counts)] > MANY_BATCHES)
        late_kept = slice(self.num_kept, self.num_kept + len(late))
        self.num_kept = late_kept.stop
        bundle = np.arange(len(sizes)) - len(counts)
        bundle[: len(counts)] = -1
        bundle[late] = len(self._bundles) + np.arange(len(late))

        in_slots = bundle[pieces.group] < 0
        targets = [*self._bundle_targets, np.arange(late_kept.start, late_kept.stop)]
        num_targets = np.array([*map(len, self._bundle_targets), *[1] * len(late)])
        sets = np.concatenate([s.sets for s in self._segments])
        alone = np.bitwise_or.reduce([s.alone for s in self._segments])
        in_slots_first = is_first & in_slots
        slots = assign_slots(pieces.group[in_slots_first], batch_of_piece[in_slots_first], len(counts), num_batches)
        jackknife = None
        if self.groups is not None:
            jackknife = plan_jackknife(
                pieces,
                slots,
                groups=self.groups,
                group_of_position=self.groups.of_sequence(self.positions.sequence),
                sets=sets,
                counts=counts,
                alone=alone,
                num_sets=len(self.label_sets),
                late=late,
                late_kept=late_kept,
                totals=self._totals,
            )
        return _Layout(
            pieces=pieces,
            is_first=is_first,
            slots=slots,
            sets=sets,
            counts=counts,
            alone=alone,
            bundle=bundle,
            targets=np.concatenate(targets),
            num_targets=num_targets,
            first_target=np.cumsum(num_targets) - num_targets,
            late=LateLabels(late_kept, _int64(sets[late]), _int64(counts[late])),
            jackknife=jackknife,
        )


def _batches(layout: _Layout, mask: np.ndarray, positions: Positions, bounds: np.ndarray) -> Iterator[Batch]:
    first_position = np.searchsorted(positions.sequence, bounds)
    real_width = mask.shape[1] - np.argmax(mask[:, ::-1], axis=1)
    for number, (begin, end) in enumerate(pairwise(bounds.tolist())):
        here = slice(first_position[number], first_position[number + 1])
        if here.start == here.stop:
            continue  # no valid position: nothing to run the model for
        sequences = slice(begin, end)
        width = int(real_width[sequences].max())
        flat = (positions.sequence[here] - begin) * width + positions.offset[here]
        yield Batch(
            sequences=sequences,
            width=width,
            positions=_int64(flat),
            alone=_int64(layout.alone[here]),
            grouped=None if layout.jackknife is None else layout.jackknife.batches[number],
            **layout.work(number, here.start),
        )


@dataclass(frozen=True)
class _Layout:
    """All groups over all batches; groups from len(counts) on are bundles.

    is_first: [pieces] whether a piece is the first of its group in its batch.
    sets, counts: [G] label sets and sizes of the label groups.
    alone: [T] label sets in which a position is the only one of its label.
    bundle: number of the bundle that a group is, -1 for label groups that are summed in slots.
    targets, first_target, num_targets: kept histograms that each bundle goes into.
    late: label groups that are summed in kept histograms.
    jackknife: shares of label groups in groups of sequences.
    """

    pieces: Pieces
    is_first: np.ndarray
    slots: Slots
    sets: np.ndarray
    counts: np.ndarray
    alone: np.ndarray
    bundle: np.ndarray
    targets: np.ndarray
    first_target: np.ndarray
    num_targets: np.ndarray
    late: LateLabels
    jackknife: JackknifePlan | None

    def work(self, number: int, first_position: int) -> dict[str, torch.Tensor]:
        """What `Batch` says of pieces, groups and slots, for one batch."""
        begin, end = self.pieces.batch_start[number], self.pieces.batch_start[number + 1]
        offsets = self.pieces.offsets[begin : end + 1]
        # The groups of this batch, each once, with their first piece and number of pieces.
        first = np.flatnonzero(self.is_first[begin:end])
        length = np.diff(first, append=end - begin)
        group = self.pieces.group[begin:end][first]

        bundle = self.bundle[group]
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
            "members": _int32(self.pieces.members[offsets[0] : offsets[-1]] - first_position),
            "offsets": _int32(offsets - offsets[0]),
            "long_members": _int32(ranges(first[is_long], first[is_long] + length[is_long])),
            "long_offsets": _int32(np.concatenate([[0], np.cumsum(length[is_long])])),
            "long_target": _int64(first[is_long]),
            "done_piece": _int64(piece[done]),
            "done_sets": _int64(self.sets[label[done]]),
            "done_count": _int64(self.counts[label[done]]),
            "open_piece": _int64(piece[opening]),
            "open_slot": _int64(self.slots.slot[label[opening]]),
            "more_piece": _int64(piece[going_on]),
            "more_slot": _int64(self.slots.slot[label[going_on]]),
            "close_slot": _int64(self.slots.slot[closing]),
            "close_sets": _int64(self.sets[closing]),
            "close_count": _int64(self.counts[closing]),
            "kept_members": _int32(kept_piece),
            "kept_offsets": _int32(np.append(target_start, len(target))),
            "kept_target": _int64(target[target_start]),
        }

    def _kept(self, bundle: np.ndarray, first: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(kept histogram, piece) pairs of the bundles of one batch, sorted by histogram."""
        pairs = length * self.num_targets[bundle]
        run = np.repeat(np.arange(len(bundle)), pairs)
        within = ranges(np.zeros_like(pairs), pairs)
        target = self.targets[self.first_target[bundle[run]] + within // length[run]]
        piece = first[run] + within % length[run]
        order = np.argsort(target, kind="stable")
        return target[order], piece[order]


def _int64(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _int32(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int32))
