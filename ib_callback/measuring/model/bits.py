"""Compare tensors bit by bit, and compute checksums of their bits."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

# Words at this distance are summed before they are weighted. It is a prime, so an exchange of two rows of a matrix
# changes the checksum too.
_COLUMNS = 1021


def is_plain(tensor: Tensor) -> bool:
    """Whether the bits of a tensor can be read. Not if it is sparse, nested, quantised by torch or without values."""
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta)


def inner(tensor: Any) -> list[str]:
    """For a tensor that is made of other tensors: the names of the attributes that hold them."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return []
    return [name for name in tensor.__tensor_flatten__()[0] if isinstance(getattr(tensor, name), Tensor)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, type and bits, including the sign of a zero and the kind of a NaN.

    Args:
        a: a plain tensor, or one made of plain tensors.
        b: the same kind of tensor, on any device.
    """
    parts = inner(a)
    if a.shape != b.shape or a.dtype != b.dtype or parts != inner(b):
        return False
    if parts:
        return all(same_bits(getattr(a, name), getattr(b, name)) for name in parts)
    return torch.equal(_words(a), _words(b.to(a.device)))


def checksums(tensors: list[Tensor]) -> list[int]:
    """One checksum of the bits for each tensor, with one wait for each device. It changes if values change places.

    Args:
        tensors: plain tensors (`is_plain`) of any shapes, types and devices.
    """
    by_device: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(place)
    sums = [0] * len(tensors)
    for places in by_device.values():
        for place, value in zip(places, torch.stack([_checksum(tensors[p]) for p in places]).tolist(), strict=True):
            sums[place] = value
    return sums


def _checksum(tensor: Tensor) -> Tensor:
    """Weighted sum of the bits as integers, modulo 2^64: exact in any order of summation, and changed by a swap."""
    words = _words(tensor)
    rows = len(words) // _COLUMNS
    columns = words[: rows * _COLUMNS].view(rows, _COLUMNS).sum(0, dtype=torch.int64)
    rest = words[rows * _COLUMNS :]
    columns[: len(rest)] += rest
    columns = columns ^ (columns >> 32)  # otherwise the highest bits, the signs, would cancel in pairs
    return (columns * _weights(tensor.device)).sum()


@functools.lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    return torch.arange(1, _COLUMNS + 1, device=device) * 6364136223846793005 | 1


def _words(tensor: Tensor) -> Tensor:
    """[N] the bits of a tensor as integers: 64-bit ones if the tensor divides into them, else of its own width."""
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    size = flat.element_size()
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if flat.nbytes % 8:
        return flat.view(widths[size])
    if flat.storage_offset() * size % 8:
        flat = flat.clone()  # it is part of a larger tensor, like weights of an LSTM on a GPU
    return flat.view(torch.int64)
