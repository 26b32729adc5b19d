"""Messages for users: warnings, log lines, descriptions of errors. No function here raises, even if output fails.

All messages go through the logger `ib_callback` or through `warnings`. Silence them there:
`logging.getLogger("ib_callback").setLevel(logging.ERROR)`, `warnings.filterwarnings("ignore", module="ib_callback")`.
"""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import suppress

_log = logging.getLogger("ib_callback")


def describe(error: BaseException) -> str:
    """The type of an error and its text: "OSError: no space left"; only the type if the text cannot be made."""
    name = type(error).__name__
    try:
        text = str(error)
    except Exception:
        return f"{name} (it cannot be printed)"
    return f"{name}: {text}" if text else name


def warn(message: str, *, stacklevel: int = 2) -> None:
    """Give a RuntimeWarning that never raises: if warnings are errors, or cannot be shown, it goes to the log.

    Use it for everything that can happen during training, because a warning must not end a run.

    Args:
        message: what went wrong, and what follows from it.
        stacklevel: as in `warnings.warn`: 2 is the caller of the function that calls this.
    """
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel + 1)
    except Exception:
        note(message, level=logging.WARNING)


def note(message: str, *, level: int = logging.INFO) -> None:
    """Write a line to the log, if there is one."""
    with suppress(Exception):  # a handler of the user may fail, and then there is no other way to tell
        _log.log(level, "%s", message)


def tell(message: str) -> None:
    """Show a line to the user: in the log, or on standard error if no logging is set up."""
    with suppress(Exception):  # the stream may be closed, full or missing
        if _log.isEnabledFor(logging.INFO) and _log.hasHandlers():
            note(message)
        elif _log.isEnabledFor(logging.INFO) or not _is_set_up():
            sys.stderr.write(f"ib_callback: {message}\n")


def _is_set_up() -> bool:
    return _log.level != logging.NOTSET or _log.disabled or _log.manager.disable >= logging.INFO
