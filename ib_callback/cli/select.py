"""`ib-callback select`: the best existing checkpoint of a finished run, and why each other point was rejected."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from ib_callback.common.errors import TrajectoryError
from ib_callback.results.guard import Guard
from ib_callback.results.lines import read_rows
from ib_callback.results.measurement import Measurement, metrics_of
from ib_callback.results.metrics import Mode, chance_of, resolve_metric, spelled
from ib_callback.results.phases import Phases
from ib_callback.results.results import Results
from ib_callback.results.selection import NO_CHECKPOINT, Candidate, Choice, SelectFrom, Selection
from ib_callback.results.trajectory import Trajectory, aligned, cell
from ib_callback.run import checkpoints
from ib_callback.run.names import Names
from ib_callback.run.trajectory_file import find_trajectory

# Longest reason why a point could not be measured, in characters.
_LONGEST_REASON = 80
_NOISE = (
    "The noise is estimated from the scatter of successive values about a smooth curve, over all points that count. "
    "This misses slower changes, so the true noise may be larger."
)


@dataclass(frozen=True, kw_only=True)
class SelectReport:
    """The points of a run that can be selected, and the best of them.

    Attributes:
        choice: the best point with an existing checkpoint, and all candidates.
        checkpoints: existing checkpoints by step, also of steps that were not measured.
        table: every candidate with its checkpoint, and why it is not the best.
        rows: the same with full numbers and paths, for other programs.
        verdict: the result in words.
    """

    choice: Choice
    checkpoints: Mapping[int, Path]
    table: str
    verdict: str
    rows: list[dict[str, Any]]

    @property
    def path(self) -> Path | None:
        """The checkpoint of the best point; None if there is none."""
        return _checkpoint_of(self.choice.best, self.checkpoints)

    @property
    def text(self) -> str:
        """The table and the verdict."""
        return f"{self.table}\n\n{self.verdict}"


def select_report(
    run_dir: str | os.PathLike[str],
    *,
    by: str = "optimality",
    select_from: SelectFrom = "compression",
    mode: Mode | None = None,
    model: str | None = None,
    guard: Guard = "run",
    prefix: str | None = None,
) -> SelectReport:
    """Select the best checkpoint of a run, in HuggingFace's or Lightning's layout, with the run's own phase rule.

    Args:
        run_dir: the output directory of a run, or a directory up to four levels above it; or a file of a trajectory or
            of results. For a file of results, the measured checkpoints are the candidates.
        by: a metric as logged, with or without prefix, or the name of a feature.
        select_from: "compression", "fit", or the first step that can be selected.
        mode: "min" or "max"; by default the better direction of the metric, if known.
        model: name of the model, for a file of results with several models.
        guard: as for `Selection`; "run": the guard of the run.
        prefix: which trajectory to take of a directory, by the prefix of its keys; None: the only one.

    Raises:
        TrajectoryError: there is no trajectory, there are several, or a file cannot be read.
        ValueError: no point has this metric (the message lists existing metrics), or a setting is out of range.
    """
    try:
        run = _load(Path(run_dir), model, prefix)
    except OSError as error:
        raise TrajectoryError(f"{run_dir} cannot be searched ({error}). Check its permissions") from error
    trajectory, existing, missing = run.trajectory, run.existing, run.missing
    names = dict.fromkeys(name for m in trajectory if m.error is None for name in metrics_of(m))
    if by not in names and f"{by}/information" not in names:
        by = by.removeprefix(run.names.prefix)
    if names:
        # Checked first, because for an unknown metric Selection would ask for a mode.
        resolve_metric(by, names)
        by = spelled(by, names) or by
    guard = trajectory.guard if guard == "run" else guard
    selection = Selection(by, mode, select_from, trajectory.phase_rule, guard=guard)
    choice = selection.choose(trajectory, available=existing)
    phases = trajectory.phases(selection.rule)
    # Points that lack only a checkpoint, with the reason why there is none.
    ranked = selection.ranked(c for c in choice.candidates if c.rejected in (None, NO_CHECKPOINT))
    remarks = [_remark(choice, candidate, missing or {}) for candidate in choice.candidates]
    verdict = [
        choice.describe(),
        *([_NOISE] if choice.noise is not None and choice.difference is not None else []),
        *_without_checkpoint(selection, choice.best, ranked, missing or {}),
        *_about_checkpoints(run, choice),
    ]
    if choice.best is not None:
        verdict.append(f"The best checkpoint: {_checkpoint_of(choice.best, existing)}")
    elif names:
        if choice.fallback is not None:
            loss = choice.fallback.measurement.loss
            which = (
                "The latest checkpoint" if loss is None else f"The checkpoint with the lowest held-out loss, {loss:.3f}"
            )
            verdict.append(f"{which}: {_checkpoint_of(choice.fallback, existing)}")
        verdict += _cure(select_from, phases)
    return SelectReport(
        choice=choice,
        checkpoints=existing,
        table=_table(selection.by, choice, phases, existing, remarks),
        verdict="\n".join(verdict),
        rows=[
            {
                "step": candidate.measurement.step,
                selection.by: candidate.value,
                "phase": None if phase is None else phase.name.lower(),
                "checkpoint": None if (path := _checkpoint_of(candidate, existing)) is None else str(path),
                "remark": remark or None,
            }
            for candidate, phase, remark in zip(choice.candidates, phases.phases, remarks, strict=True)
        ],
    )


@dataclass(frozen=True)
class _Run:
    """A run or a model of a file of results.

    Attributes:
        directory: the directory of a run; None for results.
        names: the names of the run's files.
        trajectory: the points.
        existing: the checkpoints by step.
        missing: why checkpoints of other steps do not count, by step; None if no record lists the run's checkpoints.
    """

    directory: Path | None
    names: Names
    trajectory: Trajectory
    existing: Mapping[int, Path]
    missing: Mapping[int, str] | None


def _load(path: Path, model: str | None, prefix: str | None) -> _Run:
    path = find_trajectory(path, prefix)
    names = Names.of(path)
    trajectory = Trajectory.load(path, model)
    if all(origin is None for origin, _ in read_rows(path)):
        return _Run(path.parent, names, trajectory, *_checkpoints(path.parent, names))
    results = Results.load(path)
    name = next(iter(results)) if model is None else model
    sources = {
        point.step: Path(origin.source)
        for origin, point in zip(results.origins(name), results[name], strict=True)
        if point.step is not None and origin.source is not None
    }
    existing = {step: source for step, source in sources.items() if source.exists() or not source.is_absolute()}
    return _Run(None, names, trajectory, existing, dict.fromkeys(sources, "deleted"))


def _checkpoints(directory: Path, names: Names) -> tuple[dict[int, Path], dict[int, str] | None]:
    """The checkpoints of a run, and by step why others do not count; None if no record lists its checkpoints."""
    on_disk = checkpoints.find_checkpoints(directory)
    name = Path(names.checkpoints)
    # If only the record of an earlier run exists, which was moved away, this run has saved nothing yet.
    if not (directory / name).exists() and not any(directory.glob(f"{name.stem}.*{name.suffix}")):
        return on_disk, None
    # Checkpoints of an earlier run may be in the same directory; only the record says which belong to this run.
    file = checkpoints.CheckpointFile(directory, name=names.checkpoints)
    return file.existing(), dict.fromkeys(on_disk, _not_recorded(names)) | dict.fromkeys(file.recorded(), "deleted")


def _not_recorded(names: Names) -> str:
    return f"not in {names.checkpoints}"


def _checkpoint_of(candidate: Candidate | None, existing: Mapping[int, Path]) -> Path | None:
    step = None if candidate is None else candidate.measurement.step
    return None if step is None else existing.get(step)


def _table(by: str, choice: Choice, phases: Phases, existing: Mapping[int, Path], remarks: Sequence[str]) -> str:
    chances = [_by_chance(by, candidate.measurement) for candidate in choice.candidates]
    is_known = any(chance is not None for chance in chances)
    rows = [("step", by, *(["by chance"] if is_known else []), "phase", "checkpoint", "")]
    for chance, candidate, phase, remark in zip(chances, choice.candidates, phases.phases, remarks, strict=True):
        step, path = candidate.measurement.step, _checkpoint_of(candidate, existing)
        rows.append(
            (
                "-" if step is None else f"{step:,}",
                cell(candidate.value),
                *([cell(chance)] if is_known else []),
                "-" if phase is None else phase.name.lower(),
                "-" if path is None else path.name,
                remark,
            )
        )
    numbers = [str.rjust] * (len(rows[0]) - 3)
    return "\n".join(aligned(rows, (*numbers, str.ljust, str.ljust, str.ljust)))


def _by_chance(by: str, measurement: Measurement) -> float | None:
    """The number that chance alone would give in place of the metric."""
    scalars = measurement.scalars()
    full = f"{by}/information" if f"{by}/information" in scalars else by
    name = chance_of(full, primary=measurement.primary, bound=measurement.settings.get("bound", "diagonal"))
    return None if name is None else scalars.get(name)


def _reason(candidate: Candidate, missing: Mapping[int, str]) -> str:
    if candidate.rejected == NO_CHECKPOINT and candidate.measurement.step is not None:
        return missing.get(candidate.measurement.step, NO_CHECKPOINT)
    return candidate.rejected or ""


def _remark(choice: Choice, candidate: Candidate, missing: Mapping[int, str]) -> str:
    if candidate is choice.best:
        return "best"
    if candidate is choice.runner_up:
        return "runner-up"
    reason = _reason(candidate, missing)
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[: _LONGEST_REASON - 1]}…"


def _without_checkpoint(
    selection: Selection, best: Candidate | None, ranked: Sequence[Candidate], missing: Mapping[int, str]
) -> list[str]:
    """Sentences about points that would be better but have no checkpoint."""
    least = None if best is None else best.value
    better = list(takewhile(lambda c: least is None or selection.better(c.value or 0.0, than=least), ranked))
    if not better:
        return []
    point = f"step {better[0].measurement.step:,} with {better[0].value:.4g} ({_reason(better[0], missing)})"
    if best is None:
        return [f"The best point has no checkpoint: {point}."]
    if len(better) == 1:
        return [f"Another point would be better but has no checkpoint: {point}."]
    return [f"{len(better):,} points would be better but have no checkpoint; the best of them is {point}."]


def _about_checkpoints(run: _Run, choice: Choice) -> list[str]:
    lines, existing = [], run.existing
    without_record = _not_recorded(run.names)
    if any(_reason(candidate, run.missing or {}) == without_record for candidate in choice.candidates):
        lines.append(f"Checkpoints {without_record} are assumed to belong to another run in the same directory.")
    measured = {candidate.measurement.step for candidate in choice.candidates}
    unmeasured = [path.name for step, path in existing.items() if step not in measured]
    if unmeasured:
        which = ", ".join(unmeasured[:3]) + (", …" if len(unmeasured) > 3 else "")
        lines.append(
            f"{len(unmeasured):,} of {len(existing):,} checkpoints are not candidates because their steps were not "
            f"measured ({which}). ib-callback measure can measure them."
        )
    if run.missing is None and existing:
        lines.append(
            f"There is no {run.names.checkpoints}: every checkpoint in {run.directory} is assumed to belong to this "
            "run."
        )
    return lines


def _cure(select_from: SelectFrom, phases: Phases) -> list[str]:
    starts = {"compression": phases.compression_start, "fit": phases.fit_start}
    if isinstance(select_from, int) or starts[select_from] is not None:
        return []
    told = f"The {select_from} phase was not recognised in this run"
    if phases.fit_start is None:
        return [
            f"{told}. The fit was not recognised either. To choose among the points from a step on, give --from STEP."
        ]
    return [f"{told}. Short runs often never compress. To choose among earlier points, give --from fit or --from STEP."]
