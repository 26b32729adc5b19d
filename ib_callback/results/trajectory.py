"""A run as a sequence of measurements, in memory and as a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from ib_callback.common.files import write_atomically
from ib_callback.common.json_lines import explained
from ib_callback.results.correlation import Correlation, correlations
from ib_callback.results.measurement import Measurement
from ib_callback.results.metrics import Mode
from ib_callback.results.phases import DEFAULT_RULE, PhaseRule, Phases, find_phases
from ib_callback.results.selection import SelectFrom, Selection
from ib_callback.results.trajectory_lines import FILENAME, parse_lines, to_line


class Trajectory(Sequence[Measurement]):
    """Measurements of one run in the order of training.

    >>> trajectory = Trajectory([Measurement.failed(step, "collapsed", settings={}) for step in (0, 500)])
    >>> trajectory.steps
    [0, 500]
    """

    def __init__(self, measurements: Iterable[Measurement] = ()) -> None:
        self._measurements: list[Measurement] = []
        self._last_step: int | None = None
        for measurement in measurements:
            self.append(measurement)

    def append(self, measurement: Measurement) -> None:
        """Add the next point.

        Raises:
            TypeError: not a Measurement.
            ValueError: its step does not come after the last one.
        """
        if not isinstance(measurement, Measurement):
            raise TypeError(f"expected a Measurement, got {type(measurement).__name__}")
        step = measurement.step
        if step is not None and self._last_step is not None and step <= self._last_step:
            raise ValueError(
                f"steps must increase: step {step} cannot follow step {self._last_step}. "
                f"Points are never replaced; to go back, use Trajectory(m for m in old if m.step < {step})"
            )
        self._measurements.append(measurement)
        self._last_step = self._last_step if step is None else step

    @overload
    def __getitem__(self, index: int) -> Measurement: ...
    @overload
    def __getitem__(self, index: slice) -> Trajectory: ...
    def __getitem__(self, index: int | slice) -> Measurement | Trajectory:
        if isinstance(index, slice):
            return Trajectory(self._measurements[index])
        return self._measurements[index]

    def __len__(self) -> int:
        return len(self._measurements)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trajectory) and self._measurements == other._measurements

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        if not self._measurements:
            return "Trajectory(empty)"
        return f"Trajectory({len(self)} points, steps {self.steps[0]} to {self.steps[-1]})"

    @property
    def steps(self) -> list[int | None]:
        """The step of each point."""
        return [measurement.step for measurement in self._measurements]

    def values(self, name: str) -> list[float | None]:
        """One number of every point, None where it is undefined or the point is missing.

        Args:
            name: as logged, without prefix: `"optimality"`, `"bigram/complexity_null"`, `"preference/ratio"`.

        Raises:
            KeyError: no point that was measured has such a number; the message lists those that exist.
        """
        scalars = [measurement.scalars() for measurement in self._measurements]
        measured = [s for s, m in zip(scalars, self._measurements, strict=True) if m.error is None]
        # As long as every point is missing, nobody can tell which names will exist.
        if measured and not any(name in s for s in measured):
            known = dict.fromkeys(k for s in measured for k in s)
            raise KeyError(f"no number {name!r}; those measured: {', '.join(known)}")
        return [s.get(name) for s in scalars]

    def table(self, *, order: str | None = None, loss: Mapping[int, float] | None = None) -> str:
        """The run as aligned text, one line a point; information in fractions of log(num_bins).

        Args:
            order: the n-gram order to show, by default the primary one of each point.
            loss: training loss by step, shown beside.
        """
        names = ["complexity", "expressivity", "optimality", "distance_to_bound"]
        names += ["complexity_above_null", "expressivity_above_null", "optimality_above_null"]
        heads = [["step"], *([] if loss is None else [["loss"]]), *(name.split("_", 1) for name in names)]
        rows = [[head[0] for head in heads], [" ".join(head[1:]).replace("_", " ") for head in heads]]
        for measurement in self._measurements:
            step = measurement.step
            point = measurement.orders.get(order or measurement.primary or "")
            row = ["-" if step is None else f"{step:,}"]
            if loss is not None:
                row.append(_cell(None if step is None else loss.get(step)))
            rows.append(row + [_cell(getattr(point, name, None)) for name in names])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
        reasons = ["", "", *("  " + " ".join(m.error.split()) if m.error else "" for m in self._measurements)]
        return "\n".join(map(str.__add__, lines, reasons))

    def phases(self, **parameters: Any) -> Phases:
        """When the phases of the run began, and the phase of each point; see `ib_callback.results.phases.find_phases`.

        Args:
            **parameters: those of `PhaseRule`, such as `drop` or `persistence`.
        """
        return find_phases(self, **parameters)

    def best(
        self,
        by: str = "optimality",
        select_from: SelectFrom = "compression",
        *,
        mode: Mode | None = None,
        phase_rule: PhaseRule = DEFAULT_RULE,
    ) -> Measurement | None:
        """The best point of the run, or None if none can be selected; see `ib_callback.results.selection.Selection`.

        Args:
            by: a metric as logged, without prefix, or a feature, which means its information.
            select_from: "compression", "fit", or the first step that can be selected.
            mode: "min" or "max"; by default what is known to be better for the metric.
            phase_rule: when a phase is recognised.

        Raises:
            ValueError: no point has such a metric, or a setting is out of range.
        """
        return Selection(by, mode, select_from, phase_rule).best(self)

    def correlations(
        self, scores: Mapping[int, float] | None = None, *, select_from: SelectFrom = 0
    ) -> dict[tuple[str, str], Correlation]:
        """Correlations of the metrics with scores, or with each other; see `ib_callback.results.correlation`.

        Args:
            scores: by step, such as the loss or the result of a benchmark.
            select_from: which points to use: "compression", "fit", or all from a step on. The collapse dominates
                what it takes part in; `"fit"` leaves it out.

        Returns:
            By pair of names: `(metric, "score")` with scores, else every two of the main metrics and `"step"`.
        """
        points = Selection("complexity", select_from=select_from, least_learned=0.0).choose(self).candidates
        return correlations([c.measurement for c in points if c.rejected is None], scores)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object a line, atomically: a reader sees the old file or the new one, never a part.

        Raises:
            TrajectoryError: the file cannot be written.
        """
        with explained(Path(path), "written"):
            write_atomically(path, b"".join(map(to_line, self._measurements)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trajectory:
        """Read a trajectory file, or the one in a run's output directory.

        A torn last line, left by a crash in the middle of a write, is dropped with a warning.

        Raises:
            TrajectoryError: the file cannot be read, or is damaged elsewhere than in its last line.
        """
        file = Path(path)
        if file.is_dir():
            file = file / FILENAME
        with explained(file, "read"):
            data = file.read_bytes()
        return cls(measurement for _, measurement in parse_lines(data, file, cls().append))


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    # At temperature 1.0 the information is a millionth of log(num_bins).
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"
