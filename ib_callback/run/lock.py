"""One live run per directory, because two runs on one trajectory would move and mix each other's points."""

from __future__ import annotations

import weakref
from pathlib import Path

from filelock import FileLock, Timeout

from ib_callback.common.errors import TrajectoryError

FILENAME = ".ib_callback.lock"

# Within one process, a file lock cannot distinguish a live run from one that was interrupted without notice.
_live: weakref.WeakValueDictionary[Path, RunLock] = weakref.WeakValueDictionary()


class RunLock:
    """Marks a directory as in use by a run, until `release` or the end of the process. Each prefix has its own lock.

    The operating system holds the lock, so it ends with the process, however the process ends. If the file system has
    no locks, the lock holds within this process only.

    Args:
        directory: existing directory.
        run: any object that all callbacks of one training share. The lock of an earlier training in this process is
            taken over, because that training ended without saying so, perhaps by an interrupt.
        name: of the lock file.

    Raises:
        TrajectoryError: another callback of the same training, or another process, writes there.
    """

    def __init__(self, directory: Path, run: object, name: str = FILENAME) -> None:
        self._path = directory.resolve() / name
        self._run = run
        # thread_local=False, because another thread may finish a callback. fallback_to_soft=False, because a marker
        # file in place of a real lock would outlive a killed run.
        self._lock = FileLock(self._path, blocking=False, thread_local=False, fallback_to_soft=False)
        other = _live.get(self._path)
        if other is not None and other._run is run:
            raise TrajectoryError(
                f"{directory}: another callback of this training writes its trajectory there. Give each its own "
                'prefix=, such as prefix="code/", or its own output_dir=.'
            )
        if other is not None:
            other.release()
        try:
            self._lock.acquire()
        except Timeout:
            raise TrajectoryError(
                f"{directory}: another live run, in another process, writes its trajectory there. Wait for it to end, "
                "or pass another output_dir=. An interrupted run ends with its process, perhaps a notebook. If "
                "there is no such run, the file system refuses every lock: pass an output_dir= on another one."
            ) from None
        except OSError:  # a file system without locks
            pass
        _live[self._path] = self

    @property
    def holds(self) -> bool:
        """Whether the directory still belongs to this run. A later training in this process may have taken it over."""
        return _live.get(self._path) is self

    def release(self) -> None:
        """Let other runs use the directory. Calling this more than once does no harm."""
        self._lock.release()
        if self.holds:
            del _live[self._path]

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # copies of a callback, by copy or pickle, hold no lock
