"""Select the best point of a run, and say how sure the choice is."""

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
# A difference of more than this many standard deviations does not count as noise.
_CLEAR = 2.0
# If random labels reach the information in a greater share of cases, it is not evidence.
_BY_CHANCE = 0.05
# The reason why a point that is otherwise a candidate cannot be selected.
NO_CHECKPOINT = "no checkpoint"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A point of the run, and whether it can be selected.

    Attributes:
        measurement: the point.
        value: value of the metric; None if undefined.
        rejected: why it cannot be selected; None if it can.
    """

    measurement: Measurement
    value: float | None
    rejected: str | None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best point of a run, the second best, and whether the difference between them means anything.

    Attributes:
        best: the best candidate; None if there is none.
        runner_up: the second best candidate; None if there is none.
        noise: standard deviation of the noise in one value, estimated by `scatter` from the values of all measured
            points from the start of the selection on, without collapsed ones; None for fewer than 8 points. Changes
            that are slower than a few measurements do not count as noise.
        candidates: every point of the run, in order.
        by: full name of the metric.
        fallback: the candidate that is kept as long as nothing can be selected: the one with the lowest held-out loss
            or, without a loss, the latest one. None with `guard=None`, and if points have no checkpoint.
    """

    best: Candidate | None
    runner_up: Candidate | None
    noise: float | None
    candidates: tuple[Candidate, ...] = field(repr=False)
    by: str = ""
    fallback: Candidate | None = None

    @property
    def p_value(self) -> float | None:
        """Share of random labels with at least the information at the best point; None unless selected by a feature."""
        feature = None if self.best is None else self.best.measurement.features.get(self.by.partition("/")[0])
        return None if feature is None else feature.information_p_value

    @property
    def may_be_chance(self) -> bool:
        """Whether the point was selected by a feature, and random labels reach as much in over 5 % of cases."""
        return self.p_value is not None and self.p_value > _BY_CHANCE

    @property
    def difference(self) -> float | None:
        """How much better the best value is than that of the runner-up, at least 0; None without a runner-up."""
        values = [c.value for c in (self.best, self.runner_up) if c is not None and c.value is not None]
        return abs(values[0] - values[1]) if len(values) == 2 else None

    @property
    def within_noise(self) -> bool | None:
        """Whether the difference is less than two standard deviations of a difference; None if unknown."""
        if self.difference is None or self.noise is None:
            return None
        # Both values have this noise.
        return self.difference <= _CLEAR * 2**0.5 * self.noise

    def describe(self) -> str:
        """The choice in a few sentences."""
        if self.best is None:
            reasons = dict.fromkeys(c.rejected for c in self.candidates if c.rejected)
            return f"No point can be selected: {'; '.join(reasons) or 'nothing was measured'}."
        text = f"The best point is step {self.best.measurement.step:,}, with {self.by} {self.best.value:.4g}."
        if self.may_be_chance:
            text += f" This may be chance: random labels reach as much in {self.p_value:.0%} of cases."
        elif self.p_value is not None:
            text += f" Chance alone seldom gives so much information: p = {self.p_value:.2g}."
        if self.runner_up is None or self.difference is None:
            return f"{text} No other point can be selected."
        text += (
            f" The next best is step {self.runner_up.measurement.step:,}, with a difference of {self.difference:.3g}."
        )
        if self.noise is None:
            return f"{text} This may be noise: at least {MIN_VALUES} points are needed to estimate the noise."
        how = "Noise alone can explain this" if self.within_noise else "Noise alone does not explain this"
        return f"{text} {how}: single values scatter with a standard deviation of {self.noise:.2g}."


@dataclass(frozen=True)
class Selection:
    """The rule that selects the best point of a run: the metric, and from when on points count.

    By default the rule selects in the compression phase, because collapsed and untrained models have the lowest
    complexity and distance of a run, and because the plain optimality of an untrained model can equal that of the
    trained one. With "compression" and "fit", points from the start of that phase on count, in hindsight, unless they
    are collapsed. As long as the phase has not been recognised, no point counts. If `select_from` is a step, all points
    from that step on count.

    A point that has learned little cannot be selected. Soon after a collapse hidden states still nearly coincide: the
    distance is small and the optimality may be high, although hardly anything is expressed yet.

    The guard makes the loss on held-out text count too: a point cannot be selected if its loss exceeds the lowest loss
    by more than the tolerance. The lowest loss is that of the points with a checkpoint, because only these can be
    selected. So among checkpoints with about the same loss, the metric decides. The guard has no effect if points have
    no loss. The guard "loss" also has no effect on runs from trained weights, in which all points count, and on a
    selection by a feature. A tolerance acts there too.

    `guard=None` makes exactly the published choice: the best value among all points that `select_from` admits, with
    phases read on the plain plane. Collapsed points, and points that have learned little, are then not excluded.

    An undefined value is never best. If values are equal, the earlier point is better.

    Args:
        by: a metric as logged, without prefix, or the name of a feature, which means its information.
        mode: "min" or "max"; by default the better direction of the metric, if known.
        select_from: "compression", "fit", or the first step that can be selected.
        phase_rule: settings for finding phases.
        least_learned: a point must have at least this share of the highest expressivity of the run so far, unless
            `select_from` is a step.
        guard: "loss", a tolerance in nats a token, or None for the published choice; by default the guard of the run,
            and "loss" outside of a run.

    Raises:
        ValueError: `mode` has no default for this metric, or another setting is out of range.
        TypeError: `by` is not a string.
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
                raise ValueError(
                    f'neither high nor low {self.by} is known to be better. Pass mode="min" if low is better, or "max"'
                )
            object.__setattr__(self, "mode", mode)
        check_direction(self.mode)
        start = self.select_from
        if start not in _FROM_PHASE and (isinstance(start, (bool, str)) or not isinstance(start, int) or start < 0):
            raise ValueError(f'select_from must be "compression", "fit" or a step (0 or more), got {start!r}')
        check_number("least_learned", self.least_learned, below=1.0)
        object.__setattr__(self, "guard", check_guard(self.guard))

    @property
    def rule(self) -> PhaseRule:
        """The settings for finding phases: `phase_rule` under the guard."""
        return guarded_rule(self.phase_rule, self.guard)

    def margin(self, measurement: Measurement, *, trained: bool) -> float | None:
        """By how many nats the loss may exceed the lowest; None if the loss does not count.

        Args:
            measurement: a point of the run.
            trained: whether the run began from trained weights.
        """
        by_feature = feature_of(self.by, measurement.features) is not None
        return None if self.guard == "loss" and (trained or by_feature) else tolerance_of(self.guard)

    def value(self, measurement: Measurement) -> float | None:
        """The value of the metric; None if it is undefined or the point is missing.

        Raises:
            ValueError: a measured point does not have this metric.
        """
        if measurement.error is not None:
            return None
        return measurement.scalars()[resolve_metric(self.by, metrics_of(measurement))]

    def better(self, value: float, than: float) -> bool:
        """Whether a value is strictly better than another."""
        return value > than if self.mode == "max" else value < than

    def ranked(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """The candidates that have a value, best first; if values are equal, earlier points come first."""
        known = (candidate for candidate in candidates if candidate.value is not None)
        return sorted(known, key=lambda candidate: candidate.value or 0.0, reverse=self.mode == "max")

    def eligible(self, measurement: Measurement, tracker: PhaseTracker) -> bool:
        """Whether a point can be selected as far as known when it was measured; `tracker` must have taken it last.

        False for points between the start of a phase and its recognition; `choose` counts these.
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
        """Select the best point of a run, and return everything that is known about the choice.

        Args:
            measurements: measurements in the order of training.
            available: steps with a checkpoint; by default every step can be selected.

        Raises:
            ValueError: no measured point has the metric; the message lists existing metrics.
        """
        names = dict.fromkeys(name for m in measurements if m.error is None for name in metrics_of(m))
        by = resolve_metric(self.by, names) if names else self.by
        reasons, trained = self.reasons(measurements)
        measured = [m for m in measurements if m.error is None and m.loss is not None]
        # A checkpoint is compared with existing checkpoints. Whether one is missing is judged by all points.
        of_all, of_existing = (
            min((m.loss for m in points if m.loss is not None), default=math.inf)
            for points in (measured, [m for m in measured if available is None or m.step in available])
        )
        candidates: list[Candidate] = []
        values: list[float] = []
        steps: list[int] = []
        for m, rejected in zip(measurements, reasons, strict=True):
            # If only some points have the metric, it is undefined at the others.
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
                    rejected = "no held-out loss, although other points have one"
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
        """Why each point cannot be selected, None if it can; values, losses and checkpoints are ignored.

        Returns:
            The reasons, and whether the run began from trained weights.
        """
        # A step needs no phases; without a null they could not be found.
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
        """The candidate that is kept as long as nothing can be selected."""
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
            return "no step"
        if isinstance(self.select_from, int):
            return f"before step {self.select_from:,}" if measurement.step < self.select_from else None
        if not trained and (phase is None or phase < _FROM_PHASE[self.select_from]):
            return f"not in the {'fitting' if self.select_from == 'fit' else 'compression'} phase"
        if self.guard is None:
            return None
        if collapsed:
            return "collapsed"
        if learned is not None and learned < self.least_learned:
            return f"expressivity below {self.least_learned:.0%} of the highest so far"
        return None


def _before_memorising(phase: Phase | None, has_compressed: bool) -> Phase | None:
    """The phase that a memorising run had reached before; not every run has compressed."""
    if phase is not Phase.MEMORISING:
        return phase
    return Phase.COMPRESSION if has_compressed else Phase.FITTING
