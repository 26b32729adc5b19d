"""How a number is held against a loss: rank correlation, pairs ordered rightly, nats lost by choosing with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import rankdata

# Losses closer than this, in nats a token, are not ordered.
APART = 0.02


def filled(values: Sequence[float | None], direction: int) -> np.ndarray:
    """Values [P] as float64; an undefined one counts as worse than every other.

    direction: +1 where more is better, -1 where less is.
    """
    table = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    table[~np.isfinite(table)] = -np.inf * direction
    return table


def spearman(values: np.ndarray, loss: np.ndarray) -> float:
    """Spearman's rank correlation of two columns [P]; NaN where one is constant."""
    a, b = (rankdata(column) for column in (values, loss))
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def pairs_right(values: np.ndarray, loss: np.ndarray, direction: int, apart: float = APART) -> tuple[float, int]:
    """Share of pairs of points over `apart` nats apart of which the better has the better value, and their number.

    Equal values count as half right. NaN where there is no such pair.
    """
    right = [
        0.5 if values[i] == values[j] else float(direction * (values[i] - values[j]) * (loss[i] - loss[j]) < 0)
        for i, j in itertools.combinations(range(len(loss)), 2)
        if abs(loss[i] - loss[j]) > apart
    ]
    return (float(np.mean(right)) if right else float("nan")), len(right)


def nats_lost(values: np.ndarray, loss: np.ndarray, direction: int) -> float:
    """Loss at the point with the best value (the first of equal ones) minus the lowest loss."""
    return float(loss[int(np.argmax(direction * values))] - loss.min())


def partial_spearman(values: np.ndarray, target: np.ndarray, given: np.ndarray) -> float:
    """Rank correlation of values and target [P] with the linear part of the ranks of `given` taken out of both.

    NaN where nothing is left of one of them, as where it is a function of `given` but for rounding.
    """
    ranks = [rankdata(column) for column in (values, target, given)]
    base = np.stack([np.ones(len(given)), ranks[2]], axis=1)
    left = [column - base @ np.linalg.lstsq(base, column, rcond=None)[0] for column in ranks[:2]]
    size = [float(np.linalg.norm(column)) for column in left]
    if min(size) < 1e-9 * len(given):
        return float("nan")
    return float(left[0] @ left[1] / (size[0] * size[1]))


def interval_over_runs(
    of_runs: Sequence[float], statistic: Callable[[np.ndarray], float] = np.mean, *, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval (percentiles) of a statistic over runs, each run a unit; NaN with fewer than two runs."""
    known = np.array([value for value in of_runs if np.isfinite(value)])
    if len(known) < 2:
        return float("nan"), float("nan")
    draws = np.random.RandomState(seed).randint(len(known), size=(4000, len(known)))
    found = np.array([statistic(known[draw]) for draw in draws])
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
