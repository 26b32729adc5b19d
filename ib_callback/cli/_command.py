"""What the commands have in common: how they end, what their help looks like, tables, and types of their arguments."""

from __future__ import annotations

import argparse
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ib_callback.common.files import write_atomically
from ib_callback.results import tidy
from ib_callback.results.guard import TOLERANCE, Guard, check_guard
from ib_callback.results.trajectory import FILENAME

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Every command ends with one of these.
DONE, NOT_ALL, FAILED, INTERRUPTED = 0, 1, 2, 130
EXIT_CODES = (
    "Exit status: 0 all was done; 1 it was done, and the answer is none or a part of it failed, as the last lines say; "
    "2 it could not be done, and the line on standard error says why."
)


class Help(argparse.HelpFormatter):
    """Defaults are named where there is one, and lines of examples, which are indented, stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = [[line] if line.startswith(" ") else textwrap.wrap(line, width) or [""] for line in text.splitlines()]
        return "\n".join(indent + line for wrapped in lines for line in wrapped)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        if text is None or "%(default)" in text or default in (None, False, argparse.SUPPRESS, [], ()):
            return text
        named = action.option_strings or action.nargs in (argparse.OPTIONAL, argparse.ZERO_OR_MORE)
        return f"{text} (default: %(default)s)" if named else text


def examples(*lines: str, more: str = "") -> dict[str, Any]:
    """Keywords of `add_parser`: how a command is used, and what else there is to say, after its options."""
    shown = "".join(f"  {line}\n" for line in lines)
    return {"formatter_class": Help, "epilog": f"examples:\n{shown}" + (f"\n{more}" if more else "")}


def guarded(action: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """The action as a command: errors and warnings are a line each, without a place in the code.

    Args:
        action: returns the exit status.
    """

    def run(options: argparse.Namespace) -> int:
        said = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            warnings.simplefilter("always", RuntimeWarning)
            try:
                status = action(options)
            except (ValueError, TypeError, ImportError, OSError) as error:
                status, said = FAILED, [" ".join(str(error).split())]
        for message in dict.fromkeys([str(warning.message) for warning in caught] + said):
            print(f"ib-callback: {message}", file=sys.stderr)
        return status

    return run


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs and models: what `load_courses` takes."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN",
        help=f"a directory where {FILENAME} lies, one above it, such a file, or a file of results of many models",
    )  # fmt: skip
    parser.add_argument("--model", action="append", metavar="NAME", help="of a file of results; repeatable")


def add_table_arguments(parser: argparse.ArgumentParser, row: str = "a point") -> None:
    """`--csv` and `--json`; `row` is what a row of them is of."""
    parser.add_argument("--csv", metavar="FILE", help=f"write the numbers as a table, one row {row} (-: to the screen)")
    parser.add_argument("--json", metavar="FILE", help="the same as a list of objects (-: to the screen)")


def write_tables(options: argparse.Namespace, rows: list[dict[str, Any]]) -> list[Path]:
    """Write the tables that were asked for, and return their files; those for the screen are printed."""
    written = []
    for name, make in ((options.csv, tidy.to_csv), (options.json, tidy.to_json)):
        if name == "-":
            print(make(rows), end="")
        elif name is not None:
            write_atomically(name, make(rows).encode())
            written.append(Path(name))
    return written


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """`-o` and `--theme`, for one picture that is drawn if it is asked for."""
    parser.add_argument("-o", "--output", metavar="FILE", help="draw it; .png, .svg or .pdf")
    parser.add_argument("--theme", choices=("light", "dark"), default="light", help="on white, or on dark grey")


def write_picture(options: argparse.Namespace, draw: Callable[[], Figure]) -> list[Path]:
    """Draw and write the picture, if one was asked for, and return its file.

    Raises:
        ValueError: there is no such directory, or another file that no command made.
    """
    if options.output is None:
        return []
    from ib_callback.plot import may_be_replaced, save

    path = Path(options.output)
    if not path.parent.is_dir():
        raise ValueError(f"-o {path}: there is no directory {path.parent}. Make it, or give another path")
    if path.is_dir() or not may_be_replaced(path):
        raise ValueError(
            f"{path}: expected no file, or a picture that ib-callback made, got something else, which is left as it "
            "is. Give another -o, or move it away"
        )
    save(draw(), path)
    return [path]


def report(options: argparse.Namespace, text: str, rows: list[dict[str, Any]], figure: Figure | None) -> None:
    """Write the picture and the tables that were asked for; the text, unless a table goes to the screen.

    Raises:
        ValueError: in the place of the picture is a file that no command made, or Matplotlib writes no such format.
        OSError: a file cannot be written.
    """
    pictures = [] if figure is None else write_picture(options, lambda: figure)
    written = write_tables(options, rows)
    # A table on the screen is to be piped into other programs.
    piped = "-" in (options.csv, options.json)
    if not piped:
        print(text)
    for path in [*pictures, *written]:
        print(path, file=sys.stderr if piped else sys.stdout)


def positive(text: str) -> int:
    """An integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def guard(text: str) -> Guard:
    """A guard by the held-out loss: "loss", a tolerance in nats a token, or "none"."""
    try:
        return "loss" if text == "loss" else None if text == "none" else check_guard(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected loss, none or a tolerance in nats a token such as {TOLERANCE}, got {text!r}"
        ) from None
