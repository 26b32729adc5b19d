"""Sums of soft assignments over segments of positions, and the entropy of the histograms they make."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements per step of `entropy`. On a CPU the float64 scratch then stays in a core's cache. A GPU gains nothing from
# small steps, and each step costs it a dozen launches.
_CHUNK_ELEMENTS = {"cpu": 1 << 16}
_CHUNK_ON_DEVICES = 1 << 21


def segment_sum(rows: Tensor, members: Tensor, offsets: Tensor) -> Tensor:
    """Sums of `rows` over segments of a list of row numbers; differentiable in `rows`.

    One worker adds up each segment in the order of its members, so the result is the same on every run, also on a GPU.

    Args:
        rows: [N, D], floating point.
        members: [M] row numbers, int32 or int64; segment s holds `members[offsets[s]:offsets[s + 1]]`.
        offsets: [S + 1], of the dtype of `members`, from 0 to M.

    Returns:
        [S, D], of the dtype of `rows`; zero for an empty segment.

    >>> segment_sum(torch.eye(3), torch.tensor([2, 0, 1]), torch.tensor([0, 2, 3]))
    tensor([[1., 0., 1.],
            [0., 1., 0.]])
    """
    return F.embedding_bag(members, rows, offsets, mode="sum", include_last_offset=True)


def entropy(histograms: Tensor) -> Tensor:
    """Entropy of unnormalised histograms divided by log of the number of bins ("efficiency", in [0, 1]).

    Each histogram is normalised by its own float64 sum, and logarithms are float64, because at high temperatures
    all entropies lie within 1e-3 of 1 and their differences are the signal. Differentiable. A bin that underflowed
    to zero adds nothing to the value or the gradient.

    Args:
        histograms: [..., num_bins], non-negative, each with a positive sum.

    Returns:
        [...], float64, dimensionless. On the same device; for MPS, which has no float64, on the CPU.

    >>> entropy(torch.tensor([[1.0, 1.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0]]))
    tensor([1., 0.], dtype=torch.float64)
    """
    if histograms.device.type == "mps":
        histograms = histograms.cpu()
    num_bins = histograms.shape[-1]
    flat = histograms.reshape(-1, num_bins)
    step = max(1, _CHUNK_ELEMENTS.get(flat.device.type, _CHUNK_ON_DEVICES) // num_bins)
    if flat.shape[0] <= step:
        return _entropy(flat).reshape(histograms.shape[:-1])
    return torch.cat([_entropy(part) for part in flat.split(step)]).reshape(histograms.shape[:-1])


def divergence(histograms: Tensor, reference: Tensor) -> Tensor:
    """Kullback-Leibler divergence of unnormalised histograms from a reference, as a fraction of log(num_bins).

    Args:
        histograms: [..., num_bins], float64.
        reference: float64, broadcastable to `histograms`; positive wherever the histograms are positive.

    Returns:
        [...], float64.
    """
    q = histograms / histograms.sum(-1, keepdim=True)
    p = reference / reference.sum(-1, keepdim=True)
    tiny = torch.finfo(torch.float64).tiny
    terms = q * (q.clamp_min(tiny).log() - p.clamp_min(tiny).log())
    return terms.sum(-1) / math.log(histograms.shape[-1])


def sensitivity(histograms: Tensor) -> Tensor:
    """Standard deviation of `entropy` if each bin's logarithm has an independent error of unit variance.

    To first order, errors e_j of log q_j change H by -sum_j q_j (log q_j + H) e_j. This function returns the standard
    deviation of that sum.

    Args:
        histograms: [..., num_bins], float64, each with a positive sum.

    Returns:
        [...], float64, as a fraction of log(num_bins).
    """
    q = histograms / histograms.sum(-1, keepdim=True)
    logs = q.clamp_min(torch.finfo(torch.float64).tiny).log()
    mean = (q * logs).sum(-1, keepdim=True)
    return torch.linalg.vector_norm(q * (logs - mean), dim=-1) / math.log(histograms.shape[-1])


def _entropy(histograms: Tensor) -> Tensor:
    counts = histograms.double()
    total = counts.sum(-1)
    tiny = torch.finfo(torch.float64).tiny
    logs = counts.clamp_min(tiny)
    logs = logs.log() if logs.requires_grad else logs.log_()
    weighted_logs = (logs * counts if logs.requires_grad else logs.mul_(counts)).sum(-1)
    # log S - sum(C log C) / S is the entropy of C / S without forming C / S.
    return ((total.log() - weighted_logs / total) / math.log(histograms.shape[-1])).clamp_min(0.0)
