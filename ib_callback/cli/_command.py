"""What the commands have in common: how they end, and types of their arguments."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable


def guarded(action: Callable[[argparse.Namespace], int], failed: int = 2) -> Callable[[argparse.Namespace], int]:
    """The action as a command: errors and warnings are a line each, without a place in the code.

    Args:
        action: returns the exit status.
        failed: the exit status after an error.
    """

    def run(options: argparse.Namespace) -> int:
        said = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            warnings.simplefilter("always", RuntimeWarning)
            try:
                status = action(options)
            except (ValueError, TypeError, ImportError, OSError) as error:
                status, said = failed, [" ".join(str(error).split())]
        for message in dict.fromkeys([str(warning.message) for warning in caught] + said):
            print(f"ib-callback: {message}", file=sys.stderr)
        return status

    return run


def positive(text: str) -> int:
    """An integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value
