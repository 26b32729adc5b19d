"""The next-token loss of the probe against a float64 computation from the model's own logits, whatever the model is."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import warnings

import numpy as np
import pytest
import torch
import transformers as tf
from architectures import SMALL, bare_gpt2, bert, bloom, gemma2, gpt2, llama, neox, opt, qwen3
from tiny_models import WRAPPERS, make_probe, numbers
from tiny_models import llama as wrapped_llama
from torch import nn
from two_ranks import on_two_ranks

import ib_callback as ib
from ib_callback.measuring import thinning
from ib_callback.measuring.model import loss as loss_module
from ib_callback.measuring.model.head import relative_cost
from ib_callback.measuring.model.loss import number_of_pairs
from ib_callback.measuring.thinning import pairs_for_loss
from ib_callback.results.measurement import settings_differences

PROBE = make_probe()


def losses_of(model, probe=PROBE, logits_of=lambda output: output.logits):
    """Sequence and loss of every pair of neighbouring real tokens, in float64, from a plain call of the model."""
    with torch.no_grad():
        model.eval()
        logits = logits_of(model(probe.input_ids, attention_mask=probe.attention_mask.long())).double().numpy()
    found = []
    for row, (ids, mask) in enumerate(zip(probe.input_ids.tolist(), probe.attention_mask.tolist(), strict=True)):
        for s in range(len(ids) - 1):
            if mask[s] and mask[s + 1]:
                own = logits[row, s]
                largest = own.max()
                found.append((row, largest + math.log(np.exp(own - largest).sum()) - own[ids[s + 1]]))
    return found


def mean(losses):
    return math.fsum(loss for _, loss in losses) / len(losses)


def granite():
    return tf.GraniteForCausalLM(tf.GraniteConfig(**SMALL, logits_scaling=8.0))


def cohere():
    return tf.CohereForCausalLM(tf.CohereConfig(**SMALL, logit_scale=0.0625))


def scaled_up(make, factor=30.0):
    """Its states tell more of the next token, so that the loss is not that of a guess."""

    def made():
        model = make()
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(factor)
        return model

    return made


@pytest.mark.parametrize(
    ("make", "path"),
    [
        *((make, "head") for make in (llama, gpt2, opt, neox, bloom, qwen3, scaled_up(llama))),
        *((make, "logits") for make in (gemma2, granite, cohere, scaled_up(gemma2), scaled_up(granite))),
    ],
)
def test_it_is_that_of_the_models_own_logits(make, path):
    model = make()
    measured = ib.measure(model, PROBE)
    losses = losses_of(model)
    assert measured.settings["loss"] == {"path": path, "positions": len(losses)}
    assert measured.loss == pytest.approx(mean(losses), abs=1e-6)
    sums = {row: [math.fsum(x for r, x in losses if r == row), sum(r == row for r, _ in losses)] for row in range(10)}
    scatter = math.fsum((total - mean(losses) * number) ** 2 for total, number in sums.values())
    assert measured.loss_se == pytest.approx(math.sqrt(10 / 9 * scatter) / len(losses), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda logits: logits, "head"),
        (lambda logits: 50 * torch.tanh(logits / 50), "logits"),
        (lambda logits: 1.001 * logits, "logits"),
        (lambda logits: logits - 0.1 * (torch.arange(40) % 2), "logits"),
    ],
    ids=["as they are", "capped", "scaled", "biased"],
)
@pytest.mark.parametrize("weights", [1.0, 1e-3, 0.0])
def test_what_becomes_of_the_logits_shows_however_small_they_are_at_first(change, path, weights):
    class Changed(tf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = change(output.logits)
            return output

    model = Changed(tf.LlamaConfig(**SMALL))
    model.lm_head.weight.data *= weights
    meter = ib.Meter(PROBE)
    meter.preflight(model)
    model.lm_head.weight.data.copy_(10 * torch.randn_like(model.lm_head.weight))  # as if it had been trained
    measured = meter.measure(model)
    # Where all logits are 0, nothing shows, and the long way is taken.
    assert measured.settings["loss"]["path"] == ("logits" if weights == 0.0 else path)
    assert measured.loss == pytest.approx(mean(losses_of(model)), abs=1e-6)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_looked_through(wrap, alone):
    expected = mean(losses_of(wrapped_llama()))
    measured = ib.measure(wrap(wrapped_llama()), PROBE)
    assert measured.settings["loss"]["path"] == "head"
    assert measured.loss == pytest.approx(expected, abs=1e-6)


class LowRank(nn.Module):
    """What PEFT puts into the place of a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 40, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x, *args, **kwargs):
        return self.base_layer(x, *args, **kwargs) + self.up(self.down(x))


@pytest.mark.parametrize("kind", ["adapter", "hooked", "counting"])
def test_a_head_that_is_more_than_a_matrix(kind):
    model = llama()
    if kind == "adapter":
        model.lm_head = LowRank(model.lm_head)
    elif kind == "hooked":
        model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)
    else:
        model.lm_head.register_buffer("calls", torch.zeros(()))
        model.lm_head.register_forward_hook(lambda module, inputs, output: module.calls.add_(1) and None)
    hooks = len(model.lm_head._forward_hooks)
    before = copy.deepcopy(model.state_dict())
    measured = ib.measure(model, PROBE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(model.lm_head._forward_hooks) == hooks and not model.model._forward_hooks
    assert measured.settings["loss"]["path"] == "head"
    assert measured.loss == pytest.approx(mean(losses_of(model)), abs=1e-6)


def test_a_model_that_was_compiled_as_a_whole_in_place():
    model = llama().eval()
    model.compile(backend="eager")
    with torch.no_grad():
        model(PROBE.input_ids)
    assert ib.measure(model, PROBE).loss == pytest.approx(mean(losses_of(model)), abs=1e-6)


@pytest.mark.parametrize("make", [llama, gemma2])
def test_in_16_bits(make):
    """Weights, or autocast: the model's own logits are rounded, and so are those of its head."""
    model = make().to(torch.bfloat16)
    assert ib.measure(model, PROBE).loss == pytest.approx(mean(losses_of(model)), abs=1e-4)
    model = make()

    def with_autocast(model, ids, mask):
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids, attention_mask=mask)

    with torch.autocast("cpu", torch.bfloat16):
        measured, expected = ib.measure(model, PROBE), mean(losses_of(model))
    assert measured.loss == pytest.approx(expected, abs=1e-4)
    assert ib.Meter(PROBE, forward=with_autocast).measure(model).loss == pytest.approx(expected, abs=1e-4)


# --- which pairs


def padded(lengths, width=16, *, left=()):
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, slice(width - length, width) if row in left else slice(length)] = True
    ids = torch.randint(2, 40, mask.shape, generator=torch.Generator().manual_seed(3))
    return ib.Probe.from_tokens(ids, mask)


@pytest.mark.parametrize(
    "probe",
    [
        padded([16, 9, 12, 8, 16], left=(1, 3)),
        padded([3, 2, 16, 1, 16, 4, 3, 5, 2, 16, 3, 2]),  # batches, and ends of batches, without valid positions
        padded([16] * 3, left=(0,)),
    ],
    ids=["padded on both sides", "mostly too short for an n-gram", "whole"],
)
@pytest.mark.parametrize("options", [{}, {"standard_errors": 3}, {"orders": "token"}])
def test_every_pair_counts_whatever_the_orders_are(probe, options):
    model = llama()
    measured = ib.measure(model, probe, batch_size=2, **options)
    losses = losses_of(model, probe)
    assert measured.settings["loss"]["positions"] == len(losses)
    assert measured.loss == pytest.approx(mean(losses), abs=1e-6)


def test_several_passes_measure_it_in_the_first():
    model = llama()
    whole = ib.Meter(PROBE, orders="token")
    budget = whole.preflight(model).memory * 2 // 3
    in_groups = ib.Meter(PROBE, orders="token", memory_budget=budget)
    assert in_groups.preflight(model).passes > 1
    heads = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: heads.append(output.shape[1]))
    first, *rest = [dataclasses.asdict(meter.measure(model)) for meter in (in_groups, whole)]
    for name in ("loss", "loss_se", "predictive_information", "settings"):
        assert rest[0][name] == first[name]
    # Two batches of a pass, and one logit of each forward that is not looked at.
    assert [n for n in heads if n > 1] == 2 * [108, 29]


@pytest.mark.parametrize(("cost", "number"), [(0.1, 1000), (0.05, 1000), (0.2, 500), (1.9, 100), (math.inf, 100)])
def test_how_many_pairs_are_looked_at(cost, number, monkeypatch):
    monkeypatch.setattr(loss_module, "POSITIONS", 100)
    monkeypatch.setattr(loss_module.head, "relative_cost", lambda model: cost)
    probe = ib.Probe.from_tokens(torch.randint(2, 40, (100, 11)))
    assert number_of_pairs(probe, llama(), every=False) == number
    assert number_of_pairs(probe, llama(), every=True) == 1000


@pytest.mark.parametrize("cost", [1.0, 0.2])
def test_thinned_losses_are_those_of_the_chosen_pairs(cost, monkeypatch):
    for module in (loss_module, thinning):
        monkeypatch.setattr(module, "POSITIONS", 20)
    monkeypatch.setattr(loss_module.head, "relative_cost", lambda model: cost)
    model = llama()
    measured = ib.measure(model, PROBE)
    every = ib.measure(model, PROBE, loss="all")
    number = measured.settings["loss"]["positions"]
    assert (number, every.settings["loss"]["positions"]) == (20 if cost == 1.0 else 68, 137)
    pairs = pairs_for_loss(PROBE, number, seed=0)
    places = [(s, o) for s, mask in enumerate(PROBE.attention_mask) for o in range(int(mask.sum()) - 1)]
    losses = dict(zip(places, losses_of(model), strict=True))
    chosen = [losses[place] for place in zip(pairs.sequence.tolist(), pairs.offset.tolist(), strict=True)]
    assert len(chosen) == number
    assert measured.loss == pytest.approx(mean(chosen), abs=1e-6)
    assert settings_differences(measured, every) == [f"loss.positions: {number} vs 137"]
    for options in ({"prediction": False}, {"readout": False}, {"orders": "token"}):
        assert ib.measure(model, PROBE, **options).loss == measured.loss


def test_what_the_head_costs_is_told_by_parameters():
    config = tf.LlamaConfig(**(SMALL | {"tie_word_embeddings": False}))
    model = tf.LlamaForCausalLM(config)
    blocks = sum(p.numel() for p in model.model.parameters()) - 40 * 16
    assert relative_cost(model) == pytest.approx(40 * 16 / blocks)
    tied = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, tie_word_embeddings=True))
    assert relative_cost(tied) == relative_cost(model)
    assert relative_cost(bare_gpt2()) is None


# --- models of one's own, and models that predict no next token


class Own(nn.Module):
    """Embeds, mixes what came before, and puts out something."""

    def __init__(self, put_out, *, width=16, reads_ahead=False):
        super().__init__()
        self.table, self.places = nn.Embedding(40, width), nn.Embedding(width, width)
        self.body = nn.Linear(width, width)
        self.out = nn.Linear(width, 40)
        self.put_out, self.reads_ahead = put_out, reads_ahead

    def forward(self, input_ids, attention_mask=None):
        z = self.table(input_ids)
        z = z.mean(1, keepdim=True) + z if self.reads_ahead else z.cumsum(1)
        hidden = self.body(z)
        return self.put_out(hidden, self.out(hidden))


def measured_own(put_out, *, probe=PROBE, **options):
    model = Own(put_out, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return model, ib.Meter(probe, layers=["body"]).measure(model)


@pytest.mark.parametrize(
    ("put_out", "logits_of"),
    [
        (lambda hidden, logits: logits, lambda output: output),
        (lambda hidden, logits: (logits, None), lambda output: output[0]),
        (lambda hidden, logits: {"logits": logits}, lambda output: output["logits"]),
        (lambda hidden, logits: tf.modeling_outputs.CausalLMOutput(logits=logits), lambda output: output.logits),
    ],
    ids=["tensor", "tuple", "dict", "output"],
)
def test_models_of_ones_own(put_out, logits_of):
    model, measured = measured_own(put_out)
    assert measured.settings["loss"] == {"path": "logits", "positions": 137}
    assert measured.loss == pytest.approx(mean(losses_of(model, logits_of=logits_of)), abs=1e-6)


@pytest.mark.parametrize(
    ("put_out", "options", "why"),
    [
        (lambda hidden, logits: hidden, {}, "cannot be distinguished from hidden states"),
        (lambda hidden, logits: (hidden, logits), {}, "cannot be distinguished from hidden states"),
        (lambda hidden, logits: logits, {"width": 40}, "cannot be distinguished from hidden states"),
        (lambda hidden, logits: {"logits": logits[..., :3]}, {}, "do not fit the vocabulary: 3 numbers a token"),
        (lambda hidden, logits: logits[:, -1:], {}, r"\[2, 1, 40\], are not those of every token"),
        (lambda hidden, logits: {"logits": logits.mean(1)}, {}, "are not those of every token"),
        (lambda hidden, logits: logits.argmax(-1), {}, "outputs no logits"),
        (lambda hidden, logits: None, {}, "outputs no logits"),
        (lambda hidden, logits: logits, {"reads_ahead": True}, "reads the tokens that follow"),
    ],
)
def test_what_is_not_logits_of_the_next_token_is_not_taken_for_it(put_out, options, why):
    _, measured = measured_own(put_out, **options)
    values = (measured.loss, measured.loss_se, measured.bits_per_byte, measured.predictive_information)
    assert values == (None,) * 4 and not [name for name in measured.metrics() if "loss" in name]
    assert measured.settings["loss"]["positions"] is None
    assert re.match(f"none: .*{why}", measured.settings["loss"]["path"])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (bare_gpt2, "GPT2Model outputs no logits"),
        (bert, "BertForMaskedLM reads the tokens that follow"),
        (
            lambda: tf.LlamaForTokenClassification(tf.LlamaConfig(**SMALL, num_labels=3)),
            "vocabulary: 3 numbers a token",
        ),
        (lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**SMALL | {"pad_token_id": 0})), "every token"),
    ],
)
def test_models_without_a_next_token(make, why):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the hidden states")
        meter = ib.Meter(PROBE)
        model = make()
        first, again = meter.measure(model), meter.measure(model)
    assert first.loss is None and why in first.settings["loss"]["path"]
    assert numbers(first) == numbers(again)


def test_forwards_of_ones_own():
    model = llama()
    whole = ib.Meter(PROBE, forward=lambda m, ids, mask: m(ids, attention_mask=mask)).measure(model)
    assert whole.settings["loss"]["path"] == "logits"
    assert whole.loss == pytest.approx(mean(losses_of(model)), abs=1e-6)
    trunk = ib.Meter(PROBE, forward=lambda m, ids, mask: m.model(ids, attention_mask=mask)).measure(model)
    assert trunk.loss is None and "outputs no logits" in trunk.settings["loss"]["path"]


def test_a_head_that_fails_costs_the_loss_and_nothing_else():
    model = llama()
    meter = ib.Meter(PROBE)
    good = meter.measure(model)

    class Picky(nn.Linear):
        def forward(self, x):
            if x.shape[1] > 1:
                raise ValueError("one token at a time")
            return super().forward(x)

    model.lm_head.__class__ = Picky
    with pytest.warns(RuntimeWarning, match="loss on the probe could not be measured: ValueError: one token"):
        bad = meter.measure(model)
    assert bad.loss is None and bad.settings["loss"]["path"] == "none: ValueError: one token at a time"
    assert bad.orders == good.orders and not settings_differences(bad, good)
    model.lm_head.__class__ = nn.Linear
    assert numbers(meter.measure(model)) == numbers(good)


@pytest.mark.parametrize("make", [llama, granite])
def test_a_loss_that_is_not_finite_is_none_and_said(make):
    model = make()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # states stay finite
    meter = ib.Meter(PROBE)
    meter.preflight(model)
    model.get_output_embeddings().weight.data[7] = math.inf
    with pytest.warns(RuntimeWarning, match=r"the loss is not finite in sequences with 137 of 137 pairs"):
        measured = meter.measure(model)
    assert measured.loss is None and measured.complexity is not None
    assert "not finite" in measured.settings["loss"]["path"]
    assert ib.results.measurement.Measurement.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured


# --- numbers that follow


def test_bits_per_byte_and_predictive_information():
    ids, mask = PROBE.input_ids, PROBE.attention_mask
    probe = ib.Probe.from_tokens(ids, mask, num_bytes=600)
    model = llama()
    measured = ib.measure(model, probe)
    follows = ids[:, 1:][mask[:, 1:]].tolist()
    share = [follows.count(token) / len(follows) for token in set(follows)]
    entropy = -math.fsum(p * math.log(p) for p in share)
    assert measured.bits_per_byte == pytest.approx(measured.loss * 137 / (600 * math.log(2)))
    assert measured.predictive_information == pytest.approx(entropy - measured.loss)
    assert {"ib/loss", "ib/loss_se", "ib/bits_per_byte", "ib/predictive_information"} <= {*measured.metrics()}
    assert "loss 3.69" in str(measured) and "bits per byte)" in str(measured)
    assert ib.measure(model, PROBE).bits_per_byte is None


@pytest.mark.parametrize("kind", ["groups", "pairs"])
def test_sequences_that_were_drawn_together_are_one_draw(kind):
    ids, mask = PROBE.input_ids, PROBE.attention_mask
    labels = {"preference": torch.tensor([1, 0] * 5)[:, None].expand_as(ids)}
    given = {"groups": [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]} if kind == "groups" else {"labels": labels}
    model = llama()
    measured = ib.measure(model, ib.Probe.from_tokens(ids, mask, **given), features=())
    losses = losses_of(model)
    of_pair = [[x - mean(losses) for row, x in losses if row // 2 == pair] for pair in range(5)]
    scatter = math.fsum(math.fsum(pair) ** 2 for pair in of_pair)
    assert measured.loss_se == pytest.approx(math.sqrt(5 / 4 * scatter) / len(losses), abs=1e-6)


def test_standard_errors_pair_two_models():
    first, second = (copy.deepcopy(llama()) for _ in range(2))
    second.model.layers[0].mlp.down_proj.weight.data *= 3.0
    probe = ib.Probe.from_tokens(PROBE.input_ids, PROBE.attention_mask, num_bytes=600)
    meter = ib.Meter(probe, standard_errors=5)
    a, b = meter.measure(first), meter.measure(second)
    sums = [np.array([[x for r, x in losses_of(m) if r // 2 == g] for g in range(5)], object) for m in (first, second)]
    for measured, groups in zip((a, b), sums, strict=True):
        for omission, value in enumerate(measured.loss_jackknife):
            left_out = [omission] if omission < 5 else [omission - 5, omission - 4]
            rest = [x for g in range(5) if g not in left_out for x in groups[g]]
            assert value == pytest.approx(math.fsum(rest) / len(rest), abs=1e-6)
    paired = ib.difference(a, b, "loss")
    assert paired.metric == "loss" and paired.paired
    assert paired.value == a.loss - b.loss
    of_bytes = ib.difference(a, b, "bits_per_byte")
    assert of_bytes.standard_error == pytest.approx(paired.standard_error * a.bits_per_byte / a.loss)
    other = dataclasses.replace(b, settings=b.settings | {"loss": {"path": "head", "positions": 99}})
    assert not ib.difference(a, other, "loss").paired
    with pytest.raises(ValueError, match=r"b: there is no standard error of loss .*measured without errors"):
        ib.difference(a, ib.measure(second, probe), "loss")
    with pytest.raises(ValueError, match=r"b: there is no standard error of loss .*undefined"):
        ib.difference(a, ib.measure(second, probe, loss=False), "loss")


@pytest.mark.parametrize("loss", [1, "some", None])
def test_bad_settings(loss):
    with pytest.raises(ValueError, match='loss: expected True, "all" or False, got'):
        ib.Meter(PROBE, loss=loss)


def test_without_it_nothing_more_is_run():
    model = llama()
    meter, calls = ib.Meter(PROBE, loss=False, batch_size=5), []
    meter.preflight(model)
    model.register_forward_hook(lambda module, inputs, output: calls.append(output.logits.shape[1]))
    measured = meter.measure(model)
    assert calls == [1, 1] and measured.loss is None and "loss" not in measured.settings
    with_it = ib.measure(model, PROBE, batch_size=5)
    assert not settings_differences(measured, with_it)
    assert measured.orders == with_it.orders


SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from architectures import gemma2, llama
from tiny_models import make_probe
import ib_callback as ib

dist.init_process_group("gloo")


def in_blocks(model):
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)


def with_the_head(model):
    fully_shard(model.lm_head)
    in_blocks(model)


def norm_and_head_together(model):
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    in_blocks(model)


for make in (llama, gemma2):
    for shard in (in_blocks, with_the_head, norm_and_head_together):
        name = shard.__name__
        def made():
            torch.manual_seed(0)
            model = make()
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            return model
        expected = ib.measure(made(), make_probe())
        model = made()
        shard(model)
        meter = ib.Meter(make_probe())
        meter.preflight(model)
        ends = []
        for follows in (True, False):
            for step in range(2):
                if follows:
                    found = meter.measure(model)
                    if step == 0:
                        assert found.settings["loss"] == expected.settings["loss"], (name, found.settings["loss"])
                        assert abs(found.loss - expected.loss) < 1e-6, name
                output = model(make_probe().input_ids, labels=make_probe().input_ids)
                output.loss.backward()
                with torch.no_grad():
                    for p in model.parameters():
                        p.sub_(0.1 * p.grad)
                        p.grad = None
            ends.append([p.to_local().clone() for p in model.parameters()])
            model = made()
            shard(model)
        assert all(torch.equal(a, b) for a, b in zip(*ends)), name
        print(make.__name__, name, found.settings["loss"]["path"])
dist.barrier()
dist.destroy_process_group()
"""


def test_sharded_over_two_ranks(tmp_path):
    """FSDP2, in every arrangement: the loss of one rank, and the training as if it had not been measured."""
    for output in on_two_ranks(SHARDED, tmp_path):
        assert output.count(" head\n") == 3 and output.count(" logits\n") == 3
