"""The file of a run's measurements on the disk: lines of JSON that survive crashes, and safe ways to write."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ib_callback.errors import TrajectoryError
from ib_callback.measurement import Measurement

FILENAME = "ib_trajectory.jsonl"
_TAIL_BLOCK = 1 << 16


def append_line(path: str | os.PathLike[str], measurement: Measurement) -> None:
    """Append one measurement to a trajectory file and flush it to the disk; a torn last line is cut off.

    Raises:
        TrajectoryError: the file cannot be written. A line written in part is taken back.
    """
    line = to_line(measurement)
    # Unbuffered, so that after a full disk nothing is left over for close() to write.
    with explained(Path(path), "written"), open(path, "a+b", buffering=0) as handle:
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


def to_line(measurement: Measurement) -> bytes:
    """A measurement as one line of JSON, its line break included."""
    return json.dumps(measurement.to_dict(), allow_nan=False).encode() + b"\n"


def parse_lines(data: bytes, path: Path, check: Callable[[Measurement], None]) -> list[tuple[bytes, Measurement]]:
    """Every line with its measurement, a torn last line left out with a warning.

    Args:
        data: content of the file.
        path: of the file, for messages.
        check: called with each measurement in turn; raises a ValueError for one that cannot follow the others.

    Raises:
        TrajectoryError: a line that is damaged elsewhere than at the end of the file; it is named.
    """
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    rows: list[tuple[bytes, Measurement]] = []
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
            check(measurement)
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


def reserve_name(path: Path) -> Path:
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
def explained(path: Path, done: str) -> Iterator[None]:
    """Turn an OSError into a TrajectoryError that says what cannot be done with the file."""
    try:
        yield
    except OSError as error:
        raise TrajectoryError(
            f"the trajectory file {path} cannot be {done} ({error.strerror or error}). "
            "Check that the path exists, its permissions and the free space"
        ) from error
