"""A bar for what takes long, where `tqdm` is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ib_callback.common.optional import is_installed


@contextmanager
def progress_bar(
    what: str, *, total: int | None, unit: str, shown: bool | None, delay: float = 0.0
) -> Iterator[Callable[[int], None]]:
    """A bar that is told how many are done, and goes forward only. Where it cannot be shown, none is.

    Args:
        what: is done, in a word or two.
        total: how many there are; None: not known.
        unit: what is counted.
        shown: None: on a terminal.
        delay: seconds until it appears; it then goes away at the end.
    """
    bar: Any = None
    with suppress(Exception):  # as of a stream that is closed, or not there
        # Not even a hidden bar, which would start a thread.
        if (sys.stderr.isatty() if shown is None else shown) and is_installed("tqdm"):
            from tqdm.auto import tqdm

            bar = tqdm(total=total, desc=what, unit=unit, leave=not delay, delay=delay, file=_Unfailing(sys.stderr))

    def reached(done: int) -> None:
        with suppress(Exception):
            if bar is not None:
                bar.update(max(done - bar.n, 0))

    try:
        yield reached
    finally:
        with suppress(Exception):
            if bar is not None:
                bar.close()


class _Unfailing:
    """A stream that raises nothing in writing: tqdm would keep its lock, for which others then wait for ever."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(Exception):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(Exception):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
