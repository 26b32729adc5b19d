"""The best existing checkpoint of a finished run, and why the other points are none: `ib-callback select`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ib_callback import checkpoints
from ib_callback.errors import TrajectoryError
from ib_callback.metric_names import Mode
from ib_callback.selection import Choice, SelectFrom, Selection
from ib_callback.trajectory import Trajectory
from ib_callback.trajectory_lines import FILENAME

_NOISE = "Noise is estimated from the scatter of successive values about a smooth curve, over all points that count."


@dataclass(frozen=True, kw_only=True)
class SelectReport:
    """What can be selected in a run.

    Attributes:
        choice: the best point of which a checkpoint exists, and all candidates.
        path: the checkpoint of the best point; None if there is none.
        text: a table with all candidates, and the result in words.
    """

    choice: Choice
    path: Path | None
    text: str


def select_report(
    run_dir: str | os.PathLike[str],
    *,
    by: str = "optimality",
    select_from: SelectFrom = "compression",
    mode: Mode | None = None,
) -> SelectReport:
    """Choose among the checkpoints of a run, in HuggingFace's layout or in Lightning's.

    Args:
        run_dir: where `ib_trajectory.jsonl` lies, or a directory above it.
        by: a metric as logged, without prefix, or a feature.
        select_from: "compression", "fit", or the first step that can be selected.
        mode: "min" or "max"; by default what is known to be better for the metric.

    Raises:
        TrajectoryError: no trajectory, or several, or one that cannot be read.
        ValueError: no point has such a metric (the message lists those that exist), or a setting is out of range.
    """
    selection = Selection(by, mode, select_from)
    directory = _find(Path(run_dir))
    trajectory = Trajectory.load(directory)
    on_disk = checkpoints.find_checkpoints(directory)
    existing, recorded = on_disk, set(on_disk)
    if (directory / checkpoints.FILENAME).exists():
        # Checkpoints of an earlier run may lie in the same directory: the record alone tells whose they are.
        file = checkpoints.CheckpointFile(directory)
        existing, recorded = file.existing(), file.recorded()
    choice = selection.choose(trajectory, available=set(existing))
    rows = [("step", by, "phase", "checkpoint", "")]
    for candidate, phase in zip(choice.candidates, trajectory.phases().phases, strict=True):
        step = candidate.measurement.step
        verdict = candidate.rejected or ""
        if verdict == "no checkpoint" and step in recorded:
            verdict = "its checkpoint is gone"
        elif verdict == "no checkpoint" and step in on_disk:
            verdict = f"its checkpoint is not in {checkpoints.FILENAME}"
        verdict = "best" if candidate is choice.best else "runner-up" if candidate is choice.runner_up else verdict
        path = existing.get(-1 if step is None else step)
        value = "-" if candidate.value is None else f"{candidate.value:.4g}"
        name = "-" if path is None else path.name
        rows.append(("-" if step is None else f"{step:,}", value, phase.name.lower(), name, verdict))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(w) if i < 2 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines = [line.rstrip() for line in lines]
    lines += ["", choice.describe(), *([] if choice.noise is None else [_NOISE])]
    unconstrained = selection.best(trajectory)
    best = choice.best
    if unconstrained is not None and (best is None or unconstrained.step != best.measurement.step):
        reached = selection.value(unconstrained)
        lines.append(f"A better point, step {unconstrained.step:,} with {reached:.4g}, has no checkpoint.")
    step = None if best is None else best.measurement.step
    path = None if step is None else existing[step]
    if path is not None:
        lines.append(f"The best checkpoint: {path}")
    return SelectReport(choice=choice, path=path, text="\n".join(lines))


def _find(run_dir: Path) -> Path:
    """The directory of the one trajectory at or up to four levels below a directory."""
    if (run_dir / FILENAME).exists():
        return run_dir
    found = sorted({path.parent for depth in range(1, 5) for path in run_dir.glob("*/" * depth + FILENAME)})
    if len(found) > 1:
        raise TrajectoryError(
            f"{run_dir} has several runs: {', '.join(map(str, found))}. Give one of these directories."
        )
    if not found:
        raise TrajectoryError(
            f"no {FILENAME} in {run_dir} or up to four levels below. Give the output directory of a run that was "
            "followed by IBCallback, or write one with Trajectory.save."
        )
    return found[0]
