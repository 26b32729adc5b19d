"""Decide when to stop, from the measurements of a run. Trainers act on the decision elsewhere."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, replace
from enum import Enum
from typing import Literal

from ib_callback.common.checks import check_integer
from ib_callback.common.errors import RepresentationError
from ib_callback.results.guard import TOLERANCE, Guard, check_guard, tolerance_of
from ib_callback.results.measurement import Measurement, metrics_of
from ib_callback.results.metrics import Mode, better_direction, check_direction, check_metric, resolve_metric
from ib_callback.results.noise import scatter
from ib_callback.results.phases import (
    DEFAULT_RULE,
    LEARNED,
    PERSISTENCE,
    Phase,
    PhaseRule,
    PhaseTracker,
    check_number,
)

_ARMED_FROM = {"compression": Phase.COMPRESSION, "fit": Phase.FITTING, "immediately": Phase.INITIAL}
# The measurements over which a loss must be flat cover at least this share of the steps taken, because five
# measurements of a dense schedule say nothing about a slow fall. With it, three recorded runs whose loss falls to the
# end are not stopped before the end. One run that becomes flat is stopped 7 measurements later.
_COVERED = 1 / 8
# A model is dead if it has learned nothing beyond token frequencies for this share of its steps.
_DEAD = 1 / 2
# A monitored quantity still improves if it does so by more than this many standard deviations of its noise.
_CLEAR = 2.0


class StopReason(Enum):
    """The reason for a decision to stop or to go on."""

    NOT_ARMED = "cannot act yet"
    MISSING = "missing"
    IMPROVING = "improving"
    WAITING = "needs more points"
    PLATEAU = "plateau"
    DIVERGING = "diverging"
    MEMORISING = "memorising"
    COLLAPSED = "collapsed"

    @classmethod
    def _missing_(cls, value: object) -> StopReason | None:
        # Earlier versions wrote these words into summaries.
        return {"not armed": cls.NOT_ARMED, "waiting": cls.WAITING}.get(str(value))


@dataclass(frozen=True)
class StopDecision:
    """Whether to stop, and why. It is true if `stop` is true, so you can write `if run.step(model, step): break`.

    Attributes:
        stop: whether to stop.
        reason: the reason for the decision.
        message: the reason in words.
        would_stop: whether the rule would stop if it acted (`PlateauStopping(act=False)` never acts).
    """

    stop: bool
    reason: StopReason
    message: str
    would_stop: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "would_stop", self.would_stop or self.stop)

    def __bool__(self) -> bool:
        return self.stop


@dataclass(eq=False, repr=False)
class PlateauStopping:
    """Stop when a run has converged, memorises, diverges or has collapsed.

    *With the guard*, which is the default, the rule also looks at the loss on held-out text (`Measurement.loss`). If
    points have this loss, no decision acts before the model has begun to learn (`PhaseTracker.begun`), except the last
    two in this list:

    - A run has *converged* if since the fit the loss and the monitored metric are both flat: over the last `patience`
      measurements, and over the last eighth of the steps. The loss is flat if its lowest value is less than the
      tolerance below the lowest before. The metric is flat if its best value is not better than in as many measurements
      before these, beyond its noise and `min_delta`. `arm` does not matter in this case.
    - A run *memorises*, *diverges* or has *collapsed* if the loss exceeds its minimum by more than the tolerance for
      `patience` measurements (at least 3) and an eighth of the steps. It memorises if its phase says so, has collapsed
      if its expressivity has, and diverges otherwise.
    - A run has also *collapsed* if its loss has fallen and then stands still for half of the run without a fit.
    - A run also *diverges* if its representations are not finite for `patience` measurements.

    *Without a loss* (one message says so), and for runs from trained weights unless the guard is a tolerance, the rule
    stops when the metric has not improved for `patience` measurements. For trained weights, a plateau counts only if
    the training loss, if known, does not fall either. By default the rule waits for the compression phase, because the
    distance to the bound grows or wanders while a model fits, and is the smallest of the whole run in the collapse.
    Short runs may never compress.

    *With `guard=None`* the rule is exactly the published one: a plateau of the metric from `arm` on, with phases read
    on the plain plane. No point is checked for collapse.

    The decision depends only on the measurements so far and on the settings. After an interruption,
    `replay(trajectory)` restores the rule; there is no other state to save.

    A point off the schedule, such as one for a checkpoint, does not change the decision (`Measurement.scheduled`).

    The reasons are as follows; the last four stop the run:

    - *cannot act yet* (`NOT_ARMED`): the phase in which the rule starts has not been recognised, or the held-out loss
      has not fallen by half a nat yet. Values before that are ignored, also as the best value.
    - *missing*: the point could not be measured, lacks the loss that others have, or the metric is undefined (None)
      although the point is neither collapsed nor has complexity 0, as in a dead model. Such a point is not an
      improvement and does not count towards the patience, because it says nothing about the run.
    - *improving*: the value is better than the best by more than `min_delta`; with the guard also if the loss falls.
    - *needs more points* (`WAITING`): fewer than `patience` points in succession were no improvement, or there are too
      few points for the first smoothed value. A collapsed point (see `PhaseRule.collapse`) is never an improvement.
    - *plateau*: the run has converged, or `patience` points in succession were not an improvement.
    - *diverging*: the loss rises; without a loss, the median of those points is worse than the best by more than
      `divergence`.
    - *collapsed*: the representations have collapsed; without a loss, most of those points are collapsed.
    - *memorising*: the loss on held-out text rises while the training loss falls.

    Args:
        monitor: a metric as logged, without prefix: `"distance_to_bound"`, `"bigram/optimality"`,
            `"preference/information"`, or `"preference"`, which means the same.
        mode: "min" if low values are better, "max" if high values are, as for the optimality.
        patience: number of measurements without improvement after which to stop.
        min_delta: smallest change that is an improvement; with `relative`, as a share of the best value.
        relative: whether `min_delta` is multiplied by max(|best|, floor).
        arm: when the rule starts: "compression", "fit" or "immediately". With "immediately" points are not checked for
            collapse, so a run that is measured from step 0 takes the collapsed model as the best.
        smoothing: number of measurements in the running median that is compared; 1: no smoothing.
        divergence: values diverge if they are worse than the best by this share of max(|best|, floor).
        floor: lower limit for the scale, in the unit of the metric. It is needed because a distance may cross zero,
            where a share of the best value is nothing.
        guard: "loss", a tolerance in nats a token, or None for the published rule; by default the guard of the run, and
            "loss" outside of a run.
        act: if False, the rule decides and reports (`StopDecision.would_stop`, `ib/would_stop`), but never stops.
        phase_rule: settings for finding phases.

    Attributes:
        best: the best (smoothed) value since the rule could act; None before there is one. With the guard, the best of
            the last measurements that were compared.
        best_step: the step of that value.

    Raises:
        ValueError: a setting is out of range.
        TypeError: a number of points is not an integer, or another value has the wrong type.

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
    guard: Guard = "run"
    act: bool = True
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
        self.guard = check_guard(self.guard)
        if not isinstance(self.act, bool):
            raise TypeError(f"act: expected True or False, got {self.act!r}.")
        self.reset()

    def __repr__(self) -> str:
        shown = "" if self.guard == "loss" else f", guard={self.guard!r}"
        shown += "" if self.act else ", act=False"
        own = f"{self.monitor!r}, mode={self.mode!r}, patience={self.patience}, arm={self.arm!r}"
        return f"PlateauStopping({own}{shown})"

    def reset(self, metric: str | None = None) -> None:
        """Forget every measurement.

        Args:
            metric: full name of the monitored metric, as returned by `check`. Earlier points that lack it then count as
                undefined. None: the first measured point must have it.
        """
        self._metric: str | None = metric
        self._phases = PhaseTracker(guarded_rule(self.phase_rule, self.guard))
        self._history: list[tuple[int, float, float | None]] = []  # since the fit: step, loss and value
        self._values: list[float] = []  # the last few values, without those of collapsed points
        self.best: float | None = None
        self.best_step: int | None = None
        self._worse: list[float | None] = []  # values since the best; None for collapsed points
        self._all_losses: list[tuple[int, float]] = []  # step and held-out loss of all points of the schedule
        self._train_losses: list[float] = []
        self._broken = 0  # number of points in succession whose states were not finite
        self._decision = self._go_on(StopReason.WAITING, "no scheduled point has been measured yet")

    def check(self, available: Measurement | Iterable[str], *, has_loss: bool = True) -> str:
        """Return the full name of the monitored metric; warn if `mode` is the wrong direction for it.

        Args:
            available: a measured point, or names as from `metric_names`.
            has_loss: whether points have a loss, if names are given.

        Raises:
            ValueError: the metric is not measured; the message lists those that are.
        """
        try:
            names = metrics_of(available) if isinstance(available, Measurement) else available
            metric = resolve_metric(self.monitor, names)
        except ValueError as error:
            raise ValueError(f"{self!r} cannot work: {error}") from None
        if better_direction(metric) not in (None, self.mode):
            warnings.warn(
                f"{self!r} treats a change for the worse as an improvement; "
                f"did you mean mode={better_direction(metric)!r}?",
                RuntimeWarning,
                stacklevel=2,
            )
        if isinstance(available, Measurement):
            has_loss = available.loss is not None
        if self.arm == "fit" and metric.endswith("distance_to_bound") and (self.guard is None or not has_loss):
            cure = "" if self.guard is not None else 'guard="loss", which is the default, or '
            warnings.warn(
                f"{self!r}: the distance to the bound grows while a model fits, so this rule stops too early unless it "
                "also looks at the held-out loss. It stopped one recorded run at step 400 of 3,500, at a loss of 5.11. "
                f'The full run reached 4.21. Use {cure}arm="compression"',
                RuntimeWarning,
                stacklevel=2,
            )
        return metric

    def replay(self, measurements: Iterable[Measurement]) -> StopDecision | None:
        """Forget every measurement and take these instead; return the decision at the last one, None without any."""
        points = list(measurements)
        # Early points, from an earlier version or with other settings, may lack metrics that later ones have.
        names = dict.fromkeys(name for point in points if point.error is None for name in metrics_of(point))
        has_loss = any(point.loss is not None for point in points)
        self.reset(self.check(names, has_loss=has_loss) if names else None)
        decision = None
        for measurement in points:
            decision = self.update(measurement)
        return decision

    def update(self, measurement: Measurement, phases: PhaseTracker | None = None) -> StopDecision:
        """Take the next measurement of the run.

        Args:
            measurement: the next measurement, later than all before it.
            phases: tracker of the run's phases that has taken this measurement, if there is one. None: the rule follows
                the phases itself, with its `phase_rule`.

        Raises:
            ValueError: the metric does not exist; raised at the first measured point.
        """
        if self._metric is None and measurement.error is None:
            self._metric = self.check(measurement)
        if measurement.scheduled:
            self._decision = self._decide(measurement, phases)
        elif phases is None and self.arm != "immediately":
            self._phases.update(measurement)
        return self._decision

    def _decide(self, measurement: Measurement, phases: PhaseTracker | None) -> StopDecision:
        self._note(measurement)
        if self._broken >= self.patience:
            return self._stop(
                StopReason.DIVERGING,
                f"representations have not been finite for {self._broken} measurements: {measurement.error}",
            )
        collapsed = False
        # Patience alone needs no phases; without a null they could not be found.
        needs = self.arm != "immediately" or (self.guard is not None and bool(self._all_losses))
        if needs and phases is None:
            phases = self._phases
            phases.update(measurement)
        trained = phases is not None and bool(phases.trained)
        guarded = self.guard is not None and (not trained or self.guard != "loss") and bool(self._all_losses)
        if measurement.error is not None and guarded:
            return self._go_on(StopReason.MISSING, f"the point could not be measured ({measurement.error})")
        if guarded:
            assert phases is not None
            return self._judge_guarded(measurement, phases)
        if self.arm != "immediately" and not trained:
            assert phases is not None
            collapsed = phases.collapsed and self.guard is not None
            if (phases.phase or Phase.INITIAL) < _ARMED_FROM[self.arm]:
                if collapsed and measurement.error is None:  # a dead model does not count as waiting for compression
                    return self._judge(measurement.step, None)
                self._worse.clear()
                waits_for = "fitting" if self.arm == "fit" else "compression"
                return self._go_on(StopReason.NOT_ARMED, f"the {waits_for} phase has not been recognised yet")
        if measurement.error is not None:
            return self._go_on(StopReason.MISSING, f"the point could not be measured ({measurement.error})")
        value = measurement.scalars().get(self._metric or "")
        undefined = value is None or not math.isfinite(value)
        # For a dead model, whose complexity is 0, a ratio stays undefined.
        if collapsed or (undefined and measurement.complexity == 0 and self.guard is not None):
            return self._judge(measurement.step, None)
        if undefined:
            return self._go_on(StopReason.MISSING, f"{self._metric} is undefined at this point")
        decision = self._judge(measurement.step, value)
        if decision.reason is StopReason.PLATEAU and trained and self.guard is not None:
            fallen = self._training_fell()
            if fallen > TOLERANCE:
                told = f"the training loss has fallen by {fallen:.3f} nats in {self.patience} measurements"
                return self._go_on(StopReason.IMPROVING, f"{self._metric} does not change, but {told}")
        return decision

    def _note(self, measurement: Measurement) -> None:
        """Record what is needed from every point of the schedule."""
        if measurement.error is not None:
            is_broken = self.guard is not None and measurement.error.startswith(RepresentationError.__name__)
            self._broken = self._broken + 1 if is_broken else 0
            return
        self._broken = 0
        if measurement.loss is not None and measurement.step is not None:
            self._all_losses.append((measurement.step, measurement.loss))
        if measurement.train_loss is not None:
            self._train_losses.append(measurement.train_loss)

    def _training_fell(self) -> float:
        """By how many nats the training loss has fallen: mean of the last `patience` points against those before."""
        now, before = self._train_losses[-self.patience :], self._train_losses[: -self.patience][-self.patience :]
        return statistics.fmean(before) - statistics.fmean(now) if before else 0.0

    # --- with the guard

    def _judge_guarded(self, measurement: Measurement, phases: PhaseTracker) -> StopDecision:
        loss, step = measurement.loss, measurement.step
        if loss is None:
            return self._go_on(StopReason.MISSING, "the point has no held-out loss, although other points have one")
        if step is None:
            return self._go_on(StopReason.MISSING, "the point has no step")
        if phases.worse_for:
            return self._judge_worse(step, phases)
        if not phases.begun:
            return self._judge_before(step, phases)
        value = measurement.scalars().get(self._metric or "")
        self._history.append((step, loss, value if value is not None and math.isfinite(value) else None))
        return self._judge_flat(step)

    def _judge_before(self, step: int, phases: PhaseTracker) -> StopDecision:
        """For a model that has not learned more than the frequencies of tokens: decide whether it is dead."""
        earlier = [loss for at, loss in self._all_losses if at <= step * (1 - _DEAD)]
        lately = [loss for at, loss in self._all_losses if at > step * (1 - _DEAD)]
        if earlier and len(lately) >= 2 * self.patience:
            learned = self._all_losses[0][1] - min(earlier)
            fallen = min(earlier) - min(lately)
            # A model whose loss has not fallen at all may be warming up.
            if learned > LEARNED and fallen < (tolerance_of(self.guard) or TOLERANCE):
                return self._stop(
                    StopReason.COLLAPSED,
                    f"the held-out loss fell by {learned:.2f} nats, then did not change for {len(lately)} "
                    "measurements, half of the run, and the fitting phase has not begun, so representations have "
                    "collapsed",
                )
        waits_for = "the fitting phase has not been recognised yet"
        if phases.phase not in (None, Phase.INITIAL):
            waits_for = f"the held-out loss has not fallen by {LEARNED:g} nats yet"
        return self._go_on(StopReason.NOT_ARMED, waits_for)

    def _judge_worse(self, step: int, phases: PhaseTracker) -> StopDecision:
        count, needed = phases.worse_for, max(self.patience, PERSISTENCE)
        least = tolerance_of(self.guard) or TOLERANCE
        told = f"the held-out loss has been over {least:g} nats above its minimum for {_measurements(count)}"
        if count < needed:
            return self._go_on(StopReason.WAITING, f"{told}, and the rule acts after {needed}")
        if step - (phases.worse_since or 0) < _COVERED * step:
            return self._go_on(StopReason.WAITING, f"{told}, but for less than an eighth of the steps")
        if phases.phase is Phase.MEMORISING or (phases.trained and phases.train_loss_falls):
            return self._stop(StopReason.MEMORISING, phases.memorising_note())
        if phases.collapsed:
            return self._stop(StopReason.COLLAPSED, f"{told}, because representations have collapsed")
        training = {True: "although the training loss falls", False: "and the training loss rises too"}
        how = "and the training loss is not known"
        if phases.train_loss_falls is not None:
            how = training[phases.train_loss_falls]
        return self._stop(StopReason.DIVERGING, f"{told}, {how}, so the run diverges")

    def _judge_flat(self, step: int) -> StopDecision:
        """Whether loss and metric are both flat; the metric is compared with as many measurements before."""
        lately = max(self.patience, sum(at > step * (1 - _COVERED) for at, _, _ in self._history))
        if lately >= len(self._history):
            return self._go_on(
                StopReason.WAITING,
                f"{len(self._history)} measurements since the fit began, and the rule needs at least {lately + 1}",
            )
        losses = [loss for _, loss, _ in self._history]
        fallen = min(losses[:-lately]) - min(losses[-lately:])
        if fallen >= (tolerance_of(self.guard) or TOLERANCE):
            return self._go_on(
                StopReason.IMPROVING, f"the held-out loss has fallen by {fallen:.3f} nats in {lately} measurements"
            )
        values = self._smooth([(at, value) for at, _, value in self._history if value is not None])
        since = self._history[-lately][0]
        now = [(at, value) for at, value in values if at >= since]
        before = [value for at, value in values if at < since][-lately:]
        told = f"the held-out loss is flat over {lately} measurements"
        if now and before:
            pick = max if self.mode == "max" else min
            self.best_step, self.best = pick(now, key=lambda pair: pair[1])
            noise = scatter([value for _, value in values], [at for at, _ in values]) or 0.0
            gain, earlier = self._gain(self.best, pick(before)), pick(before)
            if gain > max(self._least_gain(earlier), _CLEAR * noise):
                return self._go_on(StopReason.IMPROVING, f"{told}, but {self._metric} improves by {gain:.4g}")
        return self._stop(
            StopReason.PLATEAU,
            f"over {lately} measurements the held-out loss fell by only {max(fallen, 0.0):.3f} nats and {self._metric} "
            "did not improve, so the run has converged",
        )

    def _smooth(self, values: list[tuple[int, float]]) -> list[tuple[int, float]]:
        width = self.smoothing
        return [
            (values[last][0], statistics.median(value for _, value in values[last + 1 - width : last + 1]))
            for last in range(width - 1, len(values))
        ]

    # --- without the guard

    def _judge(self, step: int | None, value: float | None) -> StopDecision:
        """Decide on a value after the rule has started; None stands for a collapsed point."""
        smooth = None
        if value is not None:
            self._values = [*self._values, value][-self.smoothing :]
            if len(self._values) < self.smoothing:
                return self._go_on(
                    StopReason.WAITING,
                    f"{len(self._values)} of the {self.smoothing} points that smoothing needs have been measured",
                )
            smooth = statistics.median(self._values)
            if self.best is None or self._gain(smooth, self.best) > self._least_gain(self.best):
                self.best, self.best_step = smooth, step
                self._worse.clear()
                return self._go_on(StopReason.IMPROVING, f"{self._metric} has a new best value, {smooth:.4g}")
        self._worse.append(smooth)
        count = len(self._worse)
        told = f"{self._metric} has had no usable value for {_measurements(count)}"
        if self.best is not None:
            told = (
                f"{self._metric} has not improved on {self.best:.4g} (step {self.best_step}) for {_measurements(count)}"
            )
        if count < self.patience:
            return self._go_on(StopReason.WAITING, f"{told}, and the rule acts after {self.patience}")
        measured = [number for number in self._worse if number is not None]
        if 2 * len(measured) < count or self.best is None:
            return self._stop(StopReason.COLLAPSED, f"{told}, because representations have collapsed")
        loss = -self._gain(statistics.median(measured), self.best)
        if loss > self.divergence * max(abs(self.best), self.floor):
            how = f"the median of these is worse by {loss:.4g}"
            return self._stop(StopReason.DIVERGING, f"{told}, and {how}, so the run diverges")
        return self._stop(StopReason.PLATEAU, f"{told}, so the run has reached a plateau")

    def _stop(self, reason: StopReason, message: str) -> StopDecision:
        return StopDecision(self.act, reason, message, would_stop=True)

    def _gain(self, value: float, best: float) -> float:
        return value - best if self.mode == "max" else best - value

    def _least_gain(self, best: float) -> float:
        return self.min_delta * max(abs(best), self.floor) if self.relative else self.min_delta

    def _go_on(self, reason: StopReason, message: str) -> StopDecision:
        return StopDecision(False, reason, message)


def _measurements(count: int) -> str:
    return "1 measurement" if count == 1 else f"{count} measurements"


def guarded_rule(rule: PhaseRule, guard: Guard) -> PhaseRule:
    """The phase rule under a guard: with its tolerance or, without a guard, on the plain plane, as published."""
    if guard is None:
        return replace(rule, tolerance=None, plane=rule.plane or "plain")
    return replace(rule, tolerance=tolerance_of(guard))
