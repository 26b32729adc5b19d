"""Test whether the end of a noisy curve falls: a generalised likelihood-ratio test of slopes over all suffixes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr

Array = npt.NDArray[np.float64]

# A line through fewer values leaves too little to estimate its noise.
MIN_VALUES = 6
# Autocorrelation of the noise that is assumed in advance, and the number of values that this assumption counts for. It
# is needed because few residuals say little about the autocorrelation, and always underestimate it.
_ASSUMED, _WEIGHT = 0.5, 10
_MOST = 0.8
# Suffixes grow by this factor, because two that share nearly all of their values say the same.
_GROWTH = 1.25


@dataclass(frozen=True)
class Fall:
    """A fall of the last values of a curve.

    Attributes:
        length: number of values in the fall.
        start, end: first and last value of the line through them, in the unit of the values.
        evidence: −log10 of the p-value for the hypothesis that the slope is not negative.
    """

    length: int
    start: float
    end: float
    evidence: float


def find_fall(values: Sequence[float]) -> Fall | None:
    """The clearest fall at the end of a curve, over all suffixes of its values; None if no fall is clear.

    A line is fitted to each suffix of at least 6 values, and its slope is tested with Student's t. The standard error
    takes the autocorrelation ρ of the noise into account: its square is multiplied by (1 + ρ) / (1 − ρ). ρ is estimated
    from the residuals, corrected for their number, and drawn towards 0.5, which is assumed for short suffixes.

    A fall is clear if its evidence reaches `needed`. `benchmarks/phase_power.py` prints the resulting power and false
    alarms.

    Args:
        values: values in the order of measuring.

    >>> find_fall([1.0] * 20) is None
    True
    >>> round(find_fall([1.0, 1.01, 0.99, 0.96, 0.95, 0.93, 0.9, 0.89, 0.87]).end, 2)
    0.87
    """
    falls = [line(values[-length:]) for length in lengths(len(values))]
    best = max(falls, key=lambda fall: fall.evidence, default=None)
    return best if best is not None and best.evidence > needed(len(values)) else None


def needed(number: int) -> float:
    """The evidence that a fall needs to be clear, for a curve of `number` values.

    The p-value must be under 1 / (2 number³), because the test is repeated after each value, over ever more suffixes.
    This was chosen by simulation: false alarms in at most 2 % of runs of 15 to 200 points, also with an autocorrelation
    of .5.
    """
    return 3 * math.log10(number) + 0.3


def line(values: Sequence[float]) -> Fall:
    """The line through at least 3 values, as a fall."""
    start, end, evidence = lines(np.asarray(values, dtype=np.float64))
    return Fall(len(values), float(start), float(end), float(evidence))


def lines(values: Array) -> tuple[Array, Array, Array]:
    """Lines through curves: first and last value of each line, and the evidence that it falls, 0 if it does not.

    Args:
        values: [..., n], curves of at least 3 values.
    """
    number = values.shape[-1]
    x = np.arange(number) - (number - 1) / 2
    spread = float(x @ x)
    slope = values @ x / spread
    mean = values.mean(axis=-1)
    rest = values - mean[..., None] - slope[..., None] * x
    # Rounding errors count neither as noise nor as a slope.
    size = np.abs(values).max(axis=-1) + 1e-300
    squares = np.maximum((rest**2).sum(axis=-1), number * (1e-12 * size) ** 2)
    correlation = (rest[..., 1:] * rest[..., :-1]).sum(axis=-1) / squares
    # Residuals of a line have a lower autocorrelation than the noise.
    correlation = correlation + (2 + 4 * np.clip(correlation, 0.0, 1.0)) / number
    correlation = np.clip((number * correlation + _WEIGHT * _ASSUMED) / (number + _WEIGHT), 0.0, _MOST)
    error = np.sqrt(squares / max(number - 2, 1) / spread * (1 + correlation) / (1 - correlation))
    evidence = -np.log10(np.maximum(stdtr(max(number - 2, 1), slope / error), 1e-300))
    falls = -slope * number > 1e-9 * size
    half = slope * (number - 1) / 2
    return mean - half, mean + half, np.where(falls, evidence, 0.0)


def lengths(number: int) -> Iterator[int]:
    """Lengths of the suffixes that are tested, for a curve of `number` values."""
    length = MIN_VALUES
    while length <= number:
        yield length
        length = max(length + 1, round(_GROWTH * length))
