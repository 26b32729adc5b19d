"""The callback for HuggingFace's Trainer.

Example: one more line in a training script.

    trainer = Trainer(model, args, train_dataset=..., callbacks=[IBCallback(Probe.from_c4(tokenizer))])
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ib_callback.common.optional import require
from ib_callback.measuring.feature_probes import FeatureProbes
from ib_callback.measuring.meter import Meter
from ib_callback.probe.probe import Probe
from ib_callback.results.measurement import Measurement
from ib_callback.results.selection import SelectFrom, Selection
from ib_callback.results.stopping import PlateauStopping, StopDecision
from ib_callback.results.trajectory import Trajectory
from ib_callback.run.checkpoints import is_complete
from ib_callback.run.recorder import Recorder, check_keywords
from ib_callback.run.schedule import Schedule, as_schedule
from ib_callback.run.summary import Cost, Selected
from ib_callback.run.training_data import check_count, look_for_probes
from ib_callback.run.wandb_log import WandbLog, open_run

require("transformers", extra="hf", purpose="ib_callback.hf")
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402

from ib_callback.hf._trainer import (  # noqa: E402
    check_order,
    find_handler,
    for_evaluation,
    report,
    watched_metric,
)


class IBCallback(TrainerCallback):
    """Follows the model through the information plane while HuggingFace's Trainer trains it.

    Measures before the first step, at every step of the schedule and after the last step, on every rank with
    the same result. Training is not disturbed: with this callback and without it, the weights are the same
    bits. World process zero writes `ib_trajectory.jsonl`, `ib_checkpoints.jsonl` and `information_plane.png`, and
    adds `ib/...` rows to whatever the Trainer reports to (`report_to=`), Weights & Biases and TensorBoard among
    them; `state.log_history`, and so `trainer_state.json`, has the same numbers. The `on_log` of a callback of your own
    is not called with them, nor are they printed: it finds them there, and in `.trajectory`. A resumed run continues
    its trajectory.

    Every evaluation's metrics get `eval_ib_...`, so that `metric_for_best_model="ib_selectable_optimality"` and
    `EarlyStoppingCallback` (after this callback in the list) work; if the Trainer judges by one of them, every
    evaluation is measured, whatever the schedule. A number that is undefined, or not selectable yet, is NaN there,
    which the Trainer never takes for the best.

    With `early_stopping` training ends when the rule says so, with a last checkpoint under `save_strategy="steps"`.
    With `select` the best checkpoint is kept, whatever `save_total_limit` is, and every checkpoint is measured;
    `save_strategy="best"` without any evaluation then saves when a point is the best so far, and
    `load_best_model_at_end=True` loads it.

    Mistakes (a model without recognisable blocks, a probe from another tokenizer, a directory that cannot be
    written, a metric that does not exist) raise before the first step. A measurement that fails later is a warning
    and a point with `.error`.

    Args:
        probe: the frozen held-out sample to measure on.
        every_n_steps: an int, `ib.logarithmic()`, or any callable step -> bool.
        early_stopping: a rule such as `ib.PlateauStopping()`; None never stops.
        select: by what to select checkpoints: `"optimality"`, another metric, a feature, or an `ib.Selection`, whose
            own `select_from` then counts.
        select_from: from when on points can be selected: "compression", "fit" or a step. Also that of the
            `ib/selectable/...` numbers.
        output_dir: where the files go; the Trainer's `output_dir` by default.
        log_plane: draw the plane, as a file and for Weights & Biases, which gets two more; needs matplotlib.
        overhead_budget: skip scheduled points while more than this share of the wall-clock time went into measuring.
        tokens_per_step: training tokens of one optimizer step, for `ib/tokens_seen`, where the Trainer does not
            count them (`include_num_input_tokens_seen`).
        mix_settings: continue the trajectory of a resumed run although its settings have changed.
        feature_probes: further probes of which only the feature labels are measured, such as pairs of a preferred and a
            rejected answer; see `ib.Meter`.
        check_overlap: at the start, look for the probes in so many examples of the training data; what is found is a
            warning. 0: not at all.
        **meter_keywords: those of `ib.Meter`, such as `orders`, `layers` or `batch_size`. `progress` is by
            default what the Trainer does (`disable_tqdm`).

    Raises:
        TypeError: an unknown keyword, or a value of the wrong type.
        ValueError: a setting out of range, or a metric that is not measured; the message lists those that are.
    """

    def __init__(
        self,
        probe: Probe,
        *,
        every_n_steps: int | Schedule = 500,
        early_stopping: PlateauStopping | None = None,
        select: str | Selection | None = None,
        select_from: SelectFrom = "compression",
        output_dir: str | os.PathLike[str] | None = None,
        log_plane: bool = True,
        overhead_budget: float | None = None,
        tokens_per_step: int | None = None,
        mix_settings: bool = False,
        feature_probes: FeatureProbes = (),
        check_overlap: int = 0,
        **meter_keywords: Any,
    ) -> None:
        check_keywords(type(self), meter_keywords)
        self.output_dir = output_dir
        self._check_overlap = check_count(check_overlap)
        self._progress: bool | None = meter_keywords.get("progress")
        self._recorder = Recorder(
            Meter(probe, feature_probes=feature_probes, **meter_keywords),
            as_schedule(every_n_steps),
            draw_plane=log_plane,
            early_stopping=early_stopping,
            select=select,
            select_from=select_from,
            overhead_budget=overhead_budget,
            tokens_per_step=tokens_per_step,
            mix_settings=mix_settings,
        )
        self._wandb = WandbLog("train/global_step")
        self._running = False
        self._over = False  # the run had been stopped before it was resumed
        self._weights: tuple[int, int] | None = None  # as the last step left them
        self._selected: Selected | None = None
        self._saved = 0  # step of the last checkpoint
        self._watched: str | None = None
        self._handler: Any = None
        self._evaluated: tuple[int, frozenset[str]] | None = None  # of several datasets the first, and when
        self._saves_best = False

    @property
    def trajectory(self) -> Trajectory:
        """The points measured so far."""
        return self._recorder.trajectory

    @property
    def decision(self) -> StopDecision | None:
        """What `early_stopping` said at the last point; None without a rule."""
        return self._recorder.decision

    @property
    def selected(self) -> Selected | None:
        """The checkpoint that `select` has chosen so far: `.step`, `.value`, `.path`."""
        return self._selected

    @property
    def cost(self) -> Cost:
        """What following the run has cost so far."""
        return self._recorder.cost

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check everything, open the trajectory and measure the model as training finds it."""
        recorder, step, model = self._recorder, state.global_step, kwargs["model"]
        writes = state.is_world_process_zero
        # A second training, or a restart with a smaller batch size, comes here again and begins anew.
        self._running, self._over = False, False
        self._weights, self._selected, self._evaluated, self._saved = None, None, None, step
        self._handler = find_handler(self)
        self._watched = watched_metric(args, recorder.rules.names, selects=self._selects)
        if self._watched is not None:
            check_order(self._handler, self)
        self._saves_best = self._check_saving(args)
        with recorder.at_work():
            progress = self._progress if self._progress is not None else not args.disable_tqdm
            recorder.meter.progress = progress and writes
            recorder.start(
                model,
                directory=self._directory(args),
                step=step,
                last_step=self._read_state(state),
                # Evaluations that are judged, and checkpoints, are measured whether or not the schedule ever fires.
                max_steps=None if self._watched is not None or self._selects else state.max_steps,
                writes=writes,
                training=state,
            )
            if self._check_overlap and writes:
                loader, tokenizer = kwargs.get("train_dataloader"), kwargs.get("processing_class")
                recorder.announce(look_for_probes(recorder.meter.probes, loader, self._check_overlap, tokenizer))
            self._note_resumed_checkpoint(args, step)
            if step == 0 or (self._must_have() and not recorder.recorded(step)) or recorder.due(step):
                self._record(args, state, control, model, at_start=True)
            self._write_state(state)
            if self._selects and not self._judged_by_trainer(args):
                # What a run without this callback, or with other settings, held for the best.
                state.best_metric, state.best_global_step, state.best_model_checkpoint = None, None, None
            self._choose(args, state)
        self._running = True
        stopped = recorder.decision is not None and recorder.decision.stop
        if stopped or (step > 0 and step >= state.max_steps):
            # The Trainer looks at this only after a step, which it will take; that is not part of the run.
            if recorder.decision is not None and stopped:
                recorder.announce(f"this run had stopped at step {step}: {recorder.decision.message}")
            control.should_training_stop = True
            self._over = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if the schedule says so, if this is known to be the last step, or if it is going to be saved."""
        if not self._running:
            return
        if self._over:
            control.should_save, control.should_evaluate = False, False
            return
        self._weights = _identity(kwargs["model"])
        step = state.global_step
        needed = step >= state.max_steps or control.should_training_stop or (self._selects and control.should_save)
        # Only a point that can be left out is asked of the schedule, which counts those that it skips.
        if (needed and not self._recorder.recorded(step)) or self._recorder.due(step):
            with self._recorder.at_work():
                self._record(args, state, control, kwargs["model"])
                if self._saves_best:
                    self._save_if_best(args, state, control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the numbers to the metrics, by which the Trainer and its callbacks judge the model."""
        if not self._running or metrics is None or not self._counts(metrics, state.global_step):
            return
        if self._watched is not None and not self._over and not self._recorder.recorded(state.global_step):
            with self._recorder.at_work():
                self._record(args, state, control, kwargs["model"])
        numbers = self._recorder.numbers()
        if self._over or (self._watched is not None and self.trajectory[-1].error is not None):
            # A checkpoint that is judged by the numbers of an earlier step would be judged wrongly.
            numbers = dict.fromkeys(numbers)
        metrics.update(for_evaluation(numbers))
        if self._watched is not None and math.isnan(metrics[self._watched]) and math.isinf(state.best_metric or 0.0):
            # No evaluation has had a value yet. The Trainer would hold infinity for one, against which
            # EarlyStoppingCallback loses patience.
            state.best_metric = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take note of the checkpoint, and of which one is now the best."""
        if not self._running:
            return
        with self._recorder.at_work():
            if self._selects and not self._over and not self._recorder.recorded(state.global_step):
                self._record(args, state, control, kwargs["model"])
            self._saved = state.global_step
            self._recorder.saved(self._saved, _checkpoint(args, self._saved))
            self._choose(args, state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the last step if a callback later in the list, a log or an evaluation has made it the last."""
        if self._over:
            control.should_save, control.should_evaluate = False, False
        elif control.should_training_stop or (self._running and self._selects and control.should_save):
            self._record_last(args, state, control, kwargs["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the last step if only now it is known to be the last."""
        # The Trainer's closing log. A callback later in the list, or at an evaluation, may have ended the training;
        # the next event, on_train_end, comes after load_best_model_at_end, in some versions even this one does.
        if "total_flos" in kwargs.get("logs", {}):
            self._record_last(args, state, control, kwargs["model"])
            owns_best = self._running and self._selects and not self._judged_by_trainer(args)
            is_last = self._selected is not None and self._selected.step == self._saved
            if owns_best and not is_last and not args.load_best_model_at_end:
                # Until on_train_end: with save_total_limit=1 the Trainer would now delete all but the best, and with
                # them the last checkpoint.
                state.best_model_checkpoint = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish the files."""
        self._record_last(args, state, control, kwargs["model"])
        if not self._running:
            return
        if not self._over and not self._recorder.recorded(state.global_step):
            warnings.warn(
                f"The last step, step {state.global_step}, was not measured: a callback ended the training so late "
                "that the best model had been loaded in its place. Put IBCallback after that callback.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._choose(args, state)
        if self._selects and self._selected is None and state.is_world_process_zero:
            warnings.warn(
                f"No checkpoint could be selected. {self._recorder.why_none_selected()}", RuntimeWarning, stacklevel=2
            )
        self._finish(state)

    @property
    def _selects(self) -> bool:
        return self._recorder.rules.selects

    def _counts(self, metrics: Mapping[str, float], step: int) -> bool:
        """Whether this is an evaluation of the model, to be judged by it.

        None that a user's callback makes of other data, under another prefix; and of several evaluation datasets,
        which are evaluated in turn, the first only.
        """
        keys = frozenset(metrics)
        if not any(key.startswith("eval_") for key in keys):
            return False
        if "eval_runtime" not in keys:  # one of several: "eval_<dataset>_runtime"
            if self._evaluated is not None and self._evaluated[0] == step and self._evaluated[1] != keys:
                return False
            self._evaluated = (step, keys)
        return True

    def _directory(self, args: TrainingArguments) -> str | os.PathLike[str]:
        directory = args.output_dir if self.output_dir is None else self.output_dir
        assert directory is not None  # TrainingArguments fills it in
        return directory

    def _must_have(self) -> bool:
        """Whether a run that resumes must measure there, whatever the schedule."""
        return self._selects or not self._recorder.has_values

    def _check_saving(self, args: TrainingArguments) -> bool:
        """Whether it falls to this callback to say when to save.

        Raises:
            ValueError: nobody says so, or two do.
        """
        best, evaluates = args.save_strategy == "best", args.eval_strategy != "no"
        by = self._recorder.rules.selection.by
        instead = f'metric_for_best_model="ib_selectable_{by.replace("/", "_")}"'
        if best and not evaluates and not self._selects:
            raise ValueError(
                'save_strategy="best" without evaluation never saves anything: expected select= of IBCallback to say '
                'which point is the best, such as select="optimality"; or set eval_strategy.'
            )
        if best and evaluates and self._selects:
            raise ValueError(
                f'save_strategy="best" with evaluation saves by metric_for_best_model, and select="{by}" wants to '
                f'decide as well. Use one of them: {instead} without select=, or eval_strategy="no".'
            )
        if self._selects and args.save_strategy == "no":
            raise ValueError(
                f'select="{by}" chooses among checkpoints, but save_strategy is "no". Set save_strategy="steps", '
                'or "best" to save whenever a point is the best so far.'
            )
        if self._selects and args.save_total_limit and self._judged_by_trainer(args):
            warnings.warn(
                f'The Trainer protects its own best model (metric_for_best_model="{args.metric_for_best_model}") from '
                f'save_total_limit={args.save_total_limit}, and can protect only one: what select="{by}" chooses may '
                f"be deleted. Use {instead}.",
                RuntimeWarning,
                stacklevel=3,
            )
        return best and not evaluates

    @staticmethod
    def _judged_by_trainer(args: TrainingArguments) -> bool:
        return args.metric_for_best_model is not None and args.eval_strategy != "no"

    def _choose(self, args: TrainingArguments, state: TrainerState) -> None:
        """Select among the checkpoints that exist, and have the Trainer keep the best one."""
        if not self._selects:
            return
        self._selected = self._recorder.selected()
        if self._selected is not None and not self._judged_by_trainer(args):
            self._set_best(args, state, self._selected)

    def _set_best(self, args: TrainingArguments, state: TrainerState, best: Selected) -> None:
        state.best_metric, state.best_global_step = best.value, best.step
        if best.path is not None:
            state.best_model_checkpoint = str(_checkpoint(args, best.step))

    def _save_if_best(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        best = self._recorder.selected(also=state.global_step)
        if best is not None and best.step == state.global_step:
            self._set_best(args, state, best)
            control.should_save = True

    def _note_resumed_checkpoint(self, args: TrainingArguments, step: int) -> None:
        """The checkpoint that a run resumes from is complete, though it may not have been recorded."""
        path = _checkpoint(args, step)
        if step > 0 and is_complete(path):
            self._recorder.saved(step, path)

    def _state_key(self) -> str:
        return "ib_callback" if self.output_dir is None else f"ib_callback:{os.fspath(self.output_dir)}"

    def _write_state(self, state: TrainerState) -> None:
        """Into every checkpoint: how far the trajectory has come, for a resumed run to know its own points."""
        steps = [step for step in self.trajectory.steps if step is not None]
        attributes = {"last_step": steps[-1] if steps else None}
        entries: Any = state.stateful_callbacks  # declared as a list, but always a dict
        entries[self._state_key()] = {"args": {}, "attributes": attributes}

    def _read_state(self, state: TrainerState) -> int | None:
        entries: Any = state.stateful_callbacks or {}
        if state.global_step and not any(key.startswith("ib_callback") for key in entries):
            return -1  # this run never had the callback: the points that lie here are those of another one
        entry = entries.get(self._state_key()) if state.global_step else None
        return entry["attributes"]["last_step"] if isinstance(entry, dict) else None

    def _record_last(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: torch.nn.Module
    ) -> None:
        if not self._running or self._over or self._recorder.recorded(state.global_step):
            return
        # The best model may have been loaded meanwhile, and its numbers are not those of this step.
        if self._weights is None or self._weights == _identity(model):
            with self._recorder.at_work():
                self._record(args, state, control, model)

    def _record(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        *,
        at_start: bool = False,
    ) -> None:
        step = state.global_step
        counted = args.include_num_input_tokens_seen not in (False, None, "no")
        tokens_seen = int(state.num_input_tokens_seen) if counted else None
        point = self._recorder.record(model, step, tokens_seen=tokens_seen, at_start=at_start)
        metrics = self._recorder.logged(point)
        if metrics:
            state.log_history.append({**metrics, "epoch": state.epoch, "step": step})
        self._write_state(state)
        if state.is_world_process_zero:
            plane = self._recorder.draw()
            run = open_run()
            if run is not None:
                pictures = self._recorder.pictures()
                self._wandb.log(run, metrics, step=step, plane=plane, pictures=pictures)
            if metrics:
                report(self._handler, args, state, control, model, metrics)
        self._stop_if_decided(args, state, control, point)

    def _stop_if_decided(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, point: Measurement
    ) -> None:
        decision = self._recorder.decision
        if decision is None or not decision.stop or control.should_training_stop:
            return
        control.should_training_stop = True
        # As at the end of the steps: an early end has a checkpoint too.
        control.should_save = control.should_save or args.save_strategy == "steps"
        self._recorder.announce(f"training stops at step {point.step}: {decision.message}")

    def _finish(self, state: TrainerState) -> None:
        self._running, self._handler = False, None
        with self._recorder.at_work():
            run = open_run() if state.is_world_process_zero else None
            pictures = {} if run is None else self._recorder.pictures(final=True)
            plane = self._recorder.finish()
            if run is not None:
                summary = self._recorder.summary(self._selected)
                self._wandb.finish(
                    run, self.trajectory, summary, step=state.global_step, plane=plane, pictures=pictures
                )


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{step}"


def _identity(model: torch.nn.Module) -> tuple[int, int] | None:
    """What changes when other weights are loaded into a model, at the cost of looking at one parameter."""
    parameter = next(model.parameters(), None)
    return None if parameter is None else (id(parameter), parameter._version)
