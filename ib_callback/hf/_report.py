"""Logs to the targets of `report_to`, under the same keys in each, although transformers would rename some.

transformers' `rewrite_logs` puts `train/` before each name that an integration logs for the Trainer. The integrations
of TensorBoard, W&B, Trackio, Comet, Neptune and SwanLab call it. run/wandb_log.py logs to W&B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    CometCallback,
    MLflowCallback,
    SwanLabCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)
from transformers.trainer_callback import CallbackHandler

from ib_callback.common import messages
from ib_callback.hf._trainer import warn
from ib_callback.run.trackers import opened, to_tensorboard


@dataclass(frozen=True)
class Report:
    """What there is to report.

    step: the optimizer step.
    numbers: numbers by full name.
    pictures: content of PNG files by name without prefix.
    captions: captions of the pictures, by the same name.
    settings: settings of the run; empty if they have been reported already.
    prefix: prefix of the keys.
    """

    step: int
    numbers: Mapping[str, float]
    pictures: Mapping[str, bytes]
    captions: Mapping[str, str]
    settings: Mapping[str, Any]
    prefix: str


def draws_for(handler: CallbackHandler | None) -> bool:
    """Whether a target other than W&B takes pictures."""
    takes = (TensorBoardCallback, MLflowCallback, TrackioCallback)
    return handler is not None and any(isinstance(other, takes) for other in handler.callbacks)


def report(handler: CallbackHandler | None, report: Report, log: Callable[[Any, dict[str, float]], None]) -> None:
    """Log to every target of `report_to` except Weights & Biases. A target that fails causes a warning.

    Args:
        handler: the handler of the Trainer's callbacks.
        report: what there is to report.
        log: calls `on_log` of an integration with numbers. It is used for integrations that keep names, and for those
            not known here.
    """
    integrations = tuple(kind for kind in INTEGRATION_TO_CALLBACK.values() if kind is not WandbCallback)
    others = [] if handler is None else handler.callbacks
    for target in [other for other in others if isinstance(other, integrations)]:
        try:
            _report_to(target, report, log)
        except Exception as error:  # a failing log must not end the run
            warn(
                f"The information plane could not be logged by {type(target).__name__}. Training goes on. "
                f"{messages.describe(error)}"
            )


def _report_to(target: Any, report: Report, log: Callable[[Any, dict[str, float]], None]) -> None:
    numbers = dict(report.numbers)
    if isinstance(target, TensorBoardCallback):
        if target.tb_writer is not None:
            to_tensorboard(
                target.tb_writer, report.step, numbers=numbers, pictures=report.pictures, settings=report.settings,
                prefix=report.prefix,
            )  # fmt: skip
    elif isinstance(target, TrackioCallback):
        _to_trackio(target, report)
    elif isinstance(target, MLflowCallback):
        _to_mlflow(target, report, log)
    elif isinstance(target, SwanLabCallback) and numbers:
        target._swanlab.log(numbers, step=report.step)
    elif isinstance(target, CometCallback):
        if target._experiment is not None and numbers:
            target._experiment.log_metrics(numbers, step=report.step)
    elif numbers:
        log(target, numbers)


def _to_trackio(target: Any, report: Report) -> None:
    trackio = target._trackio
    if report.settings:
        trackio.config.update(dict(report.settings))
    images = {
        f"{report.prefix}{name}": trackio.Image(opened(content), caption=report.captions[name])
        for name, content in report.pictures.items()
    }
    row = {**report.numbers, **images}
    if row:
        # Trackio's own step counts all rows, including those of the Trainer.
        trackio.log({**row, "train/global_step": report.step})


def _to_mlflow(target: Any, report: Report, log: Callable[[Any, dict[str, float]], None]) -> None:
    if report.numbers:
        log(target, dict(report.numbers))  # this also starts the MLflow run if none has been started yet
    mlflow = target._ml_flow
    if report.settings:
        most = target._MAX_PARAM_VAL_LENGTH
        mlflow.log_params({name: str(value)[:most] for name, value in report.settings.items()})
    for name, content in report.pictures.items():
        mlflow.log_image(opened(content), artifact_file=f"{report.prefix}{name}.png")
