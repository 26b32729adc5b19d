"""Soft entropy and mutual information against the slow float64 twin of brute_force.py."""

from __future__ import annotations

import math
from typing import Any

import brute_force
import numpy as np
import pytest
import torch
from torch import Tensor

from ib_callback.common.errors import RepresentationError
from ib_callback.estimator.functional import soft_entropy, soft_mutual_information
from ib_callback.estimator.temperature import calibrated_temperature


def twin(
    z: Tensor, labels: Tensor, *, num_bins: int, seed: int, temperature: float, weighting: str = "empirical"
) -> tuple[float, float]:
    """H(Z) and I(X;Z) by the definitions, position by position, in float64."""
    points = brute_force.reference_points(z.shape[1], num_bins, seed)
    vectors = z.detach().double().numpy()
    assignments = np.stack([brute_force.soft_assignment(vector, points, temperature) for vector in vectors])
    return (
        brute_force.overall_entropy(assignments),
        brute_force.mutual_information(assignments, labels.tolist(), weighting),
    )


def sample(num: int, dim: int, num_labels: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Representations that lean on their label, and the labels."""
    rng = np.random.RandomState(seed)
    labels = rng.randint(0, num_labels, num)
    z = 0.7 * rng.standard_normal((num_labels, dim))[labels] + rng.standard_normal((num, dim))
    return torch.from_numpy(z).to(dtype), torch.from_numpy(labels)


@pytest.mark.parametrize("weighting", ["empirical", "uniform"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("dim", "num_bins", "seed"), [(3, 10, 0), (16, 100, 1), (64, 50, 7), (768, 100, 0)])
def test_agrees_with_the_twin_at_the_calibrated_temperature(
    dim: int, num_bins: int, seed: int, dtype: torch.dtype, tolerance: float, weighting: str
) -> None:
    # 1e-7 for float64: the reference points are float32 by definition, the twin's are not rounded.
    z, labels = sample(120, dim, 15, dtype)
    temperature = calibrated_temperature(dim, num_bins)
    entropy, information = twin(z, labels, num_bins=num_bins, seed=seed, temperature=temperature, weighting=weighting)
    assert information > 0.02
    assert float(soft_entropy(z, num_bins=num_bins, seed=seed)) == pytest.approx(entropy, abs=tolerance)
    got = soft_mutual_information(z, labels, num_bins=num_bins, seed=seed, weighting=weighting)
    assert float(got) == pytest.approx(information, abs=tolerance)


@pytest.mark.parametrize("num_labels", [2, 20, 200])
@pytest.mark.parametrize("spread", [math.inf, 1.0, 0.1, 0.03])
def test_temperature_one_at_dim_4096(spread: float, num_labels: int) -> None:
    """All entropies are within 1e-3 of 1 here; I must still be right to 1 % or 1e-9.

    A spread of infinity is isotropic; otherwise all vectors point the same way but for noise of that size.
    """
    rng = np.random.RandomState(5)
    common = 0.0 if math.isinf(spread) else rng.standard_normal(4096)
    noise = rng.standard_normal((300, 4096)) * min(spread, 1.0)
    z = torch.from_numpy(common + noise).float()
    labels = torch.from_numpy(rng.randint(0, num_labels, 300))
    entropy, information = twin(z, labels, num_bins=100, seed=0, temperature=1.0)
    assert entropy > 0.999
    got = float(soft_mutual_information(z, labels, temperature=1.0))
    assert abs(got - information) <= max(0.01 * information, 1e-9)
    # Better than the contract asks, and what keeps the smallest of these informations meaningful.
    assert abs(got - information) <= 1e-3 * information
    assert float(soft_entropy(z, temperature=1.0)) == pytest.approx(entropy, abs=1e-10)


def test_many_positions_do_not_drift_at_temperature_one() -> None:
    """All positions are alike, so I is 0; float32 running sums of 100,000 of them drift by over 1e-7."""
    z = torch.from_numpy(np.random.RandomState(0).standard_normal((1, 512))).float().repeat(100_000, 1)
    labels = (torch.arange(100_000) % 100 == 0).long()
    assert abs(float(soft_mutual_information(z, labels, temperature=1.0))) < 1e-12
    assert float(soft_entropy(z, temperature=1.0)) == pytest.approx(
        float(soft_entropy(z[:1], temperature=1.0)), abs=1e-8
    )


def test_entropy_of_one_position_is_that_of_its_assignment() -> None:
    z = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    expected, _ = twin(z, torch.zeros(1), num_bins=5, seed=0, temperature=0.3)
    assert float(soft_entropy(z, num_bins=5, temperature=0.3)) == pytest.approx(expected, abs=1e-7)
    assert float(soft_mutual_information(z, torch.tensor([9]), num_bins=5)) == 0.0


def test_a_label_for_each_position_attains_the_ceiling() -> None:
    z, _ = sample(40, 16, 4, torch.float64)
    alone = torch.stack([soft_entropy(row[None]) for row in z]).mean()
    got = soft_mutual_information(z, torch.arange(40))
    torch.testing.assert_close(got, soft_entropy(z) - alone, rtol=0, atol=1e-13)


def test_names_and_order_of_labels_do_not_matter() -> None:
    z, labels = sample(200, 16, 6, torch.float64)
    expected = soft_mutual_information(z, labels)
    names = torch.tensor([5, -3, 2**62, 0, -(2**63), 17])
    order = torch.from_numpy(np.random.RandomState(1).permutation(200))
    for other_z, other_labels in [(z, names[labels]), (z[order], labels[order])]:
        got = soft_mutual_information(other_z, other_labels)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint64])
def test_any_integer_dtype_labels(dtype: torch.dtype) -> None:
    z, labels = sample(50, 8, 5, torch.float32)
    assert torch.equal(soft_mutual_information(z, labels.to(dtype)), soft_mutual_information(z, labels))


def test_length_of_the_vectors_does_not_matter() -> None:
    z, labels = sample(50, 8, 5, torch.float64)
    lengths = torch.logspace(-6, 6, 50, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        soft_mutual_information(z * lengths, labels), soft_mutual_information(z, labels), rtol=0, atol=1e-12
    )


def test_uniform_weighting_is_the_empirical_one_when_labels_are_balanced() -> None:
    z, _ = sample(60, 8, 5, torch.float64)
    labels = torch.arange(60) % 6
    uniform = soft_mutual_information(z, labels, weighting="uniform")
    torch.testing.assert_close(uniform, soft_mutual_information(z, labels), rtol=0, atol=1e-13)


@pytest.mark.parametrize("temperature", ["calibrated", 1.0, 0.1, 1e-3])
@pytest.mark.parametrize("weighting", ["empirical", "uniform"])
def test_gradcheck(temperature: float | str, weighting: str) -> None:
    """At 1e-3 most assignments underflow to 0, which must not make a NaN."""
    z, labels = sample(12, 6, 3, torch.float64)
    z.requires_grad_()

    def information(z: Tensor) -> Tensor:
        return soft_mutual_information(z, labels, num_bins=20, temperature=temperature, weighting=weighting)

    assert torch.autograd.gradcheck(information, (z,))
    assert torch.autograd.gradcheck(lambda z: soft_entropy(z, num_bins=20, temperature=temperature), (z,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_gradients_are_finite_where_assignments_underflow(dtype: torch.dtype) -> None:
    z, labels = sample(30, 8, 4, dtype)
    z.requires_grad_()
    soft_mutual_information(z, labels, temperature=1e-5).backward()
    assert z.grad is not None
    assert z.grad.dtype == dtype
    assert bool(z.grad.isfinite().all())


def test_gradient_ascent_raises_the_information() -> None:
    z, labels = sample(60, 8, 3, torch.float32)
    before = float(soft_mutual_information(z, labels))
    for _ in range(20):
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(soft_mutual_information(z, labels), z)
        z = (z + 20 * gradient).detach()
    assert float(soft_mutual_information(z, labels)) > before + 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_result_is_a_float64_scalar_and_half_is_quantised_in_float32(dtype: torch.dtype) -> None:
    z, labels = sample(30, 8, 4, dtype)
    for got, expected in [
        (soft_entropy(z), soft_entropy(z.float())),
        (soft_mutual_information(z, labels), soft_mutual_information(z.float(), labels)),
    ]:
        assert got.shape == ()
        assert got.dtype == torch.float64
        assert torch.equal(got, expected) == (dtype != torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    z, labels = sample(100, 64, 10, dtype)
    plain = soft_entropy(z), soft_mutual_information(z, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = soft_entropy(z), soft_mutual_information(z, labels)
    assert torch.equal(plain[0], mixed[0])
    assert torch.equal(plain[1], mixed[1])


def test_repeats_bitwise() -> None:
    z, labels = sample(500, 64, 40, torch.float32)
    first, second = (soft_mutual_information(z, labels) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_vectors_without_direction_are_counted(value: float) -> None:
    z, labels = sample(30, 8, 4, torch.float32)
    z[[2, 5, 11]] = value
    with pytest.raises(RepresentationError, match=r"3 of 30 vectors"):
        soft_entropy(z)
    with pytest.raises(RepresentationError, match=r"3 of 30 vectors"):
        soft_mutual_information(z, labels)


BAD_Z: list[tuple[Any, type[Exception], str]] = [
    ([[1.0, 2.0]], TypeError, "z: expected a floating-point tensor .*, got list"),
    (torch.ones(3, 4, dtype=torch.int64), TypeError, r"got torch.int64. Make one with torch.as_tensor\(z\).float\(\)"),
    (torch.ones(3, 4, dtype=torch.complex64), TypeError, "got torch.complex64"),
    (torch.ones(4), ValueError, r"expected shape \[T, dim\] with T >= 1 and dim >= 2, got \(4,\)"),
    (torch.ones(2, 3, 4), ValueError, r"got \(2, 3, 4\). Flatten"),
    (torch.ones(0, 4), ValueError, r"T >= 1 and dim >= 2, got \(0, 4\)"),
    (torch.ones(4, 1), ValueError, r"T >= 1 and dim >= 2, got \(4, 1\)"),
]


@pytest.mark.parametrize(("z", "error", "match"), BAD_Z)
def test_bad_representations_are_refused(z: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        soft_entropy(z)
    with pytest.raises(error, match=match):
        soft_mutual_information(z, torch.zeros(3, dtype=torch.int64))


BAD_LABELS: list[tuple[Any, type[Exception], str]] = [
    ([0, 1, 2], TypeError, r"labels: expected an integer tensor \[3\], got list. Make one with"),
    (torch.zeros(3), TypeError, r"got torch.float32. Make one with torch.as_tensor\(labels\).long\(\)"),
    (torch.zeros(3, dtype=torch.bool), TypeError, r"got torch.bool. Make one"),
    (torch.zeros(4, dtype=torch.int64), ValueError, r"expected shape \(3,\), .* got \(4,\). Flatten both"),
    (torch.zeros(3, 1, dtype=torch.int64), ValueError, r"expected shape \(3,\), .* got \(3, 1\)"),
]


@pytest.mark.parametrize(("labels", "error", "match"), BAD_LABELS)
def test_bad_labels_are_refused(labels: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        soft_mutual_information(torch.ones(3, 4), labels)


def test_bad_settings_are_refused() -> None:
    z, labels = sample(10, 8, 2, torch.float32)
    with pytest.raises(ValueError, match='weighting: expected "empirical" or "uniform", got \'bayes\''):
        soft_mutual_information(z, labels, weighting="bayes")
    with pytest.raises(ValueError, match="num_bins"):
        soft_entropy(z, num_bins=1)
    with pytest.raises(TypeError, match="num_bins"):
        soft_mutual_information(z, labels, num_bins=10.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed"):
        soft_entropy(z, seed=-1)
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
        soft_mutual_information(z, labels, temperature=0.0)
