"""The plan of a measurement: everything about it that depends on the probe alone. builder.py makes it.

Positions with equal labels form groups (probe/ngrams.py). Per batch of sequences, each group's positions are cut into
short pieces; one reduction over the assignments of all layers gives the histogram of every piece. A group whose
positions all lie in one batch is finished there and never stored. The others hold a slot from their first batch
to their last, together with groups of the same positions so far, and slots are reused. Some histograms are kept to
the end, in float64: totals, labels found in many batches, random subsets for the null, and feature labels under
permutation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from ib_callback.measuring.plan.batches import MANY_BATCHES, PIECE
from ib_callback.measuring.plan.jackknife import GroupedBatch, JackknifePlan
from ib_callback.measuring.plan.null import LabelCounts, SubsetDesign
from ib_callback.probe.ngrams import LabelSet
from ib_callback.probe.probe import Probe


@dataclass(frozen=True)
class Batch:
    """What is done after the forward pass of one batch; row numbers refer to the assignments of its positions.

    sequences: which sequences of the probe, and `width`, to how many tokens they are cut (trailing padding only).
    positions: [T_b] flat numbers of the valid positions in the [sequences, width] table.
    alone: [T_b] label sets (bits) in which the position is the only one of its label; `any_alone`: whether one is.
    members, offsets: rows of each piece, as `histogram.segment_sum` takes them.
    long_*: groups of several pieces; their sum replaces the piece `long_target`.
    done_piece: groups finished within this batch, those of the same positions once; `done_row`, `done_sets`,
        `done_count`: for each such group its row among them, label sets and positions.
    open_piece, open_slot: running sums that begin here.
    more_piece, more_slot, more_to: those that go on from a slot, and to which one.
    close_slot: groups that end here, likewise once; `close_row`, `close_sets`, `close_count`: for each.
    kept_members, kept_offsets, kept_target: pieces to add to each kept histogram.
    grouped: what leaving out groups of sequences needs of it, if that is planned.
    """

    sequences: slice
    width: int
    positions: torch.Tensor
    alone: torch.Tensor
    members: torch.Tensor
    offsets: torch.Tensor
    long_members: torch.Tensor
    long_offsets: torch.Tensor
    long_target: torch.Tensor
    done_piece: torch.Tensor
    done_row: torch.Tensor
    done_sets: torch.Tensor
    done_count: torch.Tensor
    open_piece: torch.Tensor
    open_slot: torch.Tensor
    more_piece: torch.Tensor
    more_slot: torch.Tensor
    more_to: torch.Tensor
    close_slot: torch.Tensor
    close_row: torch.Tensor
    close_sets: torch.Tensor
    close_count: torch.Tensor
    kept_members: torch.Tensor
    kept_offsets: torch.Tensor
    kept_target: torch.Tensor
    grouped: GroupedBatch | None = None
    any_alone: bool = True


@dataclass(frozen=True)
class NullPlan:
    """A subset design and the kept histograms of the whole, its subsets and its parts.

    number: place among the nulls of the plan.
    """

    number: int
    design: SubsetDesign
    total: int
    subsets: slice
    parts: slice


@dataclass(frozen=True)
class LateLabels:
    """Labels found in many batches: summed in float64 in `kept` histograms, and finished at the end."""

    kept: slice
    sets: torch.Tensor
    count: torch.Tensor


@dataclass(frozen=True)
class Baseline:
    """Which document baseline is wanted (quantities/documents.py).

    shift: of the labels along their document, "circular" or "linear".
    offset: of a linear shift, in valid positions; "half": half of those of the sequence.
    """

    shift: str = "circular"
    offset: int | str | None = None


@dataclass(frozen=True)
class Wanted:
    """What a plan is asked for.

    probe: what is measured on.
    orders: names and widths; none if features alone are wanted.
    features: names of probe labels.
    total: kept histogram over all positions.
    null: whether null information is wanted.
    baseline: which document baseline is; None: none.
    seed: of random subsets, permutations and shifts.
    """

    probe: Probe
    orders: Mapping[str, int]
    features: tuple[str, ...]
    total: int
    null: bool
    baseline: Baseline | None
    seed: int


class Quantity(Protocol):
    """Something to measure, planned: how its numbers follow from the sums of a pass.

    It knows the numbers of its label sets, nulls and kept histograms, which it had from a Builder. Every class in the
    modules of `measuring/quantities` that has a `turn` is a kind of these.

    turn: kinds are planned and read by it, those of a lower one first.
    of_orders: whether it is about the points of orders, which are read in every view (measuring/views.py).
    """

    turn: ClassVar[int]
    of_orders: ClassVar[bool]

    @classmethod
    def plan(cls, builder: Any, wanted: Wanted) -> Sequence[Quantity]:
        """Register with the builder (builder.Builder) what this kind needs of a pass; none if it is not wanted."""

    def read(self, readings: Any, found: Any) -> None:
        """Add to what is `found` (readout.Found) what the `readings` (readout.Readings) of a pass say of this."""


@dataclass(frozen=True)
class Plan:
    """The plan of a measurement. See the module's docstring.

    label_sets: in the order of their bits.
    counts: label counts of each label set.
    total: kept histogram over all valid positions.
    single: whether the entropies of single assignments are summed.
    nulls: all subset designs.
    quantities: what is read from the sums, in this order.
    jackknife: what leaving out groups of sequences needs; None without standard errors.
    """

    num_positions: int
    label_sets: tuple[LabelSet, ...]
    counts: tuple[LabelCounts, ...]
    batches: tuple[Batch, ...]
    num_slots: int
    num_kept: int
    late: LateLabels
    total: int
    single: bool
    nulls: tuple[NullPlan, ...]
    quantities: tuple[Quantity, ...]
    jackknife: JackknifePlan | None = None

    @property
    def depth(self) -> int:
        """The most float32 numbers that are added up one after the other in a histogram (batches.py)."""
        return PIECE + math.ceil(max(len(batch.positions) for batch in self.batches) / PIECE) + MANY_BATCHES

    def memory(self, num_layers: int, num_bins: int) -> int:
        """Bytes that the histograms and assignments of so many layers at once need beside the forward pass."""
        return sum(self.memory_by_part(num_layers, num_bins).values())

    def memory_by_part(self, num_layers: int, num_bins: int) -> dict[str, int]:
        """The same by part.

        slots: histograms of labels that are not finished yet, float32.
        kept: histograms that are kept to the end, float64.
        errors: for leaving out groups of sequences, if that is planned.
        assignments: the table of one batch, float32.
        scratch: what adding up a batch, or reading the sums in the end, takes for a moment.
        """
        added = max(_scratch(batch) for batch in self.batches)
        table = 4 * max(len(batch.positions) for batch in self.batches)
        # The unions of a null, when the table is gone.
        read = max((8 * len(null.design.unions) for null in self.nulls), default=0)
        parts = {
            "slots": 4 * self.num_slots,
            "kept": 8 * self.num_kept,
            "errors": 0 if self.jackknife is None else self.jackknife.bytes_per_bin(),
            "assignments": table,
            "scratch": max(added, read - table),
        }
        return {name: num_layers * num_bins * each for name, each in parts.items()}


def _scratch(batch: Batch) -> int:
    """Bytes for each bin that `Accumulator.add` takes for a moment beside the assignments."""
    pieces = len(batch.offsets) - 1 + len(batch.long_target)
    kept = 8 * len(batch.kept_members) + 16 * len(batch.kept_target)
    moving = 4 * max(len(batch.done_piece), len(batch.open_piece), 2 * len(batch.more_piece), len(batch.close_slot))
    return 4 * pieces + max(kept, 12 * len(batch.kept_members), moving)
