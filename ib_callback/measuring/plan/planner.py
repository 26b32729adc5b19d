"""Making the plan of a measurement, once before the first one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from ib_callback.common.errors import ProbeError
from ib_callback.measuring.plan.batches import Pieces, Slots, assign_slots, cut, first_of_run, ranges
from ib_callback.measuring.plan.features import Feature, make_feature
from ib_callback.measuring.plan.jackknife import Groups, JackknifePlan, group_sequences, plan_jackknife
from ib_callback.measuring.plan.null import LabelCounts, design_subsets
from ib_callback.measuring.plan.plan import Batch, FeaturePlan, LateLabels, NullPlan, Plan
from ib_callback.probe.ngrams import LabelSet, Positions, Segments, context_segments, valid_positions, value_segments
from ib_callback.probe.probe import Probe

_MAX_LABEL_SETS = 62
# A float32 sum over more batches than this would err by more than 1e-7 of itself.
MANY_BATCHES = 64


def make_plan(
    probe: Probe,
    orders: dict[str, int],
    features: tuple[str, ...],
    *,
    batch_size: int,
    null: bool,
    seed: int,
    planes: bool = True,
    num_groups: int = 0,
) -> Plan:
    """Plan the measurement of `probe`.

    Args:
        probe: what is measured on.
        orders: names and widths; the widest decides which positions are valid.
        features: names of probe labels.
        batch_size: sequences in a forward pass.
        null: whether to plan for null information.
        seed: of the random subsets and permutations.
        planes: whether to plan for the orders; if not, positions that carry none of the features are left out.
        num_groups: groups of sequences to leave out in turn for standard errors; 0 for none.

    Raises:
        ProbeError: no position is valid, a feature labels none of them, or fewer than three groups can be made.
    """
    mask = probe.attention_mask.numpy()
    width = max(orders.values())
    positions = valid_positions(mask, width)
    if not len(positions):
        raise ProbeError(
            f"probe {probe.name!r}: no valid position. Expected sequences of at least {2 * width} real tokens "
            f"({width} before and {width} after a position at the widest order), got at most {mask.sum(1).max()}. "
            "Use longer texts or narrower orders."
        )
    batch_bounds = np.append(np.arange(0, len(mask), batch_size), len(mask))
    if not planes:
        positions = _labelled(positions, [probe.labels[name].numpy() for name in features])
    groups = None
    if num_groups:
        groups = _group(probe, positions, num_groups, batch_size)
        batch_bounds = groups.batch_bounds
    builder = _Builder(groups, positions)
    if planes:
        _add_orders(builder, probe.input_ids.numpy(), positions, sorted(orders.items(), key=lambda order: order[1]))
    total = builder.keep_total(np.arange(len(positions)))
    null_plan = None
    if planes and null:
        null_plan = builder.keep_subsets(total, np.arange(len(positions)), builder.counts, seed)
    feature_plans = tuple(
        _add_feature(builder, make_feature(name, probe.labels[name].numpy(), positions, seed), positions, null, seed)
        for name in features
    )
    batch_of = np.searchsorted(batch_bounds, positions.sequence, side="right") - 1
    layout = builder.layout(batch_of, len(batch_bounds) - 1)
    return Plan(
        num_positions=len(positions),
        label_sets=tuple(builder.label_sets),
        counts=tuple(builder.counts),
        batches=tuple(_batches(layout, mask, positions, batch_bounds)),
        num_slots=layout.slots.number,
        num_kept=builder.num_kept,
        late=layout.late,
        total=total,
        null=null_plan,
        features=feature_plans,
        jackknife=layout.jackknife,
    )


def _labelled(positions: Positions, tables: list[np.ndarray]) -> Positions:
    """The positions that carry a label in any table; all of them if none does, for `_add_feature` to say so."""
    carries = np.any([table[positions.sequence, positions.offset] >= 0 for table in tables], axis=0)
    return Positions(positions.sequence[carries], positions.offset[carries]) if carries.any() else positions


def _group(probe: Probe, positions: Positions, num_groups: int, batch_size: int) -> Groups:
    used = np.unique(positions.sequence)
    groups = group_sequences(
        used, len(probe), num_groups, batch_size, paired="preference" in probe.labels and len(probe) % 2 == 0
    )
    if groups.number < 3:  # without two neighbours something must be left
        raise ProbeError(
            f"probe {probe.name!r}: expected at least three sequences (pairs, of preferences) with valid positions for "
            f"standard errors, got {len(used)} sequences. Use a larger probe, or standard_errors=False."
        )
    return groups


def _add_orders(builder: _Builder, ids: np.ndarray, positions: Positions, orders: list[tuple[str, int]]) -> None:
    widest = orders[-1][1]
    steps = np.arange(widest)
    for quantity, columns in (("complexity", -steps), ("expressivity", 1 + steps)):
        contexts = ids[positions.sequence[:, None], positions.offset[:, None] + columns]
        widths = [width for _, width in orders]
        segments = context_segments(contexts, widths, first_bit=len(builder.label_sets))
        builder.add_segments(segments, [(quantity, name) for name, _ in orders])


def _add_feature(builder: _Builder, feature: Feature, positions: Positions, null: bool, seed: int) -> FeaturePlan:
    labelled = np.flatnonzero(feature.values >= 0)
    if not len(labelled):
        raise ProbeError(
            f"feature {feature.name!r}: expected labels (>= 0) at some of the {len(positions)} valid positions, "
            "got none. Label tokens that have enough context on both sides, or leave the feature out."
        )
    bit = len(builder.label_sets)
    builder.add_segments(value_segments(feature.values, bit), [("feature", feature.name)])
    total = builder.keep_total(labelled)
    permuted = permuted_count = null_plan = None
    if null and feature.permuted is not None:
        permuted, permuted_count = builder.keep_permutations(feature, positions)
    elif null:
        null_plan = builder.keep_subsets(total, labelled, builder.counts[bit:], seed)
        # Every labelled position as a label of its own: their mean entropy is where the null's curve begins.
        each = np.where(feature.values >= 0, np.arange(len(positions)), -1)
        builder.add_segments(value_segments(each, bit + 1), [("single", feature.name)])
    return FeaturePlan(
        feature=feature,
        label_set=builder.label_sets[bit],
        counts=builder.counts[bit],
        total=total,
        permuted=permuted,
        permuted_count=permuted_count,
        null=null_plan,
    )


@dataclass
class _Builder:
    """Collects groups of positions and kept histograms, then lays them out over batches."""

    groups: Groups | None
    positions: Positions
    label_sets: list[LabelSet] = field(default_factory=list)
    counts: list[LabelCounts] = field(default_factory=list)
    num_kept: int = 0

    def __post_init__(self) -> None:
        self._segments: list[Segments] = []
        # Bundles are groups of positions that go into kept histograms, several of them perhaps.
        self._bundles: list[np.ndarray] = []
        self._bundle_targets: list[np.ndarray] = []
        # Kept histograms of wholes, and of each group's share.
        self._totals: list[tuple[int, slice]] = []

    def add_segments(self, segments: Segments, names: list[tuple[str, str]]) -> None:
        """Register the label sets that `segments` groups by."""
        self._segments.append(segments)
        for name in names:
            bit = len(self.label_sets)
            if bit >= _MAX_LABEL_SETS:
                raise ValueError(f"expected at most {_MAX_LABEL_SETS} label sets (two per order, one per feature).")
            grouped = (segments.stop - segments.start)[(segments.sets >> bit) & 1 == 1]
            alone = int(((segments.alone >> bit) & 1).sum())
            counts = np.concatenate([grouped, np.ones(alone, np.int64)])
            self.label_sets.append(LabelSet(name, int(counts.sum()), len(counts)))
            self.counts.append(LabelCounts.of(counts))

    def keep(self, members: np.ndarray) -> int:
        """Keep one histogram over these positions; returns its number."""
        self._bundles.append(members)
        self._bundle_targets.append(np.array([self.num_kept]))
        self.num_kept += 1
        return self.num_kept - 1

    def keep_total(self, members: np.ndarray) -> int:
        """Keep one histogram over these positions and, for standard errors, one for each group of sequences."""
        total = self.num_kept
        if self.groups is None:
            return self.keep(members)
        shares = slice(total + 1, total + 1 + self.groups.number)
        self.num_kept = shares.stop
        self._totals.append((total, shares))
        group = self.groups.of_sequence(self.positions.sequence[members])
        for g in np.unique(group):
            self._bundles.append(members[group == g])
            self._bundle_targets.append(np.array([total, shares.start + g]))
        return total

    def keep_subsets(self, total: int, members: np.ndarray, counts: list[LabelCounts], seed: int) -> NullPlan:
        """Keep the random subsets of `members` that a null of labels with these counts needs.

        `total` is the kept histogram over all members.
        """
        design = design_subsets(len(members), counts, seed)
        first = self.num_kept
        for subset in design.subsets:
            self.keep(members[subset])
        middle = self.num_kept
        for part in design.parts:
            self.keep(members[part])
        return NullPlan(design, total, slice(first, middle), slice(middle, self.num_kept))

    def keep_permutations(self, feature: Feature, positions: Positions) -> tuple[np.ndarray, np.ndarray]:
        """Keep the histograms of a feature's labels under each permutation of whole sequences, and as they are.

        The labels as they are come last. Summed like the permuted ones, they are bitwise equal to those permutations
        that change nothing, or names only, and so can be compared with all of them.
        """
        assert feature.permuted is not None
        num_rows, num_labels = len(feature.permuted) + 1, feature.num_labels
        kept = self.num_kept + np.arange(num_rows * num_labels).reshape(num_rows, num_labels)
        self.num_kept += kept.size
        counts = np.zeros(kept.shape)
        labelled = np.flatnonzero(feature.values >= 0)
        rows = np.arange(num_rows)
        for members in np.split(labelled, np.flatnonzero(np.diff(positions.sequence[labelled])) + 1):
            permuted = feature.permuted[:, positions.sequence[members[0]]]
            labels = np.append(permuted, feature.values[members[0]])
            self._bundles.append(members)
            self._bundle_targets.append(kept[rows, labels])
            counts[rows, labels] += len(members)
        return kept, counts

    def layout(self, batch_of: np.ndarray, num_batches: int) -> _Layout:
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
