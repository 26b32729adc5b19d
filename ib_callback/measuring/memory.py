"""Memory: how much there is, and whether it ran out."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch's CPU allocator raises a plain RuntimeError.
    text = str(error)
    return "out of memory" in text.lower() or "can't allocate memory" in text


def free_memory(device: torch.device) -> int | None:
    """Free bytes on the device, if it can be told."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu":
        try:
            with open("/proc/meminfo") as file:  # Linux; unlike the free pages, it counts what caches would give up
                available = next(line for line in file if line.startswith("MemAvailable:"))
            return int(available.split()[1]) * 1024
        except (OSError, StopIteration, ValueError):
            return None
    return None
