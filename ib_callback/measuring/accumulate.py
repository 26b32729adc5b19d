"""Add up the soft assignments of one batch after another to sums of entropies. No assignment outlives its batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ib_callback.common.transfer import read, uploaded
from ib_callback.estimator.histogram import divergence, segment_sum, sensitivity
from ib_callback.estimator.rows import entropies_of_rows
from ib_callback.measuring.plan.jackknife import ROWS, JackknifePlan, Shares
from ib_callback.measuring.plan.plan import Batch, LateLabels, NullPlan, Plan

# Divergences are computed for this many numbers at a time.
_DIVERGENCES = 1 << 18


@dataclass(frozen=True)
class JackknifeSums:
    """The numbers of `Sums` for each omission or group of sequences (plan/jackknife.py). float64, on the CPU.

    removed: [label sets, 2 G - 1, L]: by how much each omission lowers the set's `Sums.conditional`.
    single: [G, L]: sum of the entropies of single assignments, over the positions of each group.
    totals: [totals, 2 G - 1, L]: entropies of the plan's `totals` without each omission.
    """

    removed: Tensor
    single: Tensor
    totals: Tensor


@dataclass(frozen=True)
class Sums:
    """The sums of a pass over the probe, for each of L layers. float64, on the CPU, as efficiencies.

    If states are quantised in several variants (capture.py), each variant has L columns, side by side.

    conditional: [label sets, L]: sum over labels of (count or 1) times the entropy of the label's histogram.
    single: [L]: sum over valid positions of the entropy of a single assignment; 0 if only features are measured.
    kept: [num_kept, L]: entropies of the kept histograms.
    nulls: for each null plan, [R + U, L] divergences of its subsets, then its unions, from the whole sample.
    sensitivity: [L]: sensitivity of the entropy over all positions to errors of its bins (`histogram.sensitivity`).
    jackknife: the sums with groups of sequences left out, if that is planned.
    """

    conditional: Tensor
    single: Tensor
    kept: Tensor
    nulls: list[Tensor]
    sensitivity: Tensor
    jackknife: JackknifeSums | None = None

    @staticmethod
    def join(groups: Sequence[Sums], variants: int = 1) -> Sums:
        """Put sums of groups of layers side by side, separately for each variant of the assignments (capture.py)."""
        by_variant = [
            [_each(group, partial(_variant, number, variants)) for group in groups] for number in range(variants)
        ]
        return _side_by_side([_side_by_side(parts) for parts in by_variant])

    def of(self, columns: Sequence[int]) -> Sums:
        """The sums of some columns, as if there were no other layers."""
        index = torch.tensor(columns)
        return _each(self, lambda tensor: tensor.index_select(-1, index))


def _variant(number: int, of: int, tensor: Tensor) -> Tensor:
    return tensor.chunk(of, dim=-1)[number]


def _each(part: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to all tensors [..., L] in a nested structure."""
    if part is None:
        return None
    if isinstance(part, Tensor):
        return change(part)
    if isinstance(part, list):
        return [_each(each, change) for each in part]
    return type(part)(*(_each(getattr(part, f.name), change) for f in fields(part)))


def _side_by_side(parts: Sequence[Any]) -> Any:
    """Join tensors [..., L] of groups of layers along L, in nested structures."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(list(parts), dim=-1)
    if isinstance(first, list):
        return [_side_by_side(each) for each in zip(*parts, strict=True)]
    return type(first)(*(_side_by_side([getattr(part, f.name) for part in parts]) for f in fields(first)))


class _Place:
    """The place of histograms, stored as rows of L * num_bins.

    float32 histograms are on the device of the assignments, float64 histograms on the device `exact`.
    """

    def __init__(self, num_layers: int, num_bins: int, device: torch.device) -> None:
        self.shape = (num_layers, num_bins)
        self.device = device
        # MPS has no float64, so the few float64 sums are kept on the CPU.
        self.exact = torch.device("cpu") if device.type == "mps" else device

    def on(self, index: Tensor) -> Tensor:
        return index.to(self.device, non_blocking=True)

    def to(self, index: Tensor) -> Tensor:
        return index.to(self.exact, non_blocking=True)

    def zeros(self, *sizes: int) -> Tensor:
        return torch.zeros(*sizes, dtype=torch.float64, device=self.exact)

    def entropy(self, table: Tensor, index: Tensor | None = None) -> Tensor:
        """[R, L] entropies of histograms [N, L * num_bins]: of all rows, or of those in `index`."""
        return entropies_of_rows(table, index, self.shape[1])

    def bits(self, values: Tensor, bits: Tensor) -> Tensor:
        """Which bits are set in `values`: [number of bits, R], 0 or 1."""
        return (self.to(values) >> bits) & 1


class Accumulator:
    """Histograms of unfinished labels, and sums over finished ones. The last batch of a label finishes it.

    All layers are reduced together: assignments of a batch form one table [T_b, L, num_bins].

    Args:
        plan: the plan of the probe.
        num_layers, num_bins: shape of the assignments.
        weighting: `"empirical"` or `"uniform"` weights of the labels.
        device: the device of the assignments.
    """

    def __init__(self, plan: Plan, num_layers: int, num_bins: int, *, weighting: str, device: torch.device) -> None:
        self._plan = plan
        self._empirical = weighting == "empirical"
        self._at = at = _Place(num_layers, num_bins, device)
        columns = num_layers * num_bins
        num_sets = len(plan.label_sets)
        self._slots = torch.empty(plan.num_slots, columns, dtype=torch.float32, device=device)
        self._kept = at.zeros(plan.num_kept, columns)
        self._conditional = at.zeros(num_sets, num_layers)
        self._single = at.zeros(num_layers)
        self._sets = torch.arange(num_sets, device=at.exact).unsqueeze(1)
        self._groups = None if plan.jackknife is None else _GroupSums(plan.jackknife, plan.late, num_sets, at)

    def add(self, batch: Batch, assignments: Tensor) -> None:
        """Add one batch.

        Args:
            batch: the plan of the batch.
            assignments: [T_b, L, num_bins], float32.
        """
        batch = uploaded(batch, self._at.device)
        on, at = self._at.on, self._at
        if self._groups is not None:
            self._groups.hold(batch, self._slots, self._kept[self._plan.late.kept])
        rows = assignments.reshape(len(batch.positions), -1)
        pieces = segment_sum(rows, on(batch.members), on(batch.offsets))
        if len(batch.long_target):
            whole = segment_sum(pieces, on(batch.long_members), on(batch.long_offsets))

        kept = pieces[on(batch.kept_members)].to(at.exact, torch.float64)
        each = torch.arange(len(kept), dtype=torch.int32, device=at.exact)
        self._kept[at.to(batch.kept_target)] += segment_sum(kept, each, at.to(batch.kept_offsets))
        if len(batch.long_target):
            pieces[on(batch.long_target)] = whole

        single, finished = None, []
        # If only features are measured, the entropies of single positions are mostly not needed. They would cost as
        # much as everything else together.
        if self._plan.single or batch.any_alone:
            alone = at.entropy(rows)
            single = alone.sum(0)
            self._single += single
            finished.append(self._finish(alone, batch.alone, torch.ones_like(batch.alone)))
        done = at.entropy(pieces, on(batch.done_piece))[at.to(batch.done_row)]
        finished.append(self._finish(done, batch.done_sets, batch.done_count))
        self._slots[on(batch.open_slot)] = pieces[on(batch.open_piece)]
        more = self._slots[on(batch.more_slot)]
        more += pieces[on(batch.more_piece)]
        self._slots[on(batch.more_to)] = more
        del more
        closing = at.entropy(self._slots, on(batch.close_slot))[at.to(batch.close_row)]
        self._finish(closing, batch.close_sets, batch.close_count)
        if self._groups is not None:
            self._groups.add(batch, single, finished, self._slots, closing)

    def sums(self) -> Sums:
        """The sums after the last batch; call it only once."""
        kept = self._at.entropy(self._kept)
        late = self._plan.late
        self._finish(kept[late.kept], late.sets, late.count)
        jackknife = None if self._groups is None else self._groups.sums(self._kept, kept, late.kept)
        of_total = sensitivity(self._kept[self._plan.total].view(self._at.shape))
        nulls = [self._null(plan) for plan in self._plan.nulls]
        conditional, single, kept, of_total, *nulls = read([self._conditional, self._single, kept, of_total, *nulls])
        return Sums(conditional, single, kept, nulls, of_total, jackknife)

    def _finish(self, entropies: Tensor, sets: Tensor, count: Tensor) -> Tensor:
        """Add finished labels, with entropies [G, L], to the label sets named by their bits; return what was added."""
        member = self._at.bits(sets, self._sets)
        weights = member * self._at.to(count) if self._empirical else member
        added = weights.double() @ entropies
        self._conditional += added
        return added

    def _null(self, plan: NullPlan) -> Tensor:
        unions = torch.from_numpy(plan.design.unions).to(self._at.exact) @ self._kept[plan.parts]
        whole = self._kept[plan.total].view(self._at.shape)
        # A few histograms at a time, because the logarithms of all would take several times the memory of what is kept.
        size = max(1, _DIVERGENCES // self._kept.shape[1])
        rows = (*self._kept[plan.subsets].split(size), *unions.split(size))
        return torch.cat([divergence(some.view(-1, *self._at.shape), whole) for some in rows if len(some)])


class _GroupSums:
    """Accumulates `JackknifeSums` beside an Accumulator."""

    def __init__(self, plan: JackknifePlan, late: LateLabels, num_sets: int, at: _Place) -> None:
        self._plan, self._late, self._at = plan, late, at
        num_layers, num_bins = at.shape
        columns = num_layers * num_bins
        dtype = torch.float32 if plan.scale is None else torch.float16
        self._scale = plan.scale or 1.0
        self._held = torch.empty(plan.num_held + 1, columns, dtype=dtype, device=at.device)
        self._held[plan.num_held] = 0.0  # a label's first share begins from zero
        self._late_shares = torch.empty(plan.num_snapshots, columns, dtype=dtype, device=at.device)
        # For late labels: the sum of their shares so far.
        self._so_far = torch.zeros(len(plan.first_late_share) - 1, columns, dtype=torch.float32, device=at.device)
        self._removed = at.zeros(num_sets, len(plan.taken), num_layers)
        self._single = at.zeros(plan.taken.shape[1], num_layers)
        self._sets = torch.arange(num_sets, device=at.exact).unsqueeze(1)
        self._omissions = torch.arange(len(plan.taken), device=at.exact).unsqueeze(1)

    def hold(self, batch: Batch, slots: Tensor, late: Tensor) -> None:
        """Save the sums of labels for which this batch begins a new share, before the batch is added.

        Args:
            batch: the plan of the batch.
            slots: [num_slots, L * num_bins] histograms of labels.
            late: [late labels, L * num_bins] histograms of late labels.
        """
        here, on = batch.grouped, self._at.on
        assert here is not None
        self._held[on(here.slot_to)] = (slots[on(here.slot_from)] * self._scale).to(self._held.dtype)
        if len(here.late_from):
            row = on(here.late_from)
            whole = late[self._at.to(here.late_from)].to(self._at.device, torch.float32)
            share = (whole - self._so_far[row]) * self._scale
            self._late_shares[on(here.late_to)] = share.to(self._held.dtype)
            self._so_far[row] = whole

    def add(self, batch: Batch, single: Tensor | None, finished: list[Tensor], slots: Tensor, closing: Tensor) -> None:
        """Add one batch, after its pieces were added to slots and kept histograms.

        Args:
            batch: the plan of the batch.
            single: [L] sum of the entropies of its positions; None if they are not needed.
            finished: tensors [label sets, L]: the contributions of labels that occur in this batch only.
            slots: [num_slots, L * num_bins] histograms of labels.
            closing: [G, L] entropies of the labels that end in this batch.
        """
        here, on, to = batch.grouped, self._at.on, self._at.to
        assert here is not None
        if single is not None:
            self._single[here.group] += single
        weights = self._at.bits(batch.close_sets[here.confined], self._sets) * to(batch.close_count[here.confined])
        # If a label occurs in one group only, nothing of it is left without that group.
        for conditional in (*finished, weights.double() @ closing[to(here.confined)]):
            self._removed[:, to(here.omissions)] += conditional.unsqueeze(1)
        row = on(batch.close_slot)[on(batch.close_row)]
        self._shares(here.shares, (batch.close_sets, batch.close_count), slots, row, closing, self._held)

    def sums(self, kept: Tensor, kept_entropy: Tensor, late: slice) -> JackknifeSums:
        """The sums after the last batch, from the kept histograms and their entropies."""
        self._late_labels(kept[late], kept_entropy[late])
        taken = torch.from_numpy(self._plan.taken).to(kept)
        rest = [
            (kept[total] - taken @ kept[parts]).clamp_min(0.0)
            for total, parts in zip(self._plan.totals, self._plan.shares_of_totals, strict=True)
        ]
        totals = torch.stack([self._at.entropy(rows) for rows in rest])
        return JackknifeSums(*read([self._removed, self._single, totals]))

    def _late_labels(self, kept: Tensor, entropies: Tensor) -> None:
        """Add the shares of late labels; some labels at a time, because their saved shares must be added up."""
        first, row = self._plan.first_late_share, self._plan.late.row.numpy()
        labels = (self._late.sets, self._late.count)
        rows = torch.arange(len(kept), device=kept.device)
        per_label = int(np.diff(first).max(initial=1))
        for begin in range(0, len(kept), max(1, ROWS // per_label)):
            end = min(len(kept), begin + max(1, ROWS // per_label))
            mine = slice(int(first[begin]), int(first[end]))
            shares = self._plan.late[slice(*np.searchsorted(row, [begin, end]).tolist())]
            if not len(shares):
                continue
            total = self._late_shares[mine].to(kept).cumsum(0)
            before = torch.cat([total.new_zeros(1, total.shape[1]), total])[
                torch.from_numpy(first[begin:end] - mine.start)
            ]
            total -= before.repeat_interleave(torch.from_numpy(np.diff(first[begin : end + 1])).to(total.device), dim=0)
            running = torch.cat([total, total.new_zeros(1, total.shape[1])])
            none = mine.stop - mine.start
            local = replace(
                shares,
                before=torch.where(shares.before == first[-1], none, shares.before - mine.start),
                after=torch.where(shares.after < 0, -1, shares.after - mine.start),
            )
            self._shares(local, labels, kept, rows, entropies, running)

    def _shares(
        self,
        shares: Shares,
        labels: tuple[Tensor, Tensor],
        histograms: Tensor,
        histogram_of_row: Tensor,
        entropies: Tensor,
        running: Tensor,
    ) -> None:
        """For labels that span groups: the entropies of what is left of them without each group.

        Args:
            shares: shares of the labels.
            labels: label sets and numbers of positions of the finished labels.
            histograms: table that holds the histograms of the finished labels.
            histogram_of_row: [labels] row of each label's histogram.
            entropies: [labels, L] entropies of these histograms.
            running: running histograms; a share is the difference of two of them.
        """
        sets, count = labels
        for begin in range(0, len(shares), ROWS):
            part = shares[begin : begin + ROWS]
            row, after = self._at.on(part.row), self._at.on(part.after)
            whole = histograms[histogram_of_row[row.to(histogram_of_row.device)]]
            behind = whole - running[after.clamp_min(0)].to(whole) / self._scale
            behind[(after < 0).to(behind.device)] = 0.0
            left = (behind.clamp_min(0.0) + running[self._at.on(part.before)].to(whole) / self._scale).to(
                self._at.exact
            )
            rest = self._at.to(part.rest).unsqueeze(1)
            # If nothing is left of a histogram, it has no entropy and no weight.
            left.add_((rest == 0).to(left))
            change = self._at.to(count[part.row]).unsqueeze(1) * entropies[self._at.to(part.row)]
            change -= rest * self._at.entropy(left)
            omitted = self._at.bits(part.omissions, self._omissions)
            weights = self._at.bits(sets[part.row], self._sets)[:, None] * omitted
            self._removed += (weights.double().flatten(0, 1) @ change).view_as(self._removed)
