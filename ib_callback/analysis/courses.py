"""Load courses: the trajectories of finished runs and measured models, from files of any kind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ib_callback.bound.curve import IBCurve
from ib_callback.common.files import expanded, told_apart
from ib_callback.common.messages import warn
from ib_callback.plot.bound import curve_beside
from ib_callback.results.lines import read_rows
from ib_callback.results.measurement import Measurement
from ib_callback.results.results import Results
from ib_callback.results.trajectory import Trajectory
from ib_callback.run.names import DEFAULT_PREFIX, Names
from ib_callback.run.trajectory_file import find_trajectory


@dataclass(frozen=True, kw_only=True, eq=False)
class Course:
    """The trajectory of one run or model.

    Attributes:
        name: name for display.
        trajectory: its points.
        curve: the bound of its probe, if the run has one.
        points: each point, with the columns that come before its numbers in a table (for results: model, revision,
            family, stage, num_parameters, tokens, step; for a run: model, step).
        path: the trajectory file of a run; None for a model of a file of results.
        prefix: prefix of the keys that the run logs.
    """

    name: str
    trajectory: Trajectory
    curve: IBCurve | None
    points: list[tuple[dict[str, Any], Measurement]]
    path: Path | None
    prefix: str = DEFAULT_PREFIX


def load_courses(
    paths: Sequence[str | os.PathLike[str]],
    models: Sequence[str] | None = None,
    *,
    unmeasured: bool = False,
    prefix: str | None = None,
) -> list[Course]:
    """Load runs, and the models in files of results. Several files may be shards of the same results.

    Args:
        paths: directories of runs, or directories that contain one; trajectory files; files of results.
        models: names of the wanted models; None means all.
        unmeasured: whether to include courses without a measured point.
        prefix: which trajectory to take of a directory, by the prefix of its keys; None: the only one.

    Raises:
        TrajectoryError: a run does not exist or cannot be read.
        ValueError: there is no model of a given name, a file was given twice, or nothing was measured.
    """
    files = [find_trajectory(path, prefix) for path in map(expanded, paths)]
    runs: list[Course] = []
    of_results = []
    for name, file in zip(_names(files), files, strict=True):
        if any(origin is not None for origin, _ in read_rows(file)):
            of_results.append(file)
            continue
        trajectory, names = Trajectory.load(file), Names.of(file)
        points = [({"model": name, "step": point.step}, point) for point in trajectory]
        curve = curve_beside(file.parent / names.curve)
        runs.append(
            Course(name=name, trajectory=trajectory, curve=curve, points=points, path=file, prefix=names.prefix)
        )
    results = Results.load(*of_results)
    runs += [
        Course(name=model, trajectory=trajectory, curve=None, points=results.points(model), path=None)
        for model, trajectory in results.items()
    ]
    if models is not None:
        known = {run.name: run for run in runs}
        if unknown := [name for name in models if name not in known]:
            raise ValueError(f"--model: expected names among {', '.join(known)}, got {unknown[0]!r}")
        runs = [known[name] for name in dict.fromkeys(models)]
    return runs if unmeasured else measured_courses(runs)


def measured_courses(courses: Sequence[Course]) -> list[Course]:
    """The courses that have a measured point.

    Raises:
        ValueError: no course has a measured point, or a run has none.

    Warns:
        RuntimeWarning: a model in a file of results has no measured point and is left out.
    """
    empty = [course for course in courses if not any(point.orders for point in course.trajectory)]
    if len(empty) == len(courses) or any(course.path is not None for course in empty):
        name, number = next(
            (course.name, len(course.trajectory)) for course in empty if len(empty) == len(courses) or course.path
        )
        raise ValueError(
            f"{name} has no measured point: expected at least one, got none among {number}. Choose a run or model that "
            "was measured"
        )
    for course in empty:
        warn(f"{course.name} is left out: none of its {len(course.trajectory)} points could be measured.")
    return [course for course in courses if course not in empty]


def _names(files: Sequence[Path]) -> list[str]:
    """The shortest ending of each path that distinguishes it from the others; a run is named after its directory.

    If there are several runs in one directory, their prefixes distinguish them.
    """
    whole = [file.resolve() for file in files]
    prefixes = [Names.prefix_of(file.name) for file in whole]
    of_runs = [file.parent for file, prefix in zip(whole, prefixes, strict=True) if prefix is not None]
    parts = []
    for file, prefix in zip(whole, prefixes, strict=True):
        last = (file.stem,) if prefix is None else (prefix[:-1],) if of_runs.count(file.parent) > 1 else ()
        parts.append((*file.parent.parts, *last))
    if len(set(parts)) < len(parts):
        twice = next(file for file, path in zip(files, parts, strict=True) if parts.count(path) > 1)
        raise ValueError(f"expected different runs, got {twice} twice. Leave one of them out")
    return told_apart(parts)


class NoPointError(ValueError):
    """This course lacks the chosen measured point. Other courses may have it."""


def point_at(course: Course, step: str) -> Measurement:
    """One measured point of a course.

    Args:
        course: a run or a model.
        step: "last", a number, or "best". "best" is the selectable point with the highest optimality, or the only
            measured point.

    Raises:
        NoPointError: there is no such point, or it was not measured. The message says which.
        ValueError: `step` is neither a number nor "last" nor "best".
    """
    measured = [point for point in course.trajectory if point.orders]
    number = None
    if step not in ("last", "best"):
        try:
            number = int(step.replace(",", ""))  # steps are printed with commas
        except ValueError:
            raise ValueError(f"--step: expected a number, last or best, got {step!r}") from None
    if not measured:
        raise NoPointError("no point was measured.")
    if step == "last":
        return measured[-1]
    if step == "best":
        best = measured[0] if len(measured) == 1 else course.trajectory.best(by="optimality")
        if best is None:
            raise NoPointError(
                "no point can be selected as the best, because the compression phase was not recognised or has no "
                "measured point. Give --step last or a number."
            )
        return best
    for point in measured:
        if point.step == number:
            return point
    steps = [point.step for point in measured if point.step is not None]
    near = sorted(sorted(steps, key=lambda other: abs(other - (number or 0)))[:5])
    raise NoPointError(
        f"no point was measured at step {number}. The nearest measured steps are {', '.join(map(str, near)) or 'none'}."
    )
