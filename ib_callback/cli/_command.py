"""Shared code of the commands: exit codes, help, files that are read and written, and types of arguments."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ib_callback.analysis.courses import Course, load_courses, measured_courses
from ib_callback.common.errors import RanksError
from ib_callback.common.files import write_atomically
from ib_callback.common.messages import warn
from ib_callback.results import tidy
from ib_callback.results.guard import TOLERANCE, Guard, check_guard
from ib_callback.results.lines import is_measured
from ib_callback.results.measurement import metrics_of
from ib_callback.run.names import DEFAULT_PREFIX, check_prefix
from ib_callback.run.trajectory_file import trajectories_in

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Every command ends with one of these exit codes.
DONE, NOT_ALL, FAILED, INTERRUPTED = 0, 1, 2, 130
EXIT_CODES = (
    "Exit status. 0: everything was done ('nothing can be concluded' is a valid answer). 1: the command finished, but "
    "no checkpoint can be selected, a model, point or picture was left out, or a checkpoint could not be measured. The "
    "last lines or standard error name it. 2: the command failed, and standard error says why."
)
# Longest name of a file, in bytes. File systems allow 255, and `write_atomically` first uses a name longer by 42.
_LONGEST_NAME = 213


class Help(argparse.HelpFormatter):
    """Help that names defaults, and does not wrap the indented lines of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = [[line] if line.startswith(" ") else textwrap.wrap(line, width) or [""] for line in text.splitlines()]
        return "\n".join(indent + line for wrapped in lines for line in wrapped)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        if text is None or default in (None, False, argparse.SUPPRESS, [], ()):
            return text
        if "%(default)" in text or "by default" in text:
            return text
        named = action.option_strings or action.nargs in (argparse.OPTIONAL, argparse.ZERO_OR_MORE)
        return f"{text} (default: %(default)s)" if named else text


def examples(*lines: str, more: str = "") -> dict[str, Any]:
    """Keywords for `add_parser` that show examples, and further remarks, after the options of a command."""
    shown = "".join(f"  {line}\n" for line in lines)
    return {"formatter_class": Help, "epilog": f"examples:\n{shown}" + (f"\n{more}" if more else "")}


def guarded(action: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Turn an action into a command that prints each error and warning as one line, without a place in the code.

    Args:
        action: function that returns the exit status.
    """

    def run(options: argparse.Namespace) -> int:
        said = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            warnings.simplefilter("always", RuntimeWarning)
            try:
                status = action(options)
            except (ValueError, TypeError, ImportError, OSError, RanksError) as error:
                status, said = FAILED, [" ".join(str(error).split())]
        for message in dict.fromkeys([str(warning.message) for warning in caught] + said):
            print(f"ib-callback: {message}", file=sys.stderr)
        return status

    return run


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that select runs and models, for `load_courses`."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN",
        help="the output directory of a run or a directory above it, a trajectory file, or a file of results",
    )  # fmt: skip
    parser.add_argument(
        "--model", action="append", metavar="NAME", help="use this model of the files of results; repeatable"
    )
    add_prefix_argument(parser)


def add_prefix_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--prefix`, which selects the trajectory of a directory that has several."""
    parser.add_argument(
        "--prefix", type=prefix, metavar="NAME",
        help="use the trajectory of the callback with this prefix=, such as code; needed if a directory has several",
    )  # fmt: skip


def add_table_arguments(parser: argparse.ArgumentParser, row: str = "point") -> None:
    """Add `--csv` and `--json`; `row` says what one row is about."""
    parser.add_argument(
        "--csv", metavar="FILE", help=f"write the numbers as a table with one row per {row} (- prints it)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the same as a list of JSON objects (- prints it)")


def courses_of(options: argparse.Namespace) -> tuple[list[Course], int]:
    """The requested runs and models that were measured, and the exit code: `NOT_ALL` if one is left out.

    Raises:
        ValueError: as for `load_courses`.
    """
    every = load_every_course(options)
    measured = measured_courses(every)
    return measured, DONE if len(measured) == len(every) else NOT_ALL


def load_every_course(options: argparse.Namespace) -> list[Course]:
    """The requested runs and models, also those without a measured point.

    Raises:
        ValueError: as for `load_courses`.
    """
    return load_courses(options.runs, options.model, unmeasured=True, prefix=options.prefix)


def plain_metric(metric: str, courses: Sequence[Course]) -> str:
    """A metric without the prefix of these runs, such as code/; "ib/" may stay, because all rules understand it."""
    for course in courses:
        if course.prefix != DEFAULT_PREFIX and metric.startswith(course.prefix):
            known = {name for point in course.trajectory if point.orders for name in metrics_of(point)}
            # A feature may have the same name as the prefix.
            return metric if known & {metric, f"{metric}/information"} else metric.removeprefix(course.prefix)
    return metric


def check_outputs(
    options: argparse.Namespace, inputs: Iterable[str | Path], *, pictures: Sequence[Path] | None = None
) -> None:
    """Check before any work that all output files can be written, and replace only files that such a command wrote.

    Args:
        options: with `csv` and `json`, and optionally `output`.
        inputs: files and directories that are read; for the directory of a run, its trajectories count.
        pictures: paths of pictures, by default that of `output`.

    Raises:
        ValueError: a path is also read, or given twice; its directory does not exist; or it is a directory or a file of
            another kind.
        ImportError: a picture is requested, and Matplotlib is not installed.
        OSError: a path cannot be checked.
    """
    if pictures is None:
        pictures = [Path(options.output)] if getattr(options, "output", None) is not None else []
    tables = [(f"--{name}", getattr(options, name)) for name in ("csv", "json")]
    taken = {_identity(file): "a file that is read" for path in inputs for file in _read_of(Path(path))}
    for option, text in [*(("-o", str(path)) for path in pictures), *tables]:
        if text is not None and (text != "-" or option == "-o"):
            check_place(option, text, taken)
            check = _check_picture if option == "-o" else _check_table
            check(option, Path(text))


def check_place(option: str, text: str, taken: dict[object, str], *, makes_folders: bool = False) -> None:
    """Check that the file of an option can be written and is not taken; then add it to the taken files.

    Args:
        option: the option as it was given.
        text: the path.
        taken: {`_identity` of a file: what it is}.
        makes_folders: whether missing directories are made.

    Raises:
        ValueError: the check failed; the message says what was expected, what was given, and the cure.
    """
    path, said = Path(text), f"{option} {text or repr(text)}"
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise ValueError(f"{said}: expected a name of at most {_LONGEST_NAME} bytes. Give a shorter one")
    folder = Path(os.path.realpath(path)).parent
    if path.is_dir() or text.endswith(("/", os.sep)):
        raise ValueError(f"{said}: expected a file, got a directory. Give the path of a file")
    if not makes_folders and not folder.is_dir():
        raise ValueError(f"{said}: there is no directory {path.parent}. Make it, or give another path")
    if folder.is_dir() and not os.access(folder, os.W_OK):
        raise ValueError(f"{said}: expected a directory that can be written, got {path.parent}. Give another path")
    if path.exists() and not path.is_file():
        raise ValueError(f"{said}: expected a file, got a device. Give the path of a file")
    key = _identity(path)
    if key in taken:
        raise ValueError(f"{said}: expected a file of its own, got {taken[key]}. Give another path")
    taken[key] = f"the file of {option}"


def read_files(*paths: str | Path | None) -> dict[object, str]:
    """The files that are read from these paths, also from directories of runs, in the form for `check_place`."""
    return {_identity(file): "a file that is read" for path in paths if path for file in _read_of(Path(path))}


def _read_of(path: Path) -> Iterator[Path]:
    if path.is_dir():
        with suppress(OSError):  # the code that loads the run reports that it cannot be searched
            yield from trajectories_in(path)
    else:
        yield path


def _identity(path: Path) -> object:
    """A key that is the same for all spellings of a path and for links to it."""
    try:
        found = path.stat()
    except OSError:
        return os.path.realpath(path)
    return found.st_dev, found.st_ino


def _check_picture(option: str, path: Path) -> None:
    from ib_callback.plot import check_format, may_be_replaced

    if not may_be_replaced(path):
        raise ValueError(
            f"{option} {path}: expected a new file, or a picture that ib-callback made, got something else. It was not "
            "changed. Give another path, or move it away"
        )
    try:
        check_format(path)
    except ValueError as error:
        raise ValueError(f"{option} {path}: {error}. Give another suffix") from None


def _check_table(option: str, path: Path) -> None:
    """Check that only a table is replaced: CSV has a comma in its first line, JSON begins with a list."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        first = file.readline(1 << 20)
    is_table = first.startswith(b"[") if option == "--json" else b"," in first and first[:1] not in b"{[<%"
    if first and (not is_table or b"\0" in first):
        what = "measurements" if is_measured(path) else "something else"
        raise ValueError(
            f"{option} {path}: expected a new file, or a table that can be replaced, got {what}. The file was not "
            "changed. Give another path, or move it away"
        )


def check_useless(options: argparse.Namespace, names: Sequence[str], when: str, cure: str) -> None:
    """Check that no option was given that would be ignored.

    Args:
        options: the options; the default of each is None, false or empty.
        names: names of the options that would be ignored.
        when: the reason as the end of a sentence, such as "without -o".
        cure: what to do, as a sentence without its full stop.

    Raises:
        ValueError: one of them was given.
    """
    for name in names:
        if getattr(options, name) not in (None, False, []):
            raise ValueError(f"--{name.replace('_', '-')} would have no effect {when}. {cure}")


def write_tables(
    options: argparse.Namespace, rows: list[dict[str, Any]], objects: list[dict[str, Any]] | None = None
) -> list[Path]:
    """Write the requested tables, and return their files; tables for the screen are printed.

    Args:
        options: with `csv` and `json`.
        rows: rows of the table.
        objects: objects for JSON, by default the rows.
    """
    written = []
    made = ((options.csv, tidy.to_csv, rows), (options.json, tidy.to_json, rows if objects is None else objects))
    for name, make, content in made:
        if name == "-":
            print(make(content), end="")
        elif name is not None:
            write_atomically(name, make(content).encode())
            written.append(Path(name))
    return written


def check_picture_options(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Check that no option of the picture was given without -o.

    Raises:
        ValueError: one of them was given.
    """
    if options.output is None:
        check_useless(options, names, "without -o", "Give -o FILE, or leave it out")


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `-o` and `--theme`, for one picture on request."""
    parser.add_argument("-o", "--output", metavar="FILE", help="draw a picture into a .png, .svg or .pdf file")
    parser.add_argument("--theme", choices=("light", "dark"), default="light", help="background: white or dark grey")


def finish(
    options: argparse.Namespace,
    text: str,
    rows: list[dict[str, Any]],
    draw: Callable[[], Figure],
    status: int = DONE,
    *,
    objects: list[dict[str, Any]] | None = None,
) -> int:
    """Print the text, unless a table goes to the screen; write the tables, and then the picture, if requested.

    If the picture cannot be drawn, the command still gives its other results, and says why there is no picture.

    Args:
        options: options that `check_outputs` has checked.
        text: text for the screen.
        rows: rows of the tables.
        draw: makes the picture, or raises a ValueError that says why it cannot.
        status: the exit code if everything can be drawn.
        objects: objects for JSON, by default the rows.

    Returns:
        The exit status.

    Raises:
        OSError: a file cannot be written.
    """
    # A table on the screen is meant for a pipe into another program, so nothing else may go there.
    piped = "-" in (options.csv, options.json)
    if not piped:
        print(text)
    written = write_tables(options, rows, objects)
    if options.output is not None:
        from ib_callback.plot import save

        try:
            figure = draw()
        except ValueError as error:
            warn(f"no picture: {error}")
            status = NOT_ALL
        else:
            save(figure, options.output)
            written.insert(0, Path(options.output))
    for path in written:
        print(path, file=sys.stderr if piped else sys.stdout)
    return status


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def prefix(text: str) -> str:
    """Parse the prefix of a run's keys, with or without its slash."""
    try:
        return check_prefix(text if text.endswith("/") else f"{text}/")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("prefix: ").rstrip(".")) from None


def guard(text: str) -> Guard:
    """Parse a guard by the held-out loss: "loss", a tolerance in nats a token, or "none"."""
    try:
        return "loss" if text == "loss" else None if text == "none" else check_guard(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected loss, none or a tolerance in nats a token such as {TOLERANCE}, got {text!r}"
        ) from None
