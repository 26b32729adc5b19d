"""The phases of a training run: initial, fitting, compression and memorising, found in its measurements.

According to "Conklin et al., ICLR 2026" and "Conklin 2025", a language model first fits (complexity and expressivity
grow) and then compresses (complexity falls, expressivity is kept). Before it fits, its representations collapse: hidden
states nearly coincide, or reflect only the frequencies of tokens. Complexities before the end of this collapse mean
nothing; this is the initial phase. A model that is trained too long on too little text memorises, and its loss on
held-out text rises.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import IntEnum
from typing import Any

from ib_callback.common.messages import warn
from ib_callback.results.guard import TOLERANCE
from ib_callback.results.measurement import Measurement
from ib_callback.results.points import Array, PlanePoint, replicates_of
from ib_callback.results.trend import find_fall, line
from ib_callback.results.uncertainty import jackknife_error

# The planes on which phases can be read, in order of preference: {plane: (view, ending of the names of the numbers)}.
PLANES: dict[str, tuple[str, str]] = {
    "readout": ("readout", "_local"),
    "prediction": ("prediction", "_local"),
    "local": ("", "_local"),
    "above_null": ("", "_above_null"),
    "plain": ("", ""),
}
# Number of successive points at which a condition must hold before a change is recognised.
PERSISTENCE = 3
# Smallest rise of the expressivity that counts without a collapse; models often gain a percent before they collapse.
_RISE = 0.05
# A collapse: between two records of the expressivity, complexity and expressivity fall by more than these shares. In
# nine recorded runs they fell by 53 to 95 % and by 18 to 98 %, on the readout plane and on the plane above null.
_COLLAPSE_COMPLEXITY, _COLLAPSE_EXPRESSIVITY = 1 / 3, 0.1
# Expressivity is kept if its relative fall is less than this share of the relative fall of the complexity. The ratio of
# both then improves.
KEPT = 0.5
# If points have standard errors, a fall must exceed this many of its own standard errors.
_ERRORS = 2.0
# A model whose first loss is better than token frequencies by this many nats was trained before; random weights never
# reach that.
_TRAINED = 0.5
# A model has begun to learn when its loss has fallen by this many nats; in the first steps it may even rise.
LEARNED = 0.5
# A plane that the first point lacks may still appear within this many measured points.
_EARLY = 3
# A share of a smaller information than this, in fractions of log(num_bins), says nothing.
_LEAST_BASE = 1e-3


class Phase(IntEnum):
    """The phase of a run; logged as `phase`."""

    INITIAL = 0
    FITTING = 1
    COMPRESSION = 2
    MEMORISING = 3


def check_number(name: str, value: Any, *, below: float = math.inf) -> None:
    """Raise a TypeError unless a setting is a number, and a ValueError unless it is at least 0 and below a limit."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < below:
        raise ValueError(f"{name} must be at least 0 and less than {below:g}, got {value}")


@dataclass(frozen=True, kw_only=True)
class PhaseRule:
    """The settings for finding the phases of a run.

    Attributes:
        plane: the plane on which phases are read: "readout", "prediction", "local", "above_null" or "plain"; None: the
            first of these that the first point has.
        drop: a statistically clear fall of the complexity (see `ib_callback.results.trend.find_fall`) counts if the
            complexity is more than this share below its maximum since the fit began. The maximum is that of the running
            median of three points.
        collapse: a point is collapsed if its expressivity is below this share of its maximum since the fit began. The
            low complexity of such a point does not count as compression.
        tolerance: the model memorises if the held-out loss exceeds its minimum by more than this, in nats a token. In a
            run, the tolerance of its guard replaces it. None: the loss is not used.
        from_trained: whether the run begins from trained weights, and so has no phases. None: it does if its point at
            step 0 predicts the next token better than the frequencies of tokens on the probe, by half a nat.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value has the wrong type.
    """

    plane: str | None = None
    drop: float = 0.03
    collapse: float = 0.5
    tolerance: float | None = TOLERANCE
    from_trained: bool | None = None

    def __post_init__(self) -> None:
        if self.plane is not None and self.plane not in PLANES:
            raise ValueError(f"plane must be one of {', '.join(PLANES)}, or None, got {self.plane!r}")
        for name in ("drop", "collapse"):
            check_number(name, getattr(self, name), below=1.0)
        if self.tolerance is not None:
            check_number("tolerance", self.tolerance)
        if self.from_trained is not None and not isinstance(self.from_trained, bool):
            raise TypeError(f"from_trained must be True, False or None, got {self.from_trained!r}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values by name; `from_dict` inverts this."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PhaseRule:
        """Make the rule from the result of `to_dict`. Unknown keys are ignored; missing keys get their default.

        Raises:
            TypeError: a value has the wrong type.
            ValueError: a value is out of range.
        """
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})


DEFAULT_RULE = PhaseRule()


@dataclass(frozen=True, kw_only=True)
class Phases:
    """When the phases of a run began, and the phase of each of its points.

    Attributes:
        plane: the plane on which they were read, one of `PLANES`; None without a measured point.
        trained: whether the run began from trained weights; it then has no phases.
        fit_start: step at which fitting began. If there was a collapse, it is the step of the lowest complexity in it.
            None if fitting has not begun.
        fit_recognised: step at which the start of fitting became clear.
        compression_start: step of the maximum of the complexity from which it has been falling; None if it has
            not fallen clearly and persistently with expressivity kept.
        compression_recognised: step at which the start of compression became clear.
        memorising_start: step of the minimum of the held-out loss, if the model memorises since then; else None.
        memorising_recognised: step at which the start of memorising became clear.
        off_bound_start: step of the maximum of the complexity, if complexity falls clearly from there and expressivity
            falls with it. The run then leaves the bound, and this is not compression. Otherwise None.
        phases: phase of each point in hindsight: 2 from `compression_start` on. None where nothing is known.
        known: phase of each point as known at that time, as a callback logs it: 2 from `compression_recognised` on.
        collapsed: whether each point has lost so much of its expressivity that its complexity means nothing. It is
            judged from the fitting phase on, by the points before it.
        learned: expressivity of each point as a share of the highest since the fit began, in hindsight; None before
            the fit and for missing points.
        notes: remarks for the user, as sentences.
    """

    plane: str | None
    trained: bool
    fit_start: int | None
    fit_recognised: int | None
    compression_start: int | None
    compression_recognised: int | None
    memorising_start: int | None
    memorising_recognised: int | None
    off_bound_start: int | None
    phases: tuple[Phase | None, ...]
    known: tuple[Phase | None, ...]
    collapsed: tuple[bool, ...]
    learned: tuple[float | None, ...]
    notes: tuple[str, ...]


def find_phases(measurements: Iterable[Measurement], rule: PhaseRule = DEFAULT_RULE) -> Phases:
    """Find the phases of a run, finished or still running; docs/rules.md says how well this works.

    All numbers are those of the primary order on one plane, which the result names.

    *Initial* lasts from step 0 to the end of the collapse: the lowest complexity before expressivity exceeds every
    earlier value for good. A run that was not measured at step 0 has no such phase.
    *Fitting* lasts from there until the complexity has fallen clearly and persistently below its maximum since then.
    *Compression* begins at that maximum, if expressivity is kept and the ratio of both improves over the same stretch.
    *Memorising* begins at the minimum of the held-out loss, if the loss then exceeds it by more than the tolerance at
    three points in succession, while the model is not collapsed and the training loss, if known, is lower than at the
    minimum. If the loss finds a new minimum later, the phase is withdrawn.

    A run that begins from trained weights has no phases.

    Points that could not be measured, and points without a step, are left out. Points off the schedule
    (`Measurement.scheduled`) get a phase, but do not influence it. Each point is judged only by points up to it.

    Args:
        measurements: measurements in the order of training, for example a `Trajectory`.
        rule: settings for finding phases.
    """
    tracker = PhaseTracker(rule)
    for measurement in measurements:
        tracker.update(measurement)
    return tracker.phases()


def is_trained(first: Measurement) -> bool:
    """Whether the first point of a run has trained weights, judged by its loss at step 0."""
    better = first.predictive_information
    return first.step == 0 and better is not None and better > _TRAINED


def starts_trained(measurements: Iterable[Measurement], rule: PhaseRule = DEFAULT_RULE) -> bool:
    """Whether a run begins from trained weights, according to the rule or to its first measured point."""
    if rule.from_trained is not None:
        return rule.from_trained
    first = next((m for m in measurements if m.error is None and m.step is not None), None)
    return first is not None and is_trained(first)


def plane_values(measurement: Measurement, plane: str) -> tuple[float, float] | None:
    """Complexity and expressivity of the primary order on a plane; None if the point lacks the plane."""
    point, ending = _plane_point(measurement, plane), PLANES[plane][1]
    complexity = getattr(point, f"complexity{ending}", None)
    expressivity = getattr(point, f"expressivity{ending}", None)
    return None if complexity is None or expressivity is None else (complexity, expressivity)


def _plane_point(measurement: Measurement, plane: str) -> PlanePoint | None:
    view = PLANES[plane][0]
    orders: Mapping[str, PlanePoint] = measurement.views.get(view, {}) if view else measurement.orders
    return orders.get(measurement.primary or "")


class PhaseTracker:
    """Follows a growing run, one measurement after another. For a whole run use `find_phases`.

    Attributes:
        collapsed: whether the last measurement is a collapsed point.
        trained: whether the run began from trained weights; None as long as this is unknown.
        plane: the plane on which phases are read; None before the first measurement.
        worse_for: number of the latest scheduled points in succession whose held-out loss exceeds its minimum by more
            than the tolerance; 0 before the model has begun to learn.
        worse_since: step of the minimum before these points.
        train_loss_falls: whether the training loss of these points is lower than at the minimum of the held-out loss;
            None if unknown.
        begun: whether the model has begun to learn: its fit has begun, and the loss, if known, has fallen by half a
            nat or is below that of token frequencies.
    """

    def __init__(self, rule: PhaseRule = DEFAULT_RULE) -> None:
        self.rule = rule
        self.plane: str | None = rule.plane
        self.trained: bool | None = rule.from_trained
        self.worse_for = 0
        self.worse_since: int | None = None
        self.train_loss_falls: bool | None = None
        self._early: list[Measurement] = []  # the first points, in case a better plane appears
        self._lacking = 0  # number of the latest points in succession without the plane
        self._first_loss: float | None = None
        self._predicts = False  # whether a point was better than token frequencies
        self._steps: list[int | None] = []
        self._known: list[Phase | None] = []
        self._collapsed: list[bool] = []
        self._from_start: bool | None = None  # whether the run was measured from step 0 on
        # For the scheduled points that have values:
        self._points: list[int] = []  # their numbers
        self._complexity: list[float] = []
        self._replicates: list[Array | None] = []  # jackknife values of the complexity, if points have errors
        self._expressivity: list[float] = []
        self._off_schedule: dict[int, float] = {}  # expressivity of points off the schedule
        self._record = 0  # position of the highest expressivity so far
        self._start = 0  # position of the lowest complexity before the fit
        self._rising: int | None = None  # the position since which expressivity is above that of step 0
        self._exceeding = 0  # number of the latest points at which it is clearly above
        self._fit: tuple[int, int] | None = None  # number of its first point, and of the point that showed it
        self._compression: tuple[int, int] | None = None
        self._off_bound: int | None = None  # number of the point
        self._fall: tuple[float, float] | None = None  # relative falls of complexity and expressivity
        self._losses: list[tuple[int, float, float | None]] = []  # number, held-out loss, training loss
        self._lowest = 0  # position of the lowest loss
        self._lowest_of_all: float | None = None  # including points off the schedule
        self._memorising: tuple[int, int] | None = None

    @property
    def phase(self) -> Phase | None:
        """The phase as known at the last measurement; None if none is known, or if the run has no phases."""
        if self.trained or self._from_start is None:
            return None
        if self._memorising is not None:
            return Phase.MEMORISING
        if self._compression is not None:
            return Phase.COMPRESSION
        return Phase.INITIAL if self._fit is None else Phase.FITTING

    @property
    def collapsed(self) -> bool:
        """Whether the last measurement is a collapsed point."""
        return bool(self._collapsed) and self._collapsed[-1]

    @property
    def begun(self) -> bool:
        """Whether the model has begun to learn."""
        if self.trained:
            return True
        if self._fit is None:
            return False
        first, lowest = self._first_loss, self._lowest_of_all
        fallen = first is not None and lowest is not None and first - lowest > LEARNED
        return first is None or fallen or self._predicts

    def update(self, measurement: Measurement) -> Phase | None:
        """Take the next measurement, and return the phase as known then."""
        if self._finds_better_plane(measurement):
            return self._begin_again(measurement)
        index, step = len(self._steps), measurement.step
        if len(self._early) <= _EARLY:
            self._early.append(measurement)
        self._steps.append(step)
        self._collapsed.append(False)
        if step is not None:
            if self._from_start is None:
                self._from_start = step == 0
                if not self._from_start:
                    self._fit = (index, index)
            if measurement.error is None:
                self._look_at(index, measurement)
        self._known.append(self.phase)
        return self.phase

    def _finds_better_plane(self, measurement: Measurement) -> bool:
        """Whether one of the first points has a better plane than the points before it."""
        if self.rule.plane is not None or self.plane is None or measurement.error is not None:
            return False
        if sum(point.error is None for point in self._early) >= _EARLY:
            return False
        return next(p for p in PLANES if p == self.plane or plane_values(measurement, p)) != self.plane

    def _begin_again(self, measurement: Measurement) -> Phase | None:
        plane = next(p for p in PLANES if plane_values(measurement, p))
        new = PhaseTracker(replace(self.rule, plane=plane))
        for point in self._early:
            new.update(point)
        self.__dict__.update(new.__dict__, rule=self.rule, _early=self._early)
        return self.update(measurement)

    def _look_at(self, index: int, measurement: Measurement) -> None:
        if self.trained is None:
            self.trained = is_trained(measurement)
        if self.plane is None:
            self.plane = next(plane for plane in PLANES if plane == "plain" or plane_values(measurement, plane))
            if self.plane == "plain":
                warn(
                    "phases are found from the plain expressivity because the null, which is what chance gives, was "
                    "not measured. At wide orders nearly all of it is chance, so the fitting phase may never be "
                    'recognised. Measure with null=True and weighting="empirical"',
                    stacklevel=4,
                )
        values = plane_values(measurement, self.plane)
        if measurement.loss is not None:
            lowest = self._lowest_of_all
            self._lowest_of_all = measurement.loss if lowest is None else min(measurement.loss, lowest)
            self._first_loss = measurement.loss if self._first_loss is None else self._first_loss
        self._predicts = self._predicts or (measurement.predictive_information or 0.0) > 0
        if not measurement.scheduled:
            if values is not None:
                self._off_schedule[index] = values[1]
                self._collapsed[index] = self._is_collapsed(values[1])
            return
        self._lacking = 0 if values is not None else self._lacking + 1
        if values is not None:
            point = _plane_point(measurement, self.plane)
            assert point is not None
            self._replicates.append(replicates_of(point, f"complexity{PLANES[self.plane][1]}"))
            self._take(index, *values)
        if self.rule.tolerance is not None and measurement.loss is not None:
            self._judge_loss(index, measurement.loss, measurement.train_loss, self.rule.tolerance)

    # --- on the plane

    def _take(self, index: int, complexity: float, expressivity: float) -> None:
        self._points.append(index)
        self._complexity.append(complexity)
        self._expressivity.append(expressivity)
        last = len(self._points) - 1
        if self._from_start and not self.trained:
            self._look_for_fit(last)
        if expressivity > self._expressivity[self._record]:
            self._record = last
        self._collapsed[index] = self._is_collapsed(expressivity)
        searched = self._compression is None and self._memorising is None
        if self._fit is not None and searched and not self._collapsed[index]:
            self._look_for_compression()

    def _look_for_fit(self, last: int) -> None:
        """Look for the end of the last collapse.

        Without a collapse, look for the lowest complexity before a clear rise of the expressivity.
        """
        expressivity, record = self._expressivity[last], self._expressivity[self._record]
        between = range(self._record, last)
        if expressivity > record and between:
            trough = self._lowest_of(between)
            fallen = self._complexity[trough] < (1 - _COLLAPSE_COMPLEXITY) * self._complexity[self._record]
            low = sum(self._expressivity[p] < (1 - _COLLAPSE_EXPRESSIVITY) * record for p in between)
            # After a model has fitted, a single low point may be an error.
            if fallen and low > (self._start > 0):
                self._start, self._fit = trough, (self._points[trough], self._points[last])
                # Anything found before the collapse does not apply to what follows.
                self._compression, self._off_bound, self._fall = None, None, None
        first = self._expressivity[0]
        if self._fit is None and last:
            self._rising = None if expressivity <= first else last if self._rising is None else self._rising
            self._exceeding = self._exceeding + 1 if expressivity > first + _RISE * abs(first) else 0
            if self._exceeding == PERSISTENCE and self._rising is not None:
                self._start = self._lowest_of(range(self._rising))
                self._fit = (self._points[self._start], self._points[last])

    def _lowest_of(self, positions: range) -> int:
        """The position of the lowest complexity; if several are equal, the last."""
        return min(reversed(positions), key=self._complexity.__getitem__)

    def _is_collapsed(self, expressivity: float) -> bool:
        highest = max(self._expressivity[self._start :], default=0.0)
        return (self._fit is not None or bool(self.trained)) and expressivity < self.rule.collapse * highest

    def _look_for_compression(self) -> None:
        # The complexities at step 0 and at the end of the collapse do not belong to the fit.
        first = self._start + 1 if self._from_start else 0
        counted = [p for p in range(first, len(self._points)) if not self._collapsed[self._points[p]]]
        fall = find_fall([self._complexity[position] for position in counted])
        if fall is None:
            return
        highest, complexity, expressivity = self._maximum(counted)
        share = 1 - fall.end / complexity
        if share <= self.rule.drop:
            return
        if highest == first and not self._from_start:
            return  # the rise was not measured, so the fall may have begun earlier, or be part of a collapse
        before, now = self._replicates[highest], self._replicates[-1]
        if before is not None and now is not None and len(before) == len(now):
            # Both points are on the same text, so most of their errors cancel.
            fallen = self._complexity[highest] - self._complexity[-1]
            if fallen < _ERRORS * jackknife_error(fallen, before - now):
                return
        lost = 1 - line([self._expressivity[position] for position in counted[-fall.length :]]).end / expressivity
        if lost < KEPT * share:
            self._compression = (self._points[highest], self._points[-1])
            self._off_bound, self._fall = None, None
        else:
            self._off_bound, self._fall = self._points[highest], (share, lost)

    def _maximum(self, counted: list[int]) -> tuple[int, float, float]:
        """The position of the highest complexity, and complexity and expressivity there, as medians of three points."""
        windows = [counted[i : i + 3] for i in range(len(counted) - 2)]
        best = max(windows, key=lambda window: statistics.median(self._complexity[p] for p in window))
        highest = max(best, key=self._complexity.__getitem__)
        complexity, expressivity = (
            statistics.median(values[p] for p in best) for values in (self._complexity, self._expressivity)
        )
        return highest, complexity, expressivity

    # --- by the loss

    def _judge_loss(self, index: int, loss: float, train_loss: float | None, tolerance: float) -> None:
        self._losses.append((index, loss, train_loss))
        if loss <= self._losses[self._lowest][1]:
            self._lowest = len(self._losses) - 1
        at, lowest, trained_to = self._losses[self._lowest]
        self.worse_since = self._steps[at]
        self.worse_for = self.worse_for + 1 if loss > lowest + tolerance and self.begun else 0
        if not self.worse_for:
            if self._memorising is not None and self._memorising[0] != at:
                self._memorising = None
            return
        told = [told for _, _, told in self._losses[-self.worse_for :] if told is not None]
        self.train_loss_falls = None if trained_to is None or not told else statistics.fmean(told) < trained_to
        learns = not self._collapsed[index] if self.train_loss_falls is None else self.train_loss_falls
        fits = self._fit is not None and not self.trained
        if fits and learns and self.worse_for >= PERSISTENCE and self._memorising is None:
            self._memorising = (at, index)
            if self._compression is not None and self._compression[0] >= at:
                self._compression = None

    @property
    def has_compressed(self) -> bool:
        """Whether compression has been recognised; if the model memorises, before that."""
        return self._compression is not None

    @property
    def lowest_loss(self) -> float | None:
        """The lowest held-out loss so far, nats a token; None without one."""
        return self._lowest_of_all

    # --- what has been found

    def phases(self) -> Phases:
        """The phases that have been recognised so far."""
        hindsight: list[Phase | None] = [None if self.trained else Phase.INITIAL] * len(self._steps)
        if not self.trained:
            changes = (self._fit, self._compression, self._memorising)
            for change, phase in zip(changes, (Phase.FITTING, Phase.COMPRESSION, Phase.MEMORISING), strict=True):
                if change is not None:
                    hindsight[change[0] :] = [phase] * (len(hindsight) - change[0])
        fit_start, fit_recognised = self._when(self._fit)
        compression_start, compression_recognised = self._when(self._compression)
        memorising_start, memorising_recognised = self._when(self._memorising)
        return Phases(
            plane=self.plane,
            trained=bool(self.trained),
            fit_start=fit_start,
            fit_recognised=fit_recognised,
            compression_start=compression_start,
            compression_recognised=compression_recognised,
            memorising_start=memorising_start,
            memorising_recognised=memorising_recognised,
            off_bound_start=None if self._off_bound is None else self._steps[self._off_bound],
            phases=tuple(hindsight),
            known=tuple(self._known),
            collapsed=tuple(self._collapsed),
            learned=self._learned(),
            notes=tuple(self._notes()),
        )

    def _learned(self) -> tuple[float | None, ...]:
        known = dict(zip(self._points, self._expressivity, strict=True)) | self._off_schedule
        highest = max(self._expressivity[self._start :], default=0.0)
        first = 0 if self.trained else len(self._steps) if self._fit is None else self._fit[0]
        return tuple(
            known[index] / highest if index >= first and index in known and highest > 0 else None
            for index in range(len(self._steps))
        )

    def _when(self, change: tuple[int, int] | None) -> tuple[int | None, int | None]:
        if change is None or self.trained:
            return None, None
        return self._steps[change[0]], self._steps[change[1]]

    def _notes(self) -> Iterable[str]:
        if self.trained:
            yield "The run began from trained weights, so it has no phases."
            return
        if self._off_bound is not None and self._fall is not None:
            share, lost = self._fall
            yield (
                f"From step {self._steps[self._off_bound]} on, complexity has fallen by {share:.0%} on the "
                f"{self._plane_text}, but expressivity has fallen too, by {lost:.0%}. This is not compression: the run "
                "moves away from the bound. The 1B model of Conklin et al., ICLR 2026, did the same late in its "
                "training."
            )
        if self._memorising is not None:
            yield self.memorising_note()
        if self._lacking >= PERSISTENCE:
            yield (
                f"The last {self._lacking} points have no numbers on the {self._plane_text}. Phases are read there, so "
                "the phase of the run cannot change for now."
            )

    @property
    def _plane_text(self) -> str:
        return "plane above the null" if self.plane == "above_null" else f"{self.plane} plane"

    def memorising_note(self) -> str:
        """A sentence that says since when the model memorises, and what happened on the plane meanwhile."""
        at, lowest, trained_to = self._losses[self._lowest]
        _, loss, trains_at = self._losses[-1]
        falls = self.train_loss_falls
        unknown = "is not known" if trains_at is None or trained_to is not None else "was not known yet there"
        known = unknown if falls is None else "is lower than there" if falls else "is higher than there"
        text = (
            f"The model has been memorising since step {self._steps[at]}: the held-out loss is now {loss - lowest:.2f} "
            f"nats above its minimum of {lowest:.2f} at that step, and the training loss {known}."
        )
        since = [position for position, index in enumerate(self._points) if index >= at]
        if len(since) > 1:
            first, last = since[0], since[-1]
            changes = [
                f"{name} {values[last] / values[first] - 1:+.0%}"
                for name, values in (("complexity", self._complexity), ("expressivity", self._expressivity))
                if values[first] > _LEAST_BASE
            ]
            text += f" Changes since then on the {self._plane_text}: {', '.join(changes)}." if changes else ""
        return text
