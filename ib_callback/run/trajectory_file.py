"""The trajectory file of a run: where it is, and what fresh and resumed runs do with an old file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ib_callback.common import json_lines
from ib_callback.common.errors import TrajectoryError
from ib_callback.common.files import size_of, write_atomically
from ib_callback.common.messages import describe, note, warn
from ib_callback.results.lines import is_measured, names_a_model, parse_lines
from ib_callback.results.trajectory import FILENAME, Trajectory, check_writable
from ib_callback.run import checkpoints
from ib_callback.run.names import DEFAULT_PREFIX, Names

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


def find_trajectory(path: Path, prefix: str | None = None) -> Path:
    """The trajectory file at a path.

    Args:
        path: a file, which is returned; or a directory with the only trajectory in it, or up to four levels below it.
            If there is no trajectory, the only file of results in the directory itself is taken.
        prefix: prefix of the run's keys, such as "code/". None: there must be only one trajectory.

    Raises:
        TrajectoryError: there is no such trajectory, or there are several.
        OSError: a directory cannot be searched.

    Warns:
        RuntimeWarning: a file of results is taken.
    """
    if path.is_file():
        of_file = Names.prefix_of(re.sub(r"\.\d+\.jsonl$", ".jsonl", path.name))  # an old one may have been moved aside
        if prefix is not None and of_file not in (None, prefix):
            raise TrajectoryError(
                f"{path} does not belong to the prefix {prefix!r}: expected {Names(prefix).trajectory} or a directory. "
                "Leave the prefix out, or give the other file"
            )
        return path
    if not path.is_dir():
        raise TrajectoryError(
            f"there is no file or directory {path}. Give the output directory of a run, or one above it"
        )
    every = list(trajectories_in(path))
    found = [file for file in every if prefix in (None, Names.prefix_of(file.name))]
    if len(found) == 1:
        return found[0]
    if found:
        raise TrajectoryError(_several(path, found, prefix))
    if every:
        raise TrajectoryError(
            f"{path} has no {Names(prefix or DEFAULT_PREFIX).trajectory}. Give the prefix of one of these:"
            f"{_listed(every)}"
        )
    results = [file for file in sorted(path.glob("*.jsonl")) if names_a_model(file)] if prefix is None else []
    if len(results) == 1:
        warn(f"{path} has no trajectory. The results in {results[0].name} are used instead.")
        return results[0]
    if results:
        raise TrajectoryError(f"{path} has no trajectory, but files of results. Give one of them:{_listed(results)}")
    raise TrajectoryError(
        f"no {Names(prefix or DEFAULT_PREFIX).trajectory} in {path}, nor up to {_LEVELS} levels below it, outside of "
        "checkpoints. Give the output directory of a run that a callback followed, or the file of results that "
        "ib-callback measure wrote"
    )


def trajectories_in(directory: Path) -> Iterator[Path]:
    """The trajectory files in a directory or, if it has none itself, up to four levels below it.

    Raises:
        OSError: a directory cannot be searched.
    """
    own = _trajectories(directory)
    yield from own or _search(directory, _LEVELS, {directory.resolve()})


def _several(path: Path, found: list[Path], prefix: str | None) -> str:
    folders = dict.fromkeys(file.parent for file in found)
    if len(folders) == len(found):
        return f"{path} has several runs. Give the directory of one of them:{_listed([*folders])}"
    prefixes = dict.fromkeys(Names.of(file).prefix for file in found)
    if prefix is None and len(prefixes) == len(found):
        names = " or ".join(f"--prefix {Names(each).stem}" for each in prefixes)
        return f"{path} has {len(found)} trajectories. Give {names}, or one of the files:{_listed(found)}"
    return f"{path} has several runs. Give the directory or the file of one of them:{_listed(found)}"


def _listed(files: list[Path]) -> str:
    return "".join(f"\n  {file}" for file in files)


def _trajectories(directory: Path) -> list[Path]:
    """The trajectory files in a directory. A copy, or a file of another program, may have such a name, too."""
    return [
        file
        for file in sorted(directory.glob("*_trajectory.jsonl"))
        if file.is_file() and (file.name == FILENAME or (Names.of(file).trajectory == file.name and is_measured(file)))
    ]


def _search(directory: Path, levels: int, seen: set[Path]) -> Iterator[Path]:
    """Trajectories below this directory, each once, even if several links lead to it."""
    for path in sorted(directory.iterdir()):
        if not path.is_dir() or checkpoints.is_checkpoint_folder(path) or path.resolve() in seen:
            continue
        seen.add(path.resolve())
        if os.access(path, os.R_OK | os.X_OK):
            yield from _trajectories(path)
            if levels > 1:
                yield from _search(path, levels - 1, seen)
        elif (path / FILENAME).is_file():
            yield path / FILENAME
