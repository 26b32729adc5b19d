"""Copy numbers between the host and the device that computes.

A copy from a GPU makes the host wait for all work that the GPU has been given, and so does a copy to it from memory
that is not pinned. So everything that a batch needs goes to the device as one pinned copy, and a measurement reads from
a GPU only with `read`, after the last batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Thing = TypeVar("Thing")

# In a copy of several tensors, each begins at a multiple of this many bytes, which suits every dtype.
_ALIGNED = 16
_DTYPES = {name: getattr(torch, name) for name in ("bool", "uint8", "int32", "int64", "float32", "float64")}


def upload(numbers: Sequence[Tensor | np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy tensors and arrays from the host to a device, in one copy for which the host does not wait.

    On the CPU they share the memory of the input.

    >>> upload([torch.tensor([1, 2]), np.arange(2)], torch.device("cpu"))
    [tensor([1, 2]), tensor([0, 1])]
    """
    if device.type == "cpu":
        return [each if isinstance(each, Tensor) else torch.from_numpy(each) for each in numbers]
    packed, begins, arrays = _packed(numbers)
    host = torch.from_numpy(packed)
    if device.type == "cuda" and torch.cuda.is_available():
        host = host.pin_memory()  # from torch's cache of pinned memory, which is reused only after the copy
    return _unpacked(host.to(device, non_blocking=True), begins, arrays)


def _packed(numbers: Sequence[Tensor | np.ndarray]) -> tuple[np.ndarray, list[int], list[np.ndarray]]:
    """All inputs as bytes of one array; where each begins in it; and each as an array."""
    arrays = [each.numpy() if isinstance(each, Tensor) else each for each in numbers]
    bounds = [0, *accumulate(-(-array.nbytes // _ALIGNED) * _ALIGNED for array in arrays)]
    packed = np.empty(max(bounds[-1], _ALIGNED), np.uint8)
    for begin, array in zip(bounds, arrays, strict=False):
        packed[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return packed, bounds[:-1], arrays


def _unpacked(packed: Tensor, begins: Sequence[int], arrays: Sequence[np.ndarray]) -> list[Tensor]:
    """The inputs of `_packed` again, as tensors that share the memory of the bytes on their device."""
    return [
        packed[begin : begin + array.nbytes].view(_DTYPES[array.dtype.name]).view(array.shape)
        for begin, array in zip(begins, arrays, strict=True)
    ]


def uploaded(thing: Thing, device: torch.device) -> Thing:
    """A dataclass with all its tensors, also those of nested dataclasses, moved to a device in one copy."""
    if device.type == "cpu":
        return thing
    found: list[Tensor] = []
    _gather(thing, found)
    there = iter(upload(found, device))
    return _replaced(thing, there)


def _gather(thing: Any, found: list[Tensor]) -> None:
    for field in dataclasses.fields(thing):
        value = getattr(thing, field.name)
        if isinstance(value, Tensor):
            found.append(value)
        elif dataclasses.is_dataclass(value):
            _gather(value, found)


def _replaced(thing: Any, there: Iterator[Tensor]) -> Any:
    values = {}
    for field in dataclasses.fields(thing):
        value = getattr(thing, field.name)
        if isinstance(value, Tensor):
            value = next(there)
        elif dataclasses.is_dataclass(value):
            value = _replaced(value, there)
        values[field.name] = value
    return type(thing)(**values)


def read(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to the host: the only place where a measurement waits for a GPU."""
    return [tensor.to("cpu") for tensor in tensors]
