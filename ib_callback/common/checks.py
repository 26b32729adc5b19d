"""Checks of arguments that several modules take."""

from __future__ import annotations

import operator
import re
from typing import Any

import numpy as np


def check_integer(name: str, value: Any, *, minimum: int, cure: str) -> int:
    """Return `value` as an int if it is an integer of at least `minimum`. NumPy integers are accepted, bools are not.

    Args:
        name: name of the argument, for the message.
        value: the value that was passed.
        minimum: the smallest allowed value.
        cure: what to pass instead, as the end of a sentence.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is less than `minimum`.
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


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def check_bytes(name: str, value: Any, *, cure: str) -> int:
    """Return a number of bytes: an integer of at least 1, or text with a unit.

    Args:
        name: name of the argument, for the message.
        value: the value that was passed.
        cure: what to pass instead, as the end of a sentence.

    Raises:
        TypeError: `value` is neither text nor an integer.
        ValueError: the text has another form, or the number is less than 1.

    >>> check_bytes("budget", "1.5 GiB", cure=""), check_bytes("budget", "500MB", cure="")
    (1610612736, 500000000)
    """
    if not isinstance(value, str):
        return check_integer(name, value, minimum=1, cure=cure)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
    unit = None if match is None else _UNITS.get(match.group(2).lower())
    number = 0 if match is None or unit is None else int(float(match.group(1)) * unit)
    if number < 1:
        raise ValueError(f'{name}: expected bytes, or text such as "8GiB" or "500 MB", got {value!r}; {cure}.')
    return number
