"""Reference points, soft assignment, and the precision they run in."""

import numpy as np
import pytest
import torch

from ib_callback.common.errors import RepresentationError
from ib_callback.estimator.quantise import exact_float32, reference_points, soft_assign


def slow_assign(z: np.ndarray, points: np.ndarray, temperature: float) -> np.ndarray:
    rows = []
    for vector in z:
        logits = [vector @ w / np.linalg.norm(vector) / np.linalg.norm(w) / temperature for w in points]
        weights = np.exp(np.array(logits) - max(logits))
        rows.append(weights / weights.sum())
    return np.array(rows)


def test_reference_points_are_numpys_frozen_normals_on_the_sphere():
    normals = np.random.RandomState(3).standard_normal((7, 5))
    expected = normals / np.sqrt((normals**2).sum(1, keepdims=True))
    points = reference_points(5, 7, seed=3)
    assert points.dtype == torch.float32
    np.testing.assert_allclose(points.numpy(), expected, rtol=1e-6)


def test_reference_points_leave_the_global_random_states_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    reference_points(8, 4)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_soft_assign_matches_loops_in_float64(temperature):
    z = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 100
    points = reference_points(9, 4)
    assigned = soft_assign(z.reshape(2, 3, 9), points, temperature)
    assert assigned.dtype == torch.float64 and assigned.shape == (2, 3, 4)
    np.testing.assert_allclose(
        assigned.reshape(6, 4).numpy(), slow_assign(z.numpy(), points.double().numpy(), temperature), rtol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precisions_are_quantised_in_float32(dtype):
    z = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    points = reference_points(16, 8)
    assigned = soft_assign(z, points, 0.1)
    assert assigned.dtype == torch.float32
    expected = slow_assign(z.double().numpy(), points.double().numpy(), 0.1)
    np.testing.assert_allclose(assigned.numpy(), expected, atol=2e-6)


def test_autocast_and_reduced_matmul_precision_change_nothing():
    z = torch.randn(64, 512, generator=torch.Generator().manual_seed(2))
    points = reference_points(512, 50)
    plain = soft_assign(z, points, 0.02)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = soft_assign(z, points, 0.02)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert under.dtype == torch.float32
    assert torch.equal(plain, under)


def test_exact_float32_restores_the_precision_when_the_body_raises():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with pytest.raises(KeyError, match="boom"), exact_float32(torch.device("cpu")):
            raise KeyError("boom")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_vectors_without_direction_are_counted(bad):
    z = torch.ones(5, 4)
    z[1] = bad
    z[3] = bad
    with pytest.raises(RepresentationError, match="2 of 5 vectors"):
        soft_assign(z, reference_points(4, 3), 1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: reference_points(1, 3), ValueError, "dim: expected an integer of at least 2, got 1"),
        (lambda: reference_points(4, 1), ValueError, "num_bins: expected an integer of at least 2, got 1"),
        (lambda: reference_points(4.0, 3), TypeError, "dim: expected an integer of at least 2, got 4.0"),
        (lambda: reference_points(4, 3, seed=-1), ValueError, "seed: expected an integer of at least 0"),
        (lambda: soft_assign(torch.ones(2, 4), torch.ones(3, 5), 1.0), ValueError, r"expected \[num_bins, 4\]"),
        (lambda: soft_assign(torch.ones(2, 4).long(), torch.ones(3, 4), 1.0), TypeError, "floating-point"),
        (lambda: soft_assign(torch.ones(2, 4), torch.ones(3, 4), 0.0), ValueError, "above 0"),
        (lambda: soft_assign(torch.ones(2, 4), torch.ones(3, 4), True), TypeError, "temperature"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
