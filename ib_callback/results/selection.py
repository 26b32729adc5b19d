"""Which point of a run is the best one, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ib_callback.results.guard import Guard, check_guard, tolerance_of
from ib_callback.results.measurement import Measurement, metrics_of
from ib_callback.results.metrics import (
    Mode,
    better_direction,
    check_direction,
    check_metric,
    feature_of,
    resolve_metric,
)
from ib_callback.results.noise import MIN_VALUES, scatter
from ib_callback.results.phases import (
    DEFAULT_RULE,
    Phase,
    PhaseRule,
    PhaseTracker,
    check_number,
    find_phases,
    starts_trained,
)
from ib_callback.results.stopping import guarded_rule

SelectFrom = Literal["compression", "fit"] | int
_FROM_PHASE = {"compression": Phase.COMPRESSION, "fit": Phase.FITTING}
# Beyond this many standard deviations a difference is not taken for noise.
_CLEAR = 2.0
# Information that random labels reach in a greater share of cases is no evidence of any.
_BY_CHANCE = 0.05
# Why a point is none that could be chosen otherwise.
NO_CHECKPOINT = "no checkpoint"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A point of the run, and whether it can be selected.

    Attributes:
        measurement: the point.
        value: of the metric; None where it is undefined.
        rejected: why it cannot be selected; None if it can.
    """

    measurement: Measurement
    value: float | None
    rejected: str | None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best point of a run, the next best one, and what the difference between them means.

    Attributes:
        best: the best candidate; None if there is none.
        runner_up: the second best; None if there is none.
        noise: standard deviation of the noise in one value, estimated by `scatter` from the values of
            all measured points from the start of the selection on, collapsed ones left out; None if these
            are fewer than 8. What is slower than a few measurements is not noise in this sense.
        candidates: every point of the run, in its order.
        by: full name of the metric.
        fallback: where nothing can be selected, the candidate that is kept meanwhile: that of the lowest held-out loss
            or, without a loss, the latest one; None with `guard=None`, and of points without a checkpoint.
    """

    best: Candidate | None
    runner_up: Candidate | None
    noise: float | None
    candidates: tuple[Candidate, ...] = field(repr=False)
    by: str = ""
    fallback: Candidate | None = None

    @property
    def p_value(self) -> float | None:
        """Share of random labellings that say as much at the best point; None unless it was selected by a feature."""
        feature = None if self.best is None else self.best.measurement.features.get(self.by.partition("/")[0])
        return None if feature is None else feature.information_p_value

    @property
    def may_be_chance(self) -> bool:
        """Whether a feature was selected by of which labels at random would say as much in over 5 % of cases."""
        return self.p_value is not None and self.p_value > _BY_CHANCE

    @property
    def difference(self) -> float | None:
        """How much better the best value is than that of the runner-up, 0 or more; None without one."""
        values = [c.value for c in (self.best, self.runner_up) if c is not None and c.value is not None]
        return abs(values[0] - values[1]) if len(values) == 2 else None

    @property
    def within_noise(self) -> bool | None:
        """Whether the difference is less than two standard deviations of a difference; None if unknown."""
        if self.difference is None or self.noise is None:
            return None
        # Each of the two values has the noise.
        return self.difference <= _CLEAR * 2**0.5 * self.noise

    def describe(self) -> str:
        """One or two sentences for a person."""
        if self.best is None:
            reasons = dict.fromkeys(c.rejected for c in self.candidates if c.rejected)
            return f"No point can be selected: {'; '.join(reasons) or 'nothing was measured'}."
        text = f"The best point is step {self.best.measurement.step:,}, with {self.best.value:.4g}."
        if self.may_be_chance:
            text += f" That may be chance: labels at random say as much in {self.p_value:.0%} of cases."
        elif self.p_value is not None:
            text += f" Its information is resolved: p = {self.p_value:.2g}."
        if self.runner_up is None or self.difference is None:
            return f"{text} It is the only one."
        text += f" The next best, step {self.runner_up.measurement.step:,}, differs by {self.difference:.3g}"
        if self.noise is None:
            return f"{text}; there are too few points (under {MIN_VALUES}) to tell whether that is noise."
        within = "within" if self.within_noise else "beyond"
        return f"{text}, {within} the noise (standard deviation of one value {self.noise:.2g}, from the scatter)."


@dataclass(frozen=True)
class Selection:
    """By which metric, and from when on, the best point of a run is chosen.

    Collapsed and untrained models have the lowest complexity and distance of a run, and the plain optimality of
    an untrained one can equal that of the trained one: hence the default to choose in the compression phase. With
    "compression" and "fit" the points from the start of that phase on count, in hindsight, unless they are
    collapsed; none as long as it has not been recognised. A step as `select_from` is taken at its word.

    Nor can a point be selected that has learned little: soon after a collapse, when representations still lie close
    together, the distance is small and the optimality may be high, though hardly anything is expressed yet.

    Nor, with the guard, a point whose loss on held-out text is above the lowest of the run, of those that can be
    selected (that have a checkpoint), by more than the tolerance: of checkpoints equal in loss the better by the metric
    is chosen. Where points have no loss there is no guard, nor is there one of runs from trained weights, whose points
    all count, and of a selection by a feature, unless it is a tolerance.

    With `guard=None` exactly the published choice: the best value among all points that `select_from` admits, phases
    read on the plain plane; collapsed ones, and those that have learned little, are not looked for.

    A value that is undefined is never best. Of equal values the earlier is the better.

    Args:
        by: a metric as logged, without prefix, or a feature, which means its information.
        mode: "min" or "max"; by default what is known to be better for the metric.
        select_from: "compression", "fit", or the first step that can be selected.
        phase_rule: when a phase is recognised.
        least_learned: share of the highest expressivity of the run so far that a point must have, unless `select_from`
            is a step.
        guard: "loss", a tolerance in nats a token, or None for the published choice; by default that of the run,
            outside of one "loss".

    Raises:
        ValueError: no default exists for `mode`, or another setting is out of range.
        TypeError: `by` is no text.
    """

    by: str = "optimality"
    mode: Mode | None = None
    select_from: SelectFrom = "compression"
    phase_rule: PhaseRule = DEFAULT_RULE
    least_learned: float = 0.5
    guard: Guard = "run"

    def __post_init__(self) -> None:
        check_metric("by", self.by)
        if self.mode is None:
            mode = better_direction(self.by)
            if mode is None:
                raise ValueError(f'neither high nor low {self.by} is known to be better: give mode="min" or "max"')
            object.__setattr__(self, "mode", mode)
        check_direction(self.mode)
        start = self.select_from
        if start not in _FROM_PHASE and (isinstance(start, (bool, str)) or not isinstance(start, int) or start < 0):
            raise ValueError(f'select_from must be "compression", "fit" or a step (0 or more), got {start!r}')
        check_number("least_learned", self.least_learned, below=1.0)
        object.__setattr__(self, "guard", check_guard(self.guard))

    @property
    def rule(self) -> PhaseRule:
        """How phases are read: by `phase_rule` and the guard."""
        return guarded_rule(self.phase_rule, self.guard)

    def margin(self, measurement: Measurement, *, trained: bool) -> float | None:
        """By how much the loss may be above the lowest, in nats; None where that does not count.

        Args:
            measurement: a point of the run.
            trained: whether the run began from trained weights.
        """
        by_feature = feature_of(self.by, measurement.features) is not None
        return None if self.guard == "loss" and (trained or by_feature) else tolerance_of(self.guard)

    def value(self, measurement: Measurement) -> float | None:
        """The number that counts; None where it is undefined or the point is missing.

        Raises:
            ValueError: a point that was measured has no such metric.
        """
        if measurement.error is not None:
            return None
        return measurement.scalars()[resolve_metric(self.by, metrics_of(measurement))]

    def better(self, value: float, than: float) -> bool:
        """Whether a value is strictly better than another one."""
        return value > than if self.mode == "max" else value < than

    def ranked(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Those that have a value, the best one first; of equal values the earlier one."""
        known = (candidate for candidate in candidates if candidate.value is not None)
        return sorted(known, key=lambda candidate: candidate.value or 0.0, reverse=self.mode == "max")

    def eligible(self, measurement: Measurement, tracker: PhaseTracker) -> bool:
        """Whether a point can be selected as known when it was measured; `tracker` must have taken it last.

        False for the points between the start of a phase and its recognition, which `choose` counts.
        """
        trained = bool(tracker.trained)
        phase = _before_memorising(tracker.phase, tracker.has_compressed)
        if self._rejected(measurement, phase, tracker.collapsed, None, trained) is not None:
            return False
        margin = self.margin(measurement, trained=trained)
        lowest = tracker.lowest_loss
        if margin is None or lowest is None:
            return True
        return measurement.loss is not None and measurement.loss <= lowest + margin

    def best(self, measurements: Sequence[Measurement]) -> Measurement | None:
        """The best point of a run; None if none can be selected."""
        best = self.choose(measurements).best
        return None if best is None else best.measurement

    def choose(self, measurements: Sequence[Measurement], *, available: Collection[int] | None = None) -> Choice:
        """The best point of a run, with all that is known about the choice.

        Args:
            measurements: in the order of training.
            available: the steps of which a checkpoint exists; by default every step can be selected.

        Raises:
            ValueError: no point that was measured has the metric; the message lists those that exist.
        """
        names = dict.fromkeys(name for m in measurements if m.error is None for name in metrics_of(m))
        by = resolve_metric(self.by, names) if names else self.by
        reasons, trained = self.reasons(measurements)
        measured = [m for m in measurements if m.error is None and m.loss is not None]
        # A checkpoint is compared with those that exist; whether one is missed, with all that might.
        of_all, of_existing = (
            min((m.loss for m in points if m.loss is not None), default=math.inf)
            for points in (measured, [m for m in measured if available is None or m.step in available])
        )
        candidates: list[Candidate] = []
        values: list[float] = []
        steps: list[int] = []
        for m, rejected in zip(measurements, reasons, strict=True):
            # A metric that only some points have is undefined at the others.
            value = m.scalars().get(by)
            if rejected is None and value is None:
                rejected = "the metric is undefined"
            if rejected is None and value is not None and m.step is not None:
                values.append(value)
                steps.append(m.step)
                margin = self.margin(m, trained=trained)
                exists = available is None or m.step in available
                lowest = of_existing if exists else of_all
                if margin is not None and m.loss is None and measured:
                    rejected = "no loss on held-out text, unlike others"
                elif margin is not None and m.loss is not None and m.loss > lowest + margin:
                    rejected = f"loss {m.loss - lowest:.2f} nats above the lowest"
                elif not exists:
                    rejected = NO_CHECKPOINT
            candidates.append(Candidate(measurement=m, value=value, rejected=rejected))
        best, runner_up, *_ = [*self.ranked(c for c in candidates if c.rejected is None), None, None]
        return Choice(
            best=best,
            runner_up=runner_up,
            noise=scatter(values, steps),
            candidates=tuple(candidates),
            by=by,
            fallback=None if best is not None or self.guard is None else self._fallback(candidates, available),
        )

    def reasons(self, measurements: Sequence[Measurement]) -> tuple[list[str | None], bool]:
        """Why each point cannot be selected, None if it can; values, losses and checkpoints are not looked at.

        Returns:
            That, and whether the run began from trained weights.
        """
        # A step needs no phases, which could not be found without a null.
        if isinstance(self.select_from, int):
            trained = starts_trained(measurements, self.rule)
            return [self._rejected(m, Phase.INITIAL, False, None, trained) for m in measurements], trained
        found = find_phases(measurements, self.rule)
        has_compressed = found.compression_start is not None
        told = zip(measurements, found.phases, found.collapsed, found.learned, strict=True)
        return [
            self._rejected(m, _before_memorising(phase, has_compressed), collapsed, learned, found.trained)
            for m, phase, collapsed, learned in told
        ], found.trained

    @staticmethod
    def _fallback(candidates: Iterable[Candidate], available: Collection[int] | None) -> Candidate | None:
        """What is kept as long as nothing can be selected."""
        exist = [c for c in candidates if c.measurement.step is not None and c.measurement.step in (available or ())]
        with_loss = [c for c in exist if c.measurement.loss is not None]
        if with_loss:
            return min(with_loss, key=lambda c: c.measurement.loss or 0.0)
        return exist[-1] if exist else None

    def _rejected(
        self, measurement: Measurement, phase: Phase | None, collapsed: bool, learned: float | None, trained: bool
    ) -> str | None:
        if measurement.error is not None:
            return f"not measured: {' '.join(measurement.error.split())}"
        if measurement.step is None:
            return "without a step"
        if isinstance(self.select_from, int):
            return f"before step {self.select_from:,}" if measurement.step < self.select_from else None
        if not trained and (phase is None or phase < _FROM_PHASE[self.select_from]):
            return f"not in the {'fitting' if self.select_from == 'fit' else 'compression'} phase"
        if self.guard is None:
            return None
        if collapsed:
            return "collapsed"
        if learned is not None and learned < self.least_learned:
            return f"less than {self.least_learned:.0%} of the highest expressivity"
        return None


def _before_memorising(phase: Phase | None, has_compressed: bool) -> Phase | None:
    """What a run that memorises had come to before: not every one has compressed."""
    if phase is not Phase.MEMORISING:
        return phase
    return Phase.COMPRESSION if has_compressed else Phase.FITTING
