"""What every trainer's callback does alike: measure along a run, keep the points and act on them."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ib_callback.bound.curve import FILENAME as CURVE_FILENAME
from ib_callback.common.checks import check_integer
from ib_callback.common.errors import ProbeError, TrajectoryError
from ib_callback.measuring.memory import is_out_of_memory
from ib_callback.measuring.meter import Meter
from ib_callback.measuring.model.guard import preserved_rng
from ib_callback.results.measurement import Measurement, settings_differences
from ib_callback.results.selection import Choice, SelectFrom, Selection
from ib_callback.results.stopping import PlateauStopping, StopDecision
from ib_callback.results.trajectory import Trajectory, append_line, check_writable
from ib_callback.run.checkpoints import CheckpointFile
from ib_callback.run.lock import Claim
from ib_callback.run.ranks import first_different, first_failure, of_rank_zero
from ib_callback.run.rules import LiveRules
from ib_callback.run.schedule import Schedule, never_fires
from ib_callback.run.summary import Cost, Selected, summarise
from ib_callback.run.trajectory_file import TrajectoryFile

PLANE_FILENAME = "information_plane.png"
# Every point is drawn at once up to this number of them. A picture takes about as long as a measurement of a
# small model, so that later ones wait until the run has this many times the points of the last picture.
_DRAWN_SINGLY = 20
_DRAWN_AGAIN = 1.25
# Those that only a logger gets wait until the run has twice the points.
_PICTURED_AGAIN = 2

_log = logging.getLogger(__name__)


@dataclass
class _Run:
    """What belongs to one run of training, as against the settings, which outlive it."""

    started: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = None  # None where this process writes nothing
    checkpoints: CheckpointFile | None = None  # likewise
    plane: Path | None = None  # likewise, and where no plane is drawn
    points_drawn: int = 0
    points_pictured: int = 1  # likewise of the pictures for a logger, which need two
    unsaved: list[Measurement] = field(default_factory=list)
    outages: set[str] = field(default_factory=set)
    seconds_at_work: float = 0.0
    points: int = 0
    skipped: int = 0


class Recorder:
    """Measures a model along a run and keeps what it finds: in memory, in files and as a picture.

    A callback calls `start` once a run, `record` for each point, `saved` for each checkpoint and `finish`, on every
    rank alike and inside `at_work`. Mistakes are raised by `start` and by the point measured at the start; once the
    run is under way, nothing that goes wrong here ends it. Whatever depends on the clock, on a disk or on the luck of
    one rank is decided by rank 0 for all.

    Args:
        meter: what measures.
        schedule: at which steps.
        draw_plane: keep `information_plane.png` up to date; a warning says so if Matplotlib is missing.
        early_stopping: when to stop; acted on by the callback, which reads `decision`.
        select: by what `selected` is chosen; None if nothing is.
        select_from: from when on.
        overhead_budget: share of the wall-clock time above which scheduled points are skipped; None for no limit.
        tokens_per_step: training tokens of one optimizer step, where the trainer does not count them.
        mix_settings: continue a trajectory although its points were measured with other settings.

    Attributes:
        trajectory: all points so far, those of an earlier part of a resumed run included.
        rules: what is known of the run by its points.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a metric that is not measured, or a setting out of range.
    """

    def __init__(
        self,
        meter: Meter,
        schedule: Schedule,
        *,
        draw_plane: bool = True,
        early_stopping: PlateauStopping | None = None,
        select: str | Selection | None = None,
        select_from: SelectFrom = "compression",
        overhead_budget: float | None = None,
        tokens_per_step: int | None = None,
        mix_settings: bool = False,
    ) -> None:
        if tokens_per_step is not None:
            cure = "all devices and accumulated batches together; None if unknown"
            check_integer("tokens_per_step", tokens_per_step, minimum=1, cure=cure)
        if overhead_budget is not None and not 0 < overhead_budget < 1:
            raise ValueError(
                "overhead_budget is a share of the wall-clock time: expected a number between 0 and 1, such as 0.01, "
                f"or None for no limit, got {overhead_budget!r}"
            )
        self.meter = meter
        self.schedule = schedule
        self.draw_plane = draw_plane
        self.overhead_budget = overhead_budget
        self.tokens_per_step = tokens_per_step
        self.mix_settings = mix_settings
        self.rules = LiveRules(
            meter.orders,
            meter.feature_names,
            early_stopping=early_stopping,
            select=select,
            select_from=select_from,
            primary=meter.primary,
            bound=meter.bound,
        )
        self.trajectory = Trajectory()
        self._working_since: float | None = None
        self._run = _Run(started=time.perf_counter())
        self._claim: Claim | None = None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Around all that a callback does: count its time, and put the random states back."""
        if self._working_since is not None:
            yield
            return
        self._working_since = time.perf_counter()
        try:
            with preserved_rng():
                yield
        finally:
            self._run.seconds_at_work += time.perf_counter() - self._working_since
            self._working_since = None

    def start(
        self,
        model: torch.nn.Module,
        *,
        directory: str | os.PathLike[str],
        step: int = 0,
        last_step: int | None = None,
        max_steps: int | None = None,
        writes: bool = True,
        training: object = None,
    ) -> None:
        """Check that everything can be measured and written, and open the trajectory.

        Args:
            model: as it will be trained.
            directory: where `ib_trajectory.jsonl`, `ib_checkpoints.jsonl` and `information_plane.png` go, and
                `ib_curve.json` if that is the bound.
            step: 0 for a fresh run, which rotates old files away; else the step from which the run resumes.
            last_step: of a resumed run, that of the last point when its checkpoint was saved, if known. Later
                points were measured on weights that the run never had.
            max_steps: at which training will end, if known.
            writes: whether this is the one process that writes files.
            training: an object that all callbacks of this training share; two of them in one directory are refused.

        Raises:
            ModelError: the model cannot be measured as asked.
            ProbeError: the probe does not fit the model.
            TrajectoryError: the directory cannot be written or is in use by another live run, or a file to
                continue is damaged; on every rank.
        """
        self._release()
        since = time.perf_counter() if self._working_since is None else self._working_since
        self._run = run = _Run(started=since)
        directory = Path(directory).absolute()  # the working directory may change while training runs
        self._check_same_probes()
        preflight = self.meter.preflight(model)
        self.schedule(step)  # a mistake in it shows now
        run.settings = self.meter.settings(model)
        if writes:
            _log.info("%s", preflight.describe())
        self._check_schedule(step, max_steps, warns=writes)

        def open_files() -> Trajectory:
            check_writable(directory)
            self._claim = Claim(directory, self if training is None else training)
            file = TrajectoryFile(directory, start_step=step, last_step=last_step)
            run.checkpoints = CheckpointFile(directory, start_step=step)
            run.file = file.path
            self._compare_settings(file)
            return file.trajectory

        self.trajectory = _from_writer(open_files, writes=writes)
        self.rules.replay(self.trajectory)
        curve = self.meter.curve()
        if writes and curve is not None:
            with self.survived(f"{CURVE_FILENAME} could not be written, and later pictures from files will lack it"):
                curve.save(directory / CURVE_FILENAME)
        if writes and self.draw_plane:
            if importlib.util.find_spec("matplotlib") is not None:
                run.plane = Path(directory) / PLANE_FILENAME
            else:
                _warn(
                    f"{PLANE_FILENAME} will not be drawn, for Matplotlib is not installed. Install it with: "
                    'pip install "ib-callback[plot]", or pass log_plane=False.'
                )

    def _check_same_probes(self) -> None:
        # Each rank runs as many passes as its own probe takes, so that a sharded model would wait forever.
        rank = first_different([probe.fingerprint for probe in self.meter.probes])
        if rank is not None:
            raise ProbeError(
                f"expected the same probes on every rank, got others on rank {rank} than on rank 0. A stream that is "
                "split between the ranks gives each its own rows: build the probe once (ib-callback probe build, or "
                "Probe.save), and load it on every rank with Probe.load."
            )

    def _check_schedule(self, step: int, max_steps: int | None, *, warns: bool) -> None:
        fires = True
        if max_steps is not None:
            # On every rank: a schedule may count how often it was asked.
            with self.survived("The schedule failed, and nothing is measured until it answers again"):
                fires = not never_fires(self.schedule, step, max_steps)
        if warns and not fires:
            _warn(
                f"The schedule {self.schedule!r} never fires between step {step} and the last one, {max_steps}: only "
                "the first and the last step will be measured, which is too few to stop or to select by. Choose a "
                "smaller every_n_steps, or ib.logarithmic()."
            )

    def _compare_settings(self, file: TrajectoryFile) -> None:
        if not file.trajectory:
            return
        last = file.trajectory[-1]
        differences = settings_differences(last.settings, self._run.settings)
        if not differences:
            return
        found = (
            f"This run continues {file.path}, whose last point (step {last.step}) was measured with other settings: "
            f"{'; '.join(differences)} (then vs now)."
        )
        if self.mix_settings:
            _warn(f"{found} Points before and after cannot be compared, and mix_settings=True mixes them.")
            return
        file.begin_anew()
        _warn(
            f"{found} They cannot be compared: a new trajectory begins here, and the old one is in {file.rotated}. "
            "Use the old settings to continue it, or mix_settings=True to continue it all the same."
        )

    def due(self, step: int, *, since: int | None = None) -> bool:
        """Whether the schedule wants this step, it has not been recorded, and the budget allows it.

        Args:
            step: optimizer steps taken.
            since: where several steps are taken at once, the step before them; any of them counts.
        """
        wanted = False
        with self.survived("The schedule failed, and nothing is measured until it answers again"):
            wanted = any(self.schedule(s) for s in range(step if since is None else since + 1, step + 1))
        if not wanted or self.recorded(step):
            return False
        if self.overhead_budget is None or of_rank_zero(self._share() <= self.overhead_budget):
            return True
        self._run.skipped += 1
        return False

    def recorded(self, step: int) -> bool:
        """Whether the trajectory has reached this step, with a point or with the reason for a missing one."""
        reached = next((point.step for point in reversed(self.trajectory) if point.step is not None), None)
        return reached is not None and reached >= step

    @property
    def has_values(self) -> bool:
        """Whether any point could be measured so far."""
        return any(point.error is None for point in self.trajectory)

    def record(
        self, model: torch.nn.Module, step: int, *, tokens_seen: int | None = None, at_start: bool = False
    ) -> Measurement:
        """Measure, add the point to the trajectory and its file, and apply the rules to it.

        A failure becomes a warning and a point with `.error`. A file that cannot be written becomes a
        warning, and the point is written together with a later one.

        Args:
            model: as it is trained.
            step: optimizer steps taken.
            tokens_seen: training tokens so far, if known.
            at_start: no training time is lost yet: every error is raised, unless memory ran out.
        """
        began = time.perf_counter()
        failure: Exception | None = None
        if tokens_seen is None and self.tokens_per_step is not None:
            tokens_seen = step * self.tokens_per_step
        try:
            point = self.meter.measure(model, step=step)
        except Exception as error:
            failure = error
            reason = f"{type(error).__name__}: {error}"
            seconds = time.perf_counter() - began
            point = Measurement.failed(step, reason, settings=self._run.settings, seconds=seconds)
        # Every rank measures the same, unless one of them fails; and what follows from a point must be the same.
        point = of_rank_zero(replace(point, tokens_seen=tokens_seen, overhead=self._share()))
        if at_start:
            self._raise_on_every_rank(failure)
        if point.error is not None:
            _warn(f"Nothing could be measured at step {step}; training goes on without this point. {point.error}")
        self._run.points += 1
        self.trajectory.append(point)
        if self._run.file is not None:
            self._run.unsaved.append(point)
            self._save(self._run.file)
        with self.survived("The rules for stopping and selection failed"):
            self.rules.update(point)
        return point

    @staticmethod
    def _raise_on_every_rank(failure: Exception | None) -> None:
        """Raise what failed here or, so that nobody waits in vain, on another rank; but memory may run out."""
        passes = failure is None or is_out_of_memory(failure)
        elsewhere = first_failure(None if passes else f"{type(failure).__name__}: {failure}")
        if failure is not None and not passes:
            raise failure
        if elsewhere is not None:
            raise RuntimeError(f"rank {elsewhere[0]} could not measure the model as training finds it: {elsewhere[1]}")

    @property
    def decision(self) -> StopDecision | None:
        """Whether to stop, by the last point; None without a rule or a point."""
        return self.rules.decision

    def numbers(self) -> dict[str, float | int | None]:
        """Every number of the last point that could be measured, by its logged name; None where undefined."""
        return {f"ib/{name}": value for name, value in self.rules.numbers().items() if name != "tokens_seen"}

    def logged(self, point: Measurement) -> dict[str, float]:
        """What loggers get of a point just recorded: nothing if it could not be measured."""
        if point.error is not None:
            return {}
        return {**point.metrics(), **{f"ib/{name}": value for name, value in self.rules.shown().items()}}

    def saved(self, step: int, path: str | os.PathLike[str]) -> None:
        """Take note of a checkpoint that is complete."""
        if self._run.checkpoints is not None:
            with self.survived("A checkpoint could not be recorded, and can be selected in this process only"):
                self._check_claim()
                self._run.checkpoints.add(step, path)

    def selected(self, *, also: int | None = None) -> Selected | None:
        """The best checkpoint that exists, if checkpoints are selected and one of them can be; on every rank the same.

        Args:
            also: a step that counts as if it had been saved.
        """
        found: Selected | None = None
        run = self._run
        if self.rules.selects and run.checkpoints is not None:
            with self.survived("The best checkpoint could not be determined"):
                existing = run.checkpoints.existing()
                available = {*existing, also} if also is not None else set(existing)
                best = self.rules.choose(self.trajectory, available).best
                if best is not None:
                    found = Selected.of(best, existing)
        return of_rank_zero(found) if self.rules.selects else None

    def why_none_selected(self) -> str:
        """Why no checkpoint can be selected, in words."""
        choice = self._choice()
        return "" if choice is None else choice.describe()

    def _choice(self) -> Choice | None:
        with self.survived("The best checkpoint could not be determined"):
            existing = {} if self._run.checkpoints is None else self._run.checkpoints.existing()
            return self.rules.choose(self.trajectory, set(existing))
        return None

    def summary(self, selected: Selected | None = None) -> dict[str, float | str]:
        """The run in a few values for a logger, by full name."""
        with self.survived("The summary of the run could not be made"):
            return summarise(self.trajectory, self.rules, self.cost, selected)
        return {}

    def draw(self, *, final: bool = False) -> Path | None:
        """Draw the plane if it is time to, or if it is out of date at the end; the file if it was drawn."""
        points = sum(point.error is None for point in self.trajectory)
        drawn = self._run.points_drawn
        due = points <= _DRAWN_SINGLY or points >= _DRAWN_AGAIN * drawn or final
        if self._run.plane is None or points == drawn or not due or not self._holds_directory:
            return None
        with self.survived(f"{self._run.plane} could not be drawn"):
            from ib_callback.plot import save_information_plane

            save_information_plane(self.trajectory, self._run.plane, curve=self.meter.curve())
            self._run.points_drawn = points
            return self._run.plane
        return None

    def pictures(self, *, final: bool = False) -> dict[str, bytes]:
        """Further pictures for a logger if it is time to, or if they are out of date at the end: PNG by name."""
        points = sum(point.error is None for point in self.trajectory)
        pictured = self._run.points_pictured
        if self._run.plane is None or points <= pictured or not (final or points >= _PICTURED_AGAIN * pictured):
            return {}
        self._run.points_pictured = points
        pictures: dict[str, bytes] = {}
        with self.survived("The pictures over steps and by layer could not be drawn"):
            from ib_callback.plot import encoded, over_steps, plane_by_layer

            pictures["over_steps"] = encoded(over_steps(self.trajectory, log=None))
            last = next(point for point in reversed(self.trajectory) if point.error is None)
            pictures["layers"] = encoded(plane_by_layer(last, curve=self.meter.curve()))
        return pictures

    def finish(self) -> Path | None:
        """Write what is still unwritten, draw the last plane and say what all of it cost; the file if it was drawn."""
        if self._run.file is not None:
            self._save(self._run.file)
            if self._run.unsaved:
                steps = ", ".join(str(point.step) for point in self._run.unsaved)
                _warn(f"Points that could not be written to {self._run.file}: steps {steps}. .trajectory has them.")
            if self.rules.selects and (choice := self._choice()) is not None and choice.may_be_chance:
                _warn(choice.describe())
        plane = self.draw(final=True)
        if self._run.file is not None and self._run.points:
            self.announce(str(self.cost))
        self._release()
        return plane

    @property
    def cost(self) -> Cost:
        """What this run has cost so far, in this process."""
        run = self._run
        return Cost(points=run.points, seconds=self._seconds(), share=self._share(), skipped=run.skipped)

    def announce(self, message: str) -> None:
        """Tell whoever watches the run, on the process that writes: also where nobody has set up logging."""
        if self._run.file is None or not message:
            return
        if _log.isEnabledFor(logging.INFO):
            _log.info("%s", message)
        else:
            sys.stderr.write(f"ib_callback: {message}\n")

    def _release(self) -> None:
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    @property
    def _holds_directory(self) -> bool:
        return self._claim is None or self._claim.holds

    def _check_claim(self) -> None:
        if not self._holds_directory:
            raise TrajectoryError(
                "another training in this process, which began later, writes to the same directory: give each its own "
                "output_dir="
            )

    def _save(self, file: Path) -> None:
        with self.survived("A point could not be written, and will be tried again with the next one"):
            self._check_claim()
            while self._run.unsaved:
                append_line(file, self._run.unsaved[0])
                del self._run.unsaved[0]

    @contextmanager
    def survived(self, what: str) -> Iterator[None]:
        """A failure is a warning: one for as long as it lasts, not one for each point."""
        try:
            yield
        except Exception as error:
            if what not in self._run.outages:
                self._run.outages.add(what)
                _warn(f"{what}. {type(error).__name__}: {error}")
        else:
            self._run.outages.discard(what)

    def _seconds(self) -> float:
        working = 0.0 if self._working_since is None else time.perf_counter() - self._working_since
        return self._run.seconds_at_work + working

    def _share(self) -> float:
        return self._seconds() / max(time.perf_counter() - self._run.started, 1e-9)


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
            f"{', '.join(unknown)}; it takes {', '.join(own)}, and those of Meter: "
            f"{', '.join(name for name in of_meter if name not in own)}."
        )


def _from_writer(open_files: Callable[[], Trajectory], *, writes: bool) -> Trajectory:
    """On every rank what the writing one finds in its files, or its error, so that no rank waits in vain."""
    trajectory, failure = Trajectory(), None
    if writes:
        try:
            trajectory = open_files()
        except Exception as error:
            failure = error
    trajectory, reason = of_rank_zero((trajectory, None if failure is None else str(failure)))
    if failure is not None:
        raise failure
    if reason is not None:
        raise TrajectoryError(f"rank 0 could not open the trajectory: {reason}")
    return trajectory


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
