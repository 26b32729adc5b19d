"""A run as a sequence of measurements, and the file that keeps it: one JSON object a line."""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, overload

from ib_callback.errors import TrajectoryError
from ib_callback.measurement import Measurement

FILENAME = "ib_trajectory.jsonl"
_TAIL_BLOCK = 1 << 16
_log = logging.getLogger(__name__)


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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object a line, atomically: a reader sees the old file or the new one, never a part.

        Raises:
            TrajectoryError: the file cannot be written.
        """
        with _explained(Path(path), "written"):
            write_atomically(path, b"".join(map(_line, self._measurements)))

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
        with _explained(file, "read"):
            data = file.read_bytes()
        return cls(measurement for _, measurement in _parse(data, file))


class TrajectoryFile:
    """The trajectory file of one run: what was kept of an earlier part of the run, and every further point.

    A fresh run moves an old file to `ib_trajectory.1.jsonl` (`.2`, …). A resumed run keeps the points up to
    its step; if there are later ones, the whole old file is first copied to such a name. One process only.

    Args:
        directory: the run's output directory, created if needed.
        start_step: step from which the run continues; 0 or None for a fresh run.

    Attributes:
        path: the file.
        trajectory: the points kept and appended so far.
        rotated: where an old file, or the abandoned end of one, went; None if there was none.

    Raises:
        TrajectoryError: the directory cannot be written, or the file to continue is damaged.
    """

    def __init__(self, directory: str | os.PathLike[str], *, start_step: int | None = 0) -> None:
        check_writable(directory)
        self.path = Path(directory) / FILENAME
        self.trajectory = Trajectory()
        self.rotated: Path | None = None
        with _explained(self.path, "continued"):
            if not self.path.exists() or self.path.stat().st_size == 0:
                return
            if start_step:
                self._keep_until(start_step)
            else:
                self.rotated = _reserve_name(self.path)
                os.replace(self.path, self.rotated)
                _log.info("A new run begins: the old trajectory was moved to %s", self.rotated)

    def _keep_until(self, step: int) -> None:
        data = self.path.read_bytes()
        rows = _parse(data, self.path)
        kept = [(line, m) for line, m in rows if m.step is None or m.step <= step]
        if len(kept) < len(rows):
            self.rotated = _reserve_name(self.path)
            write_atomically(self.rotated, data)
            _log.info(
                "Resumed at step %d: %d later points were dropped; the whole old trajectory is in %s",
                step, len(rows) - len(kept), self.rotated,
            )  # fmt: skip
        # The lines as they were, not written anew: a newer version may have put in more than this one reads.
        intact = b"".join(line + b"\n" for line, _ in kept)
        if intact != data:
            write_atomically(self.path, intact)
        self.trajectory = Trajectory(m for _, m in kept)

    def append(self, measurement: Measurement) -> None:
        """Add a point to the trajectory and to the file; on return it is on the disk.

        Raises:
            ValueError: its step does not come after the last one; nothing was written.
            TrajectoryError: the file cannot be written; the point is in `trajectory` all the same.
        """
        self.trajectory.append(measurement)
        append_line(self.path, measurement)


def append_line(path: str | os.PathLike[str], measurement: Measurement) -> None:
    """Append one measurement to a trajectory file and flush it to the disk; a torn last line is cut off.

    Raises:
        TrajectoryError: the file cannot be written. A line written in part is taken back.
    """
    line = _line(measurement)
    # Unbuffered, so that after a full disk nothing is left over for close() to write.
    with _explained(Path(path), "written"), open(path, "a+b", buffering=0) as handle:
        end, terminated = _intact_end(handle)
        if end < handle.seek(0, os.SEEK_END):
            _warn_torn(Path(path))
            handle.truncate(end)
        try:
            rest = memoryview(line if terminated else b"\n" + line)
            while rest:
                rest = rest[handle.write(rest) :]
            os.fsync(handle.fileno())
        except OSError:
            handle.truncate(end)
            raise


def check_writable(directory: str | os.PathLike[str]) -> None:
    """Make the directory if needed and prove that files can be made in it, before a long run depends on it.

    Raises:
        TrajectoryError: it cannot be made or written.
    """
    trial = Path(directory) / f".ib_callback.{os.getpid()}.tmp"
    try:
        trial.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        # On a shared file system a process of the same number may have been faster.
        trial.unlink(missing_ok=True)
    except OSError as error:
        raise TrajectoryError(
            f"cannot write to the output directory {os.fspath(directory)} ({error.strerror}). "
            "Make it writable, or pass output_dir= another directory"
        ) from error


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace a file's content in one step: a reader, even after a crash, finds the old or the new."""
    # Through a link: the file that it points to is replaced, not the link.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _line(measurement: Measurement) -> bytes:
    return json.dumps(measurement.to_dict(), allow_nan=False).encode() + b"\n"


def _parse(data: bytes, path: Path) -> list[tuple[bytes, Measurement]]:
    """Every line with its measurement, a torn last line left out."""
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    rows: list[tuple[bytes, Measurement]] = []
    so_far = Trajectory()
    for number, line in lines:
        if not _is_json(line):
            if number == lines[-1][0]:
                _warn_torn(path)
                break
            raise TrajectoryError(
                f"{path}:{number}: expected a measurement as JSON, got {line[:40]!r}…. "
                "The file is damaged before its end: remove that line, or move the file away"
            )
        try:
            measurement = Measurement.from_dict(json.loads(line))
            so_far.append(measurement)
        except ValueError as error:
            raise TrajectoryError(
                f"{path}:{number}: {error}. Correct or remove that line, or move the file away"
            ) from error
        rows.append((line, measurement))
    return rows


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.decode())
    except ValueError:
        return False
    return True


def _intact_end(handle: BinaryIO) -> tuple[int, bool]:
    """Where the next line may be written, and whether what lies before is empty or ends with a line break."""
    size = handle.seek(0, os.SEEK_END)
    block = _TAIL_BLOCK
    while True:
        start = max(0, size - block)
        handle.seek(start)
        body = handle.read().rstrip()
        line_start = body.rfind(b"\n") + 1
        if line_start or not start:
            break
        block *= 2
    last = body[line_start:]
    if not last or _is_json(last):
        handle.seek(max(0, size - 1))
        return size, handle.read() in (b"\n", b"")
    return start + line_start, True


def _warn_torn(path: Path) -> None:
    warnings.warn(
        f"{path}: the last line is torn (a run ended in the middle of a write); this one point is dropped",
        RuntimeWarning,
        stacklevel=3,
    )


def _reserve_name(path: Path) -> Path:
    """A numbered name beside `path` that is later than all others, taken by creating an empty file."""
    pattern = re.compile(rf"{re.escape(path.stem)}\.(\d+){re.escape(path.suffix)}")
    taken = [int(match[1]) for name in os.listdir(path.parent) if (match := pattern.fullmatch(name))]
    number = max(taken, default=0)
    while True:
        number += 1
        candidate = path.with_name(f"{path.stem}.{number}{path.suffix}")
        try:
            # "x" fails where the file exists, so that two runs starting at once never take the same name.
            open(candidate, "xb").close()
        except FileExistsError:
            continue
        return candidate


@contextmanager
def _explained(path: Path, done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrajectoryError(
            f"the trajectory file {path} cannot be {done} ({error.strerror or error}). "
            "Check that the path exists, its permissions and the free space"
        ) from error


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    # At temperature 1.0 the information is a millionth of log(num_bins).
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"
