"""One live run to a directory: two that write the same trajectory would rotate and mix each other's points."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from ib_callback.common.errors import TrajectoryError

try:
    import fcntl
except ImportError:  # not a POSIX system: claims then hold within this process only
    fcntl = None  # type: ignore[assignment]

# Within one process a file lock cannot tell a live run from one that was interrupted without a word.
_claims: weakref.WeakValueDictionary[Path, Claim] = weakref.WeakValueDictionary()


class Claim:
    """A directory in use by a run, until `release` or the end of the process.

    Args:
        directory: existing directory.
        run: any object that all callbacks of one training share. A claim of an earlier training in this process
            is taken over: it ended without saying so, by an interrupt perhaps.

    Raises:
        TrajectoryError: another callback of the same training, or another process, writes there.
    """

    def __init__(self, directory: Path, run: object) -> None:
        self._directory = directory.resolve()
        self._run = run
        self._lock: int | None = None
        other = _claims.get(self._directory)
        if other is not None and other._run is run:
            raise TrajectoryError(
                f"{directory}: another callback of this training writes its trajectory there. Give each its own "
                "output_dir=."
            )
        if other is not None:
            other.release()
        self._lock_directory(directory)
        _claims[self._directory] = self

    def _lock_directory(self, directory: Path) -> None:
        if fcntl is None:
            return
        lock = os.open(self._directory, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise TrajectoryError(
                f"{directory}: another live run, in another process, writes its trajectory there. Wait for it to end "
                "(an interrupted one ends with its process, a notebook perhaps), or pass another output_dir=."
            ) from None
        except OSError:  # a file system without locks
            os.close(lock)
        else:
            self._lock = lock

    @property
    def holds(self) -> bool:
        """Whether the directory is still this run's: a later training in this process may have taken it over."""
        return _claims.get(self._directory) is self

    def release(self) -> None:
        """Let other runs have the directory; more than once does no harm."""
        if self._lock is not None:
            # Closing alone would leave the lock to child processes that inherited the file, such as data loaders.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = None
        if _claims.get(self._directory) is self:
            del _claims[self._directory]

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # copies of a callback, by copy or pickle, have no claim

    def __del__(self) -> None:
        self.release()
