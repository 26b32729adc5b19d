"""How much of a probe occurs in training text: whole sequences, and n-grams of tokens.

A probe is held out only if the model has not been trained on its text. The usual test looks for common n-grams of 13
tokens (Brown et al., 2020, appendix C). The n-grams of the probe are kept as 64-bit hashes. Training text streams past
and is searched for these hashes; whole sequences are then compared token by token.
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
# Tokens looked at in one step: few enough to stay in a core's cache.
CHUNK = 1 << 16
# A table of the first bits of all hashes of the probe is looked up first; it rules out most hashes of the text.
_FIRST_BITS = 22
_BELOW = np.uint64(64 - _FIRST_BITS)
_MIX, _BASE = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What a probe shares with the training text that was looked at.

    Attributes:
        num_sequences: number of sequences in the probe.
        num_ngrams: number of n-grams in the probe, repeated ones counted each time. `found_ngrams` of them occur in the
            text.
        n: number of tokens in an n-gram.
        sequences: numbers of the sequences that share an n-gram with the text.
        duplicates: numbers of the sequences that occur in the text as a whole. The first and the last token may differ,
            because tokenizers put special tokens there.
        share_of_sequence: [N] share of each sequence's n-grams that was found; 0 for sequences that are too short.
        too_short: sequences of fewer than n tokens, which the test cannot judge.
        num_texts, num_tokens: how many were examined. A packed block counts as one text.
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
        short = ""
        if self.too_short:
            have = "sequence has" if self.too_short == 1 else "sequences have"
            short = f". {self.too_short:,} {have} fewer than {self.n} tokens and cannot be judged"
        return (
            f"{len(self.sequences):,} of {self.num_sequences:,} sequences share a run of {self.n} tokens with the "
            f"{self.num_texts:,} texts ({self.num_tokens:,} tokens) examined. {len(self.duplicates):,} of them occur "
            f"there as a whole. {self.share:.2%} of the {self.n}-grams occur there{short}"
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
    """The result of `Probe.overlap` for the ids [N, S] and the mask [N, S] of a probe."""
    check_integer("n", n, minimum=1, cure=f"{NGRAM} is usual")
    if max_texts is not None:
        check_integer("max_texts", max_texts, minimum=1, cure="None reads all")
    index = _Index(input_ids, attention_mask, n)
    for text in islice(_texts_of(data, tokenizer, text_column), max_texts):
        index.add(text)
    return index.result()


class _Index:
    """The n-grams of a probe, and which of them have been seen."""

    def __init__(self, input_ids: Tensor, attention_mask: Tensor, n: int) -> None:
        self.n = n
        self.rows = [ids[real] for ids, real in zip(input_ids.numpy(), attention_mask.numpy(), strict=True)]
        hashes = [ngram_hashes(row, n) for row in self.rows]
        self.hashes, kinds = np.unique(np.concatenate(hashes), return_inverse=True)
        # For each sequence: the numbers of the distinct n-grams in it.
        self.kinds = np.split(kinds, np.cumsum([len(row) for row in hashes])[:-1])
        self.seen = np.zeros(len(self.hashes), bool)
        self.may_be = np.zeros(1 << _FIRST_BITS, bool)
        self.may_be[self.hashes >> _BELOW] = True
        # Sequences by their first n-gram, leaving special tokens aside: every whole occurrence begins with it.
        self.anchored: dict[int, list[int]] = {}
        self.cores: dict[int, Integers] = {}
        for sequence, (row, kinds) in enumerate(zip(self.rows, self.kinds, strict=True)):
            special = 1 if len(row) >= n + 2 else 0
            if len(kinds):
                self.cores[sequence] = row[special : len(row) - special]
                self.anchored.setdefault(int(kinds[special]), []).append(sequence)
        self.longest = max(map(len, self.rows))
        self.duplicates: set[int] = set()
        self.num_texts = self.num_tokens = 0

    def add(self, text: Any) -> None:
        """Look at one text: ids [n] of any integer type. They may be on disk; they are copied in parts."""
        self.num_texts += 1
        self.num_tokens += len(text)
        # Parts overlap by the length of the longest sequence.
        for begin in range(0, max(len(text) - self.longest, 1), CHUNK):
            self._look_at(np.asarray(text[begin : begin + CHUNK + self.longest], np.int64))

    def _look_at(self, tokens: Integers) -> None:
        hashes = ngram_hashes(tokens, self.n)
        places = np.flatnonzero(self.may_be[hashes >> _BELOW])
        kinds = np.minimum(np.searchsorted(self.hashes, hashes[places]), len(self.hashes) - 1)
        hit = self.hashes[kinds] == hashes[places]
        self.seen[kinds[hit]] = True
        for place, kind in zip(places[hit].tolist(), kinds[hit].tolist(), strict=True):
            for sequence in self.anchored.get(kind, ()):
                core = self.cores[sequence]
                if np.array_equal(tokens[place : place + len(core)], core):
                    self.duplicates.add(sequence)

    def result(self) -> Overlap:
        found = [self.seen[kinds] for kinds in self.kinds]
        return Overlap(
            num_sequences=len(found),
            num_ngrams=sum(map(len, found)),
            found_ngrams=int(sum(row.sum() for row in found)),
            n=self.n,
            sequences=tuple(sequence for sequence, row in enumerate(found) if row.any()),
            duplicates=tuple(sorted(self.duplicates)),
            share_of_sequence=tuple(float(row.mean()) if len(row) else 0.0 for row in found),
            too_short=sum(len(row) == 0 for row in found),
            num_texts=self.num_texts,
            num_tokens=self.num_tokens,
        )


def ngram_hashes(tokens: Integers, n: int) -> Hashes:
    """Hash of the n-gram that begins at each place. No n-gram begins at the last n - 1 places; they are left out.

    Σ h(t[i + j]) B^(n-1-j) modulo 2^64.

    >>> ngram_hashes(np.array([1, 2, 3, 1, 2]), 2).tolist()[0] == ngram_hashes(np.array([1, 2, 3, 1, 2]), 2).tolist()[3]
    True
    """
    number = max(len(tokens) - n + 1, 0)
    mixed = tokens.astype(np.uint64) * _MIX
    mixed ^= mixed >> np.uint64(29)  # after the product the lower bits of neighbouring ids are far from random
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
            "data: expected texts, sequences of token ids or rows with a column of one of them, got "
            f"{type(data).__name__}. Pass a single text as [text]."
        )
    encoder: Encoder | None = None
    one_long_array = getattr(data, "ndim", None) == 1 and hasattr(data, "dtype")
    for index, item in enumerate([data] if one_long_array else data):
        if hasattr(item, "keys"):
            column = next((name for name in ("input_ids", text_column) if name in item), None)
            if column is None:
                raise ProbeError(
                    f"data: expected rows with a column input_ids or {text_column!r}, got "
                    f"{', '.join(map(str, item)) or 'none'} in row {index}. Pass text_column=."
                )
            item = item[column]
        elif isinstance(item, (tuple, list)) and item and getattr(item[0], "ndim", 0) == 1:
            item = item[0]  # TensorDataset gives rows as (inputs, labels)
        if isinstance(item, str):
            if tokenizer is None:
                raise ProbeError(
                    "texts can be compared only as tokens: expected tokenizer=, got None. Pass the tokenizer of the "
                    "probe, or rows with input_ids."
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
