"""Where a noisy course turns from rising to falling, with a confidence interval and without a shape for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ib_callback.results.noise import scatter

Array = npt.NDArray[np.float64]

# Fewer values leave nothing from which noise could be told from a course.
MIN_VALUES = 6
# The fit may be worse than the best by so many variances of the noise. The 95 % quantile of chi-square with one degree
# of freedom is 3.84; a peak between two values that noise puts in the wrong order needs more, because courses that only
# rise and then fall follow the noise. Chosen by simulation (`benchmarks/turn_coverage.py`).
_WORSE = 10.0
# Autocorrelation of the noise that is assumed before the residuals have spoken, and how many values that counts for.
_ASSUMED, _WEIGHT, _MOST = 0.5, 10, 0.8


@dataclass(frozen=True)
class Peak:
    """The maximum of a course that rises and then falls, by positions among its values.

    Attributes:
        best: of the maximum of the best such course.
        first, last: of the first and the last value whose maximum would fit not significantly worse (about 95 %).
        noise: standard deviation of the noise, in the unit of the values.
    """

    best: int
    first: int
    last: int
    noise: float


def find_peak(values: Sequence[float] | Array, steps: Sequence[float]) -> Peak | None:
    """The peak of the best course that rises and then falls, and which other peaks the noise allows.

    For each value, the course nearest to all (least squares) that nowhere falls before it and nowhere rises after it:
    isotonic regression to either side, without any other shape (Frisén, The Statistician 35, 1986). The interval has
    those peaks whose sum of squares exceeds the least by at most 10 variances of the noise, times (1 + ρ) / (1 - ρ) for
    an autocorrelation ρ of the residuals, which is drawn towards .5 where there are few. The variance is the larger of
    that of the values about a smooth course (`ib_callback.results.noise.scatter`) and that of the residuals.

    Args:
        values: in the order of measuring.
        steps: at which they were measured, increasing.

    Returns:
        None for fewer than 6 values.

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
    # Of equally good ones, where the values themselves are highest.
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
    from scipy.optimize import isotonic_regression  # here, for it takes long to import

    rising, falling = y[:top], y[top + 1 :]
    rising = isotonic_regression(rising).x if top else rising
    falling = isotonic_regression(falling, increasing=False).x if len(falling) else falling
    # All others are at most the top, which is pooled with those that would be above it.
    highest, number = float(y[top]), 1
    for value in np.sort(np.concatenate([rising, falling]))[::-1]:
        if value <= highest:
            break
        highest, number = (highest * number + float(value)) / (number + 1), number + 1
    return np.concatenate([np.minimum(rising, highest), [highest], np.minimum(falling, highest)])
