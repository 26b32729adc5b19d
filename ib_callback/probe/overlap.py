"""How much of a probe occurs in training text: whole sequences, and n-grams of tokens.

A held-out probe is held out only if the model has not been trained on it. The usual test is for common n-grams of 13
tokens (Brown et al., 2020, appendix C). The n-grams of the probe are kept by a hash of 64 bits; training text
streams past, and whatever has the hash of one of them is compared with it token by token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ib_callback.common.checks import check_integer
from ib_callback.common.errors import ProbeError
from ib_callback.probe._tokenizing import Encoder

Integers = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

NGRAM = 13
# Tokens looked at in one go: few enough to stay in a core's cache, enough that calls do not count.
CHUNK = 1 << 16
# Bits of the table that says which hashes may be among those of the probe, beyond those needed to number them.
_SPARE_BITS = 4
_MOST_BITS = 26
_MIX, _BASE = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What a probe shares with the training text that was looked at.

    Attributes:
        num_sequences: of the probe.
        num_ngrams: n-grams in the probe, each place counted; those that occur in the text are `found_ngrams`.
        n: tokens of an n-gram.
        sequences: numbers of the sequences that share an n-gram with the text.
        duplicates: numbers of the sequences that occur in it as a whole. The first and the last token of a sequence may
            differ, where tokenizers put special ones.
        share_of_sequence: [N] share of each sequence's n-grams that was found; 0 for those that are too short.
        too_short: sequences of fewer than n tokens, of which nothing can be said.
        num_texts, num_tokens: examined. The text of a packed block is one text.
    """

    num_sequences: int
    num_ngrams: int
    found_ngrams: int
    n: int
    sequences: tuple[int, ...]
    duplicates: tuple[int, ...]
    share_of_sequence: tuple[float, ...]
    too_short: int
    num_texts: int
    num_tokens: int

    @property
    def share(self) -> float:
        """Share of the probe's n-grams that occur in the text, in [0, 1]."""
        return self.found_ngrams / self.num_ngrams if self.num_ngrams else 0.0

    def __bool__(self) -> bool:
        """Whether anything was found."""
        return bool(self.sequences or self.duplicates)

    def __str__(self) -> str:
        short = f" ({self.too_short:,} have fewer than {self.n} tokens and cannot be judged)" if self.too_short else ""
        return (
            f"{len(self.sequences):,} of {self.num_sequences:,} sequences share a run of {self.n} tokens with the "
            f"{self.num_texts:,} texts ({self.num_tokens:,} tokens) examined, {len(self.duplicates):,} of them occur "
            f"there as a whole, and {self.share:.2%} of the {self.n}-grams do{short}"
        )


def overlap(
    input_ids: Tensor,
    attention_mask: Tensor,
    data: Any,
    tokenizer: Any,
    *,
    text_column: str,
    n: int,
    max_texts: int | None,
) -> Overlap:
    """What `Probe.overlap` says, of ids [N, S] and a mask [N, S] of a probe."""
    check_integer("n", n, minimum=1, cure=f"{NGRAM} is usual")
    if max_texts is not None:
        check_integer("max_texts", max_texts, minimum=1, cure="None is for all")
    index = _Index(input_ids, attention_mask, n)
    for text in islice(_texts_of(data, tokenizer, text_column), max_texts):
        index.add(text)
    return index.result()


class _Index:
    """The n-grams of a probe, and which of them have been seen."""

    def __init__(self, input_ids: Tensor, attention_mask: Tensor, n: int) -> None:
        mask = attention_mask.numpy()
        self.n = n
        self.num_sequences = len(mask)
        self.tokens: Integers = input_ids.numpy()[mask]
        ends = np.cumsum(mask.sum(1))
        self.bounds = np.stack([ends - mask.sum(1), ends], axis=1)
        number = np.maximum(mask.sum(1) - n + 1, 0)
        self.first_place = np.cumsum(number) - number
        self.sequence = np.repeat(np.arange(len(mask), dtype=np.int32), number)
        self.place = np.arange(len(self.sequence)) + np.repeat(self.bounds[:, 0] - self.first_place, number)
        hashes = ngram_hashes(self.tokens, n)[self.place]
        self.hashes, self.first, self.kind = np.unique(hashes, return_index=True, return_inverse=True)
        self.seen = np.zeros(len(self.hashes), bool)
        bits = min(max(16, len(self.hashes).bit_length() + _SPARE_BITS), _MOST_BITS)
        self.shift = np.uint64(64 - bits)
        self.may_be = np.zeros(1 << bits, bool)
        self.may_be[(self.hashes >> self.shift).astype(np.int64)] = True
        self._set_anchors()
        self.num_texts = self.num_tokens = 0
        # Rows that wait to be looked at together.
        self._rows: list[Integers] = []
        self._waiting = 0

    def _set_anchors(self) -> None:
        """Of each sequence the n-gram that any occurrence of the whole begins with, special tokens left aside."""
        self.anchored: dict[int, set[int]] = {}
        self.cores: dict[int, Integers] = {}
        for sequence, (begin, end) in enumerate(self.bounds.tolist()):
            if end - begin < self.n:
                continue
            special = 1 if end - begin >= self.n + 2 else 0
            self.cores[sequence] = self.tokens[begin + special : end - special]
            kind = int(self.kind[self.first_place[sequence] + special])
            self.anchored.setdefault(kind, set()).add(sequence)
        self.is_anchor = np.zeros(len(self.hashes), bool)
        self.is_anchor[list(self.anchored)] = True
        self.longest = max(map(len, self.cores.values()), default=self.n)
        self.duplicates: set[int] = set()

    def add(self, text: Any) -> None:
        """Look at one text: ids [n] of any kind, which may lie on a disk and are copied in parts."""
        self.num_texts += 1
        self.num_tokens += len(text)
        if len(text) < self.n:
            return
        # Parts that overlap by as much as a sequence can be long.
        step = max(CHUNK, 4 * self.longest)
        for begin in range(0, max(len(text) - self.longest, 1), step):
            self._rows.append(np.asarray(text[begin : begin + step + self.longest], np.int64))
            self._waiting += len(self._rows[-1])
            if self._waiting >= CHUNK:
                self._flush()

    def _flush(self) -> None:
        rows, self._rows, self._waiting = self._rows, [], 0
        if not rows:
            return
        tokens = np.concatenate(rows) if len(rows) > 1 else rows[0]
        ends = np.cumsum([len(row) for row in rows])
        hashes = ngram_hashes(tokens, self.n)
        candidates = np.flatnonzero(self.may_be[(hashes >> self.shift).astype(np.int64)])
        kinds = np.searchsorted(self.hashes, hashes[candidates])
        kinds = np.minimum(kinds, len(self.hashes) - 1)
        row_end = ends[np.searchsorted(ends, candidates, side="right")]
        hit = (self.hashes[kinds] == hashes[candidates]) & (candidates + self.n <= row_end)
        candidates, kinds, row_end = candidates[hit], kinds[hit], row_end[hit]
        if not len(candidates):
            return
        window = np.arange(self.n)
        same = tokens[candidates[:, None] + window] == self.tokens[self.place[self.first[kinds]][:, None] + window]
        equal = same.all(1)
        self.seen[kinds[equal]] = True
        anchors = equal & self.is_anchor[kinds]
        for place, kind, end in zip(candidates[anchors], kinds[anchors].tolist(), row_end[anchors], strict=True):
            text = tokens[place:end]
            for sequence in self.anchored[kind] - self.duplicates:
                core = self.cores[sequence]
                if np.array_equal(text[: len(core)], core):
                    self.duplicates.add(sequence)

    def result(self) -> Overlap:
        self._flush()
        found = self.seen[self.kind]
        of_sequence = np.bincount(self.sequence, minlength=self.num_sequences)
        seen_of = np.bincount(self.sequence, weights=found, minlength=self.num_sequences)
        return Overlap(
            num_sequences=self.num_sequences,
            num_ngrams=len(self.kind),
            found_ngrams=int(found.sum()),
            n=self.n,
            sequences=tuple(np.flatnonzero(seen_of).tolist()),
            duplicates=tuple(sorted(self.duplicates)),
            share_of_sequence=tuple((seen_of / np.maximum(of_sequence, 1)).tolist()),
            too_short=int((of_sequence == 0).sum()),
            num_texts=self.num_texts,
            num_tokens=self.num_tokens,
        )


def ngram_hashes(tokens: Integers, n: int) -> Hashes:
    """Hash of the n-gram that begins at each place; the last n - 1 places, where none does, are left out.

    Σ h(t[i + j]) B^(n-1-j) modulo 2^64.

    >>> ngram_hashes(np.array([1, 2, 3, 1, 2]), 2).tolist()[0] == ngram_hashes(np.array([1, 2, 3, 1, 2]), 2).tolist()[3]
    True
    """
    number = max(len(tokens) - n + 1, 0)
    mixed = tokens.astype(np.uint64) * _MIX
    mixed ^= mixed >> np.uint64(29)  # neighbouring ids, multiplied, are far from random in their lower bits
    hashes = np.zeros(number, np.uint64)
    for j in range(n if number else 0):
        hashes *= _BASE
        hashes += mixed[j : j + number]
    return hashes


def _texts_of(data: Any, tokenizer: Any, text_column: str) -> Iterator[Any]:
    """Each text or row of `data` as ids [n]; see `Probe.overlap`.

    Raises:
        ProbeError: texts without a tokenizer, or rows without tokens and text.
        TypeError: data of another kind.
    """
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise TypeError(
            f"data: expected texts, sequences of token ids or rows with a column of either, got {type(data).__name__}. "
            "Pass a single text as [text]."
        )
    encoder: Encoder | None = None
    one_long_array = getattr(data, "ndim", None) == 1 and hasattr(data, "dtype")
    for index, item in enumerate([data] if one_long_array else data):
        item = _without_columns(item, text_column, index)
        if isinstance(item, str):
            if tokenizer is None:
                raise ProbeError(
                    "texts can be compared only as tokens: expected tokenizer=, that of the probe, got None. "
                    "Or pass rows with input_ids."
                )
            encoder = encoder or Encoder(tokenizer, None)
            item = encoder(item).ids
        ids = item.detach().cpu().numpy() if isinstance(item, torch.Tensor) else np.asanyarray(item)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise TypeError(
                f"data: expected a text or a sequence of token ids, got {type(item).__name__} of shape {ids.shape} and "
                f"dtype {ids.dtype} at index {index}. Pass a single sequence as [ids]."
            )
        yield ids


def _without_columns(item: Any, text_column: str, index: int) -> Any:
    if not (isinstance(item, Mapping) or hasattr(item, "keys")):
        # As (inputs, labels), the way TensorDataset gives rows.
        is_pair = isinstance(item, (tuple, list)) and len(item) > 0 and getattr(item[0], "ndim", 0) == 1
        return item[0] if is_pair else item
    for column in ("input_ids", text_column):
        if column in item:
            return item[column]
    raise ProbeError(
        f"data: expected rows with a column input_ids or {text_column!r}, got {', '.join(map(str, item)) or 'none'} in "
        f"row {index}. Pass text_column=."
    )
