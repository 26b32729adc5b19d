"""Checks of arguments that several modules take."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np


def check_integer(name: str, value: Any, *, minimum: int, cure: str) -> int:
    """Return `value` as an int if it is an integer of at least `minimum`; NumPy's integers are, bools are not.

    Args:
        name: of the argument, for the message.
        value: what was passed.
        minimum: the least that makes sense.
        cure: what to pass instead, as the end of a sentence.

    Raises:
        TypeError: not an integer.
        ValueError: less than `minimum`.
    """
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    expected = f"{name}: expected an integer of at least {minimum}"
    if number is None:
        raise TypeError(f"{expected}, got {value!r} ({type(value).__name__}); {cure}.")
    if number < minimum:
        raise ValueError(f"{expected}, got {number}; {cure}.")
    return number
