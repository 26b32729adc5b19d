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
from ib_callback.plot.data import learning_rates_beside, orders_of
from ib_callback.results.tidy import rows_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("plane", "layers", "steps", "compare")
_DEFAULT_SUFFIX = ".png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_run_arguments(parser)
    parser.add_argument(
        "--kind",
        choices=KINDS,
        help="picture to draw. Default: all pictures of one run, or compare for several runs",
    )
    parser.add_argument(
        "--order", action="append", metavar="NAME|all",
        help="n-gram order to show, such as bigram; repeatable. all: every order that was measured. Default: the "
        "primary order. The picture by layer, and pictures of a single plane, show all orders",
    )  # fmt: skip
    parser.add_argument(
        "--plane", action="append", metavar="NAME",
        help="plane to show: prediction, readout, local or plain; repeatable. Default: all that were measured",
    )  # fmt: skip
    parser.add_argument(
        "--step",
        default="last",
        metavar="N|last|best",
        help="step of the picture by layer; best: the highest optimality among points that can be selected",
    )
    parser.add_argument(
        "--x",
        choices=("step", "tokens"),
        default="step",
        help="count training in steps or in tokens, for colours and x-axis",
    )
    parser.add_argument("--log", action="store_true", help="make the axis of the steps logarithmic")
    parser.add_argument("--theme", choices=("light", "dark"), default="light", help="background: white or dark grey")
    parser.add_argument(
        "-o", "--output", metavar="PATH",
        help="file or existing directory. The suffix of a file decides the format: .png, .svg or .pdf. With several "
        "pictures, the kind of each is added to its name. Default: PNG files in the current directory",
    )  # fmt: skip
    add_table_arguments(parser)


def draw(options: argparse.Namespace) -> tuple[list[Path], int]:
    """Draw the requested pictures; their files and the exit status.

    Raises:
        TrajectoryError: a run does not exist or cannot be read.
        ValueError: these runs do not allow the picture, or the format is unknown.
        ImportError: Matplotlib is not installed.
        OSError: a file cannot be written.
    """
    _check_folder(options.output)
    check_outputs(options, options.runs, pictures=[])
    runs, status = courses_of(options)
    pictures = dict(_pictures(runs, options))
    paths = _paths(list(pictures), options.output)
    check_outputs(options, options.runs, pictures=paths)
    # All pictures are drawn before any is written, so that a mistake does not leave some of the files behind.
    figures = [picture() for picture in pictures.values()]
    for figure, path in zip(figures, paths, strict=True):
        save(figure, path)
    rows = rows_of(point for run in runs for point in run.points)
    return [*paths, *write_tables(options, rows)], status


def _pictures(runs: Sequence[Course], options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """The name of each picture, and a function that draws it."""
    kind = options.kind or ("compare" if len(runs) > 1 else None)
    if options.plane and kind in ("layers", "steps"):
        raise ValueError(
            f"--plane only works with the kinds plane and compare, got --kind {kind}. Leave one of the two out"
        )
    common: dict[str, Any] = {"theme": options.theme}
    along: dict[str, Any] = {"x": options.x}
    in_planes: dict[str, Any] = {"planes": options.plane, **common}
    is_all = "all" in (options.order or [])
    if kind == "compare":
        if len(runs) < 2:
            raise ValueError("--kind compare needs two runs or more, got one. Add another run")
        courses = {run.name: run.trajectory for run in runs}
        yield (
            "compare",
            partial(compare, courses, orders="all" if is_all else options.order, curve=runs[0].curve, **in_planes),
        )
        return
    for run in runs:
        prefix = f"{run.name.replace('/', '_')}_" if len(runs) > 1 else ""
        trajectory, curve = run.trajectory, run.curve
        common["orders"] = in_planes["orders"] = orders_of(trajectory, None) if is_all else options.order
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
            rates = None if run.path is None else learning_rates_beside(run.path.parent)
            yield f"{prefix}steps", partial(
                over_steps, trajectory, log=log, title=run.name, learning_rate=rates, **common, **along
            )  # fmt: skip


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
