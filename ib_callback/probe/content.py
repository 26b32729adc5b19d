"""The content of a probe: token ids, a mask and labels, with their checks and their fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ib_callback.common.checks import check_integer
from ib_callback.common.errors import ProbeError

NO_LABEL = -1


@dataclass(frozen=True, kw_only=True)
class Content:
    """Everything that a probe holds, unchecked; `normalised` checks it and brings it into the final form.

    Attributes:
        input_ids: [N, S] integers: tensor, array or nested lists.
        attention_mask: [N, S], true or 1 at real tokens; None: all are real.
        labels: {label: [N, S] integers}, -1 where a position has no label; or None.
        label_names: {label: names of its values 0, 1, …}; or None.
        groups: [N] integers or strings, the source of each sequence; None: each sequence has a source of its own.
        name: short name, for messages and files.
        source: how the probe was made, as strings by name.
        tokenizer: class, name and size of the tokenizer that made the ids, as text; None: unknown.
        num_bytes: UTF-8 bytes of the text of all real tokens except the first of each sequence; None: unknown.
    """

    input_ids: Any
    attention_mask: Any = None
    labels: Any = None
    label_names: Any = None
    groups: Any = None
    name: str
    source: Mapping[str, str] = field(default_factory=dict)
    tokenizer: str | None = None
    num_bytes: int | None = None


def normalised(content: Content) -> Content:
    """Check content, and bring it into the one form that is fingerprinted.

    At padding, ids become 0 and labels -1, so what padding holds makes no difference. The tensors are new,
    contiguous and on the CPU: ids and labels [N, S] long, mask [N, S] bool. Labels are sorted by name.

    Raises:
        ProbeError: anything is not as `Content` says, or a sequence has padding between its tokens, or no real token.
    """
    check_name(content.name)
    if content.num_bytes is not None:
        check_integer(
            "num_bytes", content.num_bytes, minimum=0, cure="pass UTF-8 bytes, or None if the number is not known"
        )
    ids = _integers(content.input_ids, "input_ids")
    if ids.dim() != 2 or ids.numel() == 0:
        raise ProbeError(
            "input_ids: expected [N, S] (sequences, tokens) with N and S at least 1, got shape "
            f"{list(ids.shape)}. Pass a single sequence as [sequence]."
        )
    mask = torch.ones_like(ids, dtype=torch.bool)
    if content.attention_mask is not None:
        mask = _mask(content.attention_mask, ids.shape)
    negative = mask & (ids < 0)
    if negative.any():
        raise ProbeError(
            f"input_ids: expected 0 or more at real tokens, got {int(ids[negative][0])} in sequence "
            f"{_first_row(negative)}. If negative ids mean padding, pass attention_mask=(input_ids >= 0)."
        )
    ids[~mask] = 0
    labels = _labels({} if content.labels is None else content.labels, mask)
    names = _label_names({} if content.label_names is None else content.label_names, labels)
    groups = None if content.groups is None else _groups(content.groups, len(ids))
    changes: dict[str, Any] = {"labels": labels, "label_names": names, "groups": groups, "source": dict(content.source)}
    return replace(content, input_ids=ids, attention_mask=mask, **changes)


def check_name(name: Any) -> None:
    """Raise if `name` cannot be the name of a probe."""
    if not isinstance(name, str) or not name:
        raise ProbeError(f"name: expected a non-empty string, got {name!r}.")


def fingerprint(input_ids: Tensor, attention_mask: Tensor, labels: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over ids, mask and labels, their shapes and the labels' names; the same on every platform.

    `attention_mask` may be bool, or the bytes of a file as uint8. Bytes other than 0 and 1 change the fingerprint.
    """
    parts = [("input_ids", input_ids, "<i8"), ("attention_mask", attention_mask, "u1")]
    parts += [(f"labels/{name}", labels[name], "<i8") for name in sorted(labels)]
    digest = hashlib.sha256()
    for name, tensor, dtype in parts:
        digest.update((json.dumps([name, list(tensor.shape)]) + "\n").encode())
        digest.update(np.ascontiguousarray(tensor.numpy(), dtype).data)
    return digest.hexdigest()


def _integers(values: Any, what: str, *, booleans: bool = False) -> Tensor:
    """A new long tensor on the CPU with the given integers."""
    cure = "Pass integers: a tensor, an array or nested lists of int."
    if isinstance(values, Tensor):
        if values.is_floating_point() or values.is_complex() or (values.dtype == torch.bool and not booleans):
            raise ProbeError(f"{what}: expected an integer dtype, got {values.dtype}. {cure}")
        return values.detach().to("cpu", torch.long, copy=True).contiguous()
    try:
        array = np.array(values)
    except ValueError as error:
        raise ProbeError(
            f"{what}: expected [N, S], got rows of different lengths. Pad them to one length and pass the "
            "attention_mask, or use Probe.from_texts, which does both."
        ) from error
    if array.size and array.dtype.kind not in ("iub" if booleans else "iu"):
        raise ProbeError(f"{what}: expected an integer dtype, got {array.dtype}. {cure}")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))


def _check_shape(tensor: Tensor, shape: torch.Size, what: str, cure: str) -> None:
    if tensor.shape != shape:
        raise ProbeError(
            f"{what}: expected [N, S] = {list(shape)} like input_ids, got shape {list(tensor.shape)}. {cure}"
        )


def _mask(values: Any, shape: torch.Size) -> Tensor:
    # Converted through integers, a bool mask would take eight times as much memory.
    if isinstance(values, Tensor) and values.dtype == torch.bool:
        numbers = values.detach().to("cpu", copy=True).contiguous()
    else:
        numbers = _integers(values, "attention_mask", booleans=True)
    _check_shape(numbers, shape, "attention_mask", "Pass the mask of these ids; None if all are real.")
    other = numbers[(numbers != 0) & (numbers != 1)]
    if other.numel():
        raise ProbeError(
            f"attention_mask: expected 1 or true at real tokens, 0 or false at padding, got {int(other[0])}. "
            "Pass the tokenizer's attention_mask, not an additive or a segment mask."
        )
    mask = numbers.bool()
    begins = mask.clone()
    begins[:, 1:] &= ~mask[:, :-1]
    runs = begins.sum(1)
    if (runs == 0).any():
        raise ProbeError(
            f"attention_mask: expected a real token in every sequence, got none in sequence "
            f"{_first_row(runs == 0)}. Leave such sequences out of the probe."
        )
    if (runs > 1).any():
        raise ProbeError(
            "attention_mask: expected padding at the left or right end only, got padding between the tokens of "
            f"sequence {_first_row(runs > 1)}, where an n-gram would cross it. Pass one document per sequence."
        )
    return mask


def _labels(labels: Any, mask: Tensor) -> dict[str, Tensor]:
    if not isinstance(labels, Mapping):
        raise ProbeError(f"labels: expected {{name: [N, S] integers}}, got {type(labels).__name__}.")
    for name in labels:
        if not isinstance(name, str) or not name:
            raise ProbeError(f"labels: expected names that are non-empty strings, got {name!r}.")
    checked = {}
    for name in sorted(labels):
        what = f"labels[{name!r}]"
        label = _integers(labels[name], what, booleans=True)
        _check_shape(label, mask.shape, what, "Labels of whole sequences: label[:, None].expand(N, S).")
        label[~mask] = NO_LABEL
        low = label < NO_LABEL
        if low.any():
            raise ProbeError(
                f"{what}: expected 0 or more, or -1 for no label, got {int(label[low][0])} in sequence "
                f"{_first_row(low)}. Number the labels from 0; turn -100 into -1."
            )
        checked[name] = label
    return checked


def _label_names(names: Any, labels: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    if not isinstance(names, Mapping):
        raise ProbeError(f"label_names: expected {{feature: [names]}}, got {type(names).__name__}.")
    checked = {}
    for feature in sorted(names):
        what, given = f"label_names[{feature!r}]", names[feature]
        if feature not in labels:
            raise ProbeError(f"{what}: expected one of the labels {sorted(labels)}, got {feature!r}.")
        strings = not isinstance(given, str) and all(isinstance(name, str) for name in given)
        if not strings or len(given) != len(set(given)):
            raise ProbeError(f"{what}: expected a list of strings that differ, got {given!r}.")
        highest = int(labels[feature].max())
        if highest >= len(given):
            raise ProbeError(f"{what}: expected a name for each number up to {highest}, got {len(given)} names.")
        checked[feature] = tuple(given)
    return checked


def _groups(groups: Any, number: int) -> tuple[int, ...]:
    """Number groups from 0 in the order in which they first occur."""
    if isinstance(groups, (str, bytes, Mapping)) or not isinstance(groups, Iterable):
        raise ProbeError(f"groups: expected the source of each of the {number} sequences, got {type(groups).__name__}.")
    given = groups.tolist() if isinstance(groups, (Tensor, np.ndarray)) else list(groups)
    if len(given) != number:
        raise ProbeError(f"groups: expected the source of each of the {number} sequences, got {len(given)} entries.")
    for index, group in enumerate(given):
        if isinstance(group, bool) or not isinstance(group, (int, np.integer, str)):
            raise ProbeError(
                f"groups: expected an integer or a string for each sequence, got {group!r} for sequence {index}. If a "
                "sequence has no source, invent a name for it."
            )
    number_of = {group: place for place, group in enumerate(dict.fromkeys(given))}
    return tuple(number_of[group] for group in given)


def _first_row(marked: Tensor) -> int:
    return int(marked.nonzero()[0, 0])
