"""What users read: warnings, lines of the log, descriptions of errors. None of it raises, whatever the way out is like.

All of it goes through the logger `ib_callback`, or through `warnings`, and is silenced there:
`logging.getLogger("ib_callback").setLevel(logging.ERROR)`, `warnings.filterwarnings("ignore", module="ib_callback")`.
"""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import suppress

_log = logging.getLogger("ib_callback")


def describe(error: BaseException) -> str:
    """The type of an error and what it says: "OSError: no space left"; of one that cannot say anything, the type."""
    name = type(error).__name__
    try:
        text = str(error)
    except Exception:
        return f"{name} (it cannot be printed)"
    return f"{name}: {text}" if text else name


def warn(message: str, *, stacklevel: int = 2) -> None:
    """A RuntimeWarning that raises nothing: where warnings are errors, or cannot be shown, it goes to the log.

    For all that may happen while training runs, which no warning may end.

    Args:
        message: what went wrong, and what follows from it.
        stacklevel: as of `warnings.warn`: 2 is whoever called what calls this.
    """
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel + 1)
    except Exception:
        note(message, level=logging.WARNING)


def note(message: str, *, level: int = logging.INFO) -> None:
    """A line for the log, where there is one."""
    with suppress(Exception):  # of a handler of the user's; what it cannot take, nobody can be told
        _log.log(level, "%s", message)


def tell(message: str) -> None:
    """A line for whoever watches: in the log, or on standard error where nobody has said what the log is to have."""
    with suppress(Exception):  # of a stream that is closed, full or not there
        if _log.isEnabledFor(logging.INFO) and _log.hasHandlers():
            note(message)
        elif _log.isEnabledFor(logging.INFO) or not _is_set_up():
            sys.stderr.write(f"ib_callback: {message}\n")


def _is_set_up() -> bool:
    return _log.level != logging.NOTSET or _log.disabled or _log.manager.disable >= logging.INFO
