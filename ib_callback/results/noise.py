"""Estimate the noise of a curve from its own points: their scatter around a smooth course."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Fewer values give too few differences for a meaningful median.
MIN_VALUES = 8
# Median of |x| of a standard normal.
_NORMAL_MEDIAN = 0.6744897501960817


def scatter(values: Sequence[float], steps: Sequence[float]) -> float | None:
    """Standard deviation of the noise in the values of a curve, robust to trend, bends and outliers.

    For every four successive points, it computes their distance from a parabola (their third divided difference,
    normalised so that independent noise of standard deviation 1 gives 1). The estimate is the median of the absolute
    values, scaled as for Gaussian noise. The parabola is in the step or in the number of the point, whichever fits
    better, because curves measured on a logarithmic schedule are smooth in the latter. Noise that successive points
    share is not detected, so the estimate is a lower limit.

    Args:
        values: values in the order of measuring.
        steps: steps of the measurements, increasing.

    Returns:
        The standard deviation in the unit of the values; None for fewer than 8 values.

    >>> scatter([0.0, 0.1, 0.4, 0.9, 1.6, 2.5, 3.6, 4.9], range(0, 800, 100))  # a parabola
    0.0
    """
    if len(values) < MIN_VALUES:
        return None
    y = np.asarray(values, dtype=np.float64)
    deviation = min(_deviation(y, np.asarray(x, dtype=np.float64)) for x in (steps, range(len(y))))
    # Rounding errors do not count as noise.
    return deviation if deviation > 1e-12 * float(np.max(np.abs(y))) else 0.0


def _deviation(y: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> float:
    y, x = (np.lib.stride_tricks.sliding_window_view(values, 4) for values in (y, x))
    x = (x - x[:, :1]) / (x[:, 3:] - x[:, :1])
    weights = 1.0 / (x[:, :, None] - x[:, None, :] + np.eye(4)).prod(axis=2)
    residuals = (weights * y).sum(axis=1) / np.sqrt((weights**2).sum(axis=1))
    return float(np.median(np.abs(residuals))) / _NORMAL_MEDIAN
