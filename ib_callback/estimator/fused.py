"""Two Triton kernels for GPUs: soft quantisation and entropies. Elsewhere torch's own operations do the same.

Torch's operations read and write a state about six times: gathered, cast, multiplied, normalised, exponentiated. The
kernel reads it once from memory, and once more from the cache if unit states are summed. Both kernels are registered as
operators of torch, so they work with fake tensors. The first launch imports Triton. Torch for CUDA installs Triton;
other builds need not have it.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, no_type_check

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ib_callback.common import optional
from ib_callback.common.messages import describe, warn
from ib_callback.estimator.histogram import entropy
from ib_callback.estimator.quantise import assign, in_parts, reference_points

# More bins than this do not fit into the registers of one block of threads.
MOST_BINS = 1024
# Key: number of bins, rounded up to a power of two. Value: rows of a program, dimensions of a step in 16 bits (half as
# many in 32 bits, but at least 16), and stages of loading. Compiled for compute capability 8.0 and 9.0, each fits into
# 99 KiB of shared memory, the least that a block of threads has from 8.0 on. Each fits into the registers too, except
# 48 bytes a thread for 1,024 bins in float32. Rows at odd addresses need more.
_SHAPES = {128: (64, 32, 3), 256: (32, 32, 3), 512: (32, 16, 3), 1024: (16, 16, 2)}
# In the self-check, assignments, norms and sums of unit states may differ from torch's by the first number, entropies
# by the second.
_TOLERANCE, _ENTROPY_TOLERANCE = 1e-5, 1e-9
# For each device: whether the kernels give the right numbers there.
_verdicts: dict[torch.device, bool] = {}
# triton.language, set by the first launch: kernels look it up among the globals of their module.
tl: Any = None


def is_installed() -> bool:
    """Whether Triton is installed; does not import it."""
    return optional.is_installed("triton")


def available(device: torch.device) -> bool:
    """Whether the kernels can be used on `device`; the first call on a device runs them there and compares with torch.

    If they fail or give other numbers, one warning says so, and torch's operations are used from then on. Fake tensors
    have nothing to compare: for them it is enough that Triton is installed.
    """
    if device.type != "cuda" or os.environ.get("IB_CALLBACK_TRITON") == "0":
        return False
    if device in _verdicts:
        return _verdicts[device]
    # The kernels were never tried on AMD's GPUs, and not all of those support the products used here.
    if not is_installed() or torch.version.hip is not None:
        return False
    if isinstance(torch.empty(0), FakeTensor):
        return True
    try:
        # Before 8.0 there are neither bfloat16 nor TF32 products. The kernels cannot run then, so there is no warning.
        wrong = _differences(device) if torch.cuda.get_device_capability(device) >= (8, 0) else None
        _verdicts[device] = wrong == ""
    except (MemoryError, torch.OutOfMemoryError):
        return False  # lack of memory says nothing about the kernels
    except Exception as error:
        wrong, _verdicts[device] = describe(error), False
    if wrong:
        warn(
            f"The Triton kernels do not work on {device} ({wrong}). torch's own operations are used instead. They are "
            "slower and give the same numbers. IB_CALLBACK_TRITON=0 turns the kernels off from the start."
        )
    return _verdicts[device]


@torch.library.custom_op("ib_callback::quantise", mutates_args=("out",))
def quantise(
    rows: Tensor, positions: Tensor, points: Tensor, divisor: float, out: Tensor, with_unit: bool
) -> tuple[Tensor, Tensor]:
    """Soft assignments of some of the rows, written into `out`; deterministic.

    Products of two 16-bit numbers are exact in float32 and are summed in float32. So the assignments agree to 1e-6 with
    those of the sum of the parts. The parts themselves are coarser than float32 points: assignments with two parts of
    float16 agree to 1e-6 with those of float32 points, with two parts of bfloat16 to 1e-5, with three to 1e-6.

    Args:
        rows: [R, dim], bfloat16, float16 or float32, stride 1 in the last dimension.
        positions: [T] numbers of the wanted rows, int64 or int32, each in 0 … R - 1 (not checked).
        points: [P, num_bins, dim], of the dtype of the rows, contiguous: parts w_p of the reference points, the
            largest first.
        divisor: the temperature times the factor by which the parts were scaled.
        out: [T, num_bins] float32, stride 1 in the last dimension. It receives
            softmax_j(sum_p z·w_pj / (|z| divisor)).
        with_unit: whether to sum unit states.

    Returns:
        Norms [T], float32; and the sum of z / |z| for each block of rows, [blocks, dim], float32 ([0, dim] without
        `with_unit`). Added up, these give the sum over all rows. A zero, NaN or infinite row is recognised by its norm
        and has no usable assignments.

    Raises:
        ValueError: the kernel would read these tensors wrongly.
    """
    norms, unit = _room(rows, positions, points, out, with_unit)
    count, num_bins, dim = len(norms), out.shape[1], rows.shape[1]
    bins, block, step, stages = _shape(num_bins, rows.dtype)
    if count:
        with torch.cuda.device_of(rows):
            _kernels()[0][(-(-count // block),)](
                *(rows, rows.stride(0), positions, points, norms, out, out.stride(0), unit),
                *(count, dim, num_bins, divisor),
                PARTS=len(points), BINS=bins, ROWS=block, STEP=step, WITH_UNIT=with_unit,
                WIDE=os.environ.get("TRITON_INTERPRET") == "1", **_options(8, stages),
            )  # fmt: skip
    return norms, unit


@quantise.register_fake
def _(
    rows: Tensor, positions: Tensor, points: Tensor, divisor: float, out: Tensor, with_unit: bool
) -> tuple[Tensor, Tensor]:
    return _room(rows, positions, points, out, with_unit)


@torch.library.custom_op("ib_callback::entropies", mutates_args=())
def entropies(table: Tensor, index: Tensor | None, num_bins: int) -> Tensor:
    """`histogram.entropy` of the histograms in some rows of a table. They are read once and not copied.

    Args:
        table: [N, L * num_bins], float32 or float64, contiguous.
        index: [R] numbers of the wanted rows, int64 or int32, each in 0 … N - 1 (not checked); None: all.
        num_bins: number of bins of each histogram, at most `MOST_BINS`.

    Returns:
        [R, L], float64, as fractions of log(num_bins).

    Raises:
        ValueError: the kernel would read these tensors wrongly.
    """
    result = _room_for_entropies(table, index, num_bins)
    if result.numel():
        bins = _power_of_two(num_bins)
        histograms = max(1, 1024 // bins)  # a program's work: eight numbers for each of its threads
        with torch.cuda.device_of(table):
            _kernels()[1][(-(-result.numel() // histograms),)](
                *(table, index, result, result.numel(), result.shape[1], num_bins),
                BINS=bins, HISTOGRAMS=histograms, **_options(4, 1),
            )  # fmt: skip
    return result


@entropies.register_fake
def _(table: Tensor, index: Tensor | None, num_bins: int) -> Tensor:
    return _room_for_entropies(table, index, num_bins)


@lru_cache(maxsize=1)
@no_type_check
def _kernels() -> tuple[Any, Any]:
    """Both kernels; Triton is imported here."""
    global tl
    import triton
    import triton.language

    tl = triton.language

    @triton.jit
    def quantise_rows(
        rows, row_stride, positions, points, norms, out, out_stride, unit, count, dim, num_bins, divisor,
        PARTS: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, WITH_UNIT: tl.constexpr,
        WIDE: tl.constexpr,
    ):  # fmt: skip
        block = tl.program_id(0)
        numbers = block * ROWS + tl.arange(0, ROWS)
        here = numbers < count
        # In large batches the number of elements exceeds 2^31.
        starts = tl.load(positions + numbers, mask=here, other=0).to(tl.int64) * row_stride
        bins = tl.arange(0, BINS)
        steps = tl.arange(0, STEP)
        dots = tl.zeros([ROWS, BINS], dtype=tl.float32)
        squares = tl.zeros([ROWS], dtype=tl.float32)
        for start in range(0, dim, STEP):
            k = start + steps
            z = tl.load(rows + starts[:, None] + k[None, :], mask=here[:, None] & (k < dim)[None, :], other=0.0)
            z32 = z.to(tl.float32)
            squares += tl.sum(z32 * z32, axis=1)
            # Tensor cores truncate sums instead of rounding them. So they add only the few products of one step, the
            # small ones first; the sums of the steps are added in ordinary float32.
            # TF32 has ten bits; three TF32 products of high and low parts make one float32 product. For other dtypes
            # this setting has no effect.
            part = tl.zeros([ROWS, BINS], dtype=tl.float32)
            if WIDE:  # because Triton's interpreter would multiply the bits of bfloat16 numbers as integers
                z = z32
            for p in tl.static_range(PARTS):
                w = tl.load(
                    points + ((PARTS - 1 - p) * num_bins + bins)[None, :] * dim + k[:, None],
                    mask=(bins < num_bins)[None, :] & (k < dim)[:, None],
                    other=0.0,
                )
                part = tl.dot(z, w.to(z.dtype), part, input_precision="tf32x3")
            dots += part
        norm = tl.sqrt_rn(squares)
        tl.store(norms + numbers, norm, mask=here)
        logits = tl.where((bins < num_bins)[None, :], dots / (norm * divisor)[:, None], float("-inf"))
        weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        tl.store(
            out + numbers.to(tl.int64)[:, None] * out_stride + bins[None, :],
            weights / tl.sum(weights, axis=1)[:, None],
            mask=here[:, None] & (bins < num_bins)[None, :],
        )
        if WITH_UNIT:
            # Nothing is loaded ahead in this loop, so its steps are longer.
            inverse = tl.where(here, 1.0 / norm, 0.0)
            for start in range(0, dim, 4 * STEP):
                k = start + tl.arange(0, 4 * STEP)
                z = tl.load(rows + starts[:, None] + k[None, :], mask=here[:, None] & (k < dim)[None, :], other=0.0)
                total = tl.sum(z.to(tl.float32) * inverse[:, None], axis=0)
                tl.store(unit + block.to(tl.int64) * dim + k, total, mask=k < dim)

    @triton.jit
    def entropies_of_rows(
        table, index, out, count, layers, num_bins, BINS: tl.constexpr, HISTOGRAMS: tl.constexpr
    ):  # fmt: skip
        numbers = tl.program_id(0).to(tl.int64) * HISTOGRAMS + tl.arange(0, HISTOGRAMS)
        here = numbers < count
        row = numbers // layers
        if index is not None:
            row = tl.load(index + row, mask=here, other=0).to(tl.int64)
        starts = (row * layers + numbers % layers) * num_bins
        bins = tl.arange(0, BINS)
        mask = here[:, None] & (bins < num_bins)[None, :]
        counts = tl.load(table + starts[:, None] + bins[None, :], mask=mask, other=0.0).to(tl.float64)
        total = tl.sum(counts, axis=1)
        # The smallest normal float64, as in `histogram.entropy`: a bin of zero adds nothing. Not tl.maximum, which
        # hides NaN.
        logs = tl.log(tl.where(counts < 2.2250738585072014e-308, 2.2250738585072014e-308, counts))
        weighted_logs = tl.sum(counts * logs, axis=1)
        value = (tl.log(total) - weighted_logs / total) / tl.log(num_bins.to(tl.float64))
        tl.store(out + numbers, tl.where(value < 0.0, 0.0, value), mask=here)

    return quantise_rows, entropies_of_rows


def _shape(num_bins: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Bins rounded up to a power of two, rows of a program, dimensions of a step, stages of loading.

    They depend on these two arguments alone, so the computed numbers do not depend on anything else either.
    """
    bins = _power_of_two(num_bins)
    rows, step, stages = _SHAPES[max(bins, min(_SHAPES))]
    return bins, rows, max(16, step * 2 // dtype.itemsize), stages


def _options(warps: int, stages: int) -> dict[str, Any]:
    """Options for the compiler. Fused multiplications are set explicitly because Triton's default will change."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def _power_of_two(num_bins: int) -> int:
    """The least power of two that holds `num_bins`; at least 16, which the products of tensor cores need."""
    if not 2 <= num_bins <= MOST_BINS:
        raise ValueError(f"num_bins: expected 2 to {MOST_BINS}, got {num_bins}.")
    return max(16, 1 << (num_bins - 1).bit_length())


def _room(rows: Tensor, positions: Tensor, points: Tensor, out: Tensor, with_unit: bool) -> tuple[Tensor, Tensor]:
    """Empty tensors for norms and sums of unit states; refuses tensors that the kernel would read wrongly."""
    wrong = [
        name
        for name, right in (
            ("rows", rows.ndim == 2 and rows.dtype in (torch.bfloat16, torch.float16, torch.float32)),
            ("rows", rows.ndim == 2 and (rows.shape[1] < 2 or rows.stride(1) == 1)),
            ("positions", positions.ndim == 1 and positions.dtype in (torch.int32, torch.int64)),
            ("positions", positions.is_contiguous()),
            ("points", points.dtype == rows.dtype and points.is_contiguous()),
            ("points", points.ndim == 3 and points.shape[1:] == (out.shape[-1], rows.shape[-1])),
            ("out", out.shape == (*positions.shape, out.shape[-1]) and out.dtype == torch.float32),
            ("out", out.stride(-1) == 1),
            ("device", rows.device == positions.device == points.device == out.device),
        )
        if not right
    ]
    if wrong:
        given = ", ".join(
            f"{name} {tuple(value.shape)} {value.dtype} of strides {value.stride()} on {value.device}"
            for name, value in (("rows", rows), ("positions", positions), ("points", points), ("out", out))
        )
        raise ValueError(f"{wrong[0]}: expected the form that quantise() needs, got {given}.")
    blocks = -(-len(positions) // _shape(out.shape[1], rows.dtype)[1]) if with_unit else 0
    return (
        rows.new_empty(len(positions), dtype=torch.float32),
        rows.new_empty(blocks, rows.shape[1], dtype=torch.float32),
    )


def _room_for_entropies(table: Tensor, index: Tensor | None, num_bins: int) -> Tensor:
    """An empty tensor for entropies; refuses tensors that the kernel would read wrongly."""
    _power_of_two(num_bins)
    if (
        table.ndim != 2
        or table.dtype not in (torch.float32, torch.float64)
        or not table.is_contiguous()
        or table.shape[1] % num_bins
    ):
        raise ValueError(
            f"table: expected contiguous histograms of {num_bins} bins side by side, float32 or float64, "
            f"got {tuple(table.shape)} {table.dtype} of strides {table.stride()}."
        )
    if index is not None and (
        index.ndim != 1
        or index.dtype not in (torch.int32, torch.int64)
        or not index.is_contiguous()
        or index.device != table.device
    ):
        raise ValueError(f"index: expected [R] row numbers on {table.device}, got {tuple(index.shape)} {index.dtype}.")
    return table.new_empty(len(table if index is None else index), table.shape[1] // num_bins, dtype=torch.float64)


@torch.no_grad()
def _differences(device: torch.device) -> str:
    """What differs between the kernels and torch's operations in a small problem on `device`; empty if nothing does."""
    dim, num_bins, temperature = 130, 100, 0.05
    states = 3.0 * reference_points(dim, 70, seed=1).to(device)  # does not touch a generator that training uses
    points = reference_points(dim, num_bins).to(device)
    positions = torch.arange(69, -1, -1, device=device)
    wrong = []

    def compare(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
        largest = float((found.double() - expected.double()).abs().max())
        if not largest <= tolerance:  # also true for NaN
            wrong.append(f"{name} differ by {largest:.1e}")

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows = states.to(dtype)
        parts, scale = in_parts(points, dtype)
        found = torch.empty(len(rows), num_bins, device=device, dtype=torch.float32)
        norms, unit = quantise(rows, positions, parts, temperature * scale, found, True)
        exact = rows.double()[positions]
        expected, lengths = assign(exact, parts.double().sum(0) / scale, temperature)
        compare(f"assignments of {dtype}", found, expected, _TOLERANCE)
        compare(f"relative norms of {dtype}", norms / lengths, torch.ones_like(lengths), _TOLERANCE)
        compare(f"sums of unit states of {dtype}", unit.sum(0), (exact / lengths.unsqueeze(-1)).sum(0), _TOLERANCE)
        efficiency = entropies(found.reshape(35, 2 * num_bins), positions[-35:], num_bins)
        compare("entropies", efficiency, entropy(found.reshape(35, 2, num_bins))[positions[-35:]], _ENTROPY_TOLERANCE)
    return "; ".join(wrong)
