"""The guard of the rules for stopping and selection: it prevents decisions that the held-out loss contradicts."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal, cast

# "run": the guard of the run, for a rule without its own guard; outside of a run the same as "loss".
Guard = Literal["run", "loss"] | float | None
# Late in training, the noise in one measurement of the loss is at most .008 nats. (The scatter of the last 12 losses of
# eight recorded runs, while the loss falls, is .0001 to .008.) About four times that counts as a difference.
TOLERANCE = 0.03


class _LeftOpen(str):
    """The guard that stands for "run": it equals "loss", but `is_left_open` can tell that nobody gave it."""

    __slots__ = ()


def is_left_open(guard: Guard) -> bool:
    """Whether nobody gave this guard; the guard of the run then applies."""
    return isinstance(guard, _LeftOpen)


def check_guard(guard: Any) -> Guard:
    """Check a guard and return its internal form: a tolerance as a float, "run" as a "loss" that `is_left_open`.

    Raises:
        ValueError: the guard is neither "loss", "run", a tolerance in nats nor None.
    """
    if isinstance(guard, str) and guard == "run":
        return cast(Guard, _LeftOpen("loss"))
    if guard is None or (isinstance(guard, str) and guard == "loss"):
        return cast(Guard, guard)
    if isinstance(guard, Real) and not isinstance(guard, bool) and 0 < float(guard) < math.inf:
        return float(guard)
    raise ValueError(
        f'guard: expected "loss", a tolerance in nats a token such as {TOLERANCE}, or None for the published rule, '
        f"got {guard!r}"
    )


def tolerance_of(guard: Guard) -> float | None:
    """By how many nats the loss may exceed its lowest value; None: the loss is not used."""
    return TOLERANCE if isinstance(guard, str) else None if guard is None else float(guard)
