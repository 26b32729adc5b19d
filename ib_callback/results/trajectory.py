"""A run as a sequence of measurements, in memory and as files.

`ib_trajectory.jsonl` has one measurement on each line, as a JSON object. `ib_run.json`, beside it, has the settings of
the whole run.
"""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from ib_callback.common import json_lines
from ib_callback.common.errors import TrajectoryError
from ib_callback.common.files import expanded, write_atomically
from ib_callback.common.messages import describe, warn
from ib_callback.results.correlation import Correlation, correlations
from ib_callback.results.guard import TOLERANCE, Guard, check_guard, is_left_open
from ib_callback.results.lines import checksum, courses_of, read_rows, to_line
from ib_callback.results.measurement import Measurement, incomparable_settings
from ib_callback.results.metrics import FIRST_SHOWN, FIRST_VIEW, PLANE, WHOLE, Mode, did_you_mean, spelled
from ib_callback.results.phases import DEFAULT_RULE, PhaseRule, Phases, find_phases
from ib_callback.results.selection import SelectFrom, Selection
from ib_callback.results.stopping import guarded_rule
from ib_callback.results.tidy import rows_of, to_csv, to_pandas

FILENAME = "ib_trajectory.jsonl"
RUN_FILENAME = "ib_run.json"


class Trajectory(Sequence[Measurement]):
    """Measurements of one run in the order of training.

    Args:
        measurements: measurements with increasing steps.
        phase_rule: settings for finding the phases of this run.
        guard: guard for selecting its checkpoints. Phases are read with its tolerance or, with None, as published.
        mixed: whether points with different settings are intended; there is then no warning about them.

    Attributes:
        phase_rule, guard: defaults for `phases`, `best`, pictures and tables.

    >>> trajectory = Trajectory([Measurement.failed(step, "collapsed", settings={}) for step in (0, 500)])
    >>> trajectory.steps
    [0, 500]
    """

    def __init__(
        self,
        measurements: Iterable[Measurement] = (),
        *,
        phase_rule: PhaseRule = DEFAULT_RULE,
        guard: Guard = "loss",
        mixed: bool = False,
    ) -> None:
        self.phase_rule = phase_rule
        self.guard: Guard = check_guard(guard)
        self._mixed = mixed
        self._told: set[str] = set()  # settings in which points differ from the first measured one
        self._measurements: list[Measurement] = []
        self._last_step: int | None = None
        for measurement in measurements:
            self.append(measurement)

    def append(self, measurement: Measurement) -> None:
        """Add the next point.

        Raises:
            TypeError: `measurement` is not a Measurement.
            ValueError: its step does not come after the last one.

        Warns:
            RuntimeWarning: its numbers cannot be compared with those of the first measured point, because the probe,
                the bins, the layers or another setting differs; once for each setting. The point is still added.
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
        if not self._mixed and measurement.error is None:
            self._tell_of_mixture(measurement)

    def _tell_of_mixture(self, measurement: Measurement) -> None:
        first = next(m for m in self._measurements if m.error is None)
        found = incomparable_settings(first, measurement)
        new = [text for name, text in found.items() if name not in self._told]
        self._told.update(found)
        if new:
            points = ["a point without a step" if m.step is None else f"step {m.step}" for m in (first, measurement)]
            warn(
                f"this trajectory mixes points that cannot be compared: {' and '.join(points)} differ in "
                f"{'; '.join(new)}. Its values, phases, correlations and best point are computed from all of them. "
                "Keep a separate trajectory for each setting, or pass mixed=True if the mixture is intended.",
                stacklevel=3,
            )

    @property
    def mixture(self) -> dict[str, str]:
        """{setting: difference} for settings that make points incomparable with the first measured one."""
        measured = [m for m in self._measurements if m.error is None]
        return {name: text for m in measured for name, text in incomparable_settings(measured[0], m).items()}

    @overload
    def __getitem__(self, index: int) -> Measurement: ...
    @overload
    def __getitem__(self, index: slice) -> Trajectory: ...
    def __getitem__(self, index: int | slice) -> Measurement | Trajectory:
        if isinstance(index, slice):
            # Warnings about these points have been given already.
            return Trajectory(self._measurements[index], phase_rule=self.phase_rule, guard=self.guard, mixed=True)
        return self._measurements[index]

    def __len__(self) -> int:
        return len(self._measurements)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trajectory) and self._measurements == other._measurements

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        if not self._measurements:
            return "Trajectory(empty)"
        points, steps = f"{len(self)} point{'' if len(self) == 1 else 's'}", [s for s in self.steps if s is not None]
        if not steps:
            return f"Trajectory({points})"
        between = f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
        return f"Trajectory({points}, {between})"

    @property
    def steps(self) -> list[int | None]:
        """The step of each point."""
        return [measurement.step for measurement in self._measurements]

    def values(self, name: str) -> list[float | None]:
        """One number of every point; None if it is undefined or the point is missing.

        Args:
            name: name as logged: `"optimality"`, `"bigram/complexity_null"`, `"preference/ratio"`; also with a logger's
                prefix (`results.metrics.spelled`).

        Raises:
            KeyError: no measured point has this number; the message lists those that exist.
        """
        scalars = [measurement.scalars() for measurement in self._measurements]
        known = list(
            dict.fromkeys(k for s, m in zip(scalars, self._measurements, strict=True) if not m.error for k in s)
        )
        full = spelled(name, known)
        # As long as every point is missing, it is unknown which names will exist.
        if known and full is None:
            raise KeyError(
                f"there is no number {name!r}. Measured numbers: {', '.join(known)}{did_you_mean(name, known)}"
            )
        return [s.get(full or name) for s in scalars]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each point: step, every logged number, and why the point is missing; None where undefined."""
        return rows_of(({"step": point.step}, point) for point in self)

    def to_pandas(self) -> Any:
        """`rows` as a `pandas.DataFrame`.

        Raises:
            ImportError: pandas is not installed.
        """
        return to_pandas(self.rows())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write `rows` as a table with a header; undefined numbers are empty.

        Raises:
            OSError: the file cannot be written.
        """
        write_atomically(path, to_csv(self.rows()).encode())

    def table(self, *, order: str | None = None, loss: Mapping[int, float] | None = None) -> str:
        """The run as an aligned table with one line for each point.

        Information is in fractions of log(num_bins), losses are in nats a token.

        Args:
            order: the n-gram order to show, by default the primary one of each point.
            loss: {step: training loss}, shown beside the loss on the probe.
        """
        names = [quantity.name for quantity in PLANE if quantity.tabled]
        tabled = [quantity.name for quantity in WHOLE if quantity.tabled]
        whole = [name for name in tabled if any(getattr(point, name) is not None for point in self)]
        heads = [["step"], *([] if loss is None else [["loss"]])]
        heads += [["probe", name] for name in whole]
        has_first = any(FIRST_VIEW in point.views for point in self)
        heads += [[FIRST_VIEW, name.removesuffix("_local")] for name in FIRST_SHOWN if has_first]
        heads += [name.split("_", 1) for name in names]
        rows = [[head[0] for head in heads], [" ".join(head[1:]).replace("_", " ") for head in heads]]
        for measurement in self._measurements:
            step = measurement.step
            point = measurement.orders.get(order or measurement.primary or "")
            row = ["-" if step is None else f"{step:,}"]
            if loss is not None:
                row.append(cell(None if step is None else loss.get(step)))
            row += [cell(getattr(measurement, name)) for name in whole]
            row += [cell(value) for value in measurement.shown_first(order).values()] if has_first else []
            rows.append(row + [cell(getattr(point, name, None)) for name in names])
        lines = aligned(rows, [str.rjust] * len(heads))
        reasons = ["", "", *("  " + " ".join(m.error.split()) if m.error else "" for m in self._measurements)]
        beware = [f"not all points can be compared: {'; '.join(self.mixture.values())}"] if self.mixture else []
        return "\n".join([*map(str.__add__, lines, reasons), *beware])

    def phases(self, rule: PhaseRule | None = None, **changes: Any) -> Phases:
        """When the phases of the run began, and the phase of each point; see `ib_callback.results.phases.find_phases`.

        Args:
            rule: settings for finding phases; by default the run's own rule, `phase_rule` under its `guard`.
            **changes: parameters of the rule to change, such as `drop` or `collapse`.

        Raises:
            TypeError: a parameter is unknown.
            ValueError: a parameter is out of range.
        """
        return find_phases(self, replace(rule or self.rule, **changes))

    @property
    def rule(self) -> PhaseRule:
        """The settings for finding the phases of this run: `phase_rule` under `guard`."""
        return guarded_rule(self.phase_rule, self.guard)

    def best(
        self,
        by: str = "optimality",
        select_from: SelectFrom = "compression",
        *,
        mode: Mode | None = None,
        phase_rule: PhaseRule | None = None,
        guard: Guard = "run",
    ) -> Measurement | None:
        """The best point of the run, or None if none can be selected; see `ib_callback.results.selection.Selection`.

        Args:
            by: a metric as logged, without prefix, or the name of a feature, which means its information.
            select_from: "compression", "fit", or the first step that can be selected.
            mode: "min" or "max"; by default the better direction of the metric, if known.
            phase_rule: settings for finding phases; by default the run's own rule.
            guard: "loss" or a tolerance in nats: a point cannot be the best if its held-out loss exceeds the lowest by
                more. None: exactly the published choice. "run": the run's own guard.

        Raises:
            ValueError: no point has this metric, or a setting is out of range.
        """
        guard = self.guard if is_left_open(check_guard(guard)) else guard
        return Selection(by, mode, select_from, phase_rule or self.phase_rule, guard=guard).best(self)

    def correlations(
        self, scores: Mapping[int, float] | None = None, *, select_from: SelectFrom | None = None
    ) -> dict[tuple[str, str], Correlation]:
        """Correlations of the metrics with scores, or with each other; see `ib_callback.results.correlation`.

        Args:
            scores: {step: score}, such as the loss or the result of a benchmark.
            select_from: which points to use: "compression", "fit", or all from a step on. By default points from the
                fit on are used, because points of the collapse would dominate; all points if no fit is recognised.

        Returns:
            {(name, name): correlation}: `(metric, "score")` with scores, else every two of the main metrics and
            `"step"`.

        Raises:
            TypeError: `scores` does not map steps to numbers.
        """
        if select_from is None:
            select_from = self.phases().fit_recognised or 0
        # Selected only by phase, because points with a high loss belong to a correlation too.
        selection = Selection("complexity", None, select_from, self.rule, least_learned=0.0, guard="loss")
        reasons, _ = selection.reasons(self)
        return correlations([m for m, reason in zip(self, reasons, strict=True) if reason is None], scores)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object on each line, atomically: a reader sees the whole old file or the whole new one.

        Raises:
            TrajectoryError: the file cannot be written.
        """
        with json_lines.explained(Path(path), "written"):
            write_atomically(path, b"".join(map(to_line, self._measurements)))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: str | None = None) -> Trajectory:
        """Read a trajectory file, or the one in a run's output directory, and the rules of the run beside it.

        An incomplete last line, left by a crash during a write, is dropped with a warning.

        Args:
            path: path of the file or the directory, or of a file of results (`ib_callback.results.results`).
            model: name of the model, for a file of results with several models.

        Raises:
            TrajectoryError: the file cannot be read, is damaged elsewhere than in its last line, has several models but
                `model` was not given, or does not have that model.
        """
        file = expanded(path)
        if file.is_dir():
            file = file / FILENAME
        trajectory = cls()
        rows = read_rows(file, trajectory.append)
        if any(origin is not None for origin, _ in rows):
            courses = courses_of(rows, file)
            name = next(iter(courses)) if model is None and len(courses) == 1 else model
            if name not in courses:
                found = "several models" if model is None else f"model={model!r}"
                raise TrajectoryError(
                    f"{file}: expected model= to name one model of the file, got {found}. The file has "
                    f"{', '.join(courses)}"
                )
            trajectory = cls(measurement for _, measurement in courses[name])
        elif model is not None:
            raise TrajectoryError(
                f"{file}: expected a file of results, got the trajectory of one run, which names no models. Leave "
                "model= out"
            )
        trajectory.phase_rule, trajectory.guard = read_run_file(file.parent, _run_file_of(file))
        return trajectory


def write_run_file(
    directory: str | os.PathLike[str],
    *,
    phase_rule: PhaseRule,
    guards: Mapping[str, Guard] | None = None,
    name: str = RUN_FILENAME,
) -> None:
    """Write the settings of a whole run into its output directory, atomically.

    Args:
        directory: output directory of the run.
        phase_rule: the phase rule as given, without the effect of a guard.
        guards: guards of its rules, "selection" and, if there is one, "stopping".
        name: name of the file.

    Raises:
        TrajectoryError: the file cannot be written.
    """
    path = Path(directory) / name
    with json_lines.explained(path, "written"):
        content: dict[str, Any] = {"phase_rule": phase_rule.to_dict(), "guard": dict(guards or {"selection": "loss"})}
        content["crc32"] = _seal_of(content)
        write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")


def _seal_of(content: Mapping[str, Any]) -> str:
    """Checksum of everything except the checksum; files of an earlier version, without a guard, cover only the rule."""
    sealed = {name: value for name, value in content.items() if name != "crc32"}
    return checksum(json.dumps(sealed if "guard" in sealed else sealed["phase_rule"]).encode()).decode()


def _run_file_of(trajectory: Path) -> str:
    """The name of the run file that stands beside a trajectory file: each prefix has its own."""
    stem, found, _ = trajectory.name.partition("_trajectory.")
    return f"{stem}_run.json" if found and stem else RUN_FILENAME


def read_run_file(directory: str | os.PathLike[str], name: str = RUN_FILENAME) -> tuple[PhaseRule, Guard]:
    """The phase rule of the run in a directory, and the guard of its selection; defaults if the file lacks them.

    Warns:
        RuntimeWarning: the file is damaged, and the defaults are used.
    """
    path = Path(directory) / name
    try:
        content = json_lines.parsed(path.read_bytes())
        if content.get("crc32") not in (None, _seal_of(content)):  # None: of an earlier version
            raise ValueError("its checksum does not match its content")
        rule = PhaseRule.from_dict(content["phase_rule"])
        return rule, check_guard(content["guard"]["selection"] if "guard" in content else _guard_of(rule))
    except FileNotFoundError:
        return DEFAULT_RULE, "loss"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"{path}: the run's phase rule cannot be read ({describe(error)}), so phases are found by the "
            "default rule. Write the file again with the run's rule, or remove it",
            RuntimeWarning,
            stacklevel=3,
        )
        return DEFAULT_RULE, "loss"


def _guard_of(rule: PhaseRule) -> Guard:
    """The guard that belongs to a rule, for files that hold only the rule's tolerance and no guard."""
    return "loss" if rule.tolerance in (TOLERANCE, 0) else rule.tolerance


def append_line(path: str | os.PathLike[str], measurement: Measurement) -> None:
    """Append one measurement to a trajectory file and flush it to the disk. An incomplete last line is removed first.

    Raises:
        TrajectoryError: the file cannot be written. A partly written line is removed.
    """
    json_lines.append(Path(path), to_line(measurement))


def check_writable(directory: str | os.PathLike[str], names: Iterable[str] = ()) -> None:
    """Make the directory if needed, and check that files can be written in it, before a long run depends on it.

    Args:
        directory: output directory of the run.
        names: names of the files that the run will write; existing ones must be writable.

    Raises:
        TrajectoryError: the directory cannot be made or written, or one of the files cannot be written.
    """
    trial = Path(directory) / f".ib_callback.{os.getpid()}.tmp"
    try:
        trial.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        # On a shared file system, another process with the same number may have removed it first.
        trial.unlink(missing_ok=True)
    except OSError as error:
        raise TrajectoryError(
            f"cannot write to the output directory {os.fspath(directory)} ({error.strerror}). "
            "Make it writable, or pass output_dir= another directory"
        ) from error
    for name in names:
        path = Path(directory) / name
        try:
            _check_file(path)
        except OSError as error:
            leads = f", where it leads to {os.path.realpath(path)}" if path.is_symlink() else ""
            raise TrajectoryError(
                f"{path}: expected a file that this run can write, or no file, got {error.strerror}{leads}. Make it "
                "writable, move it away, or pass output_dir= another directory"
            ) from error


def _check_file(path: Path) -> None:
    """Raise an OSError if an existing file cannot be written; its content and its times do not change.

    Permission bits are not enough: root ignores them, and a file may be immutable or on a separate mount.
    """
    target = Path(os.path.realpath(path))
    if target.exists():
        if not target.is_file():  # opening a pipe would wait for its reader
            raise OSError(errno.EISDIR, "a folder" if target.is_dir() else "something that is not a regular file")
        os.close(os.open(target, os.O_WRONLY | os.O_APPEND))
    elif os.path.lexists(target):
        raise OSError(errno.ELOOP, "a link that leads back to itself")
    if path.is_symlink():
        # Files are replaced at the target of a link, and a missing file is made there.
        trial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT))
        trial.unlink(missing_ok=True)


def aligned(rows: Sequence[Sequence[str]], align: Sequence[Callable[[str, int], str]]) -> list[str]:
    """Lines of a table; each column is aligned by `str.rjust` or `str.ljust`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f(text, width) for f, text, width in zip(align, row, widths, strict=True)).rstrip() for row in rows
    ]


def cell(value: float | None) -> str:
    """The text of a number in a table."""
    if value is None:
        return "-"
    # At temperature 1.0, information is about a millionth of log(num_bins).
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"
