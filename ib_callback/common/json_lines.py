"""Files with one JSON object on each line that survive crashes: written lines stay, and no line is half-written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ib_callback.common.errors import TrajectoryError
from ib_callback.common.files import size_of
from ib_callback.common.messages import warn


def parsed(data: str | bytes) -> Any:
    """Parse JSON text like `json.loads`, but raise a ValueError for every text that cannot be read.

    `json.loads` raises a RecursionError if the nesting is too deep, and a MemoryError if a list is too long. Readers of
    files do not expect these.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None
    except (MemoryError, OverflowError) as error:
        raise ValueError("its content does not fit into memory") from error


def is_too_deep(error: BaseException) -> bool:
    """Whether an error from other code that reads JSON means that brackets are nested too deep."""
    return isinstance(error, RecursionError) and "JSON" in str(error)


def append(path: Path, line: bytes) -> None:
    """Append one line, including its line break, and flush it to the disk. An incomplete last line is removed first.

    If the same line is the last one already, it is not written again: then an earlier try failed after writing.

    Raises:
        TrajectoryError: the file cannot be written. A partly written line is removed.
    """
    # Unbuffered, so after a full disk nothing is left for close() to write.
    with explained(path, "written"):
        handle = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            _append(handle, line, path)
        finally:
            # The line is on the disk now, or removed. An error of closing does not change that.
            with suppress(OSError):
                handle.close()


def _append(handle: BinaryIO, line: bytes, path: Path) -> None:
    end, terminated, last = _intact_end(handle)
    if end < handle.seek(0, os.SEEK_END):
        _warn_torn(path)
        handle.truncate(end)
    try:
        rest = memoryview(b"" if last == line.strip() else line if terminated else b"\n" + line)
        while rest:
            rest = rest[handle.write(rest) :]
        os.fsync(handle.fileno())
    except OSError:
        handle.truncate(end)
        raise


def intact_lines(data: bytes, path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and content of every line; an incomplete last line is left out with a warning.

    Args:
        data: content of the file.
        path: path of the file, for messages.

    Raises:
        TrajectoryError: a line is damaged that is not the last one; the message names it.
    """
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    for number, line in lines:
        if _is_json(line):
            yield number, line
        elif number == lines[-1][0]:
            _warn_torn(path)
        else:
            raise TrajectoryError(
                f"{path}:{number}: expected one JSON object, got {line[:40]!r}…. "
                "The file is damaged before its end: remove that line, or move the file away"
            )


def reserve_name(path: Path) -> Path:
    """Reserve a numbered name beside `path`, later than all others, by creating an empty file."""
    pattern = re.compile(rf"{re.escape(path.stem)}\.(\d+){re.escape(path.suffix)}")
    taken = [int(match[1]) for name in os.listdir(path.parent) if (match := pattern.fullmatch(name))]
    number = max(taken, default=0)
    while True:
        number += 1
        candidate = path.with_name(f"{path.stem}.{number}{path.suffix}")
        try:
            # "x" fails if the file exists, so two runs that start at the same time never take the same name.
            open(candidate, "xb").close()
        except FileExistsError:
            continue
        return candidate


def set_aside(path: Path) -> Path | None:
    """Move a file to a numbered name beside it, and return that; None if the file is missing or empty."""
    if not size_of(path):
        return None
    rotated = reserve_name(path)
    try:
        os.replace(path, rotated)
    except OSError:
        with suppress(OSError):
            rotated.unlink()  # the empty file that reserved the name
        raise
    return rotated


@contextmanager
def explained(path: Path, done: str) -> Iterator[None]:
    """Turn an OSError into a TrajectoryError that says what failed with the file."""
    try:
        yield
    except OSError as error:
        raise TrajectoryError(
            f"the file {path} cannot be {done} ({error.strerror or error}). "
            "Check that the path exists, its permissions and the free space"
        ) from error


def _is_json(line: bytes) -> bool:
    try:
        parsed(line.decode())
    except ValueError:
        return False
    return True


def _intact_end(handle: BinaryIO) -> tuple[int, bool, bytes]:
    """Where to write the next line; whether the content before is empty or ends with a line break; and its end."""
    handle.seek(0)
    data = handle.read()
    start = data.rstrip().rfind(b"\n") + 1
    last = data[start:].strip()
    if not last or _is_json(last):
        return len(data), data.endswith(b"\n") or not data, last
    return start, True, data[:start].rstrip().rpartition(b"\n")[2].strip()


def _warn_torn(path: Path) -> None:
    warn(
        f"{path}: the last line is incomplete because a run ended in the middle of a write. This one point is dropped",
        stacklevel=3,
    )
