"""Numbers on their way between the host and the device that computes.

A copy from a GPU, and one to it from memory that is not pinned, makes the host wait for all that the GPU has been given
to do. So what a batch needs goes to a device as one pinned copy, and all that is read from a GPU in a measurement is
read by `read`, after the last batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Thing = TypeVar("Thing")

# Where each tensor begins in a copy of several, in bytes: what every dtype allows.
_ALIGNED = 16


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the host on a device, by one copy for which the host does not wait; on the CPU themselves.

    >>> upload([torch.tensor([1, 2])], torch.device("cpu"))
    [tensor([1, 2])]
    """
    if device.type == "cpu":
        return list(tensors)
    begins, total = [], 0
    for tensor in tensors:
        begins.append(total)
        total += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    packed = _staging(total, device)
    for begin, tensor in zip(begins, tensors, strict=True):
        packed.numpy()[begin : begin + tensor.nbytes] = tensor.numpy().reshape(-1).view("uint8")
    there = packed.to(device, non_blocking=True)
    return [
        there[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for begin, tensor in zip(begins, tensors, strict=True)
    ]


def _staging(size: int, device: torch.device) -> Tensor:
    """Bytes on the host; pinned for a GPU, from torch's cache of such memory, which waits until it was copied."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda" and torch.cuda.is_available())


def uploaded(thing: Thing, device: torch.device) -> Thing:
    """A dataclass with all tensors that it, or a dataclass in it, holds on a device, by one copy."""
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


def _replaced(thing: Any, there: Any) -> Any:
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
    """The tensors on the host: the one place in which a measurement waits for a GPU."""
    return [tensor.to("cpu") for tensor in tensors]
