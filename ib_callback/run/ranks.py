"""Agreement between the processes of a distributed training."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_rank_zero() -> bool:
    """Whether this process is the first of a distributed training, or alone."""
    return not _is_distributed() or dist.get_rank() == 0


def of_rank_zero(value: Value) -> Value:
    """Rank 0's value on every rank; each must ask at the same point. Alone, the value itself."""
    box = [value]
    if _is_distributed():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def first_failure(reason: str | None) -> tuple[int, str] | None:
    """The lowest rank that has a reason, and its reason, on every rank; None if none has. Each must ask."""
    return next(((rank, found) for rank, found in enumerate(_of_every_rank(reason)) if found is not None), None)


def first_different(value: Value) -> int | None:
    """The lowest rank whose value is not rank 0's, on every rank; None if all are equal. Each must ask."""
    values = _of_every_rank(value)
    return next((rank for rank, found in enumerate(values) if found != values[0]), None)


def _of_every_rank(value: Value) -> list[Value]:
    values = [value]
    if _is_distributed():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values
