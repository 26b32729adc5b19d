"""From texts and a tokenizer to the ids, mask and labels of a probe."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ib_callback._probe_checks import NO_LABEL
from ib_callback.checks import check_integer
from ib_callback.errors import ProbeError


class Collected(NamedTuple):
    """Right-padded sequences: ids [N, S] long, 0 at padding; mask [N, S] bool; labels [N, S] long by name."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: dict[str, Tensor]
    texts_read: int


def collect(
    texts: Iterable[Any],
    tokenizer: Any,
    *,
    num_sequences: int | None,
    max_length: int,
    min_length: int,
    labels: Mapping[str, Any] | None = None,
) -> Collected:
    """Tokenise texts in order, one document a sequence, until `num_sequences` are long enough.

    Raises:
        ProbeError: no text is long enough, or lengths or labels are not usable.
        TypeError: `texts` is one string or holds something else, or `tokenizer` is not a tokenizer.
    """
    if isinstance(texts, (str, bytes)):
        raise TypeError(
            f"texts: expected an iterable of strings, one a document, got {type(texts).__name__}. "
            "Pass a single document as [text]."
        )
    _check_lengths(num_sequences, max_length, min_length)
    columns = {name: _label_column(name, column, texts) for name, column in (labels or {}).items()}
    encode = encoder(tokenizer, max_length)
    rows: list[list[int]] = []
    row_labels: dict[str, list[int]] = {name: [] for name in columns}
    longest = read = 0
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"texts: expected strings, got {type(text).__name__} at index {index}. "
                "Of a dataset with columns pass the one with the text, e.g. dataset['text']."
            )
        read += 1
        text_labels = [_label_at(column, index, name) for name, column in columns.items()]
        ids = encode(text)
        if len(ids) > max_length:
            # What tokenizers do if the special tokens alone are too many.
            raise ProbeError(
                f"max_length: expected room for the tokenizer's special tokens and some text, got {max_length}, "
                "and it cuts nothing to that. Raise max_length."
            )
        longest = max(longest, len(ids))
        if len(ids) < min_length:
            continue
        rows.append(ids)
        for kept, label in zip(row_labels.values(), text_labels, strict=True):
            kept.append(label)
        if len(rows) == num_sequences:
            break
    if read == 0:
        raise ProbeError("texts: expected at least one text, got none. Was the iterator used up before?")
    if not rows:
        raise ProbeError(
            f"texts: expected a text of at least min_length={min_length} tokens, got {read} texts, the "
            f"longest of {longest}. Pass longer texts or lower min_length."
        )
    if num_sequences is not None and len(rows) < num_sequences:
        warnings.warn(
            f"asked for {num_sequences} sequences, got {len(rows)}: there were {read} texts, and "
            f"{read - len(rows)} have fewer than min_length={min_length} tokens.",
            stacklevel=3,
        )
    return Collected(*_pad(rows, row_labels), texts_read=read)


def encoder(tokenizer: Any, max_length: int) -> Callable[[str], list[int]]:
    """A function text → ids, cut to `max_length`, with the special tokens that `tokenizer` adds by default.

    `tokenizer` is one of transformers (fast or slow) or a `tokenizers.Tokenizer`. Its settings are the same
    after each call as before.
    """
    if hasattr(tokenizer, "enable_truncation") and hasattr(tokenizer, "encode"):

        def encode_raw(text: str) -> list[int]:
            direction = (tokenizer.truncation or {}).get("direction", "right")
            tokenizer.no_padding()
            tokenizer.enable_truncation(max_length, direction=direction)
            return list(tokenizer.encode(text).ids)

        return _leaving_settings(tokenizer, encode_raw)

    if callable(tokenizer) and hasattr(tokenizer, "model_max_length"):

        def encode(text: str) -> list[int]:
            encoding = tokenizer(text, truncation=True, max_length=max_length, padding=False, verbose=False)
            return list(encoding["input_ids"])

        return _leaving_settings(getattr(tokenizer, "backend_tokenizer", None), encode)

    processor = hasattr(tokenizer, "tokenizer")
    raise TypeError(
        "tokenizer: expected a transformers tokenizer, e.g. AutoTokenizer.from_pretrained(...), or a "
        f"tokenizers.Tokenizer, got {type(tokenizer).__name__}. "
        + ("Pass its .tokenizer." if processor else "Texts tokenised otherwise can go to Probe.from_tokens.")
    )


def describe(tokenizer: Any) -> str:
    """Class, name if it has one, and number of entries of a tokenizer."""
    kind = type(tokenizer).__name__
    if hasattr(tokenizer, "get_vocab_size"):
        return f"tokenizers.{kind}, {tokenizer.get_vocab_size()} entries"
    name = getattr(tokenizer, "name_or_path", "")
    return f"{kind} {name}, {len(tokenizer)} entries" if name else f"{kind}, {len(tokenizer)} entries"


def _leaving_settings(backend: Any, encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """`encode`, with the truncation and padding of the `tokenizers.Tokenizer` put back after each call.

    After each, not at the end: the texts may come from a generator that uses the tokenizer, too.
    """
    if backend is None:
        return encode

    def encode_and_restore(text: str) -> list[int]:
        truncation, padding = backend.truncation, backend.padding
        try:
            return encode(text)
        finally:
            if truncation is None:
                backend.no_truncation()
            else:
                backend.enable_truncation(**truncation)
            if padding is None:
                backend.no_padding()
            else:
                backend.enable_padding(**padding)

    return encode_and_restore


def _check_lengths(num_sequences: Any, max_length: Any, min_length: Any) -> None:
    wanted = {"num_sequences": num_sequences, "max_length": max_length, "min_length": min_length}
    for name, value in wanted.items():
        if name == "num_sequences" and value is None:
            continue
        check_integer(name, value, minimum=1, cure="see the defaults of Probe.from_texts")
    if min_length > max_length:
        raise ProbeError(
            f"min_length: expected at most max_length={max_length}, got {min_length}, so every text would be "
            f"skipped. Pass min_length={max_length} or less, or raise max_length."
        )


def _label_column(name: str, values: Any, texts: Iterable[Any]) -> list[Any]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ProbeError(f"labels[{name!r}]: expected one integer or None for each text, got {type(values).__name__}.")
    column = list(values)
    if isinstance(texts, Sized) and len(column) != len(texts):
        raise ProbeError(
            f"labels[{name!r}]: expected {len(texts)} entries, one for each text (skipped ones too), got {len(column)}."
        )
    return column


def _label_at(column: list[Any], index: int, name: str) -> int:
    what = f"labels[{name!r}]"
    if index >= len(column):
        raise ProbeError(
            f"{what}: expected an entry for each text (skipped ones too), got {len(column)}, none for text {index}."
        )
    value = column[index]
    if value is None:
        return NO_LABEL
    if isinstance(value, np.bool_):
        return int(value)
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ProbeError(
            f"{what}: expected integers or None, got {type(value).__name__} {value!r} at index {index}. "
            "Number named labels first, e.g. {'en': 0, 'de': 1}."
        ) from error
    if number < NO_LABEL:
        raise ProbeError(f"{what}: expected 0 or more, or None for no label, got {number} at index {index}.")
    return number


def _pad(rows: list[list[int]], row_labels: dict[str, list[int]]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([token for row in rows for token in row])
    by_name = {name: torch.tensor(values)[:, None] for name, values in row_labels.items()}
    return ids, mask, {name: torch.where(mask, label, NO_LABEL) for name, label in by_name.items()}
