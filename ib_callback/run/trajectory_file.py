"""The trajectory file of one run on the disk: what a fresh and a resumed run do with an old one."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ib_callback.common import json_lines
from ib_callback.common.files import write_atomically
from ib_callback.results.measurement import Measurement
from ib_callback.results.trajectory import FILENAME, Trajectory, append_line, check_writable, parse_lines

_log = logging.getLogger(__name__)


class TrajectoryFile:
    """The trajectory file of one run: what was kept of an earlier part of the run, and every further point.

    A fresh run moves an old file to `ib_trajectory.1.jsonl` (`.2`, …). A resumed run keeps the points up to
    its step; if there are later ones, the whole old file is first copied to such a name. One process only.

    Args:
        directory: the run's output directory, created if needed.
        start_step: step from which the run continues; 0 or None for a fresh run.
        last_step: of a resumed run, the last step whose point can belong to it, if that is known to lie earlier.

    Attributes:
        path: the file.
        trajectory: the points kept so far and those appended by `append`.
        rotated: where an old file, or the abandoned end of one, went; None if there was none.

    Raises:
        TrajectoryError: the directory cannot be written, or the file to continue is damaged.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, start_step: int | None = 0, last_step: int | None = None
    ) -> None:
        check_writable(directory)
        self.path = Path(directory) / FILENAME
        self.trajectory = Trajectory()
        self.rotated: Path | None = None
        with json_lines.explained(self.path, "continued"):
            if not self.path.exists() or self.path.stat().st_size == 0:
                return
            if start_step:
                self._keep_until(start_step if last_step is None else min(start_step, last_step))
            else:
                self.begin_anew()
                _log.info("A new run begins: the old trajectory was moved to %s", self.rotated)

    def begin_anew(self) -> None:
        """Move the file away and begin with no points.

        Raises:
            TrajectoryError: it cannot be moved.
        """
        with json_lines.explained(self.path, "moved"):
            self.rotated = json_lines.set_aside(self.path) or self.rotated
        self.trajectory = Trajectory()

    def _keep_until(self, step: int) -> None:
        data = self.path.read_bytes()
        rows = parse_lines(data, self.path, Trajectory().append)
        kept = [(line, m) for line, m in rows if m.step is None or m.step <= step]
        if len(kept) < len(rows):
            self.rotated = json_lines.reserve_name(self.path)
            write_atomically(self.rotated, data)
            _log.info(
                "Resumed at step %d: %d later points were dropped; the whole old trajectory is in %s",
                step, len(rows) - len(kept), self.rotated,
            )  # fmt: skip
        # The lines as they were, not written anew: a newer version may have put in more than this one reads.
        intact = b"".join(line + b"\n" for line, _ in kept)
        if intact != data:
            write_atomically(self.path, intact)
        self.trajectory = Trajectory(m for _, m in kept)

    def append(self, measurement: Measurement) -> None:
        """Add a point to the trajectory and to the file; on return it is on the disk.

        Raises:
            ValueError: its step does not come after the last one; nothing was written.
            TrajectoryError: the file cannot be written; the point is in `trajectory` all the same.
        """
        self.trajectory.append(measurement)
        append_line(self.path, measurement)
