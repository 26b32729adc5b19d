"""How models are called: one row of logits and no cache wherever that can be asked for, else as they are."""

import types

import accelerate
import pytest
import torch
import transformers as tf
from architectures import SMALL, bert, gpt2, llama
from tiny_models import WRAPPERS, Engine, PeftForCausalLM, make_probe, numbers
from tiny_models import llama as tiny_llama
from torch import nn

import ib_callback as ib
from ib_callback.common.errors import ModelError
from ib_callback.measuring.model.forward import default_forward, is_out_of_memory


@pytest.mark.parametrize("make", [llama, gpt2])
def test_default_call_computes_one_logit_row_and_keeps_no_cache(make):
    model = make().eval()
    ids = torch.randint(2, 40, (2, 9))
    output = default_forward(model)(model, ids, torch.ones_like(ids))
    assert output.logits.shape == (2, 1, 40)
    assert output.past_key_values is None


def record(calls):
    """A forward of every shape that users write, each noting what it was given."""

    class Subclass(tf.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            calls.append(kwargs)
            return super().forward(input_ids=input_ids, labels=labels, **kwargs)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = llama()

        def forward(self, *args, **kwargs):
            calls.append(kwargs)
            return self.inside(*args, **kwargs)

    return Subclass(tf.LlamaConfig(**SMALL)), Wrapper()


def test_the_mask_reaches_forwards_that_hand_their_keywords_on():
    calls = []
    ids = torch.randint(2, 40, (2, 9))
    mask = torch.ones_like(ids)
    subclass, wrapper = record(calls)
    for model in (subclass, wrapper):
        default_forward(model)(model, ids, mask)
        assert calls[-1]["attention_mask"] is mask
    assert calls[0]["logits_to_keep"] == 1
    assert calls[0]["use_cache"] is False


def test_the_mask_is_never_passed_as_something_else():
    class NanoGPT(nn.Module):
        def forward(self, idx, targets=None):
            assert targets is None
            return idx

    model = NanoGPT()
    ids = torch.ones(2, 4, dtype=torch.long)
    forward = default_forward(model)
    assert forward(model, ids, torch.ones_like(ids)) is ids
    with pytest.raises(
        ModelError, match=r"NanoGPT\.forward takes no attention_mask, but the probe has padding.*forward="
    ):
        forward(model, ids, torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_looked_through(wrap, alone):
    heads = []
    inside = llama().eval()
    inside.lm_head.register_forward_hook(lambda module, inputs, output: heads.append(output.shape[1]))
    model = wrap(inside)
    ids = torch.randint(2, 40, (2, 9))
    with torch.no_grad():
        output = default_forward(model)(model, ids, torch.ones_like(ids))
    assert output.logits.shape == (2, 1, 40)
    assert output.past_key_values is None
    ib.measure(model, make_probe(), loss=False)
    assert set(heads) == {1}


def test_a_wrapped_model_that_takes_no_mask_is_given_none():
    class Tiny(nn.Module):
        def forward(self, idx):
            return idx

    model = Engine(Tiny())
    ids = torch.ones(2, 4, dtype=torch.long)
    assert default_forward(model)(model, ids, torch.ones_like(ids)) is ids


def test_a_model_without_logits_to_keep_runs_as_it_is():
    torch.manual_seed(0)
    model = bert().eval()
    calls = []
    model.register_forward_hook(lambda module, inputs, keywords, output: calls.append(set(keywords)), with_kwargs=True)
    measured = ib.Meter(make_probe(), batch_size=4).measure(model)
    # Two for its hidden states, two for what its attention sees, three batches.
    plain = {"attention_mask"}
    assert calls == [plain, plain | {"output_hidden_states", "return_dict"}, *[plain] * 5]
    whole = ib.Meter(make_probe(), batch_size=4, forward=lambda m, ids, mask: m(ids, attention_mask=mask))
    assert numbers(whole.measure(model)) == numbers(measured)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_what_means_that_memory_ran_out(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize("kind", [accelerate.cpu_offload, accelerate.disk_offload])
def test_models_that_accelerate_offloads_measure_like_the_whole(kind, tmp_path):
    expected = numbers(ib.measure(tiny_llama().eval(), make_probe()))
    model = tiny_llama().eval()
    where = {"offload_dir": str(tmp_path)} if kind is accelerate.disk_offload else {}
    kind(model, execution_device=torch.device("cpu"), **where)
    meter = ib.Meter(make_probe())
    meter.preflight(model)
    assert numbers(meter.measure(model)) == expected
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("make", [
    lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**SMALL)),
    lambda: tf.GPT2ForSequenceClassification(tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2)),
    lambda: tf.BioGptForSequenceClassification(tf.BioGptConfig(**SMALL)),
], ids=["llama", "gpt2", "biogpt"])  # fmt: skip
@pytest.mark.parametrize("padding", [None, 0])
def test_reward_models_with_and_without_a_padding_token_measure_like_their_trunk(make, padding):
    torch.manual_seed(0)
    model = make().eval()
    model.config.pad_token_id = padding
    measured, trunk = (ib.measure(each, make_probe(), batch_size=4, loss=False) for each in (model, model.base_model))
    assert measured["token"].complexity_by_layer == trunk["token"].complexity_by_layer
    assert model.config.pad_token_id is padding


class PeftModel(PeftForCausalLM):
    """Prompt tuning: learnt vectors stand before the embeddings of every text."""

    __module__ = "peft.peft_model"

    def __init__(self, base, number):
        super().__init__(base)
        self.active_peft_config = types.SimpleNamespace(peft_type="PeftType.PROMPT_TUNING", num_virtual_tokens=number)
        self.prompt = nn.Parameter(torch.randn(number, 16))

    disabled = False

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        if self.disabled:
            return self.get_base_model()(input_ids, attention_mask=attention_mask, **kwargs)
        prompt = self.prompt.expand(len(input_ids), -1, -1)
        embeds = torch.cat([prompt, self.get_base_model().get_input_embeddings()(input_ids)], 1)
        mask = torch.cat([attention_mask.new_ones(prompt.shape[:2]), attention_mask], 1)
        return self.get_base_model()(inputs_embeds=embeds, attention_mask=mask, **kwargs)


def test_learnt_tokens_ahead_of_the_text_are_left_out():
    torch.manual_seed(0)
    ids = torch.randint(2, 40, (6, 12))
    model = PeftModel(tiny_llama().eval(), 4).eval()
    layers, seen = [], {}
    for name, states in ib.Meter(ib.Probe.from_tokens(ids), orders="token").assignments(model):
        seen[name] = states
        layers.append(name)
    assert layers == ["model.layers.0", "model.layers.1:final"]
    # The last token of a text has no next one, and so no valid position.
    with torch.no_grad():
        expected = model(ids, torch.ones_like(ids), output_hidden_states=True).hidden_states[1:]
    for states, own in zip(seen.values(), expected, strict=True):
        points = ib.reference_points(16, 100)
        temperature = ib.calibrated_temperature(16, 100)
        torch.testing.assert_close(
            states, ib.soft_assign(own[:, 4:-1].flatten(0, 1), points, temperature), rtol=0, atol=1e-6
        )
    measured = ib.measure(model, ib.Probe.from_tokens(ids), loss="all")
    logits = model(ids, torch.ones_like(ids)).logits[:, 4:]
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert measured.loss == pytest.approx(float(loss), abs=1e-5)
    assert measured.readout and measured.prediction


def test_without_learnt_tokens_for_a_while_a_model_measures_like_its_inside():
    """As in `with model.disable_adapter()`."""
    inside, probe = tiny_llama().eval(), make_probe()
    model = PeftModel(inside, 4).eval()
    model.disabled = True
    ib.Meter(probe).preflight(model)
    assert numbers(ib.measure(model, probe)) == numbers(ib.measure(inside, probe))


def test_learnt_tokens_count_towards_the_length_that_a_model_takes():
    probe = ib.Probe.from_tokens(torch.randint(2, 40, (4, 22)))
    with pytest.raises(ib.ModelError, match=r"at most 24 .*and 4 of these are learnt tokens .*max_length=20"):
        ib.Meter(probe).preflight(PeftModel(tiny_llama(), 4))
