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
        help="pre-train a small decoder on this machine's CPU, with the callback",
        description="Pre-train a small decoder with HuggingFace's Trainer on text that every installation has, "
        "with the callback. It needs no network and no GPU. It writes below the output directory, and keeps the "
        "prepared text in the user's cache directory.",
        **examples("ib-callback demo", "ib-callback demo --minutes 10 --steps 2000 --output-dir longer"),
    )
    demo.add_argument("--steps", type=positive, help="optimizer steps; by default 1,000, or 80 with --quick")
    demo.add_argument("--quick", action="store_true", help="a run of half a minute, which is too short for the phases")
    demo.add_argument(
        "--minutes", type=_minutes, default=3.0, help="end the training after this time, whatever step it has reached"
    )
    demo.add_argument(
        "--every",
        type=positive,
        metavar="N",
        help="measure every N steps; by default often at first, later every 50",
    )
    demo.add_argument("--output-dir", default="ib_demo", metavar="DIR", help="where everything is written")
    demo.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order of the text")
    demo.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads")
    demo.set_defaults(run=_demo)
    add_measure_command(commands)
    select = commands.add_parser(
        "select",
        help="the best surviving checkpoint of a finished run",
        description=(
            "Print the best surviving checkpoint of a run that was followed, HuggingFace's or Lightning's, or of one "
            "model in a file of results. Also print all candidates and why each other point was rejected."
        ),
        **examples(
            "ib-callback select RUN_DIR",
            "ib-callback select results.jsonl --model pythia-14m --by preference --from 1000",
            "cp -r $(ib-callback select RUN_DIR --path-only) best",
        ),
    )
    select.add_argument(
        "run_dir", metavar="RUN", help="where ib_trajectory.jsonl lies, or a directory above; or a file of results"
    )
    select.add_argument("--model", metavar="NAME", help="which model of a file of results")
    select.add_argument("--by", default="optimality", metavar="METRIC", help="a metric as logged, or a feature")
    select.add_argument(
        "--from", dest="select_from", default="compression", metavar="compression|fit|STEP",
        help="the first point that can be selected: the start of a phase, or a step",
    )  # fmt: skip
    select.add_argument("--mode", choices=("min", "max"), help="which values are better, if that is not known")
    select.add_argument(
        "--guard", type=_guard, default="run", metavar="loss|NATS|none",
        help="how far the held-out loss may be above its lowest; none: the published choice; by default as in the run",
    )  # fmt: skip
    select.add_argument("--path-only", action="store_true", help="print nothing but the path, for scripts")
    add_table_arguments(select)
    select.set_defaults(run=guarded(_select))
    plot = commands.add_parser(
        "plot",
        help="pictures of runs and models, and their numbers as a table",
        description="Draw the information plane of a run, the plane by layer at one step, its numbers over steps, or "
        "several runs or models in one plane, from directories of runs, trajectory files and files of results.",
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
