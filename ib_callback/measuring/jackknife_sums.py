"""Sums of entropies with each group of sequences left out, accumulated beside those of the whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ib_callback.estimator.histogram import entropy
from ib_callback.measuring.plan.jackknife import ROWS, JackknifePlan, Shares
from ib_callback.measuring.plan.plan import Batch


@dataclass(frozen=True)
class JackknifeSums:
    """For each of L layers, what `Sums` holds of the whole, by omission or group. float64, on the CPU.

    removed: [label sets, 2 G - 1, L] by how much each omission lowers the set's `Sums.conditional`.
    single: [G, L] sum over the positions of a group of the entropy of one assignment.
    totals: [totals, 2 G - 1, L] entropies of the plan's `totals` without each omission.
    """

    removed: Tensor
    single: Tensor
    totals: Tensor

    @staticmethod
    def join(parts: list[JackknifeSums]) -> JackknifeSums:
        """Sums of groups of layers side by side."""
        return JackknifeSums(
            *(torch.cat([getattr(p, name) for p in parts], dim=-1) for name in ("removed", "single", "totals"))
        )


class GroupSums:
    """Accumulates `JackknifeSums`.

    Args:
        plan: what to remember.
        num_sets: number of label sets.
        shape: layers and bins.
        device: where assignments, slots and snapshots are.
        exact: where float64 sums are.
    """

    def __init__(
        self, plan: JackknifePlan, num_sets: int, shape: tuple[int, int], device: torch.device, exact: torch.device
    ) -> None:
        self._plan, self._shape, self._device, self._exact = plan, shape, device, exact
        num_layers, num_bins = shape
        self._snapshots = torch.empty(plan.num_snapshots + 1, num_layers * num_bins, device=device)
        self._snapshots[plan.num_snapshots] = 0.0  # what a label's first share begins from
        self._removed = torch.zeros(num_sets, len(plan.taken), num_layers, dtype=torch.float64, device=exact)
        self._single = torch.zeros(plan.num_groups, num_layers, dtype=torch.float64, device=exact)
        self._sets = torch.arange(num_sets, device=exact).unsqueeze(1)
        self._omissions = torch.arange(len(plan.taken), device=exact).unsqueeze(1)

    def add(
        self, batch: Batch, slots: Tensor, kept: Tensor, alone: Tensor | None, done: Tensor, closing: Tensor
    ) -> None:
        """Add one batch, after its pieces were added to slots and kept histograms.

        Args:
            batch: its plan.
            slots: [num_slots, L * num_bins] histograms of labels.
            kept: [num_kept, L * num_bins] kept histograms.
            alone: [T_b, L] entropies of its positions; None if nobody asked for them.
            done: entropies of the labels that are finished within it.
            closing: entropies of the labels that end in it.
        """
        here = batch.grouped
        assert here is not None
        if alone is not None:
            self._single[here.group] += alone.sum(0)
            self._confined(here.omissions, alone, batch.alone, torch.ones_like(batch.alone))
        self._confined(here.omissions, done, batch.done_sets, batch.done_count)
        rows = here.confined
        self._confined(here.omissions, closing[self._to(rows)], batch.close_sets[rows], batch.close_count[rows])
        self._shares(here.shares, slots, self._on(batch.close_slot), closing)
        self._snapshots[self._on(here.slot_to)] = slots[self._on(here.slot_from)]
        self._snapshots[self._on(here.kept_to)] = kept[self._to(here.kept_from)].to(self._device, torch.float32)

    def sums(self, kept: Tensor, kept_entropy: Tensor, late: slice) -> JackknifeSums:
        """The sums after the last batch, from the kept histograms and their entropies."""
        if len(self._plan.late):
            rows = torch.arange(late.start, late.stop, device=kept.device)
            self._shares(self._plan.late, kept, rows, kept_entropy[late])
        taken = torch.from_numpy(self._plan.taken).to(kept)
        rest = [
            (kept[total] - taken @ kept[parts]).clamp_min(0.0)
            for total, parts in zip(self._plan.totals, self._plan.shares_of_totals, strict=True)
        ]
        totals = torch.stack([self._entropy(rows) for rows in rest])
        return JackknifeSums(self._removed.cpu(), self._single.cpu(), totals.cpu())

    def _confined(self, omissions: list[int], entropies: Tensor, sets: Tensor, count: Tensor) -> None:
        """Labels that lie in one group: without it nothing is left of them."""
        if len(entropies):
            weights = self._bits(sets, self._sets) * self._to(count)
            self._removed[:, omissions] += (weights.double() @ entropies).unsqueeze(1)

    def _shares(self, shares: Shares, histograms: Tensor, histogram_of_row: Tensor, entropies: Tensor) -> None:
        """Labels that span groups: the entropy of what is left of them without each."""
        for begin in range(0, len(shares), ROWS):
            part = shares[begin : begin + ROWS]
            row, after = self._on(part.row), self._on(part.after)
            whole = histograms[histogram_of_row[row.to(histogram_of_row.device)]]
            behind = whole - self._snapshots[after.clamp_min(0)].to(whole)
            behind[(after < 0).to(behind.device)] = 0.0
            left = (behind.clamp_min(0.0) + self._snapshots[self._on(part.before)].to(whole)).to(self._exact)
            rest = self._to(part.rest).unsqueeze(1)
            # A histogram of which nothing is left has no entropy, and no weight.
            left.add_((rest == 0).to(left))
            change = self._to(part.count).unsqueeze(1) * entropies[self._to(part.row)]
            change -= rest * self._entropy(left)
            omitted = self._bits(part.omissions, self._omissions)
            weights = self._bits(part.sets, self._sets)[:, None] * omitted
            self._removed += (weights.double().flatten(0, 1) @ change).view_as(self._removed)

    def _bits(self, values: Tensor, bits: Tensor) -> Tensor:
        """[number of bits, R] 0/1."""
        return (self._to(values) >> bits) & 1

    def _entropy(self, rows: Tensor) -> Tensor:
        return entropy(rows.view(-1, *self._shape))

    def _on(self, index: Tensor) -> Tensor:
        return index.to(self._device, non_blocking=True)

    def _to(self, index: Tensor) -> Tensor:
        return index.to(self._exact, non_blocking=True)
