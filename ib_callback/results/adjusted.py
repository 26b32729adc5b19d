"""An estimate of the information itself, where the plain value is inflated by sampling and above null is too low."""

from __future__ import annotations

from dataclasses import dataclass

from ib_callback.results.measurement import Measurement

# Room between null and ceiling, as a share of the ceiling, below which the correction blows up errors tenfold.
MIN_ROOM = 0.1


def adjusted_information(information: float, null: float, ceiling: float) -> float | None:
    """Information corrected for chance: (I - null) / (1 - null / ceiling).

    A label that occurs c times inflates I by how far the entropy of the mean of its c assignments falls short of that
    of its distribution. For labels without meaning that is the null. For labels with meaning it is less, as their
    assignments differ less among themselves: with I the truth, what can differ is ceiling - I instead of ceiling. If
    it falls with c in the same way, then plain = I + null (1 - I / ceiling), which is solved for I. Up to the scale
    it is the adjusted mutual information of Vinh, Epps and Bailey (2010), with the ceiling as the maximum.

    It assumes that positions with the same label are no more alike than the label makes them. Those of one sequence
    are, and what a label seems to say is then partly said by the sequence.

    Args:
        information: plain I(X;Z), in any unit.
        null: in the same unit.
        ceiling: likewise.

    Returns:
        In the same unit; None where null and ceiling are within 10 % of each other: nearly every label occurs once,
        and the sample says nothing about it.

    >>> adjusted_information(0.75, null=0.5, ceiling=1.0)
    0.5
    """
    if ceiling <= 0 or 1 - null / ceiling < MIN_ROOM:
        return None
    return (information - null) / (1 - null / ceiling)


@dataclass(frozen=True)
class Adjusted:
    """One order, corrected for chance; fractions of log(num_bins), None where undefined."""

    complexity: float | None
    expressivity: float | None
    optimality: float | None
    distance: float | None


def adjusted(measurement: Measurement, order: str | None = None) -> Adjusted:
    """Return `adjusted_information` of complexity and expressivity, their ratio and their difference.

    Args:
        measurement: with nulls.
        order: n-gram order, by default the primary one.

    Raises:
        ValueError: the measurement has no null.
        KeyError: the order was not measured.
    """
    point = measurement[order or measurement.primary or ""]
    if point.complexity_null is None or point.expressivity_null is None or measurement.ceiling is None:
        raise ValueError('adjusted: expected a measurement with nulls; use null=True and weighting="empirical".')
    assert point.complexity is not None
    assert point.expressivity is not None
    complexity = adjusted_information(point.complexity, point.complexity_null, measurement.ceiling)
    expressivity = adjusted_information(point.expressivity, point.expressivity_null, measurement.ceiling)
    if complexity is None or expressivity is None:
        return Adjusted(complexity, expressivity, None, None)
    # Like above null: no ratio to what cannot be told from nothing.
    ratio = None if point.optimality_above_null is None else expressivity / complexity
    return Adjusted(complexity, expressivity, ratio, complexity - expressivity)
