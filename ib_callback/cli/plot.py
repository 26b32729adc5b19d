"""`ib-callback plot`: pictures from trajectory files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ib_callback.analysis.courses import Course, NoPointError, point_at
from ib_callback.cli._command import add_run_arguments, add_table_arguments, check_outputs, courses_of, write_tables
from ib_callback.plot import compare, information_plane, over_steps, plane_by_layer, save
from ib_callback.results.tidy import rows_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("plane", "layers", "steps", "compare")
_DEFAULT_SUFFIX = ".png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_run_arguments(parser)
    parser.add_argument("--kind", choices=KINDS, help="which picture; by default all that the input allows")
    parser.add_argument("--order", action="append", metavar="NAME", help="an n-gram order; may be given several times")
    parser.add_argument(
        "--plane", action="append", metavar="NAME",
        help="prediction, readout, local or plain, by default all that were measured; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--step", default="last", metavar="N|last|best", help="of the plane by layer (best: by optimality)"
    )
    parser.add_argument("--x", choices=("step", "tokens"), default="step", help="what training is counted in")
    parser.add_argument("--log", action="store_true", help="a logarithmic axis for the steps, whatever they are")
    parser.add_argument("--theme", choices=("light", "dark"), default="light", help="on white, or on dark grey")
    parser.add_argument(
        "-o", "--output", metavar="PATH",
        help="a file, whose suffix decides the format (.png, .svg, .pdf), or an existing directory; of several "
        "pictures each adds its kind to the name. By default PNG files in the current directory",
    )  # fmt: skip
    add_table_arguments(parser)


def draw(options: argparse.Namespace) -> tuple[list[Path], int]:
    """Draw what the options ask for, and return the files and the exit status.

    Raises:
        TrajectoryError: a run that is not there, or cannot be read.
        ValueError: what is asked for cannot be drawn from these runs, or not in this format.
        ImportError: Matplotlib is not installed.
        OSError: a file cannot be written.
    """
    _check_folder(options.output)
    check_outputs(options, options.runs, pictures=[])
    runs, status = courses_of(options)
    pictures = dict(_pictures(runs, options))
    paths = _paths(list(pictures), options.output)
    check_outputs(options, options.runs, pictures=paths)
    # All are drawn before any is written: a mistake leaves no half of the files.
    figures = [picture() for picture in pictures.values()]
    for figure, path in zip(figures, paths, strict=True):
        save(figure, path)
    rows = rows_of(point for run in runs for point in run.points)
    return [*paths, *write_tables(options, rows)], status


def _pictures(runs: Sequence[Course], options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Names of the pictures, and how to draw each."""
    kind = options.kind or ("compare" if len(runs) > 1 else None)
    if options.plane and kind in ("layers", "steps"):
        raise ValueError(f"--plane is for the kinds plane and compare, got --kind {kind}. Leave one of the two out")
    common: dict[str, Any] = {"orders": options.order, "theme": options.theme}
    along: dict[str, Any] = {"x": options.x}
    in_planes: dict[str, Any] = {"planes": options.plane, **common}
    if kind == "compare":
        if len(runs) < 2:
            raise ValueError("--kind compare needs two runs or more, got one. Give another one beside it")
        courses = {run.name: run.trajectory for run in runs}
        yield "compare", partial(compare, courses, curve=runs[0].curve, **in_planes)
        return
    for run in runs:
        prefix = f"{run.name.replace('/', '_')}_" if len(runs) > 1 else ""
        trajectory, curve = run.trajectory, run.curve
        if kind in (None, "plane"):
            in_order = {**in_planes, **along}
            yield f"{prefix}plane", partial(information_plane, trajectory, curve=curve, title=run.name, **in_order)
        if kind in (None, "layers"):
            try:
                point = point_at(run, options.step)
            except NoPointError as error:
                raise ValueError(f"--step {options.step}: {error}") from None
            title = run.name if point.step is None else f"{run.name}, step {point.step:,}"
            yield f"{prefix}layers", partial(plane_by_layer, point, curve=curve, title=title, **common)
        if kind == "steps" or (kind is None and len([point for point in trajectory if point.orders]) > 1):
            log = options.log or None
            yield f"{prefix}steps", partial(over_steps, trajectory, log=log, title=run.name, **common, **along)


def _check_folder(output: str | None) -> None:
    if output is not None and not os.path.isdir(output):
        missing = Path(output) if output.endswith(("/", os.sep)) else Path(output).parent
        if not missing.is_dir():
            raise ValueError(f"-o {output}: there is no directory {missing}. Make it, or give another path")


def _paths(names: Sequence[str], output: str | None) -> list[Path]:
    if output is None or os.path.isdir(output):
        return [Path(output or ".") / f"{name}{_DEFAULT_SUFFIX}" for name in names]
    path = Path(output)
    if len(names) == 1:
        return [path]
    return [path.with_name(f"{path.stem}_{name}{path.suffix or _DEFAULT_SUFFIX}") for name in names]
