"""From the soft assignments of one batch after another to sums of entropies; no assignment outlives its batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ib_callback.estimator.histogram import divergence, entropy, segment_sum
from ib_callback.measuring.jackknife_sums import GroupSums, JackknifeSums
from ib_callback.measuring.plan.plan import Batch, NullPlan, Plan


@dataclass(frozen=True)
class Sums:
    """What a pass over the probe adds up to, for each of L layers. float64, on the CPU, efficiencies.

    conditional: [label sets, L] sum over labels of (count or 1) times the entropy of the label's histogram.
    single: [L] sum over valid positions of the entropy of one assignment; 0 if features alone are measured.
    kept: [num_kept, L] entropies of the kept histograms.
    nulls: for each null plan, [R + U, L] divergences of its subsets, then its unions, from the whole sample.
    jackknife: the same with groups of sequences left out, if that is planned.
    """

    conditional: Tensor
    single: Tensor
    kept: Tensor
    nulls: list[Tensor]
    jackknife: JackknifeSums | None = None

    @staticmethod
    def join(groups: list[Sums]) -> Sums:
        """Sums of groups of layers side by side."""
        left_out = [s.jackknife for s in groups if s.jackknife is not None]
        return Sums(
            conditional=torch.cat([s.conditional for s in groups], dim=1),
            single=torch.cat([s.single for s in groups]),
            kept=torch.cat([s.kept for s in groups], dim=1),
            nulls=[torch.cat(parts, dim=1) for parts in zip(*(s.nulls for s in groups), strict=True)],
            jackknife=JackknifeSums.join(left_out) if left_out else None,
        )


class Accumulator:
    """Histograms of labels that are not finished yet, and sums over those that are.

    All layers are reduced together: assignments of a batch form one table [T_b, L, num_bins].

    Args:
        plan: of the probe.
        num_layers, num_bins: shape of the assignments.
        weighting: `"empirical"` or `"uniform"` weights of the labels.
        device: where the assignments are.
    """

    def __init__(self, plan: Plan, num_layers: int, num_bins: int, *, weighting: str, device: torch.device) -> None:
        self._plan = plan
        self._shape = (num_layers, num_bins)
        self._empirical = weighting == "empirical"
        self._device = device
        # MPS has no float64; the few float64 sums are then kept on the CPU.
        self._exact = torch.device("cpu") if device.type == "mps" else device
        columns = num_layers * num_bins
        num_sets = len(plan.label_sets)
        self._slots = torch.empty(plan.num_slots, columns, dtype=torch.float32, device=device)
        self._kept = torch.zeros(plan.num_kept, columns, dtype=torch.float64, device=self._exact)
        self._conditional = torch.zeros(num_sets, num_layers, dtype=torch.float64, device=self._exact)
        self._single = torch.zeros(num_layers, dtype=torch.float64, device=self._exact)
        self._bits = torch.arange(num_sets, device=self._exact).unsqueeze(1)
        self._groups = None
        if plan.jackknife is not None:
            self._groups = GroupSums(plan.jackknife, num_sets, self._shape, device, self._exact)

    def add(self, batch: Batch, assignments: Tensor) -> None:
        """Add one batch.

        Args:
            batch: its plan.
            assignments: [T_b, L, num_bins], float32.
        """
        rows = assignments.reshape(len(batch.positions), -1)
        pieces = segment_sum(rows, self._on(batch.members), self._on(batch.offsets))
        if len(batch.long_target):
            whole = segment_sum(pieces, self._on(batch.long_members), self._on(batch.long_offsets))

        kept = pieces[self._on(batch.kept_members)].to(self._exact, torch.float64)
        each = torch.arange(len(kept), dtype=torch.int32, device=self._exact)
        self._kept[batch.kept_target.to(self._exact)] += segment_sum(kept, each, batch.kept_offsets.to(self._exact))
        if len(batch.long_target):
            pieces[self._on(batch.long_target)] = whole

        # With features alone, mostly nobody asks for the entropies of single positions: as many as all else together.
        alone = None
        if self._plan.single or bool(batch.alone.any()):
            alone = self._entropy(rows)
            self._single += alone.sum(0)
            self._finish(alone, batch.alone, torch.ones_like(batch.alone))
        done = self._entropy(pieces[self._on(batch.done_piece)])
        self._finish(done, batch.done_sets, batch.done_count)
        self._slots[self._on(batch.open_slot)] = pieces[self._on(batch.open_piece)]
        self._slots[self._on(batch.more_slot)] += pieces[self._on(batch.more_piece)]
        closing = self._entropy(self._slots[self._on(batch.close_slot)])
        self._finish(closing, batch.close_sets, batch.close_count)
        if self._groups is not None:
            self._groups.add(batch, self._slots, self._kept, alone, done, closing)

    def sums(self) -> Sums:
        """The sums after the last batch; to be asked for once."""
        kept = self._entropy(self._kept)
        late = self._plan.late
        self._finish(kept[late.kept], late.sets, late.count)
        left_out = None if self._groups is None else self._groups.sums(self._kept, kept, late.kept)
        return Sums(
            conditional=self._conditional.cpu(),
            single=self._single.cpu(),
            kept=kept.cpu(),
            nulls=[self._null(plan) for plan in self._plan.nulls],
            jackknife=left_out,
        )

    def _null(self, plan: NullPlan) -> Tensor:
        unions = torch.from_numpy(plan.design.unions).to(self._exact) @ self._kept[plan.parts]
        whole = self._kept[plan.total].view(self._shape)
        parts = (self._kept[plan.subsets], unions)
        return torch.cat([divergence(rows.view(-1, *self._shape), whole) for rows in parts]).cpu()

    def _entropy(self, rows: Tensor) -> Tensor:
        """[R, L] entropies of histograms [R, L * num_bins]."""
        return entropy(rows.view(-1, *self._shape))

    def _finish(self, entropies: Tensor, sets: Tensor, count: Tensor) -> None:
        """Add finished labels, with entropies [G, L], to the label sets that their bits name."""
        if not len(entropies):
            return
        member = (sets.to(self._exact) >> self._bits) & 1
        weights = member * count.to(self._exact) if self._empirical else member
        self._conditional += weights.double() @ entropies

    def _on(self, index: Tensor) -> Tensor:
        return index.to(self._device, non_blocking=True)
