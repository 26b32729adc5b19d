"""The peak of a noisy course: the fit against another solver, and the coverage of its interval."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from ib_callback.analysis.peak import _unimodal, find_peak


@pytest.mark.parametrize("top", [0, 2, 4, 6])
def test_the_course_of_each_top_is_the_nearest_one(top):
    y = np.random.RandomState(top).standard_normal(7)
    pairs = [(i, i + 1) if i < top else (i + 1, i) for i in range(6)]  # (lower, higher)
    rules = [{"type": "ineq", "fun": lambda v, low=low, high=high: v[high] - v[low]} for low, high in pairs]
    other = minimize(lambda v: ((v - y) ** 2).sum(), np.full(7, y.mean()), constraints=rules, method="SLSQP")
    assert np.allclose(_unimodal(y, top), other.x, atol=1e-4)
    assert ((_unimodal(y, top) - y) ** 2).sum() <= other.fun + 1e-9


def test_a_course_without_noise_has_its_own_peak():
    values = [0.1, 0.3, 0.5, 0.7, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]  # two lines
    found = find_peak(values, range(11))
    assert (found.best, found.first, found.last) == (4, 4, 4)
    assert found.noise == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("values", "place"), [(range(10), 9), (range(10, 0, -1), 0)])
def test_a_course_that_only_rises_or_falls_has_its_peak_at_the_end(values, place):
    assert find_peak([float(value) for value in values], range(10)).best == place


def test_too_few_values():
    assert find_peak([1.0, 2.0, 3.0, 2.0, 1.0], range(5)) is None


@pytest.mark.parametrize("correlation", [0.0, 0.5])
@pytest.mark.parametrize("size", [0.01, 0.03])
def test_the_interval_holds_the_known_turn(correlation, size):
    random = np.random.RandomState(1)
    at = np.linspace(0, 1, 24)
    held, widths = 0, []
    for _ in range(60):
        turn = random.uniform(0.25, 0.6)
        clean = 1 - np.where(at < turn, 0.6 * (turn - at), 0.2 * (at - turn))
        values = random.standard_normal(24)
        for i in range(1, 24):
            values[i] = correlation * values[i - 1] + np.sqrt(1 - correlation**2) * values[i]
        peak = find_peak(clean + size * values, at)
        low, high = at[max(peak.first - 1, 0)], at[min(peak.last + 1, 23)]
        held += low <= turn <= high
        widths.append(high - low)
    assert held >= 0.9 * 60
    assert np.median(widths) < (0.5 if size == 0.01 else 0.8)  # it says something


def test_more_noise_makes_it_wider():
    at, random = np.linspace(0, 1, 40), np.random.RandomState(2)
    noise, clean = random.standard_normal(40), 1 - np.abs(at - 0.5)
    found = [find_peak(clean + size * noise, at) for size in (0.002, 0.02, 0.1)]
    widths = [peak.last - peak.first for peak in found]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]
    assert [peak.noise for peak in found] == pytest.approx([0.002, 0.02, 0.1], rel=0.5)
