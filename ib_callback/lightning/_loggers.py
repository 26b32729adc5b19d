"""What Lightning's loggers take in addition to numbers: pictures, and the settings of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ib_callback.run.trackers import opened, to_tensorboard

# Takes a step, pictures by name (content of PNG files), settings by name, and the prefix of the keys.
Beside = Callable[[int, Mapping[str, bytes], Mapping[str, Any], str], None]


def is_a(logger: Any, name: str) -> bool:
    """Whether a logger has a class of that name, in either Lightning package."""
    return any(base.__name__ == name for base in type(logger).__mro__)


def beside_numbers(logger: Any) -> Beside | None:
    """How a logger takes pictures and settings; None if it takes numbers only, or if it logs to W&B."""
    if is_a(logger, "TensorBoardLogger"):
        return lambda step, pictures, settings, prefix: to_tensorboard(
            logger.experiment, step, pictures=pictures, settings=settings, prefix=prefix
        )
    if is_a(logger, "MLFlowLogger"):
        return lambda step, pictures, settings, prefix: _to_mlflow(logger, pictures, settings, prefix)
    return None


def _to_mlflow(logger: Any, pictures: Mapping[str, bytes], settings: Mapping[str, Any], prefix: str) -> None:
    if settings:
        logger.log_hyperparams(dict(settings))
    for name, content in pictures.items():
        logger.experiment.log_image(logger.run_id, opened(content), artifact_file=f"{prefix}{name}.png")
