"""Files of one JSON object a line that survive crashes: what was written stays, and nothing is half-written."""

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
    """What a text in JSON says, as `json.loads` has it; any text that it cannot read is a ValueError.

    Of a nesting too deep it raises a RecursionError, which no reader of a file expects, and of a list too long for the
    memory a MemoryError.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None
    except (MemoryError, OverflowError) as error:
        raise ValueError("its content does not fit into memory") from error


def is_too_deep(error: BaseException) -> bool:
    """Whether an error is that of JSON, read by somebody else, whose brackets are nested too deep."""
    return isinstance(error, RecursionError) and "JSON" in str(error)


def append(path: Path, line: bytes) -> None:
    """Append one line, its line break included, and flush it to the disk; a torn last line is cut off.

    A line that is the last one already is not written twice: an earlier try failed only after it had been written.

    Raises:
        TrajectoryError: the file cannot be written. A line written in part is taken back.
    """
    # Unbuffered, so that after a full disk nothing is left over for close() to write.
    with explained(path, "written"):
        handle = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            _append(handle, line, path)
        finally:
            # By now the line is on the disk, or taken back: an error of closing says nothing of it.
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
    """Number and content of every line that is JSON; a torn last line is left out with a warning.

    Args:
        data: content of the file.
        path: of the file, for messages.

    Raises:
        TrajectoryError: a line that is damaged elsewhere than at the end of the file; it is named.
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


def set_aside(path: Path) -> Path | None:
    """Move a file to a numbered name beside it, which is returned; None if there is none, or nothing in it."""
    if not size_of(path):
        return None
    rotated = reserve_name(path)
    try:
        os.replace(path, rotated)
    except OSError:
        with suppress(OSError):
            rotated.unlink()  # the empty file that holds the name
        raise
    return rotated


@contextmanager
def explained(path: Path, done: str) -> Iterator[None]:
    """Turn an OSError into a TrajectoryError that says what cannot be done with the file."""
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
    """Where the next line may be written, whether what lies before is empty or ends with a line break, and its end."""
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
