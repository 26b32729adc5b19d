"""Turn label columns of a dataset into one number for each token.

A label is an int or a string, and belongs to a whole document, to a word or to a span of characters.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ib_callback.common.errors import ProbeError
from ib_callback.probe._tokenizing import Encoded
from ib_callback.probe.content import NO_LABEL

# One label for a whole document, or [k, 3] int64 spans: first character, character after the last, label.
Labelling = int | np.ndarray


_SPAN = ("start", "end", "label")


class LabelReader:
    """Turns the labels of one feature into numbers as documents are read, and gives their names at the end.

    Args:
        name: name of the feature.
        class_names: names of the numbers, if the dataset knows them (a `datasets.ClassLabel`).

    A document's label is an integer of at least 0 (also as a float, 2.0), a bool, or a string; -1, None or NaN means no
    label. It can also be a list of spans `(start, end, label)` in characters of the text, also as
    `{"start": …, "end": …, "label": …}`. If the text is a list of words, it can be a list with one label for each word.
    Strings are numbered in alphabetical order.
    """

    def __init__(self, name: str, class_names: Sequence[str] | None = None) -> None:
        self.name = name
        self._what = f"labels[{name!r}]"
        self._class_names = None if class_names is None else tuple(class_names)
        self._codes: dict[str, int] = {}
        self._kind = None if class_names is None else "integers"

    def read(self, value: Any, index: int, words: Sequence[str] | None = None) -> Labelling:
        """The label of the document with this index.

        Args:
            value: what the column holds.
            index: index of the document, for messages.
            words: words of the text, which are joined by single spaces; None if the text is a plain string.

        Raises:
            ProbeError: `value` is not a label.
        """
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, Mapping):  # some versions of `datasets` give a sequence of structs in this form
            columns: list[Any] = [value.get(key) for key in _SPAN]
            if not all(isinstance(column, (list, tuple)) and len(column) == len(columns[0]) for column in columns):
                raise self._refusal(value, index)
            value = list(zip(*columns, strict=True))
        if not isinstance(value, (list, tuple)):
            return self._code(value, index)
        if words is not None:
            if len(value) != len(words):
                raise ProbeError(
                    f"{self._what}: expected {len(words)} labels, one for each word, got {len(value)} at index {index}."
                )
            ends = np.cumsum([len(word) + 1 for word in words]) - 1
            value = zip(ends - [len(word) for word in words], ends, value, strict=True)
        return np.array([self._span(item, index) for item in value], np.int64).reshape(-1, 3)

    def finish(self, table: Tensor) -> tuple[Tensor, tuple[str, ...] | None]:
        """Replace the numbers from `read` in a table [N, S] by the final ones; also return their names, or None."""
        if self._class_names is not None:
            return table, self._class_names
        if not self._codes:
            return table, None
        used = set(table.unique().tolist())
        names = sorted(name for name, code in self._codes.items() if code in used)
        final = torch.full((len(self._codes) + 1,), NO_LABEL)  # index -1, no label, picks the last entry
        for number, name in enumerate(names):
            final[self._codes[name]] = number
        return final[table], tuple(names)

    def _span(self, item: Any, index: int) -> tuple[int, int, int]:
        """First character, character after the last, label."""
        span: Any = [item.get(key) for key in _SPAN] if isinstance(item, Mapping) else item
        try:
            first, last, label = span
            start, end = operator.index(first), operator.index(last)
        except (TypeError, ValueError):
            raise self._refusal(item, index) from None
        if not 0 <= start <= end:
            raise self._refusal(item, index)
        return start, end, self._code(label, index)

    def _code(self, value: Any, index: int) -> int:
        if value is None:
            return NO_LABEL
        if isinstance(value, str):
            self._check_kind("strings", value, index)
            return self._codes.setdefault(value, len(self._codes))
        if isinstance(value, (float, np.floating)):
            # Pandas writes integers as floats if some are missing, and the missing ones as NaN.
            if np.isnan(value):
                return NO_LABEL
            if float(value).is_integer() and abs(float(value)) < 2**53:
                value = int(value)
        try:
            number = int(value) if isinstance(value, np.bool_) else operator.index(value)
        except TypeError:
            raise self._refusal(value, index) from None
        if not NO_LABEL <= number < 2**63:
            raise self._refusal(value, index)
        if number != NO_LABEL:
            self._check_kind("integers", value, index)
        return number

    def _check_kind(self, kind: str, value: Any, index: int) -> None:
        if self._kind not in (None, kind):
            raise ProbeError(
                f"{self._what}: expected only integers or only strings, got {value!r} at index {index} after "
                f"{self._kind}. Turn all labels into one of the two."
            )
        self._kind = kind

    def _refusal(self, value: Any, index: int) -> ProbeError:
        return ProbeError(
            f"{self._what}: expected integers from 0 on, strings or None, or spans (start, end, label) of characters "
            f"with 0 <= start <= end, got {type(value).__name__} {value!r} at index {index}. Turn other values into "
            "numbers first, for example by sorting them into bins. Labels of words need a text column that holds lists "
            "of words. Labels of tokens need Probe.from_tokens, which takes the token ids with their labels."
        )


def by_token(labelling: Labelling, text: str, encoded: Encoded) -> np.ndarray:
    """[n] int64: the label of each token of a text. A span labels the tokens that begin in it.

    A token begins at its first character that is not white space. Tokens that the tokenizer added, and tokens of
    white space alone, get no label from a span. If spans overlap, the later one in the list counts.

    Args:
        labelling: label or spans of the text.
        text: the whole text.
        encoded: the encoded text, with the places of its tokens.
    """
    labels = np.full(len(encoded.ids), labelling if isinstance(labelling, int) else NO_LABEL, np.int64)
    if isinstance(labelling, int):
        return labels
    assert encoded.offsets is not None
    assert encoded.special is not None
    characters = np.full(len(text) + 1, NO_LABEL, np.int64)
    for start, end, label in labelling:
        characters[start : min(end, len(text))] = label
    for place, (start, end) in enumerate(encoded.offsets):
        token = text[start:end]
        if not encoded.special[place] and token and not token.isspace():
            labels[place] = characters[start + len(token) - len(token.lstrip())]
    return labels
