"""Other published measures of representations, computed from second moments, to compare with the numbers of `Meter`.

(E24 of docs/mathematics.md)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rankme(first: Tensor, second: Tensor, count: int) -> float:
    """RankMe, the effective rank: exp of the entropy of the normalised singular values (Garrido et al., ICML 2023).

    Args:
        first: [dim] sum of the states; not used, because states are not centred here.
        second: [dim, dim] sum of their outer products, float64.
        count: number of states.

    Returns:
        A number from 1 (all states along one direction) to dim; 0 without any state.

    >>> rankme(torch.zeros(4), torch.eye(4, dtype=torch.float64), 9)
    4.0
    """
    singular = torch.linalg.eigvalsh(second).clamp_min(0.0).sqrt()
    total = singular.sum()
    if total <= 0:
        return 0.0
    share = singular / total
    return float(torch.special.entr(share).sum().exp())


def alpha_req(first: Tensor, second: Tensor, count: int) -> float:
    """α-ReQ: how fast the spectrum of the covariance decays, λ_j ~ j^-α (Agrawal et al., NeurIPS 2022).

    -α is the slope of log λ_j on log j by least squares, over all eigenvalues above the rounding error of the
    largest. The weights are 1/j, so each octave of ranks counts equally (as in Stringer et al., Nature 2019).

    Args:
        first: [dim] sum of the states, float64.
        second: [dim, dim] sum of their outer products, float64.
        count: number of states.

    Returns:
        α; 0 for a flat spectrum, and for a spectrum of fewer than two eigenvalues.

    >>> spectrum = torch.arange(1, 9, dtype=torch.float64) ** -1.5
    >>> round(alpha_req(torch.zeros(8, dtype=torch.float64), torch.diag(spectrum), 1), 9)
    1.5
    """
    mean = first / count
    spectrum = torch.linalg.eigvalsh(second / count - torch.outer(mean, mean)).flip(0)
    spectrum = spectrum[spectrum > 1e-12 * spectrum[0]]
    if len(spectrum) < 2:
        return 0.0
    rank = torch.arange(1, len(spectrum) + 1, dtype=torch.float64)
    weight = (1.0 / rank) / (1.0 / rank).sum()
    x, y = rank.log(), spectrum.log()
    x, y = x - weight @ x, y - weight @ y
    return -float((weight * x) @ y / ((weight * x) @ x))


COMPANIONS: dict[str, Callable[[Tensor, Tensor, int], float]] = {"rankme": rankme, "alpha_req": alpha_req}
COMPANION_LAYERS = ("last", "late", "all")
