"""The rules applied to a run while it goes on: its phase, what can be selected, and whether to stop."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from ib_callback.results.measurement import Measurement
from ib_callback.results.metrics import PRIMARY_SCALARS, better_direction, metric_names, resolve_metric
from ib_callback.results.phases import PhaseTracker
from ib_callback.results.selection import Choice, SelectFrom, Selection
from ib_callback.results.stopping import PlateauStopping, StopDecision
from ib_callback.results.trajectory import Trajectory

SELECTABLE = "selectable/"


class LiveRules:
    """What is known of a run by its last point. A function of the points alone: nothing else needs saving.

    Args:
        orders: n-gram orders that are measured.
        features: feature labels that are measured.
        early_stopping: the rule that says when to stop; None if none does.
        select: what to select checkpoints by: a metric or a feature, or a `Selection` with more to it; None if
            none are selected.
        select_from: from when on points can be selected.
        primary, bound: as for `Meter`; they decide which metrics there are.

    Attributes:
        stopping: the rule, or None.
        selection: which points can be selected and, if `selects`, by what.
        selects: whether checkpoints are to be selected.
        metrics: names of all metrics that are measured.
        decision: at the last point; None without a rule or a point.

    Raises:
        TypeError: a rule that is none.
        ValueError: a metric that is not measured (the message lists those that are), or a setting out of range.
    """

    def __init__(
        self,
        orders: Iterable[str],
        features: Iterable[str] = (),
        *,
        early_stopping: PlateauStopping | None = None,
        select: str | Selection | None = None,
        select_from: SelectFrom = "compression",
        primary: str | None = None,
        bound: str = "diagonal",
    ) -> None:
        features = tuple(features)
        self.metrics = metric_names(orders, features, primary=primary, bound=bound)
        if early_stopping is not None and not isinstance(early_stopping, PlateauStopping):
            raise TypeError(
                f"early_stopping: expected an ib.PlateauStopping or None, got {early_stopping!r}; "
                "ib.PlateauStopping() stops on the distance to the bound"
            )
        self._monitored = None if early_stopping is None else early_stopping.check(self.metrics)
        if select is not None and not isinstance(select, (str, Selection)):
            raise TypeError(f"select: expected the name of a metric or feature, or an ib.Selection, got {select!r}")
        if isinstance(select, Selection):
            self.selection = select
        else:
            if select is not None:
                _check_exists(select, self.metrics)
            self.selection = Selection(select or "optimality", select_from=select_from)
        self._selected_by = "" if select is None else _check_exists(self.selection.by, self.metrics)
        self.stopping = early_stopping
        self.selects = select is not None
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
            self.decision = self.stopping.update(point)
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
