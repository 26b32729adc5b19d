"""Files that are expensive to make and shared by runs and ranks: one process builds, the others wait and read."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from ib_callback.common.messages import warn

_log = logging.getLogger(__name__)
Content = TypeVar("Content")

SAY_WAITING_SECONDS = (5.0, 60.0)  # time until the first message, then between messages


def user_cache_directory() -> Path | None:
    """The folder for files that can be built again: `ib_callback` below the user's cache directory.

    The cache directory is `$XDG_CACHE_HOME` if set, otherwise the usual one: `~/.cache`, `~/Library/Caches` on macOS,
    `%LOCALAPPDATA%` on Windows. The folder need not exist. The result is None if the user has no home directory, as in
    a container that does not know the user, and `$XDG_CACHE_HOME` names no folder.
    """
    # The XDG specification says to ignore relative paths.
    asked = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(asked):
        return Path(asked, "ib_callback")
    folder = "~/Library/Caches/ib_callback" if sys.platform == "darwin" else "~/.cache/ib_callback"
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"], "ib_callback")
    # Not with Path.expanduser, which raises if there is no home directory.
    expanded = os.path.expanduser(folder)
    return Path(expanded) if os.path.isabs(expanded) else None


def cache_file(*names: str, what: str) -> Path | None:
    """The path of a file in the user's cache directory; None, with a warning, if there is no such directory.

    Args:
        names: folders and the file, below the directory.
        what: description of the content, for the message.

    Warns:
        RuntimeWarning: nothing can be kept.
    """
    folder = user_cache_directory()
    if folder is None:
        warn(
            f"{what}: it cannot be cached because this user has no home directory. Every run and rank builds it again. "
            "Set HOME, set XDG_CACHE_HOME to a writable directory, or pass cache_dir= if the call takes it",
            stacklevel=3,
        )
        return None
    return folder.joinpath(*names)


def build_once(
    path: Path,
    build: Callable[[], Content],
    *,
    write: Callable[[Path, Content], None],
    read: Callable[[Path], Content],
    what: str,
) -> Content:
    """Read the content from a file that exists and is complete; otherwise build it, in one process at a time.

    The other processes wait for the file, and read it. The operating system holds the lock, so the lock ends with the
    process in any case.

    Several machines that share a directory take turns if its file system supports locks across machines (NFS 4, or 3
    with lockd; Lustre mounted with `flock`). Otherwise each machine may build, and the last file stays. This is correct
    as long as all of them build the same content.

    Args:
        path: path of the file; missing folders are made. The name should include everything that decides the content.
        build: makes the content. Its errors are raised, and the next waiting process tries again.
        write: writes the content to the path in one step, so an interruption leaves no file that looks finished.
        read: reads and verifies a file. The content must not depend on the file afterwards. For a damaged file it must
            raise a ValueError; the file is then set aside and built again.
        what: description of the content, for messages: "the probe of ...".

    Warns:
        RuntimeWarning: the file was damaged or cannot be read; or it cannot be written, and is then not kept.
    """
    found = _whole(path, read)
    if found is not None:
        return found
    with _locked(path, what):
        # The process that held the lock has probably built the file.
        found = _whole(path, read)
        if found is not None:
            return found
        _set_aside(path, what)
        content = build()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, content)
        except OSError as error:
            warn(
                f"{what}: it cannot be cached in {path.parent} ({error.strerror or error}). Every run and rank "
                "builds it again. Point XDG_CACHE_HOME or cache_dir= to a writable directory"
            )
        return content


def _whole(path: Path, read: Callable[[Path], Content]) -> Content | None:
    """The content of a complete file; None if the file is missing, damaged or cannot be read."""
    try:
        return read(path)
    except (ValueError, OSError):
        return None


def _set_aside(path: Path, what: str) -> None:
    """Move a useless file out of the way."""
    damaged = path.with_name(f"{path.name}.damaged")
    try:
        os.replace(path, damaged)
    except OSError:
        return  # there is no file, or the directory cannot be written, which is reported later
    warn(
        f"{what}: {path} is damaged or cannot be read. It was moved to {damaged.name} beside it and is built again",
        stacklevel=3,
    )


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock on building a file, if the file system and the directory allow one."""
    # If the system has no locks, no marker file is used instead, because that of a dead process would stay.
    lock = FileLock(path.with_name(f".{path.name}.lock"), fallback_to_soft=False)
    waited, patience = 0.0, SAY_WAITING_SECONDS[0]
    try:
        while not lock.is_locked:
            try:
                lock.acquire(timeout=patience)
            except Timeout:
                waited += patience
                _log.warning("%s: another process is building it. Waiting for %s, %.0f s so far", what, path, waited)
                patience = SAY_WAITING_SECONDS[1]
    except OSError:  # the file system has no locks, or the directory cannot be written
        pass
    try:
        yield
    finally:
        lock.release()
