"""Where the trajectory of a run lies, given its output directory or one above."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ib_callback.common.errors import TrajectoryError
from ib_callback.results.trajectory import FILENAME
from ib_callback.run import checkpoints

_LEVELS = 4


def find_run(run_dir: Path) -> Path:
    """The directory of the one trajectory in a directory, or up to four levels below it.

    Raises:
        TrajectoryError: there is none, or several.
        OSError: a directory cannot be searched.
    """
    if run_dir.name == FILENAME and run_dir.is_file():
        return run_dir.parent
    if not run_dir.is_dir():
        raise TrajectoryError(f"there is no directory {run_dir}. Give the output directory of a run, or one above it")
    if (run_dir / FILENAME).is_file():
        return run_dir
    found = list(_search(run_dir, _LEVELS, {run_dir.resolve()}))
    if len(found) > 1:
        several = "".join(f"\n  {directory}" for directory in found)
        raise TrajectoryError(f"{run_dir} has several runs; give the directory of one of them:{several}")
    if not found:
        raise TrajectoryError(
            f"no {FILENAME} in {run_dir}, nor up to {_LEVELS} levels below it, checkpoints left aside. Give the output "
            "directory of a run that IBCallback followed, or write one there with ib.Trajectory.save"
        )
    return found[0]


def _search(directory: Path, levels: int, seen: set[Path]) -> Iterator[Path]:
    """Directories below one that have a trajectory; each once, however many links lead there."""
    for path in sorted(directory.iterdir()):
        if not path.is_dir() or checkpoints.is_checkpoint_folder(path) or path.resolve() in seen:
            continue
        seen.add(path.resolve())
        if (path / FILENAME).is_file():
            yield path
        if levels > 1 and os.access(path, os.R_OK | os.X_OK):
            yield from _search(path, levels - 1, seen)
