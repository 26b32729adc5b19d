"""A bar for what takes long, where `tqdm` is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(what: str, *, total: int | None, unit: str, shown: bool | None) -> Iterator[Callable[[int], object]]:
    """A bar that is told how many more are done.

    Args:
        what: is done, in a word or two.
        total: how many there are; None: not known.
        unit: what is counted.
        shown: None: on a terminal.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield lambda number: None
        return
    with tqdm(total=total, desc=what, unit=unit, disable=None if shown is None else not shown) as bar:
        yield bar.update
