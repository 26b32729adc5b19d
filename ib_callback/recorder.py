"""What every trainer's callback does alike: measure along a run, keep the points and draw them."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ib_callback.claim import Claim
from ib_callback.errors import TrajectoryError
from ib_callback.guard import preserved_rng
from ib_callback.measurement import Measurement, settings_differences
from ib_callback.meter import Meter, is_out_of_memory
from ib_callback.schedule import Schedule
from ib_callback.trajectory import Trajectory, TrajectoryFile, append_line, check_writable

PLANE_FILENAME = "information_plane.png"
# Every point is drawn at once up to this number of them. A picture takes about as long as a measurement of a
# small model, so that later ones wait until the run has this many times the points of the last picture.
_DRAWN_SINGLY = 20
_DRAWN_AGAIN = 1.25

_log = logging.getLogger(__name__)


@dataclass
class _Run:
    """What belongs to one run of training, as against the settings, which outlive it."""

    started: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = None  # None where this process writes nothing
    plane: Path | None = None  # likewise, and where no plane is drawn
    points_drawn: int = 0
    unsaved: list[Measurement] = field(default_factory=list)
    outages: set[str] = field(default_factory=set)
    seconds_at_work: float = 0.0


class Recorder:
    """Measures a model along a run and keeps what it finds: in memory, in a file and as a picture.

    A callback calls `start` once a run, `record` for each point and `finish`, on every rank alike and inside
    `at_work`. Mistakes are raised by `start` and by the point measured at the start; once the run is under
    way, nothing that goes wrong here ends it.

    Args:
        meter: what measures.
        schedule: at which steps.
        draw_plane: keep `information_plane.png` up to date; a warning says so if Matplotlib is missing.

    Attributes:
        trajectory: all points so far, those of an earlier part of a resumed run included.
    """

    def __init__(self, meter: Meter, schedule: Schedule, *, draw_plane: bool = True) -> None:
        self.meter = meter
        self.schedule = schedule
        self.draw_plane = draw_plane
        self.trajectory = Trajectory()
        self._working_since = time.perf_counter()
        self._run = _Run(started=self._working_since)
        self._claim: Claim | None = None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Around all that a callback does: count its time, and put the random states back."""
        self._working_since = time.perf_counter()
        try:
            with preserved_rng():
                yield
        finally:
            self._run.seconds_at_work += time.perf_counter() - self._working_since

    def start(
        self,
        model: torch.nn.Module,
        *,
        directory: str | os.PathLike[str],
        step: int = 0,
        writes: bool = True,
        training: object = None,
    ) -> None:
        """Check that everything can be measured and written, and open the trajectory.

        Args:
            model: as it will be trained.
            directory: where `ib_trajectory.jsonl` and `information_plane.png` go.
            step: 0 for a fresh run, which rotates an old file away; else the step from which the run resumes.
            writes: whether this is the one process that writes files.
            training: an object that all callbacks of this training share; two of them in one directory are refused.

        Raises:
            ModelError: the model cannot be measured as asked.
            ProbeError: the probe does not fit the model.
            TrajectoryError: the directory cannot be written or is in use by another live run, or the file to
                continue is damaged; on every rank.
        """
        self._release()
        self._run = run = _Run(started=self._working_since)
        directory = Path(directory).absolute()  # the working directory may change while training runs
        preflight = self.meter.preflight(model)
        self.schedule(step)  # a mistake in it shows now
        run.settings = self.meter.settings(model)
        if writes:
            _log.info("%s", preflight.describe())

        def open_file() -> Trajectory:
            check_writable(directory)
            self._claim = Claim(directory, self if training is None else training)
            file = TrajectoryFile(directory, start_step=step)
            run.file = file.path
            return file.trajectory

        self.trajectory = _from_writer(open_file, writes=writes)
        if writes and self.trajectory:
            self._compare_settings(self.trajectory[-1])
        if writes and self.draw_plane:
            if importlib.util.find_spec("matplotlib") is not None:
                run.plane = Path(directory) / PLANE_FILENAME
            else:
                _warn(
                    f"{PLANE_FILENAME} will not be drawn, for Matplotlib is not installed. Install it with: "
                    'pip install "ib-callback[plot]", or pass log_plane=False.'
                )

    def _compare_settings(self, last: Measurement) -> None:
        differences = settings_differences(last.settings, self._run.settings)
        if differences:
            _warn(
                f"This run continues {self._run.file}, whose last point (step {last.step}) was measured with "
                f"other settings: {'; '.join(differences)} (then vs now). Points before and after cannot be "
                "compared: use the old settings, or another output_dir."
            )

    def due(self, step: int) -> bool:
        """Whether the schedule wants this step and it has not been recorded."""
        wanted = False
        with self._survived("The schedule failed, and nothing is measured until it answers again"):
            wanted = bool(self.schedule(step))
        return wanted and not self.recorded(step)

    def recorded(self, step: int) -> bool:
        """Whether the trajectory has reached this step, with a point or with the reason for a missing one."""
        reached = next((point.step for point in reversed(self.trajectory) if point.step is not None), None)
        return reached is not None and reached >= step

    def record(
        self, model: torch.nn.Module, step: int, *, tokens_seen: int | None = None, at_start: bool = False
    ) -> Measurement:
        """Measure, and add the point to the trajectory and its file.

        A failure becomes a warning and a point with `.error`. A file that cannot be written becomes a
        warning, and the point is written together with a later one.

        Args:
            model: as it is trained.
            step: optimizer steps taken.
            tokens_seen: training tokens so far, if known.
            at_start: no training time is lost yet: every error is raised, unless memory ran out.
        """
        began = time.perf_counter()
        try:
            point = self.meter.measure(model, step=step)
        except Exception as error:
            if at_start and not is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {error}"
            _warn(f"Nothing could be measured at step {step}; training goes on without this point. {reason}")
            seconds = time.perf_counter() - began
            point = Measurement.failed(step, reason, settings=self._run.settings, seconds=seconds)
        point = replace(point, tokens_seen=tokens_seen, overhead=self._overhead())
        self.trajectory.append(point)
        if self._run.file is not None:
            self._run.unsaved.append(point)
            self._save(self._run.file)
        return point

    def draw(self, *, final: bool = False) -> Path | None:
        """Draw the plane if it is time to, or if it is out of date at the end; the file if it was drawn."""
        points = sum(point.error is None for point in self.trajectory)
        drawn = self._run.points_drawn
        due = points <= _DRAWN_SINGLY or points >= _DRAWN_AGAIN * drawn or final
        if self._run.plane is None or points == drawn or not due:
            return None
        with self._survived(f"{self._run.plane} could not be drawn"):
            from ib_callback.plot import save_information_plane

            save_information_plane(self.trajectory, self._run.plane)
            self._run.points_drawn = points
            return self._run.plane
        return None

    def finish(self) -> Path | None:
        """Write what is still unwritten and draw the last plane; the file if it was drawn."""
        if self._run.file is not None:
            self._save(self._run.file)
            if self._run.unsaved:
                steps = ", ".join(str(point.step) for point in self._run.unsaved)
                _warn(f"Points that could not be written to {self._run.file}: steps {steps}. .trajectory has them.")
        plane = self.draw(final=True)
        self._release()
        return plane

    def _release(self) -> None:
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def _save(self, file: Path) -> None:
        with self._survived("A point could not be written, and will be tried again with the next one"):
            while self._run.unsaved:
                append_line(file, self._run.unsaved[0])
                del self._run.unsaved[0]

    @contextmanager
    def _survived(self, what: str) -> Iterator[None]:
        """A failure is a warning: one for as long as it lasts, not one for each point."""
        try:
            yield
        except Exception as error:
            if what not in self._run.outages:
                self._run.outages.add(what)
                _warn(f"{what}. {type(error).__name__}: {error}")
        else:
            self._run.outages.discard(what)

    def _overhead(self) -> float:
        now = time.perf_counter()
        at_work = self._run.seconds_at_work + now - self._working_since
        return at_work / (now - self._run.started)


def check_keywords(callback: type, keywords: Mapping[str, Any]) -> None:
    """Raise a TypeError if a callback cannot pass a keyword on to `Meter`; it lists those that it takes."""
    own, of_meter = (
        [name for name, p in inspect.signature(taker).parameters.items() if p.kind is p.KEYWORD_ONLY]
        for taker in (callback, Meter)
    )
    unknown = [name for name in keywords if name not in of_meter]
    if unknown:
        raise TypeError(
            f"{callback.__name__} got the unknown keyword{'s' if len(unknown) > 1 else ''} "
            f"{', '.join(unknown)}; it takes {', '.join(own)}, and those of Meter: {', '.join(of_meter)}."
        )


def _from_writer(open_file: Callable[[], Trajectory], *, writes: bool) -> Trajectory:
    """On every rank what the writing one finds in its file, or its error, so that no rank waits in vain."""
    if not (dist.is_available() and dist.is_initialized()):
        return open_file() if writes else Trajectory()
    found: list[Any] = [None, None]
    failure: Exception | None = None
    if writes:
        try:
            found[0] = open_file()
        except Exception as error:
            failure = error
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    if failure is not None:
        raise failure
    if found[1] is not None:
        raise TrajectoryError(f"rank 0 could not open the trajectory: {found[1]}")
    return found[0]


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
