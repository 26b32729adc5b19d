"""From texts and a tokenizer to the ids, mask and labels of a probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ib_callback.common.checks import check_integer
from ib_callback.common.errors import ProbeError
from ib_callback.probe._checks import NO_LABEL
from ib_callback.probe._labels import LabelReader, by_token
from ib_callback.probe._tokenizing import Encoded, Encoder, take_batch


class Document(NamedTuple):
    """A text, the words it was joined from if it was, and what its label columns hold, by name."""

    text: str
    words: Sequence[str] | None
    labels: Mapping[str, Any]


class Collected(NamedTuple):
    """Right-padded sequences: ids [N, S] long, 0 at padding; mask [N, S] bool; labels [N, S] long by name.

    label_names: {feature: names of its numbers} where they have names.
    texts_read: how many texts were read.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: dict[str, Tensor]
    label_names: dict[str, tuple[str, ...]]
    texts_read: int


def documents(texts: Iterable[Any], labels: Mapping[str, Any] | None) -> Iterator[Document]:
    """Texts with the label that each column has for them.

    Raises:
        ProbeError: a column is too short or too long, or not a column.
        TypeError: `texts` is one string or holds something else.
    """
    if isinstance(texts, (str, bytes)):
        raise TypeError(
            f"texts: expected an iterable of strings, one a document, got {type(texts).__name__}. "
            "Pass a single document as [text]."
        )
    columns = {name: _label_column(name, column, texts) for name, column in (labels or {}).items()}
    return _documents(texts, columns)


def _documents(texts: Iterable[Any], columns: dict[str, list[Any]]) -> Iterator[Document]:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"texts: expected strings, got {type(text).__name__} at index {index}. "
                "Of a dataset with columns pass the one with the text, e.g. dataset['text'], or use "
                "Probe.from_dataset."
            )
        for name, column in columns.items():
            if index >= len(column):
                raise ProbeError(
                    f"labels[{name!r}]: expected an entry for each text (skipped ones too), got {len(column)}, none "
                    f"for text {index}."
                )
        yield Document(text, None, {name: column[index] for name, column in columns.items()})


def collect(
    texts: Iterable[Document],
    tokenizer: Any,
    *,
    num_sequences: int | None,
    max_length: int,
    min_length: int,
    readers: Sequence[LabelReader] = (),
    progress: Callable[[int], object] = lambda _: None,
) -> Collected:
    """Tokenise texts in order, one document a sequence, until `num_sequences` are long enough.

    Args:
        texts: read no further than needed.
        tokenizer: see `Encoder`.
        num_sequences: how many to take; None: all.
        max_length: most tokens of a sequence.
        min_length: texts with fewer tokens are skipped.
        readers: one for each label of the documents.
        progress: called with the number of sequences that were added, now and then.

    Raises:
        ProbeError: no text is long enough, or lengths or labels are not usable.
        TypeError: `tokenizer` is not a tokenizer.
    """
    check_lengths(num_sequences, max_length, min_length)
    encoder = Encoder(tokenizer, max_length)
    table = Table([reader.name for reader in readers])
    longest = read = 0
    source = iter(texts)
    while batch := take_batch(source, None if num_sequences is None else num_sequences - len(table)):
        labellings = [
            [reader.read(text.labels[reader.name], read + i, text.words) for reader in readers]
            for i, text in enumerate(batch)
        ]
        read += len(batch)
        before = len(table)
        in_spans = any(isinstance(label, np.ndarray) for labels in labellings for label in labels)
        if in_spans and not encoder.has_offsets:
            raise ProbeError(
                "tokenizer: labels of words or spans need one that knows where its tokens come from, got "
                f"{type(tokenizer).__name__}. Use a fast tokenizer."
            )
        encoded = encoder([text.text for text in batch], places=in_spans)
        for text, one, labels in zip(batch, encoded, labellings, strict=True):
            check_cut(one, max_length)
            longest = max(longest, len(one.ids))
            if len(one.ids) < min_length:
                continue
            if in_spans:
                assert one.offsets is not None
                assert one.special is not None
                labels = [by_token(label, text.text, one.offsets, one.special) for label in labels]
            table.add(one.ids, labels)
        progress(len(table) - before)
    if read == 0:
        raise ProbeError("texts: expected at least one text, got none. Was the iterator used up before?")
    if not len(table):
        raise ProbeError(
            f"texts: expected a text of at least min_length={min_length} tokens, got {read} texts, the "
            f"longest of {longest}. Pass longer texts or lower min_length."
        )
    return table.collected(readers, read)


class Table:
    """Rows of ids and labels, four bytes a number, until they are padded to one tensor.

    Args:
        features: names of the labels.
    """

    def __init__(self, features: Sequence[str]) -> None:
        self._ids: list[np.ndarray] = []
        self._labels: dict[str, list[np.ndarray]] = {name: [] for name in features}

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, ids: np.ndarray, labels: Sequence[Any]) -> None:
        """A row: ids [n], and for each feature one label or [n] of them."""
        self._ids.append(ids)
        for column, label in zip(self._labels.values(), labels, strict=True):
            fits = np.abs(label).max(initial=0) < 2**31 if isinstance(label, np.ndarray) else abs(label) < 2**31
            column.append(np.atleast_1d(np.asarray(label, np.int32 if fits else np.int64)))

    def collected(self, readers: Sequence[LabelReader], texts_read: int) -> Collected:
        """Everything, padded on the right, with final numbers and names of labels."""
        lengths = torch.tensor([len(row) for row in self._ids])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.zeros(mask.shape, dtype=torch.long)
        # Row by row, for one statement over all of them would hold several copies at once.
        for row, ids_of_row in zip(ids, self._ids, strict=True):
            row[: len(ids_of_row)] = torch.from_numpy(ids_of_row)
        self._ids.clear()
        labels, names = {}, {}
        for reader in readers:
            table = torch.full(mask.shape, NO_LABEL)
            for row, length, label in zip(table, lengths.tolist(), self._labels[reader.name], strict=True):
                row[:length] = torch.from_numpy(label)
            labels[reader.name], known = reader.finish(table)
            if known is not None:
                names[reader.name] = known
        return Collected(ids, mask, labels, names, texts_read)


def check_cut(encoded: Encoded, max_length: int) -> None:
    """Refuse a `max_length` that tokenizers do not cut to, for the special tokens alone are too many."""
    if len(encoded.ids) > max_length:
        raise ProbeError(
            f"max_length: expected room for the tokenizer's special tokens and some text, got {max_length}, "
            "and it cuts nothing to that. Raise max_length."
        )


def check_lengths(num_sequences: Any, max_length: Any, min_length: Any = 1) -> None:
    """Refuse numbers that make no probe."""
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
        raise ProbeError(f"labels[{name!r}]: expected one label or None for each text, got {type(values).__name__}.")
    column = list(values)
    if isinstance(texts, Sized) and len(column) != len(texts):
        raise ProbeError(
            f"labels[{name!r}]: expected {len(texts)} entries, one for each text (skipped ones too), got {len(column)}."
        )
    return column
