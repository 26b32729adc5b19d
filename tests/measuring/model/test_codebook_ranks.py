"""Readout and prediction of models that lie on several ranks are those of one, and training stays as it was."""

from __future__ import annotations

import pytest
from two_ranks import on_ranks

SCRIPT = """
import functools
import sys
from dataclasses import replace
import torch
import torch.distributed as dist
import transformers as tf
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from architectures import gemma2, llama
from tiny_models import fsdp1, in_blocks, make_probe
import ib_callback as ib

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (size,))
PROBE = make_probe()


class LowRank(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer, self.up = base, nn.Parameter(torch.ones(40, 1))

    def forward(self, x):
        return self.base_layer(x) + x[..., :1] * self.up[:, 0]


def made(make=llama, tied=False, adapter=False):
    torch.manual_seed(0)
    model = make().train()
    model.config.tie_word_embeddings = tied
    head = model.get_output_embeddings()
    head.weight = model.get_input_embeddings().weight if tied else nn.Parameter(30 * head.weight.detach().clone())
    if adapter:
        model.lm_head = LowRank(head)
    return model


@functools.cache
def of_one(**options):
    return ib.measure(made(**options), PROBE, orders="token", process_group="alone")


def sharded(*modules, **options):
    def shard(model):
        for block in model.model.layers:
            fully_shard(block)
        for names in modules:
            found = [model.get_submodule(name) for name in names.split(" and ")]
            fully_shard(found if len(found) > 1 else found[0], **options)
        return fully_shard(model, **options)
    return shard


def flat(module):
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"))


def flat_head(model):
    model.lm_head = fsdp1(model.lm_head)
    return fsdp1(model)


def tensor_parallel(plan):
    return lambda model: parallelize_module(model, mesh, plan)


IN_PARTS = {f"model.layers.{i}.mlp.{name}": ColwiseParallel() for i in range(3) for name in ("gate_proj", "up_proj")}
IN_PARTS |= {f"model.layers.{i}.mlp.down_proj": RowwiseParallel() for i in range(3)}
BY_TOKEN = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
TABLE = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}
KINDS = {
    "distributed": (DistributedDataParallel, {}),
    "fsdp2": (sharded(), {}),
    "fsdp2, tied": (sharded(), {"tied": True}),
    "fsdp2, capped": (sharded(), {"make": gemma2}),
    "fsdp2, adapter": (sharded(), {"adapter": True}),
    "fsdp2, kept": (sharded(reshard_after_forward=False), {}),
    "fsdp2, head": (sharded("lm_head"), {}),
    "fsdp2, head, adapter": (sharded("lm_head"), {"adapter": True}),
    "fsdp2, norm and head": (sharded("model.norm and lm_head", reshard_after_forward=False), {}),
    "fsdp2, trunk": (sharded("model"), {}),
    "fsdp1": (lambda model: fsdp1(in_blocks(fsdp1)(model)), {}),
    "fsdp1, flat": (lambda model: flat(in_blocks(flat)(model)), {}),
    "fsdp1, head": (flat_head, {}),
    "tensor parallel head": (tensor_parallel(BY_TOKEN), {}),
    "tensor parallel head and table, tied": (tensor_parallel(BY_TOKEN | TABLE), {"tied": True}),
    "tensor parallel": (tensor_parallel(IN_PARTS | BY_TOKEN), {}),
    "tensor parallel head of parts": (tensor_parallel({"lm_head": ColwiseParallel()}), {}),
}


def train(model, after):
    ids = PROBE.input_ids[rank::size]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()
    return [p.to_local().clone() if hasattr(p, "to_local") else p.detach().clone() for p in model.parameters()]


def compared(name, found, expected):
    said = []
    for view in ("readout", "prediction"):
        ours, theirs = getattr(found, view), getattr(expected, view)
        if ours:
            values = [[point["token"].complexity, point["token"].expressivity] for point in (ours, theirs)]
            apart = max(abs(a - b) for a, b in zip(*values))
            said.append("the same" if ours == theirs else "nearly" if apart < 1e-7 else f"{apart} apart")
        else:
            said.append(found.settings[view]["why"])
    print(f"{name}: {'; '.join(said)}")


for name, (wrap, options) in KINDS.items():
    if size > 2 and name not in ("fsdp2", "fsdp2, head", "tensor parallel head", "tensor parallel head of parts"):
        continue
    meter, model = ib.Meter(PROBE, orders="token"), wrap(made(**options))
    meter.preflight(model)
    found = meter.measure(model)
    compared(name, found, of_one(**options))
    if name.startswith("fsdp2") and not options:
        points = []
        ends = train(model, lambda: points.append(meter.measure(model)))
        assert all(list(point.views) == list(found.views) for point in points), name
        without = train(wrap(made()), lambda: None)
        assert all(torch.equal(a, b) for a, b in zip(ends, without, strict=True)), name
# Every number there is: baseline, loss, draws, centred states, errors; of the whole model, shared in the same way.
settings = {"orders": "token", "draws": 2, "center": True, "loss": "all", "standard_errors": 4, "last_block": True}
for name in ("distributed", "fsdp2"):
    model = KINDS[name][0](made())
    found, expected = ib.Meter(PROBE, **settings).measure(model), ib.measure(made(), PROBE, **settings)
    ours, theirs = (replace(each, seconds=None, settings={"primary": "token"}) for each in (found, expected))
    assert ours.views.keys() >= {"averaged/late", "centred/last_block", "readout", "prediction"}
    print(f"{name}, everything: {'the same; the same' if ours == theirs else 'not the same'}")
if size == 2:
    if rank == 0:
        made().save_pretrained(sys.argv[1])
    dist.barrier()
    model = tf.LlamaForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
    assert hasattr(model.lm_head.weight, "device_mesh")
    found = ib.measure(model, PROBE, orders="token")
    compared("tensor parallel by transformers", found, of_one())
dist.barrier()
dist.destroy_process_group()
"""

EXCEPTIONS = {
    "fsdp1, head": "its output head, FullyShardedDataParallel, cannot be read during a forward pass; the same",
    "tensor parallel": "nearly; nearly",
    "tensor parallel by transformers": "nearly; nearly",
}


@pytest.mark.parametrize(("number", "kinds"), [(2, 20), (3, 6)])
def test_on_several_ranks(number, kinds, tmp_path):
    """To the last bit, unless the states themselves are sums of parts."""
    for output in on_ranks(number, SCRIPT, tmp_path):
        said = dict(line.split(": ", 1) for line in output.splitlines() if line.startswith(("dist", "fsdp", "tensor")))
        assert len(said) == kinds, output
        parts = said.pop("tensor parallel head of parts")
        assert parts.startswith("the same; the logits do not fit the vocabulary: ")
        assert said == {name: EXCEPTIONS.get(name, "the same; the same") for name in said}
