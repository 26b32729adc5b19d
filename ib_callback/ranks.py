"""Agreement between the processes of a distributed training."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def of_rank_zero(value: Value) -> Value:
    """Rank 0's value on every rank; each must ask at the same point. Alone, the value itself."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
