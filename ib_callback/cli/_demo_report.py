"""What the numbers of a training run say, in plain words, with their baselines."""

from __future__ import annotations

from ib_callback.results.measurement import Measurement
from ib_callback.results.points import PlanePoint
from ib_callback.results.trajectory import Trajectory


def reading(trajectory: Trajectory) -> list[str]:
    """Paragraphs on a run that was measured from step 0, with nulls and with order `token`.

    Args:
        trajectory: of the run; points that could not be measured are left out.

    Returns:
        Nothing if fewer than two points were measured.
    """
    points = [point for point in trajectory if point.error is None]
    if len(points) < 2:
        return []
    return [_untrained(points[0]), _collapse(points), _fit(points), _end(points[-1]), _cost(points)]


def _untrained(first: Measurement) -> str:
    widest = list(first.orders)[-1]
    point = first[widest]
    text = (
        f"Before training, at {widest}s: complexity {_f(point.complexity)}, expressivity {_f(point.expressivity)}, "
        f"optimality {_f(point.optimality)}, "
    )
    text += "as if the model were on the bound. " if (point.optimality or 0) > 0.9 else "and nothing is learned yet. "
    if point.complexity and point.complexity_null is not None:
        text += (
            f"But labels shuffled at random (the null) already give {_f(point.complexity_null)}, "
            f"{point.complexity_null / point.complexity:.0%} of that complexity: most {widest}s occur only once in "
            "a probe, and a label with few positions always looks informative. Read wide orders above their null."
        )
    return text


def _collapse(points: list[Measurement]) -> str:
    first = points[0]
    lowest = min(points, key=_complexity)
    if _complexity(lowest) > 0.9 * _complexity(first):
        return (
            f"No collapse was seen: the lowest complexity, {_f(_complexity(lowest))} at step {lowest.step}, is not "
            "much below that of the untrained model."
        )
    closest = min(points, key=lambda point: point.distance_to_bound or 0.0)
    also = ", and so is the distance to the bound" if closest is lowest else ""
    return (
        f"Collapse, step {lowest.step}: all representations have moved onto each other. The entropy H(Z) fell from "
        f"{_f(first.entropy)} to {_f(lowest.entropy)}, complexity from {_f(first.complexity)} to "
        f"{_f(lowest.complexity)}. It is the lowest of the run{also}: the most useless checkpoint is the most "
        "compressed one. Never choose a checkpoint by low complexity or small distance alone."
    )


def _fit(points: list[Measurement]) -> str:
    start = _above_null(points[0])
    lowest = min(points, key=_complexity)
    after = points[points.index(lowest) :]
    better = next((point for point in after if _above_null(point) > start), None)
    if better is None:
        return (
            f"Fitting has not begun: what representations tell about the next token above the null has not exceeded "
            f"its value before training, {_f(start)}. Train longer (--steps)."
        )
    return (
        f"Fitting, from step {better.step}: what representations tell about the next token (expressivity above the "
        f"null) exceeds its value before training, {_f(start)}, and reaches {_f(_above_null(points[-1]))} at the end."
    )


def _end(last: Measurement) -> str:
    point = last[_order(last)]
    text = (
        f"At the end, step {last.step}, at {_order(last)}s: complexity {_f(point.complexity)}, of at most "
        f"{_f(last.ceiling)} that any labelling could reach (the ceiling); expressivity {_f(point.expressivity)}; "
        f"optimality {_f(point.optimality)}. "
    )
    if point.complexity_null is not None:
        text += (
            f"The null is {_f(point.complexity_null)}, so the truth lies between {_f(point.complexity_above_null)} and "
            f"{_f(point.complexity)} for complexity, {_f(point.expressivity_above_null)} and {_f(point.expressivity)} "
            f"for expressivity. Optimality above the null: {_f(point.optimality_above_null)}."
        )
    return text


def _cost(points: list[Measurement]) -> str:
    seconds = sorted(point.seconds or 0.0 for point in points)
    share = points[-1].overhead
    return f"{len(points)} measurements took {sum(seconds):.0f} s, {seconds[len(seconds) // 2]:.1f} s each" + (
        "." if share is None else f"; with files and pictures {share:.0%} of this short run."
    )


def _order(point: Measurement) -> str:
    return point.primary or "token"


def _complexity(point: Measurement) -> float:
    return point.complexity or 0.0


def _above_null(measurement: Measurement) -> float:
    point: PlanePoint = measurement[_order(measurement)]
    return point.expressivity_above_null or 0.0


def _f(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
