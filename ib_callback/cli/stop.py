"""`ib-callback stop`: replay a stopping rule on finished runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ib_callback.analysis.courses import Course
from ib_callback.analysis.replay import Replay, replay_runs, replays_text
from ib_callback.cli._command import (
    NOT_ALL,
    add_run_arguments,
    add_table_arguments,
    check_outputs,
    check_picture_options,
    courses_of,
    examples,
    finish,
    guard,
    guarded,
    plain_metric,
    positive,
)
from ib_callback.common.messages import warn
from ib_callback.results.guard import TOLERANCE
from ib_callback.results.metrics import better_direction
from ib_callback.results.stopping import PlateauStopping

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_stop_command(commands: Any) -> None:
    """Add `stop` to the parser of `ib-callback`."""
    parser = commands.add_parser(
        "stop",
        help="replay a stopping rule on finished runs: when it stops, and what that saves and costs",
        description="Replay early_stopping=PlateauStopping(...) on finished runs. Compare it with patience on the "
        "held-out loss alone, with an oracle that stops at the lowest loss, and with no stopping.",
        **examples(
            "ib-callback stop RUN_DIR",
            "ib-callback stop RUN_DIR OTHER_RUN_DIR --patience 8 --csv stops.csv -o stops.png",
            "ib-callback stop RUN_DIR --monitor optimality --guard none --arm immediately",
        ),
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--patience",
        type=positive,
        default=5,
        metavar="N",
        help="number of measurements without improvement before a stop",
    )
    parser.add_argument(
        "--monitor", default="distance_to_bound", metavar="METRIC", help="metric to watch, named as in the logs"
    )
    parser.add_argument(
        "--mode", choices=("min", "max"),
        help="whether low or high values are better; needed only if the command does not know it",
    )  # fmt: skip
    parser.add_argument(
        "--min-delta", type=float, default=0.0, metavar="SHARE",
        help="smallest change that is an improvement, as a share of the best value",
    )  # fmt: skip
    parser.add_argument(
        "--arm", choices=("compression", "fit", "immediately"), default="compression",
        help="phase from which the rule may act, unless the guard decides",
    )  # fmt: skip
    parser.add_argument(
        "--guard", type=guard, default="loss", metavar="loss|NATS|none",
        help=f"also require a flat held-out loss. loss: within {TOLERANCE} nats a token; NATS: within this limit; "
        "none: no such condition, as published",
    )  # fmt: skip
    parser.add_argument("--x", choices=("step", "tokens"), help="x-axis of the picture, by default step")
    parser.add_argument(
        "-o", "--output", metavar="FILE",
        help="draw loss and metric with the stops, for the first 8 runs (.png, .svg, .pdf)",
    )  # fmt: skip
    add_table_arguments(parser, "run and rule")
    parser.set_defaults(run=guarded(_stop))


def _stop(options: argparse.Namespace) -> int:
    check_picture_options(options, ["x"])
    check_outputs(options, options.runs)
    courses, status = courses_of(options)
    monitor = plain_metric(options.monitor, courses)
    rule = PlateauStopping(
        monitor, mode=options.mode or better_direction(monitor) or "min", patience=options.patience,
        min_delta=options.min_delta, arm=options.arm, guard=options.guard,
    )  # fmt: skip
    replays = replay_runs(courses, rule)
    if any(replay.failed for replay in replays):
        status = NOT_ALL
    rows = [row for each in replays for row in each.rows()]
    return finish(
        options, replays_text(replays, rule), rows, lambda: _picture(courses, replays, options.x or "step"), status
    )


def _picture(courses: Sequence[Course], replays: Sequence[Replay], x: str) -> Figure:
    from ib_callback.plot.stops import MOST_RUNS, stops_over_steps

    by_name = {course.name: course for course in courses}
    drawn = [each for each in replays if each.monitor is not None]
    if not drawn:
        raise ValueError("expected a run with at least two points that have steps, got none")
    notes = []
    if left_out := len(drawn) - MOST_RUNS if len(drawn) > MOST_RUNS else 0:
        notes.append(f"{left_out} more runs are not drawn, because a picture has room for {MOST_RUNS}.")
        warn(f"the picture has the first {MOST_RUNS} runs; {left_out} more are not drawn. Choose with --model or RUN")
        drawn = drawn[:MOST_RUNS]
    runs = {each.name: [p for p in by_name[each.name].trajectory if p.step is not None] for each in drawn}
    stops = {each.name: {stop.rule: stop.step for stop in each.stops[:-1]} for each in drawn}
    return stops_over_steps(runs, {each.name: each.monitor or "" for each in drawn}, stops, x=x, notes=notes)
