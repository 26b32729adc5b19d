"""`ib-callback stop`: what a stopping rule would have done in runs that are over."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ib_callback.analysis.courses import Course, load_courses
from ib_callback.analysis.replay import Replay, replay_runs, replays_text
from ib_callback.cli._command import (
    DONE,
    add_run_arguments,
    add_table_arguments,
    examples,
    guard,
    guarded,
    positive,
    report,
)
from ib_callback.results.metrics import better_direction
from ib_callback.results.stopping import PlateauStopping

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_stop_command(commands: Any) -> None:
    """Add the command to those of `ib-callback`."""
    parser = commands.add_parser(
        "stop",
        help="replay a stopping rule on recorded runs: when it stops, what that saves and costs",
        description="Replay early_stopping=PlateauStopping(...) on runs that are over, beside patience on the held-out "
        "loss alone, an oracle that stops at the lowest loss, and no stopping.",
        **examples(
            "ib-callback stop RUN_DIR",
            "ib-callback stop RUN_DIR OTHER_RUN_DIR --patience 8 --csv stops.csv -o stops.png",
            "ib-callback stop RUN_DIR --monitor optimality --guard none --arm immediately",
        ),
    )
    add_run_arguments(parser)
    parser.add_argument("--patience", type=positive, default=5, metavar="N", help="measurements without improvement")
    parser.add_argument("--monitor", default="distance_to_bound", metavar="METRIC", help="a metric as logged")
    parser.add_argument("--mode", choices=("min", "max"), help="which values are better, if it is not known")
    parser.add_argument(
        "--min-delta", type=float, default=0.0, metavar="SHARE",
        help="smallest improvement, as a share of the best value",
    )  # fmt: skip
    parser.add_argument(
        "--arm", choices=("compression", "fit", "immediately"), default="compression",
        help="from when on, where the guard does not decide",
    )  # fmt: skip
    parser.add_argument(
        "--guard", type=guard, default="loss", metavar="loss|NATS|none",
        help="the loss must be flat too, within so many nats; none: the published rule",
    )  # fmt: skip
    parser.add_argument("--x", choices=("step", "tokens"), default="step", help="the axis of the picture")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="draw loss and monitored number with the stops (.png, .svg, .pdf)"
    )
    add_table_arguments(parser, "a run and rule")
    parser.set_defaults(run=guarded(_stop))


def _stop(options: argparse.Namespace) -> int:
    courses = load_courses(options.runs, options.model)
    rule = PlateauStopping(
        options.monitor, mode=options.mode or better_direction(options.monitor) or "min", patience=options.patience,
        min_delta=options.min_delta, arm=options.arm, guard=options.guard,
    )  # fmt: skip
    replays = replay_runs(courses, rule)
    figure = None if options.output is None else _picture(courses, replays, options.x)
    report(options, replays_text(replays, rule), [row for each in replays for row in each.rows()], figure)
    return DONE


def _picture(courses: Sequence[Course], replays: Sequence[Replay], x: str) -> Figure:
    from ib_callback.plot.stops import stops_over_steps

    by_name = {course.name: course for course in courses}
    drawn = [each for each in replays if each.monitor is not None]
    runs = {each.name: [p for p in by_name[each.name].trajectory if p.step is not None] for each in drawn}
    stops = {each.name: {stop.rule: stop.step for stop in each.stops[:-1]} for each in drawn}
    return stops_over_steps(runs, {each.name: each.monitor or "" for each in drawn}, stops, x=x)
