"""Files that are dear to make and shared by runs, ranks and resumes: one process builds, the others wait and read."""

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

SAY_WAITING_SECONDS = (5.0, 60.0)  # first after so long, then every so long


def user_cache_directory() -> Path | None:
    """Where this package keeps what can be built again: `ib_callback` below the user's cache directory.

    That is `$XDG_CACHE_HOME` where it is set, otherwise what is customary: `~/.cache`, `~/Library/Caches` on
    macOS, `%LOCALAPPDATA%` on Windows. It need not exist. None where the user has no home, as in a container of a
    user that it does not know, and `$XDG_CACHE_HOME` names no folder.
    """
    # By the XDG specification relative paths are to be ignored.
    asked = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(asked):
        return Path(asked, "ib_callback")
    folder = "~/Library/Caches/ib_callback" if sys.platform == "darwin" else "~/.cache/ib_callback"
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"], "ib_callback")
    # Not by Path.expanduser, which raises where there is no home.
    expanded = os.path.expanduser(folder)
    return Path(expanded) if os.path.isabs(expanded) else None


def cache_file(*names: str, what: str) -> Path | None:
    """A file in the user's cache directory; None if there is no such directory, so that nothing can be kept.

    Args:
        names: folders and the file, below the directory.
        what: would be kept there, for the message.

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
    """What the file holds, if it is there and whole; otherwise it is built, by one process at a time.

    The others wait until it is there, and read it. The lock on the work is the operating system's and ends with the
    process, however that ends.

    Several machines that share a directory take turns where its file system passes locks on (NFS 4, or 3 with
    lockd; Lustre mounted with `flock`). Where it does not, each machine may build, and the last file stays: that
    is sound as long as what they build is the same.

    Args:
        path: of the file; missing folders are made. Its name should say all that decides the content.
        build: makes the content. Its errors are raised, and the next process in line tries again.
        write: writes the content to the path in one step, so that what is cut off leaves nothing that looks finished.
        read: reads and verifies a file. The content must not depend on the file any more; a file that is damaged
            must be a ValueError, and is then set aside and built anew.
        what: what is built, for messages: "the probe of ...".

    Warns:
        RuntimeWarning: the file was damaged or cannot be read; or it cannot be written, and is then not kept.
    """
    found = _whole(path, read)
    if found is not None:
        return found
    with _locked(path, what):
        # Whoever held the lock until now has built it, most likely.
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
    """The content of a whole file; None if there is none, or it is damaged or cannot be read."""
    try:
        return read(path)
    except (ValueError, OSError):
        return None


def _set_aside(path: Path, what: str) -> None:
    """Move a file out of the way that is of no use."""
    damaged = path.with_name(f"{path.name}.damaged")
    try:
        os.replace(path, damaged)
    except OSError:
        return  # there is none, or the directory cannot be written, which is said when it comes to that
    warn(
        f"{what}: {path} is damaged or cannot be read. It was moved to {damaged.name} beside it and is built again",
        stacklevel=3,
    )


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock on building a file, where the file system and the directory allow one."""
    # No marker file in place of a lock that the system does not have: that of a process that died would stay.
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
