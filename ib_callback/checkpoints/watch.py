"""A sidecar: the checkpoints of a live run, measured as they appear, on another device or another machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ib_callback.checkpoints.local import find_local
from ib_callback.checkpoints.place import Checkpoint
from ib_callback.checkpoints.sweep import Measuring, Sweep
from ib_callback.common.errors import ModelError
from ib_callback.results.measurement import Measurement, incomparable_settings
from ib_callback.results.trajectory import Trajectory, append_line
from ib_callback.run import checkpoints
from ib_callback.run.lock import RunLock
from ib_callback.run.trajectory_file import TrajectoryFile
from ib_callback.run.wandb_log import AXIS, WandbLog, own_run

# Settings of W&B by which a further process writes to a run: not as its primary one, and without ending it.
SHARED = {"mode": "shared", "x_primary": False, "x_label": "ib", "x_update_finish_state": False}
# How often a checkpoint that cannot be measured is tried, one look apart: it may be half-written.
_TRIES = 3

Log = Callable[[Measurement], None]


class Watch:
    """Measures what is new in the directory of a run, and appends it to the run's trajectory.

    The trajectory is this one's alone: a callback that would write it is refused meanwhile, as this is while one does.
    Points that are there already are kept; where they were measured with other settings, a new trajectory begins.

    Args:
        run: the directory of the run.
        sweep: how checkpoints are measured; its material has the run's name, that of the directory.
        log: is told of every point that was measured.

    Raises:
        TrajectoryError: a callback writes the trajectory, or it cannot be written.
    """

    def __init__(self, run: Path, sweep: Sweep, log: Log = lambda _: None) -> None:
        self._run, self._sweep, self._log = run, sweep, log
        self._lock = RunLock(run, self)
        try:
            self._file = TrajectoryFile(run, start_step=sys.maxsize)
        except BaseException:
            self._lock.release()
            raise
        self._measuring = Measuring(sweep)
        self._tries: dict[int, int] = {}
        self.failed: list[tuple[str, str]] = []

    @property
    def trajectory(self) -> Trajectory:
        """The points so far."""
        return self._file.trajectory

    def poll(self) -> int:
        """Measure the checkpoints that are complete and later than the last point; how many there were."""
        measured = 0
        for checkpoint in self._new():
            _, measurement = self._measuring.of(checkpoint, checkpoint.place.fetch())
            step = checkpoint.step
            assert step is not None
            if measurement.error is not None:
                self._tries[step] = self._tries.get(step, 0) + 1
                if self._tries[step] < _TRIES:
                    return measured  # later ones wait, for points are in the order of steps
                self.failed.append((checkpoint.name, measurement.error))
            self._append(measurement)
            if measurement.error is None:
                self._log(measurement)
            measured += measurement.error is None
            self._sweep.tell(str(measurement))
        return measured

    def close(self) -> None:
        """Let others have the trajectory."""
        self._lock.release()

    def _new(self) -> list[Checkpoint]:
        try:
            found = find_local(self._run, self._run.resolve().name)
        except ModelError:  # nothing is saved yet
            return []
        last = max((step for step in self.trajectory.steps if step is not None), default=-1)
        return [c for c in found if c.step is not None and c.step > last and _is_complete(Path(c.place.source))]

    def _append(self, measurement: Measurement) -> None:
        first = next((point for point in self.trajectory if point.error is None), None)
        if first is not None and measurement.error is None and incomparable_settings(first, measurement):
            self._file.begin_anew()
            self._sweep.tell(f"other settings than before: the old trajectory is in {self._file.rotated}")
        append_line(self._file.path, measurement)
        self._file.trajectory.append(measurement)


def watch(
    run: Path,
    sweep: Sweep,
    *,
    every: float,
    until: int | None = None,
    idle: float | None = None,
    log: Log = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
) -> list[tuple[str, str]]:
    """Look for new checkpoints again and again; names of those that could not be measured, each with the reason.

    Args:
        run: the directory of the run.
        sweep: how checkpoints are measured.
        every: seconds between two looks.
        until: the step at which it ends; None: it goes on.
        idle: seconds without a new checkpoint after which it ends; None: it goes on.
        log: is told of every point that was measured.
        sleep: waits for so many seconds.

    Raises:
        TrajectoryError: a callback writes the trajectory, or it cannot be written.
    """
    watching = Watch(run, sweep, log)
    try:
        waited = 0.0
        while True:
            waited = 0.0 if watching.poll() else waited
            last = max((step for step in watching.trajectory.steps if step is not None), default=-1)
            if (until is not None and last >= until) or (idle is not None and waited >= idle):
                return watching.failed
            sleep(every)
            waited += every
    except KeyboardInterrupt:  # how it is meant to end where nothing else was said
        return watching.failed
    finally:
        watching.close()


@contextmanager
def wandb_log(project: str, group: str | None, name: str) -> Iterator[Log]:
    """What logs points to a run of Weights & Biases of its own, for as long as the body runs.

    The live run has its own steps, behind which no other process may write. So this is another run in the same group,
    whose axis is `ib/step`, optimizer steps.

    Args:
        project: of W&B.
        group: that of the live run; None: no group.
        name: of this run.

    Raises:
        ImportError: W&B is not installed.
    """
    with own_run(project=project, group=group, name=name, job_type="ib") as run:
        yield _rows(run)


@contextmanager
def shared_wandb_log(run_id: str, project: str | None = None, entity: str | None = None) -> Iterator[Log]:
    """What logs points into the live run of Weights & Biases itself, for as long as the body runs.

    That works if the live run was opened with `wandb.Settings(mode="shared")`: only then may a second process write to
    it. The points have `ib/step` as their axis, and the end of this process does not end the run.

    Args:
        run_id: that of the live run.
        project: of W&B; None: the default one of this machine.
        entity: likewise.

    Raises:
        ImportError: W&B is not installed.
        ValueError: the run cannot be opened.
    """
    with own_run(id=run_id, project=project, entity=entity, settings=SHARED) as run:
        yield _rows(run)


def _rows(run: Any) -> Log:
    rows = WandbLog(AXIS)
    return lambda measurement: rows.log(run, measurement.metrics(), step=measurement.step or 0)


def _is_complete(path: Path) -> bool:
    try:
        return checkpoints.is_complete(path)
    except OSError:
        return False
