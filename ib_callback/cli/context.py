"""`ib-callback context`: what each width of context adds."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ib_callback.analysis.context import contexts_text, find_contexts, orders_of
from ib_callback.analysis.courses import Course
from ib_callback.cli._command import (
    NOT_ALL,
    add_run_arguments,
    add_table_arguments,
    check_outputs,
    check_picture_options,
    courses_of,
    examples,
    finish,
    guarded,
)
from ib_callback.plot.planes import NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_context_command(commands: Any) -> None:
    """Add `context` to the parser of `ib-callback`."""
    parser = commands.add_parser(
        "context",
        help="show what each width of context adds, from token to quadgram",
        description=(
            "For each model and order, show the complexity, its null, the complexity above null and the local "
            "complexity. Show what each order adds to the narrower one, and whether chance would add as much. Also "
            "show the widest order that the probe resolves, and the distance to the bound."
        ),
        **examples(
            "ib-callback context results.jsonl",
            "ib-callback context results.jsonl --model pythia-14m --step best --csv context.csv",
            "ib-callback context RUN_DIR -o context.png --plane plain --plane local",
        ),
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--step",
        default="last",
        metavar="N|last|best",
        help="point of each model; best: the highest optimality among points that can be selected",
    )
    parser.add_argument(
        "--plane", action="append", choices=NAMES, help="plane of the picture, by default plain; repeatable"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="draw all models, with a panel for each order and plane (.png, .svg, .pdf)",
    )
    add_table_arguments(parser, "model and order")
    parser.set_defaults(run=guarded(_context))


def _context(options: argparse.Namespace) -> int:
    check_picture_options(options, ["plane"])
    check_outputs(options, options.runs)
    courses, status = courses_of(options)
    contexts = find_contexts(courses, options.step)
    if any(context.note is not None for context in contexts):
        status = NOT_ALL
    rows = [row for context in contexts for row in context.rows()]
    return finish(options, contexts_text(contexts), rows, lambda: _picture(courses, options), status)


def _picture(courses: list[Course], options: argparse.Namespace) -> Figure:
    from ib_callback.plot import compare

    orders = orders_of(point for course in courses for point in course.trajectory)
    curve = courses[0].curve if len(courses) == 1 else None
    runs = {course.name: course.trajectory for course in courses}
    return compare(runs, orders=orders, planes=options.plane or ["plain"], curve=curve)
