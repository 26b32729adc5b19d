"""The rules applied to a run while it goes on: its phase, what can be selected, and whether to stop."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from ib_callback.results.measurement import Measurement
from ib_callback.results.metrics import PRIMARY_SCALARS, VIEWS, better_direction, metric_names, resolve_metric
from ib_callback.results.phases import Phases, PhaseTracker
from ib_callback.results.selection import Choice, Selection
from ib_callback.results.stopping import StopDecision
from ib_callback.results.trajectory import Trajectory
from ib_callback.run.config import RunConfig

SELECTABLE = "selectable/"
DEFAULT_CONFIG = RunConfig()


class LiveRules:
    """What is known of a run by its last point. A function of the points alone: nothing else needs saving.

    Args:
        orders: n-gram orders that are measured.
        features: feature labels that are measured.
        config: when to stop, by what to select, and the one rule for phases.
        primary, bound: as for `Meter`; they decide which metrics there are, as do the names of `views`.
        without: quantities that are not measured.

    Attributes:
        stopping: the rule, or None.
        selection: which points can be selected and, if `selects`, by what.
        selects: whether checkpoints are to be selected.
        metrics: names of all metrics that are measured.
        phase_rule: when a phase is recognised, in everything that is said of the run.
        decision: at the last point; None without a rule or a point.

    Raises:
        ValueError: a metric that is not measured; the message lists those that are.
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
        self.stopping = config.early_stopping
        self.selects = config.select is not None
        self._monitored = None if self.stopping is None else self.stopping.check(self.metrics)
        select = config.select
        if isinstance(select, str):
            _check_exists(select, self.metrics)
        if not isinstance(select, Selection):
            select = Selection(select or "optimality", select_from=config.select_from)
        self.phase_rule = config.rule_of_phases()
        self.selection = replace(select, phase_rule=self.phase_rule)
        self._selected_by = _check_exists(select.by, self.metrics) if self.selects else ""
        self._directions = {name: mode for name in self.metrics if (mode := better_direction(name)) is not None}
        # Those of the primary order and of the features are for people, all of them for stock callbacks.
        self._shown = [*PRIMARY_SCALARS, *(f"{feature}/information" for feature in features)]
        self.replay(())

    @property
    def names(self) -> list[str]:
        """Every name in `numbers`, before anything has been measured."""
        return [*self.metrics, "phase", *(SELECTABLE + name for name in self._directions)]

    @property
    def directions(self) -> dict[str, str]:
        """Which way is better, "min" or "max", by the name of each selectable number."""
        return {SELECTABLE + name: mode for name, mode in self._directions.items()}

    @property
    def needed(self) -> list[str]:
        """Names of the metrics by which is stopped or selected."""
        return [name for name in dict.fromkeys((self._monitored, self._selected_by)) if name]

    def replay(self, points: Iterable[Measurement]) -> None:
        """Forget every point and take these instead."""
        self.decision: StopDecision | None = None
        self._tracker = PhaseTracker(self.selection.phase_rule)
        self._numbers: dict[str, float | int | None] = dict.fromkeys(self.names)
        if self.stopping is not None:
            # Points of an earlier part of the run, with other settings, may lack it.
            self.stopping.reset(self._monitored)
        for point in points:
            self.update(point)

    def update(self, point: Measurement) -> None:
        """Take the next point of the run."""
        self._tracker.update(point)
        if self.stopping is not None:
            self.decision = self.stopping.update(point, self._tracker)
        if point.error is None:
            eligible = self.selection.eligible(point, self._tracker)
            values = point.scalars()
            selectable = {SELECTABLE + name: values.get(name) if eligible else None for name in self._directions}
            self._numbers = {**values, "phase": int(self._tracker.phase), **selectable}

    def numbers(self) -> dict[str, float | int | None]:
        """All numbers of the last point that could be measured, by name; None where undefined or not selectable."""
        return dict(self._numbers)

    def shown(self) -> dict[str, float]:
        """What is logged beside the metrics of the last point: the phase, and what can be selected (NaN before)."""
        selectable = {SELECTABLE + name: self._numbers.get(SELECTABLE + name) for name in self._shown}
        named: dict[str, Any] = {"phase": self._numbers["phase"], **selectable}
        return {name: float("nan") if value is None else float(value) for name, value in named.items()}

    def phases(self) -> Phases:
        """The phases of the run as far as they have been recognised, by its own rule."""
        return self._tracker.phases()

    def choose(self, trajectory: Trajectory, available: Collection[int]) -> Choice:
        """The best of the points of which a checkpoint exists, as known now."""
        if self.selects and not any(self._selected_by in point.scalars() for point in trajectory):
            # All of them were measured with other settings, before this run was resumed.
            return Choice(best=None, runner_up=None, noise=None, candidates=())
        return self.selection.choose(trajectory, available=available)


def _check_exists(name: str, metrics: list[str]) -> str:
    try:
        return resolve_metric(name, metrics)
    except ValueError as error:
        raise ValueError(f"select={name!r} cannot work: {error}") from None
