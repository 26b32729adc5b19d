"""When to stop: a rule on the measurements of a run, and no more than that; trainers act on it elsewhere."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from enum import Enum
from typing import Literal

from ib_callback.common.checks import check_integer
from ib_callback.results.measurement import Measurement, metrics_of
from ib_callback.results.metrics import Mode, better_direction, check_direction, check_metric, resolve_metric
from ib_callback.results.phases import DEFAULT_RULE, Phase, PhaseRule, PhaseTracker, check_number

_ARMED_FROM = {"compression": Phase.COMPRESSION, "fit": Phase.FITTING, "immediately": Phase.INITIAL}


class StopReason(Enum):
    """What a decision to stop, or to go on, is based on."""

    NOT_ARMED = "not armed"
    MISSING = "missing"
    IMPROVING = "improving"
    WAITING = "waiting"
    PLATEAU = "plateau"
    DIVERGING = "diverging"


@dataclass(frozen=True)
class StopDecision:
    """Whether to stop, and why, as a value and in words. True where `stop` is: `if run.step(model, step): break`."""

    stop: bool
    reason: StopReason
    message: str

    def __bool__(self) -> bool:
        return self.stop


@dataclass(eq=False, repr=False)
class PlateauStopping:
    """Stop when a metric has not improved for some measurements.

    By default it waits for the compression phase: while a model fits, its distance to the bound grows or
    wanders, and before that, in the collapse, it is the smallest of the whole run. Small models never compress,
    so that the rule never stops them; `arm="fit"` does.

    The decision is a function of the measurements so far and of the settings. After an interruption,
    `replay(trajectory)` brings a rule to where it was; there is no other state to save.

    A point off the schedule, such as one of a checkpoint, leaves the decision as it was (`Measurement.scheduled`).

    The reasons, of which the last two stop the run:

    - *not armed*: the phase has not been reached. Values before that count for nothing, as best neither.
    - *missing*: the point could not be measured, or the metric is undefined there (None) though the point is neither
      collapsed nor of complexity 0, as those of a dead model are. It is no improvement and does not count towards the
      patience: nothing was learned about the run.
    - *improving*: the value is better than the best by more than `min_delta`.
    - *waiting*: it is not, but fewer than `patience` points were so in succession; or points are still needed
      for the first smoothed value. A collapsed point (see `PhaseRule.collapse`) is never an improvement.
    - *plateau*: `patience` points in succession were no improvement.
    - *diverging*: likewise, and most of these points are collapsed, or their median is worse than the best by more
      than `divergence`.

    Args:
        monitor: a metric as logged, without prefix: `"distance_to_bound"`, `"bigram/optimality"`,
            `"preference/information"`, or `"preference"`, which means the same.
        mode: "min" if low values are better, "max" if high ones are, as for the optimality.
        patience: number of measurements without improvement after which to stop.
        min_delta: smallest change that is an improvement; with `relative`, as a share of the best value.
        relative: whether `min_delta` is multiplied by max(|best|, floor).
        arm: from when on: "compression", "fit" or "immediately". With "immediately" points are not examined for
            collapse, and a run that is watched from step 0 takes the collapsed model for the best.
        smoothing: number of measurements in the running median that is compared; 1 takes values as they are.
        divergence: share of max(|best|, floor) by which values are worse than the best if they diverge.
        floor: in the unit of the metric; a distance may cross zero, where a share of the best value is nothing.
        phase_rule: when a phase is recognised.

    Attributes:
        best: the best value (smoothed) since the rule was armed; None before there is one.
        best_step: the step at which it was measured.

    Raises:
        ValueError: a setting out of range.
        TypeError: a number of points is not an integer, or another value of the wrong type.

    >>> PlateauStopping("optimality", mode="max", arm="immediately", patience=3)
    PlateauStopping('optimality', mode='max', patience=3, arm='immediately')
    """

    monitor: str = "distance_to_bound"
    _: KW_ONLY
    mode: Mode = "min"
    patience: int = 5
    min_delta: float = 0.0
    relative: bool = True
    arm: Literal["compression", "fit", "immediately"] = "compression"
    smoothing: int = 1
    divergence: float = 0.1
    floor: float = 0.01
    phase_rule: PhaseRule = DEFAULT_RULE

    def __post_init__(self) -> None:
        check_metric("monitor", self.monitor)
        check_direction(self.mode)
        if self.arm not in _ARMED_FROM:
            raise ValueError(f"arm must be one of {', '.join(_ARMED_FROM)}, got {self.arm!r}")
        for name in ("patience", "smoothing"):
            check_integer(name, getattr(self, name), minimum=1, cure="it is a number of measurements")
        for name in ("min_delta", "divergence", "floor"):
            check_number(name, getattr(self, name))
        self.reset()

    def __repr__(self) -> str:
        return f"PlateauStopping({self.monitor!r}, mode={self.mode!r}, patience={self.patience}, arm={self.arm!r})"

    def reset(self, metric: str | None = None) -> None:
        """Forget every measurement.

        Args:
            metric: full name of the monitored one, where `check` has found it: points that lack it, measured before it
                was, then count as undefined. None: the first point that could be measured must have it.
        """
        self._metric: str | None = metric
        self._phases = PhaseTracker(self.phase_rule)
        self._values: list[float] = []  # those of points that are not collapsed, the last few
        self.best: float | None = None
        self.best_step: int | None = None
        self._worse: list[float | None] = []  # since the best; None for collapsed points
        self._decision = self._go_on(StopReason.WAITING, "no point of the schedule has been measured")

    def check(self, available: Measurement | Iterable[str]) -> str:
        """The full name of the monitored metric, if it is among those measured; a warning if `mode` is the wrong way.

        Args:
            available: a measured point, or names such as `metric_names` gives.

        Raises:
            ValueError: it is not; the message lists those that are.
        """
        try:
            names = metrics_of(available) if isinstance(available, Measurement) else available
            metric = resolve_metric(self.monitor, names)
        except ValueError as error:
            raise ValueError(f"{self!r} cannot work: {error}") from None
        if better_direction(metric) not in (None, self.mode):
            warnings.warn(
                f"{self!r} takes a change for the worse as an improvement; "
                f"did you mean mode={better_direction(metric)!r}?",
                RuntimeWarning,
                stacklevel=2,
            )
        return metric

    def replay(self, measurements: Iterable[Measurement]) -> StopDecision | None:
        """Forget every measurement and take these instead; the decision at the last one, None if there is none."""
        points = list(measurements)
        # The first ones, of an earlier version or with other settings, may lack what later ones have.
        names = dict.fromkeys(name for point in points if point.error is None for name in metrics_of(point))
        self.reset(self.check(names) if names else None)
        decision = None
        for measurement in points:
            decision = self.update(measurement)
        return decision

    def update(self, measurement: Measurement, phases: PhaseTracker | None = None) -> StopDecision:
        """Take the next measurement of the run.

        Args:
            measurement: later than all before it.
            phases: of the run, if they are followed anyway; it has taken this measurement. None: the rule follows them
                itself, by its `phase_rule`.

        Raises:
            ValueError: the metric does not exist; raised by the first point that could be measured.
        """
        if self._metric is None and measurement.error is None:
            self._metric = self.check(measurement)
        if measurement.scheduled:
            self._decision = self._decide(measurement, phases)
        elif phases is None and self.arm != "immediately":
            self._phases.update(measurement)
        return self._decision

    def _decide(self, measurement: Measurement, phases: PhaseTracker | None) -> StopDecision:
        collapsed = False
        if self.arm != "immediately":
            if phases is None:
                phases = self._phases
                phases.update(measurement)
            collapsed = phases.collapsed
            if phases.phase < _ARMED_FROM[self.arm]:
                waits_for = "fitting" if self.arm == "fit" else "compression"
                return self._go_on(StopReason.NOT_ARMED, f"the {waits_for} phase has not been recognised yet")
        if measurement.error is not None:
            return self._go_on(StopReason.MISSING, f"the point could not be measured ({measurement.error})")
        value = measurement.scalars().get(self._metric or "")
        undefined = value is None or not math.isfinite(value)
        # Of a dead model, whose complexity is 0, a ratio is undefined for good.
        if collapsed or (undefined and measurement.complexity == 0):
            return self._judge(measurement.step, None)
        if undefined:
            return self._go_on(StopReason.MISSING, f"{self._metric} is undefined at this point")
        return self._judge(measurement.step, value)

    def _judge(self, step: int | None, value: float | None) -> StopDecision:
        """Decide on a value since arming; None if its point is collapsed."""
        smooth = None
        if value is not None:
            self._values = [*self._values, value][-self.smoothing :]
            if len(self._values) < self.smoothing:
                return self._go_on(StopReason.WAITING, f"{len(self._values)} of {self.smoothing} points to smooth over")
            smooth = statistics.median(self._values)
            if self.best is None or self._gain(smooth, self.best) > self._least_gain(self.best):
                self.best, self.best_step = smooth, step
                self._worse.clear()
                return self._go_on(StopReason.IMPROVING, f"{self._metric} is at its best, {smooth:.4g}")
        self._worse.append(smooth)
        since = "no value yet" if self.best is None else f"no improvement on {self.best:.4g} at step {self.best_step}"
        count = len(self._worse)
        if count < self.patience:
            return self._go_on(StopReason.WAITING, f"{since} for {count} of {self.patience} measurements")
        reason, how = StopReason.PLATEAU, "a plateau"
        measured = [number for number in self._worse if number is not None]
        if 2 * len(measured) < count or self.best is None:
            reason, how = StopReason.DIVERGING, "representations have collapsed"
        else:
            loss = -self._gain(statistics.median(measured), self.best)
            if loss > self.divergence * max(abs(self.best), self.floor):
                reason, how = StopReason.DIVERGING, f"diverging, by {loss:.4g}"
        return StopDecision(True, reason, f"{self._metric}: {since} for {count} measurements: {how}")

    def _gain(self, value: float, best: float) -> float:
        return value - best if self.mode == "max" else best - value

    def _least_gain(self, best: float) -> float:
        return self.min_delta * max(abs(best), self.floor) if self.relative else self.min_delta

    def _go_on(self, reason: StopReason, message: str) -> StopDecision:
        return StopDecision(False, reason, message)
