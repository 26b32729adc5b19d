"""Checked plain values: what numbers come as (NumPy scalars, 0-dim tensors), they are kept and written as Python's."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping
from typing import Any


def plain_number(value: Any, name: str) -> float | None:
    """A finite Python float, or None as it is; raises a ValueError that names what it is not."""
    if value is None:
        return None
    # float() would accept these; in a file they are damage.
    if isinstance(value, (bool, str, bytes)):
        raise ValueError(f"{name} must be a finite number or None, got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a finite number or None, got {value!r}") from error
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, or None where undefined, got {number}")
    return number


def plain_numbers(values: Any, name: str) -> tuple[float, ...]:
    """Finite Python floats, one per layer; raises a ValueError that says which is not."""
    try:
        plain = [plain_number(value, f"{name}[{index}]") for index, value in enumerate(values)]
    except TypeError as error:
        raise ValueError(f"{name} must be a sequence of finite numbers, got {values!r}") from error
    known = tuple(value for value in plain if value is not None)
    if len(known) != len(plain):
        raise ValueError(f"{name} must hold a finite number per layer, got None at layer {plain.index(None)}")
    return known


def plain_integer(value: Any, name: str) -> int:
    """A Python int of 0 or more; raises a ValueError that names what it is not."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
    return number


def json_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of settings as a file would give them back; raises a ValueError if it could not."""
    # The round trip is a deep copy with lists for tuples, so that settings equal what a file gives back.
    if not isinstance(settings, Mapping):
        raise ValueError(f"settings must be a mapping from names to JSON values, got {settings!r}")
    try:
        return json.loads(json.dumps(dict(settings), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"settings must hold JSON values only (numbers, texts, lists, dicts, None; not NaN): {error}"
        ) from error
