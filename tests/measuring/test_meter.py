"""The meter's settings, its checks before training, its failures, and that it leaves no trace."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_models import WRAPPERS, llama, make_probe, numbers
from torch import nn

import ib_callback as ib
from ib_callback.measuring.model import access
from ib_callback.measuring.team import Team

# --- settings


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"num_bins": 1}, ValueError, "num_bins: expected an integer of at least 2, got 1"),
        ({"num_bins": 10.0}, TypeError, "num_bins: expected an integer of at least 2, got 10.0"),
        ({"orders": ("token", "pentagram")}, ValueError, "unknown order 'pentagram'"),
        ({"orders": ()}, ValueError, "at least one order"),
        (
            {"primary": "trigram", "orders": ("token",)},
            ValueError,
            r"primary: expected one of the measured orders \(token\)",
        ),
        ({"features": ["language"]}, ValueError, "the probe has no label 'language'; it has 'topic'"),
        ({"weighting": "inverse"}, ValueError, 'weighting: expected "empirical" or "uniform", got \'inverse\''),
        ({"bound": "straight"}, ValueError, "bound: expected one of 'diagonal'"),
        ({"temperature": 0}, ValueError, "temperature: expected a finite number above 0"),
        ({"temperature": "hot"}, ValueError, 'above 0 or "calibrated", got .hot'),
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer of at least 1"),
        ({"memory_budget": 0}, ValueError, "memory_budget: expected an integer of at least 1"),
        ({"seed": -1}, ValueError, "seed: expected an integer of at least 0"),
        ({"forward": 3}, TypeError, "forward: expected callable"),
        ({"orders": 4}, TypeError, "orders: expected names such as"),
        ({"layers": 3}, ValueError, 'layers: expected "hidden_states", "blocks", at least one module name'),
        ({"layers": [0, 1]}, ValueError, "layers: expected"),
        ({"seed": 2**32}, ValueError, r"seed: expected less than 2\*\*32"),
    ],
)
def test_bad_settings(keywords, error, message):
    probe = make_probe(labels={"topic": torch.zeros(10, 16, dtype=torch.long)})
    with pytest.raises(error, match=message):
        ib.Meter(probe, **keywords)


def test_probe_of_another_type():
    with pytest.raises(TypeError, match=r"probe: expected an ib_callback\.Probe, got list"):
        ib.Meter(["some text"])


def test_feature_with_the_name_of_an_order():
    probe = make_probe(labels={"token": torch.zeros(10, 16, dtype=torch.long)})
    with pytest.raises(ValueError, match="label 'token' has the name of an n-gram order"):
        ib.Meter(probe)


@pytest.mark.parametrize(("orders", "keywords"), [(21, {}), (32, {"baseline": False}), (31, {"features": ["a"]})])
def test_more_label_sets_than_there_can_be_are_refused_at_once(orders, keywords):
    probe = make_probe(labels={"a": torch.zeros(10, 16, dtype=torch.int64)})
    names = ["token", "bigram", "trigram", "quadgram", *(f"{n}-gram" for n in range(5, orders + 1))]
    settings = {"features": [], "baseline": "features" not in keywords} | keywords
    with pytest.raises(ValueError, match=r"expected at most 62 label sets, .*Measure fewer"):
        ib.Meter(probe, orders=names, **settings)


def test_settings_hold_what_decides_comparability():
    probe = make_probe()
    settings = ib.Meter(probe, orders=("bigram", "token"), seed=3).settings(llama())
    assert settings["probe"] == probe.fingerprint
    assert settings["K"] == 2
    assert settings["primary"] == "token"
    assert settings["layers"] == ["model.layers.0", "model.layers.1:final"]
    assert settings["dtype"] == "float32"
    assert settings["seed"] == 3


# --- preflight


@pytest.mark.parametrize("check", ["preflight", "measure"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 30}, r"token id 39 is outside the model's vocabulary of 30.*own tokenizer"),
        (
            {"max_position_embeddings": 12},
            r"sequences are 16 tokens long, but the model takes at most 12.*max_length=12",
        ),
    ],
)
def test_probe_that_does_not_fit_the_model(check, changes, message):
    with pytest.raises(ib.ModelError, match=message):
        getattr(ib.Meter(make_probe()), check)(llama(**changes))


def test_preflight_reports_and_runs_one_forward_and_one_each_for_the_cross_check_and_the_loss():
    model = llama()
    calls = []
    handle = model.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape))
    report = ib.Meter(make_probe(), batch_size=4).preflight(model)
    handle.remove()
    assert calls == [(1, 16), (1, 16), (2, 16)]
    assert report.num_sequences == 10
    assert report.passes == 1
    assert "2 layers (model.layers.0 … model.layers.1:final), 10 sequences" in report.describe()


def test_preflight_meets_states_that_cannot_be_quantised():
    model = llama()
    nn.init.constant_(model.model.layers[1].mlp.down_proj.weight, float("nan"))
    with pytest.raises(ib.RepresentationError, match=r"'model\.layers\.1:final' \(9\)"):
        ib.Meter(make_probe()).preflight(model)


def test_preflight_warns_when_memory_is_short(monkeypatch):
    monkeypatch.setattr("ib_callback.measuring.meter.free_memory", lambda device: 1)
    with pytest.warns(RuntimeWarning, match="are free. Set memory_budget="):
        ib.Meter(make_probe()).preflight(llama())


def test_states_that_wait_on_a_gpu_count_there(monkeypatch):
    """With a budget, and once memory has run out, they wait on the host."""
    meter, model = ib.Meter(make_probe()), llama()
    readout = meter._readout(model, meter.plan(), Team.alone(), 2)
    waiting = readout.waiting()
    monkeypatch.setattr(access, "device_of", lambda model: torch.device("cuda"))

    def needed(meter):
        return meter._need(meter.plan(), model, readout, 1, 1)

    there, host = needed(meter), needed(ib.Meter(make_probe(), memory_budget="1GiB"))
    assert there.beside == host.beside + waiting
    meter._short = True
    assert needed(meter) == host
    assert waiting > 0


def test_memory_budget_below_one_layer():
    with pytest.raises(ib.ProbeError, match=r"memory_budget: .* one layer needs [\d,]+ bytes.*got 10"):
        ib.Meter(make_probe(), memory_budget=10).preflight(llama())


# --- forward


def test_a_used_meter_can_be_pickled():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = tf.BertForMaskedLM(tf.BertConfig(vocab_size=40, **sizes)).eval()
    meter = ib.Meter(make_probe())
    first = meter.measure(model)
    assert numbers(pickle.loads(pickle.dumps(meter)).measure(model)) == numbers(first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(dtype):
    model = llama().eval()
    expected = numbers(ib.measure(model, make_probe(), batch_size=2))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        assert numbers(ib.measure(model, make_probe(), batch_size=2)) == expected
    finally:
        torch.set_default_dtype(before)


def test_autocast_is_among_the_settings():
    model = llama().eval()
    meter = ib.Meter(make_probe())
    assert meter.measure(model).settings["dtype"] == "float32"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert meter.measure(model).settings["dtype"] == "float32, autocast bfloat16"


def test_a_probe_that_was_edited_in_place():
    probe = make_probe()
    meter = ib.Meter(probe)
    meter.measure(llama())
    probe.input_ids[0, 0] = 3
    with pytest.raises(ib.ProbeError, match="was changed in place"):
        meter.measure(llama())


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (None, TypeError, r"model: expected a torch\.nn\.Module, got NoneType"),
        (nn.Linear(2, 2, device="meta"), ib.ModelError, "Linear has parameters on the meta device"),
    ],
)
def test_what_is_no_model(model, error, message):
    with pytest.raises(error, match=message):
        ib.measure(model, make_probe())


def test_any_module_with_named_layers_and_forward():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(40, 8)
            self.mix = nn.Linear(8, 8)

        def forward(self, batch):
            return self.mix(self.embed(batch["tokens"]))

    torch.manual_seed(0)
    meter = ib.Meter(make_probe(), layers=["mix"], forward=lambda model, ids, mask: model({"tokens": ids}))
    measured = meter.measure(Tiny())
    # Each state is a function of its own token alone: knowing the token leaves one assignment.
    assert measured["token"].complexity == pytest.approx(measured.ceiling, abs=1e-6)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("layers", ["hidden_states", ("model.layers.*", "model.norm")], ids=["found", "named"])
def test_wrapped_models_measure_like_the_inside(wrap, layers, alone):
    """Under the same names too."""
    expected = numbers(ib.measure(llama().eval(), make_probe(), layers=layers))
    assert numbers(ib.measure(wrap(llama().eval()), make_probe(), layers=layers)) == expected


def test_hooks_fire_in_a_model_compiled_and_warmed_in_place():
    model = llama().eval()
    expected = numbers(ib.measure(model, make_probe()))
    model.compile(backend="eager")
    model(torch.ones(1, 4, dtype=torch.long))
    assert numbers(ib.measure(model, make_probe())) == expected


# --- failures


def test_out_of_memory_is_retried_with_half_the_batch():
    sizes = []

    def forward(model, ids, mask):
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return model(ids, attention_mask=mask)

    model = llama()
    meter = ib.Meter(make_probe(), batch_size=8, forward=forward)
    with pytest.warns(RuntimeWarning, match="Trying again with batch_size="):
        measured = meter.measure(model)
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    in_twos = ib.Meter(make_probe(), batch_size=2, forward=lambda m, ids, mask: m(ids, attention_mask=mask))
    assert numbers(measured) == numbers(in_twos.measure(model))
    sizes.clear()
    meter.measure(model)
    assert sizes == [2] * 5


def test_out_of_memory_with_one_sequence_is_raised():
    def forward(model, ids, mask):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    with pytest.warns(RuntimeWarning, match="batch_size=1"), pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        ib.Meter(make_probe(), batch_size=2, forward=forward).measure(llama())


def test_other_errors_of_the_forward_are_not_retried():
    calls = []

    def forward(model, ids, mask):
        calls.append(1)
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        ib.Meter(make_probe(), forward=forward).measure(llama())
    assert len(calls) == 1


# --- no trace


def trace_of(model):
    return {
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "training": [m.training for m in model.modules()],
        "grad": torch.is_grad_enabled(),
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "rng": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "config": copy.deepcopy(model.config.to_dict()),
    }


def assert_untouched(before, after):
    for name in ("buffers", "parameters", "gradients"):
        assert before[name].keys() == after[name].keys()
        for key, value in before[name].items():
            assert (value is None and after[name][key] is None) or torch.equal(value, after[name][key])
    for name in ("hooks", "training", "grad", "rng", "config"):
        assert before[name] == after[name], name


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_measurement_leaves_no_trace(failing, grad):
    model = llama()
    model.train()
    model.model.layers[0].eval()  # a part that the user froze
    model.gradient_checkpointing_enable()
    model(torch.ones(2, 5, dtype=torch.long), labels=torch.ones(2, 5, dtype=torch.long)).loss.backward()

    def forward(m, ids, mask):
        output = m(ids, attention_mask=mask)
        torch.rand(1), np.random.rand(), random.random()
        if failing:
            raise KeyError("boom")
        return output

    meter = ib.Meter(make_probe(), forward=forward)
    with torch.set_grad_enabled(grad):
        before = trace_of(model)
        if failing:
            with pytest.raises(KeyError, match="boom"):
                meter.measure(model)
        else:
            meter.measure(model)
        assert_untouched(before, trace_of(model))


def test_dynamic_rope_is_not_reset():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = llama(rope_parameters=rope).eval()
    model(torch.ones(1, 40, dtype=torch.long))  # longer than max_position_embeddings: frequencies grow
    ids = torch.randint(2, 40, (1, 30))
    expected = model(ids).logits
    before = {name: b.clone() for name, b in model.named_buffers()}
    ib.measure(model, make_probe())
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert torch.equal(model(ids).logits, expected)


def test_outputs_of_dropout_are_not_measured():
    model = llama(attention_dropout=0.9).train()
    assert numbers(ib.measure(model, make_probe())) == numbers(ib.measure(model, make_probe()))


# --- standard errors


def test_standard_errors_leave_the_numbers_and_the_settings_as_they_are():
    model, probe = llama(), make_probe(16)
    plain = ib.Meter(probe, batch_size=2, orders=("token", "bigram"))
    errors = ib.Meter(probe, batch_size=2, orders=("token", "bigram"), standard_errors=4)
    a, b = plain.measure(model, step=3), errors.measure(model, step=3)
    assert a.settings == b.settings
    assert {**b.metrics(), **a.metrics(), "ib/seconds": 0} == {**b.metrics(), "ib/seconds": 0}
    added = set(b.metrics()) - set(a.metrics())
    assert {"ib/token/complexity_se", "ib/token/optimality_se", "ib/bigram/distance_above_null_se"} <= added
    assert all(name.endswith("_se") for name in added)
    assert numbers(errors.measure(model, step=3)) == numbers(b)
    tight = ib.Meter(
        probe, batch_size=2, orders=("token", "bigram"), standard_errors=4, memory_budget=errors.plan().memory(1, 100)
    )
    assert tight.preflight(model).passes == 2
    for order, point in tight.measure(model).orders.items():
        assert point.optimality_se == pytest.approx(b[order].optimality_se, rel=1e-6)
    difference = ib.difference(b, b)
    assert (difference.value, difference.standard_error, difference.significant) == (0.0, 0.0, False)
    assert difference.paired
