"""Finished runs and measured models into trackers, which refuse to write to past steps: so on an axis of their own.

No point is logged twice. TensorBoard's directory is asked what it has. Of Weights & Biases the server is asked, and
what was logged to a run of this id from this machine is written down beside W&B's own files, which holds offline too.
It cannot be known of an offline run that was logged on another machine, or whose directory was removed, and that the
server does not have yet. Where what is there has other numbers, of another model or probe, nothing is logged.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ib_callback.common import json_lines
from ib_callback.common.errors import TrajectoryError
from ib_callback.common.messages import describe
from ib_callback.common.optional import is_installed, require
from ib_callback.results.trajectory import Trajectory
from ib_callback.run.trackers import numbers
from ib_callback.run.wandb_log import AXIS, WandbLog, own_run

# Beside W&B's files of a run: the steps and numbers that were logged, a point a line.
_RECORD = "ib_logged.jsonl"
# How much numbers may differ that are the same: TensorBoard has them in float32.
_ROUNDING = 1e-5
# What another measurement of the same weights may have otherwise.
_NOT_MEASURED = ("ib/seconds", "ib/overhead", "ib/phase")
_PREFIX = "ib/"
_PLANE = "plane"


@dataclass(frozen=True, kw_only=True)
class Backfilled:
    """What came of one run or model.

    Attributes:
        model: its name.
        where: the run of W&B, or the directory of TensorBoard.
        logged: points that were logged now.
        known: points that were there already.
        missing: points that could not be measured, which have no numbers to log.
        without_step: points that have no place on the axis.
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
    """A name as part of the id of a run and of a path.

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
) -> Iterator[Backfilled]:
    """Log runs to Weights & Biases: a row a point on the axis `ib/step`, a table of all points and the plane.

    A run of that id that exists is resumed, online; offline W&B joins them when they are synchronised.

    Args:
        courses: names and trajectories.
        run_id: of the run; of several each has its own, `run_id-name`, in a group of the name `run_id`.
        project: of W&B; None: its default.
        entity: likewise.
        group: of the runs.
        pictures: whether to draw the plane, if Matplotlib is installed.

    Raises:
        ImportError: W&B is not installed.
        TrajectoryError: the run has numbers of a callback, on the axis of its training; or the server cannot be asked
            what it has.
    """
    if re.search(r"[/\\#?%:]", run_id):
        raise ValueError(f"expected the id of a run, without any of / \\ # ? % :, got {run_id!r}")
    several = len(courses) > 1
    for (model, trajectory), part in zip(courses, _slugs(courses), strict=True):
        name = f"{run_id}-{part}" if several else run_id
        group = group or (run_id if several else None)
        with own_run(project=project, entity=entity, group=group, id=name, resume="allow") as run:
            if not (run.offline or run.resumed):  # a run that exists keeps its name
                run.name = model
            folder, key = Path(run.dir).parent, f"{run.project}/{name}"
            points, result = _points(model, trajectory, _recorded(folder, key) | _on_server(run), "")
            rows = WandbLog(AXIS, strict=True)
            rows.config = {"ib_model": model}
            for point in points:
                rows.log(run, point.metrics, step=point.step)
                with open(folder / _RECORD, "a", encoding="utf-8") as record:
                    record.write(json.dumps({"run": key, "step": point.step, "metrics": point.metrics}) + "\n")
            if points:
                last = max(point.step for point in points)
                drawn = _drawn(trajectory, model, encoded=True) if pictures else None
                rows.finish(run, trajectory, _summary(trajectory), step=last, pictures=drawn and {_PLANE: drawn})
            where = str(folder) if run.offline or run.url is None else run.url
        yield replace(result, where=where)


def to_tensorboard(
    courses: Sequence[tuple[str, Trajectory]], directory: Path, *, pictures: bool = True
) -> Iterator[Backfilled]:
    """Write runs as TensorBoard's event files: a scalar for each number under its logged name, and the plane.

    Args:
        courses: names and trajectories.
        directory: for the event files; of several each has a folder in it.
        pictures: whether to draw the plane, if Matplotlib is installed.

    Raises:
        ImportError: TensorBoard is not installed.
        OSError: the directory cannot be written.
    """
    require("tensorboard", extra="tensorboard", purpose="Logging to TensorBoard")
    from torch.utils.tensorboard import SummaryWriter

    for (model, trajectory), part in zip(courses, _slugs(courses), strict=True):
        folder = directory / part if len(courses) > 1 else directory
        points, result = _points(model, trajectory, _in_events(folder), str(folder))
        if points:
            with SummaryWriter(str(folder)) as writer:
                for point in points:
                    for name, value in point.metrics.items():
                        writer.add_scalar(name, value, point.step)
                figure = _drawn(trajectory, model, encoded=False) if pictures else None
                if figure is not None:
                    writer.add_figure(f"{_PREFIX}{_PLANE}", figure, max(point.step for point in points))
        yield result


def _slugs(courses: Sequence[tuple[str, Trajectory]]) -> list[str]:
    names = [slug(model) for model, _ in courses]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"expected names that differ as parts of a path, got {twice} twice. Log them one by one")
    return names


def _points(model: str, trajectory: Trajectory, there: There, where: str) -> tuple[list[_Point], Backfilled]:
    """What is to be logged: metrics, and the phase as it was known at each point, as while it trains.

    Raises:
        TrajectoryError: what is there at a step has other numbers.
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
            metrics = numbers(point, _PREFIX)
            if step in there:
                _check_equal(model, step, metrics, there[step])
                known += 1
            else:
                found.append(_Point(step, metrics if phase is None else metrics | {f"{_PREFIX}phase": float(phase)}))
    result = Backfilled(
        model=model, where=where, logged=len(found), known=known, missing=missing, without_step=without_step
    )
    return found, result


def _check_equal(model: str, step: int, ours: dict[str, float], theirs: dict[str, float]) -> None:
    for name in (name for name in ours if name in theirs and name not in _NOT_MEASURED):
        if not math.isclose(ours[name], theirs[name], rel_tol=_ROUNDING, abs_tol=_ROUNDING**2):
            raise TrajectoryError(
                f"{model}: expected a place without step {step:,}, or with the same numbers, got {name} "
                f"{theirs[name]:.6g} there and {ours[name]:.6g} here: of another model, probe or setting. Give another "
                "place"
            )


def _summary(trajectory: Trajectory) -> dict[str, float | str]:
    """When phases began, and the lowest held-out loss, for the summary of a run."""
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
    return {f"{_PREFIX}{name}": value for name, value in values.items() if value is not None}


def _drawn(trajectory: Trajectory, model: str, *, encoded: bool) -> Any:
    """The plane as a figure, or as the content of a PNG file; None where it cannot be drawn."""
    if not is_installed("matplotlib") or not any(point.orders for point in trajectory):
        return None
    from ib_callback import plot

    figure = plot.information_plane(trajectory, title=model)
    return plot.encoded(figure) if encoded else figure


# --- what is there already


def _recorded(folder: Path, key: str) -> There:
    """What was logged before from this machine to that run, whose directories lie beside this one's.

    The names of directories do not tell: W&B numbers those of one second, as an id may be.
    """
    found: There = {}
    for record in sorted(folder.parent.glob(f"*/{_RECORD}")):
        for line in record.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # torn
                point = json_lines.parsed(line)
                if point["run"] == key:
                    found[point["step"]] = point["metrics"]
    return found


def _on_server(run: Any) -> There:
    """What the server has of a run that was resumed; nothing offline, where nobody can be asked."""
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
    return numbers_of(rows, run.id)


def numbers_of(rows: Sequence[dict[str, Any]], run_id: str) -> There:
    """The numbers of this package in rows of W&B, by step.

    Raises:
        TrajectoryError: some have another axis: they are those of a callback in the run of its training.
    """
    found: There = {}
    for row in rows:
        numbers = {name: value for name, value in row.items() if _is_number(name, value)}
        if numbers and row.get(AXIS) is None:
            raise TrajectoryError(
                f"the run {run_id} has {_PREFIX}… on the axis of its training, as a callback logs them: these points "
                "would be there twice. Give another --wandb"
            )
        if numbers:
            found.setdefault(int(row[AXIS]), {}).update(numbers)
    return found


def _is_number(name: str, value: object) -> bool:
    return name.startswith(_PREFIX) and name != AXIS and isinstance(value, (int, float))


def _in_events(folder: Path) -> There:
    """The numbers of this package in all event files of a directory, by step."""
    if not any(folder.glob("*tfevents*")):
        return {}
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1})
    events.Reload()
    found: There = {}
    for name in (name for name in events.Tags()["scalars"] if name.startswith(_PREFIX)):
        for event in events.Scalars(name):
            found.setdefault(event.step, {})[name] = event.value
    return found
