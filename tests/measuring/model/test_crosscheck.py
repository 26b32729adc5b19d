"""Layers that were found by rule are those whose states the model itself returns, or are refused with a cure."""

import ast
import contextlib
import re

import pytest
import torch
import transformers as tf
from architectures import bert, causal_classes, gpt2, modernbert, tiny_model
from tiny_models import llama, make_probe
from torch import nn
from two_ranks import on_two_ranks

import ib_callback as ib
from ib_callback.measuring.model import access
from ib_callback.measuring.model.crosscheck import hooks_put_back

pytestmark = pytest.mark.filterwarnings("ignore:the hidden states of:RuntimeWarning")

XLM = {"vocab_size": 40, "emb_dim": 16, "n_layers": 3, "n_heads": 2, "max_position_embeddings": 24}


def xlm():
    torch.manual_seed(0)
    return tf.XLMWithLMHeadModel(tf.XLMConfig(**XLM)).eval()


def flaubert():
    torch.manual_seed(0)
    return tf.FlaubertWithLMHeadModel(tf.FlaubertConfig(**XLM)).eval()


def outputs_of(model, layers, ids):
    seen = {}
    for layer in access.resolve_layers(model, layers):
        layer.module.register_forward_hook(lambda module, inputs, output, name=layer.name: seen.update({name: output}))
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states
    return [getattr(states, "last_hidden_state", states) for states in seen.values()], list(expected)


@pytest.mark.parametrize("run", [lambda meter, model: meter.preflight(model), lambda meter, model: meter.measure(model),
                                 lambda meter, model: list(meter.assignments(model))])  # fmt: skip
@pytest.mark.parametrize("make", [xlm, flaubert, lambda: xlm().bfloat16(), lambda: xlm().half()])
def test_lists_beside_the_layers_are_refused_and_the_cure_measures_what_the_model_returns(make, run):
    model, probe = make(), make_probe()
    with pytest.raises(ib.ModelError, match=r"'transformer\.attentions\.0' … .*output_hidden_states=True of") as raised:
        run(ib.Meter(probe), model)
    layers = ast.literal_eval(re.search(r"Pass layers=(\[.*?\])", str(raised.value))[1])
    assert ib.Meter(probe, layers=layers).preflight(model).layers == tuple(
        f"transformer.layer_norm2.{i}" for i in range(3)
    )
    outputs, expected = outputs_of(model, layers, probe.input_ids[:1])
    assert all(torch.equal(*pair) for pair in zip(outputs, expected[1:], strict=True))


@pytest.mark.parametrize("layers", ["blocks", ["transformer.attentions.*"]], ids=["blocks", "names"])
def test_layers_that_were_asked_for_are_not_doubted(layers):
    names = [layer.name for layer in access.resolve_layers(xlm(), layers)]
    assert names == [f"transformer.attentions.{i}" for i in range(3)]
    calls = []
    model = xlm()
    model.register_forward_pre_hook(lambda module, args, keywords: calls.append(set(keywords)), with_kwargs=True)
    ib.Meter(make_probe(), layers=layers).preflight(model)
    assert calls
    assert not any("output_hidden_states" in keywords for keywords in calls)


def trace_of(model):
    return [
        (
            {name: [*table] for name, table in vars(module).items() if name.endswith("hooks")},
            [(name, buffer.clone()) for name, buffer in module.named_buffers(recurse=False)],
            set(vars(module)),
            module.training,
        )
        for module in model.modules()
    ]


@pytest.mark.parametrize("make", [llama, gpt2, bert, modernbert], ids=lambda make: make.__name__)
@pytest.mark.parametrize("asked_before", [False, True])
def test_the_question_leaves_no_trace(make, asked_before):
    model = make().train()
    ids = make_probe().input_ids[:1]
    model(ids, output_hidden_states=asked_before)
    before = trace_of(model)
    meter = ib.Meter(make_probe())
    meter.preflight(model)
    meter.measure(model)
    for was, now in zip(before, trace_of(model), strict=True):
        assert [name for name, _ in was[1]] == [name for name, _ in now[1]]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(was[1], now[1], strict=True))
        assert (was[0], was[2], was[3]) == (now[0], now[2], now[3])
    # A user who asks afterwards is answered.
    assert len(model(ids, output_hidden_states=True).hidden_states) == len(meter.preflight(model).layers) + 1


def test_only_what_is_new_is_taken_down():
    model = nn.Sequential(nn.Linear(2, 2))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("own"))
    with contextlib.suppress(KeyError), hooks_put_back(model):
        model[0].register_forward_hook(lambda *_: calls.append("new"))
        model.register_forward_pre_hook(lambda *_: calls.append("new"))
        model[0].noted = True
        raise KeyError
    model(torch.zeros(2))
    assert calls == ["own"]
    assert not hasattr(model[0], "noted")


@pytest.mark.parametrize("asked_before", [False, True])
def test_states_that_a_hook_changes_are_measured(asked_before):
    """transformers 5 collects states by hooks of its own, which may come before those of the user."""
    model, ids = llama().eval(), make_probe().input_ids[:1]
    model(ids, output_hidden_states=asked_before)
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output + 1.0)
    before = trace_of(model)
    ib.Meter(make_probe()).preflight(model)
    assert [was[0] for was in before] == [now[0] for now in trace_of(model)]


def trained(meter):
    torch.manual_seed(0)
    model = llama(attention_dropout=0.5).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = make_probe().input_ids
    for step in range(4):
        if meter is not None and step in (0, 2):
            meter.preflight(model)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_training_is_the_same_bit_for_bit():
    pairs = zip(trained(None), trained(ib.Meter(make_probe())), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("in_place", [False, True])
def test_no_graph_is_compiled(in_place):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = llama().eval()
    if in_place:
        model.compile(backend=backend)
    else:
        model = torch.compile(model, backend=backend)
    ids = make_probe().input_ids
    model(ids)
    number = len(graphs)
    ib.Meter(make_probe()).preflight(model)
    model(ids)
    assert len(graphs) == number > 0


KINDS = {kind.__name__: (config, kind) for config, kind in causal_classes()}


def built(name):
    torch.manual_seed(0)
    return tiny_model(*KINDS[name]).eval()


@pytest.mark.parametrize(
    "name", ["BloomForCausalLM", "FalconH1ForCausalLM", "Gemma2ForCausalLM", "Llama4ForCausalLM", "Qwen3MoeForCausalLM"]
)
def test_a_sample_of_the_classes_that_agree(name):
    model, probe = built(name), make_probe()
    names = ib.Meter(probe).preflight(model).layers
    outputs, expected = outputs_of(model, "hidden_states", probe.input_ids[:1])
    assert len(names) == len(outputs) == 3
    for output, own in zip(outputs, expected[1:], strict=True):
        assert torch.equal(output if isinstance(output, torch.Tensor) else output[0], own)


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("CpmAntForCausalLM", ["cpmant"]),
        ("DeepseekV4ForCausalLM", ["model"]),
        ("HrmTextForCausalLM", ["model"]),
        ("LongcatFlashForCausalLM", ["model.layers.0", "model.layers.1", "model"]),
        ("XLNetLMHeadModel", ["transformer"]),
    ],
)
def test_a_sample_of_the_classes_that_are_refused_with_a_cure_that_works(name, cure):
    model, probe = built(name), make_probe()
    with pytest.raises(ib.ModelError, match=re.escape(f"layers={cure!r}")):
        ib.Meter(probe).preflight(model)
    assert len(ib.Meter(probe, layers=cure).preflight(model).layers) == len(cure)


SHARDED = """
import sys
import torch.distributed as dist
import transformers as tf
from tiny_models import llama, make_probe
from torch.distributed.fsdp import fully_shard
import ib_callback as ib
dist.init_process_group("gloo")
XLM = {"vocab_size": 40, "emb_dim": 16, "n_layers": 3, "n_heads": 2, "max_position_embeddings": 24}
for model in (llama(), tf.XLMWithLMHeadModel(tf.XLMConfig(**XLM))):
    for block in model.base_model.get_submodule("layers" if hasattr(model.base_model, "layers") else "ffns"):
        fully_shard(block)
    fully_shard(model)
    meter = ib.Meter(make_probe())
    try:
        meter.preflight(model)
        print(*meter.measure(model).layers)
    except ib.ModelError as error:
        print(error)
dist.destroy_process_group()
"""


def test_all_ranks_ask_under_fsdp2(tmp_path):
    for said in on_two_ranks(SHARDED, tmp_path):
        assert "model.layers.0 model.layers.1:final" in said
        assert "Pass layers=['transformer.layer_norm2.*']" in said
