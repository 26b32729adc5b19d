"""Following one run of training: what every training loop needs, from the schedule to the last picture."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch

from ib_callback.common import json_lines
from ib_callback.common.checks import check_integer
from ib_callback.common.errors import ProbeError, RanksError, TrajectoryError
from ib_callback.common.files import expanded, remove_partial_files, size_of
from ib_callback.common.messages import describe, note, warn
from ib_callback.common.optional import is_installed
from ib_callback.common.ranks import Kept, Ranks, first_different, first_failure, is_rank_zero, of_rank_zero
from ib_callback.measuring.meter import Meter, Preflight
from ib_callback.measuring.model.forward import is_out_of_memory
from ib_callback.measuring.model.guard import preserved_rng
from ib_callback.results.measurement import Measurement, settings_differences
from ib_callback.results.selection import Choice
from ib_callback.results.stopping import StopDecision
from ib_callback.results.trajectory import Trajectory, append_line, check_writable, write_run_file
from ib_callback.run import console, trackers
from ib_callback.run.alerts import Alerts
from ib_callback.run.checkpoints import CheckpointFile, is_complete
from ib_callback.run.config import RunConfig, run_config, takes_keywords_of
from ib_callback.run.lock import RunLock
from ib_callback.run.names import Names
from ib_callback.run.rules import LiveRules
from ib_callback.run.schedule import At, Every, Logarithmic, never_fires
from ib_callback.run.summary import Cost, Selected, summarise
from ib_callback.run.training_data import look_for_probes
from ib_callback.run.trajectory_file import TrajectoryFile
from ib_callback.run.wandb_log import WandbLog, open_run

PLANE_FILENAME = Names().plane
FINAL_FILENAME = Names().final
# Up to _DRAWN_SINGLY points, the plane is drawn again at each point. A picture takes about as long as a measurement of
# a small model. So later pictures wait until the run has _DRAWN_AGAIN times the points of the last picture.
_DRAWN_SINGLY = 20
_DRAWN_AGAIN = 1.25
# Pictures that only a logger gets wait until the run has this many times the points of the last ones.
_PICTURED_AGAIN = 2
_NOT_RECORDED = "A checkpoint could not be recorded, and will be tried again with the next point or checkpoint"

Event = TypeVar("Event", bound=Callable[..., Any])


@dataclass
class _State:
    """What belongs to one run of training. The settings are kept elsewhere, because they outlive it."""

    started: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    writes: bool = False
    file: Path | None = None  # None if this process writes nothing
    checkpoints: CheckpointFile | None = None  # likewise
    plane: Path | None = None  # likewise, or if no plane is drawn
    points_drawn: int = 0
    points_pictured: int = 1  # the same for the further pictures for W&B, which need two points
    points_figured: int = 1  # the same for all pictures for other trackers
    encoded: tuple[int, dict[str, bytes]] = field(
        default_factory=lambda: (0, {})
    )  # the number of points in the last pictures, and these pictures by name
    unsaved: list[Measurement] = field(default_factory=list)
    written: int = 0  # size of the file in bytes after the last point
    outages: set[str] = field(default_factory=set)
    seconds_at_work: float = 0.0
    points: int = 0
    skipped: int = 0
    within_budget: int | None = None  # the last scheduled step that the budget allowed
    exempt: int = 0  # points measured without asking the budget
    selected: Selected | None = None
    final: Measurement | None = None
    certain: bool = True  # whether every checkpoint that may be better could be looked for
    not_compared: frozenset[Path] = (
        frozenset()
    )  # checkpoints of an earlier part that the trajectory knows nothing about
    told_to_stop: bool = False
    asked: tuple[int, int | None, bool] | None = None  # the last question to the schedule, and the answer


class _Seen(NamedTuple):
    """What the last call of `Run.step` was given, and what tells whether the weights have changed since."""

    model: torch.nn.Module
    step: int
    loss: float | None
    weights: tuple[int, int]


class Run:
    """Follows a model through the information plane while your own loop trains it. The callbacks are built on it.

        with ib.Run(ib.Meter(probe), output_dir="out", select="optimality") as run:
            for step in range(first, last + 1):
                if run.step(model, step) or step == last:
                    break
                ...  # one step of the optimizer; now and then torch.save(…, path) and run.saved(step + 1, path)

    If the first `step` is 0, a new run begins, and the files of an old run in `output_dir` are moved away. If the
    first `step` is later, the run resumes. It reads the points up to that step, and drops later points because this run
    has never had them.

    The model is measured at the first step, at the steps of the schedule, and at every checkpoint if checkpoints are
    selected. When the block is left without an error, the last step seen is measured too. Every rank calls `step` and
    `saved`, and has the same points and decisions. Rank 0 writes `ib_trajectory.jsonl`, `ib_checkpoints.jsonl` and
    `information_plane.png`. Numbers and pictures go to Weights & Biases if a run is open there or is given. Training is
    not disturbed: weights and random states are the same as without `Run`, and no hook is left in the model.

    The first `step` raises an error for each mistake: a model that cannot be measured, a probe of another tokenizer, a
    directory that cannot be written. Later failures here never end the training. A measurement that fails becomes a
    warning and a point with `.error`.

    Args:
        meter: says what is measured, and on which probe.
        config: the keywords below as one object; the callbacks pass it.
        wandb: a run of Weights & Biases to log to, in addition to the one that is open in this process, if any.
        x_axis: the name under which the step goes to Weights & Biases. Use the same name in your own rows.
        **keywords: those of `RunConfig` (`every_n_steps`, `early_stopping`, `select`, `output_dir`, …).

    Attributes:
        trajectory: all points so far, including those of an earlier part of a resumed run.
        rules: what the points say about the run.

    Raises:
        TypeError: an unknown keyword, or a value of the wrong type.
        ValueError: a setting out of range, or a metric that is not measured; the message lists those that are.
    """

    @takes_keywords_of(RunConfig)
    def __init__(
        self,
        meter: Meter,
        *,
        config: RunConfig | None = None,
        wandb: Any = None,
        x_axis: str = "train/global_step",
        **keywords: Any,
    ) -> None:
        if not isinstance(meter, Meter):
            raise TypeError(f"meter: expected an ib.Meter, got {type(meter).__name__}; pass ib.Meter(probe).")
        if config is not None and (keywords or not isinstance(config, RunConfig)):
            raise TypeError(f"config: expected a RunConfig, and no keywords beside it, got {config!r} and {keywords}.")
        if wandb is not None and not hasattr(wandb, "log"):
            raise TypeError(f"wandb: expected a run, such as wandb.init(…) returns, got {wandb!r}.")
        self.meter = meter
        self.config = config or run_config("Run", keywords, "; what is measured is asked of ib.Meter")
        self.names = Names(self.config.prefix)
        # If the config leaves this open, callbacks set it as their trainer does.
        self.shows_lines = self.config.console is not False
        self.schedule = self.config.schedule
        self.rules = LiveRules(
            meter.orders,
            meter.feature_names,
            self.config,
            primary=meter.primary,
            bound=meter.bound,
            views=meter.view_names,
            without=meter.unmeasured,
        )
        self._phase_rule = self.config.rule_of_phases()
        self.trajectory = Trajectory(phase_rule=self._phase_rule, guard=self.rules.selection.guard)
        self.wandb_runs = [] if wandb is None else [wandb]
        self._wandb = WandbLog(x_axis, prefix=self.config.prefix)
        self._alerts = Alerts()
        self.described: dict[str, Any] = {}  # the settings, for the trackers' configuration of the run
        self._working_since: float | None = None
        self._state = _State(started=time.perf_counter())
        self._lock: RunLock | None = None
        self._entered = False
        self._last: _Seen | None = None  # in the open block

    def __getstate__(self) -> dict[str, Any]:
        """A copy, by copy or pickle, logs only to the run of Weights & Biases that is open in its process, if any."""
        return {**vars(self), "wandb_runs": []}

    # --- for your own training loop

    def __enter__(self) -> Run:
        if self.config.output_dir is None:
            raise ValueError('output_dir: expected the directory where the files of this run go, such as "out".')
        if self._entered:
            raise RuntimeError("Run: expected one `with` block at a time, got a second one of the same run within it.")
        self._entered, self._last = True, None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered = False
        if self._last is None:  # it never began
            self._release()
            return
        seen, self._last = self._last, None
        with self.survived("The last step could not be measured"):
            if kind is None and self.config.at_finish and not self.recorded(seen.step):
                if of_rank_zero(seen.weights == weights_seen(seen.model)):
                    self.record(seen.model, seen.step, train_loss=seen.loss)
                else:
                    _warn(
                        f"Step {seen.step}, the last step that was reported, was not measured: the optimizer has "
                        "made another step since. Call run.step(model, step) after the last step of the optimizer, too."
                    )
        self.end(seen.step, complete=kind is None)

    def step(self, model: torch.nn.Module, step: int, *, loss: float | None = None) -> StopDecision | None:
        """Measure the model if it is time to.

        Args:
            model: the model after this many steps.
            step: optimizer steps taken so far. You need not call this at every step: if a scheduled step was passed
                over, the next call measures.
            loss: the training loss, which is kept with the point as `train_loss`.

        Returns:
            What `early_stopping` says at the last point. It is true if the training should stop. None without a rule.

        Raises:
            RuntimeError: called outside of the `with` block.
            TypeError: the step is not an integer.
            ValueError: the step is lower than the last one. To go back, begin a new block.
            ModelError, ProbeError, TrajectoryError: at the first call, on every rank; see `begin`.
        """
        step = self._within("step", step)
        loss = self._number_of(loss)
        if self._last is None:
            assert self.config.output_dir is not None
            self.begin(model, directory=self.config.output_dir, step=step)
            if self.measures_at_start(step):
                self.record(model, step, train_loss=loss, at_start=True)
            self.choose()
        elif step < self._last.step:
            raise ValueError(
                f"step: expected {self._last.step} or more, got {step}. To go back to an earlier checkpoint, begin a "
                "new `with ib.Run(…)` block at its step."
            )
        else:
            with self.survived("A step could not be followed"):
                if self.due(step, since=self._last.step):
                    self.record(model, step, train_loss=loss, since=self._last.step)
        self._last = _Seen(model, step, loss, weights_seen(model))
        decision = self.decision
        if decision and not self._state.told_to_stop:
            self._state.told_to_stop = True
            self.announce(f"training should stop at step {step}: {decision.message}")
        return decision

    def _number_of(self, loss: Any) -> float | None:
        with self.survived("The training loss is not kept with its point: expected a number"):
            return None if loss is None else float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
        return None

    def _within(self, method: str, step: int) -> int:
        """Check that the block is open and the step is an integer, and return the step as an int."""
        if not self._entered:
            raise RuntimeError(f"Run.{method}: expected to be called inside `with ib.Run(…) as run:`.")
        return check_integer("step", step, minimum=0, cure="it is the number of optimizer steps taken")

    def saved(self, step: int, path: str | os.PathLike[str]) -> None:
        """Record a checkpoint. Call this on every rank, right after the checkpoint was saved completely.

        Args:
            step: the step whose weights the checkpoint holds. It is measured if checkpoints are selected.
            path: of the file or folder. Give each checkpoint its own path, because an overwritten one cannot be kept.
        """
        step, path = self._within("saved", step), expanded(path)
        if self._last is None:
            raise RuntimeError("Run.saved: expected a first run.step(model, step), with which the run begins.")
        with self.survived("A checkpoint could not be noted"), self.at_work():
            # The optimizer may have made a step that `step` has not been told of yet. Then these are its weights.
            holds = True
            if self.rules.selects and step >= self._last.step and not self.recorded(step):
                self.record(self._last.model, step, train_loss=self._last.loss if step == self._last.step else None)
            elif step == self._last.step:
                holds = self._last.weights == weights_seen(self._last.model)
            best = self.selected
            if best is not None and best.step != step and best.path == Path(os.path.abspath(path)):
                _warn(
                    f"The best checkpoint so far, {best.path} of step {best.step}, was overwritten by that of step "
                    f"{step}. Save each to a path of its own, and remove those for which run.keeps(path) is false."
                )
            self.note_checkpoint(step, path, holds=holds)
            self.choose()

    def keeps(self, path: str | os.PathLike[str]) -> bool:
        """Whether a checkpoint must stay because it is, or may be, the best one so far. The same on every rank.

        Any checkpoint may be the best one if the disk does not answer. A checkpoint of an earlier part of the run may
        be if it cannot be compared with later ones, because settings have changed or the trajectory is gone.
        """
        absolute = Path(os.path.abspath(expanded(path)))
        is_best = self.selected is not None and self.selected.path == absolute
        return is_best or not self.certain or absolute in self._state.not_compared

    @property
    def certain(self) -> bool:
        """Whether every checkpoint could be looked for when `selected` was chosen. If not, remove nothing."""
        return self._state.certain

    @property
    def decision(self) -> StopDecision | None:
        """What `early_stopping` says at the last point; None without a rule or a point."""
        return self.rules.decision

    @property
    def selected(self) -> Selected | None:
        """The checkpoint that `select` has chosen so far: `.step`, `.value`, `.path`."""
        return self._state.selected

    @property
    def final(self) -> Measurement | None:
        """Measurement of the model that training left behind, if no point has its weights, as with an average."""
        return self._state.final

    @property
    def cost(self) -> Cost:
        """What following the run has cost so far, in this process."""
        state = self._state
        return Cost(points=state.points, seconds=self._seconds(), share=self._share(), skipped=state.skipped)

    # --- for the callbacks of trainers, which know more of a run

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Surrounds all work beside the training: counts its time, and restores the random states."""
        if self.is_at_work:
            yield
            return
        self._working_since = time.perf_counter()
        try:
            with preserved_rng():
                yield
        finally:
            began, self._working_since = self._working_since, None
            self._state.seconds_at_work += time.perf_counter() - began

    @property
    def is_at_work(self) -> bool:
        """Whether `at_work` is active. A signal that saves a checkpoint can come in the middle of it."""
        return self._working_since is not None

    def begin(
        self,
        model: torch.nn.Module,
        *,
        directory: str | os.PathLike[str],
        step: int = 0,
        last_step: int | None = None,
        last_point: Sequence[Any] | None = None,
        max_steps: int | None = None,
        beyond_schedule: bool = False,
        judged: bool = False,
        writes: bool | None = None,
        weights: str | None = None,
        training: object = None,
        resumed_from: str | os.PathLike[str] | None = None,
        loaders: Any = None,
        tokenizer: Any = None,
    ) -> None:
        """Check that everything can be measured and written, and open the trajectory.

        Args:
            model: the model that will be trained.
            directory: where `ib_trajectory.jsonl`, `ib_checkpoints.jsonl` and `information_plane.png` go. If the bound
                is the IB curve, `ib_curve.json` goes there too.
            step: 0 for a fresh run, which moves old files away. Otherwise the step from which the run resumes.
            last_step: for a resumed run, the step of the last point when its checkpoint was saved, if known. Later
                points were measured on weights that the run never had.
            last_point: what `progress` said about that point. If the file has another point at that step, the file
                belongs to another run and is moved away.
            max_steps: the step at which training will end, if known.
            beyond_schedule: whether evaluations or checkpoints are measured too. If so, a schedule that never fires is
                not a mistake.
            judged: whether evaluations count as points of the schedule.
            writes: whether this is the one process that writes files; by default rank 0 is.
            weights: a name for the weights that are measured, if they are not the weights being trained. It is part of
                the settings, so that points of both are not taken for one series.
            training: an object that all callbacks of this training share; two of them in one directory are refused.
            resumed_from: the checkpoint from which the run resumes. It is complete, but may not have been recorded.
            loaders: what gives the training data, for `check_overlap`.
            tokenizer: for training data that consists of texts.

        Raises:
            ModelError: the model cannot be measured as asked.
            ProbeError: the probe does not fit the model.
            TrajectoryError: the directory cannot be written or is in use by another live run, or a file to
                continue is damaged; on every rank.
        """
        with self.at_work():
            last = (last_step, last_point)
            checked_until = None if beyond_schedule else max_steps
            preflight = self._open(
                model, Path(directory).absolute(), step, last, checked_until, writes, weights, training
            )
            with self.survived("The line about what will be measured could not be told"):
                self._tell_of_beginning(preflight, step, max_steps, judged)
            if self.config.check_overlap and self._state.writes:
                self.announce(look_for_probes(self.meter.probes, loaders, self.config.check_overlap, tokenizer))
            if step and resumed_from is not None and _may_be_complete(Path(resumed_from)):
                known = self._state.checkpoints
                # If its weights are known to differ from those measured, leave that record as it is.
                if known is None or known.holds(step, resumed_from):
                    self.note_checkpoint(step, resumed_from, own=False)

    def _open(
        self,
        model: torch.nn.Module,
        directory: Path,  # absolute, because the working directory may change while training runs
        step: int,
        last: tuple[int | None, Sequence[Any] | None],
        max_steps: int | None,
        writes: bool | None,
        weights: str | None,
        training: object,
    ) -> Preflight:
        self._release()
        last_step, last_point = last
        assert self._working_since is not None
        self._state = state = _State(started=self._working_since, writes=is_rank_zero() if writes is None else writes)
        self._check_same_probes()
        state.weights = weights

        def look() -> Preflight:
            found = self.meter.preflight(model)
            self.schedule(step)  # a mistake in it shows now
            state.settings = self._with_weights(self.meter.settings(model), weights)
            return found

        kept = Kept()
        found = kept(look)
        Ranks().agree_on(kept)
        assert found is not None
        preflight = found
        if state.writes:
            note(preflight.describe())
            for name in self.rules.needed:
                if why := preflight.missing.get(name.partition("/")[0]):
                    _warn(f"{name} is undefined until the model has a {name.partition('/')[0]}: {why}.")
            if self.rules.given_up:
                _warn(f"{self.rules.given_up}.")
            if self.rules.selects and not self.config.at_start:
                _warn(
                    f"at_start=False: the first point, at step {step}, is measured all the same, because select= "
                    "needs it. It tells the phases, whether the weights were trained before, and how good the "
                    "checkpoint is from which a run is resumed."
                )
        self.described = trackers.settings(
            self.meter,
            self.config,
            rules=self.rules.describe(has_loss=bool(self.meter.loss)),
            num_layers=len(preflight.layers),
            stem=self.names.stem,
        )
        self._wandb.config = self.described
        self._check_schedule(step, max_steps)

        def open_files() -> Trajectory:
            check_writable(directory, self._files())
            self._lock = RunLock(directory, self if training is None else training, self.names.lock)
            with self.survived("What a killed run left half-written could not be removed"):
                remove_partial_files(directory, self.names.replaced)
            file = TrajectoryFile(directory, start_step=step, last_step=last_step, name=self.names.trajectory)
            state.checkpoints = CheckpointFile(directory, start_step=step, name=self.names.checkpoints)
            state.file = file.path
            with json_lines.explained(final := directory / self.names.final, "moved"):
                json_lines.set_aside(final)
            if last_step is not None:
                self._compare_steps(file, step, last_step)
            if last_point is not None and not _is_of_run(file.trajectory, last_step, last_point):
                file.begin_anew()
                state.checkpoints = CheckpointFile(directory, start_step=0, name=self.names.checkpoints)
                _warn(
                    f"The point of step {last_step} in {file.path} belongs to another run than the checkpoint that "
                    f"this run resumes from. The file was moved to {file.rotated}, and a new one begins here."
                )
            self._compare_settings(file)
            _set_aside_foreign(directory / self.names.run)
            self._write_run_file(directory)
            return file.trajectory

        self.trajectory = _from_writer(open_files, writes=state.writes)
        self.trajectory.phase_rule, self.trajectory.guard = self._phase_rule, self.rules.selection.guard
        self.rules.replay(self.trajectory)
        self._alerts.begin(self.rules)
        state.not_compared = of_rank_zero(self._not_compared())
        curve = self.meter.curve()
        if state.writes and curve is not None:
            with self.survived(
                f"{self.names.curve} could not be written. Pictures drawn from the files later will lack it"
            ):
                _check_is_curve(directory / self.names.curve)
                curve.save(directory / self.names.curve)
        if state.writes and self.config.log_plane:
            if is_installed("matplotlib"):
                state.plane = self._own_plane(directory)
            else:
                _warn(
                    f"{self.names.plane} will not be drawn because Matplotlib is not installed. Install it with: "
                    'pip install "ib-callback[plot]". Or pass log_plane=False.'
                )

        return preflight

    def _tell_of_beginning(self, preflight: Preflight, step: int, max_steps: int | None, judged: bool) -> None:
        """Say what will be measured and which rules can never act, on the process that writes."""
        if not self._state.writes:
            return
        if self.shows_lines:
            finish = self.config.at_finish
            self.announce(
                console.beginning(
                    self.meter, preflight, self.rules, self.schedule, step=step, max_steps=max_steps, at_finish=finish
                )
            )
        points = console.expected_points(self.schedule, step, max_steps)
        if points is not None and max_steps is not None and not judged:
            earlier = sum(point.scheduled for point in self.trajectory if point.step != step)
            for sentence in console.never_acts(
                self.meter, self.rules, points + earlier, step=step, max_steps=max_steps
            ):
                self.announce(sentence)

    def _write_run_file(self, directory: Path) -> None:
        write_run_file(directory, phase_rule=self._phase_rule, guards=self.config.guards, name=self.names.run)

    def _files(self) -> list[str]:
        """Names of all files that will be written."""
        own = self.names
        names = [own.trajectory, own.checkpoints, own.run, own.final, own.lock]
        names += [own.plane] if self.config.log_plane else []
        return names + ([own.curve] if self.meter.curve() is not None else [])

    def _own_plane(self, directory: Path) -> Path | None:
        """Where the plane is drawn; None if there is a file that this package did not write."""
        from ib_callback.plot import may_be_replaced

        plane = directory / self.names.plane
        with self.survived(f"{plane} could not be looked at, and is drawn all the same"):
            # Earlier versions did not mark their pictures, but Matplotlib did.
            earlier = any(directory.glob(f"{self.names.stem}_trajectory*.jsonl"))
            if not may_be_replaced(plane) and not (earlier and b"Matplotlib version" in plane.read_bytes()):
                _warn(
                    f"{plane} was not drawn by this package. It is left as it is, and no plane is drawn. Move it "
                    "away, or pass another output_dir=."
                )
                return None
        return plane

    def _not_compared(self) -> frozenset[Path]:
        compared = self._continued()
        existing = {} if self._state.checkpoints is None else self._state.checkpoints.existing()
        return frozenset(path for step, path in existing.items() if step not in compared)

    def _continued(self) -> set[int]:
        """Steps of the points from the part of the run that this trajectory has followed itself."""
        steps = [step for step in self.trajectory.steps if step is not None]
        # If the trajectory began later than the run, its first point may be that of the checkpoint resumed from.
        return set(steps[1:] if steps and steps[0] else steps)

    def _check_same_probes(self) -> None:
        # Each rank runs as many passes as its own probe needs. If these differ, a sharded model waits forever.
        rank = first_different([probe.fingerprint for probe in self.meter.probes])
        if rank is not None:
            raise ProbeError(
                f"expected the same probes on every rank, got different ones on rank {rank} and rank 0. A stream "
                "that is split between the ranks gives each rank other rows. Build the probe once (ib-callback "
                "probe build, or Probe.save), and load it on every rank with Probe.load."
            )

    def _check_schedule(self, step: int, max_steps: int | None) -> None:
        fires = True
        if max_steps is not None:
            # Ask on every rank, because a schedule may count how often it was asked.
            with self.survived("The schedule failed, and nothing is measured until it answers again"):
                fires = not never_fires(self.schedule, step, max_steps)
        if self._state.writes and not fires:
            _warn(
                f"The schedule {self.schedule!r} never fires between step {step} and the last one, {max_steps}: only "
                "the first and the last step will be measured, which is too few to stop or to select by. Choose a "
                "smaller every_n_steps, or ib.logarithmic()."
            )

    @staticmethod
    def _compare_steps(file: TrajectoryFile, step: int, last_step: int) -> None:
        """Warn if the file of a resumed run lacks some of its points."""
        found = file.trajectory[-1].step if file.trajectory else None
        if step and last_step >= 0 and (found is None or found < min(step, last_step)):
            there = "has none of them" if found is None else f"ends at step {found}"
            _warn(
                f"This run was measured up to step {last_step} before it was interrupted, but {file.path} {there}. "
                "Phases, stopping and selection use the points that are left. To use all points, stop now and put the "
                "earlier file there, or pass the earlier output_dir=."
            )

    def _compare_settings(self, file: TrajectoryFile) -> None:
        if not file.trajectory:
            return
        last = file.trajectory[-1]
        differences = settings_differences(last.settings, self._state.settings)
        if not differences:
            return
        found = (
            f"This run continues {file.path}, whose last point (step {last.step}) was measured with other settings: "
            f"{'; '.join(differences)} (then vs now)."
        )
        if self.config.mix_settings:
            _warn(f"{found} Points before and after cannot be compared; mix_settings=True mixes them.")
            return
        file.begin_anew()
        _warn(
            f"{found} They cannot be compared: a new trajectory begins here, and the old one is in {file.rotated}. "
            "Use the old settings to continue it, or mix_settings=True to continue it all the same."
        )

    def progress(self) -> dict[str, Any]:
        """`last_step` and `last_point` for a checkpoint, as JSON values. A resumed run knows its points by them."""
        last = next((point for point in reversed(self.trajectory) if point.step is not None), None)
        return (
            {"last_step": None, "last_point": None}
            if last is None
            else {"last_step": last.step, "last_point": _identity(last)}
        )

    def measures_at_start(self, step: int) -> bool:
        """Whether to measure the model when a run begins or resumes."""
        must = self.rules.selects or all(point.error is not None for point in self.trajectory)
        if not self.config.at_start and not self.rules.selects:
            # `Every` and `Logarithmic` mean the steps after the first. Other schedules mean every step that they name.
            return not isinstance(self.schedule, (Every, Logarithmic)) and self.due(step)
        # Call `due` only for a point that can be left out, because `due` counts the points that it skips.
        return step == 0 or (must and not self.recorded(step)) or self.due(step)

    def due(self, step: int, *, since: int | None = None) -> bool:
        """Whether the schedule wants this step, it has not been recorded yet, and the budget allows it.

        Args:
            step: optimizer steps taken.
            since: if several steps were taken at once, the step before them. The schedule may want any of them.
        """
        if not self._wanted(step, since) or self.recorded(step):
            return False
        budget = self.config.overhead_budget
        if budget is None or of_rank_zero(self._share() <= budget):
            self._state.within_budget = step
            return True
        self._state.skipped += 1
        return False

    def _wanted(self, step: int, since: int | None) -> bool:
        """Whether the schedule wants a step. Ask the schedule once, because it may count how often it is asked."""
        asked = self._state.asked
        # When a checkpoint is saved, the schedule may already have been asked about its step, with those before it.
        if asked is None or asked[0] != step or since not in (None, asked[1]):
            self._state.asked = asked = (step, since, False)
            with self.survived("The schedule failed, and nothing is measured until it answers again"):
                wanted = any(self.schedule(s) for s in range(step if since is None else since + 1, step + 1))
                self._state.asked = asked = (step, since, wanted)
            if not isinstance(self.schedule, (Every, Logarithmic, At)):  # a user's own may read the clock
                self._state.asked = asked = of_rank_zero(asked)
        return asked[2]

    def recorded(self, step: int) -> bool:
        """Whether the trajectory has reached this step, with a point or with the reason for a missing one."""
        reached = next((point.step for point in reversed(self.trajectory) if point.step is not None), None)
        return reached is not None and reached >= step

    def record(
        self,
        model: torch.nn.Module,
        step: int,
        *,
        tokens_seen: int | None = None,
        train_loss: float | None = None,
        since: int | None = None,
        scheduled: bool = False,
        at_start: bool = False,
    ) -> Measurement:
        """Measure, add the point to the trajectory and its file, apply the rules, log the point and draw it.

        A failure becomes a warning and a point with `.error`. A file that cannot be written becomes a
        warning, and the point is written together with a later one.

        Args:
            model: the model in training.
            step: optimizer steps taken.
            tokens_seen: training tokens so far, if known.
            train_loss: the training loss, if known.
            since: as for `due`.
            scheduled: whether the point counts as scheduled even if the schedule does not want it. Phases and patience
                count scheduled points only. The first point is always scheduled.
            at_start: whether the run is just beginning. No training time is lost yet, so every error is raised, unless
                memory ran out.
        """
        with self.at_work():
            scheduled = self._wanted(step, since) or scheduled or not self.trajectory
            point = self._measure(model, step, scheduled, tokens_seen, train_loss, at_start)
            self._state.points += 1
            self._state.exempt += self._state.within_budget != step
            self.trajectory.append(point)
            if self._state.file is not None:
                self._state.unsaved.append(point)
                self._save(self._state.file)
            with self.survived("The rules for stopping and selection failed"):
                self.rules.update(point)
                for remark in self.rules.remarks():
                    self.announce(f"step {step}: {remark}")
            if self.shows_lines and point.error is None:
                with self.survived("The line about a point could not be told"):
                    self.announce(console.measured(point, self.rules))
            if self._state.writes:
                plane, runs = self.draw(), self._wandb_runs()
                pictures = self.pictures() if runs else {}
                self._wandb.phase = self._phase_in_words()
                if self.config.alert:
                    with self.survived("An alert could not be sent"):
                        self._alerts.update(self.rules, step, runs, stem=self.names.stem)
                for run in runs:
                    self._wandb.log(run, self.logged(point), step=step, plane=plane, pictures=pictures)
        return point

    def _measure(
        self,
        model: torch.nn.Module,
        step: int,
        scheduled: bool,
        tokens_seen: int | None,
        train_loss: float | None,
        at_start: bool,
    ) -> Measurement:
        began = time.perf_counter()
        failure: Exception | None = None
        try:
            point = self.meter.measure(model, step=step)
            point = replace(point, settings=self._with_weights(point.settings, self._state.weights))
        except RanksError:
            raise
        except Exception as error:
            failure = error
            reason = describe(error)
            seconds = time.perf_counter() - began
            point = Measurement.failed(step, reason, settings=self._state.settings, seconds=seconds)
        if tokens_seen is None and self.config.tokens_per_step is not None:
            tokens_seen = step * self.config.tokens_per_step
        loss = None if train_loss is None or not math.isfinite(train_loss) else float(train_loss)
        # Every rank measures the same unless one of them fails. All must draw the same conclusions from a point.
        point = replace(point, scheduled=scheduled, tokens_seen=tokens_seen, overhead=self._share(), train_loss=loss)
        point = of_rank_zero(point)
        if at_start:
            _raise_on_every_rank(failure)
        if point.error is not None:
            _warn(f"Nothing could be measured at step {step}. Training goes on without this point. {point.error}")
        return point

    def record_final(self, model: torch.nn.Module, step: int) -> Measurement:
        """Measure the model that training leaves behind, if no point has its weights.

        This measurement is not part of the trajectory. It goes to its own file, `ib_final.jsonl`, and to the summary.

        Args:
            model: the model that training leaves behind.
            step: optimizer steps taken.
        """
        state = self._state
        with self.at_work():
            final = self._measure(model, step, False, None, None, False)
            state.final = replace(final, settings=self._with_weights(final.settings, "final"))
            if state.file is not None:
                with self.survived("The measurement of the final model could not be written"):
                    Trajectory([state.final]).save(state.file.parent / self.names.final)
        return state.final

    @staticmethod
    def _with_weights(settings: Mapping[str, Any], weights: str | None) -> dict[str, Any]:
        return dict(settings) if weights is None else {**settings, "weights": weights}

    def numbers(self) -> dict[str, float | int | None]:
        """Every number of the last point that could be measured, by its logged name; None where undefined."""
        prefix = self.config.prefix
        return {f"{prefix}{name}": value for name, value in self.rules.numbers().items() if name != "tokens_seen"}

    def logged(self, point: Measurement) -> dict[str, float]:
        """What trackers get for a point just recorded; nothing if it could not be measured."""
        if point.error is not None:
            return {}
        prefix = self.config.prefix
        shown = {f"{prefix}{name}": value for name, value in self.rules.shown().items()}
        return {**trackers.numbers(point, prefix), **shown}

    def _phase_in_words(self) -> str | None:
        return None if self.rules.phase is None else self.rules.phase.name.lower()

    def note_checkpoint(self, step: int, path: str | os.PathLike[str], *, own: bool = True, holds: bool = True) -> None:
        """Record a checkpoint that is complete.

        Args:
            step: the step at which it was saved.
            path: of the file or folder.
            own: whether this run wrote it.
            holds: whether it holds the weights that were measured at that step. If not, it is never selected.
        """
        if not holds and self.rules.selects and self._state.writes:
            _warn(
                f"The checkpoint {path} cannot be selected: it holds other weights than those measured at step {step}. "
                "They were exchanged, or trained further, since."
            )
        if self._state.checkpoints is not None:
            with self.survived(_NOT_RECORDED):
                self._check_lock()
                self._state.checkpoints.add(step, path, own=own, holds=holds)

    def own_step(self, path: Path) -> int | None:
        """The step of a checkpoint that this run wrote, by its own record; None for others, and on other ranks."""
        return None if self._state.checkpoints is None else self._state.checkpoints.own_step(path)

    @property
    def rule(self) -> str:
        """Identifies the selection rule. Two checkpoints are compared only if they have the same rule."""
        return repr(self.rules.selection) if self.rules.selects else ""

    def compares(self, step: int, rule: str | None) -> bool:
        """Whether the best checkpoint of an earlier part of the run can be compared with later ones.

        Args:
            step: the step of that checkpoint.
            rule: `rule` of the earlier part; None if it is not known.
        """
        if not self.rules.selects or rule not in (None, self.rule):
            return False
        with self.survived("The best checkpoint of the earlier part of the run cannot be compared, and is kept"):
            choice = self.rules.choose(self.trajectory, {step})
            # A fallback is comparable if the trajectory goes on, but not if a new one begins at its step.
            return choice.best is not None or (choice.fallback is not None and step in self._continued())
        return False

    def choose(self) -> Selected | None:
        """Select one of the checkpoints that exist, if possible. The result is the same on every rank.

        If none is found while some cannot be looked for, the earlier choice stays; see `certain`.
        """
        found, certain = self._best()
        if found is not None or certain:
            self._state.selected = found
        self._state.certain = certain
        return self._state.selected

    def best_checkpoint(self, *, also: int | None = None) -> Selected | None:
        """The best checkpoint that exists or could be saved now, if it is worth saving. The same on every rank.

        A fallback is worth saving if its loss is the lowest. To be the latest is not enough.

        Args:
            also: a step that counts as if it had been saved.
        """
        found = self._best(also)[0]
        return None if found is not None and found.fallback and found.value is None else found

    def best_after_saving(self, step: int) -> Selected | None:
        """What will be selected once this step is saved. Its checkpoint records this. No file is looked at."""
        selected = self._state.selected
        if self.rules.selects:
            with self.survived("The best checkpoint could not be determined"):
                earlier: dict[int, Path | None] = {} if selected is None else {selected.step: selected.path}
                return Selected.of(self.rules.choose(self.trajectory, {*earlier, step}), earlier)
        return selected

    def _best(self, also: int | None = None) -> tuple[Selected | None, bool]:
        """The best checkpoint, and whether every checkpoint could be looked for."""
        if not self.rules.selects:
            return None, True
        found: Selected | None = None
        certain = self._state.checkpoints is None
        if self._state.checkpoints is not None:
            with self.survived("The best checkpoint could not be determined"):
                existing = self._state.checkpoints.existing()
                available = {*existing, also} if also is not None else set(existing)
                found = Selected.of(self.rules.choose(self.trajectory, available), existing)
                certain = not self._state.checkpoints.unknown
        return of_rank_zero((found, certain))

    def _choice(self) -> Choice | None:
        with self.survived("The best checkpoint could not be determined"):
            existing = {} if self._state.checkpoints is None else self._state.checkpoints.existing()
            return self.rules.choose(self.trajectory, set(existing))
        return None

    def draw(self, *, final: bool = False) -> Path | None:
        """Draw the plane if a new picture is due, or if the last one is outdated at the end. The file, if drawn."""
        points = sum(point.error is None for point in self.trajectory)
        drawn = self._state.points_drawn
        due = points <= _DRAWN_SINGLY or points >= _DRAWN_AGAIN * drawn or final
        if self._state.plane is None or points == drawn or not due or not self._holds_directory:
            return None
        with self.survived(f"{self._state.plane} could not be drawn"):
            from ib_callback.plot import may_be_replaced, save_information_plane

            if drawn and not may_be_replaced(self._state.plane):
                raise FileExistsError("another file was put there while the run went on, and is left as it is")
            save_information_plane(self.trajectory, self._state.plane, curve=self.meter.curve())
            self._state.points_drawn = points
            return self._state.plane
        return None

    def pictures(self, *, final: bool = False) -> dict[str, bytes]:
        """Further pictures for W&B if new ones are due, or if the last are outdated at the end: PNG by name."""
        state, points = self._state, self._drawable()
        if points <= state.points_pictured or not (final or points >= _PICTURED_AGAIN * state.points_pictured):
            return {}
        state.points_pictured = points
        return self._encoded(points, "over_steps", "layers")

    def figures(self, *, final: bool = False) -> dict[str, bytes]:
        """All pictures for a tracker other than W&B, when they are due as in `pictures`: PNG by name."""
        state, points = self._state, self._drawable()
        if points <= state.points_figured or not (final or points >= _PICTURED_AGAIN * state.points_figured):
            return {}
        state.points_figured = points
        return self._encoded(points, trackers.PLANE, "over_steps", "layers")

    def _drawable(self) -> int:
        """The number of points to draw; 0 where nothing is drawn."""
        return 0 if self._state.plane is None else sum(point.error is None for point in self.trajectory)

    def _encoded(self, points: int, *names: str) -> dict[str, bytes]:
        """Pictures of this many points, each drawn only once."""
        if self._state.encoded[0] != points:
            self._state.encoded = points, {}
        drawn = self._state.encoded[1]
        with self.survived("The pictures for a tracker could not be drawn"):
            for name in names:
                if name not in drawn:
                    drawn[name] = self._drawn(name)
        return {name: drawn[name] for name in names if name in drawn}

    def _drawn(self, name: str) -> bytes:
        from ib_callback.plot import encoded, information_plane, over_steps, plane_by_layer

        curve = self.meter.curve()
        if name == trackers.PLANE:
            return encoded(information_plane(self.trajectory, curve=curve))
        if name == "over_steps":
            return encoded(over_steps(self.trajectory, log=None))
        last = next(point for point in reversed(self.trajectory) if point.error is None)
        return encoded(plane_by_layer(last, curve=curve))

    def caption(self, name: str) -> str:
        """The caption of a picture of the points so far."""
        return trackers.caption(name, self.trajectory.steps[-1] if self.trajectory else None, self._phase_in_words())

    def end(self, step: int, *, complete: bool = True) -> None:
        """Write what is still unwritten, draw the last plane, log the summary and print the total cost.

        Args:
            step: the last step.
            complete: whether the run ended as it should. If so, the best checkpoint is chosen once more.
        """
        state = self._state
        with self.survived("The run could not be finished"), self.at_work():
            if complete:
                self.choose()
                if self.rules.selects and self.selected is None and state.writes:
                    choice = self._choice()
                    _warn(f"No checkpoint could be selected. {'' if choice is None else choice.describe()}")
                elif self.selected is not None and self.selected.fallback and (choice := self._choice()) is not None:
                    loss = self.selected.value
                    which = "the latest checkpoint"
                    if loss is not None:
                        which = f"the checkpoint of the lowest held-out loss ({loss:.3f})"
                    self.announce(
                        f"{choice.describe()} Kept instead, as a fallback: {which}, of step {self.selected.step}"
                    )
            runs = self._wandb_runs() if state.writes else []
            pictures = self.pictures(final=True) if runs else {}
            plane = self._finish_files()
            for run in runs:
                self._wandb.finish(
                    run,
                    self.trajectory,
                    self._summary(),
                    step=step,
                    plane=plane,
                    pictures=pictures,
                )

    def _finish_files(self) -> Path | None:
        state = self._state
        if state.file is not None:
            self._save(state.file)
            if state.unsaved:
                steps = ", ".join(str(point.step) for point in state.unsaved)
                _warn(f"The points of steps {steps} could not be written to {state.file}. They are in .trajectory.")
            if self.rules.selects and (choice := self._choice()) is not None and choice.p_value is not None:
                _warn(choice.describe()) if choice.may_be_chance else self.announce(choice.describe())
        plane = self.draw(final=True)
        if state.file is not None and state.points:
            self._announce_outcome()
            self.announce(str(self.cost))
            budget = self.config.overhead_budget
            if budget is not None and self.cost.share > budget and state.exempt:
                cure = ", or leave select= out" if self.rules.selects else ""
                self.announce(
                    f"overhead_budget={budget} was exceeded: {state.exempt} of the {state.points} measurements were of "
                    "checkpoints, evaluations, the first or the last step, which no budget skips. To have fewer, "
                    f"save or evaluate less often{cure}"
                )
        self._release()
        return plane

    def _announce_outcome(self) -> None:
        """Which checkpoint was kept, and why the rule for stopping did not act."""
        decision, best = self.decision, self.selected
        if decision is not None and not decision.stop:
            self.announce(f"stopping did not act: {decision.message}")
        if best is not None and best.path is not None and not best.fallback:
            value = "" if best.value is None else f", {self.rules.selection.by} {best.value:.4g}"
            self.announce(f"kept the checkpoint of step {best.step}{value}: {best.path}")

    def _summary(self) -> dict[str, float | str]:
        """The run in a few values for a logger, by full name."""
        with self.survived("The summary of the run could not be made"):
            prefix = self.config.prefix
            return summarise(self.trajectory, self.rules, self.cost, self.selected, self.final, prefix=prefix)
        return {}

    def _wandb_runs(self) -> list[Any]:
        runs = list(self.wandb_runs)
        with self.survived("The open run of Weights & Biases could not be found"):
            if (own := open_run()) is not None and not any(run is own for run in runs):
                runs.append(own)
        return runs

    def announce(self, message: str) -> None:
        """Show a message to whoever watches the run, even without logging set up. Only the writing process does."""
        if self._state.file is not None and message:
            console.say(message if self.names.is_default else f"{self.names.stem}: {message}")

    def _release(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            with self.survived("The output directory could not be released. It stays in use until the process ends"):
                lock.release()

    @property
    def _holds_directory(self) -> bool:
        return self._lock is None or self._lock.holds

    def _check_lock(self) -> None:
        if not self._holds_directory:
            raise TrajectoryError(
                "another training in this process, which began later, writes to the same directory: give each its own "
                "output_dir="
            )

    def _save(self, file: Path) -> None:
        state = self._state
        with self.survived("A point could not be written, and will be tried again with the next one"):
            self._check_lock()
            self._write_anew_if_lost(file)
            while state.unsaved:
                append_line(file, state.unsaved[0])
                del state.unsaved[0]
            state.written = size_of(file) or 0
        if state.checkpoints is not None:
            with self.survived(_NOT_RECORDED):
                self._check_lock()
                state.checkpoints.flush()

    def _write_anew_if_lost(self, file: Path) -> None:
        """Write all points again if somebody has removed the file or its folder, or has cut the file."""
        state, size = self._state, size_of(file)
        if len(self.trajectory) == len(state.unsaved) or (size is not None and size >= state.written):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        moved = json_lines.set_aside(file)
        self.trajectory.save(file)
        state.unsaved.clear()
        self._write_run_file(file.parent)
        if state.checkpoints is not None:
            state.checkpoints.write_anew()
        what = "was gone" if size is None else "had lost points"
        left = "" if moved is None else f" What was left is in {moved.name}."
        _warn(
            f"{file} {what} while the run went on.{left} It has been written again, with all {len(self.trajectory)} "
            "points."
        )

    @contextmanager
    def survived(self, what: str) -> Iterator[None]:
        """Turn a failure into a warning. If it lasts, it warns once, rather than at each point."""
        try:
            yield
        except RanksError:  # if it were ignored, the ranks would wait for each other
            raise
        except Exception as error:
            if what not in self._state.outages:
                self._state.outages.add(what)
                _warn(f"{what}. {describe(error)}")
        else:
            self._state.outages.discard(what)

    def _seconds(self) -> float:
        working = 0.0 if self._working_since is None else time.perf_counter() - self._working_since
        return self._state.seconds_at_work + working

    def _share(self) -> float:
        return self._seconds() / max(time.perf_counter() - self._state.started, 1e-9)


class Follows:
    """The attributes of a followed run that the callbacks of all trainers share."""

    _run: Run

    @property
    def trajectory(self) -> Trajectory:
        """The points measured so far. With `ddp_spawn`, only the processes that trained and the file have them."""
        return self._run.trajectory

    @property
    def decision(self) -> StopDecision | None:
        """What `early_stopping` said at the last point; None without a rule."""
        return self._run.decision

    @property
    def selected(self) -> Selected | None:
        """The checkpoint that `select` has chosen so far: `.step`, `.value`, `.path`."""
        return self._run.selected

    @property
    def final(self) -> Measurement | None:
        """Measurement of the model that training left behind, if no point has its weights, as with an average."""
        return self._run.final

    @property
    def cost(self) -> Cost:
        """What following the run has cost so far."""
        return self._run.cost


def survives(event: Event) -> Event:
    """Wrap an event of a callback that comes while training runs: any failure in it becomes a warning."""

    @functools.wraps(event)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._run.survived(f"{type(self).__name__}.{event.__name__} failed, and training goes on"):
            return event(self, *args, **kwargs)

    return guarded  # type: ignore[return-value]


def weights_seen(model: torch.nn.Module) -> tuple[int, int]:
    """A value that changes when the weights of a model change or are replaced by others."""
    parameters = list(model.parameters())
    return id(parameters[0]) if parameters else 0, sum(parameter._version for parameter in parameters)


def _check_is_curve(path: Path) -> None:
    """Raise a TrajectoryError if a file that this package did not write is where the curve goes."""
    if size_of(path) and b'"num_codewords"' not in path.read_bytes():
        raise TrajectoryError(
            f"{path} was not written by this package, and is left as it is. Move it away, or pass output_dir="
        )


def _identity(point: Measurement) -> list[float | None]:
    """What distinguishes a point from the points of other runs at the same step."""
    return [point.entropy, point.complexity, point.expressivity]


def _is_of_run(trajectory: Trajectory, last_step: int | None, last_point: Sequence[Any]) -> bool:
    found = next((point for point in trajectory if point.step == last_step), None)
    return found is None or _identity(found) == list(last_point)


def _set_aside_foreign(path: Path) -> None:
    """Move a file away that this package did not write, if it is where the run file goes."""
    with json_lines.explained(path, "moved"):
        if size_of(path) and b'"phase_rule"' not in path.read_bytes():
            _warn(f"{path} was not written by a run of this package. It was moved to {json_lines.set_aside(path)}.")


def _may_be_complete(path: Path) -> bool:
    try:
        return is_complete(path)
    except OSError:
        return True  # the training has just been resumed from it


def _raise_on_every_rank(failure: Exception | None) -> None:
    """Raise a failure of this or another rank, so that no rank waits in vain. Running out of memory passes."""
    passes = failure is None or is_out_of_memory(failure)
    elsewhere = first_failure(None if failure is None or passes else describe(failure))
    if failure is not None and not passes:
        raise failure
    if elsewhere is not None:
        raise RuntimeError(f"rank {elsewhere[0]} could not measure the model as training finds it: {elsewhere[1]}")


def _from_writer(open_files: Callable[[], Trajectory], *, writes: bool) -> Trajectory:
    """Give every rank what the writing one finds in its files, or its error, so that no rank waits in vain."""
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
    warn(message, stacklevel=4)
