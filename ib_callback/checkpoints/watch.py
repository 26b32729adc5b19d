"""A sidecar process: it measures the checkpoints of a live run as they appear, on another device or machine."""

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

# Settings of W&B with which a second process writes to a run: not as the primary process, and without ending the run.
SHARED = {"mode": "shared", "x_primary": False, "x_label": "ib", "x_update_finish_state": False}
# Number of tries for a checkpoint that cannot be measured, one at each look, because it may still be half-written.
_TRIES = 3

Log = Callable[[Measurement], None]


class Watch:
    """Measures new checkpoints in the directory of a run, and appends them to the run's trajectory.

    Only one process may write the trajectory. While this one does, a callback that wants to write it gets an error, and
    the other way round. Existing points are kept. If they were measured with other settings, a new trajectory begins.

    Args:
        run: the directory of the run.
        sweep: how to measure checkpoints; its material is under the run's name, the name of the directory.
        log: called with every measured point.

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
        """Measure the complete checkpoints that are later than the last point; return how many there were."""
        measured = 0
        for checkpoint in self._new():
            _, measurement = self._measuring.of(checkpoint, checkpoint.place.fetch())
            step = checkpoint.step
            assert step is not None
            if measurement.error is not None:
                self._tries[step] = self._tries.get(step, 0) + 1
                if self._tries[step] < _TRIES:
                    return measured  # later ones wait, because points must be in the order of steps
                self.failed.append((checkpoint.name, measurement.error))
            self._append(measurement)
            if measurement.error is None:
                self._log(measurement)
            measured += measurement.error is None
            self._sweep.tell(str(measurement))
        return measured

    def close(self) -> None:
        """Release the trajectory for other processes."""
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
            self._sweep.tell(
                "the settings differ from those of the earlier points, so a new trajectory begins. The old one is in "
                f"{self._file.rotated}"
            )
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
    """Look for new checkpoints repeatedly. Return the names of those that could not be measured, with the reasons.

    Args:
        run: the directory of the run.
        sweep: how to measure checkpoints.
        every: seconds between two looks.
        until: the step at which to end; None: no limit.
        idle: seconds without a new checkpoint after which to end; None: no limit.
        log: called with every measured point.
        sleep: waits for the given number of seconds.

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
    except KeyboardInterrupt:  # the intended end if neither `until` nor `idle` is given
        return watching.failed
    finally:
        watching.close()


@contextmanager
def wandb_log(project: str, group: str | None, name: str) -> Iterator[Log]:
    """A function that logs points to a separate run of Weights & Biases, for as long as the body runs.

    The live run has its own steps, and no other process may write at earlier steps. So this is another run in the same
    group. Its axis is `ib/step`, the number of optimizer steps.

    Args:
        project: project of W&B.
        group: group of the live run; None: no group.
        name: name of this run.

    Raises:
        ImportError: W&B is not installed.
    """
    with own_run(project=project, group=group, name=name, job_type="ib") as run:
        yield _rows(run)


@contextmanager
def shared_wandb_log(run_id: str, project: str | None = None, entity: str | None = None) -> Iterator[Log]:
    """A function that logs points into the live run of Weights & Biases itself, for as long as the body runs.

    The live run must have been opened with `wandb.Settings(mode="shared")`; only then may a second process write to it.
    The points have `ib/step` as their axis, and the end of this process does not end the run.

    Args:
        run_id: id of the live run.
        project: project of W&B; None: the default of this machine.
        entity: entity of W&B; None: the default of this machine.

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
