"""Logging finished runs and measured models to trackers, on a separate axis because trackers refuse past steps.

No point is logged twice. For TensorBoard, the event files in its directory show what is there. For Weights & Biases,
the server is asked. What this machine has logged to a run is also recorded beside W&B's own files, so it is known
offline too. One case cannot be known: an offline run that the server does not have yet, if it was logged on another
machine or its directory was removed. If the numbers that are there differ, because they come from another model or
probe, nothing is logged.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ib_callback.common import json_lines
from ib_callback.common.errors import TrajectoryError
from ib_callback.common.messages import describe
from ib_callback.common.optional import is_installed, require
from ib_callback.results.trajectory import Trajectory
from ib_callback.run.names import DEFAULT_PREFIX, Names
from ib_callback.run.trackers import numbers
from ib_callback.run.wandb_log import AXIS, WandbLog, own_run

# Beside W&B's files of a run: the steps and numbers that were logged, one line per point.
_RECORD = "ib_logged.jsonl"
# How much equal numbers may differ, because TensorBoard has them in float32.
_ROUNDING = 1e-5
# These may differ in another measurement of the same weights.
_NOT_MEASURED = ("seconds", "overhead", "phase")
_PLANE = "plane"


@dataclass(frozen=True, kw_only=True)
class Backfilled:
    """The result of logging one run or model.

    Attributes:
        model: name of the run or model.
        where: the run of W&B, or the directory of TensorBoard.
        logged: number of points that were logged now.
        known: number of points that were there already.
        missing: number of points that could not be measured, so that they have no numbers to log.
        without_step: number of points without a step, which have no place on the axis.
    """

    model: str
    where: str
    logged: int
    known: int
    missing: int
    without_step: int

    def __str__(self) -> str:
        parts = [f"{self.logged} points logged"]
        parts += [f"{self.known} were there already"] if self.known else []
        parts += [f"{self.missing} could not be measured"] if self.missing else []
        parts += [f"{self.without_step} have no step, so they have no place on the axis"] if self.without_step else []
        return f"{self.model}: {'; '.join(parts)}: {self.where}"


@dataclass(frozen=True)
class _Point:
    step: int
    metrics: dict[str, float]


# Numbers by step and name.
There = dict[int, dict[str, float]]


def slug(model: str) -> str:
    """A name in a form that can be part of a run's id and of a path.

    >>> slug("EleutherAI/pythia-14m stage1")
    'EleutherAI-pythia-14m-stage1'
    """
    return re.sub(r"[^\w.-]+", "-", model).strip("-") or "run"


def to_wandb(
    courses: Sequence[tuple[str, Trajectory]],
    run_id: str,
    *,
    project: str | None = None,
    entity: str | None = None,
    group: str | None = None,
    pictures: bool = True,
    prefixes: Mapping[str, str] | None = None,
) -> Iterator[Backfilled]:
    """Log runs to Weights & Biases: one row per point on the axis `ib/step`, a table of all points and the plane.

    Online, an existing run with that id is resumed. Offline, W&B joins the two when they are synchronised.

    Args:
        courses: names and trajectories.
        run_id: id of the run. With several courses, each has a run `run_id-name`, by default in the group `run_id`.
        project: project of W&B. None: the default of W&B.
        entity: entity of W&B. None: the default of W&B.
        group: group of the runs.
        pictures: whether to draw the plane, if Matplotlib is installed.
        prefixes: prefix of the keys by name of a course; by default "ib/".

    Raises:
        ImportError: W&B is not installed.
        TrajectoryError: the run has numbers that a callback logged on the axis of its training, or the server cannot
            be asked what it has.
    """
    if re.search(r"[/\\#?%:]", run_id):
        raise ValueError(f"expected the id of a run, without any of / \\ # ? % :, got {run_id!r}")
    several = len(courses) > 1
    for (model, trajectory), part in zip(courses, _slugs(courses), strict=True):
        name = f"{run_id}-{part}" if several else run_id
        prefix = (prefixes or {}).get(model, DEFAULT_PREFIX)
        group = group or (run_id if several else None)
        with own_run(project=project, entity=entity, group=group, id=name, resume="allow") as run:
            if not (run.offline or run.resumed):  # a run that exists keeps its name
                run.name = model
            folder, key = Path(run.dir).parent, f"{run.project}/{name}"
            points, result = _points(model, trajectory, _there(run, folder, key, prefix), "", prefix)
            rows = WandbLog(AXIS, strict=True, prefix=prefix)
            rows.config = {f"{Names(prefix).stem}_model": model}
            for point in points:
                rows.log(run, point.metrics, step=point.step)
                with open(folder / _RECORD, "a", encoding="utf-8") as record:
                    record.write(json.dumps({"run": key, "step": point.step, "metrics": point.metrics}) + "\n")
            if points:
                last = max(point.step for point in points)
                drawn = _drawn(trajectory, model, encoded=True) if pictures else None
                summary = _summary(trajectory, prefix)
                rows.finish(run, trajectory, summary, step=last, pictures=drawn and {_PLANE: drawn})
            where = str(folder) if run.offline or run.url is None else run.url
        yield replace(result, where=where)


def to_tensorboard(
    courses: Sequence[tuple[str, Trajectory]],
    directory: Path,
    *,
    pictures: bool = True,
    prefixes: Mapping[str, str] | None = None,
) -> Iterator[Backfilled]:
    """Write runs as event files of TensorBoard: each number as a scalar under its logged name, and the plane.

    Args:
        courses: names and trajectories.
        directory: where the event files go. With several courses, each has a folder in it.
        pictures: whether to draw the plane, if Matplotlib is installed.
        prefixes: prefix of the keys by name of a course; by default "ib/".

    Raises:
        ImportError: TensorBoard is not installed.
        OSError: the directory cannot be written.
    """
    require("tensorboard", extra="tensorboard", purpose="Logging to TensorBoard")
    from torch.utils.tensorboard import SummaryWriter

    for (model, trajectory), part in zip(courses, _slugs(courses), strict=True):
        folder = directory / part if len(courses) > 1 else directory
        prefix = (prefixes or {}).get(model, DEFAULT_PREFIX)
        points, result = _points(model, trajectory, _in_events(folder, prefix), str(folder), prefix)
        if points:
            with SummaryWriter(str(folder)) as writer:
                for point in points:
                    for name, value in point.metrics.items():
                        writer.add_scalar(name, value, point.step)
                figure = _drawn(trajectory, model, encoded=False) if pictures else None
                if figure is not None:
                    writer.add_figure(f"{prefix}{_PLANE}", figure, max(point.step for point in points))
        yield result


def _slugs(courses: Sequence[tuple[str, Trajectory]]) -> list[str]:
    names = [slug(model) for model, _ in courses]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"expected names that differ as parts of a path, got {twice} twice. Log them one by one")
    return names


def _points(
    model: str, trajectory: Trajectory, there: There, where: str, prefix: str
) -> tuple[list[_Point], Backfilled]:
    """What to log: metrics, and the phase as it was known at each point, as during training.

    Raises:
        TrajectoryError: there are other numbers at one of the steps.
    """
    found, known, missing, without_step = [], 0, 0, 0
    phases = trajectory.phases().known
    alone = len(trajectory) == 1
    for point, phase in zip(trajectory, phases, strict=True):
        step = 0 if point.step is None and alone else point.step
        if point.error is not None:
            missing += 1
        elif step is None:
            without_step += 1
        else:
            metrics = numbers(point, prefix)
            if step in there:
                _check_equal(model, step, metrics, there[step], [f"{prefix}{name}" for name in _NOT_MEASURED])
                known += 1
            else:
                found.append(_Point(step, metrics if phase is None else metrics | {f"{prefix}phase": float(phase)}))
    result = Backfilled(
        model=model, where=where, logged=len(found), known=known, missing=missing, without_step=without_step
    )
    return found, result


def _check_equal(
    model: str, step: int, ours: dict[str, float], theirs: dict[str, float], apart_from: Sequence[str]
) -> None:
    for name in (name for name in ours if name in theirs and name not in apart_from):
        if not math.isclose(ours[name], theirs[name], rel_tol=_ROUNDING, abs_tol=_ROUNDING**2):
            raise TrajectoryError(
                f"{model}: expected a place without step {step:,}, or with the same numbers, got {name} "
                f"{theirs[name]:.6g} there and {ours[name]:.6g} here: of another model, probe or setting. Give another "
                "place"
            )


def _summary(trajectory: Trajectory, prefix: str) -> dict[str, float | str]:
    """The steps at which phases began and the lowest held-out loss, for the summary of a run."""
    phases = trajectory.phases()
    values: dict[str, float | str | None] = {
        "fit_start": phases.fit_start,
        "compression_start": phases.compression_start,
        "memorising_start": phases.memorising_start,
        "phases_read_on": phases.plane,
    }
    losses = [point for point in trajectory if point.loss is not None]
    if losses:
        lowest = min(losses, key=lambda point: point.loss or 0.0)
        values |= {"lowest_loss": lowest.loss, "lowest_loss_step": lowest.step}
    return {f"{prefix}{name}": value for name, value in values.items() if value is not None}


def _drawn(trajectory: Trajectory, model: str, *, encoded: bool) -> Any:
    """The plane as a figure, or as the content of a PNG file; None if it cannot be drawn."""
    if not is_installed("matplotlib") or not any(point.orders for point in trajectory):
        return None
    from ib_callback import plot

    figure = plot.information_plane(trajectory, title=model)
    return plot.encoded(figure) if encoded else figure


# --- what is there already


def _there(run: Any, folder: Path, key: str, prefix: str) -> There:
    """What a run of W&B has of one prefix, as far as it is known."""
    found = _recorded(folder, key, prefix)
    for step, metrics in _on_server(run, prefix).items():
        found.setdefault(step, {}).update(metrics)
    return found


def _recorded(folder: Path, key: str, prefix: str) -> There:
    """What this machine logged to that run before. The run's other directories are beside this one.

    The names of the directories do not tell which run they belong to. W&B adds a number to the names of directories
    made within one second, and an id may look like such a number.
    """
    found: There = {}
    for record in sorted(folder.parent.glob(f"*/{_RECORD}")):
        for line in record.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # a torn line
                point = json_lines.parsed(line)
                metrics = {name: value for name, value in point["metrics"].items() if _is_number(name, value, prefix)}
                if point["run"] == key and metrics:
                    found.setdefault(point["step"], {}).update(metrics)
    return found


def _on_server(run: Any, prefix: str = DEFAULT_PREFIX) -> There:
    """What the server has of a resumed run; nothing offline, because the server cannot be asked."""
    if run.offline or not run.resumed:
        return {}
    wandb = require("wandb", extra="wandb", purpose="Logging to Weights & Biases")
    try:
        rows = list(wandb.Api().run(f"{run.entity}/{run.project}/{run.id}").scan_history())
    except Exception as error:
        raise TrajectoryError(
            f"the run {run.id} exists, but its points cannot be read ({describe(error)}): points could be logged "
            "twice. Give another --wandb"
        ) from error
    return numbers_of(rows, run.id, prefix)


def numbers_of(rows: Sequence[dict[str, Any]], run_id: str, prefix: str = DEFAULT_PREFIX) -> There:
    """The numbers of this package in rows of W&B, by step.

    Raises:
        TrajectoryError: some numbers are on another axis, because a callback logged them in the run of its training.
    """
    found: There = {}
    for row in rows:
        numbers = {name: value for name, value in row.items() if _is_number(name, value, prefix)}
        if numbers and row.get(AXIS) is None:
            raise TrajectoryError(
                f"the run {run_id} has {prefix}… on the axis of its training, as a callback logs them: these points "
                "would be there twice. Give another --wandb"
            )
        if numbers:
            found.setdefault(int(row[AXIS]), {}).update(numbers)
    return found


def _is_number(name: str, value: object, prefix: str) -> bool:
    return name.startswith(prefix) and name != AXIS and isinstance(value, (int, float))


def _in_events(folder: Path, prefix: str) -> There:
    """The numbers of one prefix in all event files of a directory, by step."""
    if not any(folder.glob("*tfevents*")):
        return {}
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1})
    events.Reload()
    found: There = {}
    for name in (name for name in events.Tags()["scalars"] if name.startswith(prefix)):
        for event in events.Scalars(name):
            found.setdefault(event.step, {})[name] = event.value
    return found
