"""The labels of valid positions, n-gram contexts and features, as nested segments of sorted positions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ib_callback.common.errors import ProbeError

ORDER_NAMES = {"token": 1, "bigram": 2, "trigram": 3, "quadgram": 4}
_NAME_OF_ORDER = {order: name for name, order in ORDER_NAMES.items()}


def order_name(order: int) -> str:
    """Name of an n-gram order: 1 → `token` … 4 → `quadgram`, 5 → `5-gram`."""
    return _NAME_OF_ORDER.get(order, f"{order}-gram")


def parse_orders(orders: str | Iterable[str]) -> dict[str, int]:
    """Map the names of orders to context widths, in the given order.

    >>> parse_orders(["trigram", "token", "5-gram"])
    {'trigram': 3, 'token': 1, '5-gram': 5}
    """
    if not isinstance(orders, Iterable):
        raise TypeError(f'orders: expected names such as ("token", "bigram"), got {orders!r}.')
    names = [orders] if isinstance(orders, str) else list(orders)
    if not names:
        raise ValueError('orders: expected at least one order, got none. For example orders=("token", "bigram").')
    return {name: _order_width(name) for name in names}


def _order_width(name: str) -> int:
    if isinstance(name, str):
        if name in ORDER_NAMES:
            return ORDER_NAMES[name]
        match = re.fullmatch(r"([1-9][0-9]{0,2})-gram", name)
        if match and int(match.group(1)) > len(ORDER_NAMES):
            return int(match.group(1))
    raise ValueError(
        f"orders: unknown order {name!r}. Expected one of {', '.join(ORDER_NAMES)}, '5-gram', '6-gram', …."
    )


@dataclass(frozen=True)
class Positions:
    """The T valid positions of a probe, in reading order: `sequence` [T] and `offset` [T] in the padded table."""

    sequence: np.ndarray
    offset: np.ndarray

    def __len__(self) -> int:
        return len(self.sequence)


def valid_positions(mask: np.ndarray, width: int, *, probe: str = "the probe") -> Positions:
    """Positions at which a context of `width` tokens ends and another begins just after, all of them real tokens.

    Args:
        mask: [N, S] bool, True at real tokens.
        width: K, the widest n-gram order.
        probe: name of the probe, for the message.

    Raises:
        ProbeError: there is no such position.
    """
    num_sequences = len(mask)
    # A window of 2K tokens that starts at s - K + 1 holds both contexts of s.
    totals = np.concatenate([np.zeros((num_sequences, 1), np.int32), np.cumsum(mask, axis=1, dtype=np.int32)], axis=1)
    whole = totals[:, 2 * width :] - totals[:, : -2 * width] == 2 * width
    sequence, start = np.nonzero(whole)
    if not len(sequence):
        raise ProbeError(
            f"probe {probe!r}: no valid position. Expected sequences of at least {2 * width} real tokens "
            f"({width} before and {width} after a position for the widest order), got at most {mask.sum(1).max()}. "
            "Use longer texts or narrower orders."
        )
    return Positions(sequence, start + width - 1)


@dataclass(frozen=True)
class LabelSet:
    """One labelling of positions whose conditional entropy is measured.

    name: e.g. `("complexity", "bigram")` or `("feature", "language")`.
    num_positions: positions that carry a label of this set.
    num_labels: distinct labels that occur.
    """

    name: tuple[str, str]
    num_positions: int
    num_labels: int


@dataclass(frozen=True)
class Segments:
    """Groups of positions that carry the same label in one or more label sets.

    A bigram that always follows the same token covers exactly the positions of one trigram label. Such labels
    form one group, with one histogram and one entropy.

    order: [M] positions, sorted so that each group is contiguous.
    start, stop: [G] bounds of each group within `order`; every group has at least two positions.
    sets: [G] int64; bit i is set if the group is a label of label set i.
    alone: [T] int64; bit i is set if no other position has the same label in label set i.
    """

    order: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    sets: np.ndarray
    alone: np.ndarray


def context_segments(contexts: np.ndarray, widths: Sequence[int], first_bit: int) -> Segments:
    """Group positions by their contexts cut to each width: after one sort all orders are nested segments.

    Args:
        contexts: [T, K] token ids, nearest token first.
        widths: widths to group by, ascending, each at most K.
        first_bit: number of the label set of the first width; those of the other widths follow.
    """
    order = _sort_rows(contexts[:, : widths[-1]])
    changed = np.zeros(len(order), bool)
    changed[:1] = True
    parts = []
    for bit, (narrower, width) in enumerate(pairwise([0, *widths]), start=first_bit):
        for column in range(narrower, width):
            tokens = contexts[order, column]
            changed[1:] |= tokens[1:] != tokens[:-1]
        parts.append((bit, np.flatnonzero(changed)))
    return _merge_segments(order, parts, len(contexts))


def value_segments(values: np.ndarray, bit: int) -> Segments:
    """Group positions by one integer each; negative values carry no label.

    Args:
        values: [T] labels.
        bit: number of the label set.
    """
    labelled = np.flatnonzero(values >= 0)
    order = labelled[np.argsort(values[labelled], kind="stable")]
    starts = np.flatnonzero(np.diff(values[order], prepend=-1))
    return _merge_segments(order, [(bit, starts)], len(values))


def _sort_rows(rows: np.ndarray) -> np.ndarray:
    """Stable lexicographic argsort of the rows; the first column is the most significant."""
    # Packing columns into 63-bit keys needs one or two sorts instead of one for each column.
    bits = max(1, int(rows.max(initial=0)).bit_length())
    per_key = max(1, 63 // bits)
    keys = []
    for begin in range(0, rows.shape[1], per_key):
        key = np.zeros(len(rows), np.int64)
        for column in rows[:, begin : begin + per_key].T:
            key = (key << bits) | column
        keys.append(key)
    return np.lexsort(keys[::-1])


def _merge_segments(order: np.ndarray, parts: list[tuple[int, np.ndarray]], num_positions: int) -> Segments:
    """Make one group of each distinct segment, with the bits of all label sets in which it is a label."""
    total = len(order)
    alone = np.zeros(num_positions, np.int64)
    bounds, bits = [], []
    for bit, starts in parts:
        stops = np.append(starts[1:], total) if len(starts) else starts
        single = stops - starts == 1
        alone[order[starts[single]]] |= 1 << bit
        bounds.append(starts[~single] * (total + 1) + stops[~single])
        bits.append(np.full(int((~single).sum()), 1 << bit, np.int64))
    keys, group = np.unique(np.concatenate(bounds), return_inverse=True)
    sets = np.zeros(len(keys), np.int64)
    np.bitwise_or.at(sets, group, np.concatenate(bits))
    return Segments(order.astype(np.int32), keys // (total + 1), keys % (total + 1), sets, alone)
