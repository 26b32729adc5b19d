"""A small model, wrappers of all kinds and a probe for it, for tests without a trainer."""

import torch
import torch.distributed as dist
import transformers as tf
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import ib_callback as ib


def make_probe(num_sequences=10, length=16, highest=40, **keywords):
    ids = torch.randint(2, highest, (num_sequences, length), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(length) < torch.tensor([[length - i % 4] for i in range(num_sequences)])
    return ib.Probe.from_tokens(ids, mask, **keywords)


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"vocab_size": 40, "max_position_embeddings": 24, "pad_token_id": None, "attention_dropout": 0.1} | sizes
    return tf.LlamaForCausalLM(tf.LlamaConfig(**(config | changes)))


def numbers(measurement):
    return {k: v for k, v in measurement.to_dict().items() if k != "seconds"}


class Peft(nn.Module):
    """A stand-in of the shape of peft's PeftModel: adapters sit inside the base model, everything is handed on."""

    def __init__(self, base):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = base
        self.config = base.config

    def get_base_model(self):
        return self.base_model.model

    def forward(self, *args, **kwargs):
        return self.get_base_model()(*args, **kwargs)


class PeftForCausalLM(Peft):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


class Engine(nn.Module):
    """The shape of DeepSpeed's engine and of FSDP."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **kwargs):
        return self.module(*inputs, **kwargs)


def compiled(model):
    return torch.compile(model, backend="eager")


def fabric(model):
    from lightning.fabric import Fabric  # takes long, and most tests need none

    return Fabric(accelerator="cpu", devices=1).setup(model)


def fsdp1(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def in_blocks(wrap):
    def wrapped(model):
        for index, block in enumerate(model.model.layers):
            model.model.layers[index] = wrap(block)
        return model

    return wrapped


def fsdp2(model):
    return fully_shard(in_blocks(fully_shard)(model))


# Those for data parallelism want the fixture `alone`.
WRAPPERS = {
    "peft": Peft,
    "peft for causal lm": PeftForCausalLM,
    "compiled": compiled,
    "compiled blocks": in_blocks(compiled),
    "checkpointed blocks": in_blocks(checkpoint_wrapper),
    "data parallel": nn.DataParallel,
    "distributed": DistributedDataParallel,
    "averaged": AveragedModel,
    "engine": Engine,
    "fabric": fabric,
    "fsdp1": fsdp1,
    "fsdp1 in blocks": lambda model: fsdp1(in_blocks(fsdp1)(model)),
    "fsdp2": fsdp2,
    "nested": lambda model: fabric(PeftForCausalLM(compiled(in_blocks(checkpoint_wrapper)(model)))),
    "nested the other way": lambda model: Engine(compiled(PeftForCausalLM(model))),
}


def by_position(model, mesh):
    """A llama of two blocks whose states, but in its attention, lie on the ranks by position."""
    shared = {"use_local_output": False, "output_layouts": Shard(1)}
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), **shared),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    for i in (0, 1):
        at, whole, part = f"model.layers.{i}.", {"hidden_states": Replicate()}, {"hidden_states": Shard(1)}
        plan |= {
            at + "input_layernorm": SequenceParallel(),
            at + "self_attn": PrepareModuleInput(
                input_kwarg_layouts=part, desired_input_kwarg_layouts=whole, use_local_output=True
            ),
            at + "self_attn.o_proj": RowwiseParallel(input_layouts=Replicate(), **shared),
            at + "post_attention_layernorm": SequenceParallel(),
            at + "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
            at + "mlp.gate_proj": ColwiseParallel(),
            at + "mlp.up_proj": ColwiseParallel(),
            at + "mlp.down_proj": RowwiseParallel(**shared),
        }
    return parallelize_module(model, mesh, plan)


def failing(patch, owner, name, error, at):
    """Let the call of a function by this number fail, on rank 1 alone."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        if dist.get_rank() == 1 and len(calls) == at:
            raise error
        return original(*args, **kwargs)

    patch.setattr(owner, name, wrapped)
