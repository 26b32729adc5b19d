"""Find where a noisy course turns from rising to falling, with a confidence interval, without assuming a shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ib_callback.results.noise import scatter

Array = npt.NDArray[np.float64]

# With fewer values, noise cannot be separated from the course.
MIN_VALUES = 6
# A peak is in the interval if its fit is worse than the best by at most this many variances of the noise. The 95 %
# quantile of chi-square with one degree of freedom is 3.84. A larger value is needed, because the fitted curve follows
# the noise: noise can put two values in the wrong order. The value was chosen by simulation
# (`benchmarks/turn_coverage.py`).
_WORSE = 10.0
# Autocorrelation of the noise that is assumed in advance, and the number of values that this assumption counts for.
_ASSUMED, _WEIGHT, _MOST = 0.5, 10, 0.8


@dataclass(frozen=True)
class Peak:
    """The maximum of a course that rises and then falls, as positions among its values.

    Attributes:
        best: position of the maximum of the best fit.
        first, last: positions of the first and the last value that could be the maximum, with about 95 % confidence: a
            fit with that maximum is not significantly worse than the best one.
        noise: standard deviation of the noise, in the unit of the values.
    """

    best: int
    first: int
    last: int
    noise: float


def find_peak(values: Sequence[float] | Array, steps: Sequence[float]) -> Peak | None:
    """The peak of the best course that rises and then falls, and the range of peaks that the noise allows.

    The function takes each value in turn as the peak. It fits the nearest course (least squares) that never falls
    before the peak and never rises after it. This is isotonic regression on both sides, without any other assumption
    about the shape (Frisén, The Statistician 35, 1986).

    The interval contains the peaks whose sum of squares exceeds the smallest one by at most 10 variances of the noise,
    times (1 + ρ) / (1 - ρ). Here ρ is the autocorrelation of the residuals. With few residuals, it is drawn towards .5.
    The variance is the larger of two: that of the values around a smooth course
    (`ib_callback.results.noise.scatter`), and that of the residuals.

    Args:
        values: values in the order of measuring.
        steps: steps of the measurements, increasing.

    Returns:
        The peak; None for fewer than 6 values.

    >>> peak = find_peak([1.0, 2.0, 3.0, 4.0, 3.5, 3.0, 2.5, 2.0], range(8))
    >>> peak.best, peak.first, peak.last
    (3, 3, 3)
    """
    y = np.asarray(values, dtype=np.float64)
    if len(y) < MIN_VALUES:
        return None
    fits = [_unimodal(y, top) for top in range(len(y))]
    squares = np.array([float(((y - fit) ** 2).sum()) for fit in fits])
    best = int(squares.argmin())
    # If several peaks fit equally well, take the one with the highest value.
    equal = np.flatnonzero(squares <= squares[best] * (1 + 1e-9) + 1e-300)
    best = int(equal[y[equal].argmax()])
    residuals = y - fits[best]
    free = max(len(y) - len(np.unique(fits[best])), len(y) / 3)
    noise = max(scatter(y.tolist(), list(steps)) or 0.0, float(np.sqrt(squares[best] / free)))
    correlation = float(residuals[1:] @ residuals[:-1]) / squares[best] if squares[best] > 0 else 0.0
    correlation = float(np.clip((len(y) * correlation + _WEIGHT * _ASSUMED) / (len(y) + _WEIGHT), 0.0, _MOST))
    allowed = squares[best] + _WORSE * noise**2 * (1 + correlation) / (1 - correlation)
    inside = np.flatnonzero(squares <= allowed)
    return Peak(best=best, first=int(inside[0]), last=int(inside[-1]), noise=noise)


def _unimodal(y: Array, top: int) -> Array:
    """The nearest course that rises up to a value and falls after it."""
    from scipy.optimize import isotonic_regression  # imported here, because it takes long

    rising, falling = y[:top], y[top + 1 :]
    rising = isotonic_regression(rising).x if top else rising
    falling = isotonic_regression(falling, increasing=False).x if len(falling) else falling
    # No value of the course may exceed the top. The top is pooled with values that would be above it.
    highest, number = float(y[top]), 1
    for value in np.sort(np.concatenate([rising, falling]))[::-1]:
        if value <= highest:
            break
        highest, number = (highest * number + float(value)) / (number + 1), number + 1
    return np.concatenate([np.minimum(rising, highest), [highest], np.minimum(falling, highest)])
