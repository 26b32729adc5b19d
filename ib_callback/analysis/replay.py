"""Replay a stopping rule on finished runs: when it would have stopped, what that saves, and what it costs.

The paper (Conklin et al., ICLR 2026, section "Relating Representation Structure to Performance") proposes to stop when
the distance to the bound no longer falls. It leaves the evaluation of this rule to later work.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ib_callback.analysis.courses import Course
from ib_callback.plot.data import count_label
from ib_callback.results.measurement import Measurement, metrics_of
from ib_callback.results.stopping import PlateauStopping, StopDecision
from ib_callback.results.trajectory import aligned

# In the order of the table.
RULES = ("the rule", "loss alone", "oracle", "no stopping")
_WITHOUT = {"oracle": "the lowest held-out loss", "no stopping": "the end of the run"}


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Where a rule ends a run. Losses are on the probe, in nats a token; None if unknown.

    Attributes:
        rule: one of `RULES`; "oracle" stops at the lowest loss, which is unknown before the end of a run.
        step: the step at which the rule stops; None if it does not stop and the run goes on to its end.
        reason: reason of the decision to stop (`StopReason`), or of the last decision if the rule does not stop; None
            for "oracle" and "no stopping".
        message: the reason in words.
        steps_saved: number of trained steps after the stop.
        share_saved: these steps as a share of all steps.
        tokens_saved: number of tokens after the stop.
        seconds_saved: wall-clock seconds after the stop, estimated from the seconds and the share of time that
            measuring took.
        loss: loss at the stop.
        above_lowest: loss at the stop minus the lowest loss of the run.
        above_last: loss at the stop minus the last loss of the run.
        best_above_lowest: lowest loss until the stop minus the lowest loss of the run. This is the cost of stopping if
            the best checkpoint is kept.
    """

    rule: str
    step: int | None
    reason: str | None
    message: str
    steps_saved: int | None
    share_saved: float | None
    tokens_saved: int | None
    seconds_saved: float | None
    loss: float | None
    above_lowest: float | None
    above_last: float | None
    best_above_lowest: float | None


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A run and where each of `RULES` ends it.

    Attributes:
        name: name of the run.
        monitor: full name of the number that the rule monitors; None if nothing was measured.
        last: last step of the run; None without steps.
        stops: the stop of each rule that could be replayed.
        notes: remarks, as sentences.
        failed: whether the run is left out because it lacks the monitored number.
    """

    name: str
    monitor: str | None
    last: int | None
    stops: tuple[Stop, ...]
    notes: tuple[str, ...]
    failed: bool = False

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each rule, for a table."""
        for stop in self.stops:
            yield {"model": self.name, "monitor": self.monitor, "last_step": self.last, **vars(stop)}


def first_stop(points: Sequence[Measurement], rule: PlateauStopping) -> tuple[int | None, StopDecision | None]:
    """The position of the first point at which a rule stops, and its decision there.

    If the rule never stops, the position is None and the decision is its last one. The rule is reset first. Then it
    takes the points one by one, as in training.

    Raises:
        ValueError: the monitored number was not measured.
    """
    names = _metrics(points)
    rule.reset(rule.check(names) if names else None)
    decision = None
    for position, point in enumerate(points):
        decision = rule.update(point)
        if decision.would_stop:
            return position, decision
    return None, decision


def replay_runs(courses: Sequence[Course], rule: PlateauStopping) -> list[Replay]:
    """Call `replay_run` for each run. For a run without the monitored number, the result has no stops and a note.

    Raises:
        ValueError: no run has the number.
    """
    found: list[Replay] = []
    failed: list[ValueError] = []
    for course in courses:
        try:
            found.append(replay_run(course, rule))
        except ValueError as error:
            failed.append(error)
            found.append(Replay(name=course.name, monitor=None, last=None, stops=(), notes=(str(error),), failed=True))
    if len(failed) == len(courses):
        raise failed[0]
    return found


def replay_run(course: Course, rule: PlateauStopping) -> Replay:
    """Where a rule would have ended a run, compared with the loss alone, an oracle and no stopping.

    "Loss alone" is simple patience on the held-out loss. It has the same patience and `min_delta` as the rule, and acts
    from the first point on.

    Args:
        course: the run.
        rule: the rule. It finds phases by the phase rule of the run.

    Raises:
        ValueError: the monitored number was not measured.
    """
    points = [point for point in course.trajectory if point.step is not None]
    notes = []
    if len(points) < len(course.trajectory):
        notes.append(f"Points left out because they have no step: {len(course.trajectory) - len(points)}.")
    missing = sum(point.error is not None for point in points)
    if missing:
        notes.append(f"Missing points: {missing} of {len(points)}.")
    if len(points) < 2:
        return Replay(
            name=course.name, monitor=None, last=points[-1].step if points else None, stops=(),
            notes=(*notes, "With fewer than two points there is nothing to replay."),
        )  # fmt: skip
    rule = replace(rule, phase_rule=course.trajectory.phase_rule)
    stops = [_stop(points, "the rule", *first_stop(points, rule))]
    with_loss = [position for position, point in enumerate(points) if point.loss is not None]
    if with_loss:
        alone = PlateauStopping(
            "loss", mode="min", patience=rule.patience, min_delta=rule.min_delta, relative=rule.relative,
            arm="immediately", guard=None,
        )  # fmt: skip
        stops.append(_stop(points, "loss alone", *first_stop(points, alone)))
        best = min(with_loss, key=lambda position: points[position].loss or 0.0)
        stops.append(_stop(points, "oracle", best, None))
    else:
        notes.append("No held-out loss was measured, so the cost of a stop is not known.")
    stops.append(_stop(points, "no stopping", None, None))
    names = _metrics(points)
    monitor = rule.check(names) if names else None
    return Replay(name=course.name, monitor=monitor, last=points[-1].step, stops=tuple(stops), notes=tuple(notes))


def _metrics(points: Sequence[Measurement]) -> list[str]:
    return list(dict.fromkeys(name for point in points if point.error is None for name in metrics_of(point)))


def replays_text(replays: Sequence[Replay], rule: PlateauStopping) -> str:
    """The results as a table and sentences."""
    heads = ("run", "rule", "stops at", "saves", "of run", "tokens", "time", "loss", "above lowest", "above last",
             "best kept", "why")  # fmt: skip
    rows = [heads]
    for each in replays:
        for stop in each.stops:
            rows.append(
                (
                    each.name, stop.rule, "never" if stop.step is None else f"{stop.step:,}",
                    _count(stop.steps_saved), "-" if stop.share_saved is None else f"{stop.share_saved:.0%}",
                    "-" if stop.tokens_saved is None else count_label(stop.tokens_saved, "tokens"),
                    "-" if stop.seconds_saved is None else f"{stop.seconds_saved:,.0f} s",
                    _nats(stop.loss), _nats(stop.above_lowest), _nats(stop.above_last, signed=True),
                    _nats(stop.best_above_lowest), stop.reason or _WITHOUT.get(stop.rule, "-"),
                )
            )  # fmt: skip
    numbers = [str.rjust] * 9
    lines = [repr(rule), *aligned(rows, (str.ljust, str.ljust, *numbers, str.ljust)), _LEGEND]
    lines += [f"{stop.rule}, {each.name}: {stop.message}" for each in replays for stop in each.stops[:1]]
    lines += [f"{each.name}: {note}" for each in replays for note in each.notes]
    return "\n".join([*lines, "", *conclusions(replays)])


_LEGEND = (
    "saves: steps after the stop; of run: their share of all steps. above lowest, above last: the loss at the stop "
    "minus the lowest and the last loss of the run, in nats a token. best kept: the lowest loss up to the stop minus "
    "the lowest loss of the run."
)


def conclusions(replays: Sequence[Replay]) -> Iterator[str]:
    """The conclusions as sentences."""
    told = [each for each in replays if each.stops and each.stops[0].above_lowest is not None]
    if not told:
        yield "Nothing can be concluded, because the cost of a stop is not known for any of these runs."
        return
    for name in RULES[:2]:
        stops = [stop for each in told for stop in each.stops if stop.rule == name]
        if not stops:
            continue
        shares = [stop.share_saved or 0.0 for stop in stops if stop.step is not None]
        costs = [stop.above_lowest for stop in stops if stop.above_lowest is not None]
        kept = [stop.best_above_lowest for stop in stops if stop.best_above_lowest is not None]
        saves = f" and saves {statistics.median(shares):.0%} of their steps (median)" if shares else ""
        yield (
            f"{name.capitalize()} stops {len(shares)} of {len(stops)} runs{saves}. All runs end "
            f"{statistics.median(costs):.3f} nats above their lowest loss (median), at most {max(costs):.3f}. If the "
            f"best checkpoint is kept, its loss is at most {max(kept):.3f} above the lowest."
        )
    yield (
        "These costs are relative to the lowest measured loss. A longer run, or a decay of the learning rate, might "
        "have reached a lower one."
    )
    if len(told) < 5:
        few = f"{len(told)} runs are" if len(told) > 1 else "1 run is"
        yield f"{few} too few to show which rule is better."


def _stop(points: Sequence[Measurement], name: str, stops: int | None, decision: StopDecision | None) -> Stop:
    position = len(points) - 1 if stops is None else stops
    at, last = points[position], points[-1]
    assert at.step is not None
    assert last.step is not None
    losses = [(index, point.loss) for index, point in enumerate(points) if point.loss is not None]
    # If a point has no loss, the last loss before it is used.
    until = [loss for index, loss in losses if index <= position]
    loss, lowest = (until[-1] if until else None), min((loss for _, loss in losses), default=None)
    final = losses[-1][1] if losses else None
    trained = last.step - (points[0].step or 0)
    tokens = None if at.tokens_seen is None or last.tokens_seen is None else last.tokens_seen - at.tokens_seen
    times = _elapsed(points[: position + 1]), _elapsed(points)
    return Stop(
        rule=name,
        step=None if stops is None else at.step,
        reason=None if decision is None else decision.reason.value,
        message=_WITHOUT.get(name, "") if decision is None else decision.message,
        steps_saved=last.step - at.step,
        share_saved=(last.step - at.step) / trained if trained else None,
        tokens_saved=tokens,
        seconds_saved=None if times[0] is None or times[1] is None else max(times[1] - times[0], 0.0),
        loss=loss,
        above_lowest=None if loss is None or lowest is None else loss - lowest,
        above_last=None if loss is None or final is None else loss - final,
        best_above_lowest=min(until) - lowest if until and lowest is not None else None,
    )


def _elapsed(points: Sequence[Measurement]) -> float | None:
    """Seconds of a run up to its last point, from the seconds and the share of time that measuring took."""
    last = points[-1]
    if not last.overhead or any(point.seconds is None for point in points):
        return None
    return sum(point.seconds or 0.0 for point in points) / last.overhead


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _nats(value: float | None, *, signed: bool = False) -> str:
    return "-" if value is None else f"{value:+.3f}" if signed else f"{value:.3f}"
