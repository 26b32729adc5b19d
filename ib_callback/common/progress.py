"""A bar for what takes long, where `tqdm` is installed."""

from __future__ import annotations

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
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield lambda done: None
        return
    disable = None if shown is None else not shown
    with tqdm(total=total, desc=what, unit=unit, disable=disable, leave=not delay, delay=delay) as bar:

        def reached(done: int) -> None:
            bar.update(max(done - bar.n, 0))

        yield reached
