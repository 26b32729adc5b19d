"""A plan in a file: the same plan for every reader, and private."""

import dataclasses
import os

import numpy as np
import pytest
import torch

import ib_callback as ib
from ib_callback.measuring.plan.file import read_plan, shared_plan, write_plan
from ib_callback.measuring.plan.memory import bytes_of


def make_meter(**keywords):
    generator = torch.Generator().manual_seed(0)
    language = torch.arange(30).remainder(3)[:, None].expand(30, 20)
    probe = ib.Probe.from_tokens(torch.randint(0, 6, (30, 20), generator=generator), labels={"language": language})
    return ib.Meter(probe, **keywords)


def flat(thing, path=""):
    """All numbers of a plan by where they are."""
    if isinstance(thing, (torch.Tensor, np.ndarray)):
        yield path, (str(thing.dtype), thing.tolist())
    elif dataclasses.is_dataclass(thing):
        yield path, type(thing).__name__
        for field in dataclasses.fields(thing):
            yield from flat(getattr(thing, field.name), f"{path}.{field.name}")
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield from flat(value, f"{path}[{key}]")
    elif isinstance(thing, (list, tuple)):
        for number, value in enumerate(thing):
            yield from flat(value, f"{path}[{number}]")
    else:
        yield path, thing


@pytest.mark.parametrize("keywords", [{}, {"standard_errors": 4, "baseline": False}, {"null": False}])
def test_a_plan_is_read_bit_for_bit(keywords):
    plan = make_meter(batch_size=3, **keywords).plan()
    with shared_plan(plan) as path:
        assert os.stat(path).st_mode & 0o077 == 0
        read = read_plan(path)
    assert not path.exists()
    assert dict(flat(read)) == dict(flat(plan))
    assert bytes_of([read]) == bytes_of([plan])


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_plan(make_meter().plan(), tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_others_may_write_is_not_trusted(tmp_path):
    write_plan(make_meter().plan(), tmp_path / "plan")
    os.chmod(tmp_path / "plan", 0o622)
    with pytest.raises(ValueError, match="expected a plan that only this user can write"):
        read_plan(tmp_path / "plan")
