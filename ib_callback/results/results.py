"""Measurements of many models in one file. Each line has the form of a line of a trajectory, and names its model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ib_callback.common import json_lines
from ib_callback.common.errors import TrajectoryError
from ib_callback.common.files import expanded, told_apart, write_atomically
from ib_callback.results import tidy
from ib_callback.results.lines import Origin, courses_of, read_rows, to_line
from ib_callback.results.measurement import Measurement
from ib_callback.results.trajectory import FILENAME, Trajectory, _run_file_of, aligned, read_run_file

# Columns of a table that come before the numbers.
_COLUMNS = ("model", "revision", "family", "stage", "num_parameters", "tokens")


class Results(Mapping[str, Trajectory]):
    """Trajectories by model, in the order of the file.

    A model that was trained in stages has one trajectory for each stage, such as "OLMo-2-1B stage1", because each stage
    counts its steps from the beginning. A model that was measured with settings that cannot be compared has several,
    such as "OLMo-2-1B" and "OLMo-2-1B (2)".

    Args:
        entries: measurements with their origins. If a checkpoint was measured several times, the last success counts.

    >>> results = Results([(Origin(model="small"), Measurement.failed(0, "no weights", settings={}))])
    >>> results
    Results(1 model, 1 point: small)
    >>> results["small"].steps
    [0]
    """

    def __init__(self, entries: Iterable[tuple[Origin, Measurement]] = ()) -> None:
        self._set(courses_of(entries, "these results"))

    def _set(self, courses: dict[str, list[tuple[Origin, Measurement]]]) -> None:
        self._origins = {name: [origin for origin, _ in course] for name, course in courses.items()}
        self._trajectories = {name: Trajectory(m for _, m in course) for name, course in courses.items()}

    @classmethod
    def load(cls, *paths: str | os.PathLike[str]) -> Results:
        """Read files of results (for example of several shards), trajectory files and directories of runs.

        A run counts as a model with the name of its directory, or with as much of its path as distinguishes it from
        others. An incomplete last line, left by a crash during a write, is dropped with a warning.

        Raises:
            TrajectoryError: a file cannot be read, is damaged elsewhere than in its last line, or holds steps of a run
                that do not increase.
        """
        rows: list[tuple[Origin, Measurement]] = []
        rules = {}
        files = [path / FILENAME if path.is_dir() else path for path in map(expanded, paths)]
        for name, file in zip(told_apart(list(map(_place_of, files))), files, strict=True):
            run = Trajectory()
            found = read_rows(file, run.append)
            if any(origin is None for origin, _ in found):
                rules[name] = read_run_file(file.parent, _run_file_of(file))
            # A file that names models only in some of its lines is not the file of a run.
            of_run = all(origin is None for origin, _ in found)
            for origin, measurement in found:
                if origin is None and not of_run:
                    raise TrajectoryError(f"{file}: expected every line to name a model, but some lines name none")
                rows.append((origin or Origin(model=name, tokens=measurement.tokens_seen), measurement))
        results = cls.__new__(cls)
        results._set(courses_of(rows, ", ".join(map(str, paths)) or "these results"))
        for name, rule in rules.items():
            if name in results:
                results[name].phase_rule, results[name].guard = rule
        return results

    def __getitem__(self, model: str) -> Trajectory:
        try:
            return self._trajectories[model]
        except KeyError:
            raise KeyError(f"there is no model {model!r}. Measured models: {', '.join(self) or 'none'}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._trajectories)

    def __len__(self) -> int:
        return len(self._trajectories)

    def __repr__(self) -> str:
        points = sum(map(len, self.values()))
        models = f"{len(self)} model{'' if len(self) == 1 else 's'}, {points} point{'' if points == 1 else 's'}"
        names = [*self][:6] + (["…"] if len(self) > 6 else [])
        return f"Results({models}: {', '.join(names)})" if self else "Results(empty)"

    def origins(self, model: str) -> list[Origin]:
        """The origin of each point of a model's trajectory, in order."""
        return list(self._origins[model])

    def points(self, model: str) -> list[tuple[dict[str, Any], Measurement]]:
        """Each point of a model's trajectory, with the columns that come before its numbers in a table."""
        return [
            # The name of the trajectory, because the model's own name may not distinguish trajectories.
            ({name: getattr(origin, name) for name in _COLUMNS} | {"model": model, "step": point.step}, point)
            for origin, point in zip(self._origins[model], self[model], strict=True)
        ]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each point: model, revision, family, stage, size, tokens, step, logged numbers and `error`."""
        return tidy.rows_of(point for model in self for point in self.points(model))

    def to_pandas(self) -> Any:
        """`rows` as a `pandas.DataFrame`.

        Raises:
            ImportError: pandas is not installed.
        """
        return tidy.to_pandas(self.rows())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write `rows` as a table with a header; undefined numbers are empty.

        Raises:
            OSError: the file cannot be written.
        """
        write_atomically(path, tidy.to_csv(self.rows()).encode())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one line for each point, atomically.

        Raises:
            TrajectoryError: the file cannot be written.
        """
        lines = [
            to_line(point, origin)
            for model, trajectory in self.items()
            for origin, point in zip(self._origins[model], trajectory, strict=True)
        ]
        with json_lines.explained(Path(path), "written"):
            write_atomically(path, b"".join(lines))

    def table(self) -> str:
        """The models as an aligned table, smallest first: size, points, and the range of steps and tokens."""
        rows = [("model", "family", "parameters", "points", "missing", "steps", "tokens")]
        sizes = {name: max(o.num_parameters or 0 for o in origins) for name, origins in self._origins.items()}
        for name in sorted(self, key=sizes.__getitem__):
            trajectory, origins = self[name], self._origins[name]
            rows.append(
                (
                    name,
                    next((o.family for o in origins if o.family), "-"),
                    f"{sizes[name]:,}" if sizes[name] else "-",
                    str(len(trajectory)),
                    str(sum(point.error is not None for point in trajectory)),
                    _range(trajectory.steps),
                    _range([point.tokens_seen for point in trajectory]),
                )
            )
        return "\n".join(aligned(rows, (str.ljust, str.ljust, *[str.rjust] * 5)))


def append_result(path: str | os.PathLike[str], origin: Origin, measurement: Measurement) -> None:
    """Append one line to a file of results and flush it to the disk. An incomplete last line is removed first.

    Raises:
        TrajectoryError: the file cannot be written. A partly written line is removed.
    """
    json_lines.append(Path(path), to_line(measurement, origin))


def _place_of(file: Path) -> tuple[str, ...]:
    """The parts of the path: of the directory of a run, or of another file without its suffix."""
    whole = file.resolve()
    return whole.parent.parts if whole.name == FILENAME else (*whole.parent.parts, whole.stem)


def _range(values: Iterable[int | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{min(known):,}" if min(known) == max(known) else f"{min(known):,} to {max(known):,}"
