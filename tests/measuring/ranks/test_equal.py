"""What ranks measure together is what one measures alone, and each runs its part of the batches."""

from __future__ import annotations

from pathlib import Path

import pytest
from two_ranks import on_ranks

SCRIPT = """
import math
import sys
import warnings
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tiny_models import llama, make_probe
import ib_callback as ib
from ib_callback.measuring import meter as meters

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
warnings.filterwarnings("ignore", message=".*pairs, where about")


def probe(number, seed=0, **keywords):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 9, (number, 80), generator=generator)
    mask = torch.arange(80) < torch.tensor([[80 - i % 4] for i in range(number)])
    mask[2, 4:] = False  # too short for a valid position: only the loss is had there
    return ib.Probe.from_tokens(ids, mask, **keywords)


def model(wrap):
    built = llama(num_hidden_layers=LAYERS, vocab_size=12, max_position_embeddings=80).train()
    if wrap == "ddp":
        return DistributedDataParallel(built)
    if wrap == "fsdp2":
        for block in built.model.layers:
            fully_shard(block)
        fully_shard(built)
        assert all(p.to_local().numel() < p.numel() for p in built.parameters())
    return built


def apart(a, b, where=""):
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            yield from apart(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, pair in enumerate(zip(a, b)):
            yield from apart(*pair, f"{where}/{number}")
    elif isinstance(a, float) and not isinstance(b, bool) and b is not None:
        yield 0.0 if a == b or (math.isnan(a) and math.isnan(b)) else abs(a - b), where
    else:
        assert a == b, f"{where}: {a} != {b}"


LAYERS = 4
labels = {"kind": torch.arange(13)[:, None].expand(13, 80) % 3}
MAIN = probe(13, labels=labels)
FURTHER = probe(7, seed=1, labels={"other": torch.arange(7)[:, None].expand(7, 80) % 2})
EVERYTHING = {"draws": 2, "center": True, "loss": "all", "standard_errors": 4, "last_block": True, "num_bins": 12,
              "feature_probes": [FURTHER], "companions": "rankme", "companion_layers": "all", "batch_size": 2}
CASES = {
    "everything": EVERYTHING,
    "in groups of layers": {"num_bins": 12, "batch_size": 2, "memory_budget": 1_300_000},
    "more ranks than layers": {"num_bins": 12, "batch_size": 2, "layers": ["model.layers.1"]},
    "plain": {"num_bins": 12, "batch_size": 2, "null": False, "baseline": False, "loss": False, "readout": False},
    "mean beforehand": {"num_bins": 12, "batch_size": 2, "layers": ["model.layers.1"]},
    "one batch": {"num_bins": 12, "batch_size": 16},
    "uniform": {"num_bins": 12, "batch_size": 3, "weighting": "uniform", "orders": ["token", "bigram"]},
    "linear": {"num_bins": 12, "batch_size": 3, "baseline": "linear", "orders": "token"},
}
few = {2: CASES, 3: ("everything", "plain"), 4: ("everything", "more ranks than layers")}[size]
for name, keywords in CASES.items():
    for wrap in ("fsdp2", "ddp") if name == "everything" and size == 2 else ("fsdp2",) if size == 4 else ("ddp",):
        if name not in few:
            continue
        meters.KEPT = 1000 if name == "mean beforehand" else 2 << 30  # states may not wait
        # One of them measures alone, and tells the others.
        of_one = [None]
        if rank == 0:
            of_one = [ib.Meter(MAIN, process_group="alone", **keywords).measure(model(None), step=3).to_dict()]
        dist.broadcast_object_list(of_one)
        (theirs,) = of_one
        meter = ib.Meter(MAIN, **keywords)
        measured = model(wrap)
        before = [p.detach().clone() for p in measured.parameters()]
        meter.preflight(measured)
        meter.measure(measured)
        forwards = []
        handle = getattr(measured, "module", measured).model.register_forward_hook(lambda *_: forwards.append(1))
        found = meter.measure(measured, step=3)
        handle.remove()
        assert all(torch.equal(a, b) for a, b in zip(before, measured.parameters()))
        ours = found.to_dict()
        for point in (ours, theirs):
            del point["seconds"]
        worst, where = max(apart(ours, theirs))
        print(f"{name}, {wrap}: {worst:.1e} at {where}; {len(forwards)} of {len(meter.plan().batches)} forwards")
        assert worst <= 1e-9, (name, wrap, worst, where)
        if name == "plain":
            assert len(forwards) == math.ceil(len(meter.plan().batches) / size)
        same = [None] * size
        dist.all_gather_object(same, ours)
        assert all(each == ours for each in same)
"""


@pytest.mark.parametrize("number", [2, 3, 4])
def test_any_number_of_ranks_equals_one(number: int, tmp_path: Path) -> None:
    on_ranks(number, SCRIPT, tmp_path)
