"""Correlation with the step: coefficients against scipy, p-values by hand and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ib_callback.analysis.step_correlation import step_correlation


def test_coefficients_are_those_of_scipy():
    random = np.random.RandomState(0)
    x = np.arange(30.0)
    y = 0.1 * x + random.standard_normal(30)
    found = step_correlation(x, y)
    assert found.pearson == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert found.num_points == 30


def test_without_autocorrelation_the_p_value_is_that_of_scipy():
    x = np.arange(8.0)
    y = np.array([0, 3, 1, 4, 2, 6, 5, 7.0])  # its residuals alternate
    found = step_correlation(x, y)
    assert found.effective_points == 8
    assert found.pearson_p == pytest.approx(stats.pearsonr(x, y).pvalue, rel=1e-9)


def test_the_p_value_by_hand():
    x = np.arange(20.0)
    y = 0.2 * x + np.repeat([0.0, 1.0, -0.5, 1.5, -1.0, 0.5, 0.0, 1.0, -1.0, 0.5], 2)  # noise in blocks of two
    line = stats.linregress(x, y)
    rest = y - line.intercept - line.slope * x
    again = (rest[1:] @ rest[:-1]) / (rest @ rest)
    again += (2 + 4 * again) / 20
    effective = 20 * (1 - again) / (1 + again)
    t = line.rvalue * np.sqrt((effective - 2) / (1 - line.rvalue**2))
    found = step_correlation(x, y)
    assert found.effective_points == pytest.approx(effective, rel=1e-9)
    assert found.pearson_p == pytest.approx(2 * stats.t.sf(t, effective - 2), rel=1e-9)
    assert found.pearson_p > stats.pearsonr(x, y).pvalue


def test_a_known_correlation_is_found():
    random = np.random.RandomState(3)
    x = np.arange(2_000.0)
    standard = (x - x.mean()) / x.std()
    found = step_correlation(x, 0.6 * standard + 0.8 * random.standard_normal(2_000))
    assert found.pearson == pytest.approx(0.6, abs=0.03)
    assert found.pearson_p < 1e-10


@pytest.mark.parametrize(("correlation", "most"), [(0.0, 0.08), (0.5, 0.14)])
def test_no_trend_is_rarely_called_one(correlation, most):
    random = np.random.RandomState(4)
    alarms, naive = 0, 0
    for _ in range(200):
        noise = random.standard_normal(25)
        for i in range(1, 25):
            noise[i] = correlation * noise[i - 1] + np.sqrt(1 - correlation**2) * noise[i]
        p = step_correlation(range(25), noise).pearson_p
        alarms += p is not None and p < 0.05
        naive += stats.pearsonr(range(25), noise).pvalue < 0.05
    assert alarms <= most * 200
    if correlation:
        assert naive > 2 * alarms


@pytest.mark.parametrize(
    ("values", "points"), [([], 0), ([1.0, 2.0], 2), ([1.0, 1.0, 1.0, 1.0], 4), ([None, 1.0, None, 2.0, None], 2)]
)
def test_too_little_to_correlate(values, points):
    found = step_correlation(range(len(values)), values)
    assert (found.pearson, found.spearman, found.pearson_p, found.num_points) == (None, None, None, points)


def test_few_points_have_no_p_value():
    found = step_correlation([0, 1, 2, 3], [1.0, 2.0, 4.0, 3.0])
    assert found.pearson == pytest.approx(0.8)
    assert found.pearson_p is None
    # A bend counts as autocorrelation.
    bent = step_correlation(range(12), [i**3.0 for i in range(12)])
    assert bent.spearman == pytest.approx(1.0)
    assert bent.spearman_p == 0.0
    assert bent.effective_points < 12


def test_missing_values_are_left_out():
    x, y = [0, 1, 2, 3, 4, 5, 6], [5.0, None, 3.0, 3.5, None, 1.0, 0.0]
    kept = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
    assert step_correlation(x, y) == step_correlation(*zip(*kept, strict=True))
