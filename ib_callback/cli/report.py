"""`ib-callback report`: report about runs and models in plain sentences."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ib_callback.analysis.courses import Course
from ib_callback.analysis.report import Report, report
from ib_callback.cli._command import (
    DONE,
    NOT_ALL,
    add_picture_arguments,
    add_run_arguments,
    check_outputs,
    examples,
    finish,
    guarded,
    load_every_course,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDEST = 100


def add_report_command(commands: Any) -> None:
    """Add `report` to the parser of `ib-callback`."""
    parser = commands.add_parser(
        "report",
        help="say in plain sentences what runs and models show",
        description="Say in plain sentences what a run shows: its phases, its loss and the step of the lowest loss, "
        "whether it memorises, collapses or diverges, its planes, how large the noise is, which points are missing, "
        "and what measuring cost. Each sentence is followed by the numbers behind it, with their logged names (without "
        "ib/) and steps. If nothing can be concluded, the report says so.",
        **examples(
            "ib-callback report RUN_DIR",
            "ib-callback report results.jsonl --model pythia-14m",
            "ib-callback report RUN_DIR OTHER_RUN_DIR --json report.json -o planes.png",
        ),
    )
    add_run_arguments(parser)
    add_picture_arguments(parser)
    parser.add_argument("--csv", metavar="FILE", help="write a row for each number behind a sentence (- prints it)")
    parser.add_argument(
        "--json", metavar="FILE", help="write the sentences, each with the numbers behind it (- prints it)"
    )
    parser.set_defaults(run=guarded(_report))


def told(reports: Sequence[Report]) -> str:
    """The paragraphs for a terminal; with several runs, each report has the name of its run above."""
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    blocks = []
    for each in reports:
        blocks += [each.model] if len(reports) > 1 else []
        blocks += [textwrap.fill(paragraph, width, break_on_hyphens=False) for paragraph in each.paragraphs()]
    return "\n\n".join(blocks)


def _report(options: argparse.Namespace) -> int:
    check_outputs(options, options.runs)
    courses = load_every_course(options)
    reports = [
        report(course.trajectory, model=course.name, names=[head.get("revision") for head, _ in course.points])
        for course in courses
    ]
    without = [course.name for course in courses if all(point.error is not None for point in course.trajectory)]
    return finish(
        options,
        told(reports),
        [row for each in reports for row in each.rows()],
        lambda: _picture(courses, options.theme),
        NOT_ALL if without else DONE,
        objects=[row for each in reports for row in each.objects()],
    )


def _picture(courses: Sequence[Course], theme: Any) -> Figure:
    """The planes that the reports mention."""
    from ib_callback.plot import compare, information_plane

    measured = [course for course in courses if any(point.orders for point in course.trajectory)]
    if not measured:
        raise ValueError("no point was measured")
    first = measured[0]
    if len(measured) == 1:
        return information_plane(first.trajectory, curve=first.curve, title=first.name, theme=theme)
    return compare({course.name: course.trajectory for course in measured}, curve=first.curve, theme=theme)
