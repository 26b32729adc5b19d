"""The plan of a measurement: everything about it that depends on the probe alone. builder.py makes it.

Positions with equal labels form groups (probe/ngrams.py). In each batch of sequences, the positions of each group are
cut into short pieces. One reduction over the assignments of all layers gives the histogram of every piece. A group
whose positions are all in one batch is finished there and never stored. Every other group occupies a slot from its
first batch to its last. Groups with the same positions so far share a slot, and slots are reused. Some histograms are
kept to the end, in float64: totals, labels that occur in many batches, random subsets for the null, and feature labels
under permutation.
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
    """What is done after the forward pass of one batch. Row numbers refer to the assignments of its positions.

    sequences: the sequences of the probe; `width`: the number of tokens to which they are cut (only trailing padding).
    positions: [T_b] flat numbers of the valid positions in the [sequences, width] table.
    alone: [T_b] label sets (bits) in which the position is the only one of its label; `any_alone`: whether any is set.
    members, offsets: rows of each piece, as arguments of `histogram.segment_sum`.
    long_*: groups of several pieces; their sum replaces the piece `long_target`.
    done_piece: groups finished within this batch; groups of the same positions appear once. `done_row`, `done_sets`,
        `done_count`: for each such group its row in `done_piece`, its label sets and its number of positions.
    open_piece, open_slot: running sums that begin here.
    more_piece, more_slot, more_to: running sums that continue: piece to add, slot to read and slot to write.
    close_slot: groups that end here; groups of the same positions appear once. `close_row`, `close_sets`,
        `close_count`: the same as for groups that are done.
    kept_members, kept_offsets, kept_target: pieces to add to each kept histogram.
    grouped: what leaving out groups of sequences needs in this batch, if that is planned.
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
    """Labels that occur in many batches: summed in float64 in `kept` histograms, and finished at the end."""

    kept: slice
    sets: torch.Tensor
    count: torch.Tensor


@dataclass(frozen=True)
class Baseline:
    """Which document baseline to measure (quantities/documents.py).

    shift: how labels are shifted along their document, "circular" or "linear".
    offset: distance of a linear shift in valid positions; "half": half of the positions of the sequence.
    """

    shift: str = "circular"
    offset: int | str | None = None


@dataclass(frozen=True)
class Wanted:
    """What a plan must provide.

    probe: the probe to measure on.
    orders: names and widths; empty if only features are measured.
    features: names of probe labels.
    total: number of the kept histogram over all positions.
    null: whether to estimate null information.
    baseline: which document baseline to measure; None: none.
    seed: seed of random subsets, permutations and shifts.
    """

    probe: Probe
    orders: Mapping[str, int]
    features: tuple[str, ...]
    total: int
    null: bool
    baseline: Baseline | None
    seed: int


class Quantity(Protocol):
    """A planned quantity: how its numbers follow from the sums of a pass.

    It holds the numbers of its label sets, nulls and kept histograms, which a Builder gave it. Every class in the
    modules of `measuring/quantities` that has the attribute `turn` is a kind of quantity.

    turn: place of the kind in planning and reading; lower ones come first.
    of_orders: whether it belongs to the points of orders, which are read in every view (measuring/views.py).
    """

    turn: ClassVar[int]
    of_orders: ClassVar[bool]

    @classmethod
    def plan(cls, builder: Any, wanted: Wanted) -> Sequence[Quantity]:
        """Register with the builder (builder.Builder) what this kind needs from a pass; empty if it is not measured."""

    def read(self, readings: Any, found: Any) -> None:
        """Read this quantity from the `readings` of a pass (readout.Readings); add it to `found` (readout.Found)."""


@dataclass(frozen=True)
class Plan:
    """The plan of a measurement. See the module's docstring.

    label_sets: the label sets, in the order of their bits.
    counts: label counts of each label set.
    total: number of the kept histogram over all valid positions.
    single: whether the entropies of single assignments are summed.
    nulls: all subset designs.
    quantities: the quantities, in the order in which they are read from the sums.
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
        """The largest number of float32 values that are added up one after the other in a histogram (batches.py)."""
        return PIECE + math.ceil(max(len(batch.positions) for batch in self.batches) / PIECE) + MANY_BATCHES

    def memory(self, num_layers: int, num_bins: int) -> int:
        """Bytes for histograms and assignments of this many layers at once, in addition to the forward pass."""
        return sum(self.memory_by_part(num_layers, num_bins).values())

    def memory_by_part(self, num_layers: int, num_bins: int) -> dict[str, int]:
        """The bytes of `memory`, by part.

        slots: histograms of unfinished labels, float32.
        kept: histograms that are kept to the end, float64.
        errors: histograms for leaving out groups of sequences, if that is planned.
        assignments: the table of one batch, float32.
        scratch: temporary memory for adding up a batch, or for reading the sums at the end.
        """
        added = max(_scratch(batch) for batch in self.batches)
        table = 4 * max(len(batch.positions) for batch in self.batches)
        # The unions of a null; they come after the table of assignments is freed.
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
    """Temporary bytes for each bin that `Accumulator.add` needs in addition to the assignments."""
    pieces = len(batch.offsets) - 1 + len(batch.long_target)
    kept = 8 * len(batch.kept_members) + 16 * len(batch.kept_target)
    moving = 4 * max(len(batch.done_piece), len(batch.open_piece), 2 * len(batch.more_piece), len(batch.close_slot))
    return 4 * pieces + max(kept, 12 * len(batch.kept_members), moving)
