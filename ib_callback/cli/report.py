"""`ib-callback report`: what runs and models tell, in plain sentences."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ib_callback.analysis.courses import load_courses
from ib_callback.analysis.report import Report, report
from ib_callback.cli._command import DONE, NOT_ALL, add_run_arguments, examples, guarded
from ib_callback.common.files import write_atomically
from ib_callback.results import tidy

_WIDEST = 100


def add_report_command(commands: Any) -> None:
    """Add `report` to the parser of `ib-callback`."""
    parser = commands.add_parser(
        "report",
        help="what runs and models tell, in plain sentences",
        description="Say in plain sentences what a run tells: its phases, its loss and where that was lowest, whether "
        "it memorises, collapses or diverges, the planes, what the noise allows, what is missing, and what it cost. "
        "Behind each stand the numbers that it rests on, by their logged name (without ib/), and the steps. Where "
        "nothing can be concluded it says so.",
        **examples(
            "ib-callback report RUN_DIR",
            "ib-callback report results.jsonl --model pythia-14m",
            "ib-callback report RUN_DIR OTHER_RUN_DIR --json report.json",
        ),
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--csv", metavar="FILE", help="write a row for each number that a sentence rests on (-: to the screen)"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the sentences, each with the numbers it rests on (-: to the screen)"
    )
    parser.set_defaults(run=guarded(_report))


def told(reports: Sequence[Report]) -> str:
    """Paragraphs for a terminal; of several runs each with its name above."""
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    blocks = []
    for each in reports:
        blocks += [each.model] if len(reports) > 1 else []
        blocks += [textwrap.fill(paragraph, width, break_on_hyphens=False) for paragraph in each.paragraphs()]
    return "\n\n".join(blocks)


def _report(options: argparse.Namespace) -> int:
    courses = load_courses(options.runs, options.model, unmeasured=True)
    reports = [
        report(course.trajectory, model=course.name, names=[head.get("revision") for head, _ in course.points])
        for course in courses
    ]
    made = (
        (options.csv, lambda: tidy.to_csv([row for each in reports for row in each.rows()])),
        (options.json, lambda: tidy.to_json([row for each in reports for row in each.objects()])),
    )
    if "-" not in (options.csv, options.json):
        print(told(reports))
    for name, make in made:
        if name == "-":
            print(make(), end="")
        elif name is not None:
            write_atomically(Path(name), make().encode())
    is_measured = any(point.error is None for course in courses for point in course.trajectory)
    return DONE if is_measured else NOT_ALL
