"""Make the content of a probe from texts and a tokenizer: one document a sequence, cut and padded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ib_callback.common.checks import check_integer
from ib_callback.common.errors import ProbeError
from ib_callback.probe._labels import LabelReader, by_token
from ib_callback.probe._tokenizing import Encoder, bytes_predicted, describe
from ib_callback.probe.content import NO_LABEL, Content


@dataclass(frozen=True)
class Sizes:
    """The size of a probe to build.

    num_sequences: how many to take; None: all.
    max_length: largest number of tokens in a sequence.
    min_length: texts with fewer tokens are skipped; None: no text is skipped because of its length.

    Raises:
        TypeError, ValueError: a number that cannot be used.
    """

    num_sequences: int | None
    max_length: int
    min_length: int | None = None

    def __post_init__(self) -> None:
        cure = "see the defaults of Probe.from_texts"
        if self.num_sequences is not None:
            check_integer("num_sequences", self.num_sequences, minimum=1, cure=cure)
        check_integer("max_length", self.max_length, minimum=1, cure=cure)
        if self.min_length is None:
            return
        check_integer("min_length", self.min_length, minimum=1, cure=cure)
        if self.min_length > self.max_length:
            raise ProbeError(
                f"min_length: expected at most max_length={self.max_length}, got {self.min_length}, so every text "
                f"would be skipped. Pass min_length={self.max_length} or less, or raise max_length."
            )

    def noted(self) -> dict[str, str]:
        """The sizes as entries for the `source` of a probe."""
        noted = {"num_sequences": str(self.num_sequences), "max_length": str(self.max_length)}
        return noted if self.min_length is None else noted | {"min_length": str(self.min_length)}


class Document(NamedTuple):
    """A text; the words that it was joined from, if any; what its label columns hold, by name; and its source."""

    text: str
    words: Sequence[str] | None
    labels: Mapping[str, Any]
    group: Any = None


def texts_content(
    texts: Iterable[str],
    tokenizer: Any,
    sizes: Sizes,
    *,
    name: str,
    labels: Mapping[str, Iterable[Any]] | None = None,
    groups: Iterable[Any] | None = None,
) -> Content:
    """The content for `Probe.from_texts`."""
    readers = [LabelReader(feature) for feature in labels or {}]
    source = {"constructor": "from_texts"}
    return collect(documents(texts, labels, groups), tokenizer, sizes, name=name, source=source, readers=readers)


def documents(texts: Iterable[Any], labels: Mapping[str, Any] | None = None, groups: Any = None) -> Iterator[Document]:
    """Yield each text with its label from each column, and with its source.

    Raises:
        ProbeError: a column is too short, too long, or not a column.
        TypeError: `texts` is one string or holds something else.
    """
    if isinstance(texts, (str, bytes)):
        raise TypeError(
            f"texts: expected an iterable of strings, one per document, got {type(texts).__name__}. "
            "Pass a single document as [text]."
        )
    given = {f"labels[{name!r}]": column for name, column in (labels or {}).items()}
    given |= {} if groups is None else {"groups": groups}
    columns = {what: _column(what, column, texts) for what, column in given.items()}
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"texts: expected strings, got {type(text).__name__} at index {index}. "
                "From a dataset with columns, pass the text column, e.g. dataset['text'], or use "
                "Probe.from_dataset."
            )
        for what, column in columns.items():
            if index >= len(column):
                raise ProbeError(
                    f"{what}: expected one entry per text, also for skipped texts, got {len(column)} entries, so text "
                    f"{index} has none."
                )
        entries = {name: columns[f"labels[{name!r}]"][index] for name in labels or {}}
        group = None if groups is None else columns["groups"][index]
        if groups is not None:
            check_group(group, f"groups: text {index}")
        yield Document(text, None, entries, group)


def check_group(group: Any, where: str) -> None:
    """Raise a ProbeError if a text has no source."""
    if isinstance(group, bool) or not isinstance(group, (int, np.integer, str)):
        raise ProbeError(
            f"{where}: expected the source as an integer or a string, got {group!r}. If a text has no source, invent a "
            "name for it."
        )


def collect(
    texts: Iterable[Document],
    tokenizer: Any,
    sizes: Sizes,
    *,
    name: str,
    source: Mapping[str, str],
    readers: Sequence[LabelReader] = (),
    progress: Callable[[int], object] = lambda _: None,
) -> Content:
    """Tokenise texts in order, one document a sequence, until `num_sequences` are long enough.

    Args:
        texts: read no further than needed.
        tokenizer: see `Encoder`.
        sizes: with a `min_length`.
        name: name of the probe.
        source: how the probe is made; this function adds sizes and numbers of texts.
        readers: one for each label of the documents.
        progress: called with the number of sequences so far.

    Raises:
        ProbeError: no text is long enough, or labels cannot be used.
        TypeError: `tokenizer` is not a tokenizer.
    """
    assert sizes.min_length is not None
    encoder = Encoder(tokenizer, sizes.max_length)
    table = Table(readers)
    groups: list[Any] = []
    longest = read = 0
    for text in texts:
        labels = [reader.read(text.labels[reader.name], read, text.words) for reader in readers]
        read += 1
        in_spans = any(isinstance(label, np.ndarray) for label in labels)
        if in_spans and not encoder.has_offsets:
            raise ProbeError(
                "tokenizer: labels of words or spans need a tokenizer that says where in the text each token is, got "
                f"{type(tokenizer).__name__}. Use a fast tokenizer."
            )
        encoded = encoder(text.text, places=encoder.has_offsets)
        longest = max(longest, len(encoded.ids))
        if len(encoded.ids) >= sizes.min_length:
            labels_of = [by_token(label, text.text, encoded) for label in labels]
            table.add(encoded.ids, labels_of, num_bytes=bytes_predicted(text.text, encoded))
            groups.append(text.group)
            progress(len(table))
        if len(table) == sizes.num_sequences:
            break
    if read == 0:
        raise ProbeError("texts: expected at least one text, got none. Perhaps the iterator was already used up.")
    if not len(table):
        raise ProbeError(
            f"texts: expected a text of at least min_length={sizes.min_length} tokens, got {read} texts, and the "
            f"longest has {longest}. Pass longer texts or lower min_length."
        )
    counts = {"texts_read": read, "texts_too_short": read - len(table)}
    content = table.content(name, {**source, **sizes.noted()}, counts, tokenizer)
    return content if all(group is None for group in groups) else replace(content, groups=groups)


class Table:
    """Collects rows of ids and labels, and pads them to one tensor at the end.

    Args:
        readers: one for each label.
    """

    def __init__(self, readers: Sequence[LabelReader]) -> None:
        self._readers = readers
        self._ids: list[Tensor] = []
        self._labels: list[list[Tensor]] = [[] for _ in readers]
        self._num_bytes: int | None = 0

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, ids: np.ndarray, labels: Sequence[np.ndarray], *, num_bytes: int | None) -> None:
        """Add a row: ids [n], [n] labels for each reader, and the bytes of all tokens except the first, if known."""
        self._ids.append(torch.from_numpy(ids))
        self._num_bytes = None if self._num_bytes is None or num_bytes is None else self._num_bytes + num_bytes
        for column, label in zip(self._labels, labels, strict=True):
            column.append(torch.from_numpy(label))

    def content(self, name: str, source: Mapping[str, str], counts: Mapping[str, int], tokenizer: Any) -> Content:
        """All rows, padded on the right, with the final numbers and names of labels."""
        lengths = torch.tensor([len(row) for row in self._ids])
        ids = pad_sequence(self._ids, batch_first=True)
        self._ids.clear()
        labels, names = {}, {}
        for reader, column in zip(self._readers, self._labels, strict=True):
            table = pad_sequence(column, batch_first=True, padding_value=NO_LABEL)
            labels[reader.name], known = reader.finish(table)
            if known is not None:
                names[reader.name] = known
        return Content(
            input_ids=ids,
            attention_mask=torch.arange(ids.shape[1]) < lengths[:, None],
            labels=labels,
            label_names=names,
            name=name,
            source={**source, **{key: str(value) for key, value in counts.items()}},
            tokenizer=describe(tokenizer),
            num_bytes=self._num_bytes,
        )


def _column(what: str, values: Any, texts: Iterable[Any]) -> list[Any]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        entry = "source" if what == "groups" else "label or None"
        raise ProbeError(f"{what}: expected one {entry} per text, got {type(values).__name__}.")
    column = list(values)
    if isinstance(texts, Sized) and len(column) != len(texts):
        raise ProbeError(
            f"{what}: expected {len(texts)} entries, one per text, also for skipped ones, got {len(column)}."
        )
    return column
