"""Whether the last stretch of a noisy curve falls: a generalised likelihood-ratio test of slopes over all suffixes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr

Array = npt.NDArray[np.float64]

# A line through fewer values leaves nothing from which its noise could be estimated.
MIN_VALUES = 6
# Autocorrelation of the noise that is assumed before the residuals have spoken, and how many values that counts for:
# few residuals say little, and always too little of it.
_ASSUMED, _WEIGHT = 0.5, 10
_MOST = 0.8
# Suffixes grow by this factor, for two that share nearly all of their values say the same.
_GROWTH = 1.25


@dataclass(frozen=True)
class Fall:
    """A fall of the last values of a curve.

    Attributes:
        length: number of values in it.
        start, end: of the line through them, in the unit of the values.
        evidence: −log10 of the p-value of a slope that is not negative.
    """

    length: int
    start: float
    end: float
    evidence: float


def find_fall(values: Sequence[float]) -> Fall | None:
    """The fall of the last values that is surest of all suffixes; None if none of them is sure.

    Each suffix of at least 6 values is fitted by a line, and its slope tested by Student's t. The standard error
    takes autocorrelation ρ of the noise into account: its square is multiplied by (1 + ρ) / (1 − ρ), with ρ estimated
    from the residuals (corrected for their number, and drawn towards 0.5, which is assumed of short ones).

    It is sure if the p-value is under what `needed` says. `benchmarks/phase_power.py` prints the power and the false
    alarms that result.

    Args:
        values: in the order of measuring.

    >>> find_fall([1.0] * 20) is None
    True
    >>> round(find_fall([1.0, 1.01, 0.99, 0.96, 0.95, 0.93, 0.9, 0.89, 0.87]).end, 2)
    0.87
    """
    falls = [line(values[-length:]) for length in lengths(len(values))]
    best = max(falls, key=lambda fall: fall.evidence, default=None)
    return best if best is not None and best.evidence > needed(len(values)) else None


def needed(number: int) -> float:
    """The evidence that makes a fall sure among so many values.

    Its p-value is under 1 / (2 number³): the more values, the more suffixes have been looked at by whoever asks after
    each value anew. Chosen by simulation: false alarms in at most 2 % of runs of 15 to 200 points, with an
    autocorrelation of .5 too.
    """
    return 3 * math.log10(number) + 0.3


def line(values: Sequence[float]) -> Fall:
    """The line through values, at least 3, as a fall."""
    start, end, evidence = lines(np.asarray(values, dtype=np.float64))
    return Fall(len(values), float(start), float(end), float(evidence))


def lines(values: Array) -> tuple[Array, Array, Array]:
    """Lines through curves: first and last value of each, and the evidence that it falls, 0 where it does not.

    Args:
        values: [..., values of a curve], at least 3.
    """
    number = values.shape[-1]
    x = np.arange(number) - (number - 1) / 2
    spread = float(x @ x)
    slope = values @ x / spread
    mean = values.mean(axis=-1)
    rest = values - mean[..., None] - slope[..., None] * x
    # What rounding leaves is no noise, and no slope.
    size = np.abs(values).max(axis=-1) + 1e-300
    squares = np.maximum((rest**2).sum(axis=-1), number * (1e-12 * size) ** 2)
    correlation = (rest[..., 1:] * rest[..., :-1]).sum(axis=-1) / squares
    # Residuals of a line have less of it than the noise.
    correlation = correlation + (2 + 4 * np.clip(correlation, 0.0, 1.0)) / number
    correlation = np.clip((number * correlation + _WEIGHT * _ASSUMED) / (number + _WEIGHT), 0.0, _MOST)
    error = np.sqrt(squares / max(number - 2, 1) / spread * (1 + correlation) / (1 - correlation))
    evidence = -np.log10(np.maximum(stdtr(max(number - 2, 1), slope / error), 1e-300))
    falls = -slope * number > 1e-9 * size
    half = slope * (number - 1) / 2
    return mean - half, mean + half, np.where(falls, evidence, 0.0)


def lengths(number: int) -> Iterator[int]:
    """Of the suffixes that are looked at, of so many values."""
    length = MIN_VALUES
    while length <= number:
        yield length
        length = max(length + 1, round(_GROWTH * length))
