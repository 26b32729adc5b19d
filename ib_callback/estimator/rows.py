"""Quantising rows of states, and entropies of rows of histograms: by Triton where it can be had, else by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ib_callback.estimator import fused
from ib_callback.estimator.histogram import entropy
from ib_callback.estimator.quantise import HALVES, exact_float32, halves

# What the largest inverse norm is scaled to.
_LARGEST = 2.0**15


def assign_rows(
    rows: Tensor, positions: Tensor, parts: Tensor, divisor: float, out: Tensor, *, sum_units: bool
) -> tuple[Tensor, Tensor | None]:
    """`assign` of some rows, on a GPU: without a copy of the states in float32, and without waiting.

    By one kernel, if it can be had (fused.py), else by torch's own.

    Args:
        rows: states [R, dim], float32, bfloat16 or float16, on a GPU.
        positions: [T] numbers of the rows that are wanted.
        parts: of the reference points (`in_parts`), in the dtype of the rows.
        divisor: temperature, times by how much the sum of the parts is too large.
        out: [T, num_bins], float32, which gets the assignments.
        sum_units: whether the sum of the unit states is wanted.

    Returns:
        Norms [T], float32, and [parts, dim] float32 that add up to the sum of the unit states; None if not wanted.
    """
    num_bins = parts.shape[1]
    if rows.stride(-1) != 1:  # as of a convolution's output
        rows = rows.contiguous()
    with exact_float32(rows.device):
        if fused.available(rows.device) and num_bins <= fused.MOST_BINS:
            norms, units = fused.quantise(rows, positions, parts, divisor, out, sum_units)
            return norms, units if sum_units else None
        chosen = rows.index_select(0, positions)
        norms = torch.linalg.vector_norm(chosen, dim=-1, dtype=torch.float32)
        logits = _product(chosen, parts.flatten(0, 1))
        if len(parts) > 1:
            logits = logits.unflatten(1, parts.shape[:2]).sum(1)
        out.copy_(torch.softmax(logits / (norms * divisor).unsqueeze(-1), dim=-1))
        if not sum_units:
            return norms, None
        inverse = norms.reciprocal()[None]
        if rows.dtype not in HALVES:
            return norms, _product(inverse, chosen.T)
        # Scaled so that none leaves the range of float16, and small ones keep their digits.
        scale = _LARGEST / inverse.amax()
        return norms, _product(halves(inverse * scale, rows.dtype).flatten(0, 1), chosen.T) / scale


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The product a @ b.T, summed in float32, of float32 or of 16-bit numbers."""
    if a.dtype in HALVES and a.device.type == "cuda" and torch.version.hip is None:
        return torch.mm(a, b.T, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float().T)


def entropies_of_rows(table: Tensor, index: Tensor | None, num_bins: int) -> Tensor:
    """`entropy` of histograms that lie side by side in some rows of a table; not differentiable.

    On a GPU by one kernel, if it can be had, which reads each of them once (fused.py).

    Args:
        table: [N, L * num_bins], float32 or float64, contiguous.
        index: [R] numbers of its rows, int32 or int64; None: all.
        num_bins: of each histogram.

    Returns:
        [R, L], float64.
    """
    if fused.available(table.device) and num_bins <= fused.MOST_BINS:
        return fused.entropies(table, index, num_bins)
    rows = table if index is None else table.index_select(0, index)
    return entropy(rows.view(len(rows), table.shape[1] // num_bins, num_bins))
