"""Measurements as rows of a Weights & Biases run that the trainer or the user has opened."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ib_callback.common.messages import describe, warn
from ib_callback.common.optional import require
from ib_callback.results.trajectory import Trajectory
from ib_callback.run.names import DEFAULT_PREFIX
from ib_callback.run.trackers import PLANE, caption, opened

TABLE = "trajectory"
# The axis of runs that no trainer writes to: optimizer steps. In a live run, past steps cannot be written to.
AXIS = "ib/step"


def open_run() -> Any | None:
    """The W&B run that is open in this process, or None. This does not import W&B."""
    wandb = sys.modules.get("wandb")
    return getattr(wandb, "run", None)


@contextmanager
def own_run(**settings: Any) -> Iterator[Any]:
    """Open a run of Weights & Biases with the axis `ib/step`, and finish it at the end.

    Args:
        **settings: arguments of `wandb.init`: project, entity, group, and so on.

    Raises:
        ImportError: W&B is not installed.
        ValueError: the run cannot be opened: no login, no network, no such project.
    """
    wandb = require("wandb", extra="wandb", purpose="Logging to Weights & Biases")
    try:
        run = wandb.init(**settings)
    except wandb.Error as error:
        raise ValueError(
            f"Weights & Biases cannot open the run ({_describe(error)}). Log in with wandb login, or set "
            "WANDB_MODE=offline"
        ) from error
    try:
        yield run
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


class WandbLog:
    """Adds rows to an open run, each with the training step as a column of its own.

    W&B's own `step=` is never given. With it, W&B would drop rows whose step is lower than the last one, and merge rows
    that share a step with the trainer's rows.

    Args:
        step_metric: name of that column, which the trainer's own rows have too.
        strict: whether a failure is an error. By default it is a warning, because a failing log must not end a run.
        prefix: prefix of the logged keys.

    Attributes:
        config: what goes into the configuration of each run.
        phase: the phase as known at the last point, in one word, for the captions of pictures.
    """

    def __init__(self, step_metric: str, *, strict: bool = False, prefix: str = DEFAULT_PREFIX) -> None:
        self.step_metric = step_metric
        self._strict = strict
        self._prefix = prefix
        self.phase: str | None = None
        self.config: dict[str, Any] = {}
        self._described: list[Any] = []  # runs that have been told which column is the step
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, by copy or pickle, has no run. W&B refuses to pickle one, and it belongs to this process alone."""
        return {**vars(self), "_described": []}

    def log(
        self,
        run: Any,
        metrics: Mapping[str, float],
        *,
        step: int,
        plane: Path | None = None,
        pictures: Mapping[str, bytes] | None = None,
    ) -> None:
        """Log one row. A failure is a warning unless `strict`, because a failing log must not end a run.

        Args:
            run: the open run.
            metrics: scalars by full name.
            step: optimizer steps taken.
            plane: image file of the information plane to log with the row.
            pictures: further images to log with the row, PNG by name.
        """
        try:
            row: dict[str, Any] = {**metrics, **self._images(plane, pictures, step)}
            if not row:
                return
            if not any(run is known for known in self._described):
                run.define_metric(f"{self._prefix}*", step_metric=self.step_metric)
                self._described.append(run)
                if self.config and hasattr(run, "config"):
                    run.config.update(self.config, allow_val_change=True)
            run.log({**row, self.step_metric: step})
        except Exception as error:
            if self._strict:
                raise
            self._warn(f"The information plane could not be logged to Weights & Biases: {_describe(error)}")

    def finish(
        self,
        run: Any,
        trajectory: Trajectory,
        summary: Mapping[str, float | str],
        *,
        step: int,
        plane: Path | None = None,
        pictures: Mapping[str, bytes] | None = None,
    ) -> None:
        """Log the whole trajectory as a table, the last plane, and the summary of the run. Failures as in `log`.

        Args:
            run: the open run.
            trajectory: all points, one row per point.
            summary: values for the run's summary by full name.
            step: optimizer steps taken.
            plane: image file of the information plane, if it has changed.
            pictures: further images that have changed, PNG by name.
        """
        try:
            table: dict[str, Any] = {}
            if trajectory:
                columns, rows = _table(trajectory)
                table = {f"{self._prefix}{TABLE}": sys.modules["wandb"].Table(columns=columns, data=rows)}
            row = {**table, **self._images(plane, pictures, step)}
            if row:
                run.log({**row, self.step_metric: step})
            run.summary.update(dict(summary))
        except Exception as error:
            if self._strict:
                raise
            self._warn(f"The trajectory could not be logged to Weights & Biases: {_describe(error)}")

    def _images(self, plane: Path | None, pictures: Mapping[str, bytes] | None, step: int) -> dict[str, Any]:
        given: dict[str, Path | bytes] = {} if plane is None else {PLANE: plane}
        given |= pictures or {}
        images = {}
        for name, source in given.items():
            try:
                image = str(source) if isinstance(source, Path) else opened(source)
                images[f"{self._prefix}{name}"] = sys.modules["wandb"].Image(
                    image, caption=caption(name, step, self.phase)
                )
            except Exception as error:  # the scalars can still be logged
                told = source.name if isinstance(source, Path) else name
                self._warn(f"{told} could not be logged to Weights & Biases: {_describe(error)}")
        return images

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(f"{message}. Training goes on; the trajectory file has every point.", stacklevel=3)


def _table(trajectory: Trajectory) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: the step, the phase as known at the end, every number, and why a point is missing.

    A number that is undefined at every point has no column.
    """
    scalars = [point.scalars() for point in trajectory]
    names = list(dict.fromkeys(name for values in scalars for name, value in values.items() if value is not None))
    phases = trajectory.phases().phases
    rows = [
        [point.step, None if phase is None else int(phase), *(values.get(name) for name in names), point.error]
        for point, phase, values in zip(trajectory, phases, scalars, strict=True)
    ]
    return ["step", "phase", *names, "error"], rows


def _describe(error: Exception) -> str:
    return describe(error).rstrip(". ")
