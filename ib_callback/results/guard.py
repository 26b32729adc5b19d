"""The guard of rules for stopping and selection: nothing is done against the loss on held-out text."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal, cast

# "run": that of the run, for a rule to which nobody gave one; "loss" outside of a run.
Guard = Literal["run", "loss"] | float | None
# Two measurements of one run on one probe differ by noise of at most .008 nats each late in training (eight recorded
# runs, scatter of their last 12 losses: .0001 to .008, while the loss falls). Four of these are a difference.
TOLERANCE = 0.03


class _LeftOpen(str):
    """What becomes of "run": "loss" in every respect, but known not to have been given."""

    __slots__ = ()


def is_left_open(guard: Guard) -> bool:
    """Whether nobody gave this guard, so that the one of the run counts."""
    return isinstance(guard, _LeftOpen)


def check_guard(guard: Any) -> Guard:
    """The guard as it is kept: a tolerance as a float, "run" as a "loss" of which `is_left_open` is true.

    Raises:
        ValueError: neither "loss", nor a tolerance in nats, nor None.
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
    """By how many nats the loss may be above its lowest; None: it is not looked at."""
    return TOLERANCE if isinstance(guard, str) else None if guard is None else float(guard)
