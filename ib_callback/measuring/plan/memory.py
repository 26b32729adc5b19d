"""Memory of a measurement, apart from the model's: how much it needs, how to make it fit, what to try if it fails."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ib_callback.common.errors import ProbeError

# This much memory beyond that of the layers does not count, because allocators keep as much unused.
SLACK = 64 << 20


@dataclass(frozen=True)
class Need:
    """Bytes that a measurement needs in addition to the model and its forward pass, on the device that adds up.

    each: for one layer: slots, snapshots, kept histograms, its part of the table of assignments, and scratch.
    beside: independent of the layers: the plan, states that wait for the readout, other histograms.
    after: needed when the layers are done.
    scratch: the part of `each` that is needed while a batch is added up.
    moment: needed instead of `scratch` while a batch is run, mostly for logits. It belongs to the model, and fewer
        layers do not lower it, so it does not count towards a budget.
    """

    each: int
    beside: int = 0
    after: int = 0
    scratch: int = 0
    moment: int = 0

    def of(self, num_layers: int) -> int:
        """Bytes at the peak of a measurement of this many layers at a time."""
        return max(num_layers * self.each + self._beyond(num_layers), self.after)

    def _beyond(self, num_layers: int) -> int:
        return self.beside + max(0, self.moment - num_layers * self.scratch)

    def layers_within(self, budget: int, num_layers: int, *, probe: str) -> int:
        """How many of `num_layers` layers to measure at a time to stay within `budget` bytes.

        Raises:
            ProbeError: not even one layer fits.
        """
        beside = max(0, self.beside - SLACK)
        if self.each + beside <= budget and self.after <= budget + SLACK:
            return min(num_layers, (budget - beside) // self.each)
        least = max(self.each + self.beside, self.after)
        raise ProbeError(
            f"memory_budget: for probe {probe!r}, one layer needs {self.each:,} bytes, and everything else needs "
            f"{least - self.each:,}. Expected a budget of at least {least:,}, got {budget:,}. Raise it, or use fewer "
            "sequences, orders, bins or draws, or baseline=False, readout=False or standard_errors=False."
        )


@dataclass(frozen=True)
class Means:
    """Settings of a measurement that may change when memory runs out.

    batch_size: sequences in a forward pass.
    layers: number of layers measured at a time, one pass for each group; None: as many as the budget allows.
    on_host: whether histograms are on the host although the model is on another device.
    """

    batch_size: int
    layers: int | None = None
    on_host: bool = False

    def describe(self) -> str:
        """These settings as words, for a warning."""
        layers = "" if self.layers is None else f", {self.layers} layer{'s' * (self.layers > 1)} at a time"
        return f"batch_size={self.batch_size}{layers}{', histograms in host memory' if self.on_host else ''}"


def cheaper(means: Means, layers: int, *, of_measuring: bool, host_layers: int) -> Means | None:
    """What to try after memory ran out; None if nothing is left. A pure function, so all ranks can use one answer.

    Histograms do not depend on the batch size. So if the measurement's own work ran out of memory, fewer layers are
    measured at a time, and at last the histograms move to the host. If the model's forward pass ran out of memory,
    batches get smaller first.

    Args:
        means: the settings that failed.
        layers: number of layers that were measured at a time.
        of_measuring: whether memory ran out in our own hooks and sums.
        host_layers: how many layers fit into the host's memory at a time; 0 if histograms are there already.
    """
    smaller_batch = replace(means, batch_size=max(1, means.batch_size // 2)) if means.batch_size > 1 else None
    fewer = None
    if layers > 1:
        fewer = replace(means, layers=layers // 2)
    elif host_layers and not means.on_host:
        fewer = replace(means, layers=host_layers, on_host=True)
    first, second = (fewer, smaller_batch) if of_measuring else (smaller_batch, fewer)
    return first or second


@contextmanager
def own_work() -> Iterator[None]:
    """Mark errors of the body as errors of the measurement itself, not of the model's forward; also a decorator."""
    try:
        yield
    except Exception as error:
        error.__dict__["of_measuring"] = True
        raise


def is_of_measuring(error: BaseException) -> bool:
    """Whether an error was marked by `own_work`."""
    return bool(error.__dict__.get("of_measuring", False))


def trim() -> None:
    """Return free pages to the system if the C library can; after planning, glibc keeps as many as the plan takes."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def let_go() -> None:
    """Free the memory of a failed pass, after no traceback holds it any more."""
    gc.collect()
    trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bytes_of(things: Iterable[Any]) -> int:
    """Bytes of all tensors and arrays in dataclasses, mappings and sequences; each is counted once."""
    seen: set[int] = set()
    return sum(_bytes(thing, seen) for thing in things)


def _bytes(thing: Any, seen: set[int]) -> int:
    if isinstance(thing, (str, int, float, type(None))) or id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, (torch.Tensor, np.ndarray)):
        return int(thing.nbytes)
    if isinstance(thing, dict):
        return sum(_bytes(each, seen) for each in thing.values())
    if isinstance(thing, (list, tuple)):
        return sum(_bytes(each, seen) for each in thing)
    if dataclasses.is_dataclass(thing):
        return sum(_bytes(getattr(thing, field.name), seen) for field in dataclasses.fields(thing))
    return 0
