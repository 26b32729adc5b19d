from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ib_callback.common import transfer


@dataclass(frozen=True)
class Inner:
    values: torch.Tensor


@dataclass(frozen=True)
class Outer:
    number: int
    first: torch.Tensor
    inner: Inner
    nothing: Inner | None = None


NUMBERS = [
    torch.arange(5, dtype=torch.int32),
    np.arange(12, dtype=np.int64).reshape(3, 4)[:, 1:3],  # parts of rows
    torch.empty(0, dtype=torch.int64),
    torch.tensor([[True, False]]),
    np.float64([0.5, -1.0]),
    torch.tensor(7.0),
]


@pytest.mark.parametrize("order", [NUMBERS, NUMBERS[::-1], [], NUMBERS[2:3]], ids=["all", "reversed", "none", "empty"])
def test_what_is_packed_comes_out_as_it_was(order: list) -> None:
    packed, begins, arrays = transfer._packed(order)
    found = transfer._unpacked(torch.from_numpy(packed), begins, arrays)
    assert len(found) == len(order)
    for after, before in zip(found, order, strict=True):
        torch.testing.assert_close(after, torch.as_tensor(before), rtol=0, atol=0)


def test_on_the_cpu_nothing_is_copied() -> None:
    tensor, array = torch.arange(3), np.arange(3)
    same, shared = transfer.upload([tensor, array], torch.device("cpu"))
    array[0] = 9
    assert same is tensor
    assert shared[0] == 9


def test_all_tensors_of_a_dataclass_move_by_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def upload(numbers: list, device: torch.device) -> list:
        calls.append(len(numbers))
        return [number + 1 for number in numbers]

    monkeypatch.setattr(transfer, "upload", upload)
    thing = Outer(3, torch.tensor([1]), Inner(torch.tensor([2])))
    moved = transfer.uploaded(thing, torch.device("meta"))
    assert (moved.number, moved.first.item(), moved.inner.values.item(), moved.nothing) == (3, 2, 3, None)
    assert calls == [2]
    assert transfer.uploaded(thing, torch.device("cpu")) is thing


def test_what_goes_to_a_gpu_is_pinned_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    class Pinned:
        def to(self, device: torch.device, non_blocking: bool) -> torch.Tensor:
            done.append((device.type, non_blocking))
            return torch.zeros(16, dtype=torch.uint8)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: Pinned())
    (there,) = transfer.upload([torch.tensor([7])], torch.device("cuda"))
    assert done == [("cuda", True)]
    assert there.tolist() == [0]
