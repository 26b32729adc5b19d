"""Readout and prediction of every kind of model, under every setting, and what is told where there is none."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
import weakref
from typing import Any

import brute_force as bf
import pytest
import torch
import transformers as tf
from architectures import SMALL, bare_gpt2, bert, gemma2, gpt2, llama, neox, opt, qwen3
from tiny_models import WRAPPERS, make_probe, numbers
from tiny_models import llama as wrapped_llama
from torch import nn

import ib_callback as ib
from ib_callback.measuring import thinning
from ib_callback.measuring.model import codebook
from ib_callback.measuring.model import loss as loss_module
from ib_callback.results.measurement import settings_differences
from ib_callback.results.metrics import metric_names

PROBE = make_probe()
POSITIONS = bf.valid_positions(PROBE.attention_mask.numpy(), 1)
VIEWS = ("readout", "prediction")


def labels(probe: ib.Probe, positions: Any) -> dict[str, list[Any]]:
    ids = probe.input_ids.numpy()
    return {
        "complexity": [bf.input_label(ids, position, 1) for position in positions],
        "expressivity": [bf.output_label(ids, position, 1) for position in positions],
    }


def expected(model: Any, probe: ib.Probe = PROBE, rows: Any = None, weighting: str = "empirical") -> dict[str, float]:
    """Both views of the token order, in float64 from a plain call of the model; `rows` [V, dim] of its head."""
    ids, mask = probe.input_ids.numpy(), probe.attention_mask.numpy()
    with torch.no_grad():
        output = model.eval()(
            probe.input_ids, attention_mask=probe.attention_mask.long(), output_hidden_states=True
        )  # fmt: skip
    states, logits = (each.double().numpy() for each in (output.hidden_states[-1], output.logits))
    rows = model.get_output_embeddings().weight if rows is None else rows
    positions = bf.valid_positions(mask, 1)
    assignments = {
        "readout": bf.readout_assignments(
            states,
            rows.detach().double().numpy()[bf.frequent_tokens(ids, mask, 100)],
            positions,
        ),
        "prediction": bf.grouped_shares(logits, bf.frequent_tokens(ids, mask, 99), positions),
    }
    return {
        f"{view}/{side}": bf.mutual_information(table, of_side, weighting)
        for view, table in assignments.items()
        for side, of_side in labels(probe, positions).items()
    }


def found(measured: ib.Measurement) -> dict[str, float]:
    return {
        f"{view}/{side}": getattr(measured[f"{view}/token"], side)
        for view in measured.views
        if view in VIEWS
        for side in ("complexity", "expressivity")
    }


def louder(make: Any, factor: float = 30.0) -> Any:
    """Its logits are large, so that its predictions are no guesses."""

    def made() -> Any:
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(3)
            model.get_output_embeddings().weight.mul_(factor / 3)
            if getattr(model.get_output_embeddings(), "bias", None) is not None:
                model.get_output_embeddings().bias.normal_()
        return model

    return made


def phi() -> Any:
    return tf.PhiForCausalLM(tf.PhiConfig(**SMALL))


def granite() -> Any:
    return tf.GraniteForCausalLM(tf.GraniteConfig(**SMALL, logits_scaling=8.0))


def cohere() -> Any:
    return tf.CohereForCausalLM(tf.CohereConfig(**SMALL, logit_scale=0.25))


@pytest.mark.parametrize(
    ("make", "path"),
    [
        *((make, "head") for make in (llama, gpt2, opt, neox, qwen3, phi)),
        *((make, "logits") for make in (gemma2, granite, cohere)),
    ],
)
def test_heads_of_all_kinds(make, path):
    model = louder(make, 30.0 if path == "head" else 300.0)()
    measured = ib.measure(model, PROBE, orders="token")
    assert measured.settings["loss"]["path"] == path
    twin = expected(model)
    assert found(measured) == pytest.approx(twin, abs=1e-6)
    assert min(twin.values()) > 0.05


class LowRank(nn.Module):
    """What PEFT puts into the place of a linear layer."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 40, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class Packed(nn.Linear):
    """The shape of a layer with four bits to a number: two of them in a byte, in one long column."""

    def __init__(self, base: Any) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.scale = base.weight.abs().max().item() / 7
        self.rows = (base.weight / self.scale).round().clamp(-7, 7).detach()
        self.weight = nn.Parameter(torch.zeros(base.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.scale * self.rows).T


class Rounding(nn.Module):
    """Without a weight, and with states rounded to 8 bits."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.register_buffer("held", base.weight.detach().clone())
        self.in_features = base.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
        return (x / scale).round() * scale @ self.held.T


class Named(torch.Tensor):
    """A tensor of another kind, as quantised ones are, that cannot be indexed."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor):
            raise NotImplementedError("no rows")
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        return found.as_subclass(cls) if func is torch.Tensor.detach else found


def with_adapter(model: Any) -> torch.Tensor:
    head = model.lm_head = LowRank(model.lm_head)
    return head.weight + head.up.weight @ head.down.weight


def with_adapter_and_bias(model: Any) -> torch.Tensor:
    model.lm_head.bias = nn.Parameter(torch.randn(40))
    return with_adapter(model)


def packed(model: Any) -> torch.Tensor:
    head = model.lm_head = Packed(model.lm_head)
    return head.scale * head.rows


def rounding(model: Any) -> torch.Tensor:
    head = model.lm_head = Rounding(model.lm_head)
    return head.held


def of_another_tensor(model: Any) -> torch.Tensor:
    rows = model.lm_head.weight.detach().clone()
    model.lm_head.weight = nn.Parameter(rows.clone().as_subclass(Named))
    return rows


def parametrised(model: Any) -> torch.Tensor:
    nn.utils.parametrizations.weight_norm(model.lm_head)
    return model.lm_head.weight


def patched(model: Any) -> torch.Tensor:
    rows = 2 * model.lm_head.weight.detach().flip(0)
    model.lm_head.forward = lambda x: x @ rows.T
    return rows


@pytest.mark.parametrize(
    "change", [with_adapter, with_adapter_and_bias, packed, rounding, of_another_tensor, parametrised, patched]
)
def test_heads_that_are_more_than_a_matrix(change):
    model = louder(llama)()
    rows = change(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured = ib.measure(model, PROBE, orders="token")
    twin = expected(model, rows=rows)
    assert measured.settings["loss"]["path"] == "head"
    # States are rounded in other slices, too.
    assert found(measured) == pytest.approx(twin, abs=1e-4 if change is rounding else 1e-6)
    if change is not parametrised:
        assert abs(twin["readout/complexity"] - expected(louder(llama)())["readout/complexity"]) > 1e-4 or (
            change in (rounding, of_another_tensor)
        )


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_looked_through(wrap, alone):
    twin = expected(wrapped_llama())
    assert found(ib.measure(wrap(wrapped_llama()), PROBE, orders="token")) == pytest.approx(twin, abs=1e-6)


def test_a_model_that_was_compiled_as_a_whole_in_place():
    model = louder(llama)()
    twin = expected(model)
    model.compile(backend="eager")
    with torch.no_grad():
        model(PROBE.input_ids)
    assert found(ib.measure(model, PROBE, orders="token")) == pytest.approx(twin, abs=1e-6)


@pytest.mark.parametrize("make", [llama, gemma2])
def test_in_16_bits(make):
    """Weights, or autocast: states are taken as they are; logits are rounded as the model rounds them."""
    model = louder(make)().to(torch.bfloat16)
    # One batch of all sequences, as the twin has it: rounding depends on shapes.
    measured, twin = ib.measure(model, PROBE, orders="token", batch_size=10), expected(model)
    assert found(measured) == pytest.approx(twin, abs=2e-3)
    assert found(measured)["readout/complexity"] == pytest.approx(twin["readout/complexity"], abs=1e-6)
    model = louder(make)()
    with torch.autocast("cpu", torch.bfloat16):
        measured, twin = ib.measure(model, PROBE, orders="token", batch_size=10), expected(model)
    assert measured.settings["dtype"] == "float32, autocast bfloat16"
    assert found(measured) == pytest.approx(twin, abs=2e-3)
    assert found(measured)["readout/complexity"] == pytest.approx(twin["readout/complexity"], abs=1e-6)


def test_forwards_of_ones_own():
    model = louder(llama)()
    twin = expected(model)
    whole = ib.Meter(PROBE, orders="token", forward=lambda m, ids, mask: m(ids, attention_mask=mask)).measure(model)
    assert found(whole) == pytest.approx(twin, abs=1e-6)
    trunk = ib.Meter(PROBE, orders="token", forward=lambda m, ids, mask: m.model(ids, attention_mask=mask))
    measured = trunk.measure(model)
    assert found(measured) == pytest.approx({k: v for k, v in twin.items() if "readout" in k}, abs=1e-6)
    assert "outputs no logits" in measured.settings["prediction"]["why"]


@pytest.mark.parametrize("layers", ["blocks", ["model.layers.0"], lambda model: [model.model.layers[1]]])
def test_whatever_layers_are_measured(layers):
    model = louder(llama)()
    assert found(ib.measure(model, PROBE, orders="token", layers=layers)) == found(
        ib.measure(model, PROBE, orders="token")
    )


# --- where there is none


class Own(nn.Module):
    """Says nothing of where its blocks are; `head` says whether it has an output embedding."""

    def __init__(self, head: bool = False) -> None:
        super().__init__()
        self.table, self.body, self.out = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40)
        if head:
            self.get_output_embeddings = lambda: self.out

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.out(self.body(self.table(input_ids).cumsum(1)))}


class Deep(nn.Sequential):
    """A head that is more than a linear map."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 40))


def with_zero_head() -> Any:
    model = llama()
    nn.init.zeros_(model.lm_head.weight)
    return model


def with_deep_head() -> Any:
    model = llama()
    model.lm_head = Deep()
    return model


def with_narrow_head() -> Any:
    """Takes half of each state."""
    model = llama()

    class Half(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x[..., :8])

    model.lm_head = Half(8, 40, bias=False)
    return model


class Projected(tf.LlamaForCausalLM):
    """Something stands between its states and its head."""

    def __init__(self) -> None:
        super().__init__(tf.LlamaConfig(**SMALL))
        self.lm_head = nn.Linear(8, 40, bias=False)

    def forward(self, input_ids, attention_mask=None, **options):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return {"logits": self.lm_head(hidden[..., :8])}


READS_AHEAD = "BertForMaskedLM reads the tokens that follow, so it predicts nothing"


@pytest.mark.parametrize(
    ("make", "options", "readout", "prediction"),
    [
        (bare_gpt2, {}, "GPT2Model has no output embeddings", "GPT2Model outputs no logits"),
        (bert, {}, None, READS_AHEAD),
        (Own, {"layers": ["body"]}, "Own has no output embeddings", None),
        (lambda: Own(head=True), {"layers": ["body"]}, "the last hidden states of Own are not known", None),
        (with_zero_head, {}, "its output embeddings are zero or all alike", None),
        (with_deep_head, {}, "its output head is not linear", None),
        (with_narrow_head, {}, None, None),
        (Projected, {}, "its states have 16 dimensions, and its output embeddings 8", None),
    ],
)
def test_what_is_not_there_is_none_with_the_reason(make, options, readout, prediction):
    meter = ib.Meter(PROBE, orders="token", **options)
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="the hidden states of|.* reads the tokens that follow")
        line = meter.preflight(model).describe()
        measured = meter.measure(model)
    assert (f"; no readout: {readout}" in line) == (readout is not None)
    # Whether a causal model puts out logits is seen when it is measured.
    assert ("; no prediction: " in line) == (prediction == READS_AHEAD)
    for name, why in (("readout", readout), ("prediction", prediction)):
        assert measured.settings[name].get("why") == why
        assert (name in measured.views) == (why is None)
        assert (getattr(measured, name) == {}) == (why is not None)
        if why is not None:
            with pytest.raises(KeyError, match=re.escape(why)):
                measured[f"{name}/token"]
    known = metric_names(meter.orders, primary="token", views=meter.view_names, without=meter.unmeasured)
    assert {name for name in known if name.startswith(VIEWS)} <= set(measured.scalars())
    assert ib.Measurement.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured


@pytest.mark.parametrize(
    "head", [nn.Linear(16, 30), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 30))], ids=["plain", "deep"]
)
def test_a_head_without_a_row_for_each_token_is_a_reason_and_never_asked_for_others(head):
    """Which on a GPU would end the process, not the readout."""
    model = llama()
    model.lm_head = head
    meter = ib.Meter(PROBE, orders="token")
    why = f"its output head has 30 rows, but the probe has the token {int(PROBE.input_ids.max())}"
    assert meter.preflight(model).missing["readout"] == why
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert meter.measure(model).settings["readout"] == {"why": why}


def test_a_head_of_half_of_the_states_has_the_rows_that_it_acts_as():
    model = with_narrow_head()
    model.lm_head.weight.data.mul_(100)
    rows = torch.cat([model.lm_head.weight, torch.zeros(40, 8)], 1)
    assert found(ib.measure(model, PROBE, orders="token")) == pytest.approx(expected(model, rows=rows), abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["head", "states"])
def test_numbers_that_are_not_finite_cost_the_view_and_are_told_once(value, where, monkeypatch):
    model = louder(llama)()
    meter = ib.Meter(PROBE, orders="token", layers=["model.layers.0"])
    if where == "head":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.lm_head.weight.data[3] = value
    else:
        model.model.layers[2].mlp.down_proj.weight.data[0, 0] = value
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, _ = meter.measure(model), meter.measure(model)
    assert first.views.keys() == {"late", "last"} and first.complexity is not None
    assert sorted(str(warning.message) for warning in caught) == [
        "the next-token loss on the probe could not be measured: the loss is not finite in sequences with 137 of 137 "
        "pairs.",
        "the readout of the model could not be measured: "
        + ("its output embeddings are not finite." if where == "head" else "states are not finite."),
    ]
    assert ib.Measurement.from_dict(json.loads(json.dumps(first.to_dict()))) == first
    # Where the mean is that of finite ones.
    monkeypatch.setattr("ib_callback.measuring.meter.KEPT", 0)
    again = ib.Meter(PROBE, orders="token", layers=["model.layers.0"], batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert again.measure(model).readout == {}


def test_errors_of_the_head_cost_the_views_and_nothing_else():
    model = louder(llama)()
    meter = ib.Meter(PROBE, orders="token", loss=False, prediction=True)
    good = meter.measure(model)

    class Failing(nn.Linear):
        def forward(self, x):
            if x.shape[1] > 1:
                raise ValueError("one token at a time")
            return super().forward(x)

    model.lm_head.__class__ = Failing
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bad, _ = meter.measure(model), meter.measure(model)
    assert sorted(str(warning.message) for warning in caught) == [
        f"the {name} of the model could not be measured: ValueError: one token at a time."
        for name in ("prediction", "readout")
    ]
    assert bad.orders == good.orders and bad.views == {name: good.views[name] for name in ("late", "last")}
    assert {bad.settings[name]["why"] for name in VIEWS} == {"ValueError: one token at a time"}
    model.lm_head.__class__ = nn.Linear
    assert numbers(meter.measure(model)) == numbers(good)


def test_a_trunk_that_runs_twice():
    model = louder(llama)()
    twice = ib.Meter(
        PROBE,
        orders="token",
        layers=["lm_head"],
        forward=lambda m, ids, mask: m(ids, attention_mask=mask) if m.model(ids) else None,
    )
    with pytest.warns(RuntimeWarning, match="the readout of the model could not be measured: the trunk ran 2 times"):
        measured = twice.measure(model)
    assert list(measured.views) == ["late", "last", "prediction"]


# --- probes


def test_a_probe_of_one_token():
    model = louder(llama)()
    probe = ib.Probe.from_tokens(torch.full((4, 16), 7))
    meter = ib.Meter(probe, orders="token")
    assert "; no readout: the probe has one token only" in meter.preflight(model).describe()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the hidden states of")
        measured = meter.measure(model)
    assert measured.settings["readout"] == {"why": "the probe has one token only"}
    assert measured["prediction/token"].complexity == measured["prediction/token"].expressivity == 0
    assert measured.settings["prediction"] == {"positions": 60, "groups": 2}


@pytest.mark.parametrize("highest", [4, 8])
def test_probes_of_few_tokens(highest):
    model = louder(llama)()
    probe = make_probe(highest=highest)
    measured = ib.measure(model, probe, orders="token")
    tokens = highest - 2
    assert measured.settings["readout"]["tokens"] == tokens
    assert measured.settings["prediction"]["groups"] == tokens + 1
    assert found(measured) == pytest.approx(expected(model, probe), abs=1e-6)


# --- settings


@pytest.mark.parametrize(
    ("options", "views"),
    [
        ({}, ["readout", "prediction"]),
        ({"loss": False}, ["readout"]),
        ({"loss": False, "prediction": True}, ["readout", "prediction"]),
        ({"loss": "all", "prediction": False}, ["readout"]),
        ({"readout": False}, ["prediction"]),
        ({"readout": False, "prediction": False}, []),
        ({"readout": False, "loss": False}, []),
        ({"center": True, "draws": 2, "last_block": True, "companions": "rankme"}, ["readout", "prediction"]),
        ({"num_bins": 12, "temperature": 1.0}, ["readout", "prediction"]),
        ({"null": False, "baseline": False}, ["readout", "prediction"]),
        ({"standard_errors": 3}, ["readout", "prediction"]),
    ],
    ids=str,
)
def test_what_is_wanted_is_measured_and_nothing_else_changes_it(options, views):
    model = louder(llama)()
    calls = []
    model.register_forward_hook(lambda module, inputs, output: calls.append(output.logits.shape))
    meter = ib.Meter(PROBE, orders="token", batch_size=5, **options)
    measured = meter.measure(model)
    calls.clear()
    assert numbers(meter.measure(model)) == numbers(measured)
    assert len(calls) == (4 if options.get("center") else options.get("standard_errors", 2))
    assert {name for name in measured.views if name in VIEWS} == set(views)
    assert {name for name in measured.settings if name in VIEWS} == set(views)
    assert ("loss" in measured.settings) == (options.get("loss") is not False)
    assert found(measured) == pytest.approx(
        {name: value for name, value in expected(model).items() if name.partition("/")[0] in views}, abs=1e-6
    )
    known = metric_names(meter.orders, primary="token", views=meter.view_names, without=meter.unmeasured)
    assert {name for name in measured.scalars() if name.startswith(VIEWS)} >= {n for n in known if n.startswith(VIEWS)}
    assert not settings_differences(measured, ib.measure(model, PROBE, **{"orders": "token"} | {
        name: value for name, value in options.items() if name in ("num_bins", "temperature", "draws", "center")
    }))  # fmt: skip
    plain = ib.measure(model, PROBE, **{"orders": "token", "readout": False, "prediction": False} | {
        name: value for name, value in options.items() if name not in VIEWS
    }, batch_size=5)  # fmt: skip
    assert plain.orders == measured.orders and plain.loss == measured.loss
    assert {name: measured.views[name] for name in plain.views} == plain.views


def test_several_passes():
    model = louder(llama)()
    whole = ib.Meter(PROBE, orders="token", batch_size=5)
    budget = whole.plan().memory(1, 100) * 3 // 2
    in_groups = ib.Meter(PROBE, orders="token", batch_size=5, memory_budget=budget)
    assert in_groups.preflight(model).passes == 3
    first, second = in_groups.measure(model), whole.measure(model)
    assert first.readout == second.readout and first.prediction == second.prediction
    assert first.settings == second.settings


def test_a_pass_without_memory_leaves_nothing_behind_for_the_next_one():
    model = louder(llama)()
    states: list[Any] = []

    def fails(module: Any, inputs: Any) -> None:
        if len(states) == 5:  # in the second batch of the pass, after that of the mean states
            raise torch.OutOfMemoryError("out of memory")

    meter = ib.Meter(PROBE, orders="token", batch_size=4, center=True)
    meter.preflight(model)
    alive: list[bool] = []
    model.model.register_forward_pre_hook(lambda *_: alive.append(any(each() is not None for each in states)))
    model.model.norm.register_forward_hook(lambda *args: states.append(weakref.ref(args[2])))
    model.lm_head.register_forward_pre_hook(fails)
    with pytest.warns(RuntimeWarning, match="out of memory while measuring"):
        meter.measure(model)
    assert len(alive) > 5 and not any(alive)


@pytest.mark.parametrize("where", ["forward", "head", "readout"])
def test_out_of_memory_means_smaller_batches(where, monkeypatch):
    model = louder(llama)()
    small = ib.measure(model, PROBE, orders="token", batch_size=2)
    meter = ib.Meter(PROBE, orders="token", batch_size=8)
    meter.preflight(model)

    def fails(module: Any, inputs: Any, output: Any = None) -> None:
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("out of memory")

    if where == "forward":
        model.model.layers[2].register_forward_hook(fails)
    elif where == "head":
        reduce = loss_module._Reduced.__init__

        def init(self: Any, targets: torch.Tensor, *rest: Any) -> None:
            if len(targets) > 32:
                raise torch.OutOfMemoryError("out of memory")
            reduce(self, targets, *rest)

        monkeypatch.setattr(loss_module._Reduced, "__init__", init)
    else:
        add = codebook.Readout._add

        def less(self: Any, batch: Any, rows: torch.Tensor) -> None:
            if len(rows) > 32:
                raise torch.OutOfMemoryError("out of memory")
            add(self, batch, rows)

        monkeypatch.setattr(codebook.Readout, "_add", less)
    with pytest.warns(RuntimeWarning, match=r"out of memory while measuring\. Trying again with batch_size="):
        measured = meter.measure(model)
    assert meter.batch_size == 2
    assert measured.readout == small.readout and measured.prediction == small.prediction


def test_with_feature_probes():
    model = louder(llama)()
    tags = {"parity": torch.where(PROBE.attention_mask, PROBE.input_ids % 2, -1)}
    other = ib.Probe.from_tokens(
        PROBE.input_ids.flip(0), PROBE.attention_mask.flip(0), labels={"side": tags["parity"].flip(0)}
    )
    probe = ib.Probe.from_tokens(PROBE.input_ids, PROBE.attention_mask, labels=tags)
    measured = ib.measure(model, probe, orders="token", feature_probes=other)
    assert list(measured.features) == ["parity", "side"]
    assert found(measured) == found(ib.measure(model, PROBE, orders="token"))


@pytest.mark.parametrize("num_bins", [12, 100])
def test_with_the_curve_as_bound(num_bins):
    """It is that of the probe's own words in as many codewords as there are bins: of all positions."""
    model = louder(llama)()
    measured = ib.measure(model, PROBE, orders=["token", "bigram"], bound="ib_curve", num_bins=num_bins)
    curve = ib.probe_curve(PROBE, order="token", orders=["token", "bigram"], num_codewords=num_bins)
    assert measured["token"].bound_ratio is not None
    for view in VIEWS:
        point = measured[f"{view}/token"]
        bins = measured.settings[view]["tokens" if view == "readout" else "groups"]
        assert bins == (36 if view == "readout" else 37)
        if num_bins < bins:
            assert (point.distance_to_bound, point.bound_ratio) == (None, None)
        else:
            most = curve.to_efficiency(bins).bound(point.complexity)
            assert point.distance_to_bound == pytest.approx(most - point.expressivity)
            assert point.bound_ratio == pytest.approx(point.expressivity / most)
        assert measured[f"{view}/bigram"].distance_to_bound is None


def test_with_the_curve_as_bound_a_sample_of_the_positions_has_none(monkeypatch):
    monkeypatch.setattr(thinning, "POSITIONS", 40)
    measured = ib.measure(louder(llama)(), PROBE, orders="token", bound="ib_curve")
    assert measured["prediction/token"].bound_ratio is None and measured["readout/token"].bound_ratio is not None
    assert measured["prediction/token"].distance_to_bound is None


def test_uniform_weights_and_linear_shifts():
    model = louder(llama)()
    uniform = ib.measure(model, PROBE, orders="token", weighting="uniform")
    assert found(uniform) == pytest.approx(expected(model, weighting="uniform"), abs=1e-6)
    assert {uniform[f"{view}/token"].complexity_null for view in VIEWS} == {None}
    probe = make_probe(length=70)
    model.config.max_position_embeddings = 80
    measured = ib.measure(model, probe, orders="token", baseline="linear", baseline_offset=17)
    for view in VIEWS:
        point = measured[f"{view}/token"]
        assert point.num_positions_local == sum(int(n) - 1 - 17 for n in probe.attention_mask.sum(1))
        assert point.complexity_local == pytest.approx(point.complexity_local_by_layer[0]) != 0


# --- measurements and runs


def test_files_and_differences_and_names():
    meter = ib.Meter(PROBE, orders=["token", "bigram"], standard_errors=5)
    a, b = (meter.measure(make()) for make in (louder(llama), louder(llama, 3.0)))
    assert ib.Measurement.from_dict(json.loads(json.dumps(a.to_dict()))) == a
    for view in VIEWS:
        point = a[f"{view}/bigram"]
        assert a.metrics()[f"ib/{view}/bigram/expressivity"] == point.expressivity
        assert a.metrics()[f"ib/{view}/optimality"] == a[f"{view}/token"].optimality
        assert a.metrics()[f"ib/{view}/bigram/expressivity_se"] == point.expressivity_se > 0
        for keywords in (
            {"metric": "expressivity", "order": f"{view}/token"},
            {"metric": f"{view}/token/expressivity"},
        ):
            difference = ib.difference(a, b, **keywords)
            assert difference.paired
            assert difference.value == a[f"{view}/token"].expressivity - b[f"{view}/token"].expressivity
        assert ib.difference(a, a, f"{view}/expressivity").standard_error == 0
    assert dataclasses.asdict(a)["views"]["readout"]["token"]["complexity"] == a.readout["token"].complexity
    with pytest.raises(ValueError, match=r"'readout/token' was not measured\. Measured orders: token, bigram"):
        ib.difference(a, ib.measure(bare_gpt2(), PROBE, standard_errors=5), "readout/token/expressivity")
