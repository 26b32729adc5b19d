"""The best existing checkpoint of a finished run, and why the other points are none: `ib-callback select`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ib_callback.common.errors import TrajectoryError
from ib_callback.results.metrics import Mode, metrics_of, resolve_metric
from ib_callback.results.phases import Phase, Phases
from ib_callback.results.selection import Candidate, Choice, SelectFrom, Selection
from ib_callback.results.trajectory import Trajectory
from ib_callback.run import checkpoints
from ib_callback.run.run_directory import find_run

_NO_CHECKPOINT = "no checkpoint"
_NOT_RECORDED = f"not in {checkpoints.FILENAME}"
# A table of more points than this shows those with a checkpoint, and so many of the best ones.
_LONG = 60
_BEST_SHOWN = 5
# Of the reason why a point could not be measured, in characters.
_LONGEST_REASON = 80
_NOISE = (
    "How the noise is estimated: from the scatter of the values of successive points about a smooth curve, over all "
    "points that count. What changes more slowly than from point to point is not seen, so that it may be larger."
)


@dataclass(frozen=True, kw_only=True)
class SelectReport:
    """What can be selected in a run.

    Attributes:
        choice: the best point of which a checkpoint exists, and all candidates.
        checkpoints: those that exist, by step, whether or not that step was measured.
        table: every candidate with its checkpoint, and why it is not the best.
        verdict: the result in words.
    """

    choice: Choice
    checkpoints: Mapping[int, Path]
    table: str
    verdict: str

    @property
    def path(self) -> Path | None:
        """The checkpoint of the best point; None if there is none."""
        step = None if self.choice.best is None else self.choice.best.measurement.step
        return None if step is None else self.checkpoints[step]

    @property
    def text(self) -> str:
        """The table and the verdict."""
        return f"{self.table}\n\n{self.verdict}"


@dataclass(frozen=True, kw_only=True)
class _Checkpoints:
    existing: dict[int, Path]
    missing: dict[int, str]  # by step, why there is none after all
    recorded: bool

    def rejected(self, candidate: Candidate) -> str | None:
        step = candidate.measurement.step
        if candidate.rejected == _NO_CHECKPOINT and step is not None:
            return self.missing.get(step, _NO_CHECKPOINT)
        return candidate.rejected


def select_report(
    run_dir: str | os.PathLike[str],
    *,
    by: str = "optimality",
    select_from: SelectFrom = "compression",
    mode: Mode | None = None,
    every_row: bool = False,
) -> SelectReport:
    """Choose among the checkpoints of a run, in HuggingFace's layout or in Lightning's.

    Args:
        run_dir: where `ib_trajectory.jsonl` lies, or a directory up to four levels above it.
        by: a metric as logged, without prefix, or a feature.
        select_from: "compression", "fit", or the first step that can be selected.
        mode: "min" or "max"; by default what is known to be better for the metric.
        every_row: show every point in the table, also of a run with more than 60 of them.

    Raises:
        TrajectoryError: no trajectory, or several, or a file that cannot be read.
        ValueError: no point has such a metric (the message lists those that exist), or a setting is out of range.
    """
    try:
        directory = find_run(Path(run_dir))
        found = _checkpoints(directory)
    except OSError as error:
        raise TrajectoryError(f"{run_dir} cannot be searched ({error}). Check its permissions") from error
    trajectory = Trajectory.load(directory)
    names = dict.fromkeys(name for m in trajectory if m.error is None for name in metrics_of(m))
    if names:
        # Before Selection asks for the mode of a metric that does not exist.
        resolve_metric(by, names)
    selection = Selection(by, mode, select_from)
    choice = selection.choose(trajectory, available=set(found.existing))
    phases = trajectory.phases()
    return SelectReport(
        choice=choice,
        checkpoints=found.existing,
        table=_table(selection, choice, phases.phases, found, every_row=every_row),
        verdict=_verdict(directory, selection, choice, phases, found),
    )


def _checkpoints(directory: Path) -> _Checkpoints:
    on_disk = checkpoints.find_checkpoints(directory)
    name = Path(checkpoints.FILENAME)
    # With that of an earlier run only, which was moved away, this run has saved nothing yet.
    recorded = (directory / name).exists() or next(directory.glob(f"{name.stem}.*{name.suffix}"), None) is not None
    if not recorded:
        return _Checkpoints(existing=on_disk, missing={}, recorded=False)
    # Checkpoints of an earlier run may lie in the same directory: the record alone tells whose they are.
    file = checkpoints.CheckpointFile(directory)
    missing = dict.fromkeys(on_disk, _NOT_RECORDED) | dict.fromkeys(file.recorded(), "deleted")
    return _Checkpoints(existing=file.existing(), missing=missing, recorded=True)


def _table(
    selection: Selection, choice: Choice, phases: Sequence[Phase], found: _Checkpoints, *, every_row: bool
) -> str:
    shown = _shown(selection, choice, found, every_row=every_row)
    rows = [("step", selection.by, "phase", "checkpoint", "")]
    for index in shown:
        candidate = choice.candidates[index]
        step = candidate.measurement.step
        path = None if step is None else found.existing.get(step)
        rows.append(
            (
                "-" if step is None else f"{step:,}",
                _number(candidate.value),
                phases[index].name.lower(),
                "-" if path is None else path.name,
                _remark(choice, candidate, found),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = (str.rjust, str.rjust, str.ljust, str.ljust, str.ljust)
    lines = [
        "  ".join(align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)).rstrip()
        for row in rows
    ]
    left_out = len(choice.candidates) - len(shown)
    if left_out:
        lines.append(
            f"({left_out:,} of {len(choice.candidates):,} points are left out, which have no checkpoint and are not "
            "among the best: --all shows them)"
        )
    return "\n".join(lines)


def _shown(selection: Selection, choice: Choice, found: _Checkpoints, *, every_row: bool) -> list[int]:
    candidates = choice.candidates
    if every_row or len(candidates) <= _LONG:
        return list(range(len(candidates)))
    sign = 1 if selection.mode == "min" else -1
    could_be = (None, _NO_CHECKPOINT)
    by_value = sorted(
        (sign * c.value, i) for i, c in enumerate(candidates) if c.value is not None and c.rejected in could_be
    )
    best = {index for _, index in by_value[:_BEST_SHOWN]}
    return [i for i, c in enumerate(candidates) if i in best or c.measurement.step in found.existing]


def _remark(choice: Choice, candidate: Candidate, found: _Checkpoints) -> str:
    if candidate is choice.best:
        return "best"
    if candidate is choice.runner_up:
        return "runner-up"
    reason = found.rejected(candidate) or ""
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[: _LONGEST_REASON - 1]}…"


def _verdict(directory: Path, selection: Selection, choice: Choice, phases: Phases, found: _Checkpoints) -> str:
    lines = [choice.describe()]
    if choice.noise is not None and choice.difference is not None:
        lines.append(_NOISE)
    best = choice.best
    better = [
        c
        for c in choice.candidates
        if c.rejected == _NO_CHECKPOINT
        and c.value is not None
        and (best is None or best.value is None or selection.better(c.value, than=best.value))
    ]
    if better:
        lines.append(_without_checkpoint(selection, better, found, any_best=best is not None))
    if any(found.rejected(c) == _NOT_RECORDED for c in choice.candidates):
        lines.append(f"Checkpoints that are {_NOT_RECORDED} are taken for those of another run in the same directory.")
    steps = {c.measurement.step for c in choice.candidates}
    unmeasured = [path.name for step, path in found.existing.items() if step not in steps]
    if unmeasured:
        which = ", ".join(unmeasured[:3]) + (", …" if len(unmeasured) > 3 else "")
        lines.append(
            f"Not among the candidates, for these steps were not measured: {len(unmeasured):,} of "
            f"{len(found.existing):,} checkpoints ({which}). ib.Meter measures them afterwards."
        )
    if not found.recorded and found.existing:
        lines.append(
            f"There is no {checkpoints.FILENAME}: whatever checkpoint lies in {directory} is taken for one of this run."
        )
    if best is None and any(c.measurement.error is None for c in choice.candidates):
        lines += _cure(selection, phases)
    elif best is not None:
        step = best.measurement.step
        assert step is not None  # else it could not have been selected
        lines.append(f"The best checkpoint: {found.existing[step]}")
    return "\n".join(lines)


def _without_checkpoint(
    selection: Selection, better: Sequence[Candidate], found: _Checkpoints, *, any_best: bool
) -> str:
    # Of equal values the earlier is the better, as in the choice.
    top = better[0]
    for candidate in better[1:]:
        if candidate.value is not None and top.value is not None and selection.better(candidate.value, than=top.value):
            top = candidate
    point = f"step {top.measurement.step:,} with {top.value:.4g} ({found.rejected(top)})"
    if not any_best:
        return f"Without a checkpoint, the best point is {point}."
    if len(better) == 1:
        return f"A better point has no checkpoint: {point}."
    return f"{len(better):,} better points have no checkpoint; the best of them is {point}."


def _cure(selection: Selection, phases: Phases) -> list[str]:
    if selection.select_from == "compression" and phases.compression_start is None:
        others = "--from STEP" if phases.fit_start is None else "--from fit, or from a step on with --from STEP"
        return [
            "The compression phase was not recognised in this run; many small models never compress. "
            f"Choose among earlier points with {others}."
        ]
    if selection.select_from == "fit" and phases.fit_start is None:
        return ["The fitting phase was not recognised in this run. Choose from a step on with --from STEP."]
    return []


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"
