"""The calibrated temperature against arbitrary-precision Bessel functions."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest

from ib_callback.estimator.temperature import calibrated_temperature, kl_to_uniform

DIMS = (2, 3, 4, 5, 8, 16, 64, 100, 768, 4096, 65536)
NUM_BINS = (2, 10, 100, 1000, 65536)


def exact_kl(concentration: float | mpmath.mpf, dim: int) -> mpmath.mpf:
    """KL(vMF ‖ uniform) in 40 digits: k A(k) - log E[exp(k t)], with E[exp(k t)] = 0F1(; dim/2; k^2/4)."""
    with mpmath.workdps(40):
        k = mpmath.mpf(concentration)
        half = mpmath.mpf(dim) / 2
        generating = mpmath.hyp0f1(half, k**2 / 4)
        mean_cosine = k / dim * mpmath.hyp0f1(half + 1, k**2 / 4) / generating
        return k * mean_cosine - mpmath.log(generating)


def assert_solves(temperature: float, dim: int, num_bins: int, relative: float) -> None:
    """The divergence increases with the concentration, so a sign change brackets the exact temperature."""
    concentration = 1 / mpmath.mpf(temperature)
    target = mpmath.log(num_bins)
    assert exact_kl(concentration * (1 - relative), dim) < target
    assert exact_kl(concentration * (1 + relative), dim) > target


@pytest.mark.parametrize("num_bins", NUM_BINS)
@pytest.mark.parametrize("dim", DIMS)
def test_relative_error_is_below_one_in_a_million(dim: int, num_bins: int) -> None:
    assert_solves(calibrated_temperature(dim, num_bins), dim, num_bins, 1e-6)
    # What the docstring claims; the contract is the line above.
    assert_solves(calibrated_temperature(dim, num_bins), dim, num_bins, 1e-12)


def test_relative_error_at_scattered_settings() -> None:
    rng = np.random.RandomState(0)
    for _ in range(200):
        dim, num_bins = (int(2 * 2 ** rng.uniform(0, 15)) for _ in range(2))
        assert_solves(calibrated_temperature(dim, num_bins), dim, num_bins, 1e-12)


@pytest.mark.parametrize("dim", DIMS)
def test_kl_agrees_with_bessel_functions(dim: int) -> None:
    coldest = 1 / calibrated_temperature(dim, 65536)
    for fraction in (1e-6, 1e-3, 0.1, 0.5, 1.0):
        assert abs(kl_to_uniform(fraction * coldest, dim) - exact_kl(fraction * coldest, dim)) < 1e-11


def test_kl_of_zero_concentration_is_zero() -> None:
    for dim in DIMS:
        assert kl_to_uniform(0.0, dim) == 0.0


def test_kl_on_the_ordinary_sphere_has_a_closed_form() -> None:
    for k in (0.5, 3.0, 50.0):
        expected = k / math.tanh(k) - 1 - math.log(math.sinh(k) / k)
        assert kl_to_uniform(k, 3) == pytest.approx(expected, abs=1e-12)


def test_temperature_falls_with_bins_and_with_dimension() -> None:
    by_bins = [calibrated_temperature(64, n) for n in (2, 3, 10, 100, 10_000)]
    by_dim = [calibrated_temperature(d, 100) for d in (16, 64, 256, 4096)]
    assert by_bins == sorted(by_bins, reverse=True)
    assert by_dim == sorted(by_dim, reverse=True)


def test_large_dimension_limit() -> None:
    """KL tends to k^2 / (2 dim), so the temperature tends to 1 / sqrt(2 dim log n)."""
    limit = 1 / math.sqrt(2 * 65536 * math.log(2))
    assert calibrated_temperature(65536, 2) == pytest.approx(limit, rel=1e-4)


def test_integer_types_of_numpy_are_taken_and_the_result_is_a_float() -> None:
    temperature = calibrated_temperature(np.int64(64), np.int32(100))  # type: ignore[arg-type]
    assert type(temperature) is float
    assert temperature == calibrated_temperature(64)


@pytest.mark.parametrize("value", [True, np.bool_(True)])
def test_bools_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match=r"dim: expected an integer of at least 2, got (np\.)?True_? \(bool_?\)"):
        calibrated_temperature(value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"num_bins: expected an integer of at least 2, got (np\.)?True_? \(bool_?\)"):
        calibrated_temperature(8, value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [8.0, "8", None, math.nan])
def test_non_integers_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match=r"dim: expected an integer .* \(\w+\); cosines"):
        calibrated_temperature(value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"num_bins: expected an integer .* \(\w+\); 100 is"):
        calibrated_temperature(8, value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1, 0, -3])
def test_numbers_under_two_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match=f"dim: expected an integer of at least 2, got {value}; cosines"):
        calibrated_temperature(value)
    with pytest.raises(ValueError, match=f"num_bins: expected an integer of at least 2, got {value};"):
        calibrated_temperature(8, value)
