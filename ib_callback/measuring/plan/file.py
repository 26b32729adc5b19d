"""A plan in a file: one process of a machine makes the plan, the others read it and share its memory."""

from __future__ import annotations

import io
import mmap
import os
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ib_callback.measuring.plan.plan import Plan

_ALIGNED = 64


class _Pickler(pickle.Pickler):
    """Stores the numbers of tensors outside the pickle, as NumPy does for arrays."""

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, torch.Tensor):
            return torch.from_numpy, (thing.numpy(),)
        return NotImplemented


def write_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan completely or not at all, to a file that no other user can read or change.

    Args:
        plan: the plan of a meter.
        path: a path in a private folder (`shared_plan` makes one), because readers trust the content.
    """
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(plan)
    raws = [buffer.raw() for buffer in buffers]
    head = pickle.dumps((stream.getvalue(), [raw.nbytes for raw in raws]))
    descriptor, name = tempfile.mkstemp(dir=Path(path).parent)  # only its owner has access
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(len(head).to_bytes(8, "little"))
            file.write(head)
            for raw in raws:
                file.write(bytes(-file.tell() % _ALIGNED))
                file.write(raw)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read the plan from a file of `write_plan`, bit for bit.

    Its numbers stay in the file's pages, which all readers share. The file may be removed while plans from it are in
    use.

    Raises:
        ValueError: the file belongs to another user, or others may change it.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        owner = os.getuid() if hasattr(os, "getuid") else status.st_uid
        if status.st_uid != owner or status.st_mode & 0o022:
            raise ValueError(f"{path}: expected a plan that only this user can write, got one with other permissions.")
        # A private mapping: pages are shared until a process writes to them, and none does.
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    begin = 8 + int.from_bytes(pages[:8], "little")
    stream, sizes = pickle.loads(pages[8:begin])
    view = memoryview(pages)
    buffers = []
    for size in sizes:
        begin += -begin % _ALIGNED
        buffers.append(view[begin : begin + size])
        begin += size
    plan: Plan = pickle.loads(stream, buffers=buffers)
    return plan


@contextmanager
def shared_plan(plan: Plan) -> Iterator[Path]:
    """Give the path of a file with the plan, in a private temporary folder, until the body ends."""
    with tempfile.TemporaryDirectory(prefix="ib_plan_") as folder:
        path = Path(folder) / "plan"
        write_plan(plan, path)
        yield path
