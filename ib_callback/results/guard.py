"""The guard of rules for stopping and selection: nothing is done against the loss on held-out text."""

from __future__ import annotations

import math
from typing import Any, Literal

Guard = Literal["loss"] | float | None
# Two measurements of one run on one probe differ by noise of at most .008 nats each late in training (eight recorded
# runs, scatter of their last 12 losses: .0001 to .008, while the loss falls). Four of these are a difference.
TOLERANCE = 0.03


def check_guard(guard: Any) -> Guard:
    """Raise a ValueError for what is no guard.

    Raises:
        ValueError: neither "loss", nor a tolerance in nats, nor None.
    """
    is_number = isinstance(guard, (int, float)) and not isinstance(guard, bool)
    if guard in ("loss", None) or (is_number and 0 < guard < math.inf):
        return guard
    raise ValueError(
        f'guard: expected "loss", a tolerance in nats a token such as {TOLERANCE}, or None for the published rule, '
        f"got {guard!r}"
    )


def tolerance_of(guard: Guard) -> float | None:
    """By how many nats the loss may be above its lowest; None: it is not looked at."""
    return TOLERANCE if guard == "loss" else None if guard is None else float(guard)
