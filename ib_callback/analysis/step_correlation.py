"""Correlation of a number with the training step, with p-values for points that are not independent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ib_callback.results.correlation import correlation

Array = npt.NDArray[np.float64]

# Fewer points leave too few residuals to estimate autocorrelation.
MIN_POINTS = 5
# Upper limit of the autocorrelation; with a higher value, almost no effective points would be left.
_MOST = 0.95


@dataclass(frozen=True, kw_only=True)
class StepCorrelation:
    """Correlation of a number with the training step over some points of one run.

    Attributes:
        pearson: r, in [-1, 1]; None for fewer than 3 points, or if the number does not vary.
        pearson_p: two-sided p-value of r; None for fewer than 5 points, or fewer than 3 effective ones.
        spearman: ρ, the correlation of the ranks; None in the same cases as `pearson`.
        spearman_p: p-value of ρ; None in the same cases as `pearson_p`.
        num_points: number of points n.
        effective_points: the number of independent points that would say as much about r, at most n.
    """

    pearson: float | None
    pearson_p: float | None
    spearman: float | None
    spearman_p: float | None
    num_points: int
    effective_points: float | None


def step_correlation(steps: Iterable[float | None], values: Iterable[float | None]) -> StepCorrelation:
    """Correlate values with steps. Pairs in which one of the two is None are left out.

    Successive points of a run are similar beyond their trend, so n points say less than n independent ones. The
    p-values come from Student's t with the effective number of points n (1 - a) / (1 + a) in place of n (Santer et al.,
    Journal of Geophysical Research 105, 2000). Here a is the autocorrelation, from each point to the next, of the
    residuals of a straight line in the step. Residuals underestimate it by about (2 + 4 a) / n, which is added. For ρ
    the same is done with the ranks. A bend counts as autocorrelation, so a trend that is not a straight line has a
    larger p-value.

    Args:
        steps: steps in the order of measuring; tokens, or logarithms of either, are possible too.
        values: the value at each step.

    >>> found = step_correlation([0, 1, 2, 3, 4, 5, 6, 7], [0, 3, 1, 4, 2, 6, 5, 7])
    >>> round(found.pearson, 3), found.effective_points
    (0.857, 8.0)
    """
    pairs = [(a, b) for a, b in zip(steps, values, strict=True) if a is not None and b is not None]
    x, y = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    found = correlation(x.tolist(), y.tolist())
    if found.pearson is None or found.spearman is None:
        return StepCorrelation(
            pearson=None, pearson_p=None, spearman=None, spearman_p=None, num_points=len(pairs), effective_points=None
        )
    from scipy.stats import rankdata  # imported here, because it takes long

    effective = _effective_points(x, y)
    of_ranks = _effective_points(rankdata(x), rankdata(y))
    return StepCorrelation(
        pearson=found.pearson,
        pearson_p=_p_value(found.pearson, effective, len(pairs)),
        spearman=found.spearman,
        spearman_p=_p_value(found.spearman, of_ranks, len(pairs)),
        num_points=len(pairs),
        effective_points=effective,
    )


def _effective_points(x: Array, y: Array) -> float:
    number, x, y = len(x), x - x.mean(), y - y.mean()
    rest = y - x * float(x @ y) / float(x @ x)
    squares = float(rest @ rest)
    if squares <= number * (1e-12 * float(np.abs(y).max())) ** 2:  # rounding errors do not count as noise
        return float(number)
    again = float(rest[1:] @ rest[:-1]) / squares
    again = float(np.clip(again + (2 + 4 * max(again, 0.0)) / number, 0.0, _MOST))
    return number * (1 - again) / (1 + again)


def _p_value(coefficient: float, effective: float, number: int) -> float | None:
    from scipy.special import stdtr

    if number < MIN_POINTS or effective < 3:
        return None
    if abs(coefficient) >= 1:
        return 0.0
    t = abs(coefficient) * np.sqrt((effective - 2) / (1 - coefficient**2))
    return 2 * float(stdtr(effective - 2, -t))
