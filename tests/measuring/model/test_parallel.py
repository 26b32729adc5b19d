"""How a model lies on the ranks is told from the model alone: who runs the same batch, and what cannot be measured."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from tiny_models import WRAPPERS, llama
from torch import nn
from two_ranks import on_ranks

from ib_callback.measuring.model import access
from ib_callback.measuring.model.parallel import Parallelism, parallelism

# `SETTING`s: name → model, on as many ranks as it says.
SCRIPT = """
import json
import sys
import torch
import torch.distributed as dist
import transformers as tf
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed._composable.replicate_with_fsdp import replicate as replicate2
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import DataParallelMeshDims, FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.experimental._context_parallel._attention import _ContextParallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig
from tiny_models import fsdp1, in_blocks, llama
from ib_callback.measuring.model import access
from ib_callback.measuring.model.parallel import parallelism

dist.init_process_group("gloo")
directory, rank, size = sys.argv[1], dist.get_rank(), dist.get_world_size()
line = init_device_mesh("cpu", (size,), mesh_dim_names=("all",))
IN_PARTS = {f"model.layers.{i}.mlp.{name}": ColwiseParallel() for i in range(2) for name in ("gate_proj", "up_proj")}
IN_PARTS |= {f"model.layers.{i}.mlp.down_proj": RowwiseParallel() for i in range(2)}


def sharded(model, **options):
    for block in model.model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def parted(mesh):
    return parallelize_module(llama(), mesh, IN_PARTS)


class Spread(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.tp_group = dist.group.WORLD


def of_transformers(model="dense", **sizes):
    config = DistributedConfig(**sizes)
    return tf.AutoModelForCausalLM.from_pretrained(f"{directory}/{model}", distributed_config=config)


def two():
    yield "distributed", DistributedDataParallel(llama())
    yield "replicate", replicate(llama(), device_mesh=line)
    yield "replicate of fsdp", replicate2(llama(), mesh=line)
    yield "fsdp1", fsdp1(in_blocks(fsdp1)(llama()))
    yield "fsdp2", sharded(llama(), mesh=line)
    yield "tensor parallel", parted(line)
    yield "group in a layer", nn.Sequential(Spread())
    yield "transformers, fsdp", of_transformers(fsdp_size=2)
    yield "transformers, tp", of_transformers(tp_size=2)
    yield "transformers, tp auto", tf.AutoModelForCausalLM.from_pretrained(f"{directory}/dense", tp_plan="auto")
    yield "transformers, pp", of_transformers(pp_size=2)
    yield "transformers, experts of one batch", of_transformers("experts", tp_size=2, ep_size=2)
    yield "transformers, experts of two batches", of_transformers("experts", fsdp_size=2, ep_size=2)
    whole = llama()
    stage = PipelineStage(whole, rank, 2, torch.device("cpu"))
    yield "pipelining", whole
    del stage
    holes = llama()
    holes.model.layers[1 - rank] = nn.Identity()
    yield "holes", holes
    shared = llama()
    style = _ContextParallel(seq_dim=2, attention_type=_ContextParallel.AttentionType.SDPA)
    parallelize_module(shared.model.layers[0].self_attn, line, style)
    yield "context parallel", shared


def four():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    yield "fsdp and tensor parallel", sharded(parted(mesh["tensor"]), mesh=mesh["data"])
    yield "hybrid", sharded(llama(), mesh=mesh)
    yield "tensor parallel in pairs", parted(mesh["tensor"])
    yield "fsdp1, hybrid", FullyShardedDataParallel(
        llama(), device_id=torch.device("cpu"), device_mesh=mesh, sharding_strategy=ShardingStrategy.HYBRID_SHARD
    )
    plain = llama()
    plain.lm_head.weight = nn.Parameter(distribute_tensor(plain.lm_head.weight, mesh, [Replicate(), Shard(0)]))
    yield "over both", plain
    crossed = parted(mesh["tensor"])
    crossed.lm_head.weight = nn.Parameter(distribute_tensor(crossed.lm_head.weight, mesh["data"], [Shard(0)]))
    yield "crossed", crossed
    spmd = distribute_module(llama(), mesh)  # replicated over both
    yield "spmd", sharded(spmd, mesh=mesh, dp_mesh_dims=DataParallelMeshDims(shard="data"))
    yield "transformers, fsdp and tp", of_transformers(fsdp_size=2, tp_size=2)
    yield "transformers, hybrid", of_transformers(fsdp_size=2, dp_replicate_size=2)
    yield "transformers, experts over both", of_transformers("experts", fsdp_size=2, tp_size=2, ep_size=4)


found = {}
for name, model in (two if size == 2 else four)():
    root = access.unwrap(model)
    lies = parallelism(root)
    found[name] = [lies.is_sharded, lies.together, lies.refusal, lies.describe()]
print("FOUND", json.dumps(found))
dist.barrier()
dist.destroy_process_group()
"""
# Of each rank: whether it is sharded, the ranks of the same batch, and what the refusal says.
ALONE, BOTH, ALL = [[0], [1]], [[0, 1], [0, 1]], [[0, 1, 2, 3]] * 4
PAIRS, SINGLE = [[0, 1], [0, 1], [2, 3], [2, 3]], [[0], [1], [2], [3]]
ON_TWO = {
    "distributed": (False, ALONE, ""),
    "replicate": (True, ALONE, ""),
    "replicate of fsdp": (True, ALONE, ""),
    "fsdp1": (True, ALONE, ""),
    "fsdp2": (True, ALONE, ""),
    "tensor parallel": (False, BOTH, ""),
    "group in a layer": (False, BOTH, ""),
    "transformers, fsdp": (True, ALONE, ""),
    "transformers, tp": (False, BOTH, ""),
    "transformers, tp auto": (False, BOTH, ""),
    "transformers, pp": (False, None, "one stage of a pipeline (pp_size of transformers)"),
    "transformers, experts of one batch": (False, BOTH, ""),
    "transformers, experts of two batches": (True, ALONE, ""),
    "pipelining": (False, None, "one stage of a pipeline (stage "),
    "holes": (False, None, "is an empty place"),
    "context parallel": (False, None, "context parallelism of torch on model.layers.0.self_attn"),
}
ON_FOUR = {
    "fsdp and tensor parallel": (True, PAIRS, ""),
    "hybrid": (True, SINGLE, ""),
    "tensor parallel in pairs": (False, PAIRS, ""),
    "fsdp1, hybrid": (True, SINGLE, ""),
    "over both": (False, ALL, ""),
    "crossed": (False, ALL, ""),
    "spmd": (True, PAIRS, ""),
    "transformers, fsdp and tp": (True, PAIRS, ""),
    "transformers, hybrid": (True, SINGLE, ""),
    "transformers, experts over both": (True, PAIRS, ""),
}


def mixture():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 40}
    torch.manual_seed(0)
    return tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, max_position_embeddings=24, pad_token_id=None))


@pytest.mark.parametrize(("number", "kinds"), [(2, ON_TWO), (4, ON_FOUR)])
def test_on_several_ranks(number, kinds, tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    mixture().save_pretrained(tmp_path / "experts")
    outputs = on_ranks(number, SCRIPT, tmp_path)
    of_rank = [json.loads(output.partition("FOUND ")[2].splitlines()[0]) for output in outputs]
    for rank, found in enumerate(of_rank):
        assert set(found) == set(kinds)
        for name, (is_sharded, together, why) in kinds.items():
            got_sharded, got_together, refusal, _ = found[name]
            assert got_sharded is is_sharded, name
            assert (why in refusal) if why else refusal == "", (name, refusal)
            if together is not None:
                assert got_together == together[rank], name


@pytest.mark.parametrize("name", sorted(WRAPPERS))
def test_alone_nothing_is_refused_and_nobody_is_waited_for(name, alone):
    lies = parallelism(access.unwrap(WRAPPERS[name](llama())))
    assert lies.refusal == ""
    assert lies.together == (0,)
    assert lies.is_sharded is ("fsdp" in name)


def test_without_processes():
    assert parallelism(llama()) == Parallelism()
    assert Parallelism().describe() == "whole on each rank"


class PipelineModule(nn.Module):
    """By its name, that of DeepSpeed."""


class DistributedAttention(nn.Module):
    """The same."""


@pytest.mark.parametrize("kind", [PipelineModule, DistributedAttention])
def test_by_their_names(kind):
    assert type(kind()).__name__ in parallelism(nn.Sequential(nn.Linear(2, 2), kind())).refusal
