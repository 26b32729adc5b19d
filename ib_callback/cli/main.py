"""The command `ib-callback`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ib_callback.cli._command import guarded, positive
from ib_callback.cli.plot import add_arguments as add_plot_arguments
from ib_callback.cli.probe import add_probe_command
from ib_callback.common.version import __version__
from ib_callback.results.guard import TOLERANCE, check_guard

if TYPE_CHECKING:
    from ib_callback.results.selection import SelectFrom


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    options = _parser().parse_args(argv)
    try:
        return options.run(options)
    except (ImportError, ValueError) as error:  # our own errors on probes and trajectories are ValueErrors
        print(f"ib-callback: {error}", file=sys.stderr)
        return 1


def _demo(options: argparse.Namespace) -> int:
    from ib_callback.cli.demo import run_demo

    run_demo(
        steps=options.steps,
        minutes=options.minutes,
        every=options.every,
        output_dir=options.output_dir,
        seed=options.seed,
        threads=options.threads,
    )
    return 0


def _select(options: argparse.Namespace) -> int:
    from ib_callback.cli.select import select_report

    report = select_report(
        options.run_dir,
        by=options.by,
        select_from=_select_from(options.select_from),
        mode=options.mode,
        guard=options.guard,
    )
    if report.path is None:
        if not options.path_only:
            print(report.table)
        print(f"ib-callback: {report.verdict}", file=sys.stderr)
        return 1
    print(report.path if options.path_only else report.text)
    return 0


def _plot(options: argparse.Namespace) -> int:
    from ib_callback.cli import plot

    for path in plot.draw(options):
        print(path)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ib-callback", description="Follow a language model through the information plane while it trains."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="pre-train a small decoder on this machine's CPU, with the callback",
        description="Pre-train a small decoder with HuggingFace's Trainer on text that every installation has, "
        "with the callback. Needs no network and no GPU, and writes below the current directory only.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--steps", type=positive, default=600, help="optimizer steps")
    demo.add_argument(
        "--minutes", type=_minutes, default=3.0, help="end the training after so long, however many steps are done"
    )
    demo.add_argument("--every", type=positive, metavar="N", help="measure every N steps; by default ever more rarely")
    demo.add_argument("--output-dir", default="ib_demo", metavar="DIR", help="where everything is written")
    demo.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the text")
    demo.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads")
    demo.set_defaults(run=_demo)
    select = commands.add_parser(
        "select",
        help="the best existing checkpoint of a finished run",
        description="Print the best existing checkpoint of a run that was followed, HuggingFace's or Lightning's, with "
        "all candidates and why the others are none.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    select.add_argument("run_dir", metavar="RUN_DIR", help="where ib_trajectory.jsonl lies, or a directory above")
    select.add_argument("--by", default="optimality", metavar="METRIC", help="a metric as logged, or a feature")
    select.add_argument(
        "--from", dest="select_from", default="compression", metavar="compression|fit|STEP",
        help="from when on points can be selected: the start of a phase, or a step",
    )  # fmt: skip
    select.add_argument("--mode", choices=("min", "max"), help="which values are better, if it is not known")
    select.add_argument(
        "--guard", type=_guard, default="run", metavar="loss|NATS|none",
        help="how far above the lowest the held-out loss may be; none: the published choice; by default as in the run",
    )  # fmt: skip
    select.add_argument("--path-only", action="store_true", help="print nothing but the path, for scripts")
    select.set_defaults(run=guarded(_select, failed=1))
    plot = commands.add_parser(
        "plot",
        help="pictures of a run, or of several in one plane",
        description="Draw the information plane of a run, the plane by layer at one step, its numbers over steps, or "
        "several runs in one plane, from trajectory files.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_plot_arguments(plot)
    plot.set_defaults(run=guarded(_plot))
    add_probe_command(commands)
    return parser


def _guard(text: str) -> str | float | None:
    if text in ("run", "loss"):
        return text
    try:
        return None if text == "none" else check_guard(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected loss, none, run or a tolerance in nats a token such as {TOLERANCE}, got {text!r}"
        ) from None


def _select_from(text: str) -> SelectFrom:
    if text == "compression":
        return "compression"
    if text == "fit":
        return "fit"
    try:
        step = int(text.replace(",", ""))  # as steps are printed
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
    sys.exit(main())
