"""The callback for Lightning's Trainer, of the package `lightning` and of `pytorch_lightning` alike.

Example: one more line in a training script.

    trainer = Trainer(max_steps=..., callbacks=[IBCallback(Probe.from_c4(tokenizer))])
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ib_callback._lightning_model import Target, find_target
from ib_callback.guard import resharded, untouched
from ib_callback.measurement import Measurement
from ib_callback.meter import Meter
from ib_callback.models import Forward, Layers
from ib_callback.optional import require
from ib_callback.probe import Probe
from ib_callback.recorder import Recorder, check_keywords
from ib_callback.schedule import Schedule, as_schedule
from ib_callback.trajectory import Trajectory
from ib_callback.trajectory_lines import FILENAME
from ib_callback.wandb_log import WandbLog, open_run

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callback_classes() -> list[type]:
    """`Callback` of each Lightning package that is in use; of the one that is installed if none is so far."""
    in_use = [sys.modules[name] for name in _PACKAGES if sys.modules.get(name) is not None]
    if not in_use:
        old_only = importlib.util.find_spec("lightning") is None and importlib.util.find_spec("pytorch_lightning")
        name = "pytorch_lightning" if old_only else "lightning.pytorch"
        in_use = [require(name, extra="lightning", purpose="ib_callback.lightning")]
    return [package.Callback for package in in_use]


if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    Callback = _callback_classes()[0]


class IBCallback(Callback):
    """Follows the model through the information plane while Lightning's Trainer trains it.

    Measures before the first step, at every step of the schedule (optimizer steps, `trainer.global_step`) and
    after the last step, on every rank with the same result. Training is not disturbed: with this callback and
    without it, the weights are the same bits. The `ib/...` numbers go to `trainer.callback_metrics`, so that
    `ModelCheckpoint(monitor="ib/optimality", mode="max")` and the like see them, and to every logger at the
    exact step; the plane goes to Weights & Biases, also to a run that you opened yourself. Global rank zero
    writes `ib_trajectory.jsonl` and `information_plane.png`.

    A LightningModule that holds one transformers model needs no configuration. Of any other, name the modules
    to measure with `layers=` and pass `forward=callable(pl_module, input_ids, attention_mask)` unless it is
    called with these two itself. Names in `layers` are those inside the LightningModule; the name of the
    transformers model in front may be left out.

    Mistakes (no recognisable blocks, a probe from another tokenizer, a directory that cannot be written) raise
    before the first step. A measurement that fails later is a warning and a point with `.error`;
    `callback_metrics` then keeps the values of the last point. A number that is undefined at a point, such as a
    ratio to nothing, is NaN there and missing in the loggers.

    A resumed run (`ckpt_path=`) continues its trajectory and finds its last values in `callback_metrics`. Where
    loggers give the resumed run a directory of its own, the file of the earlier part is copied there.

    Args:
        probe: the frozen held-out sample to measure on.
        every_n_steps: an int, `ib.logarithmic()`, or any callable step -> bool.
        output_dir: where the files go. By default the Trainer's own: the directory in which ModelCheckpoint
            makes `checkpoints`, that is the first logger's `save_dir/name/version`, or else `default_root_dir`.
        log_plane: draw the plane, as a file and for Weights & Biases; needs matplotlib.
        **meter_keywords: those of `ib.Meter`, such as `orders`, `layers` or `batch_size`. `progress` is by
            default what the Trainer does (`enable_progress_bar`), except beside Rich's bar, which a second bar
            would garble.

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
        _derive_from_packages_in_use()
        super().__init__()
        check_keywords(type(self), meter_keywords)
        self.output_dir = output_dir
        self._progress: bool | None = meter_keywords.get("progress")
        meter = Meter(probe, **meter_keywords)
        self._layers: Layers = meter.layers
        self._forward = meter.forward
        self._recorder = Recorder(meter, as_schedule(every_n_steps), draw_plane=log_plane)
        self._wandb = WandbLog("trainer/global_step")
        self._running = False
        self._step = 0
        self._state: dict[str, Any] = {}
        self._target: Target | None = None

    @property
    def trajectory(self) -> Trajectory:
        """The points measured so far. With `ddp_spawn` they are in the processes that trained, and in the file."""
        return self._recorder.trajectory

    @property
    def state_key(self) -> str:
        """Tells several callbacks apart by what tells their files apart, and by their probes."""
        probe = self._recorder.meter.probe
        directory = None if self.output_dir is None else os.fspath(self.output_dir)
        return self._generate_state_key(probe=probe.name, fingerprint=probe.fingerprint[:12], output_dir=directory)

    def state_dict(self) -> dict[str, Any]:
        """Progress, not settings, in plain Python: the last values, and where the files are."""
        return dict(self._state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the progress of an earlier part of the run."""
        self._state = dict(state_dict)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check everything, open the trajectory and measure the model as training finds it."""
        recorder = self._recorder
        self._running = False
        self._step = trainer.global_step
        with recorder.at_work(), untouched(pl_module), resharded(pl_module):
            self._target = find_target(trainer, pl_module, self._layers, self._forward)
            self._set(self._target.layers, self._target.forward)
            recorder.meter.progress = trainer.is_global_zero and self._shows_progress(trainer)
            earlier, self._state = self._state if self._step else {}, {}
            directory = self._directory(trainer)
            if earlier and trainer.is_global_zero:
                _bring_along(Path(earlier["directory"]), directory)
            recorder.start(
                self._target.model,
                directory=directory,
                step=self._step,
                writes=trainer.is_global_zero,
                training=trainer,
            )
            measured = [point for point in recorder.trajectory if point.error is None]
            self._publish(trainer, _values(measured[-1]) if measured else earlier.get("metrics", {}), directory)
        if self._step == 0 or recorder.due(self._step):
            self._record(trainer, pl_module, at_start=True)
        self._running = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure if the optimizer has made a step that the schedule wants, or if this is known to be the last."""
        before, step = self._step, trainer.global_step
        # Equal within an accumulation of gradients; several optimizers may make several steps in one batch.
        if not self._running or step == before:
            return
        self._step = step
        due = any(self._recorder.due(s) for s in range(before + 1, step + 1))
        if due or (self._is_last(trainer, batch_idx) and not self._recorder.recorded(step)):
            self._record(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the last step if only now it is known to be the last, and finish the files."""
        if not self._running:
            return
        if not self._recorder.recorded(trainer.global_step):
            self._record(trainer, pl_module)
        self._finish(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Finish the files of a run that was interrupted."""
        if self._running:
            self._finish(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the model."""
        self._target = None
        self._set(self._layers, self._forward)

    def _set(self, layers: Any, forward: Forward | None) -> None:
        self._recorder.meter.layers = layers
        self._recorder.meter.forward = forward

    def _record(self, trainer: Any, pl_module: Any, *, at_start: bool = False) -> None:
        assert self._target is not None
        step = trainer.global_step
        with self._recorder.at_work():
            with untouched(pl_module), resharded(pl_module):
                point = self._recorder.record(self._target.model, step, at_start=at_start)
            if point.error is None:
                self._publish(trainer, _values(point), Path(self._state["directory"]))
            if trainer.is_global_zero:
                metrics = {} if point.error is not None else point.metrics()
                self._log(trainer, metrics, step, self._recorder.draw())

    def _publish(self, trainer: Any, values: dict[str, float | None], directory: Path) -> None:
        """For stock callbacks, and for the next checkpoint."""
        # An undefined number must neither keep its value of an earlier point nor be missing, which stock
        # callbacks take for a mistake.
        numbers = {name: math.nan if value is None else value for name, value in values.items()}
        trainer.callback_metrics.update({k: torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()})
        self._state = {"metrics": values, "directory": str(directory)}

    def _log(self, trainer: Any, metrics: dict[str, float], step: int, plane: Path | None) -> None:
        own_run = open_run()
        for logger in trainer.loggers:
            # Through self.log() the values would arrive only at every log_every_n_steps, and then again and again.
            if any(base.__name__ == "WandbLogger" for base in type(logger).__mro__):
                self._wandb.log(logger.experiment, metrics, step=step, plane=plane)
                own_run = None if logger.experiment is own_run else own_run
            elif metrics:
                try:
                    logger.log_metrics(metrics, step=step)
                    logger.save()
                except Exception as error:  # a run must not die of its log
                    name, reason = type(logger).__name__, f"{type(error).__name__}: {error}"
                    _warn(f"The information of step {step} could not be logged to {name}; training goes on. {reason}")
        if own_run is not None:
            self._wandb.log(own_run, metrics, step=step, plane=plane)

    def _finish(self, trainer: Any) -> None:
        self._running = False
        with self._recorder.at_work():
            plane = self._recorder.finish()
            if plane is not None:
                self._log(trainer, {}, trainer.global_step, plane)

    def _directory(self, trainer: Any) -> Path:
        """On every rank the same, for not every logger knows its name and version on every rank."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        directory = trainer.default_root_dir
        if trainer.loggers:
            logger = trainer.loggers[0]
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            directory = os.path.join(logger.save_dir or directory, str(logger.name), version)
        return Path(trainer.strategy.broadcast(os.fspath(directory)))

    def _shows_progress(self, trainer: Any) -> bool:
        if self._progress is not None:
            return self._progress
        bar = trainer.progress_bar_callback
        return bar is not None and not any(base.__name__ == "RichProgressBar" for base in type(bar).__mro__)

    def _is_last(self, trainer: Any, batch_idx: int) -> bool:
        """Whether it is known that no step will follow; early stopping may yet decide so after this batch."""
        step, epoch = trainer.global_step, trainer.current_epoch
        epoch += trainer.is_last_batch or batch_idx + 1 == trainer.num_training_batches
        if trainer.should_stop and step >= (trainer.min_steps or 0) and epoch >= (trainer.min_epochs or 0):
            return True
        limits = ((trainer.max_steps, step), (trainer.max_epochs, epoch))  # None or -1 where there is none
        return any(limit is not None and 0 <= limit <= reached for limit, reached in limits)


def _values(point: Measurement) -> dict[str, float | None]:
    """All numbers by logged name, in plain Python; None where undefined."""
    return {f"ib/{name}": value for name, value in point.scalars().items() if name != "tokens_seen"}


def _derive_from_packages_in_use() -> None:
    # The Trainer of each package knows only its own Callback class. Importing both for the sake of one would cost
    # seconds, and which ones are in use may become known only after this module has been imported.
    missing = tuple(c for c in _callback_classes() if not issubclass(IBCallback, c))
    if missing:
        IBCallback.__bases__ += missing


_derive_from_packages_in_use()


def _bring_along(earlier: Path, directory: Path) -> None:
    """Copy the trajectory of the earlier part of a resumed run to where the run continues."""
    source, destination = earlier / FILENAME, directory / FILENAME
    try:
        if destination.exists() or source.resolve() == destination.resolve():
            return
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, destination)
    except OSError as error:
        _warn(f"The earlier part of the trajectory, {source}, could not be copied to {directory} ({error.strerror}).")


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
