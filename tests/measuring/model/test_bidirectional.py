"""Encoders are measured with a warning, two stacks only where the user says which and how, decoders as ever."""

import warnings

import pytest
import torch
import transformers as tf
from architectures import SMALL, bare_bert, bart, bert, gpt2, llama, modernbert, opt, roberta, t5
from tiny_models import numbers

import ib_callback as ib
from ib_callback.measuring.model import bidirectional


def probe():
    ids = torch.randint(2, 40, (3, 14), generator=torch.Generator().manual_seed(1))
    labels = {"half": (torch.arange(3) % 2)[:, None].expand(3, 14)}
    return ib.Probe.from_tokens(ids, torch.arange(14) < torch.tensor([[14], [12], [14]]), labels=labels)


def encoder(model, input_ids, attention_mask):
    return model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)


SETTINGS = {"num_bins": 10, "null": False, "orders": "token"}


def deberta():
    return tf.DebertaV2ForMaskedLM(tf.DebertaV2Config(**(SMALL | {"pad_token_id": 0})))


def decoding_bert():
    return tf.BertLMHeadModel(tf.BertConfig(**SMALL, is_decoder=True))


@pytest.mark.parametrize("make", [bert, bare_bert, roberta, modernbert, deberta], ids=lambda make: make.__name__)
def test_encoders_are_measured_with_one_warning(make):
    torch.manual_seed(0)
    model, meter = make(), ib.Meter(probe(), **SETTINGS)
    with pytest.warns(RuntimeWarning, match="attention is bidirectional. The model has then read"):
        first = meter.measure(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert numbers(meter.measure(model)) == numbers(first)  # said once
        meter.preflight(model)
    with pytest.warns(RuntimeWarning, match=rf"hidden states of {type(model).__name__} change with the tokens"):
        ib.Meter(probe(), **SETTINGS).preflight(model)


def bart_decoder():
    return bart(tf.BartForCausalLM)  # not declared: its cross-attention, which has nothing to attend to, is not causal


@pytest.mark.parametrize("make", [llama, gpt2, opt, decoding_bert, bart_decoder], ids=lambda make: make.__name__)
def test_decoders_are_measured_without(make):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        meter = ib.Meter(probe(), **SETTINGS)
        meter.preflight(make())
        assert meter.measure(make()).error is None


def test_what_models_say_of_themselves():
    assert [bidirectional.is_declared(make()) for make in (llama, gpt2, bert, bart_decoder)] == [
        True,
        True,
        False,
        False,
    ]
    assert not bidirectional.is_declared(torch.nn.Linear(2, 2))


def test_a_sequence_of_one_token_tells_nothing():
    ids = torch.tensor([[5, 6, 7, 5]])
    assert bidirectional.with_other_ending(ids, 1).tolist() == [[5, 6, 5, 5]]
    assert bidirectional.with_other_ending(ids, 2) is None


@pytest.mark.parametrize(("make", "layers"), [(t5, "encoder.block.*"), (bart, "model.encoder.layers.*")])
def test_two_stacks_need_both_layers_and_forward(make, layers):
    torch.manual_seed(0)
    model = make().eval()
    for keywords in ({}, {"layers": [layers]}, {"forward": encoder}):
        meter = ib.Meter(probe(), **SETTINGS, **keywords)
        for call in (meter.preflight, meter.measure):
            with pytest.raises(ib.ModelError, match=r"is an encoder-decoder: it reads one text and writes another"):
                call(model)
    measured = ib.Meter(probe(), **SETTINGS, layers=[layers], forward=encoder).measure(model)
    alone = model.get_encoder()
    with torch.no_grad():
        states = alone(probe().input_ids, attention_mask=probe().attention_mask.long(), output_hidden_states=True)
    first = states.hidden_states[1]
    valid = torch.zeros(3, 14, dtype=torch.bool)
    for row, length in enumerate((14, 12, 14)):
        valid[row, : length - 1] = True
    expected = ib.soft_mutual_information(first[valid], probe().input_ids[valid], num_bins=10)
    assert measured["token"].complexity_by_layer[0] == pytest.approx(expected.item(), abs=1e-6)


def test_the_encoder_alone_is_an_encoder():
    with pytest.warns(RuntimeWarning, match="T5EncoderModel"):
        point = ib.measure(t5(tf.T5EncoderModel), probe(), **SETTINGS)
    assert point.layers == ("encoder.block.0", "encoder.block.1:final")
    assert 0 < point.features["half"].information < 1


def test_a_decoder_that_writes_after_a_given_text_is_causal():
    """As docs/comparability.md shows it."""
    torch.manual_seed(0)
    prompt = torch.tensor([[3, 4, 5]])

    def forward(model, ids, mask):
        source = prompt.expand(len(ids), -1)
        return model(input_ids=source, decoder_input_ids=ids, decoder_attention_mask=mask, use_cache=False)

    meter = ib.Meter(probe(), layers=["decoder.block.*"], forward=forward, **SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert meter.preflight(t5()).layers == ("decoder.block.0", "decoder.block.1")
        assert 0 < meter.measure(t5()).complexity < 1
    with pytest.warns(RuntimeWarning, match="attention is bidirectional"):
        ib.Meter(probe(), layers=["encoder.block.*"], forward=encoder, **SETTINGS).preflight(t5())
