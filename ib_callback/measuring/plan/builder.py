"""Make a plan: turn groups of positions and kept histograms into what is done after each batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from ib_callback.measuring.plan.batches import Layout, int64
from ib_callback.measuring.plan.jackknife import Groups, JackknifePlan, plan_jackknife
from ib_callback.measuring.plan.null import LabelCounts, draw_design
from ib_callback.measuring.plan.plan import Batch, LateLabels, NullPlan, Plan, Quantity
from ib_callback.probe.ngrams import LabelSet, Positions, Segments

MAX_LABEL_SETS = 62


@dataclass
class Builder:
    """Collects what quantities need from a pass, then lays it out over batches.

    Histograms of labels are finished one by one, and only their entropies are added up. *Kept* histograms are complete
    at the end of the pass, in float64.

    positions: valid positions.
    groups: groups of sequences to leave out in turn; None without standard errors.
    single: whether the mean entropy of a single assignment is needed.
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
        # Bundles are groups of positions that are added to one or several kept histograms.
        self._bundles: list[np.ndarray] = []
        self._bundle_targets: list[np.ndarray] = []
        # Kept histograms of totals, and of each group's share in them.
        self._totals: list[tuple[int, slice]] = []

    def add_segments(self, segments: Segments, names: list[tuple[str, str]]) -> None:
        """Register the label sets of `segments`, each with the next number."""
        self._segments.append(segments)
        for name in names:
            bit = len(self.label_sets)
            if bit >= MAX_LABEL_SETS:
                raise ValueError(
                    f"expected at most {MAX_LABEL_SETS} label sets. An order makes two, the document baseline one or "
                    "three, a feature one or two. Measure fewer, or pass baseline=False."
                )
            grouped = (segments.stop - segments.start)[(segments.sets >> bit) & 1 == 1]
            alone = int(((segments.alone >> bit) & 1).sum())
            counts = np.concatenate([grouped, np.ones(alone, np.int64)])
            self.label_sets.append(LabelSet(name, int(counts.sum()), len(counts)))
            self.counts.append(LabelCounts.of(counts))

    def reserve(self, number: int) -> int:
        """Reserve numbers for this many kept histograms; return the first."""
        self.num_kept += number
        return self.num_kept - number

    def bundle(self, members: np.ndarray, targets: np.ndarray) -> None:
        """Add these positions to each of the kept histograms `targets`."""
        self._bundles.append(members.astype(np.int32))
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
        """Keep the random subsets of `members` that the null of labels with these counts needs.

        `total` is the number of the kept histogram over all members.
        """
        design, *drawn = draw_design(len(members), counts, seed)
        subsets, parts = (self.keep([members[part] for part in group]) for group in drawn)
        self.nulls.append(NullPlan(len(self.nulls), design, total, subsets, parts))
        return self.nulls[-1]

    def build(self, mask: np.ndarray, bounds: np.ndarray, total: int, quantities: tuple[Quantity, ...]) -> Plan:
        """Make the plan, after all quantities are registered.

        Args:
            mask: [N, S] bool, real tokens.
            bounds: first sequence of each batch, and N.
            total: number of the kept histogram over all positions.
            quantities: the quantities that are read from the sums.
        """
        batch_of = np.searchsorted(bounds, self.positions.sequence, side="right") - 1
        layout = Layout(
            self._segments,
            self._bundles,
            self._bundle_targets,
            self.num_kept,
            batch_of,
            num_batches=len(bounds) - 1,
        )
        jackknife = None
        if self.groups is not None:
            jackknife = plan_jackknife(layout, self.groups, self.positions.sequence, len(self.label_sets), self._totals)
        return Plan(
            num_positions=len(self.positions),
            label_sets=tuple(self.label_sets),
            counts=tuple(self.counts),
            batches=tuple(_batches(layout, mask, self.positions, bounds, jackknife)),
            num_slots=layout.entries.number,
            num_kept=layout.late_kept.stop,
            late=LateLabels(layout.late_kept, int64(layout.sets[layout.late]), int64(layout.counts[layout.late])),
            total=total,
            single=self.single,
            nulls=tuple(self.nulls),
            quantities=quantities,
            jackknife=jackknife,
        )


def _batches(
    layout: Layout, mask: np.ndarray, positions: Positions, bounds: np.ndarray, jackknife: JackknifePlan | None
) -> Iterator[Batch]:
    first_position = np.searchsorted(positions.sequence, bounds)
    real_width = mask.shape[1] - np.argmax(mask[:, ::-1], axis=1)
    for number, (begin, end) in enumerate(pairwise(bounds.tolist())):
        here = slice(first_position[number], first_position[number + 1])
        if here.start == here.stop:
            continue  # without a valid position the model need not run
        sequences = slice(begin, end)
        width = int(real_width[sequences].max())
        flat = (positions.sequence[here] - begin) * width + positions.offset[here]
        work = layout.work(number, here.start) | {"positions": flat, "alone": layout.alone[here]}
        # Short integers where they fit, because a plan lives as long as its meter, and the reduction is faster.
        long = ("positions", "alone", "done_sets", "close_sets")
        tensors = {
            name: torch.from_numpy(values.astype(np.int64 if name in long else np.int32))
            for name, values in work.items()
        }
        grouped = None if jackknife is None else jackknife.batches[number]
        yield Batch(sequences, width, grouped=grouped, any_alone=bool(work["alone"].any()), **tensors)
