"""The trajectory file of a run: where it is, and what fresh and resumed runs do with an old file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ib_callback.common import json_lines
from ib_callback.common.errors import TrajectoryError
from ib_callback.common.files import size_of, write_atomically
from ib_callback.common.messages import describe, note, warn
from ib_callback.results.lines import parse_lines
from ib_callback.results.trajectory import FILENAME, Trajectory, check_writable
from ib_callback.run import checkpoints
from ib_callback.run.names import Names

DEFAULT_NAMES = Names()
_LEVELS = 4


class TrajectoryFile:
    """The trajectory file of one run, and the points of an earlier part of the run.

    A fresh run moves an old file to `ib_trajectory.1.jsonl` (`.2`, …). A resumed run keeps the points up to its step.
    If there are later points, the whole old file is first copied to such a name. Only one process may use the file.

    Args:
        directory: the run's output directory, created if needed.
        start_step: step from which the run continues; 0 or None for a fresh run.
        last_step: for a resumed run, the last step whose point can belong to it, if that is known to be earlier.
        name: of the file; each prefix has its own file.

    Attributes:
        path: the file.
        trajectory: the points that were kept.
        rotated: where an old file was moved, or copied before its end was dropped; None if there was none.

    Raises:
        TrajectoryError: the directory cannot be written, or the file to continue is damaged.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        start_step: int | None = 0,
        last_step: int | None = None,
        name: str = FILENAME,
    ) -> None:
        check_writable(directory)
        self.path = Path(directory) / name
        self.trajectory = Trajectory(mixed=True)
        self.rotated: Path | None = None
        with json_lines.explained(self.path, "continued"):
            if not size_of(self.path):
                return
            if start_step:
                self._keep_until(start_step if last_step is None else min(start_step, last_step))
            else:
                self.begin_anew()
                note(f"A new run begins: the old trajectory was moved to {self.rotated}")

    def begin_anew(self) -> None:
        """Move the file away and begin without points.

        Raises:
            TrajectoryError: it cannot be moved.
        """
        with json_lines.explained(self.path, "moved"):
            self.rotated = json_lines.set_aside(self.path) or self.rotated
        self.trajectory = Trajectory(mixed=True)

    def _keep_until(self, step: int) -> None:
        data = self.path.read_bytes()
        rows = parse_lines(data, self.path, Trajectory(mixed=True).append)
        kept = [(line, m) for line, m in rows if m.step is None or m.step <= step]
        if len(kept) < len(rows):
            self.rotated = json_lines.reserve_name(self.path)
            write_atomically(self.rotated, data)
            note(
                f"Resumed at step {step}: {len(rows) - len(kept)} later points were dropped; the whole old trajectory "
                f"is in {self.rotated}"
            )
        # Keep the lines as they were, because a newer version may have written more into them than this one reads.
        intact = b"".join(line + b"\n" for line, _ in kept)
        if intact != data:
            write_atomically(self.path, intact)
        self.trajectory = Trajectory((m for _, m in kept), mixed=True)


def bring_along(came_from: Path, directory: Path, names: Names = DEFAULT_NAMES) -> None:
    """Copy the points and the checkpoint record of the earlier part of a resumed run to where the run continues.

    Nothing is done if there are points already. A failure is a warning. There is a second try, because an error may be
    temporary.
    """
    for last_try in (False, True):
        try:
            destination = directory / names.trajectory
            if size_of(destination) is not None or directory.resolve() == came_from.resolve():
                return
            # Read the points first, because a failure must not leave half of the files behind.
            trajectory = (came_from / names.trajectory).read_bytes()
            directory.mkdir(parents=True, exist_ok=True)
            record = names.checkpoints
            checkpoints.CheckpointFile(directory, name=record).take_over(
                checkpoints.CheckpointFile(came_from, name=record)
            )
            write_atomically(destination, trajectory)
            return
        except FileNotFoundError:  # a later message says what is missing
            return
        except Exception as error:  # the measurements are still in the old directory
            if last_try:
                warn(
                    f"The earlier part of the trajectory, {came_from / names.trajectory}, could not be taken over to "
                    f"{directory}. {describe(error)}"
                )


def find_run(run_dir: Path) -> Path:
    """Find the only trajectory in a directory or up to four levels below it, and return the directory it is in.

    Raises:
        TrajectoryError: there is no trajectory, or there are several.
        OSError: a directory cannot be searched.
    """
    if run_dir.name == FILENAME and run_dir.is_file():
        return run_dir.parent
    if not run_dir.is_dir():
        raise TrajectoryError(
            f"there is no file or directory {run_dir}. Give the output directory of a run, or one above it"
        )
    if (run_dir / FILENAME).is_file():
        return run_dir
    found = list(_search(run_dir, _LEVELS, {run_dir.resolve()}))
    if len(found) > 1:
        several = "".join(f"\n  {directory}" for directory in found)
        raise TrajectoryError(f"{run_dir} has several runs; give the directory of one of them:{several}")
    if not found:
        raise TrajectoryError(
            f"no {FILENAME} in {run_dir}, nor up to {_LEVELS} levels below it, outside of checkpoints. Give the output "
            "directory of a run that IBCallback followed, or write one there with ib.Trajectory.save"
        )
    return found[0]


def _search(directory: Path, levels: int, seen: set[Path]) -> Iterator[Path]:
    """Directories below this one that have a trajectory, each once, even if several links lead to it."""
    for path in sorted(directory.iterdir()):
        if not path.is_dir() or checkpoints.is_checkpoint_folder(path) or path.resolve() in seen:
            continue
        seen.add(path.resolve())
        if (path / FILENAME).is_file():
            yield path
        if levels > 1 and os.access(path, os.R_OK | os.X_OK):
            yield from _search(path, levels - 1, seen)
