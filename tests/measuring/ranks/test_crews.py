"""What fails on one of the ranks that make a forward together: the others run what it runs, and nobody hangs."""

from __future__ import annotations

from pathlib import Path

import pytest
from two_ranks import on_ranks

SCRIPT = """
from datetime import timedelta
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from tiny_models import by_position, failing, llama, make_probe, numbers
import ib_callback as ib
from ib_callback.measuring.model import capture, codebook, loss

dist.init_process_group("gloo", timeout=timedelta(seconds=60))
rank, size = dist.get_rank(), dist.get_world_size()
PROBE = make_probe()
patch = pytest.MonkeyPatch()


def in_pairs():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {f"model.layers.{i}.mlp.{name}": ColwiseParallel() for i in range(2) for name in ("gate_proj", "up_proj")}
    plan |= {f"model.layers.{i}.mlp.down_proj": RowwiseParallel() for i in range(2)}
    plan |= {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    model = parallelize_module(llama(), mesh["tensor"], plan)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


measured = in_pairs() if size == 4 else by_position(llama(), init_device_mesh("cpu", (2,), mesh_dim_names=("all",)))
meter = ib.Meter(PROBE, batch_size=2, num_bins=12)
meter.preflight(measured)
expected = numbers(meter.measure(measured))
for owner, name, at in (
    (capture.Capture, "_room", 2), (capture.Quantiser, "__call__", 1), (capture.Moments, "add", 1)
):
    failing(patch, owner, name, RuntimeError("out of luck"), at)
    with pytest.raises(RuntimeError, match="^rank 1: out of luck$"):
        meter.measure(measured)
    patch.undo()
    assert numbers(meter.measure(measured)) == expected, name
for owner, name in ((loss._Reduced, "add"), (codebook, "assign")):
    failing(patch, owner, name, RuntimeError("out of luck"), 1)
    with pytest.warns(RuntimeWarning, match="out of luck"):
        meter.measure(measured)
    patch.undo()
    assert numbers(meter.measure(measured)) == expected, name
"""


@pytest.mark.parametrize("number", [2, 4], ids=["sequence parallel", "fsdp2 and tensor parallel"])
def test_faults_of_our_own_amid_shared_forwards_are_survived(number: int, tmp_path: Path) -> None:
    on_ranks(number, SCRIPT, tmp_path)
