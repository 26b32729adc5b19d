"""Training data of many shapes as rows of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ib_callback.common.errors import ProbeError
from ib_callback.probe._tokenizing import Encoder

# Tokens of one long array that are read at a time, and how many are read twice for sequences across the seam.
_PART = 1 << 22
_SEAM = 1 << 16


class Row(NamedTuple):
    """Tokens that follow each other. A part of a longer text has tokens that the part before had."""

    tokens: npt.NDArray[np.int64]
    is_new: bool
    num_new: int


def rows_of(data: Any, tokenizer: Any, text_column: str, *, max_texts: int | None) -> Iterator[Row]:
    """Each text or row of `data` as token ids; see `ib_callback.probe.overlap.overlap`.

    Raises:
        ProbeError: texts without a tokenizer, or rows without tokens and text.
        TypeError: data of another kind.
    """
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise TypeError(
            f"data: expected texts, sequences of token ids or rows with a column of either, got {type(data).__name__}. "
            "Pass a single text as [text]."
        )
    if _is_stream(data):
        yield from _parts(data)
        return
    encoder: Encoder | None = None
    for index, item in enumerate(data):
        if index == max_texts:
            return
        item = _without_columns(item, text_column, index)
        if isinstance(item, str):
            if tokenizer is None:
                raise ProbeError(
                    "texts can be compared only as tokens: expected tokenizer=, that of the probe, got None. "
                    "Or pass rows with input_ids."
                )
            encoder = encoder or Encoder(tokenizer, None)
            item = encoder([item])[0].ids
        tokens = _token_ids(item, index)
        yield Row(tokens, True, len(tokens))


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


def _token_ids(item: Any, index: int) -> npt.NDArray[np.int64]:
    array = item.detach().cpu().numpy() if isinstance(item, torch.Tensor) else np.asarray(item)
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(
            f"data: expected a text or a sequence of token ids, got {type(item).__name__} of shape {array.shape} and "
            f"dtype {array.dtype} at index {index}. Pass a single sequence as [ids]."
        )
    return array.astype(np.int64, copy=False)


def _is_stream(data: Any) -> bool:
    return getattr(data, "ndim", None) == 1 and hasattr(data, "dtype")


def _parts(data: Any) -> Iterator[Row]:
    for begin in range(0, len(data), _PART):
        seam = min(begin, _SEAM)
        tokens = _token_ids(data[begin - seam : begin + _PART], 0)
        yield Row(tokens, begin == 0, len(tokens) - seam)
