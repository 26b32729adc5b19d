"""What fails on one rank: all of them agree on it, the next point is what it would be, and nobody hangs."""

from __future__ import annotations

from pathlib import Path

from two_ranks import on_two_ranks

FAULTS = """
import sys
import warnings
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import tiny_models
from tiny_models import llama, make_probe, numbers
import ib_callback as ib
from ib_callback.measuring import accumulate, meter as meters
from ib_callback.measuring.model import capture, codebook, loss

dist.init_process_group("gloo")
rank = dist.get_rank()
PROBE = make_probe()
patch = pytest.MonkeyPatch()


def model(sharded):
    torch.manual_seed(0)
    built = llama(num_hidden_layers=3)
    if sharded:
        for block in built.model.layers:
            fully_shard(block)
        fully_shard(built)
    return built


def failing(owner, name, error, at=3):
    tiny_models.failing(patch, owner, name, error, at)


class OutOfLuck(RuntimeError):
    pass


PLACES = {
    "hook": (capture.Capture, "_take"),
    "room for a batch": (capture.Capture, "_room"),
    "accumulator": (accumulate.Accumulator, "add"),
    "moments": (capture.Moments, "add"),
    "sums": (accumulate.Accumulator, "sums"),
}
for sharded in (False, True):
    measured = model(sharded)
    meter = ib.Meter(PROBE, batch_size=2, num_bins=12, readout=False, prediction=False)
    meter.preflight(measured)
    fine = meter.measure(measured)
    expected = numbers(fine)
    for name, place in PLACES.items():
        failing(*place, OutOfLuck("out of luck"), at={"sums": 1, "room for a batch": 2}.get(name, 3))
        with pytest.raises(OutOfLuck, match="^rank 1: out of luck$"):
            meter.measure(measured)
        patch.undo()
        assert numbers(meter.measure(measured)) == expected, name

    # Before the passes, where the others are already at the next agreement.
    unlooked = ib.Meter(PROBE, batch_size=2, num_bins=12, readout=False, prediction=False)
    places = [(meters, "untouched", unlooked.preflight), (meters, "untouched", unlooked.measure)]
    places += [(meters, "LossPass", unlooked.measure)]
    places += [] if sharded else [(ib.Meter, "_check_layers", unlooked.measure)]  # which makes forwards
    for owner, name, act in places:
        failing(owner, name, OutOfLuck("out of luck"), at=1)
        with pytest.raises(OutOfLuck, match="^rank 1: out of luck$"):
            act(measured)
        patch.undo()
    assert numbers(unlooked.measure(measured)) == expected

    # What aims at the output is missing in the point, on every rank, and says why.
    aiming = ib.Meter(PROBE, batch_size=2, num_bins=12)
    whole = numbers(aiming.measure(measured))
    for view, place in {"readout": (codebook, "assign"), "prediction": (loss._Reduced, "add")}.items():
        failing(*place, OutOfLuck("out of luck"), at=2)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = aiming.measure(measured)
        assert any("out of luck" in str(each.message) for each in said)
        assert view not in found.views and "out of luck" in found.settings[view]["why"], view
        patch.undo()
        assert numbers(aiming.measure(measured)) == whole, view

    # Memory that runs out on one rank: all of them take fewer layers at a time.
    for place in ((capture.Capture, "_take"), (accumulate.Accumulator, "add"), (accumulate.Accumulator, "__init__")):
        short = ib.Meter(PROBE, batch_size=2, num_bins=12, readout=False, prediction=False)
        failing(*place, torch.OutOfMemoryError("out of memory"), at=1)
        with pytest.warns(RuntimeWarning, match="out of memory while measuring.* batch_size=2, 1 layer"):
            found = short.measure(measured)
        patch.undo()
        assert found.complexity == pytest.approx(fine.complexity, abs=1e-9), place
        assert found.expressivity == pytest.approx(fine.expressivity, abs=1e-9), place

# A model that fails by itself, without any collective in its forward.
measured = model(False)
meter = ib.Meter(PROBE, batch_size=2, num_bins=12)
expected = numbers(meter.measure(measured))
failing(type(measured.model.layers[0]), "forward", OutOfLuck("out of luck"))
with pytest.raises(OutOfLuck, match="^rank 1: out of luck$"):
    meter.measure(measured)
patch.undo()
assert numbers(meter.measure(measured)) == expected

# Memory that runs out in the model's own forward: smaller batches, on all of them.
short = ib.Meter(PROBE, batch_size=4, num_bins=12)
short.measure(measured)
failing(type(measured.model.layers[0]), "forward", torch.OutOfMemoryError("out of memory"), at=2)
with pytest.warns(RuntimeWarning, match="Trying again with batch_size=2"):
    found = short.measure(measured)
patch.undo()
assert numbers(found) == expected

# An error of a kind that cannot be sent, and no room for the plan's file.
def odd():
    class Odd(Exception):
        pass

    return Odd("out of luck")


failing(capture.Capture, "_take", odd())
with pytest.raises(RuntimeError, match="rank 1: Odd: out of luck"):
    meter.measure(measured)
patch.undo()
patch.setattr(meters, "shared_plan", lambda plan: open("/there/is/no/such/place"))
assert numbers(ib.Meter(PROBE, batch_size=2, num_bins=12).measure(measured)) == expected
patch.undo()

# Ranks that mean different measurements.
for own, kind, told in [
    ({"probe": make_probe(num_sequences=10 + rank)}, ib.ProbeError, "on every rank, got different ones on rank 1"),
    ({"probe": ib.Probe.from_tokens(PROBE.input_ids.roll(rank, 0))}, ib.ProbeError, "got different ones on rank 1"),
    ({"seed": rank}, ib.ProbeError, "seed: 0 on rank 0, 1 on rank 1"),
    ({"batch_size": 2 + rank}, ib.ProbeError, "batch_size: 2 on rank 0, 3 on rank 1"),
    ({"draws": 1 + rank}, ib.ProbeError, "draws: None on rank 0, 2 on rank 1"),
    ({"center": rank == 0}, ib.ProbeError, "center: True on rank 0, None on rank 1"),
]:
    with pytest.raises(kind, match=told):
        ib.Meter(**{"probe": PROBE, **own}).measure(measured)
    with pytest.raises(kind, match=told):
        ib.Meter(**{"probe": PROBE, **own}).preflight(measured)
# One that measures by itself waits for nobody.
if rank == 0:
    assert ib.Meter(PROBE, batch_size=2, num_bins=12, process_group="alone").measure(measured).complexity > 0
"""

ENDED = """
import os
import sys
import time
from datetime import timedelta
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from tiny_models import llama, make_probe
import ib_callback as ib
from ib_callback.common.errors import RanksError
from ib_callback.measuring.model import capture

dist.init_process_group("gloo", timeout=timedelta(seconds=20))
rank = dist.get_rank()
measured = llama(num_hidden_layers=3)
if SHARDED:
    for block in measured.model.layers:
        fully_shard(block)
    fully_shard(measured)
meter = ib.Meter(make_probe(), batch_size=2, num_bins=12)
meter.measure(measured)
calls = []


def end(*_):
    calls.append(1)
    if rank == 1 and len(calls) == 3:
        if KILLED:
            os._exit(0)
        raise torch.OutOfMemoryError("out of memory")


measured.model.layers[1].register_forward_pre_hook(end)
began = time.monotonic()
with pytest.raises(RanksError, match=f"rank {rank}: ") as raised:
    meter.measure(measured)
assert time.monotonic() - began < 60
print(raised.value)
os._exit(0)
"""


def test_faults_of_our_own_are_agreed_on_and_survived(tmp_path: Path) -> None:
    on_two_ranks(FAULTS, tmp_path)


def test_when_a_rank_is_killed_the_others_say_so(tmp_path: Path) -> None:
    first, _ = on_two_ranks("SHARDED, KILLED = False, True\n" + ENDED, tmp_path)
    assert "rank 0: the other ranks could not be reached" in first


def test_a_sharded_forward_that_fails_on_one_rank_ends_all_with_its_cause(tmp_path: Path) -> None:
    first, second = on_two_ranks("SHARDED, KILLED = True, False\n" + ENDED, tmp_path)
    assert "rank 1: the model failed in a forward pass" in second and "out of memory" in second
    assert "rank 0: " in first
