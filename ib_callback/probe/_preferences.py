"""Preference pairs to the sequences of a probe: pair i is sequences 2i, preferred, and 2i + 1, rejected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ib_callback.common.errors import ProbeError
from ib_callback.probe._checks import NO_LABEL
from ib_callback.probe._labels import LabelReader
from ib_callback.probe._pairs import DropError, Pair, continuation_starts, read_pair
from ib_callback.probe._texts import Collected, Table, check_cut, check_lengths
from ib_callback.probe._tokenizing import Encoded, Encoder, take_batch

FEATURE = "preference"
# By number, 0 and 1.
LABEL_NAMES = ("rejected", "preferred")
REASONS = {
    "tie": "of equal texts or scores",
    "empty": "with an empty continuation",
    "template": "that the chat template refuses",
    "long": "with a prompt that fills max_length",
}


class CollectedPairs(NamedTuple):
    """Sequences of pairs, and how many pairs were left out, by reason (see REASONS)."""

    collected: Collected
    dropped: dict[str, int]


def collect_pairs(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    num_sequences: int | None,
    max_length: int,
    progress: Callable[[int], object] = lambda _: None,
) -> CollectedPairs:
    """Tokenise pairs in order, until `num_sequences` sequences are there, two a pair.

    Raises:
        ProbeError: an odd number is asked for, no row makes a pair, or a row is none.
        TypeError: `tokenizer` is not a tokenizer.
    """
    check_lengths(num_sequences, max_length)
    if num_sequences is not None and num_sequences % 2:
        raise ProbeError(
            f"num_sequences: expected an even number, two sequences a pair, got {num_sequences}. "
            f"Pass {num_sequences + 1} or {num_sequences - 1 or 2}."
        )
    if getattr(tokenizer, "truncation_side", "right") != "right":
        raise ProbeError(
            "tokenizer: expected one that cuts on the right, got truncation_side='left', by which pairs would "
            "lose their prompts. Set tokenizer.truncation_side = 'right'."
        )
    encoder, whole = Encoder(tokenizer, max_length), Encoder(tokenizer, None)
    dropped: Counter[str] = Counter()
    read = 0
    table = Table([FEATURE])

    def pairs() -> Iterator[tuple[str, Pair]]:
        nonlocal read
        for row in rows:
            read += 1
            try:
                pair = read_pair(row, tokenizer, read - 1)
            except DropError as reason:
                dropped[str(reason)] += 1
            else:
                yield pair.chosen.text, pair

    source = pairs()
    while batch := take_batch(source, None if num_sequences is None else (num_sequences - len(table)) // 2):
        before = len(table)
        for rows_of_pair in _encoded_pairs([pair for _, pair in batch], encoder, whole, max_length):
            if isinstance(rows_of_pair, str):
                dropped[rows_of_pair] += 1
                continue
            for ids, labels in rows_of_pair:
                table.add(ids, [labels])
        progress(len(table) - before)
    if not len(table):
        reasons = ", ".join(f"{number} {REASONS[reason]}" for reason, number in dropped.items())
        raise ProbeError(
            f"pairs: expected at least one usable pair, got {read} rows, none usable ({reasons or 'no rows'}). "
            "Raise max_length if prompts are long; pass rows with chosen and rejected."
        )
    collected = table.collected([LabelReader(FEATURE, LABEL_NAMES)], read)
    return CollectedPairs(collected, {reason: dropped[reason] for reason in REASONS})


def _encoded_pairs(
    pairs: list[Pair], encoder: Encoder, whole: Encoder, max_length: int
) -> Iterator[list[tuple[np.ndarray, np.ndarray]] | str]:
    """Ids and labels of both members of each pair; or why it is left out: "tie" or "long"."""
    members = [member for pair in pairs for member in (pair.chosen, pair.rejected)]
    templated = [pair.templated for pair in pairs for _ in range(2)]
    encoded = _encode([member.text for member in members], templated, encoder)
    prompts: list[np.ndarray | None] = [None] * len(members)
    if not encoder.has_offsets:
        before = _encode([member.text[: member.border or 0] for member in members], templated, whole)
        prompts = [one.ids for one in before]
    for i, pair in enumerate(pairs):
        both = encoded[2 * i : 2 * i + 2]
        rows = []
        starts = continuation_starts(pair, both, prompts[2 * i : 2 * i + 2])
        for one, start, preferred in zip(both, starts, (1, 0), strict=True):
            check_cut(one, max_length)
            labels = np.full(len(one.ids), NO_LABEL, np.int64)
            labels[start:] = preferred
            if one.special is not None:
                labels[one.special] = NO_LABEL
            rows.append((one.ids, labels))
        labelled = all((labels != NO_LABEL).any() for _, labels in rows)
        # Also of texts that differ: templates trim, tokenizers fold case, and both are cut. One sequence that is
        # preferred and rejected tells nothing of preference, and hides what other pairs tell.
        if np.array_equal(both[0].ids, both[1].ids) and (labelled or len(both[0].ids) < max_length):
            yield "tie"
        else:
            yield rows if labelled else "long"


def _encode(texts: list[str], templated: list[bool], encoder: Encoder) -> list[Encoded]:
    """Encode texts, adding special tokens to those that have none yet."""
    encoded: list[Encoded | None] = [None] * len(texts)
    for kind in (False, True):
        places = [place for place, is_kind in enumerate(templated) if is_kind == kind]
        if places:
            found = encoder([texts[place] for place in places], places=True, special_tokens=not kind)
            for place, one in zip(places, found, strict=True):
                encoded[place] = one
    return [one for one in encoded if one is not None]
