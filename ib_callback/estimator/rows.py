"""Quantise rows of states, and compute entropies of rows of histograms: with Triton if it is available, else torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ib_callback.estimator import fused
from ib_callback.estimator.histogram import entropy
from ib_callback.estimator.quantise import HALVES, exact_float32, halves

# The largest inverse norm is scaled to this value.
_LARGEST = 2.0**15


def assign_rows(
    rows: Tensor, positions: Tensor, parts: Tensor, divisor: float, out: Tensor, *, sum_units: bool
) -> tuple[Tensor, Tensor | None]:
    """`assign` for some rows on a GPU, without a float32 copy of the states and without waiting for the GPU.

    Uses one kernel if it is available (fused.py), else torch's own operations.

    Args:
        rows: states [R, dim], float32, bfloat16 or float16, on a GPU.
        positions: [T] numbers of the wanted rows.
        parts: parts of the reference points (`in_parts`), in the dtype of the rows.
        divisor: the temperature times the factor by which the sum of the parts is too large.
        out: [T, num_bins], float32; receives the assignments.
        sum_units: whether to sum the unit states.

    Returns:
        Norms [T], float32; and [parts, dim] float32, whose parts add up to the sum of the unit states, or None without
        `sum_units`.
    """
    num_bins = parts.shape[1]
    if rows.stride(-1) != 1:  # as in a convolution's output
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
        # Scaled so that no inverse norm leaves the range of float16, and small ones keep their digits.
        scale = _LARGEST / inverse.amax()
        return norms, _product(halves(inverse * scale, rows.dtype).flatten(0, 1), chosen.T) / scale


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The product a @ b.T of float32 or 16-bit numbers, summed in float32."""
    if a.dtype in HALVES and a.device.type == "cuda" and torch.version.hip is None:
        return torch.mm(a, b.T, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float().T)


def entropies_of_rows(table: Tensor, index: Tensor | None, num_bins: int) -> Tensor:
    """`entropy` of histograms that are stored side by side in some rows of a table; not differentiable.

    On a GPU one kernel, if it is available, reads each histogram once (fused.py).

    Args:
        table: [N, L * num_bins], float32 or float64, contiguous.
        index: [R] numbers of the wanted rows, int32 or int64; None: all.
        num_bins: number of bins of each histogram.

    Returns:
        [R, L], float64.
    """
    if fused.available(table.device) and num_bins <= fused.MOST_BINS:
        return fused.entropies(table, index, num_bins)
    rows = table if index is None else table.index_select(0, index)
    return entropy(rows.view(len(rows), table.shape[1] // num_bins, num_bins))
