"""The callback for Lightning's Trainer, both of the package `lightning` and of `pytorch_lightning`.

Example: one more line in a training script.

    trainer = Trainer(max_steps=..., callbacks=[IBCallback(Probe.from_c4(tokenizer))])
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ib_callback.common.errors import RanksError
from ib_callback.common.files import is_remote, on_this_machine
from ib_callback.common.messages import describe, warn
from ib_callback.common.optional import is_installed, require
from ib_callback.common.ranks import of_rank_zero
from ib_callback.lightning._averaging import Averaging, fingerprints, same_weights
from ib_callback.lightning._loggers import Beside, beside_numbers, is_a
from ib_callback.lightning._model import Losses, Target, find_target
from ib_callback.lightning._saving import SavingWatch
from ib_callback.measuring.meter import Meter
from ib_callback.measuring.model.access import Layers
from ib_callback.measuring.model.forward import Forward
from ib_callback.measuring.model.guard import resharded, untouched
from ib_callback.measuring.model.parameters import unchanged_parameters
from ib_callback.probe.probe import Probe
from ib_callback.run.config import RunConfig, split_keywords, takes_keywords_of
from ib_callback.run.names import same_prefix
from ib_callback.run.run import Follows, Run, survives
from ib_callback.run.summary import Selected
from ib_callback.run.trajectory_file import bring_along

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
# These make a stand-in for a value that cannot be selected. It is worse than every metric. It gets better with every
# batch, by more than any min_delta. It counts batches rather than steps, because validation may come several times
# between two steps. With a missing metric, NaN or infinity, stock callbacks would raise, stop at once, or hold on to
# the first checkpoint.
_WORST = 1e15
_BETTER_BY = 1e3


def _callback_classes() -> tuple[type, ...]:
    """`Callback` of each Lightning package in use. If none is in use yet, that of the installed package."""
    in_use = [sys.modules[name] for name in _PACKAGES if sys.modules.get(name) is not None]
    if not in_use:
        old_only = not is_installed("lightning") and is_installed("pytorch_lightning")
        name = "pytorch_lightning" if old_only else "lightning.pytorch"
        in_use = [require(name, extra="lightning", purpose="ib_callback.lightning")]
    return tuple(package.Callback for package in in_use)


if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    Callback = _callback_classes()[0]


@functools.cache
def _derived(declared: Any, further: tuple[type, ...]) -> Any:
    """A class of the callback that the Trainers of further packages accept too.

    The Trainer of each package knows only its own Callback class. Importing both packages would cost seconds if only
    one is used. Which ones are used may become known only after this module has been imported.
    """
    members: dict[str, Any] = {
        "__module__": declared.__module__,
        "__qualname__": declared.__qualname__,
        "_declared": declared,
    }
    return type(declared.__name__, (declared, *further), members)


def _rebuilt(declared: Any, state: dict[str, Any]) -> Any:
    """A copy of a callback, perhaps in another process."""
    copy = declared.__new__(declared)
    vars(copy).update(state)
    return copy


class IBCallback(Follows, Callback):
    """Follows the model through the information plane while Lightning's Trainer trains it.

    The callback measures before the first step, at every step of the schedule and after the last step. Steps are
    optimizer steps, `trainer.global_step`. Every rank has the same result. Training is not disturbed: the weights are
    bit for bit the same with and without this callback.

    The `ib/...` numbers go to every logger at the exact step, and to `trainer.callback_metrics`. So stock callbacks see
    them, such as `ModelCheckpoint(monitor="ib/selectable/loss", mode="min")` with `select_from=0`. The plane goes to
    Weights & Biases, also to a run that you opened yourself. Global rank zero writes `ib_trajectory.jsonl`,
    `ib_checkpoints.jsonl` and `information_plane.png`.

    A LightningModule that holds one transformers model needs no configuration. For any other LightningModule, name the
    modules to measure with `layers=`. Also pass `forward=callable(pl_module, input_ids, attention_mask)`, unless the
    LightningModule itself is called with `input_ids` and `attention_mask`. Names in `layers` are those inside the
    LightningModule. You may leave out the name of the transformers model at the front.

    With `early_stopping`, training ends when the rule says so, but not before `min_steps` and `min_epochs`. With
    `select`, every checkpoint is measured, and the best checkpoint that `ModelCheckpoint` makes is kept, whatever
    `save_top_k` is. If the next checkpoint goes to the same file, the best one is kept as a copy.

    Mistakes raise an error before the first step: no recognisable blocks, a probe from another tokenizer, a directory
    that cannot be written, a metric that does not exist. A measurement that fails later becomes a warning and a point
    with `.error`. `callback_metrics` then keeps the values of the last point.

    A number that is undefined at a point, such as a ratio to nothing, is NaN in `callback_metrics` and missing in the
    loggers. While a metric cannot be selected, its `ib/selectable/...` is missing in the loggers. In
    `callback_metrics` it is then a huge number on the worse side, which gets better with every batch. The reason is
    that NaN would make stock `EarlyStopping` stop at once and `ModelCheckpoint` hold on to the first checkpoint.

    A stock callback keeps what it once took for the best, even if the loss falls far lower later. Use `select` instead,
    or let it monitor `"ib/selectable/loss"` (`mode="min"`) with `select_from=0`.

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

    A resumed run (`ckpt_path=`) continues its trajectory and finds its last values in `callback_metrics`. If the
    loggers give the resumed run a new directory, the files of the earlier part are copied there.

    Args:
        probe: the frozen held-out sample to measure on.
        weights: which weights to measure if a callback averages them (`WeightAveraging`, `EMAWeightAveraging`,
            `StochasticWeightAveraging`). "saved" measures the weights that a checkpoint would hold at that step.
            "current" measures the weights that are being trained. It cannot be used to select checkpoints that hold the
            average. If a callback averages, this one moves behind it in the list. If the model that training leaves
            behind is not that of the last point, it is measured too: `.final`, `ib_final.jsonl`, `ib/final/…`.
        **keywords: those of `ib_callback.run.config.RunConfig` (`every_n_steps`, `early_stopping`, `select`, …), which
            all trainers share, and those of `ib.Meter` (`orders`, `layers`, `batch_size`, `feature_probes`, …).
            By default, `output_dir` is the directory in which ModelCheckpoint makes `checkpoints`: the first logger's
            `save_dir/name/version`, or else `default_root_dir`. By default, `progress` follows the Trainer
            (`enable_progress_bar`), but is off beside Rich's bar, because a second bar would garble it.

    Raises:
        TypeError: an unknown keyword, or a value of the wrong type.
        ValueError: a setting out of range, or a metric that is not measured; the message lists those that are.
    """

    def __new__(cls, *args: Any, **keywords: Any) -> Any:
        """Make an object that the Trainer of every package in use accepts as a callback."""
        declared = vars(cls).get("_declared", cls)
        further = tuple(known for known in _callback_classes() if not issubclass(declared, known))
        return object.__new__(_derived(declared, further) if further else declared)

    @takes_keywords_of(RunConfig, Meter)
    def __init__(self, probe: Probe, *, weights: Literal["saved", "current"] = "saved", **keywords: Any) -> None:
        super().__init__()
        if weights not in ("saved", "current"):
            raise ValueError(f'weights: expected "saved" or "current", got {weights!r}.')
        self._weights = weights
        config, meter_keywords = split_keywords(type(self).__name__, keywords)
        self.output_dir = config.output_dir
        self._progress: bool | None = meter_keywords.get("progress")
        meter = Meter(probe, **meter_keywords)
        self._layers: Layers = meter.layers
        self._forward = meter.forward
        self._run = Run(meter, config=config, x_axis="trainer/global_step")
        directory = None if self.output_dir is None else os.fspath(self.output_dir)
        told_apart_by = {"probe": probe.name, "fingerprint": probe.fingerprint[:12], "output_dir": directory}
        if not self._run.names.is_default:  # states of earlier versions have no prefix
            told_apart_by["prefix"] = config.prefix
        self._key = f"{type(self).__qualname__}{told_apart_by!r}"
        self._begun = False
        self._described = False  # whether the loggers have got the settings of this run
        self._running = False
        self._step = 0
        self._epoch = 0
        self._state: dict[str, Any] = {}
        self._resumes = True
        self._target: Target | None = None
        self._saving: SavingWatch | None = None
        self._best: Selected | None = None  # the best one, as the checkpoint being saved records it
        self._stand_ins: dict[str, str] = {}
        self._averaging = Averaging([])
        self._measured: tuple[int, dict[str, Any]] | None = None  # a step and the fingerprints of its weights
        self._trained: dict[str, Any] = {}  # fingerprints of the weights at the end of the last epoch
        self._held: bool = True  # whether the checkpoint being saved has the weights of its point
        self._losses = Losses()  # training losses since the last point
        self._deferred: int | None = None  # the step before one whose weights change again at the end of the epoch

    # Tools that ask for the signature of the class find this first. A subclass with its own __init__ shows that one.
    __new__.__signature__ = inspect.signature(__init__)  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (vars(type(self)).get("_declared", type(self)), vars(self))

    @property
    def prefix(self) -> str:
        """The prefix of the logged keys."""
        return self._run.config.prefix

    @property
    def state_key(self) -> str:
        """Distinguishes several callbacks by their probes, and by what distinguishes their files."""
        return self._key

    def state_dict(self) -> dict[str, Any]:
        """How far the trajectory has come and where the files are, in plain Python. Settings are not included."""
        if not self._state:
            return {}
        saving: dict[str, Any] = {}
        with self._run.survived("Which checkpoints are to be removed later could not be noted"):
            saving = self._saving_state()
        return {**self._state, **self._run.progress(), **saving, "losses": self._losses.state()}

    def _saving_state(self) -> dict[str, Any]:
        """Which checkpoints are kept now, or will be once this one is complete."""
        if self._saving is None:
            return {}
        best = self._best
        if best is None or best.path is None:
            return self._saving.state_dict()
        entry = {"step": best.step, "path": self._saving.relative(best.path), "rule": self._run.rule}
        return {**self._saving.state_dict(), "best": entry}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Forget an earlier training of this callback if another training is resumed."""
        # Lightning also restores callbacks for trainer.test(ckpt_path=...), which is not part of the training.
        self._resumes = trainer.state.fn == "fit"
        if self._resumes:
            self._state = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the progress of an earlier part of the run."""
        if self._resumes:
            self._state = dict(state_dict)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Wait for the training to begin."""
        self._begun = False
        if stage == "fit":
            self._averaging = averaging = Averaging(trainer.callbacks)
            rules = self._run.rules
            if self._weights == "current" and averaging.saves_averages and rules.selects:
                raise ValueError(
                    f'weights="current" with select="{rules.selection.by}": checkpoints hold the average that '
                    'WeightAveraging makes, not the current weights. Expected weights="saved", or no select=.'
                )
            averaging.go_last(trainer, self)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check everything, open the trajectory and measure the model before training."""
        self._begin(trainer, pl_module)
        self._stop_if_decided(trainer)

    def _begin(self, trainer: Any, pl_module: Any) -> None:
        run = self._run
        if any(other is not self and getattr(other, "prefix", None) == self.prefix for other in trainer.callbacks):
            raise ValueError(same_prefix(type(self).__name__, self.prefix))
        self._begun = True
        self._running = self._described = False
        self._measured, self._trained, self._deferred = None, {}, None
        self._step = step = trainer.global_step
        self._epoch = trainer.current_epoch
        writes = trainer.is_global_zero and not trainer.fast_dev_run
        self._check_saving(trainer)
        watched = unchanged_parameters(pl_module, copied=True)
        with run.at_work(), watched, untouched(pl_module), resharded(pl_module):
            self._target = find_target(trainer, pl_module, self._layers, self._forward)
            self._set(self._target.layers, self._target.forward)
            run.meter.progress = trainer.is_global_zero and self._shows_progress(trainer)
            shows = trainer.progress_bar_callback is not None if run.config.console is None else run.config.console
            run.shows_lines = shows
            earlier = self._state if step else {}
            self._losses = Losses(*earlier.get("losses", ()))
            directory = self._directory(trainer)
            if earlier and writes:
                bring_along(Path(earlier["directory"]), directory, run.names)
            run.begin(
                self._target.model,
                directory=directory,
                step=step,
                last_step=earlier.get("last_step"),
                last_point=earlier.get("last_point"),
                max_steps=trainer.max_steps if trainer.max_steps > 0 else None,
                writes=writes,
                weights="saved" if self._measures_averages else None,
                training=trainer,
                resumed_from=trainer.ckpt_path,
                loaders=trainer.train_dataloader,
            )
            if step and not earlier and self.trajectory and writes:
                _warn(
                    "The checkpoint knows nothing of this callback. The points up to step "
                    f"{self.trajectory[-1].step} in {directory} are taken for earlier points of this run. If they "
                    "belong to another run, pass another output_dir=, or move the files away."
                )
            self._state = {"directory": os.path.abspath(directory)}
            self._watch_saving(trainer, earlier)
            self._publish(trainer)
        if run.measures_at_start(step):
            self._record(trainer, pl_module, at_start=True)
        self._choose()
        self._running = True

    @survives
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure if the optimizer has made a step that the schedule wants, or that is known to be the last."""
        if not self._running:
            return
        self._settle()
        self._losses.add(outputs, trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1)
        self._publish_stand_ins(trainer)
        before, step = self._step, trainer.global_step
        # They are equal while gradients accumulate. Several optimizers may make several steps in one batch.
        if step == before or self._averaging.is_over(trainer):
            return
        self._step = step
        ends_epoch = bool(trainer.is_last_batch or batch_idx + 1 == trainer.num_training_batches)
        self._epoch = trainer.current_epoch + ends_epoch
        ends = self._measures_averages and (ends_epoch or self._is_last(trainer))
        if ends and self._averaging.changes_at_epoch_end(trainer.current_epoch):
            self._deferred = before
            return
        self._measure_if_needed(trainer, pl_module, before)

    @survives
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure a step whose weights were not final before the end of the epoch."""
        if not self._running:
            return
        before, self._deferred = self._deferred, None
        if before is not None:
            self._measure_if_needed(trainer, pl_module, before)
        if self._averaging and not self._averaging.is_over(trainer):
            self._trained = fingerprints(dict(pl_module.named_parameters()))

    def _measure_if_needed(self, trainer: Any, pl_module: Any, before: int) -> None:
        step = trainer.global_step
        needed = self._run.config.at_finish and self._is_last(trainer) and not self._run.recorded(step)
        if needed or self._run.due(step, since=before):
            self._record(trainer, pl_module, since=before)
        self._stop_if_decided(trainer)

    @survives
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the last step if it was not known to be the last before, and finish the files."""
        if not self._running:
            return
        if self._run.config.at_finish and not self._run.recorded(self._step):
            if self._averaging and not self._measures_averages and not self._has_weights(pl_module, self._trained):
                _warn(
                    f"The last step, step {self._step}, was not measured: when the training ended, the average had "
                    "already replaced its weights."
                )
            else:
                self._record(trainer, pl_module)
        if self._averaging and not self._is_measured(trainer, pl_module):
            self._record_final(trainer, pl_module)
        self._settle(wait=True)
        self._choose()
        if trainer.is_global_zero:
            with self._run.survived("The last pictures could not be logged"), self._run.at_work():
                self._log_beside(trainer, final=True)
        self._finish(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish a run that was resumed at its end, because Lightning then calls no hook of training."""
        if self._begun or not self._state or not trainer.global_step:
            return
        try:
            self._begin(trainer, pl_module)
            self.on_train_end(trainer, pl_module)
        except RanksError:
            raise
        except Exception as error:  # what was trained is safe, and so is what was measured
            _warn(f"The run was resumed where it ends, and its trajectory could not be taken up. {describe(error)}")
        finally:
            if self._saving is not None:
                self._saving.close()

    @survives
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Finish the files of a run that was interrupted."""
        if self._running:
            self._finish(trainer, complete=False)
        self._let_go()

    @survives
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the model and of the strategy."""
        self._let_go()
        self._saving = None

    def _let_go(self) -> None:
        self._target = None
        self._averaging = Averaging([])
        self._set(self._layers, self._forward)

    def _set(self, layers: Any, forward: Forward | None) -> None:
        self._run.meter.layers = layers
        self._run.meter.forward = forward

    def _record(self, trainer: Any, pl_module: Any, *, since: int | None = None, at_start: bool = False) -> None:
        assert self._target is not None
        self._set_wandb_runs(trainer)
        with self._run.at_work():
            with self._as_measured(pl_module), untouched(pl_module), resharded(pl_module):
                if self._averaging or self._run.rules.selects:
                    self._measured = (trainer.global_step, fingerprints(dict(pl_module.named_parameters())))
                point = self._run.record(
                    self._target.model,
                    trainer.global_step,
                    train_loss=self._losses.mean(),
                    since=since,
                    at_start=at_start,
                )
            if point.error is None:
                with self._run.survived("A point could not be published"):
                    self._publish(trainer)
                    if trainer.is_global_zero:
                        self._log(trainer, self._run.logged(point), trainer.global_step)
                        self._log_beside(trainer)

    @property
    def _measures_averages(self) -> bool:
        return self._weights == "saved" and self._averaging.saves_averages

    def _as_measured(self, module: Any) -> AbstractContextManager[None]:
        """Give the module the weights that are to be measured."""
        return self._averaging.as_saved(module) if self._measures_averages else nullcontext()

    def _is_measured(self, trainer: Any, module: Any) -> bool:
        """Whether the weights that training leaves in the module are those of the last point."""
        last = self._measured
        return last is not None and last[0] == trainer.global_step and self._has_weights(module, last[1])

    @staticmethod
    def _has_weights(module: Any, expected: Mapping[str, Any]) -> bool:
        return same_weights(fingerprints(dict(module.named_parameters())), expected)

    def _record_final(self, trainer: Any, pl_module: Any) -> None:
        assert self._target is not None
        with self._run.at_work(), untouched(pl_module), resharded(pl_module):
            final = self._run.record_final(self._target.model, trainer.global_step)
        if trainer.is_global_zero:
            self._log(trainer, final.metrics(f"{self.prefix}final/"), trainer.global_step)

    def _publish(self, trainer: Any) -> None:
        """Put the numbers where stock callbacks find them."""
        numbers = self._run.numbers()
        directions = {f"{self.prefix}{name}": mode for name, mode in self._run.rules.directions.items()}
        self._stand_ins = {name: mode for name, mode in directions.items() if numbers[name] is None}
        # An undefined number must not keep its value of an earlier point. It must not be missing either, because stock
        # callbacks take that for a mistake.
        values = {k: math.nan if v is None else float(v) for k, v in numbers.items()}
        trainer.callback_metrics.update({k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()})
        self._publish_stand_ins(trainer)

    def _publish_stand_ins(self, trainer: Any) -> None:
        """If nothing can be selected, publish a number worse than any metric, but better than at the batch before.

        With NaN, stock EarlyStopping would stop at once. With the same number for all batches it would lose patience.
        ModelCheckpoint would then hold on to the first checkpoint, perhaps of a collapsed model, not to the latest.
        """
        if self._stand_ins:
            worse = torch.tensor(_WORST - _BETTER_BY * trainer.fit_loop.total_batch_idx, dtype=torch.float64)
            values = {"min": worse, "max": -worse}
            trainer.callback_metrics.update({name: values[mode] for name, mode in self._stand_ins.items()})

    def _set_wandb_runs(self, trainer: Any) -> None:
        self._run.wandb_runs = runs = []
        with self._run.survived("The loggers could not be found"):
            for logger in trainer.loggers if trainer.is_global_zero else []:
                with self._run.survived(f"{type(logger).__name__} has no run to log to"):
                    if _is_wandb(logger):
                        runs.append(logger.experiment)

    def _log(self, trainer: Any, metrics: dict[str, float], step: int) -> None:
        # With self.log() the values would arrive only every log_every_n_steps, and then again and again.
        def log_numbers(logger: Any) -> None:
            logger.log_metrics(metrics, step=step)

        self._to_loggers(trainer.loggers, step, log_numbers)

    def _log_beside(self, trainer: Any, *, final: bool = False) -> None:
        """Send pictures, and the first time the settings, to loggers that take them. W&B gets them elsewhere."""
        takers = [(logger, log) for logger in trainer.loggers if (log := beside_numbers(logger)) is not None]
        if not takers:
            return
        pictures = self._run.figures(final=final)
        settings = {} if self._described else self._run.described
        self._described = True
        if pictures or settings:
            step = trainer.global_step
            for logger, log in takers:
                self._to_loggers([logger], step, functools.partial(_log_to, log, step, pictures, settings, self.prefix))

    def _to_loggers(self, loggers: list[Any], step: int, log: Callable[[Any], None]) -> None:
        for logger in [logger for logger in loggers if not _is_wandb(logger)]:
            try:
                log(logger)
                logger.save()
            except Exception as error:  # a run must not die of its log
                name = type(logger).__name__
                _warn(f"The numbers of step {step} could not be logged to {name}. Training goes on. {describe(error)}")

    def _stop_if_decided(self, trainer: Any) -> None:
        decision = self._run.decision
        if decision is None or not decision.stop or trainer.should_stop or not self._may_stop(trainer):
            return
        # Every rank has the same points. If one of them should disagree nevertheless, all stop.
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(True, all=False)
        self._run.announce(f"training stops at step {trainer.global_step}: {decision.message}")

    def _check_saving(self, trainer: Any) -> None:
        """Warn, on one rank, about anything that keeps `select` and `early_stopping` from ever acting."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        rules = self._run.rules
        if rules.selects and not trainer.checkpoint_callbacks:
            _warn(
                f'select="{rules.selection.by}" chooses among checkpoints, but nothing saves any: add a '
                "ModelCheckpoint(every_n_train_steps=…) to the Trainer's callbacks."
            )
        remote = [c.dirpath for c in trainer.checkpoint_callbacks if is_remote(getattr(c, "dirpath", None))]
        if rules.selects and remote:
            _warn(
                f'select="{rules.selection.by}" chooses among checkpoints on the disks of this machine, and keeps the '
                f"best one; those at {remote[0]} are left to ModelCheckpoint. Give it a local dirpath=, or leave "
                "select= out and let it monitor ib/selectable/…."
            )
        steps = (trainer.min_steps or 0) >= trainer.max_steps > 0
        epochs = (trainer.min_epochs or 0) >= (trainer.max_epochs or -1) > 0
        if rules.stopping is not None and (steps or epochs):
            name, least, most = ("steps", trainer.min_steps, trainer.max_steps)
            if not steps:
                name, least, most = ("epochs", trainer.min_epochs, trainer.max_epochs)
            _warn(
                f"early_stopping can never act: min_{name}={least} is not below max_{name}={most}. Lower min_{name}, "
                "or leave early_stopping out."
            )

    def _watch_saving(self, trainer: Any, earlier: Mapping[str, Any]) -> None:
        directory = Path(self._state["directory"])
        lasting = {Path(os.path.abspath(directory / e["path"])): int(e["step"]) for e in earlier.get("lasting", ())}
        best, compares = earlier.get("best"), True
        if best is not None:
            compares = self._run.compares(best["step"], best["rule"])
            if not compares:
                path = Path(os.path.abspath(directory / best["path"]))
                lasting[path] = int(best["step"])
                if trainer.is_global_zero:
                    _warn(
                        f"The best checkpoint of the earlier part of this run, {path} of step {best['step']}, cannot "
                        "be compared with later ones, and is kept. Remove it yourself when you no longer need it."
                    )
        elif earlier:  # perhaps an earlier version wrote it
            kept = [self._run.own_step(Path(os.path.abspath(directory / name))) for name in earlier.get("withheld", ())]
            compares = all(self._run.compares(step, None) for step in kept if step is not None)
        self._best = None
        self._saving = SavingWatch(
            trainer,
            before=lambda checkpoint, path: self._before_saving(trainer, checkpoint, path),
            after=self._after_saving,
            copied=self._run.note_checkpoint,
            unexchanged=lambda: self._averaging.as_trained(),
            directory=directory,
            own_step=self._run.own_step,
            state=earlier,
            lasting=lasting,
            compares=compares,
        )

    @survives
    def _before_saving(self, trainer: Any, checkpoint: dict[str, Any], path: Path) -> None:
        step = trainer.global_step
        to_measure = self._run.rules.selects and not self._run.recorded(step) and not self._averaging.is_over(trainer)
        # A signal may save in the middle of a measurement. A run that resumes from there measures again.
        if self._running and to_measure and not self._run.is_at_work:
            before = self._step if self._deferred is None else self._deferred
            self._record(trainer, trainer.lightning_module, since=before if before < step else None)
            # Do not wait for the next step, because a run that resumes from this checkpoint makes none.
            self._stop_if_decided(trainer)
        self._held = True
        if self._measured is not None and self._measured[0] == step:
            self._held = of_rank_zero(same_weights(fingerprints(checkpoint.get("state_dict") or {}), self._measured[1]))
        self._best = self._run.best_after_saving(step) if self._held else self._run.selected
        if self._best is not None and self._best.path is None:
            self._best = replace(self._best, path=path)
        # The state in the checkpoint was taken before this.
        if self.state_key in checkpoint.get("callbacks", {}):
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    @survives
    def _after_saving(self, step: int, path: Path) -> None:
        with self._run.at_work():
            self._run.note_checkpoint(step, path, holds=self._held)
            self._choose()

    def _settle(self, *, wait: bool = False) -> None:
        """Record checkpoints that were being written in the background."""
        if self._saving is not None:
            self._saving.settle(wait=wait)

    def _choose(self) -> None:
        """Select one of the checkpoints that exist, and keep it."""
        if self._run.rules.selects and self._saving is not None:
            selected = self._run.choose()
            with self._run.survived("A checkpoint that is no longer the best could not be removed"):
                if selected is None or selected.path is None:
                    self._saving.keep(None, certain=self._run.certain)
                else:
                    self._saving.keep(selected.path, selected.step, certain=self._run.certain)

    def _finish(self, trainer: Any, *, complete: bool = True) -> None:
        self._running = False
        self._set_wandb_runs(trainer)
        self._run.end(trainer.global_step, complete=complete)

    def _directory(self, trainer: Any) -> Path:
        """The output directory. It is broadcast, because not every logger knows its name and version on every rank."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        directory = trainer.default_root_dir
        with self._run.survived(f"The first logger does not say where it writes, and files go to {directory}"):
            if trainer.loggers:
                logger = trainer.loggers[0]
                version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
                directory = os.path.join(logger.save_dir or directory, str(logger.name), version)
        return Path(on_this_machine("the Trainer's directory", trainer.strategy.broadcast(os.fspath(directory))))

    def _shows_progress(self, trainer: Any) -> bool:
        if self._progress is not None:
            return self._progress
        bar = trainer.progress_bar_callback
        return bar is not None and not any(base.__name__ == "RichProgressBar" for base in type(bar).__mro__)

    def _may_stop(self, trainer: Any) -> bool:
        return trainer.global_step >= (trainer.min_steps or 0) and self._epoch >= (trainer.min_epochs or 0)

    def _is_last(self, trainer: Any) -> bool:
        """Whether it is known that no step will follow. Early stopping may still decide so after this batch."""
        if trainer.should_stop and self._may_stop(trainer):
            return True
        epochs = self._averaging.epochs(trainer)
        limits = ((trainer.max_steps, trainer.global_step), (epochs, self._epoch))  # None or -1 means no limit
        return any(limit is not None and 0 <= limit <= reached for limit, reached in limits)


def _log_to(
    log: Beside, step: int, pictures: Mapping[str, bytes], settings: Mapping[str, Any], prefix: str, logger: Any
) -> None:
    log(step, pictures, settings, prefix)


def _is_wandb(logger: Any) -> bool:
    return is_a(logger, "WandbLogger")


def _warn(message: str) -> None:
    warn(message, stacklevel=3)
