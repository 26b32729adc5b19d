"""Both kernels, run by Triton's interpreter on the CPU, against torch's operations.

The interpreter must be chosen before Triton is imported, so test_fused.py runs this module in a process of its own:
`TRITON_INTERPRET=1 pytest tests/estimator/interpreted_fused.py`.
"""

import numpy as np
import pytest
import torch

from ib_callback.estimator import fused
from ib_callback.estimator.histogram import entropy
from ib_callback.estimator.quantise import assign, reference_points, resolve_temperature

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CPU = torch.device("cpu")
np.seterr(all="ignore")  # the interpreter's; a GPU says nothing of zeros and infinities either


def in_parts(points, dtype, count=2):
    """Parts of the points that sum to them, and what both were multiplied by."""
    if dtype == torch.float32:
        return points.unsqueeze(0), 1.0
    rest, parts = points * 256.0, []
    for _ in range(count):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    return torch.stack(parts), 256.0


def states(dim, count, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, dim, generator=generator) * 7.0).to(dtype)


def run(rows, positions, num_bins, out, with_unit=True, temperature="calibrated", exactly=torch.float64):
    """What the kernel finds, and what torch does with the sum of the parts: assignments and norms.

    In float64, because at the calibrated temperature torch's float32 is itself up to 2e-6 from it.
    """
    number = resolve_temperature(temperature, rows.shape[1], num_bins)
    parts, scale = in_parts(reference_points(rows.shape[1], num_bins), rows.dtype)
    found = fused.quantise(rows, positions, parts, number * scale, out, with_unit)
    points = (parts.double().sum(0) / scale).to(exactly)
    return found, assign(rows.to(exactly)[positions.long()], points, number)


def close(found, expected, atol=0.0, rtol=0.0):
    torch.testing.assert_close(found.double(), expected.double(), atol=atol, rtol=rtol, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "num_bins", "count"), [(24, 2, 5), (768, 100, 70), (770, 130, 33), (16, 300, 33), (24, 1000, 17)]
)
def test_kernel_is_torch_on_strided_rows_and_outputs(dim, num_bins, count, dtype):
    wide = torch.full((count + 9, dim + 6), torch.nan, dtype=dtype)
    rows = wide[:, 3 : dim + 3]
    kind = torch.int32 if num_bins == 130 else torch.int64
    positions = torch.randperm(count + 9, generator=torch.Generator().manual_seed(2))[:count].to(kind)
    rows[positions.long()] = states(dim, count, dtype)  # all others stay NaN
    table = torch.full((count, 3, num_bins), -1.0)
    (norms, unit), (expected, lengths) = run(rows, positions, num_bins, table[:, 1])
    close(table[:, 1], expected, atol=1e-6)
    close(norms, lengths, rtol=1e-6)
    assert len(unit) == -(-count // fused._shape(num_bins, dtype)[1])
    close(unit.sum(0), (rows.double()[positions.long()] / lengths.unsqueeze(-1)).sum(0), atol=1e-5)
    _, (expected, _) = run(rows, positions, num_bins, table[:, 1], temperature=0.1, exactly=torch.float32)
    close(table[:, 1], expected, atol=1e-6)
    assert (table[:, 0] == -1).all() and (table[:, 2] == -1).all()


@pytest.mark.parametrize(
    ("dtype", "parts", "tolerance"),
    [
        (torch.bfloat16, 1, 1e-2),
        (torch.bfloat16, 2, 1e-5),
        (torch.bfloat16, 3, 1e-6),
        (torch.float16, 1, 1e-3),
        (torch.float16, 2, 1e-6),
    ],
)
def test_how_near_some_parts_come_to_points_of_float32(dtype, parts, tolerance):
    rows, points, out = states(768, 64, dtype), reference_points(768, 100), torch.empty(64, 100)
    temperature = resolve_temperature("calibrated", 768, 100)
    split, scale = in_parts(points, dtype, parts)
    fused.quantise(rows, torch.arange(64), split, temperature * scale, out, False)
    largest = float((out - assign(rows.double(), points.double(), temperature)[0]).abs().max())
    assert largest < tolerance
    assert parts > 1 or largest > 1e-5  # so that a second part is needed


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_direction_have_norms_that_tell_and_harm_no_others(dtype):
    rows = states(40, 20, dtype)
    largest = torch.finfo(dtype).max
    for number, value in enumerate([0.0, torch.nan, torch.inf, -torch.inf, largest, 1e-30]):
        rows[number] = value
    out = torch.empty(20, 10)
    (norms, unit), (expected, lengths) = run(rows, torch.arange(20), 10, out, exactly=torch.float32)
    close(norms, lengths, rtol=1e-6)
    close(out[6:], expected[6:], atol=1e-6)
    assert unit.isnan().all()


def test_a_large_and_a_small_scale_change_nothing():
    rows, plain = states(64, 6, torch.float32), torch.empty(6, 10)
    run(rows, torch.arange(6), 10, plain)
    for scale in (1e17, 1e-17):
        out = torch.empty(6, 10)
        run(rows * scale / rows.norm(dim=1, keepdim=True), torch.arange(6), 10, out)
        close(out, plain, atol=1e-6)


def test_without_sums_of_unit_states_or_without_rows():
    rows, out = states(24, 6, torch.bfloat16), torch.empty(6, 10)
    (norms, unit), (expected, _) = run(rows, torch.arange(6), 10, out, with_unit=False)
    assert unit.shape == (0, 24) and norms.shape == (6,)
    close(out, expected, atol=1e-6)
    (norms, unit), _ = run(rows, torch.arange(0), 10, out[:0])
    assert norms.shape == (0,) and unit.shape == (0, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_bins", [2, 100, 130, 1000])
def test_entropies_are_those_of_histograms(num_bins, dtype):
    generator = torch.Generator().manual_seed(3)
    table = torch.rand(7, 5, num_bins, generator=generator, dtype=dtype)
    table[table < 0.2] = 0.0
    table[..., 0] += 1e-3
    table[2, 1, 1:] = 0.0  # all in one bin
    table[3] = 1.0
    table[6, 0, 0] = torch.nan
    expected = entropy(table)
    flat = table.reshape(7, -1)
    for index in (None, torch.tensor([6, 3, 3, 0]), torch.tensor([2], dtype=torch.int32), torch.tensor([]).long()):
        found = fused.entropies(flat, index, num_bins)
        right = expected if index is None else expected[index.long()]
        assert found.dtype == torch.float64
        close(found, right, atol=1e-14)


def test_the_self_check_finds_no_difference():
    assert fused._differences(CPU) == ""
