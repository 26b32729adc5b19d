"""The phases of a training run: initial, fitting and compression, found in its measurements.

After "Conklin et al., ICLR 2026" and "Conklin 2025": a language model first fits (complexity and expressivity
grow) and then compresses (complexity falls). Before it fits, its representations may collapse onto each other:
the complexity is then the lowest of the whole run and means nothing, which is why there is an initial phase.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from typing import Any

from ib_callback.common.checks import check_integer
from ib_callback.common.messages import warn
from ib_callback.results.measurement import Measurement
from ib_callback.results.noise import scatter

# The noise of the complexity is estimated from up to this many points on either side of its maximum: it often
# changes along a run, as the learning rate does.
_NEIGHBOURS = 20


class Phase(IntEnum):
    """Where a run is; logged as `phase`."""

    INITIAL = 0
    FITTING = 1
    COMPRESSION = 2


def check_number(name: str, value: Any, *, below: float = math.inf) -> None:
    """Raise a TypeError unless a setting is a number, and a ValueError unless it is at least 0 and below a limit."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < below:
        raise ValueError(f"{name} must be at least 0 and less than {below:g}, got {value}")


@dataclass(frozen=True, kw_only=True)
class PhaseRule:
    """When a change of phase is clear enough to be recognised.

    Attributes:
        drop: the complexity has fallen clearly when it is below its maximum by more than this share of it …
        noise: … and by more than this many standard deviations of its noise, estimated from its scatter.
        persistence: number of successive points at which it must be so, as for `rise`.
        smoothing: number of points in the running median of the complexity; 1 takes it as it is.
        rise: until it has fallen by this share, as in a collapse, the expressivity above null must exceed its
            value at step 0 by more than this share of it, at `persistence` successive points. Models often gain a
            percent before they collapse, with a long warm-up for many points, or jump in a single step; after the
            collapse any excess counts.
        collapse: a point is collapsed if its expressivity above null is below this share of its maximum since
            the fit began (of its running median). The low complexity of such a point is no compression, and
            once the median has fallen so far, the maximum of the complexity is sought anew.

    Raises:
        ValueError: a value out of range.
        TypeError: a number of points is not an integer.
    """

    drop: float = 0.03
    noise: float = 5.0
    persistence: int = 3
    smoothing: int = 3
    rise: float = 0.05
    collapse: float = 0.5

    def __post_init__(self) -> None:
        for name, below in (("drop", 1.0), ("noise", math.inf), ("rise", math.inf), ("collapse", 1.0)):
            check_number(name, getattr(self, name), below=below)
        for name in ("persistence", "smoothing"):
            check_integer(name, getattr(self, name), minimum=1, cure="it is a number of points")

    def to_dict(self) -> dict[str, float]:
        """JSON values by name; `from_dict` inverts it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PhaseRule:
        """The rule that `to_dict` described. Unknown keys are ignored, and absent ones have their default.

        Raises:
            TypeError: a value of the wrong type.
            ValueError: one out of range.
        """
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})


DEFAULT_RULE = PhaseRule()


@dataclass(frozen=True, kw_only=True)
class Phases:
    """When the phases of a run began, and the phase of each of its points.

    Attributes:
        fit_start: step at which the fitting began; None if it has not.
        fit_recognised: step at which that became clear.
        compression_start: step of the maximum of the complexity from which it has been falling; None if it has
            not fallen clearly and persistently.
        compression_recognised: step at which that became clear.
        phases: of each point, in hindsight: 2 from `compression_start` on.
        known: of each point, as known then, which is what a callback logs: 2 from `compression_recognised` on.
        collapsed: whether each point has lost so much of its expressivity that its complexity means nothing;
            judged from the fitting phase on, by the points before it.
        learned: of each point, its expressivity above null as a share of the highest since the fit began (of the
            running median), in hindsight; None before the fit and where the point is missing.
    """

    fit_start: int | None
    fit_recognised: int | None
    compression_start: int | None
    compression_recognised: int | None
    phases: tuple[Phase, ...]
    known: tuple[Phase, ...]
    collapsed: tuple[bool, ...]
    learned: tuple[float | None, ...]


def find_phases(measurements: Iterable[Measurement], rule: PhaseRule = DEFAULT_RULE) -> Phases:
    """Find the phases of a run, finished or still growing.

    *Initial* is from step 0 until the expressivity above null exceeds its value at step 0; a run that was not
    measured at step 0 has no such phase (if only that measurement failed, it lasts until the first good one).
    *Fitting* is from there until the complexity has fallen clearly and persistently below its maximum since then.
    *Compression* is from that maximum on. A run may never leave a phase.

    All numbers are those of the primary order. The complexity is the plain one, not that above null: the null
    rises with the entropy of the representations all through training, so that the difference falls in models
    whose complexity does not. Without a null the plain expressivity serves, with a warning.

    Points that could not be measured, and those without a step, are left out; those off the schedule
    (`Measurement.scheduled`) are judged by the others. Each point is judged by those up to it only: what has been
    recognised stays recognised, however the run goes on.

    Args:
        measurements: in the order of training; a `Trajectory`, for example.
        rule: when a change of phase is clear enough.
    """
    tracker = PhaseTracker(rule)
    for measurement in measurements:
        tracker.update(measurement)
    return tracker.phases()


class PhaseTracker:
    """Follows a growing run, one measurement after the other; `find_phases` for a whole one.

    Attributes:
        phase: the phase as known by the last measurement.
        collapsed: whether the last measurement is a collapsed point.
    """

    def __init__(self, rule: PhaseRule = DEFAULT_RULE) -> None:
        self.rule = rule
        self._steps: list[int | None] = []
        self._known: list[Phase] = []
        self._collapsed: list[bool] = []
        self._begun = False  # whether a point with a step was seen
        self._fit: tuple[int, int] | None = None  # number of the first point, and of the one that showed it
        self._compression: tuple[int, int] | None = None
        self._above_null: bool | None = None
        self._start: float | None = None  # expressivity at step 0 …
        self._margin = 0.0  # … and what is clearly different from it
        self._collapse_seen = False
        self._exceeding: list[tuple[int, float, float]] = []  # latest points in succession above the start
        self._clear = 0  # how many of them, counted back from the last, are above it by `rise`
        self._expressivities: dict[int, float] = {}  # since the fit began, by number of the point
        self._off_schedule: dict[int, float] = {}  # likewise, of points that are judged only
        self._highest_expressivity = -math.inf
        self._complexities: list[tuple[int, float]] = []  # since the fit began or a collapse ended
        self._highest_complexity = -math.inf
        self._highest_at = 0  # index into _complexities of the last value of the highest median
        self._fallen = 0  # points in succession

    @property
    def phase(self) -> Phase:
        """The phase as known by the last measurement."""
        if self._compression is not None:
            return Phase.COMPRESSION
        return Phase.INITIAL if self._fit is None else Phase.FITTING

    @property
    def collapsed(self) -> bool:
        """Whether the last measurement is a collapsed point."""
        return bool(self._collapsed) and self._collapsed[-1]

    def update(self, measurement: Measurement) -> Phase:
        """Take the next measurement; the phase as known by it."""
        index, step = len(self._steps), measurement.step
        self._steps.append(step)
        self._collapsed.append(False)
        if step is not None:
            if not self._begun and step > 0:
                self._fit = (index, index)
            self._begun = True
            values = self._values(measurement)
            if values is None:
                pass
            elif measurement.scheduled:
                self._take(index, *values)
            else:
                self._off_schedule[index] = values[1]
                self._collapsed[index] = self._fit is not None and values[1] < self._least()
        self._known.append(self.phase)
        return self.phase

    def phases(self) -> Phases:
        """What has been recognised so far."""
        hindsight = [Phase.INITIAL] * len(self._steps)
        for change, phase in ((self._fit, Phase.FITTING), (self._compression, Phase.COMPRESSION)):
            if change is not None:
                hindsight[change[0] :] = [phase] * (len(hindsight) - change[0])
        fit_start, fit_recognised = self._when(self._fit)
        compression_start, compression_recognised = self._when(self._compression)
        return Phases(
            fit_start=fit_start,
            fit_recognised=fit_recognised,
            compression_start=compression_start,
            compression_recognised=compression_recognised,
            phases=tuple(hindsight),
            known=tuple(self._known),
            collapsed=tuple(self._collapsed),
            learned=tuple(self._learned(index) for index in range(len(self._steps))),
        )

    def _learned(self, index: int) -> float | None:
        expressivity = self._expressivities.get(index, self._off_schedule.get(index))
        if expressivity is None or self._fit is None or index < self._fit[0]:
            return None
        # Until there are enough points for a median, the highest of them.
        highest = max(self._highest_expressivity, 0.0) or max(self._expressivities.values(), default=0.0)
        return expressivity / highest if highest > 0 else None

    def _when(self, change: tuple[int, int] | None) -> tuple[int | None, int | None]:
        return (None, None) if change is None else (self._steps[change[0]], self._steps[change[1]])

    def _values(self, measurement: Measurement) -> tuple[float, float] | None:
        """Complexity and expressivity (above null) of the primary order; None if the point is missing."""
        point = measurement.orders.get(measurement.primary or "")
        if point is None or point.complexity is None or point.expressivity is None:
            return None
        if self._above_null is None:
            self._above_null = point.expressivity_above_null is not None
            if not self._above_null:
                warn(
                    "phases are found from the plain expressivity, for it was measured without its null. At wide "
                    "orders nearly all of it is null, and the fitting phase may never be recognised: measure with "
                    'null=True and weighting="empirical"',
                    stacklevel=4,
                )
        expressivity = point.expressivity_above_null if self._above_null else point.expressivity
        return None if expressivity is None else (point.complexity, expressivity)

    def _take(self, index: int, complexity: float, expressivity: float) -> None:
        if self._fit is not None:
            self._follow(index, complexity, expressivity)
        elif self._start is None:
            if self._steps[index] == 0:
                self._start = expressivity
                self._margin = self.rule.rise * abs(expressivity)
            else:  # step 0 could not be measured
                self._fit = (index, index)
                self._follow(index, complexity, expressivity)
        else:
            self._look_for_fit(index, complexity, expressivity)

    def _look_for_fit(self, index: int, complexity: float, expressivity: float) -> None:
        assert self._start is not None
        if expressivity <= self._start:
            self._exceeding.clear()
            self._clear = 0
            self._collapse_seen |= expressivity < self._start - self._margin
            return
        self._exceeding.append((index, complexity, expressivity))
        # A model that has not collapsed yet may well be about to, and jump for a point or two before it does.
        self._clear = self._clear + 1 if expressivity > self._start + self._margin else 0
        if self._collapse_seen or self._clear == self.rule.persistence:
            self._fit = (self._exceeding[0][0], index)
            for point in self._exceeding:
                self._follow(*point)

    def _follow(self, index: int, complexity: float, expressivity: float) -> None:
        """Judge a point of the fitting or the compression phase."""
        rule = self.rule
        self._expressivities[index] = expressivity
        recent = list(self._expressivities.values())[-rule.smoothing :]
        lately = statistics.median(recent)
        if len(recent) == rule.smoothing:
            self._highest_expressivity = max(self._highest_expressivity, lately)
        least = self._least()
        if expressivity < least:
            self._collapsed[index] = True
            # A single point may be an error; if it is not, what was before has nothing to do with what follows.
            if lately < least:
                self._complexities.clear()
                self._highest_complexity = -math.inf
            self._fallen = 0
        elif self._compression is None:
            self._complexities.append((index, complexity))
            self._look_for_compression()

    def _least(self) -> float:
        """Below it a point is collapsed."""
        return self.rule.collapse * self._highest_expressivity

    def _look_for_compression(self) -> None:
        rule = self.rule
        last = [value for _, value in self._complexities[-rule.smoothing :]]
        if len(last) < rule.smoothing:
            return
        lately = statistics.median(last)
        if lately > self._highest_complexity:
            self._highest_complexity = lately
            self._highest_at = len(self._complexities) - 1
            self._fallen = 0
            return
        fall = self._highest_complexity - lately
        clear = fall > rule.drop * abs(self._highest_complexity) and fall > rule.noise * self._noise()
        self._fallen = self._fallen + 1 if clear else 0
        if self._fallen == rule.persistence:
            median_of = self._complexities[self._highest_at + 1 - rule.smoothing : self._highest_at + 1]
            highest, _ = max(median_of, key=lambda point: point[1])
            self._compression = (highest, len(self._steps) - 1)

    def _noise(self) -> float:
        near = self._complexities[max(0, self._highest_at - _NEIGHBOURS) : self._highest_at + _NEIGHBOURS + 1]
        steps = [self._steps[index] or 0 for index, _ in near]
        return scatter([value for _, value in near], steps) or 0.0
