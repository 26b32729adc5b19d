"""A model that lies on several ranks measures as it does on one, and its training stays as it was; or it is refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from accelerate.big_modeling import _attach_context_parallel_hooks
from tiny_models import llama, make_probe, numbers
from torch import nn
from two_ranks import on_ranks

import ib_callback as ib
from ib_callback.measuring.model import access, fully_sharded

SCRIPT = """
import functools
import json
import sys
import torch
import torch.distributed as dist
import transformers as tf
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig
from tiny_models import by_position, fsdp1, in_blocks, llama, make_probe, numbers
import ib_callback as ib
from ib_callback.measuring.model import access
from ib_callback.measuring.model.parallel import parallelism

tf.utils.logging.disable_progress_bar()
dist.init_process_group("gloo")
directory, rank, size = sys.argv[1], dist.get_rank(), dist.get_world_size()
line = init_device_mesh("cpu", (size,), mesh_dim_names=("all",))
PROBE = make_probe()
BF16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
HALF = {"dtype": torch.bfloat16}
GRADIENTS = {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP}


def loaded(name="dense", parallel=(), **options):
    config = DistributedConfig(**dict(parallel)) if parallel else None
    model = tf.AutoModelForCausalLM.from_pretrained(f"{directory}/{name}", distributed_config=config, **options)
    return model.train()


def sharded(model, mesh=line, **options):
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def flat(module, **options):
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **options)


def of_gradients(module):
    return flat(module, **GRADIENTS)


def in_parts(mesh):
    plan = {f"model.layers.{i}.mlp.{name}": ColwiseParallel() for i in range(2) for name in ("gate_proj", "up_proj")}
    plan |= {f"model.layers.{i}.mlp.down_proj": RowwiseParallel() for i in range(2)}
    return parallelize_module(loaded(), mesh, plan)


def half():
    return loaded(**HALF)


def experts():
    return loaded("experts")


@functools.cache
def of_whole(make, **own):
    return ib.measure(make(), PROBE, orders="token", **own)


# How the model is made, and the one on one rank that it equals.
TWO = {
    "replicate": (lambda: replicate(loaded()), loaded),
    "fsdp2": (lambda: sharded(loaded()), loaded),
    "fsdp2 in bfloat16": (lambda: sharded(loaded(), mp_policy=MixedPrecisionPolicy(**BF16)), half),
    "fsdp2 offloaded": (lambda: sharded(loaded(), offload_policy=CPUOffloadPolicy(pin_memory=False)), loaded),
    "fsdp1": (lambda: flat(in_blocks(flat)(loaded())), loaded),
    "fsdp1 of gradients": (lambda: flat(in_blocks(of_gradients)(loaded()), **GRADIENTS), loaded),
    "fsdp1 in bfloat16": (lambda: flat(loaded(), mixed_precision=MixedPrecision(**BF16)), half),
    "tensor parallel": (lambda: in_parts(line), loaded),
    "sequence parallel": (lambda: by_position(loaded(), line), loaded),
    "transformers, fsdp": (lambda: loaded(parallel={"fsdp_size": 2}), loaded),
    "transformers, fsdp in bfloat16": (lambda: loaded(parallel={"fsdp_size": 2, "fsdp_mixed_precision": True}), half),
    "transformers, tensor parallel": (lambda: loaded(parallel={"tp_size": 2}), loaded),
    "transformers, experts of one batch": (lambda: loaded("experts", {"tp_size": 2, "ep_size": 2}), experts),
    "transformers, experts of two batches": (lambda: loaded("experts", {"fsdp_size": 2, "ep_size": 2}), experts),
}
FOUR = {
    "hybrid": (lambda: sharded(loaded(), mesh), loaded),
    "fsdp and tensor parallel": (lambda: sharded(in_parts(mesh["tensor"]), mesh["data"]), loaded),
    "transformers, fsdp and tensor parallel": (lambda: loaded(parallel={"fsdp_size": 2, "tp_size": 2}), loaded),
    "transformers, experts over both": (
        lambda: loaded("experts", {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}), experts
    ),
}
if size == 4:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))


def apart(a, b):
    found = [abs(a.loss - b.loss)]
    for one, other in zip((a, a.readout, a.prediction), (b, b.readout, b.prediction), strict=True):
        found += [abs(one["token"].complexity - other["token"].complexity)]
        found += [abs(one["token"].expressivity - other["token"].expressivity)]
    return max(found)


def train(model, meter):
    "Local weights and random states after three steps; measured in between, once with gradients."
    first = min(parallelism(access.unwrap(model)).together)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(first)
    for step in range(3):
        ids = torch.randint(2, 40, (2, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        if meter is not None and step == 1:
            meter.measure(model)
        optimizer.step()
        optimizer.zero_grad()
        if meter is not None:
            meter.measure(model)
    weights = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    return [*map(torch.clone, weights), torch.get_rng_state()]


calls = []
forward = tf.LlamaForCausalLM.forward


def noting(self, input_ids=None, attention_mask=None, use_cache=None, logits_to_keep=0, **others):
    calls.append([use_cache, logits_to_keep])
    kept = {"use_cache": use_cache, "logits_to_keep": logits_to_keep}
    return forward(self, input_ids=input_ids, attention_mask=attention_mask, **kept, **others)


found = {}
for name, (make, alone) in (TWO if size == 2 else FOUR).items():
    model, meter = make(), ib.Meter(PROBE, orders="token")
    meter.preflight(model)
    # The whole model, shared in the same way, and by one process.
    ours, expected, of_one = meter.measure(model), of_whole(alone), of_whole(alone, process_group="alone")
    ends = train(model, meter)
    again = train(make(), None)
    found[name] = {
        "apart": apart(ours, of_one),
        "same": numbers(ours) == numbers(expected),
        "dtypes": [ours.settings["dtype"], expected.settings["dtype"]],
        "undisturbed": all(map(torch.equal, ends, again)),
        "shards": min(p.to_local().numel() / p.numel() for p in model.parameters() if hasattr(p, "to_local"))
        if any(hasattr(p, "to_local") for p in model.parameters()) else 1.0,
    }
    if name == "fsdp1":
        tf.LlamaForCausalLM.forward = noting
        ib.measure(make(), PROBE, orders="token", loss=False)
        tf.LlamaForCausalLM.forward = forward


def refused(body):
    try:
        body()
    except ib.ModelError as error:
        return str(error)


refusals = {}
if size == 2:
    stage, meter = loaded(parallel={"pp_size": 2}), ib.Meter(PROBE, orders="token")
    refusals["pipeline at preflight"] = refused(lambda: meter.preflight(stage))
    refusals["pipeline when measured"] = refused(lambda: meter.measure(stage))
    with context_parallel(line, buffers=[torch.zeros(1, 16)], buffer_seq_dims=[1]):
        refusals["context"] = refused(lambda: meter.measure(loaded()))
    assert meter.measure(loaded()).loss is not None
print("FOUND", json.dumps([found, refusals, calls]))
dist.barrier()
dist.destroy_process_group()
"""
# Which differ by the rounding of sums that are made of parts.
BY_ROUNDING = {
    "tensor parallel",
    "sequence parallel",
    "transformers, tensor parallel",
    "transformers, experts of one batch",
    "transformers, experts of two batches",
    "fsdp and tensor parallel",
    "transformers, fsdp and tensor parallel",
    "transformers, experts over both",
}
WHOLE = {"replicate", "fsdp1", "fsdp1 of gradients", "fsdp1 in bfloat16"}  # have no DTensors


def mixture():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 40}
    torch.manual_seed(0)
    return tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, max_position_embeddings=24, pad_token_id=None))


@pytest.mark.parametrize(("number", "kinds"), [(2, 14), (4, 4)])
def test_on_several_ranks(number, kinds, tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    mixture().save_pretrained(tmp_path / "experts")
    for output in on_ranks(number, SCRIPT, tmp_path):
        found, refusals, calls = json.loads(output.partition("FOUND ")[2].splitlines()[0])
        assert len(found) == kinds
        for name, of_kind in found.items():
            expected = "bfloat16" if "in bfloat16" in name else "float32"
            assert of_kind["dtypes"] == [expected, expected], name
            assert of_kind["undisturbed"], name
            assert of_kind["apart"] < (1e-6 if name in BY_ROUNDING else 1e-9), name
            assert of_kind["same"] or name in BY_ROUNDING, name
            assert (of_kind["shards"] <= 0.5) is (name not in WHOLE), name
        if number == 2:
            assert calls
            assert all(call == [False, 1] for call in calls), "FSDP1 is called without a cache, for few logits"
            assert refusals.pop("context").startswith("LlamaForCausalLM divides each text among ranks (it is meas")
            assert all("is one stage of a pipeline (pp_size of transformers)" in text for text in refusals.values())
            assert all("ib-callback measure" in text for text in refusals.values())


@pytest.mark.parametrize("side", ["right", "left"])
def test_hooks_of_context_parallelism_are_set_aside_where_texts_are_whole(side):
    model, probe = llama(), make_probe()
    if side == "left":
        probe = ib.Probe.from_tokens(probe.input_ids.flip(1), probe.attention_mask.flip(1))
    expected = ib.measure(model, probe, orders="token")
    _attach_context_parallel_hooks(model)
    before = [list(module._forward_pre_hooks) for module in model.modules()]
    assert any(before)
    assert numbers(ib.measure(model, probe, orders="token")) == numbers(expected)
    assert [list(module._forward_pre_hooks) for module in model.modules()] == before


class DeepSpeedEngine(nn.Module):
    """A stand-in by its name: hands on, and counts what it is asked."""

    def __init__(self, module, autocasts=False):
        super().__init__()
        self.module, self.autocasts, self.asked = module, autocasts, 0

    def torch_autocast_enabled(self):
        return self.autocasts

    def forward(self, *inputs, **named):
        self.asked += 1
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocasts):
            return self.module(*inputs, **named)


@pytest.mark.parametrize("autocasts", [False, True])
def test_an_engine_of_deepspeed_is_asked_only_for_its_autocast(autocasts):
    engine = DeepSpeedEngine(llama(), autocasts)
    assert access.unwrap(engine) is (engine if autocasts else engine.module)
    found = ib.measure(engine, make_probe(), orders="token")
    assert bool(engine.asked) is autocasts
    assert found.settings["dtype"] == ("float32, autocast bfloat16" if autocasts else "float32")


def test_what_is_offloaded_is_measured_where_fsdp_computes(alone, monkeypatch):
    """By FSDP's own word, for here is one device only."""
    model = torch.distributed.fsdp.fully_shard(llama())
    (group,) = fully_sharded.parameter_groups(model)
    assert access.device_of(model) == torch.device("cpu")
    monkeypatch.setattr(group, "device", torch.device("cuda", 3))
    assert access.device_of(model) == torch.device("cuda", 3)


def test_nothing_is_known_of_another_version_of_fsdp(alone, monkeypatch):
    model = torch.distributed.fsdp.fully_shard(llama())
    monkeypatch.delattr(torch.distributed.fsdp.FSDPModule, "_get_fsdp_state")
    assert (fully_sharded.computed_in(model), fully_sharded.computed_on(model)) == (None, None)
    assert access.dtype_of(model) == "float32"
