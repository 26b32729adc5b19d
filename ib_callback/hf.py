"""The callback for HuggingFace's Trainer.

Example: one more line in a training script.

    trainer = Trainer(model, args, train_dataset=..., callbacks=[IBCallback(Probe.from_c4(tokenizer))])
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch

from ib_callback.meter import Meter
from ib_callback.optional import require
from ib_callback.probe import Probe
from ib_callback.recorder import Recorder, check_keywords
from ib_callback.schedule import Schedule, as_schedule
from ib_callback.trajectory import Trajectory
from ib_callback.wandb_log import WandbLog, open_run

require("transformers", extra="hf", purpose="ib_callback.hf")
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402


class IBCallback(TrainerCallback):
    """Follows the model through the information plane while HuggingFace's Trainer trains it.

    Measures before the first step, at every step of the schedule and after the last step, on every rank with
    the same result. Training is not disturbed: with this callback and without it, the weights are the same
    bits. World process zero writes `ib_trajectory.jsonl` and `information_plane.png`, and adds `ib/...` rows
    to the Weights & Biases run if one is open (`report_to="wandb"`); `state.log_history`, and so
    `trainer_state.json`, has the same numbers. A resumed run continues its trajectory.

    Mistakes (a model without recognisable blocks, a probe from another tokenizer, a directory that cannot be
    written) raise before the first step. A measurement that fails later is a warning and a point with
    `.error`.

    Args:
        probe: the frozen held-out sample to measure on.
        every_n_steps: an int, `ib.logarithmic()`, or any callable step -> bool.
        output_dir: where the files go; the Trainer's `output_dir` by default.
        log_plane: draw the plane, as a file and for Weights & Biases; needs matplotlib.
        **meter_keywords: those of `ib.Meter`, such as `orders`, `layers` or `batch_size`. `progress` is by
            default what the Trainer does (`disable_tqdm`).

    Raises:
        TypeError: an unknown keyword, or a value of the wrong type.
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        probe: Probe,
        *,
        every_n_steps: int | Schedule = 500,
        output_dir: str | os.PathLike[str] | None = None,
        log_plane: bool = True,
        **meter_keywords: Any,
    ) -> None:
        check_keywords(type(self), meter_keywords)
        self.output_dir = output_dir
        self._progress: bool | None = meter_keywords.get("progress")
        self._recorder = Recorder(Meter(probe, **meter_keywords), as_schedule(every_n_steps), draw_plane=log_plane)
        self._wandb = WandbLog("train/global_step")
        self._running = False
        self._weights: tuple[int, int] | None = None  # as the last step left them

    @property
    def trajectory(self) -> Trajectory:
        """The points measured so far."""
        return self._recorder.trajectory

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check everything, open the trajectory and measure the model as training finds it."""
        recorder = self._recorder
        writes = state.is_world_process_zero
        # A second training, or a restart with a smaller batch size, comes here again and begins anew.
        self._running = False
        self._weights = None
        with recorder.at_work():
            progress = self._progress if self._progress is not None else not args.disable_tqdm
            recorder.meter.progress = progress and writes
            directory = args.output_dir if self.output_dir is None else self.output_dir
            assert directory is not None  # TrainingArguments fills it in
            recorder.start(kwargs["model"], directory=directory, step=state.global_step, writes=writes, training=state)
            if state.global_step == 0 or recorder.due(state.global_step):
                self._record(args, state, kwargs["model"], at_start=True)
        self._running = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if the schedule says so, or if this is known to be the last step."""
        if not self._running:
            return
        self._weights = _identity(kwargs["model"])
        last = state.global_step >= state.max_steps or control.should_training_stop
        if self._recorder.due(state.global_step) or (last and not self._recorder.recorded(state.global_step)):
            with self._recorder.at_work():
                self._record(args, state, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the last step if a callback later in the list, a log or an evaluation has made it the last."""
        if control.should_training_stop:
            self._record_last(args, state, kwargs["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the last step if only now it is known to be the last."""
        # The Trainer's closing log. A callback later in the list, or at an evaluation, may have ended the training;
        # the next event, on_train_end, comes after load_best_model_at_end, in some versions even this one does.
        if "total_flos" in kwargs.get("logs", {}):
            self._record_last(args, state, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish the files."""
        self._record_last(args, state, kwargs["model"])
        if not self._running:
            return
        if not self._recorder.recorded(state.global_step):
            warnings.warn(
                f"The last step, step {state.global_step}, was not measured: a callback ended the training so late "
                "that the best model had been loaded in its place. Put IBCallback after that callback.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._running = False
        with self._recorder.at_work():
            plane = self._recorder.finish()
            run = open_run()
            if plane is not None and run is not None:
                self._wandb.log(run, {}, step=state.global_step, plane=plane)

    def _record_last(self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module) -> None:
        if not self._running or self._recorder.recorded(state.global_step):
            return
        # The best model may have been loaded meanwhile, and its numbers are not those of this step.
        if self._weights is None or self._weights == _identity(model):
            with self._recorder.at_work():
                self._record(args, state, model)

    def _record(
        self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module, *, at_start: bool = False
    ) -> None:
        step = state.global_step
        counted = args.include_num_input_tokens_seen not in (False, None, "no")
        tokens_seen = int(state.num_input_tokens_seen) if counted else None
        point = self._recorder.record(model, step, tokens_seen=tokens_seen, at_start=at_start)
        metrics = {} if point.error is not None else point.metrics()
        if metrics:
            state.log_history.append({**metrics, "epoch": state.epoch, "step": step})
        if state.is_world_process_zero:
            plane = self._recorder.draw()
            run = open_run()
            if run is not None:
                self._wandb.log(run, metrics, step=step, plane=plane)


def _identity(model: torch.nn.Module) -> tuple[int, int] | None:
    """What changes when other weights are loaded into a model, at the cost of looking at one parameter."""
    parameter = next(model.parameters(), None)
    return None if parameter is None else (id(parameter), parameter._version)
