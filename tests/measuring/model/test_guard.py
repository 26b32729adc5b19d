"""What a probe pass could change is put back."""

import contextlib
import functools
import random
import types

import numpy as np
import pytest
import torch
import wandb
from torch import nn
from two_ranks import on_two_ranks
from wandb.integration.torch import wandb_torch

from ib_callback.measuring.model.guard import preserved_rng, untouched


class Stateful(nn.Module):
    """Changes everything that a forward pass may change."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.frozen = nn.Dropout().eval()
        self.register_buffer("in_place", torch.zeros(3))
        self.register_buffer("replaced", torch.ones(2))
        self.register_buffer("absent", None)
        self.max_seq_len_cached = 8

    def forward(self):
        self.in_place += 1
        self.replaced = torch.zeros(5)
        self.absent = torch.ones(1)
        self.register_buffer("new", torch.ones(1))
        self.max_seq_len_cached = 4
        self.train()
        random.random(), np.random.rand(), torch.rand(1)
        torch.set_grad_enabled(True)


def state_of(model):
    buffers = {name: None if b is None else (b, b.clone(), b._version) for name, b in model._buffers.items()}
    return (
        {name: module.training for name, module in model.named_modules()},
        buffers,
        model.max_seq_len_cached,
        torch.is_grad_enabled(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )


def assert_same(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    for name, kept in before[1].items():
        if kept is None:
            assert after[1][name] is None
        else:
            assert after[1][name][0] is kept[0]
            assert torch.equal(after[1][name][1], kept[1])
    assert before[2:] == after[2:]


@pytest.mark.parametrize("raises", [False, True])
def test_everything_is_put_back(raises):
    model = Stateful()
    before = state_of(model)
    outcome = pytest.raises(KeyError, match="boom") if raises else contextlib.nullcontext()
    with outcome, untouched(model):
        model()
        if raises:
            raise KeyError("boom")
    assert_same(before, state_of(model))


def test_the_body_runs_in_evaluation_mode_without_gradients_but_not_in_inference_mode():
    model = Stateful()
    with untouched(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_buffers_that_did_not_change_are_not_written():
    model = nn.BatchNorm1d(3)
    versions = [b._version for b in model.buffers()]
    with untouched(model):
        model(torch.randn(4, 3))
    assert [b._version for b in model.buffers()] == versions


def test_buffers_with_nan_are_restored_and_recognised():
    model = Stateful()
    model.in_place[0] = float("nan")
    version = model.in_place._version
    with untouched(model):
        pass
    assert model.in_place._version == version


@pytest.mark.parametrize(
    ("buffer", "harm"),
    [
        (torch.eye(3).to_sparse(), lambda buffer: None),
        (torch.empty(2, device="meta"), lambda buffer: None),
        (-torch.zeros(2), torch.Tensor.zero_),
        (torch.ones(2), lambda buffer: setattr(buffer, "data", torch.ones(3))),
        (torch.rand(2), lambda buffer: setattr(buffer, "data", buffer.data.half())),
    ],
    ids=["sparse", "meta", "signs of zeros", "another shape", "another type"],
)
def test_buffers_of_any_kind(buffer, harm):
    model = nn.Module()
    model.register_buffer("kept", buffer)
    before = str(buffer)
    with untouched(model):
        harm(buffer)
    assert model.kept is buffer
    assert str(buffer) == before


def test_preserved_rng():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    expected = torch.rand(2).tolist(), np.random.rand(), random.random()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    with preserved_rng():
        torch.rand(7), np.random.rand(7), random.random()
    assert (torch.rand(2).tolist(), np.random.rand(), random.random()) == expected


# --- hooks


def observed(calls, package):
    """Hooks of every kind of object, as a package writes them."""

    def function(module, *args):
        calls.append("function")

    class Observer:
        def method(self, module, *args):
            calls.append("method")

        def __call__(self, module, *args):
            calls.append("object")

    function.__module__ = Observer.__module__ = Observer.method.__module__ = Observer.__call__.__module__ = package
    return [function, functools.partial(function), Observer().method, Observer()]


def hooks_of(model):
    tables = [
        hooks
        for m in model.modules()
        for hooks in (m._forward_hooks, m._forward_pre_hooks, m._forward_hooks_with_kwargs)
    ]
    return [list(hooks.items()) for hooks in tables]


@pytest.mark.parametrize(("package", "runs"), [("wandb.integration.torch.wandb_torch", 0), ("peft.tuners", 8)])
def test_hooks_that_only_look_on_are_set_aside_and_put_back_in_their_order(package, runs):
    model, calls, own = nn.Sequential(nn.Linear(2, 2)), [], []
    handles = []
    for hook in observed(calls, package):
        model.register_forward_hook(lambda *args: own.append(1))
        handles.append(model[0].register_forward_hook(hook))
        model[0].register_forward_pre_hook(hook)
    before = hooks_of(model)
    with untouched(model):
        removed = model.register_forward_hook(lambda *args: None)
        later = model[0].register_forward_hook(lambda *args: None)
        model(torch.ones(1, 2))
        removed.remove()
    assert (len(calls), len(own)) == (runs, 4)
    later.remove()
    assert hooks_of(model) == before
    for handle in handles:
        handle.remove()  # they still know their hooks
    assert not model[0]._forward_hooks
    model(torch.ones(1, 2))
    assert len(calls) == runs + 4


def test_a_watched_model_logs_as_often_as_without(monkeypatch):
    """`wandb.watch(model, log="parameters", log_graph=True)`."""
    history = wandb_torch.TorchHistory()
    monkeypatch.setattr(wandb, "run", types.SimpleNamespace(_torch=history, summary={}))
    logged = []
    monkeypatch.setattr(history, "log_tensor_stats", lambda tensor, name: logged.append(name))
    model = nn.Sequential(nn.Linear(2, 2))
    history.add_log_parameters_hook(model, log_freq=2)
    graph = wandb_torch.TorchGraph()
    graph.hook_torch_modules(model)
    for _ in range(4):
        with untouched(model):
            model(torch.ones(1, 2))
        model(torch.ones(1, 2))
    assert logged == ["parameters/0.weight", "parameters/0.bias"] * 2
    assert len(graph.nodes_by_id) == 3


# --- sharded training

SHARDED = """
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from tiny_models import fsdp1, fsdp2, in_blocks, llama, make_probe
import ib_callback as ib
from ib_callback.measuring.model.parameters import unchanged_parameters

dist.init_process_group("gloo")
rank = dist.get_rank()


def flat_parameters(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


KINDS = {
    "fsdp1 in blocks": lambda model: fsdp1(in_blocks(fsdp1)(model)),
    "fsdp1, flat": lambda model: flat_parameters(in_blocks(flat_parameters)(model)),
    "fsdp2": fsdp2,
    "fsdp2, root kept": lambda model: fully_shard(in_blocks(fully_shard)(model), reshard_after_forward=False),
}


def checkpoints(wrap, measured):
    model, meter = wrap(llama()).train(), ib.Meter(make_probe())
    torch.manual_seed(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if measured:
        meter.preflight(model)
    for step in range(2):
        ids = torch.randint(2, 40, (4, 12))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if measured:
            meter.measure(model)
        weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
        yield [t.clone() for tensors in (weights, *moments["state"].values()) for t in tensors.values()]


for name, wrap in KINDS.items():
    for with_it, without in zip(*(list(checkpoints(wrap, measured)) for measured in (True, False)), strict=True):
        # Rank 0 has the whole.
        equal = [torch.equal(a, b) for a, b in zip(with_it, without, strict=True)]
        print(f"{name}: {all(equal)} of {'some' if equal else 'none'}")

# From the inside of a wrapper, which keeps its parameters gathered after a forward.
for flat in (fsdp1, flat_parameters):
    model = flat(llama())
    with unchanged_parameters(model.module), torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.long))
    model(torch.ones(1, 4, dtype=torch.long))[0].sum().backward()

# What one rank alone finds out may not keep the others waiting.
model, meter = fsdp2(llama()), ib.Meter(make_probe())
meter.preflight(model)
shard = model.model.norm.weight.to_local()


def harm(*_):
    shard.mul_(1 + rank)


model.model.norm.register_forward_hook(harm)
for _ in range(2):
    try:
        meter.measure(model)
    except ib.ModelError as error:
        print(error)
dist.barrier()
dist.destroy_process_group()
"""


def test_checkpoints_of_a_sharded_training_that_was_just_measured_are_those_of_one_that_was_not(tmp_path):
    first, second = on_two_ranks(SHARDED, tmp_path)
    said = [line for line in first.splitlines() if line.startswith("fsdp")]
    assert len(said) == 8
    assert {line.partition(": ")[2] for line in said} == {"True of some"}
    for output in (first, second):  # of one rank, told on both
        assert output.count("rank 1: FSDPLlamaForCausalLM changed its own parameters 'model.norm.weight' while it") == 2
