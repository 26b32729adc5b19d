"""A bar for what takes long, where `tqdm` is installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    what: str, *, total: int | None, unit: str, shown: bool | None, delay: float = 0.0
) -> Iterator[Callable[[int], None]]:
    """A bar that is told how many are done, and goes forward only.

    Args:
        what: is done, in a word or two.
        total: how many there are; None: not known.
        unit: what is counted.
        shown: None: on a terminal.
        delay: seconds until it appears; it then goes away at the end.
    """
    shown = sys.stderr.isatty() if shown is None else shown
    if not shown or importlib.util.find_spec("tqdm") is None:
        yield lambda done: None  # not even a hidden bar, which would start a thread
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, unit=unit, leave=not delay, delay=delay) as bar:

        def reached(done: int) -> None:
            bar.update(max(done - bar.n, 0))

        yield reached
