"""Finding blocks and limits in real architectures."""

import ast
import re
import types

import pytest
import torch
import transformers as tf
from architectures import (
    SMALL,
    bare_bert,
    bare_gpt2,
    bart,
    bert,
    bloom,
    gemma2,
    gpt2,
    llama,
    modernbert,
    neox,
    opt,
    qwen3,
    roberta,
    t5,
)
from tiny_models import Engine, PeftForCausalLM, compiled, in_blocks, make_probe
from tiny_models import llama as tiny
from torch import nn

import ib_callback as ib
from ib_callback.common.errors import ModelError
from ib_callback.measuring.model import access
from ib_callback.measuring.model.forward import default_forward

ARCHITECTURES = [modernbert, llama, gpt2, opt, neox, bloom, qwen3, gemma2, bert, roberta, bare_gpt2]


@pytest.mark.parametrize("make", ARCHITECTURES, ids=lambda make: make.__name__)
def test_layers_put_out_what_output_hidden_states_returns(make):
    torch.manual_seed(0)
    model = make().eval()
    ids = torch.randint(2, 40, (2, 9))
    layers = access.resolve_layers(model, "hidden_states")
    seen = {}
    for layer in layers:
        layer.module.register_forward_hook(lambda module, inputs, output, name=layer.name: seen.update({name: output}))
    with torch.no_grad():
        default_forward(model)(model, ids, torch.ones_like(ids))
        expected = model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states[1:]
    assert len(layers) == len(expected) == 3
    assert layers[-1].name.endswith(":final")
    for layer, states in zip(layers, expected, strict=True):
        output = seen[layer.name]
        got = output if isinstance(output, torch.Tensor) else output[0]
        torch.testing.assert_close(got, states, rtol=0, atol=1e-6)


def test_names_and_globs():
    model = llama()
    assert [layer.name for layer in access.resolve_layers(model, "blocks")] == [f"model.layers.{i}" for i in range(3)]
    names = [layer.name for layer in access.resolve_layers(model, ["model.layers.*.mlp", "model.norm"])]
    assert names == ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp", "model.norm"]
    globbed = [layer.name for layer in access.resolve_layers(model, ["model.layers.*"])]
    assert globbed == ["model.layers.0", "model.layers.1", "model.layers.2"]
    picked = access.resolve_layers(model, lambda m: [m.model.norm])
    assert [layer.name for layer in picked] == ["model.norm"]


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.stack = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))

    def forward(self, ids, mask):
        return self.stack(self.embed(ids))


class Unfindable(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = tf.LlamaConfig(**(SMALL | {"num_hidden_layers": 5}))
        self.towers = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))


@pytest.mark.parametrize(
    ("model", "layers", "message"),
    [
        (
            Plain(),
            "hidden_states",
            r"blocks of Plain could not be found.*candidates layers=\['stack\.\*'\] \(2 × Linear",
        ),
        (
            Unfindable(),
            "blocks",
            r"a list of 5 blocks.*candidates layers=\['towers\.\*'\] \(4 × Linear\).*layers=callable",
        ),
        (Plain(), ["stack.7"], r"no module of Plain is called 'stack\.7'.*'embed', 'stack', 'stack\.0'"),
        (Plain(), ["stack.0", "stack.*"], "'stack.0' was named twice"),
        (Plain(), [], "at least one layer"),
        (Plain(), lambda model: model.embed, r"return a list of modules, got Embedding\(40, 16\)"),
        (Plain(), lambda model: ["stack.0"], "expected the callable to return a list of modules, got"),
    ],
)
def test_layers_that_cannot_be_found(model, layers, message):
    with pytest.raises(ModelError, match=message):
        access.resolve_layers(model, layers)


def two_berts():
    decoder = tf.BertLMHeadModel(tf.BertConfig(**SMALL, is_decoder=True, add_cross_attention=True))
    return tf.EncoderDecoderModel(encoder=bare_bert(), decoder=decoder)


@pytest.mark.parametrize("make", [t5, bart, two_berts], ids=lambda make: make.__name__)
@pytest.mark.parametrize("layers", ["hidden_states", "blocks"])
def test_encoder_decoders_are_refused(make, layers):
    with pytest.raises(ModelError, match=r"is an encoder-decoder: .*layers=\[\.\.\.\] and pass forward="):
        access.resolve_layers(make(), layers)


@pytest.mark.parametrize(("make", "limit"), [(llama, 24), (gpt2, 24), (bert, 24), (roberta, 22), (bloom, None)])
def test_position_limit_is_the_longest_sequence_that_runs(make, limit):
    model = make().eval()
    assert access.position_limit(model) == limit
    assert access.vocabulary_size(model) == 40
    longest = torch.full((1, limit or 40), 5)
    assert default_forward(model)(model, longest, torch.ones_like(longest)) is not None


def test_wrappers_are_taken_off():
    model = llama()
    compiled = torch.compile(model, backend="eager")
    assert access.unwrap(compiled) is model
    assert access.unwrap(nn.DataParallel(model)) is model
    assert access.unwrap(model) is model


class Module(nn.Module):
    """Calls its parts by the names that wrappers use, and is none."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, ids, mask):
        return self.module(ids)


class Headed(Module):
    def forward(self, *args, **kwargs):
        return self.head(self.module(*args, **kwargs))


class Based(Module):
    def get_base_model(self, kind):
        return self.part


class BasedElsewhere(Module):
    def get_base_model(self):
        return nn.Linear(2, 2)


def test_parts_with_the_names_of_wrappers_keep_them():
    plain = [kind(part=Plain()) for kind in (Based, BasedElsewhere)]
    plain += [Module(module=Plain()), Headed(module=Plain(), head=nn.Linear(2, 2)), Module(base_model=Plain())]
    for model in plain:
        assert [name for name, _ in access.named_modules(model)] == [name for name, _ in model.named_modules()]
        assert access.bare(model) is model


def test_names_with_the_wrapper_are_understood_and_reported_without():
    model = Engine(PeftForCausalLM(in_blocks(compiled)(tiny())))
    for pattern in ("module.base_model.model.model.layers.*", "module.base_model.model.model.layers.*._orig_mod"):
        layers = access.resolve_layers(model, pattern)
        assert [layer.name for layer in layers] == ["model.layers.0", "model.layers.1"]
    with pytest.raises(ModelError, match=r"globs such as 'model', 'model\.embed_tokens', 'model\.layers'"):
        access.resolve_layers(model, "layers.0")


def test_no_position_limit_where_the_config_says_none():
    config = tf.LlamaConfig(**SMALL)
    model = tf.LlamaForCausalLM(config)
    model.config.max_position_embeddings = -1
    assert access.position_limit(model) is None


@pytest.mark.filterwarnings("ignore:.*jit.*deprecated")
@pytest.mark.parametrize("wrap", [lambda model: model, Engine], ids=["alone", "wrapped"])
def test_models_made_by_torchscript_are_refused(wrap):
    model = wrap(torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(ModelError, match=r"made by TorchScript, which runs outside Python.*Measure the model that"):
        access.unwrap(model)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, states):
        return states + torch.cat([head(self.norm(states)) for head in self.heads], -1)


class NanoGPT(nn.Module):
    """Laid out like nanoGPT; `rescaled`: something is done between the blocks and the norm, or that is `unused`."""

    def __init__(self, blocks=nn.ModuleList, rescaled=False, number=3, unused=False):
        super().__init__()
        listed = [Block() for _ in range(number)]
        h = blocks(listed) if blocks is nn.ModuleList else blocks(*listed)
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(40, 16), "norm_in": nn.LayerNorm(16), "h": h})
        self.transformer["ln_f"] = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 40, bias=False)
        self.rescaled, self.unused = rescaled, unused

    def trunk(self, ids):
        states = [self.transformer.norm_in(self.transformer.wte(ids))]
        for block in self.transformer.h:
            states.append(block(states[-1]))
        last = states[-1] * (2 if self.rescaled else 1)
        return [*states[1:-1], last if self.unused else self.transformer.ln_f(last)]

    def forward(self, ids, targets=None):
        return self.lm_head(self.trunk(ids)[-1]), None

    def get_output_embeddings(self):
        return self.lm_head


def with_number(number=3):
    """That says how many blocks there are, which are then not looked for."""
    model = NanoGPT(number=number)
    model.config = types.SimpleNamespace(num_hidden_layers=number)
    return model


class OfTransformers(tf.PreTrainedModel):
    """The same as code that comes with a checkpoint."""

    config_class = tf.LlamaConfig
    base_model_prefix = "transformer"
    forward, trunk = NanoGPT.forward, NanoGPT.trunk

    def __init__(self):
        super().__init__(tf.LlamaConfig(num_hidden_layers=3, vocab_size=40))
        inside = NanoGPT()
        self.transformer, self.lm_head, self.rescaled, self.unused = inside.transformer, inside.lm_head, False, False


@pytest.mark.parametrize("make", [NanoGPT, lambda: NanoGPT(nn.Sequential), lambda: NanoGPT(number=1), with_number,
                                  lambda: with_number(1), OfTransformers])  # fmt: skip
def test_plain_models_with_one_list_of_blocks_are_measured_behind_their_final_norm(make):
    torch.manual_seed(0)
    model, probe = make(), ib.Probe.from_tokens(torch.randint(0, 40, (4, 12)))
    measured = ib.measure(model, probe)
    last = len(model.transformer.h) - 1
    assert list(measured.layers) == [*(f"transformer.h.{i}" for i in range(last)), f"transformer.h.{last}:final"]
    seen = {}
    for layer in access.resolve_layers(model, "hidden_states"):
        layer.module.register_forward_hook(lambda module, inputs, output, name=layer.name: seen.update({name: output}))
    expected = model.trunk(probe.input_ids)
    assert all(torch.equal(*pair) for pair in zip(seen.values(), expected, strict=True))


@pytest.mark.parametrize("check", ["preflight", "measure"])
@pytest.mark.parametrize("how", ["rescaled", "unused"])
def test_a_norm_that_does_not_read_the_last_block_is_refused_with_a_cure(check, how):
    model, probe = NanoGPT(**{how: True}), ib.Probe.from_tokens(torch.randint(0, 40, (4, 12)))
    names = [f"transformer.h.{i}" for i in range(3)]
    with pytest.raises(
        ModelError, match=r"'transformer\.ln_f' was taken for the final norm.*" + re.escape(repr(names))
    ):
        getattr(ib.Meter(probe), check)(model)
    assert ib.Meter(probe, layers=names).preflight(model).layers == tuple(names)


def test_of_several_lists_of_blocks_the_layers_to_pass_are_told():
    model = nn.ModuleDict({"one": NanoGPT(), "other": NanoGPT()})
    with pytest.raises(ModelError, match="has 2 lists of blocks") as raised:
        access.resolve_layers(model, "hidden_states")
    told = [ast.literal_eval(each) for each in re.findall(r"layers=(\[[^\]]*\])", str(raised.value))]
    for name, layers in zip(("one", "other"), told, strict=True):
        assert [layer.module for layer in access.resolve_layers(model, layers)] == [
            *list(model[name].transformer.h)[:-1],
            model[name].transformer.ln_f,
        ]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(16))

    def forward(self, ids, attention_mask):
        return self.encoder(self.embed(ids), src_key_padding_mask=attention_mask == 0)


def test_encoders_of_torch_are_measured_with_padding():
    """In evaluation mode they would make nested tensors of it."""
    torch.manual_seed(0)
    model, probe = Encoder(), make_probe()
    layers = ib.measure(model, probe).layers
    assert list(layers) == ["encoder.layers.0", "encoder.layers.1", "encoder.layers.2:final"]
    assert model.encoder.use_nested_tensor
