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

# Seconds of waiting for other ranks, after which a message says so.
_PATIENCE = 60.0
# The others wait while one process loads, or tests increments. If one process ends, the launcher ends them all.
_LONGEST_WAIT = timedelta(days=1)


class Kept:
    """Keeps the first error until all ranks can agree on it.

    Attributes:
        error: the first error; None if nothing has failed.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __call__(self, body: Callable[[], Value]) -> Value | None:
        """Run the body and return its result; None if it failed."""
        try:
            return body()
        except RanksError:
            raise
        except Exception as error:
            # The frames of the traceback, down to the innermost call, hold tensors. This matters if memory is short.
            traceback.clear_frames(error.__traceback__)
            if isinstance(error, MemoryError) or "memory" in str(error).lower():
                error.__traceback__ = None
            self.error = self.error or error
            return None

    def release(self) -> None:
        """Raise the kept error, once."""
        error, self.error = self.error, None
        if error is not None:
            raise error


class Ranks:
    """Some processes (ranks) that do the same things in the same order. All must call a method at the same points.

    Objects are sent over the CPU, so no GPU must be waited for. If the group has no backend for the CPU, this class
    makes its own gloo group.

    Args:
        group: a group of torch.distributed; None: all processes, or this one alone if there are no others.

    Attributes:
        rank: number of this process among them.
        size: number of processes.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        if group is None and is_distributed():
            self.group = dist.group.WORLD
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.size = 1 if self.group is None else dist.get_world_size(self.group)

    @classmethod
    def alone(cls) -> Ranks:
        """This process alone, even if there are others."""
        ranks = cls.__new__(cls)
        ranks.group, ranks.rank, ranks.size = None, 0, 1
        return ranks

    @classmethod
    def of(cls, members: Sequence[int]) -> Ranks:
        """The processes with these numbers among all, in this order; only these processes may call this."""
        if len(members) == 1:
            return cls.alone()
        key = (dist.group.WORLD, tuple(members))
        if key not in _made:
            _made[key] = dist.new_group(list(members), use_local_synchronization=True)
        return cls(_made[key])

    @property
    def is_first(self) -> bool:
        """Whether this process gives messages and writes files for all."""
        return self.rank == 0

    @property
    def is_local_first(self) -> bool:
        """Whether this process is the first on its machine, according to its launcher."""
        return self.is_first if self.size == 1 else os.environ.get("LOCAL_RANK", str(self.rank)) == "0"

    def numbers(self) -> list[int]:
        """The numbers of these ranks among all processes."""
        return [0] if self.group is None else dist.get_process_group_ranks(self.group)

    def of_every(self, value: Value) -> list[Value]:
        """The values of all ranks, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [value] * self.size
        with self._in_touch():
            dist.all_gather_object(values, value, group=_control(self.group))
        return values

    def of_first(self, value: Value) -> Value:
        """The value of the first rank, on every rank."""
        box = [value]
        if self.group is not None:
            with self._in_touch():
                dist.broadcast_object_list(box, src=self.numbers()[0], group=_control(self.group))
        return box[0]

    def by_first(self, body: Callable[[], Value]) -> Value:
        """Run the body on the first rank, and return its result or raise its error on every rank."""
        kept = Kept()
        value = kept(body) if self.is_first else None
        if kept.error is not None:
            kept.error.of_all_ranks = True  # type: ignore[attr-defined]
        self.agree_on(kept)
        return self.of_first(value)  # type: ignore[return-value]

    def to_first(self, value: Value) -> list[Value]:
        """The values of all ranks on the first rank; an empty list on others."""
        if self.group is None:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        with self._in_touch():
            dist.gather_object(value, values, dst=self.numbers()[0], group=_control(self.group))
        return values or []

    def first_failure(self, reason: Value | None) -> tuple[int, Value] | None:
        """The lowest rank with a reason, and its reason, on every rank; None if no rank has one."""
        return next(((rank, found) for rank, found in enumerate(self.of_every(reason)) if found is not None), None)

    def first_different(self, value: Value) -> int | None:
        """The lowest rank whose value differs from that of the first, on every rank; None if all are equal."""
        values = self.of_every(value)
        return next((rank for rank, found in enumerate(values) if found != values[0]), None)

    def agree(self, failure: Exception | None, *, at_end: bool = False) -> None:
        """If one rank failed, raise its error with the same text on every rank.

        Args:
            failure: the error of this process, if any.
            at_end: whether the work before contains agreements itself. A rank that failed before one of those waits
                here. The others learn of the failure at that agreement, and then come here, too.
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
        except Exception:  # an error class with other arguments
            error = RuntimeError(where + described)
        error.__dict__.update(marks, of_all_ranks=True)
        raise error from failure

    def agree_on(self, kept: Kept, *, at_end: bool = False) -> None:
        """`agree` on a kept error, which is then no longer kept."""
        failure, kept.error = kept.error, None
        self.agree(failure, at_end=at_end)

    def sums(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The sums of the ranks' tensors, float64 on the CPU, bit for bit the same on every rank; None without any."""
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
        """Send one part from each rank to each rank.

        Args:
            received: flat tensor that is filled with what the ranks send, one after the other.
            sent: flat tensor with what the ranks get, one after the other; of the same type and on the same device.
            from_each: how many numbers each rank sends to this one.
            to_each: how many numbers each rank gets from this one.
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
        """Say after a minute of waiting that the other ranks are missing, because some may never come."""
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
        except (RuntimeError, ValueError) as error:  # after a timeout, or if a rank has ended
            raise RanksError(
                f"rank {self.rank}: the other ranks could not be reached: {describe(error)}. One of them has ended or "
                "hangs; its own error says why."
            ) from error


# Process groups that were made here, by the default group at that time and the members: it may be another one later.
_made: dict[tuple[Any, tuple[int, ...]], Any] = {}
_control_groups: dict[Any, Any] = {}


def _told(error: Exception) -> tuple[type[Exception], str, str, dict[str, bool]]:
    """What is sent to others about an error. Classes that cannot be sent, such as local ones, are replaced."""
    described = describe(error)
    try:
        pickle.dumps(type(error))
    except Exception:
        return RuntimeError, described, described, _marks(error)
    return type(error), str(error), described, _marks(error)


def _marks(error: Exception) -> dict[str, bool]:
    """The marks (boolean attributes) on an error."""
    return {name: value for name, value in vars(error).items() if isinstance(value, bool)}


def _devices(group: Any) -> set[str]:
    return {device.type for device in group._device_types}


def _control(group: Any) -> Any:
    """A group of the same processes that can send from the CPU; the given group if no other can be made."""
    if "cpu" in _devices(group):
        return group
    if group not in _control_groups:
        members = dist.get_process_group_ranks(group)
        try:
            made = dist.new_group(members, backend="gloo", use_local_synchronization=True)
        except Exception:  # without gloo, objects are sent over the devices
            made = group
        _control_groups[group] = made
    return _control_groups[group]


@contextmanager
def launched(device: str) -> Iterator[Ranks]:
    """The processes that a launcher such as torchrun started, while the body runs; this one alone without a launcher.

    Args:
        device: "cuda" or "cpu", the kind of device on which they compute.
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
    """A text that identifies the machine of this process, and the container on it."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{socket.gethostname()} {file.read().strip()}"
    return socket.gethostname()


def is_distributed() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


# --- functions for all processes


def is_rank_zero() -> bool:
    """Whether this process is the first of a distributed training, or alone."""
    return Ranks().is_first


def of_rank_zero(value: Value) -> Value:
    """Rank 0's value on every rank; without other ranks, the value itself. All ranks must call this."""
    return Ranks().of_first(value)


def first_failure(reason: str | None) -> tuple[int, str] | None:
    """The lowest rank with a reason, and its reason, on every rank; None without any. All ranks must call this."""
    return Ranks().first_failure(reason)


def first_different(value: Value) -> int | None:
    """The lowest rank whose value differs from rank 0's, on every rank; None if all are equal. All must call this."""
    return Ranks().first_different(value)
