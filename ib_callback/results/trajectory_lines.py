"""The lines of a trajectory file: one measurement each, as a JSON object."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from ib_callback.common import json_lines
from ib_callback.common.errors import TrajectoryError
from ib_callback.results.measurement import Measurement

FILENAME = "ib_trajectory.jsonl"


def append_line(path: str | os.PathLike[str], measurement: Measurement) -> None:
    """Append one measurement to a trajectory file and flush it to the disk; a torn last line is cut off.

    Raises:
        TrajectoryError: the file cannot be written. A line written in part is taken back.
    """
    json_lines.append(Path(path), to_line(measurement))


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
    rows: list[tuple[bytes, Measurement]] = []
    for number, line in json_lines.intact_lines(data, path):
        try:
            measurement = Measurement.from_dict(json.loads(line))
            check(measurement)
        except ValueError as error:
            raise TrajectoryError(
                f"{path}:{number}: {error}. Correct or remove that line, or move the file away"
            ) from error
        rows.append((line, measurement))
    return rows
