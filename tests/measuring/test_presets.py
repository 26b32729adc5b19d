"""Presets: the published definition, written out from the paper's equations; and how a preset is asked for."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import brute_force
import numpy as np
import pytest
import torch
from tiny_models import llama, make_probe, numbers
from torch import nn

import ib_callback as ib
from ib_callback.measuring import presets
from ib_callback.results.measurement import settings_differences
from ib_callback.results.metrics import metric_names

WIDTHS = {"token": 1, "bigram": 2, "trigram": 3, "quadgram": 4}
# The calls spelt out, by the paper.
SPELT_OUT = {
    "num_bins": 100, "temperature": 1.0, "weighting": "uniform", "bound": "diagonal", "draws": 1, "null": False,
    "baseline": False, "center": False, "loss": False, "readout": False,
}  # fmt: skip
TEMPERATURES = {"paper": 1.0, "paper-calibrated": "calibrated"}


def padded(side: str, **keywords: Any) -> ib.Probe:
    """Of few tokens, so that even quadgrams repeat, with sequences of 13 to 16; padding holds ordinary tokens."""
    probe = make_probe(num_sequences=12, highest=6, **keywords)
    return probe if side == "right" else ib.Probe.from_tokens(probe.input_ids.flip(1), probe.attention_mask.flip(1))


# --- the paper's equations


def efficiency(histogram: np.ndarray) -> float:
    """H / log n of a distribution over n points (Entropy Estimation)."""
    return -math.fsum(p * math.log(p) for p in histogram) / math.log(len(histogram))


def mean(rows: list[np.ndarray]) -> np.ndarray:
    total = np.zeros_like(rows[0])
    for row in rows:
        total = total + row
    return total / len(rows)


Published = tuple[list[float], dict[tuple[str, str], list[float]], int]


def published(model: nn.Module, probe: ib.Probe, temperature: float | str) -> Published:
    """H(Z) of each layer, I(X;Z) and I(Y;Z) of each at each degree of back-off, and the number of positions."""
    ids, mask = probe.input_ids.numpy(), probe.attention_mask.numpy()
    with torch.no_grad():
        output = model(input_ids=probe.input_ids, attention_mask=probe.attention_mask.long(), output_hidden_states=True)
    layers = [states.double().numpy() for states in output.hidden_states[1:]]
    dim = layers[0].shape[-1]
    points = ib.reference_points(dim, 100).double().numpy()
    scale = brute_force.calibrated_temperature(dim, 100) if temperature == "calibrated" else temperature
    entropies: list[float] = []
    information: dict[tuple[str, str], list[float]] = {(o, side): [] for o in WIDTHS for side in "XY"}
    for states in layers:
        everywhere: list[np.ndarray] = []
        given: dict[tuple[str, str], dict[tuple[int, ...], list[np.ndarray]]] = {key: {} for key in information}
        for b in range(len(ids)):
            for s in range(3, ids.shape[1] - 4):
                if not mask[b, s - 3 : s + 5].all():  # four real tokens up to the position, and four behind it
                    continue
                z = states[b, s] / math.sqrt(math.fsum(states[b, s] ** 2))
                weights = np.exp(points @ z / scale)
                assignment = weights / math.fsum(weights)
                everywhere.append(assignment)
                for order, width in WIDTHS.items():
                    for side, label in (("X", ids[b, s - width + 1 : s + 1]), ("Y", ids[b, s + 1 : s + 1 + width])):
                        given[order, side].setdefault(tuple(label.tolist()), []).append(assignment)
        entropies.append(efficiency(mean(everywhere)))
        for key, histograms in given.items():
            # I(X;Z) = 1/|X| Σ_x H(Z) - H(Z | X = x)
            terms = [entropies[-1] - efficiency(mean(rows)) for rows in histograms.values()]
            information[key].append(math.fsum(terms) / len(terms))
    return entropies, information, len(everywhere)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dim", [16, 2048])
@pytest.mark.parametrize("preset", TEMPERATURES)
def test_a_preset_is_what_the_papers_equations_say(preset: str, dim: int, side: str) -> None:
    model, probe = llama(hidden_size=dim).eval(), padded(side)
    measured = ib.measure(model, probe, preset=preset)
    entropies, information, positions = published(model, probe, TEMPERATURES[preset])
    assert measured.num_positions == positions == 12 * 9 - 18
    np.testing.assert_allclose(measured.entropy_by_layer, entropies, rtol=0, atol=1e-6)
    assert measured.entropy == pytest.approx(np.mean(entropies), abs=1e-6)
    error = {"rtol": 0.01, "atol": 1e-9} if preset == "paper" else {"rtol": 0, "atol": 1e-6}
    for order in WIDTHS:
        point, x, y = measured[order], information[order, "X"], information[order, "Y"]
        np.testing.assert_allclose(point.complexity_by_layer, x, **error)
        np.testing.assert_allclose(point.expressivity_by_layer, y, **error)
        np.testing.assert_allclose((point.complexity, point.expressivity), (np.mean(x), np.mean(y)), **error)
        assert point.optimality == point.expressivity / point.complexity
        assert point.distance_to_bound == point.complexity - point.expressivity
    assert measured.complexity == measured["token"].complexity, "token back-off is what is plotted"


# --- the calls spelt out


@pytest.mark.parametrize("preset", TEMPERATURES)
@pytest.mark.parametrize("free", [{}, {"orders": ("bigram", "token"), "seed": 4, "layers": "blocks", "batch_size": 5}])
def test_a_preset_is_the_settings_spelt_out_and_nothing_else(preset: str, free: dict[str, Any]) -> None:
    model, probe = llama(), padded("right")
    spelt_out = ib.measure(model, probe, **(SPELT_OUT | {"temperature": TEMPERATURES[preset]} | free))
    measured = ib.measure(model, probe, preset=preset, **free)
    assert numbers(measured) == numbers(spelt_out)
    assert measured.settings == spelt_out.settings
    other = {"paper": "paper-calibrated", "paper-calibrated": "paper"}[preset]
    (difference,) = settings_differences(measured, ib.measure(model, probe, preset=other, **free))
    assert difference.startswith("temperature: ")
    assert set(measured.views) == {"late", "last"}
    assert ib.Meter(probe, preset=preset, **free).preflight(model).passes == 1


def test_what_a_preset_leaves_out_is_known_before() -> None:
    """By every rule on a run: nothing that it may wait for is always undefined, and nothing is measured unasked."""
    labels = {"topic": torch.arange(12)[:, None].expand(12, 60) % 2}
    probe = make_probe(num_sequences=12, length=60, highest=6, labels=labels, num_bytes=3000)
    meter = ib.Meter(probe, preset="paper-calibrated", orders="token", feature_probes={"other": probe})
    scalars = meter.measure(llama(max_position_embeddings=64)).scalars()
    known = metric_names(meter.orders, meter.feature_names, views=meter.view_names, without=meter.unmeasured)
    assert {name for name, value in scalars.items() if value is not None} == {*known, "seconds"}
    assert not [name for name in known if name.endswith(("_null", "_local", "ceiling", "loss", "_value"))]


# --- keywords beside a preset


def other_value(name: str) -> Any:
    changed = {"num_bins": 64, "temperature": 0.5, "weighting": "empirical", "bound": "ib_curve", "draws": 2}
    return (changed | {"baseline_offset": 16}).get(name, True)


EACH = [(preset, name) for preset in TEMPERATURES for name in presets.PRESETS[preset]]


@pytest.mark.parametrize(("preset", "name"), EACH)
def test_a_keyword_that_contradicts_the_preset(preset: str, name: str) -> None:
    probe, value, other = padded("right"), presets.PRESETS[preset][name], other_value(name)
    expected = f"preset={preset!r}: expected {name}={value!r}, got {name}={other!r}. Leave this out, or leave preset"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        ib.Meter(probe, preset=preset, **{name: other})
    assert ib.Meter(probe, preset=preset, **{name: value}).preset == preset


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"preset": "papers"}, "preset: expected one of 'paper', 'paper-calibrated', or None, got 'papers'"),
        ({"preset": ["paper"]}, r"preset: expected one of .* got \['paper'\]"),
        (
            {"preset": "paper", "null": True, "loss": "all", "seed": 3},
            "expected null=False, loss=False, got null=True, loss='all'",
        ),
        ({"preset": "paper", "temperature": "calibrated"}, "Leave this out, or pass preset='paper-calibrated'"),
        ({"preset": "paper-calibrated", "temperature": 1}, "Leave this out, or pass preset='paper'"),
        ({"preset": "paper", "temperature": np.ones(2)}, "expected temperature=1.0, got temperature=array"),
        ({"preset": "paper", "temperature": True}, "temperature: expected a finite number"),
    ],
)
def test_presets_that_cannot_be(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ib.Meter(padded("right"), **keywords)


def settings(**keywords: Any) -> dict[str, Any]:
    return ib.Meter(padded("right"), **keywords).settings(llama())


@pytest.mark.parametrize(
    "keywords",
    [
        {"temperature": 1}, {"temperature": np.float32(1)}, {"num_bins": np.int64(100)}, {"baseline": None},
        {"null": 0}, {"standard_errors": None}, SPELT_OUT,
    ],
    ids=str,
)  # fmt: skip
def test_a_keyword_that_agrees_with_the_preset(keywords: dict[str, Any]) -> None:
    assert settings(preset="paper", **keywords) == settings(preset="paper")


def test_a_program_that_passes_every_keyword_passes_defaults_that_nobody_chose() -> None:
    every = {name: p.default for name, p in inspect.signature(ib.Meter).parameters.items() if name != "probe"}
    assert (every["weighting"], every["temperature"]) == ("empirical", "calibrated"), "a signature says what holds"
    assert settings(**every | {"preset": "paper"}) == settings(preset="paper")
    assert settings(**every | {"preset": "paper", "temperature": 1, "seed": 3}) == settings(preset="paper", seed=3)
    with pytest.raises(ValueError, match=r"expected temperature=1\.0, got temperature=0\.3"):
        settings(**every | {"preset": "paper", "temperature": 0.3})


# --- its probe


def test_another_size_is_said_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    probe, labelled = padded("right"), make_probe(labels={"topic": torch.zeros(10, 16, dtype=torch.long)})

    def said() -> list[str]:
        for _ in range(2):
            ib.measure(llama(), probe, preset="paper", feature_probes={"other": labelled}, orders="token")
        ib.measure(llama(), labelled, orders="token")
        return capfd.readouterr().err.splitlines()

    presets._tell_once.cache_clear()
    (line,) = said()
    assert line.startswith(
        "ib_callback: preset='paper': probe 'tokens' has 12 sequences of up to 16 tokens. The paper's probe has"
    )
    assert "10,000 of up to 512: Probe.from_c4(tokenizer, num_sequences=10_000, max_length=512)." in line
    assert said() == []
    presets._tell_once.cache_clear()
    with monkeypatch.context() as patch:  # on another rank
        patch.setattr("torch.distributed.is_initialized", lambda: True)
        patch.setattr("torch.distributed.get_rank", lambda: 1)
        presets.tell_of_size("paper", probe)
    monkeypatch.setattr(presets, "SEQUENCES", 12)
    monkeypatch.setattr(presets, "TOKENS", 16)
    assert said() == []
