"""The command `ib-callback`."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from ib_callback.cli._command import (
    DONE,
    EXIT_CODES,
    FAILED,
    INTERRUPTED,
    NOT_ALL,
    add_prefix_argument,
    add_table_arguments,
    check_outputs,
    examples,
    guard,
    guarded,
    positive,
    write_tables,
)
from ib_callback.cli.compare import add_compare_command
from ib_callback.cli.context import add_context_command
from ib_callback.cli.correlate import add_correlate_command
from ib_callback.cli.log import add_log_command
from ib_callback.cli.measure import add_measure_command
from ib_callback.cli.phases import add_phases_command
from ib_callback.cli.plot import add_arguments as add_plot_arguments
from ib_callback.cli.probe import add_probe_command
from ib_callback.cli.report import add_report_command
from ib_callback.cli.stop import add_stop_command
from ib_callback.common.version import __version__
from ib_callback.results.guard import TOLERANCE

if TYPE_CHECKING:
    from ib_callback.results.selection import SelectFrom

_AS_IT_IS = ("surrogateescape", "utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    _print_anything()
    options = parser().parse_args(argv)
    _expand(options)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("ib-callback: interrupted", file=sys.stderr)
        return INTERRUPTED


def _print_anything() -> None:
    """Print characters that a terminal's encoding lacks, such as ρ or ±, as question marks, without an error."""
    for stream in (sys.stdout, sys.stderr):
        # With UTF-8 and surrogateescape, names of files that are not valid text are printed unchanged.
        if isinstance(stream, io.TextIOWrapper) and (stream.errors, stream.encoding.lower()) != _AS_IT_IS:
            stream.reconfigure(errors="replace")


def _expand(options: argparse.Namespace) -> None:
    """Replace `~` by the home directory in all options, because shells do not if it follows "=" or is in quotes."""
    for name, value in vars(options).items():
        if isinstance(value, str):
            setattr(options, name, os.path.expanduser(value))
        elif isinstance(value, list):
            setattr(options, name, [os.path.expanduser(v) if isinstance(v, str) else v for v in value])


def command() -> NoReturn:
    """The process `ib-callback`: run `main`, and exit."""
    status = main()
    if status == INTERRUPTED:
        # Python would wait for all threads, for example for a download to finish.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _demo(options: argparse.Namespace) -> int:
    from ib_callback.cli.demo import run_demo

    try:  # not `guarded`, because warnings should appear during training
        run_demo(
            steps=options.steps,
            minutes=options.minutes,
            every=options.every,
            output_dir=options.output_dir,
            seed=options.seed,
            threads=options.threads,
            quick=options.quick,
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"ib-callback: {error}", file=sys.stderr)
        return FAILED
    return DONE


def _select(options: argparse.Namespace) -> int:
    from ib_callback.cli.select import select_report

    check_outputs(options, [options.run_dir])
    report = select_report(
        options.run_dir,
        by=options.by,
        select_from=_select_from(options.select_from),
        mode=options.mode,
        model=options.model,
        guard=options.guard,
        prefix=options.prefix,
    )
    write_tables(options, report.rows)
    shown = "-" not in (options.csv, options.json)
    if report.path is None:
        if not options.path_only and shown:
            print(report.table)
        print(f"ib-callback: {report.verdict}", file=sys.stderr)
        return NOT_ALL
    if options.path_only or shown:
        print(report.path if options.path_only else report.text)
    return DONE


def _plot(options: argparse.Namespace) -> int:
    from ib_callback.cli import plot

    # A table on the screen is meant for a pipe into another program, so nothing else may go there.
    where = sys.stderr if "-" in (options.csv, options.json) else sys.stdout
    paths, status = plot.draw(options)
    for path in paths:
        print(path, file=where)
    return status


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = argparse.ArgumentParser(
        prog="ib-callback",
        description="Follow a language model through the information plane while it trains, or afterwards.",
        **examples(
            "ib-callback demo",
            "ib-callback measure RUN_DIR -o results.jsonl --documents held_out.jsonl",
            "ib-callback plot results.jsonl --csv results.csv",
            "ib-callback COMMAND --help",
            more=EXIT_CODES,
        ),
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="train a small language model on this machine's CPU, and explain the numbers",
        description="Train a small language model with HuggingFace's Trainer and the callback, and explain the "
        "numbers. The text is documentation that is installed with Python and its packages, so the demo needs no "
        "network. It needs no GPU either. It writes into the output directory, and keeps the prepared text in the "
        "user's cache directory.",
        **examples("ib-callback demo", "ib-callback demo --minutes 10 --steps 2000 --output-dir longer"),
    )
    demo.add_argument("--steps", type=positive, help="number of optimizer steps; by default 1,000, or 80 with --quick")
    demo.add_argument(
        "--quick", action="store_true", help="run for half a minute only, which is too short for the phases"
    )
    demo.add_argument(
        "--minutes", type=_minutes, default=3.0, help="end the training after this time, at whatever step"
    )
    demo.add_argument(
        "--every",
        type=positive,
        metavar="N",
        help="measure every N steps; by default often at first, then every 50 steps",
    )
    demo.add_argument("--output-dir", default="ib_demo", metavar="DIR", help="directory for all files")
    demo.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the order of the text")
    demo.add_argument("--threads", type=positive, default=1, metavar="N", help="number of CPU threads")
    demo.set_defaults(run=_demo)
    add_measure_command(commands)
    select = commands.add_parser(
        "select",
        help="find the best surviving checkpoint of a finished run",
        description=(
            "Print the best surviving checkpoint, all candidates, and why each other point was rejected. RUN is a "
            "finished run of HuggingFace's Trainer or of Lightning, or a file of results."
        ),
        **examples(
            "ib-callback select RUN_DIR",
            "ib-callback select results.jsonl --model pythia-14m --by preference --from 1000",
            "cp -r $(ib-callback select RUN_DIR --path-only) best",
        ),
    )
    select.add_argument(
        "run_dir", metavar="RUN",
        help="the output directory of a run or a directory above it, a trajectory file, or a file of results",
    )  # fmt: skip
    select.add_argument("--model", metavar="NAME", help="use this model of a file of results")
    add_prefix_argument(select)
    select.add_argument(
        "--by",
        default="optimality",
        metavar="METRIC",
        help="rank by this metric, named as in the logs, or by this feature",
    )
    select.add_argument(
        "--from", dest="select_from", default="compression", metavar="compression|fit|STEP",
        help="where selection begins: the start of a phase, or a step",
    )  # fmt: skip
    select.add_argument(
        "--mode", choices=("min", "max"),
        help="whether low or high values are better; needed only if the command does not know it",
    )  # fmt: skip
    select.add_argument(
        "--guard", type=_guard, default="run", metavar="loss|NATS|none",
        help="how far the held-out loss may be above its lowest value. "
        f"loss: {TOLERANCE} nats a token; NATS: this limit; none: no limit, as published; by default as in the run",
    )  # fmt: skip
    select.add_argument("--path-only", action="store_true", help="print only the path, for scripts")
    add_table_arguments(select)
    select.set_defaults(run=guarded(_select))
    plot = commands.add_parser(
        "plot",
        help="draw pictures of runs and models, and write their numbers as a table",
        description="Draw a run: its information plane, the plane by layer at one step, and its numbers over steps. "
        "Or draw several runs or models in one plane.",
        **examples(
            "ib-callback plot RUN_DIR",
            "ib-callback plot results.jsonl --csv results.csv",
            "ib-callback plot results.jsonl --model pythia-14m --kind steps --x tokens -o tokens.pdf",
            "ib-callback plot RUN_DIR OTHER_RUN_DIR --order token --plane local",
        ),
    )
    add_plot_arguments(plot)
    plot.set_defaults(run=guarded(_plot))
    add_report_command(commands)
    add_phases_command(commands)
    add_context_command(commands)
    add_compare_command(commands)
    add_correlate_command(commands)
    add_stop_command(commands)
    add_log_command(commands)
    add_probe_command(commands)
    return parser


def _guard(text: str) -> str | float | None:
    return text if text == "run" else guard(text)


def _select_from(text: str) -> SelectFrom:
    if text == "compression":
        return "compression"
    if text == "fit":
        return "fit"
    try:
        step = int(text.replace(",", ""))  # steps are printed with commas
    except ValueError:
        step = -1
    if step < 0:
        raise ValueError(f"--from: expected compression, fit or a step (0 or more), got {text!r}")
    return step


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of minutes above 0, got {text!r}")
    return value


if __name__ == "__main__":
    command()
