"""What each width of context, from token to quadgram, adds to the information of a model, and what a probe can resolve.

Experiment 2 of Conklin et al., ICLR 2026 (section "Embeddings Largely Encode Local Context") found that quadgrams add
little to trigrams, and that wider contexts lie nearer to the bound. But wider labels are rarer, and labels that occur
only once give the same numbers for every model. So each number is shown beside its null.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ib_callback.analysis.courses import Course, NoPointError, point_at
from ib_callback.results.measurement import CHANCE, Measurement
from ib_callback.results.metrics import SIGNIFICANT_STANDARD_ERRORS
from ib_callback.results.points import OrderIncrement, PlanePoint, replicates_of
from ib_callback.results.trajectory import aligned, cell
from ib_callback.results.uncertainty import adjusted_information, jackknife_error

# The increment of an order must exceed its estimate by chance by this share of the estimate, because the estimate may
# be off by that much (docs/commands.md).
_MARGIN = 0.15
# If less than this share of the ceiling lies between null and ceiling, the difference counts as rounding.
_LEAST_ROOM = 0.01


@dataclass(frozen=True, kw_only=True)
class Width:
    """One order at one point of a model. All information is in fractions of log(num_bins), and None where undefined.

    Attributes:
        order: name of the order.
        point: numbers of the order.
        null_share: the complexity's null as a share of the ceiling. A share near 1 means that almost every label occurs
            only once.
        adjusted: the complexity corrected for chance (`ib.adjusted`); None if the null is within a tenth of the
            ceiling.
        resolved: whether the complexity differs clearly from that of labels without meaning. The local complexity must
            exceed three of its standard errors. Without one, the complexity above null must. None if no error is known.
        resolved_by: the number that decided, "complexity_local" or "complexity_above_null".
        increment: complexity minus that of the next narrower order; None for the narrowest order.
        increment_chance: the increment by chance: from permutations of the labels if the point has `increments`
            (`ib-callback measure --increments`), else from `chance_increment`.
        increment_excess: increment minus increment_chance.
        increment_se: with permutations, their standard deviation. Otherwise the standard error of the difference of
            both complexities above null; it includes the error of the text, if groups of sequences were left out, and
            the error of the estimated nulls.
        increment_p_value: p-value from the permutations; None without them.
        exceeds: with permutations, whether p < .05; None if no position could be permuted. Without them, true if the
            excess is over three standard errors and over 15 % of increment_chance; otherwise None, because the numbers
            cannot decide.
        expressivity: the same test for the expressivity; None without permutations.
    """

    order: str
    point: PlanePoint
    null_share: float | None
    adjusted: float | None
    resolved: bool | None
    resolved_by: str | None
    increment: float | None
    increment_chance: float | None
    increment_excess: float | None
    increment_se: float | None
    increment_p_value: float | None
    exceeds: bool | None
    expressivity: OrderIncrement | None


@dataclass(frozen=True, kw_only=True)
class Context:
    """The widths of context of one model at one point.

    Attributes:
        name: name of the model.
        step: step of the point; None outside training.
        widths: the widths, narrowest first; empty if nothing was measured.
        widest: the widest order that the probe resolves together with all narrower ones; None if it resolves none.
        note: a sentence that says why there are no widths.
    """

    name: str
    step: int | None
    widths: tuple[Width, ...]
    widest: str | None
    note: str | None = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each order, for a table."""
        for width in self.widths:
            point = width.point
            yield {
                "model": self.name,
                "step": self.step,
                "order": width.order,
                **{name: getattr(point, name) for name in _SHOWN},
                **{name: getattr(width, name) for name in Width.__dataclass_fields__ if name not in _NO_CELLS},
                **{
                    f"expressivity_increment{column}": getattr(width.expressivity, name, None)
                    for name, column in _OF_EXPRESSIVITY.items()
                },
                "is_widest_resolved": width.order == self.widest,
            }


_NO_CELLS = ("order", "point", "expressivity")
_OF_EXPRESSIVITY = {"information": "", "null": "_chance", "null_std": "_se", "p_value": "_p_value"}
_SHOWN = (
    "complexity", "expressivity", "optimality", "distance_to_bound", "complexity_null", "complexity_null_se",
    "expressivity_null", "optimality_null", "distance_null", "complexity_above_null", "expressivity_above_null",
    "optimality_above_null", "distance_above_null", "complexity_local", "complexity_local_se", "expressivity_local",
    "optimality_local",
)  # fmt: skip


def find_contexts(courses: Sequence[Course], step: str = "last") -> list[Context]:
    """The widths of context of each model at one point.

    Args:
        courses: runs and models.
        step: "last", "best" (by optimality, as `Trajectory.best`), or a step.

    Raises:
        ValueError: `step` is not one of these, or no model has that step.
    """
    found = [_context(course, step) for course in courses]
    if all(not context.widths for context in found):
        raise ValueError(f"--step {step}: {found[0].name}: {found[0].note}")
    return found


def orders_of(points: Iterable[Measurement]) -> list[str]:
    """All orders of the measurements, narrowest first."""
    return sorted({order for point in points for order in point.orders}, key=_width_of)


def widths_of(measurement: Measurement) -> tuple[Width, ...]:
    """Every order of a measurement, narrowest first."""
    found: list[Width] = []
    tested = measurement.increments or {}
    for order in orders_of([measurement]):
        point, narrower = measurement.orders[order], found[-1] if found else None
        null, ceiling = point.complexity_null, measurement.ceiling
        adjusted = None
        if point.complexity is not None and null is not None and ceiling:
            adjusted = adjusted_information(point.complexity, null, ceiling)
        by, error = _deciding(point)
        value = None if by is None else getattr(point, by)
        before = None if narrower is None else narrower.point
        increment = _minus(point.complexity, getattr(before, "complexity", None))
        chance = None if before is None or not ceiling else chance_increment(before, point, ceiling)
        its_error = None if before is None else _error(point, before)
        exceeds = _exceeds(_minus(increment, chance), its_error, chance)
        permuted = tested.get("complexity", {}).get(order)
        if permuted is not None:
            increment, chance, its_error = permuted.information, permuted.null, permuted.null_std
            exceeds = permuted.p_value < CHANCE if permuted.num_positions else None
        found.append(
            Width(
                order=order,
                point=point,
                null_share=None if null is None or not ceiling else null / ceiling,
                adjusted=adjusted,
                resolved=_is_clear(value, error),
                resolved_by=by,
                increment=increment,
                increment_chance=chance,
                increment_excess=_minus(increment, chance),
                increment_se=its_error,
                increment_p_value=None if permuted is None else permuted.p_value,
                exceeds=exceeds,
                expressivity=tested.get("expressivity", {}).get(order),
            )
        )
    return tuple(found)


def chance_increment(narrower: PlanePoint, wider: PlanePoint, ceiling: float) -> float | None:
    """What a wider order would add if it told nothing beyond the narrower one. It adds only because it is rarer.

    Labels without meaning take their share of the room below the ceiling. So the complexity of an order is
    null + (1 - null / ceiling) × information (`ib.adjusted`). This function uses the information of the narrower order
    in place of that of the wider order. The result approximates permutations of wide labels within narrow ones
    (`ib.model_increments`). It was within 15 % of them for 15 increments of two small models, trained and untrained,
    and of SmolLM2-135M-Instruct.

    Args:
        narrower: point of the narrower order.
        wider: point of the wider order of the same measurement.
        ceiling: ceiling of the measurement.

    Returns:
        A fraction of log(num_bins); None without nulls, or if there is almost no room below the ceiling.

    >>> a = PlanePoint.from_layers([0.5], [0.2], complexity_null=0.2, expressivity_null=0.2)
    >>> b = PlanePoint.from_layers([0.7], [0.6], complexity_null=0.6, expressivity_null=0.6)
    >>> round(chance_increment(a, b, 1.0), 3)  # 0.6 + (1 - 0.6) × 0.375 - 0.5
    0.25
    """
    nulls = narrower.complexity_null, wider.complexity_null
    if nulls[0] is None or nulls[1] is None or narrower.complexity is None or 1 - nulls[0] / ceiling < _LEAST_ROOM:
        return None
    information = (narrower.complexity - nulls[0]) / (1 - nulls[0] / ceiling)
    return nulls[1] + (1 - nulls[1] / ceiling) * information - narrower.complexity


def contexts_text(contexts: Sequence[Context]) -> str:
    """The results as tables and sentences."""
    lines: list[str] = []
    for context in contexts:
        at = "" if context.step is None else f", step {context.step:,}"
        if context.note is not None:
            lines += [f"{context.name}{at}: {context.note}", ""]
            continue
        lines += [f"{context.name}{at}", *aligned(_table(context), (str.ljust, *[str.rjust] * (len(_HEADS) - 1))), ""]
    wider = [width for context in contexts for width in context.widths[1:]]
    of_chance = [_PERMUTED] if any(width.increment_p_value is not None for width in wider) else []
    of_chance += [_ESTIMATED] if any(width.increment_p_value is None for width in wider) else []
    return "\n".join([*lines, " ".join([_LEGEND, *of_chance]), *conclusions(contexts)])


_HEADS = (
    "order", "complexity", "null", "of ceiling", "above null", "local", "resolved", "adds", "by chance", "beyond",
    "±", "p", "more", "distance", "of null", "optimality", "of null", "above null", "local",
)  # fmt: skip
_LEGEND = (
    "of ceiling: the null as a share of the ceiling. resolved: above chance by more than 3 standard errors. adds: the "
    "complexity minus that of the order in the row above. by chance: what a wider label would add if it told nothing "
    "more. beyond: adds minus by chance. more: whether the order adds more than chance."
)
_PERMUTED = "With a p, chance is the mean of permutations, ± is their standard deviation, and more means p < .05."
_ESTIMATED = (
    "Without a p, chance is estimated from both nulls, ± is a standard error, and more is yes or ?, because these "
    "numbers cannot show that an order adds nothing. For a test, measure the model again with ib-callback measure … "
    "--increments 20."
)


def _table(context: Context) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [_HEADS]
    for width in context.widths:
        point = width.point
        rows.append(
            (
                width.order, cell(point.complexity), cell(point.complexity_null),
                "-" if width.null_share is None else f"{width.null_share:.0%}", cell(point.complexity_above_null),
                cell(point.complexity_local), _yes(width.resolved), cell(width.increment), cell(width.increment_chance),
                cell(width.increment_excess), cell(width.increment_se), _p(width.increment_p_value),
                "-" if width.increment is None else _yes(width.exceeds),
                cell(point.distance_to_bound), cell(point.distance_null), cell(point.optimality),
                cell(point.optimality_null), cell(point.optimality_above_null), cell(point.optimality_local),
            )
        )  # fmt: skip
    return rows


def conclusions(contexts: Sequence[Context]) -> Iterator[str]:
    """The conclusions as sentences."""
    several = [context for context in contexts if len(context.widths) > 1]
    if not several:
        yield "Nothing can be concluded about widths of context: no model was measured at several orders."
        return
    for context in several:
        widest = "no order" if context.widest is None else f"orders up to the {context.widest}"
        told = f"{context.name}: the probe resolves {widest}."
        last = context.widths[-1]
        adds = [f"{w.order} {_yes(w.exceeds)}" for w in context.widths[1:]]
        told += f" Adds more complexity than chance: {', '.join(adds)}."
        following = [(w.order, w.expressivity) for w in context.widths[1:] if w.expressivity is not None]
        if following:
            by_order = [f"{o} {_yes(i.p_value < CHANCE if i.num_positions else None)}" for o, i in following]
            told += f" Adds more expressivity than chance: {', '.join(by_order)}."
        if last.null_share is not None and last.adjusted is None:
            told += (
                f" The null of the {last.order} is {last.null_share:.0%} of the ceiling, so the size of its "
                "information cannot be read."
            )
        yield told
    yield from _nearer(several)


def _nearer(contexts: Sequence[Context]) -> Iterator[str]:
    """Whether wider contexts lie nearer to the bound, and whether labels without meaning do so too."""
    told = []
    for text, name in (("plain", "optimality"), ("above null", "optimality_above_null")):
        series = [[getattr(width.point, name) for width in context.widths] for context in contexts]
        known = [[value for value in values if value is not None] for values in series]
        known = [values for values in known if len(values) > 1]
        rising = sum(all(b > a for a, b in itertools.pairwise(values)) for values in known)
        told.append(f"in {rising} of {len(known)} ({text})")
    yield f"Number of models in which optimality rises with every wider order: {', '.join(told)}."
    of_null = [w.point.optimality_null for c in contexts for w in c.widths if w.point.optimality_null is not None]
    if of_null:
        yield (
            f"The null alone has an optimality of {min(of_null):.3f} to {max(of_null):.3f}. So plain numbers of an "
            "order with a high null lie near the bound for every model. Values above null tell more."
        )


def _context(course: Course, step: str) -> Context:
    try:
        point = point_at(course, step)
    except NoPointError as error:
        return Context(name=course.name, step=None, widths=(), widest=None, note=str(error))
    widths = widths_of(point)
    widest = None
    for width in widths:
        if not width.resolved:
            break
        widest = width.order
    return Context(name=course.name, step=point.step, widths=widths, widest=widest)


def _width_of(order: str) -> tuple[int, str]:
    from ib_callback.probe.ngrams import parse_orders

    try:
        return parse_orders(order)[order], order
    except ValueError:
        return 1_000, order  # an unknown order, from another version


def _deciding(point: PlanePoint) -> tuple[str | None, float | None]:
    """The complexity that decides whether an order is resolved, and its standard error."""
    if point.complexity_local is not None and point.complexity_local_se is not None:
        return "complexity_local", point.complexity_local_se
    if point.complexity_above_null is not None:
        errors = (point.complexity_above_null_se, point.complexity_null_se)
        return "complexity_above_null", next((error for error in errors if error is not None), None)
    return None, None


def _error(point: PlanePoint, narrower: PlanePoint) -> float | None:
    """Standard error of the difference of two complexities above null."""
    errors = (point.complexity_null_se, narrower.complexity_null_se)
    if None in errors:
        return None
    of_nulls = math.hypot(*(error or 0.0 for error in errors))
    ours, its = (replicates_of(each, "complexity_above_null") for each in (point, narrower))
    difference = _minus(point.complexity_above_null, narrower.complexity_above_null)
    if difference is None or ours is None or its is None or len(ours) != len(its):
        return of_nulls
    return math.hypot(of_nulls, jackknife_error(difference, ours - its))


def _exceeds(excess: float | None, error: float | None, chance: float | None) -> bool | None:
    if excess is None or error is None or chance is None:
        return None
    return True if excess > SIGNIFICANT_STANDARD_ERRORS * error + _MARGIN * abs(chance) else None


def _is_clear(value: float | None, error: float | None) -> bool | None:
    if value is None or error is None:
        return None
    return value > SIGNIFICANT_STANDARD_ERRORS * error and value > 0


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}".lstrip("0") if value < 1 else "1"


def _yes(value: bool | None) -> str:
    return "?" if value is None else "yes" if value else "no"
