"""How models are called: one row of logits and no cache wherever that can be asked for, else as they are."""

import pytest
import torch
import transformers as tf
from architectures import SMALL, bert, gpt2, llama
from tiny_models import WRAPPERS, Engine, make_probe, numbers
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
