"""Soft entropy and soft mutual information of a set of representations, as differentiable pure functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ib_callback.estimator.histogram import entropy, segment_sum
from ib_callback.estimator.quantise import reference_points, soft_assign

WEIGHTINGS = ("empirical", "uniform")


def soft_entropy(z: Tensor, *, num_bins: int = 100, seed: int = 0, temperature: float | str = "calibrated") -> Tensor:
    """Return the soft entropy H(Z): the entropy of the mean soft assignment, divided by log(num_bins).

    H(Z) = - sum_j q_j log(q_j) / log(n), with q = mean_t softmax(cos(z_t, w) / temperature) over the n
    reference points w. Differentiable in `z`. (E5 of docs/mathematics.md)

    Args:
        z: representations [T, dim], floating point, T >= 1 and dim >= 2. Only their directions matter.
        num_bins: number of reference points, at least 2.
        seed: seed of the reference points.
        temperature: softmax temperature, or `"calibrated"` for `calibrated_temperature(dim, num_bins)`.

    Returns:
        0-dim tensor in [0, 1] (dimensionless efficiency) on the device of `z`. The result is float64 for any
        dtype of `z`, because near 1 float32 would round away the differences that matter. Only on MPS, which
        has no float64, the result is float32. float64 input is quantised in float64, everything else in float32.

    Raises:
        TypeError: `z` is not a floating-point tensor, or another argument has the wrong type.
        ValueError: `z` is not [T, dim] with T >= 1 and dim >= 2, or another argument is out of range.
        RepresentationError: vectors of `z` are zero, NaN or infinite.

    Source: Conklin et al., ICLR 2026 and Conklin 2025 (soft entropy estimator).

    >>> z = torch.ones(5, 64, dtype=torch.float64)
    >>> spread = torch.eye(64, dtype=torch.float64)
    >>> bool(soft_entropy(z) < soft_entropy(spread) <= 1)
    True
    """
    assignments = assigned(z, num_bins, seed, temperature)
    return _on_device_of(z, entropy(in_float64(assignments).sum(0)))


def soft_mutual_information(
    z: Tensor,
    labels: Tensor,
    *,
    num_bins: int = 100,
    seed: int = 0,
    temperature: float | str = "calibrated",
    weighting: str = "empirical",
) -> Tensor:
    """Return the soft mutual information I(X;Z) = H(Z) - H(Z given X) of labels and representations.

    H(Z given X) = sum_x w(x) H(Z given X = x). H is the entropy of `soft_entropy`, here over the positions
    labelled x. Differentiable in `z`. The positions of each label are added up in a fixed order, so the result
    is the same on every run, also on a GPU.

    (E6 of docs/mathematics.md; with uniform weights E7 of docs/mathematics.md)

    Args:
        z: representations [T, dim], floating point, T >= 1 and dim >= 2. Only their directions matter.
        labels: [T], any integer dtype (bool is refused). Each different value is one label, also a negative value.
        num_bins: number of reference points, at least 2.
        seed: seed of the reference points.
        temperature: softmax temperature, or `"calibrated"` for `calibrated_temperature(dim, num_bins)`.
        weighting: `"empirical"`: w(x) is the share of x among the T positions. I is then a mutual information of
            the sample, at least 0 up to rounding. `"uniform"`: every label that occurs has the same weight. The
            result is then not a mutual information and may be negative.

    Returns:
        0-dim tensor, in units of log(num_bins) nats, on the device of `z`; dtype as for `soft_entropy`.

    Raises:
        TypeError: `z` is not a floating-point tensor, `labels` is not an integer tensor, or another argument has
            the wrong type.
        ValueError: shapes or values are not as above.
        RepresentationError: vectors of `z` are zero, NaN or infinite.

    Source: Conklin et al., ICLR 2026 and Conklin 2025 (soft entropy estimator). Complexity is this function with
    the preceding tokens as labels, expressivity with the trailing tokens.

    >>> z = torch.eye(64, dtype=torch.float64)[:4]
    >>> float(soft_mutual_information(z, torch.tensor([7, 7, 7, 7])))
    0.0
    >>> labels = torch.tensor([3, 3, -1, -1])
    >>> 0 < float(soft_mutual_information(z, labels)) < float(soft_entropy(z))
    True
    """
    check_weighting(weighting)
    assignments = assigned(z, num_bins, seed, temperature)
    check_labels(labels, z.shape[0])
    _, counts, histograms = histograms_by_label(assignments, labels)
    conditional = entropy(histograms)
    weights = label_weights(counts, weighting)
    return _on_device_of(z, entropy(histograms.sum(0)) - (weights * conditional).sum())


def assigned(z: Tensor, num_bins: int, seed: int, temperature: float | str) -> Tensor:
    """Check representations [T, dim] and return their soft assignments [T, num_bins]; differentiable."""
    check_representations(z)
    return soft_assign(z, reference_points(z.shape[1], num_bins, seed=seed), temperature)


def histograms_by_label(assignments: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum soft assignments over the positions of each label that occurs, in float64 and in a fixed order.

    Over many positions a running float32 sum drifts by more than the differences between histograms at
    temperature 1.0, so the sums are float64. Differentiable in `assignments`.

    Args:
        assignments: [T, num_bins], floating point, T >= 1.
        labels: [T], integer.

    Returns:
        Three tensors: the L labels that occur, in increasing order, [L] int64; the number of positions of each, [L]
        int64; and their histograms, [L, num_bins] float64. They are on the device of `assignments` (for MPS on the
        CPU).
    """
    assignments = in_float64(assignments)
    values, inverse, counts = torch.unique(
        labels.to(device=assignments.device, dtype=torch.int64), return_inverse=True, return_counts=True
    )
    members = torch.argsort(inverse, stable=True)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return values, counts, segment_sum(assignments, members, offsets)


def label_weights(counts: Tensor, weighting: str) -> Tensor:
    """Return the weights w(x) of H(Z given X = x) in H(Z given X): [L] float64; label l occurs `counts[l]` times."""
    share = counts if weighting == "empirical" else torch.ones_like(counts)
    return share.double() / share.sum()


def in_float64(assignments: Tensor) -> Tensor:
    """Return `assignments` in float64, on the CPU if its device (MPS) has none; differentiable."""
    return (assignments.cpu() if assignments.device.type == "mps" else assignments).double()


def check_representations(z: Any, *, dim: int | None = None, minimum_rows: int = 1) -> None:
    """Raise unless `z` is a floating-point tensor [T, dim] with T >= minimum_rows; dim None accepts any dim >= 2."""
    if not isinstance(z, Tensor) or not z.is_floating_point():
        raise TypeError(
            f"z: expected a floating-point tensor [T, dim], got {getattr(z, 'dtype', type(z).__name__)}. "
            "Make one with torch.as_tensor(z).float()."
        )
    wanted = "dim >= 2" if dim is None else f"dim = {dim}"
    if z.ndim != 2 or z.shape[0] < minimum_rows or z.shape[1] < 2 or z.shape[1] != (dim or z.shape[1]):
        raise ValueError(
            f"z: expected shape [T, dim] with T >= {minimum_rows} and {wanted}, got {tuple(z.shape)}. "
            "Flatten batch and sequence with z.reshape(-1, dim) and keep the valid positions."
        )


def check_labels(labels: Any, num_positions: int) -> None:
    """Raise unless `labels` is an integer tensor [num_positions]."""
    dtype = labels.dtype if isinstance(labels, Tensor) else None
    if dtype is None or dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise TypeError(
            f"labels: expected an integer tensor [{num_positions}], got {dtype or type(labels).__name__}. "
            "Make one with torch.as_tensor(labels).long()."
        )
    if labels.shape != (num_positions,):
        raise ValueError(
            f"labels: expected shape ({num_positions},), one label for each row of z, "
            f"got {tuple(labels.shape)}. Flatten both in the same way, e.g. z.reshape(-1, dim) and labels.reshape(-1)."
        )


def check_weighting(weighting: Any) -> None:
    """Raise unless `weighting` is one of `WEIGHTINGS`."""
    if weighting not in WEIGHTINGS:
        raise ValueError(
            f'weighting: expected "empirical" or "uniform", got {weighting!r}. '
            'Use "empirical" for a mutual information of the sample.'
        )


def _on_device_of(z: Tensor, value: Tensor) -> Tensor:
    return value.float().to(z.device) if z.device.type == "mps" else value
