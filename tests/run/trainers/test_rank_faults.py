"""What fails on one of two ranks that train together: both have the same points, and training is what it would be."""

from __future__ import annotations

from pathlib import Path

import pytest
from two_ranks import on_two_ranks

SCRIPT = """
import sys
import warnings
from pathlib import Path
import loops
import pytest
import torch
from tiny_hf import numbers, same_weights
import ib_callback as ib
from ib_callback.measuring import accumulate
from ib_callback.measuring.model import capture

directory, rank = Path(sys.argv[1]), int(sys.argv[2])
loop = next(loop for loop in loops.LOOPS if loop.name == NAME)
if loop.name == "plain":
    torch.distributed.init_process_group("gloo")
warnings.filterwarnings("ignore", message="Nothing could be measured")
patch = pytest.MonkeyPatch()
now = {"step": 0}


def train(name, **keywords):
    def on_step(model, step):
        now["step"] = step

    now["step"] = 0
    keywords = {"orders": "token", "every_n_steps": 2, **keywords}
    return loop.train(directory / name, steps=6, on_step=on_step, **keywords)


def points(outcome):
    both = [None, None]
    found = [(point.step, numbers(point), point.error) for point in outcome.followed.trajectory]
    torch.distributed.all_gather_object(both, found)
    assert both[0] == both[1]
    return found


without = train("without", follows=False).weights
fine = train("fine")
assert same_weights(fine.weights, without)
expected = points(fine)
assert [step for step, _, _ in expected] == [0, 2, 4, 6]

for owner, name in ((capture.Capture, "_take"), (accumulate.Accumulator, "add")):
    original = getattr(owner, name)

    def fails(*args, original=original):
        if rank == 1 and now["step"] == 4:
            raise RuntimeError("out of luck")
        return original(*args)

    patch.setattr(owner, name, fails)
    outcome = train(name)
    patch.undo()
    assert same_weights(outcome.weights, without)
    found = points(outcome)
    assert found[2][2] == "RuntimeError: rank 1: out of luck", found[2][2]
    assert found[:2] + found[3:] == expected[:2] + expected[3:]


# Whether to measure is decided by one rank, whatever the others think.
def clock(step):
    return step in ((2, 4) if rank == 0 else (1, 3))


def fails_on_one(step):
    if rank == 1 and step == 2:
        raise RuntimeError("out of luck")
    return step % 2 == 0


for schedule in (clock, fails_on_one):
    outcome = train(schedule.__name__, every_n_steps=schedule)
    assert same_weights(outcome.weights, without)
    assert points(outcome) == expected, schedule

torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("name", ["hf", "lightning", "plain"])
def test_faults_on_one_rank_are_survived_by_both(name: str, tmp_path: Path) -> None:
    on_two_ranks(f"NAME = {name!r}\n{SCRIPT}", tmp_path)
