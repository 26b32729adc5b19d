"""A progress bar for long work, if `tqdm` is installed."""

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
    """Show a bar; call the result with the number of things done. The bar only moves forward.

    If the bar cannot be shown, nothing happens.

    Args:
        what: the work, in a word or two.
        total: number of things to do; None: unknown.
        unit: the things that are counted.
        shown: whether to show the bar; None: only on a terminal.
        delay: seconds until the bar appears. With a delay, the bar is removed at the end.
    """
    bar: Any = None
    with suppress(Exception):  # for example, if the stream is closed or missing
        # Not even a hidden bar, because that would start a thread.
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
    """A stream whose writing never raises, because tqdm would then keep its lock, and others would wait forever."""

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
