"""Standard errors from leaving out one group of sequences at a time: the delete-a-group jackknife.

Sequences are independent draws of text, positions within one are not, so groups of sequences are what is left out.
With θ the statistic, θ(g) its value without group g, θ(g, h) without two, G groups in all (Efron and Stein, "The
jackknife estimate of variance", 1981):

    V = (G − 1)/G Σ_g (θ(g) − mean of θ(g))²,      standard error² = V − B

V counts what pairs of groups contribute together twice: for an information near zero, or near its null, V is twice the
variance. That excess is B = ½ ((G − 2)/G)² var Q, Q(g, h) = G θ − (G − 1)(θ(g) + θ(h)) + (G − 2) θ(g, h), estimated
from the G − 1 pairs of neighbours; B is at most V/2.

The error covers how far the statistic would move with another probe of the same size from the same source: that of
its *expected value at this probe size*. What finite sampling adds to that expected value itself is the null's
business. There are about G − 1 degrees of freedom, so intervals take Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from ib_callback.results.points import NEGLIGIBLE, PlanePoint

Array = npt.NDArray[np.float64]
# Groups where the user does not say how many: t is then 2.13 for 95 %, and half the groups would make it 2.36.
NUM_GROUPS = 16


def jackknife_error(value: float, omitted: Sequence[float] | Array) -> float:
    """Standard error of a statistic, in its unit.

    Args:
        value: of the whole probe.
        omitted: [2 G - 1] values without each group, then without each two neighbouring groups. With fewer than 4
            groups the pairs are not used.

    >>> jackknife_error(2.0, [1.0, 2.0, 3.0, 2.0, 2.0])
    1.1547005383792515
    """
    values = np.asarray(omitted, dtype=np.float64)
    number = num_groups(values)
    one, two = values[:number], values[number:]
    variance = (number - 1) * one.var()
    if number >= 4:
        together = number * value - (number - 1) * (one[:-1] + one[1:]) + (number - 2) * two
        excess = 0.5 * ((number - 2) / number) ** 2 * together.var(ddof=1)
        variance = max(variance - excess, variance / 2)
    return float(np.sqrt(variance))


def num_groups(omitted: Sequence[float] | Array) -> int:
    """G, from the number of omissions."""
    return (len(omitted) + 1) // 2


def interval_factor(num_groups: int, level: float = 0.95) -> float:
    """Standard errors on either side of an estimate that cover its expected value with probability `level`.

    >>> round(interval_factor(16), 2)
    2.13
    """
    return float(stdtrit(num_groups - 1, (1 + level) / 2))


# What each number with a standard error is, of complexity and expressivity, or of both less their nulls.
FORMULAS: dict[str, Callable[[Array, Array], Array]] = {
    "complexity": lambda complexity, expressivity: complexity,
    "expressivity": lambda complexity, expressivity: expressivity,
    "optimality": lambda complexity, expressivity: expressivity / complexity,
    "distance_to_bound": lambda complexity, expressivity: complexity - expressivity,
}
ABOVE_NULL = {
    "complexity_above_null": "complexity",
    "expressivity_above_null": "expressivity",
    "optimality_above_null": "optimality",
    "distance_above_null": "distance_to_bound",
}


def replicates_of(point: PlanePoint, metric: str) -> Array | None:
    """[2 G - 1] values of a number of `point` without each omission; None where they are not known.

    Raises:
        ValueError: there are no replicates of such a number.
    """
    formula = FORMULAS.get(ABOVE_NULL.get(metric, metric))
    if formula is None:
        raise ValueError(f"metric: expected one of {', '.join([*FORMULAS, *ABOVE_NULL])}, got {metric!r}")
    complexity, expressivity = np.array(point.complexity_jackknife), np.array(point.expressivity_jackknife)
    if not len(complexity) or getattr(point, metric) is None:
        return None
    if metric in ABOVE_NULL:
        complexity = complexity - np.array(point.complexity_null_jackknife)
        expressivity = expressivity - np.array(point.expressivity_null_jackknife)
    if metric == "distance_to_bound" and not _is_diagonal(point):
        return None  # see `with_bound_error`
    if formula is FORMULAS["optimality"] and (np.abs(complexity) < NEGLIGIBLE).any():
        return None
    return formula(complexity, expressivity)


def _is_diagonal(point: PlanePoint) -> bool:
    """Whether the diagonal is what a measured point has its distance to."""
    values = point.complexity, point.expressivity, point.distance_to_bound
    complexity, expressivity, distance = (math.nan if value is None else value for value in values)
    return abs(complexity - expressivity - distance) < 1e-9


def with_bound_error(point: PlanePoint, bound: Callable[[float], float] | None) -> PlanePoint:
    """The point with the standard error of its distance to another bound than the diagonal, a curve taken as given.

    The curve of the sample moves with the probe too, so that this is an error for comparing models on one probe.

    Args:
        point: with replicates and with its distance to that bound.
        bound: the highest expressivity at a complexity, in the unit of the point; None: there is none.
    """
    error = None
    if bound is not None and point.distance_to_bound is not None and point.complexity_jackknife:
        highest = np.array([float(bound(value)) for value in point.complexity_jackknife])
        error = jackknife_error(point.distance_to_bound, highest - point.expressivity_jackknife)
    return replace(point, distance_to_bound_se=error)


def null_gradient(point: PlanePoint, metric: str) -> tuple[float, float]:
    """How much a number above null changes with the nulls of complexity and expressivity."""
    if metric == "complexity_above_null":
        return -1.0, 0.0
    if metric == "expressivity_above_null":
        return 0.0, -1.0
    if metric == "distance_above_null":
        return -1.0, 1.0
    if metric == "optimality_above_null" and point.complexity_above_null and point.optimality_above_null is not None:
        return point.optimality_above_null / point.complexity_above_null, -1.0 / point.complexity_above_null
    return 0.0, 0.0


def with_errors(point: PlanePoint, null_error: Callable[[float, float], float]) -> PlanePoint:
    """The point with the standard errors of its numbers, from its replicates.

    Args:
        point: with replicates.
        null_error: standard error of a linear combination of the nulls of complexity and expressivity, which
            random subsets estimate; it is independent of the choice of sequences and adds in quadrature.
    """
    errors: dict[str, Any] = {}
    for metric in (*FORMULAS, *ABOVE_NULL):
        values = replicates_of(point, metric)
        error = None if values is None else jackknife_error(getattr(point, metric), values)
        if error is not None and metric in ABOVE_NULL:
            error = math.hypot(error, null_error(*null_gradient(point, metric)))
        errors[f"{metric}_se"] = error
    return replace(point, **errors)
