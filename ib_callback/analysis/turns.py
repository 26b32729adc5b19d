"""Find when models turn to compression, whether their loss becomes flat then, and what happens before and after.

The *turn* of a model is the start of its compression. Experiments 1 and 3 of Conklin et al., ICLR 2026 (sections
"Pre-training Approaches Optimal Compression" and "The Effect of Scale") made three findings: A model first fits and
then compresses. The turn comes when the loss becomes flat. Only larger models approach the bound after the turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ib_callback.analysis.courses import Course
from ib_callback.analysis.peak import find_peak
from ib_callback.analysis.step_correlation import StepCorrelation, step_correlation
from ib_callback.plot.data import count_label
from ib_callback.results.measurement import CHANCE, Measurement
from ib_callback.results.noise import scatter
from ib_callback.results.phases import PLANES, Phase, Phases, plane_values
from ib_callback.results.points import PlanePoint
from ib_callback.results.trajectory import Trajectory, aligned
from ib_callback.results.uncertainty import jackknife_error

# The loss is flat from the first measurement after which it stays within this many nats of its lowest value.
FLAT = 0.05
# The interval of the flat loss reaches this many standard errors to either side.
_ERRORS = 2.0
_VERDICTS = {
    "approaches": "approaches the bound",
    "leaves": "moves away from the bound",
    "disagree": "has a distance and an optimality that disagree",
    "neither": "shows no clear trend",
    "cannot tell": "has too few independent points to tell",
}


@dataclass(frozen=True, kw_only=True)
class When:
    """When something happened in a run, in steps or tokens.

    Attributes:
        at: the best estimate, a measured point.
        earliest, latest: limits with about 95 % confidence, including the distance between measurements; None: no
            limit.
    """

    at: float
    earliest: float | None
    latest: float | None

    def text(self, what: str) -> str:
        """The text for display; `what` names the axis, as in `plot.data.numbered`."""
        low, high = ("?" if end is None else count_label(end, what) for end in (self.earliest, self.latest))
        return f"{count_label(self.at, what)} ({low} to {high})"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One phase of a run.

    Attributes:
        name: "fitting", "compression" or "memorising". Without a compression, the second phase is called "off the
            bound" or "after the loss is flat".
        first, last: first and last measured point, in steps or tokens.
        complexity, optimality, distance: correlation of each number with the step.
        bound: "approaches" if the distance to the bound clearly falls, "leaves" if it clearly rises; "disagree" if the
            optimality clearly says the opposite, as when both axes grow; "neither" if the distance shows no clear
            trend; "cannot tell" with too few points.
        late: the same for the last half of its points.
    """

    name: str
    first: float
    last: float
    complexity: StepCorrelation
    optimality: StepCorrelation
    distance: StepCorrelation
    bound: str
    late: str


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The results for one model.

    Attributes:
        name: name of the model or run.
        num_parameters: number of parameters; None if unknown.
        num_points: number of measured points.
        order: order of the labels.
        plane: one of `PLANES`; None if no point has it.
        fit: when fitting began; None if it has not.
        turn: when compression began; None if it was not recognised.
        step: step of the turn.
        flat: when the held-out loss became flat; None if it never does, or if there is no loss.
        falls: whether the loss still falls by more than the limit of flatness in the last half of the run. The place
            where it becomes flat then depends on where the run ends.
        together: the turn relative to the flat loss: "before", "after" or "cannot tell"; None if one is missing.
        stages: stages of the run, in order.
        notes: remarks, as sentences.
    """

    name: str
    num_parameters: int | None
    num_points: int
    order: str | None
    plane: str | None
    fit: float | None
    turn: When | None
    step: int | None
    flat: When | None
    falls: bool
    together: str | None
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]

    def row(self) -> dict[str, Any]:
        """All numbers, for a table."""
        row: dict[str, Any] = {
            "model": self.name,
            "num_parameters": self.num_parameters,
            "points": self.num_points,
            "order": self.order,
            "plane": self.plane,
            "fit": self.fit,
        }
        for name, when in (("turn", self.turn), ("loss_flat", self.flat)):
            for end in ("at", "earliest", "latest"):
                row[name if end == "at" else f"{name}_{end}"] = getattr(when, end, None)
        row["loss_falls_to_the_end"], row["turn_to_flat"] = self.falls, self.together
        stages = {_key(stage): stage for stage in self.stages}
        for key in ("fitting", "second", "memorising"):
            found = stages.get(key)
            row[f"{key}_is"] = getattr(found, "name", None)
            for end in ("first", "last"):
                row[f"{key}_{end}"] = getattr(found, end, None)
            row[f"{key}_points"] = None if found is None else found.complexity.num_points
            for name in ("complexity", "optimality", "distance"):
                for statistic in ("pearson", "pearson_p", "spearman", "spearman_p"):
                    of = None if found is None else getattr(found, name)
                    row[f"{key}_{name}_{statistic}"] = getattr(of, statistic, None)
            row[f"{key}_bound"], row[f"{key}_late"] = getattr(found, "bound", None), getattr(found, "late", None)
        return {**row, "notes": " ".join(self.notes) or None}


def find_turns(
    courses: Sequence[Course], *, order: str | None = None, plane: str | None = None, x: str = "step", log: bool = False
) -> list[Turn]:
    """The turns of all models, smallest model first. Models of unknown size come last, in the given order.

    The turn is `Phases.compression_start`. Its interval contains the maxima of the complexity that the noise allows
    (`find_peak`) and the gaps to the next measurements. It uses the points from the fit to the start of memorising.

    The loss becomes flat at the first measurement after which it stays within .05 nats of its lowest value. For the
    interval, this limit is moved by two standard errors. They come from the noise between points. If groups of
    sequences were left out, they also include the error of the difference between two points on the same text.

    Args:
        courses: runs and models.
        order: order of the labels, by default the primary one of each course.
        plane: one of `PLANES`, by default that of the rule of each run.
        x: "step", or "tokens" for the number of training tokens.
        log: whether Pearson's r uses the logarithm of x; correlations of ranks do not change.

    Raises:
        ValueError: no course has the plane or the order, or the tokens of some points are unknown.
    """
    if plane is not None and plane not in PLANES:
        raise ValueError(f"--plane: expected one of {', '.join(PLANES)}, got {plane!r}")
    if order is not None:
        known = list(dict.fromkeys(name for course in courses for point in course.trajectory for name in point.orders))
        if order not in known:
            raise ValueError(f"--order: expected one of {', '.join(known)}, got {order!r}")
    turns = [_turn(course, order, plane, x, log=log) for course in courses]
    if plane is not None and all(turn.plane is None for turn in turns):
        raise ValueError(
            f"--plane {plane}: expected models that were measured on this plane, got none. Choose another of "
            f"{', '.join(PLANES)}"
        )
    return sorted(turns, key=lambda turn: math.inf if turn.num_parameters is None else turn.num_parameters)


def with_order(trajectory: Trajectory, order: str) -> Trajectory:
    """The same trajectory with another order as the primary one. Points without that order count as missing."""
    points: list[Measurement] = []
    for point in trajectory:
        settings = {**point.settings, "primary": order}
        if point.error is None and order not in point.orders:
            points.append(Measurement.failed(point.step, f"{order} was not measured", settings=settings))
        else:
            points.append(replace(point, settings=settings))
    return _like(trajectory, points)


def turns_text(turns: Sequence[Turn], what: str = "training step") -> str:
    """The results as tables and sentences; `what` names the axis, as in `plot.data.numbered`."""
    rows: list[tuple[str, ...]] = [("model", "parameters", "points", "plane", "fit", "turn", "loss flat", "turn is")]
    rows += [
        (
            turn.name,
            "-" if turn.num_parameters is None else f"{turn.num_parameters:,}",
            f"{turn.num_points}",
            turn.plane or "-",
            "-" if turn.fit is None else count_label(turn.fit, what),
            "-" if turn.turn is None else turn.turn.text(what),
            "-" if turn.flat is None else turn.flat.text(what),
            turn.together or "-",
        )
        for turn in turns
    ]
    lines = aligned(rows, (str.ljust, str.rjust, str.rjust, str.ljust, str.rjust, str.rjust, str.rjust, str.ljust))
    lines += [
        "turn: the start of compression (95 % interval); loss flat: from there on the held-out loss stays within "
        f"{FLAT} nats of its lowest value; turn is: before or after the loss "
        "becomes flat, or cannot tell if the intervals overlap."
    ]
    stages = [(turn, stage) for turn in turns for stage in turn.stages]
    if stages:
        rows = [("model", "phase", "from", "to", "points", *_HEADS, "bound", "late")]
        for turn, stage in stages:
            ends = (count_label(stage.first, what), count_label(stage.last, what))
            cells = [text for of in (stage.complexity, stage.optimality) for text in _cells(of)]
            rows.append(
                (turn.name, stage.name, *ends, f"{stage.complexity.num_points}", *cells, stage.bound, stage.late)
            )
        lines += ["", *aligned(rows, (str.ljust, str.ljust, *[str.rjust] * 11, str.ljust, str.ljust))]
        lines += [
            f"r (Pearson) and ρ (Spearman) correlate the {what} with complexity (C) and with optimality (O). p allows "
            "for autocorrelation; - means too few independent points. bound: what the distance to the bound shows, "
            "or cannot tell if there are too few independent points; late: the same for the last half of the phase."
        ]
    lines += [f"{turn.name}: {note}" for turn in turns for note in turn.notes]
    return "\n".join([*lines, "", *conclusions(turns)])


_HEADS = tuple(f"{head}{of}" for of in ("(C)", "(O)") for head in ("r", "p", "ρ", "p"))


def conclusions(turns: Sequence[Turn]) -> Iterator[str]:
    """The conclusions as sentences."""
    found = [turn for turn in turns if turn.turn is not None]
    if not found:
        yield "Nothing can be concluded about a turn: no compression was recognised in any of these models."
    else:
        both = [turn.together for turn in found if turn.together is not None]
        told = [f"{text} in {both.count(name)}" for name, text in _TOGETHER.items() if name in both]
        lacking = len(found) - len(both)
        told += [f"no flat loss to compare with in {lacking}"] if lacking else []
        verb = "turn" if len(found) > 1 else "turns"
        yield f"{len(found)} of {len(turns)} models {verb} to compression: {', '.join(told)}."
        if falls := sum(turn.falls for turn in found if turn.together is not None):
            yield (
                f"In {falls} of these the loss still falls in the last half of the run. Such runs do not show whether "
                "the turn and the flat loss coincide."
            )
    seconds = [stage for turn in turns for stage in turn.stages if _key(stage) == "second"]
    if seconds:
        verdicts = [stage.bound for stage in seconds]
        counts = [f"{text} in {n}" for name, text in _VERDICTS.items() if (n := verdicts.count(name))]
        if len(seconds) > 1:
            yield f"{len(seconds)} models have a second phase. It {', '.join(counts)}."
        else:
            yield f"1 model has a second phase. It {_VERDICTS[verdicts[0]]}."
    if len(turns) < 3:
        which = f"these {len(turns)} models" if len(turns) > 1 else "this model"
        yield f"This describes only {which}. It says nothing about others."


_TOGETHER = {
    "before": "before the loss becomes flat",
    "after": "after the loss becomes flat",
    "cannot tell": "the order of turn and flat loss is not certain",
}


def _key(stage: Stage) -> str:
    return stage.name if stage.name in ("fitting", "memorising") else "second"


def _cells(of: StepCorrelation) -> list[str]:
    pairs = ((of.pearson, of.pearson_p), (of.spearman, of.spearman_p))
    return [text for value, p in pairs for text in ("-" if value is None else f"{value:+.2f}", p_text(p))]


def p_text(p: float | None) -> str:
    """A p-value in a table.

    >>> p_text(0.0421), p_text(1e-9), p_text(None)
    ('.042', '<.001', '-')
    """
    return "-" if p is None else "<.001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def _turn(course: Course, order: str | None, plane: str | None, x: str, *, log: bool) -> Turn:
    points = [point for point in course.trajectory if point.step is not None]
    notes = []
    if not points and any(point.error is None for point in course.trajectory):
        notes.append("No point has a step, so its phases cannot be found.")
    elif len(points) < len(course.trajectory):
        notes.append(f"Points left out because they have no step: {len(course.trajectory) - len(points)}.")
    trajectory = _like(course.trajectory, points)
    trajectory = trajectory if order is None else with_order(trajectory, order)
    missing = [point for point in trajectory if point.error is not None]
    if missing:
        notes.append(f"Missing points: {len(missing)} of {len(trajectory)}, the first at step {missing[0].step:,}.")
    measured = _like(trajectory, [point for point in trajectory if point.error is None])
    at = numbers_of(course, measured, x)
    phases = measured.phases() if plane is None else measured.phases(plane=plane)
    table = [None if phases.plane is None else plane_values(point, phases.plane) for point in measured]
    flat, of_loss = _flat(measured, at)
    turn, notes_of_turn = _interval(measured, phases, table, at)
    notes += [*notes_of_turn, *of_loss]
    if not measured and points:
        notes.append("No point was measured, so nothing can be concluded.")
    together = None if turn is None or flat is None else _together(turn, flat)
    stages = tuple(_stages(measured, phases, table, at, flat, log=log))
    sizes = [head["num_parameters"] for head, _ in course.points if head.get("num_parameters") is not None]
    return Turn(
        name=course.name,
        num_parameters=max(sizes, default=None),
        num_points=len(measured),
        order=next((point.primary for point in measured), order),
        plane=phases.plane if any(values is not None for values in table) else None,
        fit=_value(measured, at, phases.fit_start),
        turn=turn,
        step=None if turn is None else phases.compression_start,
        flat=flat,
        falls=flat is not None and flat.at > at[-1] / 2,
        together=together,
        stages=stages,
        notes=tuple(notes),
    )


def _like(trajectory: Trajectory, points: Sequence[Measurement]) -> Trajectory:
    return Trajectory(points, phase_rule=trajectory.phase_rule, guard=trajectory.guard, mixed=True)


def numbers_of(course: Course, points: Sequence[Measurement], x: str) -> list[float]:
    """The step of every point, or its tokens. Tokens are read from the measurement, or from the line of its file.

    Raises:
        ValueError: `x` is "tokens" and the tokens of some points are unknown, or `x` is neither "step" nor "tokens".
    """
    if x not in ("step", "tokens"):
        raise ValueError(f'x: expected "step" or "tokens", got {x!r}')
    steps = [float(point.step or 0) for point in points]
    if x == "step":
        return steps
    named = {point.step: head.get("tokens") for head, point in course.points}
    tokens = [named.get(p.step) if p.tokens_seen is None else p.tokens_seen for p in points]
    tokens = [0 if step == 0 else number for step, number in zip(steps, tokens, strict=True)]
    if unknown := tokens.count(None):
        raise ValueError(
            f"--x tokens: expected points whose tokens are known, got {unknown} of {len(points)} points of "
            f"{course.name} without one. Use --x step. Or measure again, with tokens_per_step= for the callback, or "
            "with --tokens-per-step and another -o for ib-callback measure"
        )
    return [float(number or 0) for number in tokens]


def _value(points: Sequence[Measurement], at: Sequence[float], step: int | None) -> float | None:
    return next((number for point, number in zip(points, at, strict=True) if point.step == step), None)


# --- the turn


def _interval(
    points: Sequence[Measurement], phases: Phases, table: Sequence[tuple[float, float] | None], at: Sequence[float]
) -> tuple[When | None, list[str]]:
    steps = [point.step for point in points]
    if not points:
        return None, []
    if all(values is None for values in table):
        return None, [f"The {phases.plane} plane was not measured."]
    if len(points) == 1:
        return None, ["A single point does not show a phase."]
    notes = list(phases.notes)
    if steps[0] != 0:
        notes.append(f"The first point is at step {steps[0]:,}, later than step 0, so fitting is dated from there.")
    if phases.trained:
        return None, notes
    if phases.compression_start is None:
        return None, [*notes, "No compression was recognised."]
    start = steps.index(phases.compression_start)
    end = len(points) if phases.memorising_start is None else steps.index(phases.memorising_start) + 1
    begin = 0 if phases.fit_start is None else steps.index(phases.fit_start)
    counted = [
        index
        for index in range(begin, max(end, start + 1))
        if table[index] is not None and points[index].scheduled and not phases.collapsed[index]
    ]
    complexities = [values[0] for index in counted if (values := table[index]) is not None]
    peak = find_peak(complexities, [at[index] for index in counted])
    if peak is None:
        return When(at=at[start], earliest=None, latest=None), [
            *notes,
            f"The turn has no interval, because only {len(counted)} points since the fit can be used.",
        ]
    place = counted.index(start)
    first, last = min(peak.first, place), max(peak.last, place)
    # The maximum may lie between two measurements.
    earliest = None if first == 0 else at[counted[first - 1]]
    latest = None if last + 1 == len(counted) else at[counted[last + 1]]
    return When(at=at[start], earliest=earliest, latest=latest), notes


# --- the loss


def _flat(points: Sequence[Measurement], at: Sequence[float]) -> tuple[When | None, list[str]]:
    known = [(point, number) for point, number in zip(points, at, strict=True) if point.loss is not None]
    if len(known) < 2:
        told = ["Fewer than two points have a held-out loss, so nothing shows when it becomes flat."]
        return None, told if len(points) > 1 else []
    notes = []
    if len(known) < len(points):
        notes.append(f"Points without a held-out loss: {len(points) - len(known)}.")
    losses = [point.loss or 0.0 for point, _ in known]
    lowest = min(range(len(losses)), key=losses.__getitem__)
    noise = scatter(losses, [number for _, number in known])
    errors = [_error(point, known[lowest][0], noise) for point, _ in known]
    if None in errors:
        notes.append(
            "The noise of the loss is not known, so the interval of the flat loss is only the gap between measurements."
        )
    above = [loss - losses[lowest] - FLAT for loss in losses]
    wide = [_ERRORS * (error or 0.0) for error in errors]
    here = _stays([value <= 0 for value in above])
    if here is None:
        last = known[-1][0]
        notes.append(
            f"The held-out loss is lowest at step {known[lowest][0].step:,} and {losses[-1] - losses[lowest]:.2f} nats "
            f"higher at the end, at step {last.step:,}. So it does not stay flat."
        )
        return None, notes
    if known[here][1] > known[-1][1] / 2:
        notes.append(
            f"The held-out loss falls by more than {FLAT} nats in the last half of the run, so the point where it "
            "becomes flat depends on where the run ends."
        )
    soon = _stays([value <= width for value, width in zip(above, wide, strict=True)])
    late = _stays([value <= -width for value, width in zip(above, wide, strict=True)])
    soon = here if soon is None else soon
    earliest = known[soon - 1][1] if soon else None
    return When(at=known[here][1], earliest=earliest, latest=None if late is None else known[late][1]), notes


def _stays(holds: Sequence[bool]) -> int | None:
    """The position from which the condition holds to the end; None if it does not hold at the end."""
    position = len(holds)
    while position and holds[position - 1]:
        position -= 1
    return position if position < len(holds) else None


def _error(point: Measurement, lowest: Measurement, noise: float | None) -> float | None:
    """Standard error of the difference of two losses."""
    ours, its = point.loss_jackknife, lowest.loss_jackknife
    on_text = None
    if ours and len(ours) == len(its) and point.loss is not None and lowest.loss is not None:
        omitted = [a - b for a, b in zip(ours, its, strict=True)]
        on_text = jackknife_error(point.loss - lowest.loss, omitted)
    if noise is None:
        return on_text
    return math.hypot(math.sqrt(2) * noise, on_text or 0.0)


def _together(turn: When, flat: When) -> str:
    if turn.latest is not None and flat.earliest is not None and turn.latest < flat.earliest:
        return "before"
    if turn.earliest is not None and flat.latest is not None and turn.earliest > flat.latest:
        return "after"
    return "cannot tell"


# --- phases


def _stages(
    points: Sequence[Measurement],
    phases: Phases,
    table: Sequence[tuple[float, float] | None],
    at: Sequence[float],
    flat: When | None,
    *,
    log: bool,
) -> Iterator[Stage]:
    if phases.trained or phases.fit_start is None or phases.plane is None:
        return
    fit = _value(points, at, phases.fit_start)
    memorising = _value(points, at, phases.memorising_start)
    end = math.inf if memorising is None or phases.memorising_start is None else memorising
    second, name = _value(points, at, phases.compression_start), Phase.COMPRESSION.name.lower()
    if phases.compression_start is None:
        second, name = (
            (flat.at if flat is not None and flat.at <= at[-1] / 2 else None, "after the loss is flat")
            if phases.off_bound_start is None
            else (_value(points, at, phases.off_bound_start), "off the bound")
        )
    assert fit is not None
    second = end if second is None or not fit < second < end else second
    for title, low, high in (("fitting", fit, second), (name, second, end), ("memorising", end, math.inf)):
        chosen = [
            index
            for index, number in enumerate(at)
            if low <= number < high and table[index] is not None and not phases.collapsed[index]
        ]
        if chosen:
            yield _stage(title, [points[i] for i in chosen], [at[i] for i in chosen], phases.plane, log=log)


def _stage(name: str, points: Sequence[Measurement], at: Sequence[float], plane: str, *, log: bool) -> Stage:
    counted = [None if log and number <= 0 else math.log(number) if log else number for number in at]
    numbers = [_numbers(point, plane) for point in points]
    complexity, optimality, distance = (list(column) for column in zip(*numbers, strict=True))
    of_distance, of_optimality = step_correlation(counted, distance), step_correlation(counted, optimality)
    half = len(points) // 2
    late = (step_correlation(counted[half:], values[half:]) for values in (distance, optimality))
    return Stage(
        name=name,
        first=at[0],
        last=at[-1],
        complexity=step_correlation(counted, complexity),
        optimality=of_optimality,
        distance=of_distance,
        bound=_verdict(of_distance, of_optimality),
        late=_verdict(*late),
    )


def _numbers(point: Measurement, plane: str) -> tuple[float | None, float | None, float | None]:
    """Complexity, optimality and distance on a plane: to the bound on the plain plane, to the diagonal on others."""
    view, ending = PLANES[plane]
    orders = point.views.get(view, {}) if view else point.orders
    found: PlanePoint | None = orders.get(point.primary or "")
    values = plane_values(point, plane)
    if found is None or values is None:
        return None, None, None
    distance = found.distance_to_bound if plane == "plain" else values[0] - values[1]
    return values[0], getattr(found, f"optimality{ending}"), distance


def _verdict(distance: StepCorrelation, optimality: StepCorrelation) -> str:
    moves, ratio = (_direction(each) for each in (distance, optimality))
    if not moves:
        return "cannot tell" if moves is None else "neither"
    if ratio == moves:
        return "disagree"
    return "approaches" if moves < 0 else "leaves"


def _direction(of: StepCorrelation) -> int | None:
    """1 if the number clearly rises, -1 if it clearly falls, 0 if there is no clear trend; None with too few points."""
    if of.spearman is None or of.spearman_p is None:
        return None
    return 0 if of.spearman_p >= CHANCE else 1 if of.spearman > 0 else -1
