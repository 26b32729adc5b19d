"""The callback for HuggingFace's Trainer.

Example: one more line in a training script.

    trainer = Trainer(model, args, train_dataset=..., callbacks=[IBCallback(Probe.from_c4(tokenizer))])
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ib_callback.common.files import size_of
from ib_callback.common.optional import require
from ib_callback.measuring.meter import Meter
from ib_callback.probe.probe import Probe
from ib_callback.results.measurement import Measurement
from ib_callback.run.config import RunConfig, split_keywords, takes_keywords_of
from ib_callback.run.run import Follows, Run, survives, weights_seen
from ib_callback.run.summary import Selected
from ib_callback.run.trajectory_file import bring_along

require("transformers", extra="hf", purpose="ib_callback.hf")
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402

from ib_callback.hf._keeping import (  # noqa: E402
    copy_aside,
    is_resumed,
    of_trial,
    remove_partial_copies,
    run_folder,
    unlink_copies,
)
from ib_callback.hf._report import Report, draws_for, report  # noqa: E402
from ib_callback.hf._trainer import (  # noqa: E402
    check_order,
    check_prefixes,
    check_saving,
    find_handler,
    finite_best,
    for_evaluation,
    judges_by_itself,
    keep_out_of_tables,
    last_logged_loss,
    save_as_it_is,
    save_without_infinity,
    shows_lines,
    warn,
    warn_if_two_select,
    watched_metric,
)


class IBCallback(Follows, TrainerCallback):
    """Follows the model through the information plane while HuggingFace's Trainer trains it.

    The callback measures before the first step, at every step of the schedule and after the last step. Every rank has
    the same result. Training is not disturbed: the weights are bit for bit the same with and without this callback. A
    resumed run continues its trajectory.

    World process zero writes `ib_trajectory.jsonl`, `ib_checkpoints.jsonl` and `information_plane.png`. It also adds
    `ib/...` rows to every target of `report_to=`, such as Weights & Biases and TensorBoard. `state.log_history`, and so
    `trainer_state.json`, has the same numbers. The Trainer does not print them, and does not call the `on_log` of your
    own callbacks with them. Read them from `state.log_history` or from `.trajectory`.

    Every evaluation gets the numbers of the last point as `eval_ib_...` metrics. So
    `metric_for_best_model="ib_selectable_loss"` works, with `select_from=0` and `greater_is_better=False`, and so does
    `EarlyStoppingCallback` if it comes after this callback in the list. If the Trainer judges by one of these numbers,
    every evaluation is measured, whatever the schedule says. A number that is undefined or not selectable yet is
    missing from the metrics and from `state.log_history`. Only the number by which the Trainer judges is NaN instead,
    and the Trainer never takes NaN for the best. The table of a notebook and the objective of a hyperparameter search
    stay as they are without this callback, unless that number is in them. After training, `trainer.evaluate()` has the
    numbers of the model as it is then.

    A stock callback keeps the checkpoint that it once took for the best, even if the loss falls far lower later. Use
    `select` instead, or let stock callbacks judge by `"ib_selectable_loss"` (`greater_is_better=False`) with
    `select_from=0`.

    With `early_stopping`, training ends when the rule says so. Under `save_strategy="steps"` a last checkpoint is saved
    then. With `select`, the best checkpoint is kept, whatever `save_total_limit` is, and every checkpoint is measured.
    `save_strategy="best"` without any evaluation then saves whenever a point is the best so far, and
    `load_best_model_at_end=True` loads that checkpoint.

    Each trial of `Trainer.hyperparameter_search` is a separate run. Its files go to the folder of its checkpoints,
    `run-N`. With `output_dir`, they go to a folder of that name inside it.

    The logged keys with the default `prefix="ib/"`. A number that is undefined is left out:

    | key | is |
    |---|---|
    | `ib/prediction_score` | the number shown first, `score_local` of the predictions (docs/evidence.md) |
    | `ib/loss`, `ib/loss_se` | the loss of the model on the probe, in nats a token, and its standard error |
    | `ib/bits_per_byte`, `ib/predictive_information` | the loss a byte; how far it is below that of token frequencies |
    | `ib/train_loss` | the training loss that the trainer knows |
    | `ib/complexity`, `ib/expressivity` | I(X;Z) and I(Y;Z) of the primary order |
    | `ib/optimality`, `ib/distance_to_bound` | expressivity / complexity; bound(complexity) - expressivity |
    | `ib/entropy`, `ib/ceiling`, `ib/dispersion` | H(Z); the most any labelling reaches; spread of the states |
    | `ib/<order>/<number>` | every number of an order, such as `ib/bigram/complexity_null` (docs/quantities.md) |
    | `ib/<view>/<number>` | the same of the last layers, the last one, `readout` and `prediction`, primary order |
    | `ib/<view>/<order>/<number>` | likewise of each order |
    | `ib/<feature>/<number>` | information about a feature, its null and its ratio |
    | `ib/phase` | 0 initial, 1 fitting, 2 compression, 3 memorising |
    | `ib/selectable/<number>` | the number, at points that can be selected |
    | `ib/would_stop` | with `PlateauStopping(act=False)`, whether it would stop |
    | `ib/seconds`, `ib/overhead` | time of this measurement; share of the wall-clock time so far |
    | `ib/tokens_seen` | training tokens so far, where they are known |
    | `ib/plane`, `ib/over_steps`, `ib/layers` | pictures, where the tracker takes them |

    The settings of the run (probe, orders, bins, seed, guard, …) go into the tracker's configuration as `ib_...`.
    docs/trackers.md lists what goes where. A second callback with another probe needs its own prefix, such as
    `prefix="code/"`. `console=` turns the lines at the console on and off. `alert=True` sends alerts.

    Mistakes raise an error before the first step: a model without recognisable blocks, a probe from another tokenizer,
    a directory that cannot be written, a metric that does not exist. A measurement that fails later becomes a warning
    and a point with `.error`.

    Args:
        probe: the frozen held-out sample to measure on.
        **keywords: those of `ib_callback.run.config.RunConfig` (`every_n_steps`, `early_stopping`, `select`, …), which
            all trainers share, and those of `ib.Meter` (`orders`, `layers`, `batch_size`, `feature_probes`, …).
            By default, `output_dir` is the Trainer's own, and `progress` follows the Trainer (`disable_tqdm`).

    Raises:
        TypeError: an unknown keyword, or a value of the wrong type.
        ValueError: a setting out of range, or a metric that is not measured; the message lists those that are.
    """

    @takes_keywords_of(RunConfig, Meter)
    def __init__(self, probe: Probe, **keywords: Any) -> None:
        config, meter_keywords = split_keywords(type(self).__name__, keywords)
        self.output_dir = config.output_dir
        self._progress: bool | None = meter_keywords.get("progress")
        self._run = Run(Meter(probe, **meter_keywords), config=config, x_axis="train/global_step")
        self._running = False
        self._over = False  # the run had already ended before it was resumed
        self._ended = False  # a training that was followed has ended
        self._weights: tuple[int, int] | None = None  # after the last step
        self._saved = 0  # step of the last checkpoint
        self._folder = Path()  # of the checkpoints
        self._files = Path()  # the folder of the trajectory
        self._to_keep: list[
            int
        ] = []  # steps of checkpoints of an earlier part of the run that still have to be copied aside
        self._watched: str | None = None
        self._evaluated: tuple[int, frozenset[str]] | None = (
            None  # the step, and the metrics of the first of several datasets
        )
        # After training: numbers of a model whose weights are not those of the last point.
        self._after: tuple[tuple[int, int], Mapping[str, float | int | None]] | None = None
        self._saves_best = False
        self._described = False  # whether the trackers have the settings of this run
        self._limited = False  # whether the Trainer removes checkpoints

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check everything, open the trajectory and measure the model before training."""
        run, step, model = self._run, state.global_step, kwargs["model"]
        # A second training comes here again and begins anew. So does a restart with a smaller batch size.
        self._running, self._over, self._ended = False, False, False
        self._weights, self._evaluated, self._after, self._saved = None, None, None, step
        self._folder, self._to_keep = run_folder(self, args), []
        self._described = False
        check_prefixes(find_handler(self), self, self.prefix)
        warn_if_two_select(find_handler(self), self, args)
        stem = run.names.stem
        self._watched = watched_metric(args, run.rules.names, selects=run.rules.selects, stem=stem)
        if self._watched is not None:
            check_order(find_handler(self), self)
            save_without_infinity(state)
        self._saves_best = check_saving(args, run.rules, stem)
        progress = self._progress if self._progress is not None else not args.disable_tqdm
        run.meter.progress = progress and state.is_world_process_zero
        run.shows_lines = shows_lines(args) if run.config.console is None else run.config.console
        entry, directory, saved = self._entry(state), self._directory(args), self._checkpoint(step)
        self._files = Path(directory).absolute()
        if state.is_world_process_zero and isinstance(entry.get("directory"), str):
            bring_along(Path(entry["directory"]), Path(directory), run.names)
        run.begin(
            model,
            directory=directory,
            step=step,
            last_step=self._read_state(state),
            last_point=entry.get("last_point"),
            max_steps=state.max_steps,
            # Evaluations by which the Trainer judges are measured even if the schedule never fires. So are checkpoints.
            beyond_schedule=self._watched is not None or run.rules.selects,
            judged=self._watched is not None,
            writes=state.is_world_process_zero,
            training=state,
            resumed_from=saved if is_resumed(saved, state, self._state_key()) else None,
            loaders=kwargs.get("train_dataloader"),
            tokenizer=kwargs.get("processing_class"),
        )
        if run.measures_at_start(step):
            self._record(args, state, control, model, at_start=True)
        self._take_up(args, state, entry)
        self._write_state(state)
        self._running = True
        stopped = run.decision is not None and run.decision.stop
        if stopped or (step > 0 and step >= state.max_steps):
            # The Trainer looks at this only after its next step. That step is not part of the run.
            if run.decision is not None and stopped:
                run.announce(f"this run had stopped at step {step}: {run.decision.message}")
            if not run.recorded(step):
                self._record(args, state, control, model)  # resumed with max_steps lower than the steps already taken
            control.should_training_stop = True
            self._over = True

    @survives
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if the schedule wants it, if this is known to be the last step, or if `select` needs the point."""
        if not self._running:
            return
        if self._over:
            control.should_save, control.should_evaluate = False, False
            return
        self._weights = weights_seen(kwargs["model"])
        self._keep_earlier(state)
        step = state.global_step
        last = self._run.config.at_finish and (step >= state.max_steps or control.should_training_stop)
        needed = last or (self.selects and control.should_save)
        # Call `due` only for a point that can be left out, because `due` counts the points that it skips.
        if (needed and not self._run.recorded(step)) or self._run.due(step):
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
        """Add the numbers to the metrics, so that the Trainer and its callbacks can judge the model by them."""
        if not (self._running or self._ended) or metrics is None or not self._counts(metrics, state.global_step):
            return
        self._add_numbers(args, state, control, metrics, kwargs["model"])
        watched = self._watched if self._running else None
        # The number may be undefined, or something may have failed. If it were missing, the Trainer would raise.
        if watched is not None and math.isnan(metrics.setdefault(watched, math.nan)):
            # If no evaluation has had a value yet, the Trainer takes infinity for the best value. Compared with it,
            # EarlyStoppingCallback would lose patience.
            state.best_metric = finite_best(state.best_metric)

    @survives
    def _add_numbers(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        model: torch.nn.Module,
    ) -> None:
        if self._ended:
            self._publish(state, metrics, self._numbers_of(model, state.global_step))
            return
        if self._watched is not None and not self._over and not self._run.recorded(state.global_step):
            self._record(args, state, control, model, scheduled=True)
        numbers = self._run.numbers()
        if self._over or (self._watched is not None and self.trajectory[-1].error is not None):
            # The numbers of an earlier step would judge a checkpoint wrongly.
            numbers = dict.fromkeys(numbers)
        self._publish(state, metrics, numbers)

    def _publish(
        self, state: TrainerState, metrics: dict[str, float], numbers: Mapping[str, float | int | None]
    ) -> None:
        """Add the numbers to the metrics that the Trainer and its callbacks see."""
        found = for_evaluation(numbers, self._run.names.stem)
        if state.is_hyper_param_search:  # its default objective is the sum of all metrics
            found = {key: value for key, value in found.items() if key == self._watched}
        metrics.update(found)
        keep_out_of_tables(find_handler(self), self, found)

    def _numbers_of(self, model: torch.nn.Module, step: int) -> Mapping[str, float | int | None]:
        """Numbers of a model after training. If it has other weights than the last point, it is measured again."""
        last, weights = self.trajectory[-1] if self.trajectory else None, weights_seen(model)
        if last is not None and last.step == step and last.error is None and self._weights == weights:
            return self._run.numbers()
        if self._after is None or self._after[0] != weights:  # once for all evaluation datasets
            with self._run.at_work():
                self._after = weights, self._run.meter.measure(model, step=step).metrics(self.prefix)
        return self._after[1]

    @survives
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the checkpoint, and which one is now the best."""
        if not self._running:
            return
        self._saved = state.global_step
        if self.selects and not self._over and not self._run.recorded(self._saved):
            self._record(args, state, control, kwargs["model"])
        self._run.note_checkpoint(self._saved, self._checkpoint(self._saved))
        self._choose(args, state)
        self._write_state(state)

    @survives
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the last step if a later callback in the list, a log or an evaluation has made it the last."""
        if self._over:
            control.should_save, control.should_evaluate = False, False
        elif control.should_training_stop or (self._running and self.selects and control.should_save):
            self._record_last(args, state, control, kwargs["model"])

    @survives
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the last step if it was not known to be the last before."""
        # This is the Trainer's closing log. A callback later in the list, or at an evaluation, may have ended the
        # training. The next event, on_train_end, comes after load_best_model_at_end; in some versions this one too.
        if "total_flos" in kwargs.get("logs", {}):
            self._record_last(args, state, control, kwargs["model"])
            if self._running and state.is_world_process_zero:
                with self._run.survived("The last pictures could not be logged"), self._run.at_work():
                    self._report(args, state, control, kwargs["model"], {}, final=True)
            owns_best = self._running and self.selects and not judges_by_itself(args)
            is_last = self.selected is not None and self.selected.step == self._saved
            if owns_best and not is_last and not args.load_best_model_at_end:
                # This holds until on_train_end. With save_total_limit=1 the Trainer would otherwise delete all
                # checkpoints but the best now, including the last one.
                state.best_model_checkpoint = None

    @survives
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish the files."""
        self._record_last(args, state, control, kwargs["model"])
        if not self._running:
            return
        if not self._over and self._run.config.at_finish and not self._run.recorded(state.global_step):
            warn(
                f"The last step, step {state.global_step}, was not measured: a callback ended the training after the "
                "best model had been loaded. Put IBCallback after that callback."
            )
        self._choose(args, state)
        self._running, self._ended = False, True
        save_as_it_is(state)
        self._run.end(state.global_step)

    def _directory(self, args: TrainingArguments) -> Path:
        """The directory of the files of this run. Each trial of a search is a separate run."""
        return self._folder if self.output_dir is None else Path(self.output_dir) / of_trial(self._folder, args)

    @property
    def prefix(self) -> str:
        """The prefix of the logged keys."""
        return self._run.config.prefix

    @property
    def selects(self) -> bool:
        """Whether this callback selects checkpoints."""
        return self._run.rules.selects

    def _counts(self, metrics: Mapping[str, float], step: int) -> bool:
        """Whether this is an evaluation by which the model is judged.

        An evaluation of other data under another prefix, made by a user's callback, does not count. If there are
        several evaluation datasets, they are evaluated in turn. While training runs, only the first of them counts.
        """
        keys = frozenset(metrics)
        if not any(key.startswith("eval_") for key in keys):
            return False
        if "eval_runtime" not in keys and not self._ended:  # one of several datasets: "eval_<dataset>_runtime"
            if self._evaluated is not None and self._evaluated[0] == step and self._evaluated[1] != keys:
                return False
            self._evaluated = (step, keys)
        return True

    def _choose(self, args: TrainingArguments, state: TrainerState) -> None:
        """Select one of the checkpoints that exist, and let the Trainer keep it."""
        best = self._run.choose()
        if best is None or judges_by_itself(args):
            return
        # The Trainer keeps only one. Replace it only if no other checkpoint can be better.
        if self._run.certain or state.best_model_checkpoint is None:
            self._set_best(state, best)

    def _set_best(self, state: TrainerState, best: Selected) -> None:
        state.best_metric, state.best_global_step = best.value, best.step
        if best.path is not None:
            # The Trainer compares this path with its own paths, which may be relative.
            own = self._checkpoint(best.step)
            state.best_model_checkpoint = str(own if Path(os.path.abspath(own)) == best.path else best.path)

    def _take_up(self, args: TrainingArguments, state: TrainerState, entry: Mapping[str, Any]) -> None:
        """Keep the best checkpoint of an earlier part of the run, whether or not it compares with later ones.

        The Trainer protects one checkpoint from removal. An earlier one cannot be compared with later ones if settings
        have changed or the trajectory is gone. It must not take the place of a later best one, so it is copied aside.
        """
        run, step, owns_best = self._run, state.global_step, self.selects and not judges_by_itself(args)
        # If the last checkpoint was measured only after it was saved, nobody knows whether it was the best.
        is_measured = entry.get("last_step") == step
        known = entry.get("best_if_saved" if is_measured else "best", state.best_global_step if owns_best else None)
        earlier = {known, step} if "best" in entry and not is_measured else {known}
        self._to_keep = [s for s in earlier - {None} if step and not run.compares(s, entry.get("rule"))]
        chosen = run.choose() if owns_best else None
        if (owns_best and (run.certain or chosen is not None)) or (not self.selects and "best" in entry):
            # Forget what a run without this callback, or with other settings, took for the best.
            state.best_metric, state.best_global_step, state.best_model_checkpoint = None, None, None
        if chosen is not None:
            self._set_best(state, chosen)
        if state.is_world_process_zero:
            with run.survived("What a killed run left half-copied could not be removed"):
                remove_partial_copies(self._folder)
            with run.survived("Copies of checkpoints could not be parted from these"):
                unlink_copies(self._folder, step)
        self._limited = bool(args.save_total_limit and args.save_total_limit > 0)
        self._keep_earlier(state)

    def _keep_earlier(self, state: TrainerState) -> None:
        """Copy aside what the Trainer would remove. A copy that fails is tried again before the next checkpoint."""
        if not self._to_keep or not self._limited or not state.is_world_process_zero:
            return
        with (
            self._run.at_work(),
            self._run.survived("An earlier checkpoint could not be copied aside"),
        ):
            while self._to_keep:
                step = self._to_keep[0]
                original = self._checkpoint(step)
                copies = self._folder.glob(f"kept-checkpoint-{step}*")
                if not any(self._run.own_step(path) == step for path in copies) and size_of(original) is not None:
                    kept = copy_aside(original, step)
                    self._run.note_checkpoint(step, kept)
                    warn(
                        f"The best checkpoint of the earlier part of this run, of step {step}, cannot be compared with "
                        f"later ones, and save_total_limit would remove it. It is kept as {kept}. Remove it yourself "
                        "when you no longer need it."
                    )
                del self._to_keep[0]

    def _save_if_best(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        best = self._run.best_checkpoint(also=state.global_step)
        if best is not None and best.step == state.global_step:
            self._set_best(state, best)
            control.should_save = True

    def _state_key(self) -> str:
        key = "ib_callback" if self._run.names.is_default else f"ib_callback[{self.prefix}]"
        return key if self.output_dir is None else f"{key}:{os.fspath(self.output_dir)}"

    def _write_state(self, state: TrainerState) -> None:
        """Note in every checkpoint how far the trajectory has come, so that a resumed run knows its own points."""
        attributes: dict[str, Any] = {**self._run.progress(), "directory": str(self._files)}
        if self.selects:
            best, if_saved = self.selected, self._run.best_after_saving(state.global_step)
            attributes["best"] = None if best is None else best.step
            attributes["best_if_saved"] = None if if_saved is None else if_saved.step
            attributes["rule"] = self._run.rule
        entries: Any = state.stateful_callbacks  # declared as a list, but always a dict
        entries[self._state_key()] = {"args": {}, "attributes": attributes}

    def _read_state(self, state: TrainerState) -> int | None:
        entries: Any = state.stateful_callbacks or {}
        of_ours = "ib_callback" if self._run.names.is_default else f"ib_callback[{self.prefix}]"
        if state.global_step and not any(key.partition(":")[0] == of_ours for key in entries):
            return -1  # this run never had the callback, so points in the directory belong to another run
        return self._entry(state).get("last_step")

    def _entry(self, state: TrainerState) -> dict[str, Any]:
        """What `_write_state` wrote in an earlier part of the run; empty in a new run."""
        entries: Any = state.stateful_callbacks or {}
        entry = entries.get(self._state_key()) if state.global_step else None
        attributes = entry.get("attributes") if isinstance(entry, dict) else None
        return attributes if isinstance(attributes, dict) else {}

    def _record_last(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: torch.nn.Module
    ) -> None:
        if not self._running or self._over or self._run.recorded(state.global_step) or not self._run.config.at_finish:
            return
        # The best model may have been loaded meanwhile. Its numbers are not those of this step.
        if self._weights is None or self._weights == weights_seen(model):
            self._record(args, state, control, model)

    def _record(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        *,
        scheduled: bool = False,
        at_start: bool = False,
    ) -> None:
        step = state.global_step
        counted = args.include_num_input_tokens_seen not in (False, None, "no")
        tokens_seen = int(state.num_input_tokens_seen) if counted else None
        point = self._run.record(
            model,
            step,
            tokens_seen=tokens_seen,
            train_loss=last_logged_loss(state),
            scheduled=scheduled,
            at_start=at_start,
        )
        self._write_state(state)
        with self._run.survived("A point could not be logged"), self._run.at_work():
            metrics = self._run.logged(point)
            if metrics:
                state.log_history.append({**metrics, "epoch": state.epoch, "step": step})
            if metrics and state.is_world_process_zero:
                self._report(args, state, control, model, metrics)
        self._stop_if_decided(args, state, control, point)

    def _report(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any,
        metrics: Mapping[str, float], *, final: bool = False,
    ) -> None:  # fmt: skip
        """Send numbers and pictures to the targets of `report_to`, and the settings the first time."""
        handler, run = find_handler(self), self._run
        pictures = run.figures(final=final) if draws_for(handler) else {}
        settings = {} if self._described else run.described
        self._described = True
        captions = {name: run.caption(name) for name in pictures}

        def log_by_itself(target: Any, logs: dict[str, float]) -> None:
            target.on_log(args, state, control, model=model, logs=logs)

        told = Report(state.global_step, metrics, pictures, captions, settings, self.prefix)
        report(handler, told, log_by_itself)

    def _stop_if_decided(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, point: Measurement
    ) -> None:
        decision = self._run.decision
        if decision is None or not decision.stop or control.should_training_stop:
            return
        control.should_training_stop = True
        # Save a checkpoint at an early end too, as the Trainer does after the last step.
        control.should_save = control.should_save or args.save_strategy == "steps"
        self._run.announce(f"training stops at step {point.step}: {decision.message}")

    def _checkpoint(self, step: int) -> Path:
        return self._folder / f"checkpoint-{step}"
