"""Correlations of the metrics of a run, with each other or with scores from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ib_callback.results.measurement import Measurement, metrics_of, warn_of_other_tokenizers
from ib_callback.results.metrics import PRIMARY_SCALARS

SCORE = "score"
MIN_POINTS = 3


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Correlation coefficients in [-1, 1] over the points at which both numbers are defined.

    Neighbouring points of one run are not independent. So these numbers describe a run, but prove nothing.

    Attributes:
        pearson: correlation of the values; None for fewer than 3 points, or if one number does not vary.
        spearman: correlation of the ranks, with ties averaged; None in the same cases.
        num_points: number of points.
    """

    pearson: float | None
    spearman: float | None
    num_points: int


def correlations(
    measurements: Iterable[Measurement], scores: Mapping[int, float] | None = None
) -> dict[tuple[str, str], Correlation]:
    """Correlations between numbers over the points of a run.

    Published work correlates optimality and similar numbers with benchmark scores, over models and over checkpoints
    ("Conklin et al., ICLR 2026"; "Conklin 2025"). Points of the collapse dominate a correlation. Leave them out, as
    `Trajectory.correlations` does by default.

    Args:
        measurements: the points to use; points that could not be measured are left out.
        scores: {step: score}, such as the loss or the result of a benchmark. A score that is None or absent is unknown.

    Returns:
        {(name, name): correlation}. With scores: every metric with `"score"`. Without scores: every pair of numbers
        among the training step, the metrics of the primary order, the entropy and the information about each feature.

    Raises:
        TypeError: `scores` does not map steps to numbers.
    """
    known = None if scores is None else _by_step(scores)
    points = [m for m in measurements if m.error is None]
    warn_of_other_tokenizers(points)
    columns: dict[str, list[float | None]] = {}
    for name in dict.fromkeys(name for m in points for name in metrics_of(m)):
        columns[name] = [m.scalars().get(name) for m in points]
    if known is not None:
        by_step = [None if m.step is None else known.get(m.step) for m in points]
        return {(name, SCORE): correlation(values, by_step) for name, values in columns.items()}
    main = [name for name in columns if name in (*PRIMARY_SCALARS, "entropy") or name.endswith("/information")]
    columns["step"] = [m.step for m in points]
    return {(a, b): correlation(columns[a], columns[b]) for a, b in combinations(["step", *main], 2)}


def _by_step(scores: Any) -> dict[int, float | None]:
    """Accept a mapping of numbers to numbers, or a series of pandas; anything else is a TypeError."""
    cure = "Pass {step: score}. If you have a list with one score for each point: dict(zip(trajectory.steps, scores))."
    if not hasattr(scores, "items"):
        raise TypeError(f"scores: expected a number by step, got {type(scores).__name__} {scores!r:.80}. {cure}")
    found = {}
    for step, score in scores.items():
        try:
            if isinstance(step, str) or isinstance(score, str):
                raise TypeError
            found[int(step)] = None if score is None else float(score)
        except (TypeError, ValueError, OverflowError):
            raise TypeError(
                f"scores: expected a number by step, got {score!r:.80} at step {step!r:.80}. {cure}"
            ) from None
    return found


def correlation(x: Iterable[float | None], y: Iterable[float | None]) -> Correlation:
    """The correlation of two lists of equal length; pairs with a None are left out.

    >>> correlation([1, 2, 3, None, 5], [1, 4, 9, 16, 25]).spearman
    1.0
    """
    from scipy import stats  # imported here, because it takes as long to import as everything else together

    pairs = [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None]
    first, second = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    if len(pairs) < MIN_POINTS or np.ptp(first) == 0 or np.ptp(second) == 0:
        return Correlation(pearson=None, spearman=None, num_points=len(pairs))
    pearson, spearman = (float(find(first, second).statistic) for find in (stats.pearsonr, stats.spearmanr))
    return Correlation(pearson=pearson, spearman=spearman, num_points=len(pairs))
