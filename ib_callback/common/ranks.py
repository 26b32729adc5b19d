"""Agreement between the processes (ranks) of a distributed training."""

from __future__ import annotations

import os
import pickle
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ib_callback.common.errors import RanksError
from ib_callback.common.messages import describe, tell

Value = TypeVar("Value")

# Seconds after which whoever waits for the other ranks says so.
_PATIENCE = 60.0
# While one process loads, or tests increments, the others wait; where one ends, the launcher ends them all.
_LONGEST_WAIT = timedelta(days=1)


class Kept:
    """What failed first, kept until all ranks can agree on it.

    Attributes:
        error: None as long as nothing failed.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __call__(self, body: Callable[[], Value]) -> Value | None:
        """What the body returns; None if it failed."""
        try:
            return body()
        except RanksError:
            raise
        except Exception as error:
            # Its frames hold tensors, in what they call too, which matters where memory is what is lacking.
            traceback.clear_frames(error.__traceback__)
            if isinstance(error, MemoryError) or "memory" in str(error).lower():
                error.__traceback__ = None
            self.error = self.error or error
            return None

    def release(self) -> None:
        """Raise what was kept, once."""
        error, self.error = self.error, None
        if error is not None:
            raise error


class Ranks:
    """Some processes that do the same things in the same order: each must ask at the same points.

    Objects go over the CPU, so that no GPU is waited for: by a gloo group of their own where the group has no backend
    for the CPU.

    Args:
        group: of torch.distributed; None: all processes, or this one alone where there are no others.

    Attributes:
        rank: of this process among them.
        size: their number.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        if group is None and is_distributed():
            self.group = dist.group.WORLD
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.size = 1 if self.group is None else dist.get_world_size(self.group)

    @classmethod
    def alone(cls) -> Ranks:
        """This process, whatever others there are."""
        ranks = cls.__new__(cls)
        ranks.group, ranks.rank, ranks.size = None, 0, 1
        return ranks

    @classmethod
    def of(cls, members: Sequence[int]) -> Ranks:
        """Those with these numbers among all processes, in this order; only they may ask for it."""
        if len(members) == 1:
            return cls.alone()
        key = (dist.group.WORLD, tuple(members))
        if key not in _made:
            _made[key] = dist.new_group(list(members), use_local_synchronization=True)
        return cls(_made[key])

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks and writes for all."""
        return self.rank == 0

    @property
    def is_local_first(self) -> bool:
        """Whether this is the first one on its machine, as its launcher says."""
        return self.is_first if self.size == 1 else os.environ.get("LOCAL_RANK", str(self.rank)) == "0"

    def numbers(self) -> list[int]:
        """Their numbers among all processes."""
        return [0] if self.group is None else dist.get_process_group_ranks(self.group)

    def of_every(self, value: Value) -> list[Value]:
        """The values of all of them, on each."""
        if self.group is None:
            return [value]
        values: list[Any] = [value] * self.size
        with self._in_touch():
            dist.all_gather_object(values, value, group=_control(self.group))
        return values

    def of_first(self, value: Value) -> Value:
        """The first one's value, on each."""
        box = [value]
        if self.group is not None:
            with self._in_touch():
                dist.broadcast_object_list(box, src=self.numbers()[0], group=_control(self.group))
        return box[0]

    def by_first(self, body: Callable[[], Value]) -> Value:
        """What the first one finds, on each, or its error."""
        kept = Kept()
        value = kept(body) if self.is_first else None
        if kept.error is not None:
            kept.error.of_all_ranks = True  # type: ignore[attr-defined]
        self.agree_on(kept)
        return self.of_first(value)  # type: ignore[return-value]

    def to_first(self, value: Value) -> list[Value]:
        """The values of all of them, on the first; nothing on others."""
        if self.group is None:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        with self._in_touch():
            dist.gather_object(value, values, dst=self.numbers()[0], group=_control(self.group))
        return values or []

    def first_failure(self, reason: Value | None) -> tuple[int, Value] | None:
        """The lowest rank that has a reason, and its reason, on each; None if none has."""
        return next(((rank, found) for rank, found in enumerate(self.of_every(reason)) if found is not None), None)

    def first_different(self, value: Value) -> int | None:
        """The lowest rank whose value is not the first one's, on each; None if all are equal."""
        values = self.of_every(value)
        return next((rank for rank, found in enumerate(values) if found != values[0]), None)

    def agree(self, failure: Exception | None, *, at_end: bool = False) -> None:
        """Raise on each, with the same text, what failed on one of them.

        Args:
            failure: of this process, if any.
            at_end: whether this follows work with agreements of its own. One that failed before one of those waits
                here until the others, to which that one brings the failure, have come here, too.
        """
        if self.group is None:
            if failure is not None:
                raise failure
            return
        told = None if failure is None else _told(failure)
        pairs = self.of_every((at_end, told))
        while at_end and not all(is_there for is_there, _ in pairs):
            pairs = self.of_every((at_end, told))
        every = [found for _, found in pairs]
        rank, found = next(((rank, found) for rank, found in enumerate(every) if found is not None), (0, None))
        if found is None:
            return
        kind, text, described, marks = found
        where = "" if marks.get("of_all_ranks") or all(each == found for each in every) else f"rank {rank}: "
        error: Any
        try:
            error = kind(where + text)
        except Exception:  # a kind that takes other arguments
            error = RuntimeError(where + described)
        error.__dict__.update(marks, of_all_ranks=True)
        raise error from failure

    def agree_on(self, kept: Kept, *, at_end: bool = False) -> None:
        """The same of what was kept; nothing is kept any more."""
        failure, kept.error = kept.error, None
        self.agree(failure, at_end=at_end)

    def sums(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The sums of their tensors, float64 on the CPU, on each, bit for bit the same; None where no rank has one."""
        if self.group is None:
            return list(values)
        shapes = self.of_every([None if value is None else tuple(value.shape) for value in values])
        found = [
            next((shape for shape in of_value if shape is not None), None) for of_value in zip(*shapes, strict=True)
        ]
        flat = [
            torch.zeros(shape, dtype=torch.float64) if value is None else value.to("cpu", torch.float64)
            for value, shape in zip(values, found, strict=True)
            if shape is not None
        ]
        if not flat:
            return [None] * len(found)
        total = torch.cat([value.flatten() for value in flat])
        with self._in_touch():
            dist.all_reduce(total, group=_control(self.group))
        parts = iter(total.split([value.numel() for value in flat]))
        return [None if shape is None else next(parts).view(shape) for shape in found]

    def exchange(self, received: Tensor, sent: Tensor, from_each: Sequence[int], to_each: Sequence[int]) -> None:
        """One part of each rank to each rank.

        Args:
            received: flat, to be filled with what the ranks send, one after the other.
            sent: flat, what the ranks get, one after the other; of the same type and on the same device.
            from_each: how many numbers each rank sends.
            to_each: how many each rank gets.
        """
        if self.group is None:
            received.copy_(sent)
            return
        group = self.group if received.device.type in _devices(self.group) else _control(self.group)
        on = received.device if received.device.type in _devices(group) else torch.device("cpu")
        there = received.to(on)
        with self._in_touch():
            dist.all_to_all_single(there, sent.to(on), list(from_each), list(to_each), group=group)
        if there is not received:
            received.copy_(there)

    @contextmanager
    def awaited(self, what: str) -> Iterator[None]:
        """Say after a minute that the others are waited for: some may never come."""
        if self.group is None:
            yield
            return
        message = f"{what}: rank {self.rank} has waited {_PATIENCE:.0f} s for the other {self.size - 1} ranks"
        timer = threading.Timer(_PATIENCE, tell, [message])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @contextmanager
    def _in_touch(self) -> Iterator[None]:
        try:
            yield
        except RanksError:
            raise
        except (RuntimeError, ValueError) as error:  # a timeout, or a rank that has ended
            raise RanksError(
                f"rank {self.rank}: the other ranks could not be reached: {describe(error)}. One of them has ended or "
                "hangs; its own error says why."
            ) from error


# Process groups that were made here, by all processes that there were and the members: others may be there later.
_made: dict[tuple[Any, tuple[int, ...]], Any] = {}
_control_groups: dict[Any, Any] = {}


def _told(error: Exception) -> tuple[type[Exception], str, str, dict[str, bool]]:
    """What the others are told of an error; of a kind that cannot be sent, such as one made in a function, its text."""
    described = describe(error)
    try:
        pickle.dumps(type(error))
    except Exception:
        return RuntimeError, described, described, _marks(error)
    return type(error), str(error), described, _marks(error)


def _marks(error: Exception) -> dict[str, bool]:
    """What was noted on an error."""
    return {name: value for name, value in vars(error).items() if isinstance(value, bool)}


def _devices(group: Any) -> set[str]:
    return {device.type for device in group._device_types}


def _control(group: Any) -> Any:
    """A group of the same processes that can send what lies on the CPU; the same one if no other can be had."""
    if "cpu" in _devices(group):
        return group
    if group not in _control_groups:
        members = dist.get_process_group_ranks(group)
        try:
            made = dist.new_group(members, backend="gloo", use_local_synchronization=True)
        except Exception:  # without gloo objects go over the devices
            made = group
        _control_groups[group] = made
    return _control_groups[group]


@contextmanager
def launched(device: str) -> Iterator[Ranks]:
    """The processes that a launcher such as torchrun has started, while the body runs; this one alone without one.

    Args:
        device: "cuda" or "cpu", where they compute.
    """
    if is_distributed() or not is_launched():
        yield Ranks()
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=_LONGEST_WAIT)
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()


def is_launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def this_machine() -> str:
    """What tells the machine of this process from others, and one container on it from another."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{socket.gethostname()} {file.read().strip()}"
    return socket.gethostname()


def is_distributed() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


# --- of all processes


def is_rank_zero() -> bool:
    """Whether this process is the first of a distributed training, or alone."""
    return Ranks().is_first


def of_rank_zero(value: Value) -> Value:
    """Rank 0's value on every rank; each must ask at the same point. Alone, the value itself."""
    return Ranks().of_first(value)


def first_failure(reason: str | None) -> tuple[int, str] | None:
    """The lowest rank that has a reason, and its reason, on every rank; None if none has. Each must ask."""
    return Ranks().first_failure(reason)


def first_different(value: Value) -> int | None:
    """The lowest rank whose value is not rank 0's, on every rank; None if all are equal. Each must ask."""
    return Ranks().first_different(value)
