"""`ib-callback phases`: the phases of models, the start of compression, and where the loss becomes flat."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ib_callback.analysis.courses import Course
from ib_callback.analysis.turns import Turn, find_turns, turns_text, with_order
from ib_callback.cli._command import (
    add_run_arguments,
    add_table_arguments,
    check_outputs,
    courses_of,
    examples,
    finish,
    guarded,
)
from ib_callback.results.phases import PLANES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_phases_command(commands: Any) -> None:
    """Add `phases` to the parser of `ib-callback`."""
    parser = commands.add_parser(
        "phases",
        help="show where each model turns from fitting to compression, and whether its loss becomes flat there",
        description=(
            "Print one row per model, the smallest first. The first table says when the model turns to compression and "
            "when its held-out loss becomes flat, both with an interval. The second table says for each phase how "
            "complexity and optimality correlate with the step, and whether the model approaches the bound."
        ),
        **examples(
            "ib-callback phases RUN_DIR OTHER_RUN_DIR",
            "ib-callback phases results.jsonl --plane plain --csv phases.csv -o phases.png",
            "ib-callback phases results.jsonl --model pythia-14m --order bigram --x tokens --log",
        ),
    )
    add_run_arguments(parser)
    parser.add_argument("--order", metavar="NAME", help="n-gram order, by default the primary one")
    parser.add_argument(
        "--plane", choices=tuple(PLANES),
        help="plane on which phases are found, by default the first of these that the run has; plain: as published",
    )  # fmt: skip
    parser.add_argument("--x", choices=("step", "tokens"), default="step", help="count training in steps or in tokens")
    parser.add_argument("--log", action="store_true", help="correlate with the logarithm of the steps or tokens")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="draw all models in one plane and mark each turn (.png, .svg, .pdf)"
    )
    add_table_arguments(parser, "model")
    parser.set_defaults(run=guarded(_phases))


def _phases(options: argparse.Namespace) -> int:
    if options.output is not None and options.plane == "above_null":
        raise ValueError("-o: there is no picture of the plane above_null. Give --plane plain or local")
    check_outputs(options, options.runs)
    courses, status = courses_of(options)
    turns = find_turns(courses, order=options.order, plane=options.plane, x=options.x, log=options.log)
    text = turns_text(turns, "training step" if options.x == "step" else "training tokens")
    return finish(options, text, [turn.row() for turn in turns], lambda: _picture(courses, turns, options), status)


def _picture(courses: list[Course], turns: list[Turn], options: argparse.Namespace) -> Figure:
    from ib_callback.plot import compare

    planes = [options.plane] if options.plane else list(dict.fromkeys(turn.plane for turn in turns if turn.plane))
    drawn = [plane for plane in planes if plane != "above_null"] or ["plain"]
    marks = {turn.name: turn.step for turn in turns if turn.step is not None}
    by_name = {course.name: course for course in courses}
    shown = {turn.name: by_name[turn.name].trajectory for turn in turns}
    order = options.order or next((turn.order for turn in turns if turn.order), None)
    if options.order:
        shown = {name: with_order(trajectory, options.order) for name, trajectory in shown.items()}
    curve = courses[0].curve if len(courses) == 1 else None
    return compare(shown, orders=None if order is None else [order], planes=drawn, curve=curve, marks=marks)
