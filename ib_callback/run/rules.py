"""The rules applied to a run while it goes on: its phase, what can be selected, and whether to stop."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from ib_callback.results.guard import TOLERANCE, Guard, tolerance_of
from ib_callback.results.measurement import Measurement
from ib_callback.results.metrics import (
    PRIMARY_SCALARS,
    VIEWS,
    better_direction,
    feature_of,
    metric_names,
    resolve_metric,
)
from ib_callback.results.phases import LEARNED, PERSISTENCE, Phase, Phases, PhaseTracker
from ib_callback.results.selection import Choice
from ib_callback.results.stopping import StopDecision, guarded_rule
from ib_callback.results.trajectory import Trajectory
from ib_callback.results.trend import MIN_VALUES
from ib_callback.run.config import RunConfig

SELECTABLE = "selectable/"
# The earliest points, by number, at which a fit and a compression can be recognised. A fit shows in a maximum, a trough
# and a rise. A compression shows in a fall of the complexity over six points of the fit.
_FIT = 3
_COMPRESSION = MIN_VALUES + 1
DEFAULT_CONFIG = RunConfig()


class LiveRules:
    """What is known about a run at its last point. It depends on the points alone, so nothing else needs saving.

    Args:
        orders: n-gram orders that are measured.
        features: feature labels that are measured.
        config: when to stop, by what to select, and the one rule for phases.
        primary, bound: as for `Meter`. Together with the names of `views`, they decide which metrics there are.
        without: quantities that are not measured.

    Attributes:
        stopping: the rule, or None.
        selection: which points can be selected and, if `selects`, by what.
        selects: whether checkpoints are selected.
        metrics: names of all metrics that are measured.
        phase_rule: when a phase counts as recognised, in everything that is said about the run.
        decision: the decision at the last point; None without a rule or a point.

    Raises:
        ValueError: a metric is not measured; the message lists those that are.
    """

    def __init__(
        self,
        orders: Iterable[str],
        features: Iterable[str] = (),
        config: RunConfig = DEFAULT_CONFIG,
        *,
        primary: str | None = None,
        bound: str = "diagonal",
        views: Iterable[str] = VIEWS,
        without: Iterable[str] = (),
    ) -> None:
        features = tuple(features)
        self.metrics = metric_names(orders, features, primary=primary, bound=bound, views=views, without=without)
        self.stopping = config.stopping
        self.selects = config.select is not None
        self._monitored = None if self.stopping is None else self.stopping.check(self.metrics)
        if isinstance(config.select, str):
            _check_exists(config.select, self.metrics)
        self.selection = config.selection
        self.phase_rule = self.selection.rule
        self._selects_feature = feature_of(self.selection.by, features) is not None
        self._selected_by = _check_exists(self.selection.by, self.metrics) if self.selects else ""
        self._directions = {name: mode for name in self.metrics if (mode := better_direction(name)) is not None}
        # People are shown the numbers of the primary order and of the features. Stock callbacks get all numbers.
        self._shown = [*PRIMARY_SCALARS, *(f"{feature}/information" for feature in features)]
        self.replay(())

    @property
    def names(self) -> list[str]:
        """Every name in `numbers`, known before anything is measured."""
        would = [] if self.stopping is None or self.stopping.act else ["would_stop"]
        return [*self.metrics, "phase", *would, *(SELECTABLE + name for name in self._directions)]

    @property
    def directions(self) -> dict[str, str]:
        """Which way is better, "min" or "max", by the name of each selectable number."""
        return {SELECTABLE + name: mode for name, mode in self._directions.items()}

    @property
    def needed(self) -> list[str]:
        """Names of the metrics by which the run is stopped or checkpoints are selected."""
        return [name for name in dict.fromkeys((self._monitored, self._selected_by)) if name]

    def replay(self, points: Iterable[Measurement]) -> None:
        """Forget every point and take these instead."""
        self.decision: StopDecision | None = None
        self._tracker = PhaseTracker(self.phase_rule)
        self._told: set[str] = set()
        self._first: Measurement | None = None
        self._begins_late = self._has_loss = self._lacks_loss = False
        self._numbers: dict[str, float | int | None] = dict.fromkeys(self.names)
        if self.stopping is not None:
            # Points of an earlier part of the run, with other settings, may lack this metric.
            self.stopping.reset(self._monitored)
        for point in points:
            self.update(point)

    def update(self, point: Measurement) -> None:
        """Take the next point of the run."""
        self._tracker.update(point)
        if self.stopping is not None:
            follows = guarded_rule(self.stopping.phase_rule, self.stopping.guard) == self._tracker.rule
            self.decision = self.stopping.update(point, self._tracker if follows else None)
        if point.error is None:
            self._begins_late = self._begins_late or (self._first is None and bool(point.step))
            self._first = self._first or point
            self._has_loss = self._has_loss or point.loss is not None
            self._lacks_loss = self._lacks_loss or (self._has_loss and point.loss is None)
            eligible = self.selection.eligible(point, self._tracker)
            values = point.scalars()
            selectable = {SELECTABLE + name: values.get(name) if eligible else None for name in self._directions}
            phase = self._tracker.phase
            self._numbers = {**values, "phase": None if phase is None else int(phase), **selectable}
            if "would_stop" in self.names and self.decision is not None:
                self._numbers["would_stop"] = int(self.decision.would_stop)

    def numbers(self) -> dict[str, float | int | None]:
        """All numbers of the last point that could be measured, by name. None: undefined or not selectable."""
        return dict(self._numbers)

    def shown(self) -> dict[str, float]:
        """What trackers get in addition to the metrics of the last point: the phase, and what can be selected now.

        Undefined numbers are left out, so that no tracker has a panel without a number.
        """
        selectable = {SELECTABLE + name: self._numbers.get(SELECTABLE + name) for name in self._shown}
        named: dict[str, Any] = {"phase": self._numbers["phase"], **selectable}
        if "would_stop" in self._numbers:
            named["would_stop"] = self._numbers["would_stop"]
        return {name: float(value) for name, value in named.items() if value is not None}

    @property
    def collapsed(self) -> bool:
        """Whether the last point is collapsed."""
        return self._tracker.collapsed

    @property
    def can_select(self) -> bool:
        """Whether the last point can be selected by the requested metric."""
        return self.selects and self._numbers.get(SELECTABLE + self._selected_by) is not None

    @property
    def phase(self) -> Phase | None:
        """The phase as known at the last point."""
        return self._tracker.phase

    def describe(self, *, has_loss: bool = True) -> str:
        """What the rules do, under which conditions, and from which point on at the earliest; empty without rules.

        Args:
            has_loss: whether points have a loss on held-out text.
        """
        first, parts = self.earliest(has_loss=has_loss), []
        trained = self.phase_rule.from_trained is True
        if (rule := self.stopping) is not None:
            who = "stops" if rule.act else "would stop (act=False: it only says so)"
            if self._guarded(rule.guard, has_loss):
                worse = _points(max(rule.patience, PERSISTENCE))
                how = (
                    f"when held-out loss and {rule.monitor} are both flat for {_points(rule.patience)}, or when the "
                    f"loss is more than {tolerance_of(rule.guard):g} nats above its minimum for {worse}"
                    f"{'' if trained else ', once the model has begun to fit'}"
                )
            else:
                where = _since("immediately" if trained else rule.arm)
                how = f"when {rule.monitor} has not improved for {_points(rule.patience)}, {where}"
            parts.append(f"{who} {how}, at the {_ordinal(first['stopping'])} point of the run at the earliest")
        if self.selects:
            rule_of, start = self.selection, self.selection.select_from
            by_loss = rule_of.by == "loss"
            text = f"keeps the checkpoint with the {'lowest' if by_loss else 'best'} {rule_of.by}"
            whatever = rule_of.guard == "loss" and self._selects_feature
            if whatever:
                text += f", whatever its loss is (guard={TOLERANCE} would look at the loss)"
            elif self._guarded(rule_of.guard, has_loss) and not by_loss:
                text += f" of those with a held-out loss within {tolerance_of(rule_of.guard):g} nats of the lowest"
            at_once = start in (0, "immediately") or (trained and not isinstance(start, int))
            if isinstance(start, int):
                text += f", from step {start:,} on"
            else:
                text += f", {_since('immediately' if trained else start)}"
                text += "" if at_once else f", at the {_ordinal(first['selection'])} point at the earliest"
            if rule_of.guard is not None and not whatever and not at_once:
                text += f"; until then the {'one with the lowest loss' if has_loss else 'latest one'}"
            parts.append(text)
        return "; ".join(parts)

    def _guarded(self, guard: Guard, has_loss: bool) -> bool:
        """Whether a rule with this guard will look at the loss."""
        return guard is not None and has_loss and not (self.phase_rule.from_trained is True and guard == "loss")

    def earliest(self, *, has_loss: bool) -> dict[str, int]:
        """How many scheduled points each rule needs at least before it acts, by its name.

        These are lower bounds for a run that is measured from step 0 on. A fit is recognised at the third point or
        later, and a compression at the seventh or later. Short runs may never compress. Runs from trained weights
        have no phases.

        Args:
            has_loss: whether points have a loss on held-out text.
        """
        found = {}
        trained = self.phase_rule.from_trained is True
        if (rule := self.stopping) is not None:
            if self._guarded(rule.guard, has_loss):
                found["stopping"] = (0 if trained else _FIT - 1) + rule.patience + 1
            else:
                found["stopping"] = _first_of(rule.arm, trained) + rule.patience
        if self.selects and not isinstance(start := self.selection.select_from, int):
            found["selection"] = _first_of(start, trained)
        return found

    @property
    def given_up(self) -> str:
        """One sentence about what `guard=None` gives up; empty if nothing is given up."""
        guards = [self.stopping.guard] if self.stopping is not None else []
        guards += [self.selection.guard] if self.selects else []
        if None not in guards:
            return ""
        given_up = []
        if self.selects and self.selection.guard is None:
            given_up.append(
                "in recorded runs that overfit, plain optimality selected the last checkpoint, 1.0 to 2.3 nats above "
                "the best, and the plain distance an early one, .6 to 1.5 nats above it"
            )
        if self.stopping is not None and self.stopping.guard is None:
            given_up.append("a plateau may end a run whose loss still falls, and nothing ends one that memorises")
        return (
            f"guard=None applies the published rule, which ignores the loss: {'; '.join(given_up)}. The rule cannot "
            "tell a collapsed model from a compressed one"
        )

    def remarks(self) -> list[str]:
        """What is new to say at the last point. Each remark is made once."""
        found: dict[str, str] = {}
        guards = [rule.guard for rule in (self.stopping, self.selection if self.selects else None) if rule]
        if self._first is not None and guards:
            found |= self._on_the_guard(self._first, guards)
            better = self._first.predictive_information or 0.0
            if self._begins_late and not self._tracker.trained and better > LEARNED:
                found["late"] = (
                    f"the first point that could be measured, at step {self._first.step}, already predicts better than "
                    f"token frequencies, by {better:.1f} nats. If the run began from trained weights, pass "
                    "from_trained=True"
                )
        found |= {note[:16]: note for note in self._tracker.phases().notes if not self._tracker.trained}
        if self.decision is not None and self.decision.would_stop and not self.decision.stop:
            found[self.decision.reason.value] = f"training would stop: {self.decision.message}"
        new = {name: text for name, text in found.items() if name not in self._told}
        self._told.update(new)
        return [*new.values()]

    def _on_the_guard(self, first: Measurement, guards: list[Guard]) -> dict[str, str]:
        """Why rules run without the guard that was asked for."""
        if set(guards) == {None}:
            return {}
        found = {}
        if self._tracker.trained:
            off = ""
            if "loss" in guards:
                off = (
                    ", without the guard, because the loss on this text may well rise in fine-tuning "
                    f"(guard={TOLERANCE} turns the guard on)"
                )
            found["trained"] = (
                f"the run begins from trained weights, so it has no phases, and rules act from the first point on{off}"
            )
        by_loss = not self._tracker.trained or not set(guards) <= {"loss", None}
        if by_loss and not self._has_loss:
            found["no loss"] = "points have no loss on held-out text, so rules act without the guard"
        elif by_loss and self._lacks_loss:
            found["loss lacks"] = "some points have no loss on held-out text; guarded rules ignore these points"
        return found

    def phases(self) -> Phases:
        """The phases of the run that its own rule has recognised so far."""
        return self._tracker.phases()

    def choose(self, trajectory: Trajectory, available: Collection[int]) -> Choice:
        """The best point that has a checkpoint, as known now."""
        if self.selects and not any(self._selected_by in point.scalars() for point in trajectory):
            # All of them were measured with other settings, before this run was resumed.
            return Choice(best=None, runner_up=None, noise=None, candidates=())
        return self.selection.choose(trajectory, available=available)


def _since(start: str) -> str:
    return {
        "compression": "from the compression phase on, which short runs may never reach",
        "fit": "from the fitting phase on",
        "immediately": "from the first point on",
    }[start]


def _points(number: int) -> str:
    return f"{number} point{'s' if number != 1 else ''}"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _first_of(start: str, trained: bool) -> int:
    """The number of the point at which a rule can begin at the earliest."""
    if trained or start == "immediately":
        return 1
    return _FIT if start == "fit" else _COMPRESSION


def _check_exists(name: str, metrics: list[str]) -> str:
    try:
        return resolve_metric(name, metrics)
    except ValueError as error:
        raise ValueError(f"select={name!r} cannot work: {error}") from None
