"""Soft quantisation of representations: cosines to random unit vectors, then a softmax (Conklin 2025)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ib_callback.common.checks import check_integer
from ib_callback.common.errors import RepresentationError
from ib_callback.estimator.temperature import calibrated_temperature

# Below this temperature (dimensions 2 and 3) float32 cosines are too coarse, and float64 ones are used.
SHARP = 1e-3


def reference_points(dim: int, num_bins: int = 100, *, seed: int = 0) -> Tensor:
    """Reference points w_j, uniform on the unit sphere; a function of the three arguments alone.

    (E2 of docs/mathematics.md)

    They are drawn by NumPy's frozen `RandomState` in float64 and cast at the end, because torch's CPU
    normals differ between vector instruction sets.

    Args:
        dim: dimension of the representations, at least 2.
        num_bins: number of points, at least 2.
        seed: seed of the draw.

    Returns:
        Tensor [num_bins, dim], float32, unit rows, on the CPU.

    >>> points = reference_points(768, 100)
    >>> points.shape, bool(torch.allclose(points.norm(dim=1), torch.ones(100)))
    (torch.Size([100, 768]), True)
    """
    check_integer("dim", dim, minimum=2, cure="cosines need representations of at least two dimensions")
    check_integer("num_bins", num_bins, minimum=2, cure="100 is the published choice")
    check_seed(seed)
    normals = np.random.RandomState(int(seed)).standard_normal((int(num_bins), int(dim)))
    unit = normals / np.linalg.norm(normals, axis=1, keepdims=True)
    return torch.from_numpy(unit.astype(np.float32))


def soft_assign(z: Tensor, points: Tensor, temperature: float | str) -> Tensor:
    """Soft assignment p_j = softmax_j(cos(z, w_j) / temperature); differentiable in `z`. (E3 of docs/mathematics.md)

    Runs with autocast off and without TF32. float64 input is quantised in float64, everything else in float32.

    Args:
        z: representations [..., dim].
        points: reference points [num_bins, dim].
        temperature: softmax temperature, above 0, or `"calibrated"`.

    Returns:
        Assignments [..., num_bins]; each row sums to 1.

    Raises:
        RepresentationError: if a vector is zero, NaN or infinite.
    """
    if not isinstance(z, Tensor) or not z.is_floating_point() or z.ndim < 1:
        raise TypeError(f"z: expected a floating-point tensor [..., dim], got {getattr(z, 'dtype', type(z).__name__)}.")
    if points.ndim != 2 or points.shape[1] != z.shape[-1]:
        raise ValueError(
            f"points: expected [num_bins, {z.shape[-1]}] to match z {tuple(z.shape)}, got {tuple(points.shape)}. "
            f"Make them with reference_points({z.shape[-1]}, num_bins)."
        )
    number = resolve_temperature(temperature, z.shape[-1], len(points))
    z = z if z.dtype == torch.float64 else z.float()
    # Scaling does not change a cosine, but squares of very large or small components leave float32's range.
    largest = z.detach().abs().amax(-1, keepdim=True)
    assignments, norms = assign(z / torch.where(largest > 0, largest, 1.0), points.to(z), number)
    bad = int((~usable(norms)).sum())
    if bad:
        raise RepresentationError(
            f"z: {bad} of {norms.numel()} vectors are zero, NaN or infinite and so have no direction. "
            "Drop them before measuring."
        )
    return assignments


def assign(z: Tensor, points: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Assignments [..., num_bins] and norms [...] of `z`, with no check that would wait for a device."""
    dtype = z.dtype
    if temperature < SHARP and z.device.type != "mps":
        z, points = z.double(), points.double()
    with exact_float32(z.device):
        norms = torch.linalg.vector_norm(z, dim=-1)
        logits = torch.matmul(z, points.T) / (norms * temperature).unsqueeze(-1)
        return torch.softmax(logits, dim=-1).to(dtype), norms


# States of these dtypes are multiplied without a cast.
HALVES = (torch.bfloat16, torch.float16)
# Settings of torch that let a GPU add up 16-bit products in 16 bits.
_SUMS_IN_16_BITS = (
    "allow_fp16_accumulation",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
)
# Points are scaled by this factor before they are split into float16 parts, whose smallest normal number is 6e-5.
_SCALE = 256.0


def in_parts(points: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Reference points as a sum of parts in the dtype of the states, for products of 16-bit numbers summed in float32.

    A float32 point is split into a 16-bit number and a remainder, which is rounded to 16 bits too. The relative error
    is 2^-17 (bfloat16) or 2^-21 (float16); for components under .001 it is relative to .001. Products of two 16-bit
    numbers are exact in float32. So 16-bit states get the cosines to float32 points, almost to float32's rounding, at
    the speed of 16 bits.

    Args:
        points: [num_bins, dim], float32.
        dtype: float32, bfloat16 or float16.

    Returns:
        Parts [P, num_bins, dim] of that dtype, with P = 1 for float32 and 2 otherwise; and the factor by which their
        sum is too large.
    """
    if dtype not in HALVES:
        return points.to(dtype)[None], 1.0
    return halves(points * _SCALE, dtype), _SCALE


def halves(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 values as a sum of two 16-bit tensors, [2, ...]: the rounded values, and the rounded remainders."""
    high = values.to(dtype)
    return torch.stack([high, (values - high.float()).to(dtype)])


def usable(norms: Tensor) -> Tensor:
    """Where a vector of that norm has a usable direction in float32: not zero, NaN, infinite or near its limits."""
    return (norms > 1e-18) & (norms < 1e18)


def resolve_temperature(temperature: float | str, dim: int, num_bins: int) -> float:
    """The softmax temperature as a number; `"calibrated"` is computed from `dim` and `num_bins`."""
    number = check_temperature(temperature)
    return calibrated_temperature(dim, num_bins) if isinstance(number, str) else number


def check_temperature(temperature: Any) -> float | str:
    """Return `temperature` as a float if a softmax can use it, or unchanged if it is "calibrated"; raise otherwise."""
    if isinstance(temperature, str) and temperature == "calibrated":
        return temperature
    expected = f'temperature: expected a finite number above 0 or "calibrated", got {temperature!r}'
    if isinstance(temperature, bool) or not isinstance(temperature, (Real, str)):
        raise TypeError(f"{expected}.")
    if isinstance(temperature, str) or not 0 < float(temperature) < math.inf:
        raise ValueError(f"{expected}. 1.0 is the plain softmax.")
    return float(temperature)


def check_seed(seed: Any) -> int:
    """Return `seed` as an int if NumPy's frozen generator accepts it; raise otherwise."""
    if check_integer("seed", seed, minimum=0, cure="0 is the default") >= 2**32:
        raise ValueError(f"seed: expected less than 2**32, got {seed}; 0 is the default.")
    return int(seed)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Turn autocast off, and compute float32 products in full float32 (no TF32 on GPUs, no bfloat16 on CPUs).

    Products of 16-bit numbers are summed in float32 too.
    """
    of_gpus: Any = torch.backends.cuda.matmul
    of_cpus: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    settings: list[tuple[Any, str, Any]] = [(each, "fp32_precision", "ieee") for each in (of_gpus, of_cpus)]
    if device.type == "cuda":  # sums of 16-bit products
        settings += [(of_gpus, name, False) for name in _SUMS_IN_16_BITS]
    before = [getattr(backend, name) for backend, name, _ in settings]
    try:
        for backend, name, exact in settings:
            setattr(backend, name, exact)
        with torch.autocast(device_type=device.type, enabled=False):
            yield
    finally:
        for (backend, name, _), was in zip(settings, before, strict=True):
            setattr(backend, name, was)
