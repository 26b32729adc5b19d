"""What a run prints at the console: one line when it begins, and one line for each measurement."""

from __future__ import annotations

import sys
from contextlib import suppress

from ib_callback.common.messages import tell
from ib_callback.measuring.meter import Meter, Preflight
from ib_callback.results.measurement import Measurement
from ib_callback.results.metrics import FIRST_VIEW
from ib_callback.results.stopping import StopReason
from ib_callback.run.rules import LiveRules
from ib_callback.run.schedule import Schedule, count, in_words

_IN_WORDS = {reason: reason.value for reason in StopReason} | {
    StopReason.MISSING: "no value here",
    StopReason.IMPROVING: "still improves",
}


def say(message: str) -> None:
    """Print a line above the visible progress bars of `tqdm`. This never raises."""
    told = False
    with suppress(Exception):
        bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if bars is not None and len(bars._instances):
            with bars.external_write_mode(file=sys.stderr):
                told = True
                tell(message)
    if not told:
        tell(message)


def expected_points(schedule: Schedule, step: int, max_steps: int | None) -> int | None:
    """How many more points a schedule gives, including the one at `step`; None if that cannot be told."""
    found = None if max_steps is None else count(schedule, step, max_steps)
    return None if found is None else found + 1


def beginning(
    meter: Meter,
    preflight: Preflight,
    rules: LiveRules,
    schedule: Schedule,
    *,
    step: int,
    max_steps: int | None,
    at_finish: bool,
) -> str:
    """What will be measured and when, what it will cost, and when rules can act at the earliest.

    Args:
        meter: the meter that measures.
        preflight: what the meter has found out about the model.
        rules: the rules of the run.
        schedule: when to measure.
        step: the step at which the run begins.
        max_steps: the step at which it will end, if known.
        at_finish: whether the last step is measured in any case.
    """
    when = f"at step {step:,}, {in_words(schedule)}"
    when += ", at every checkpoint" if rules.selects else ""
    when += " and at the last step" if at_finish else ""
    points = expected_points(schedule, step, max_steps)
    if points is not None and max_steps is not None:
        last = at_finish and max_steps > step and not (count(schedule, max_steps - 1, max_steps) or 0)
        when += f", about {points + last:,} points up to step {max_steps:,}"
    tokens = sum(int(probe.attention_mask.sum()) for probe in meter.probes)
    probes = " and ".join(repr(probe.name) for probe in meter.probes)
    passes = "once" if preflight.passes == 1 else f"{preflight.passes} times"
    parts = [
        f"measuring on probe {probes} {when}",
        f"a point runs {tokens:,} tokens through the model {passes}, reads {len(preflight.layers)} layers and needs "
        f"{preflight.memory / 2**20:,.0f} MiB beside the forward pass",
    ]
    parts += [f"no {view} plane, because {why}" for view, why in preflight.missing.items()]
    if told := rules.describe(has_loss=_has_loss(meter)):
        parts.append(told)
    return "; ".join(parts)


def never_acts(meter: Meter, rules: LiveRules, points: int, *, step: int, max_steps: int) -> list[str]:
    """One sentence for each rule that needs more points or steps than the run will have.

    Args:
        meter: the meter that measures.
        rules: the rules of the run.
        points: number of scheduled points in the whole run, including those of an earlier part.
        step: the step at which the run begins.
        max_steps: the step at which it will end.
    """
    found = []
    for name, number in rules.earliest(has_loss=_has_loss(meter)).items():
        if points < number:
            interval = (max_steps - step) // number
            more = f"Measure more often (every_n_steps={interval}) or train longer" if interval else "Train longer"
            found.append(
                f"{name} cannot act in this run: expected at least {number} scheduled points, got {points} up to step "
                f"{max_steps:,}. {more}"
            )
    start = rules.selection.select_from
    if rules.selects and isinstance(start, int) and start > max_steps:
        found.append(
            f"selection cannot act in this run: expected select_from= of at most {max_steps:,}, the last step, got "
            f"{start:,}. Choose an earlier step"
        )
    return found


def measured(point: Measurement, rules: LiveRules) -> str:
    """One line for a point: step, loss, the number shown first, phase, decision and cost.

    Args:
        point: the point that was just measured.
        rules: the rules of the run, after they have taken the point.
    """
    parts = []
    if point.loss is not None:
        parts.append(f"loss {point.loss:.4g}")
    parts += _numbers_of(point)
    parts += [f"{name} information {value.information:.3g}" for name, value in point.features.items()]
    if rules.phase is not None:
        parts.append(f"phase {rules.phase.name.lower()}")
    if rules.decision is not None:
        parts.append(f"stopping: {'stop, ' if rules.decision.would_stop else ''}{_IN_WORDS[rules.decision.reason]}")
    if rules.selects:
        parts.append("can be selected" if rules.can_select else "cannot be selected")
    cost = [] if point.seconds is None else [f"{point.seconds:.1f} s"]
    cost += [] if point.overhead is None else [f"{point.overhead:.1%} of the time so far"]
    return f"step {point.step:,}: {', '.join(parts)}{'; ' if cost else ''}{', '.join(cost)}"


def _numbers_of(point: Measurement) -> list[str]:
    """The number shown first if there is one, or else local numbers, or else plain ones (docs/evidence.md)."""
    score, complexity, expressivity = point.shown_first().values()
    if score is not None:
        plane = [f"complexity {complexity:.3g}"] if complexity is not None else []
        plane += [f"expressivity {expressivity:.3g}"] if expressivity is not None else []
        return [f"{FIRST_VIEW} score {score:.3g}" + (f" ({', '.join(plane)})" if plane else "")]
    plane_point = point.orders.get(point.primary or "")
    if plane_point is None:
        return []
    for kind in ("local ", ""):
        suffix = "_local" if kind else ""
        values = {
            name: getattr(plane_point, f"{name}{suffix}") for name in ("complexity", "expressivity", "optimality")
        }
        shown = [f"{kind}{name} {value:.3g}" for name, value in values.items() if value is not None]
        if values["complexity"] is not None:
            return [f"{point.primary} {shown[0]}", *shown[1:]]
    return []


def _has_loss(meter: Meter) -> bool:
    return bool(meter.loss)
