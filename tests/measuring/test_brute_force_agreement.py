"""The package against its slow twin (`brute_force.py`) on hidden states captured without the package."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import brute_force as bf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ib_callback as ib

VOCAB = 50
LAYERS = 3
TOLERANCE = 1e-6

# --- models and probes


@functools.cache
def tiny_model(kind: str) -> Any:
    """A random model in eval mode; large initial weights make its states depend on more than one token."""
    import transformers as tf

    common = {"vocab_size": VOCAB, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 1}
    decoder = common | {
        "hidden_size": 40,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        # Id 0 is an ordinary token here; as the padding id its embedding would be zero.
        "pad_token_id": None,
    }
    torch.manual_seed(hash_of(kind))
    model: Any
    if kind == "gpt2":
        model = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64, **common))
    elif kind == "llama":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(num_key_value_heads=2, **decoder))
    elif kind == "olmo2":
        model = tf.Olmo2ForCausalLM(tf.Olmo2Config(**decoder))
    elif kind == "bert":
        model = tf.BertModel(tf.BertConfig(**decoder))
    else:
        model = tf.BertForMaskedLM(tf.BertConfig(**decoder))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms as a trained model has them: no two directions weigh alike
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def hash_of(text: str) -> int:
    """A seed that differs between texts and not between runs."""
    return sum(ord(character) * (i + 1) for i, character in enumerate(text))


@functools.cache
def tokens(side: str, num_sequences: int = 14) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of ragged sequences, the last two too short for any valid position.

    Sequences are chains of a few stock phrases, so that even quadgrams come back in other sequences. Padding
    holds ordinary token ids.
    """
    generator = np.random.default_rng(3)
    phrases = [generator.integers(0, VOCAB, size=length).tolist() for length in (3, 4, 5, 5, 6, 7)]
    width = 36
    ids = generator.integers(0, VOCAB, size=(num_sequences, width))
    mask = np.zeros((num_sequences, width), dtype=bool)
    for b in range(num_sequences):
        length = 6 if b >= num_sequences - 2 else int(generator.integers(22, width + 1))
        chain: list[int] = generator.integers(0, VOCAB, size=3).tolist()
        while len(chain) < length:
            noise = generator.integers(0, VOCAB, size=generator.integers(0, 3)).tolist()
            chain += phrases[generator.integers(len(phrases))] + noise
        real = slice(0, length) if side == "right" else slice(width - length, width)
        ids[b, real] = chain[:length]
        mask[b, real] = True
    return ids, mask


def probe_of(ids: np.ndarray, mask: np.ndarray, features: dict[str, np.ndarray] | None = None) -> ib.Probe:
    labels = {name: torch.from_numpy(values) for name, values in (features or {}).items()}
    return ib.Probe.from_tokens(torch.from_numpy(ids), torch.from_numpy(mask), labels=labels or None)


@functools.cache
def hidden_states(kind: str, side: str) -> list[np.ndarray]:
    """Of a copy, since `output_hidden_states` leaves hooks behind; one forward of the whole probe."""
    ids, mask = tokens(side)
    model = copy.deepcopy(tiny_model(kind))
    with torch.no_grad():
        output = model(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask).long(),
            output_hidden_states=True,
        )
    assert len(output.hidden_states) == LAYERS + 1
    return [states.double().numpy() for states in output.hidden_states[1:]]


# --- comparison


def close(actual: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.asarray(actual, dtype=np.float64), expected, rtol=0, atol=tolerance)


def assert_agrees(measured: ib.Measurement, table: bf.Table, primary: str, tolerance: float = TOLERANCE) -> None:
    """Every number but the nulls. The quotient `optimality` inherits its terms' errors, magnified."""
    assert measured.error is None
    assert measured.num_positions == len(table.positions)
    assert set(measured.orders) == set(table.orders)
    close(measured.entropy, table.entropy, tolerance)
    close(measured.entropy_by_layer, table.entropy_by_layer, tolerance)
    for name, plane in table.orders.items():
        point = measured[name]
        close(point.complexity_by_layer, plane.complexity_by_layer, tolerance)
        close(point.expressivity_by_layer, plane.expressivity_by_layer, tolerance)
        close(point.complexity, plane.complexity, tolerance)
        close(point.expressivity, plane.expressivity, tolerance)
        close(point.distance_to_bound, plane.complexity - plane.expressivity, 2 * tolerance)
        magnified = 3 * tolerance / abs(plane.complexity)
        close(point.optimality, plane.expressivity / plane.complexity, magnified)
    for attribute in ("complexity", "expressivity", "optimality", "distance_to_bound"):
        assert getattr(measured, attribute) == getattr(measured[primary], attribute)


def assert_null_agrees(
    stated: float, standard_error: float, layers: Sequence[np.ndarray], labels: Sequence[Any]
) -> None:
    reference = bf.permutation_null(layers, labels)
    assert 0 <= standard_error <= 0.002
    allowed = 4 * math.hypot(standard_error, reference.standard_error) + TOLERANCE
    assert abs(stated - reference.mean) <= allowed, (stated, reference, standard_error)


# --- models, both paddings


@pytest.mark.parametrize("side", ["left", "right"])
def test_probe_has_quadgrams_that_span_batches(side: str) -> None:
    """What the tests below rest on: repeats within and across batches of 5, and unused sequences."""
    ids, mask = tokens(side)
    positions = bf.valid_positions(mask, 4)
    assert {b for b, _ in positions} == set(range(12))
    for label_of in (bf.input_label, bf.output_label):
        batches: dict[tuple[int, ...], list[int]] = {}
        for position in positions:
            batches.setdefault(label_of(ids, position, 4), []).append(position[0] // 5)
        assert sum(len(set(where)) > 1 for where in batches.values()) >= 10
        assert sum(len(where) > 1 and len(set(where)) == 1 for where in batches.values()) >= 1
        assert sum(len(where) == 1 for where in batches.values()) >= 10


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "olmo2", "bert", "bert_mlm"])
def test_all_orders_agree(kind: str, side: str) -> None:
    ids, mask = tokens(side)
    measured = ib.Meter(probe_of(ids, mask), batch_size=5, null=False).measure(tiny_model(kind), step=7)
    table = bf.evaluate(hidden_states(kind, side), ids, mask)
    assert measured.step == 7
    assert_agrees(measured, table, primary="token")
    close(measured.ceiling, table.ceiling)


@pytest.mark.parametrize("kind", ["gpt2", "olmo2"])
def test_nulls_agree(kind: str) -> None:
    ids, mask = tokens("left")
    measured = ib.Meter(probe_of(ids, mask), batch_size=5, num_bins=60).measure(tiny_model(kind))
    table = bf.evaluate(hidden_states(kind, "left"), ids, mask, num_bins=60)
    assert_agrees(measured, table, primary="token")
    for name, plane in table.orders.items():
        point = measured[name]
        assert_null_agrees(point.complexity_null, point.complexity_null_se, table.layers, plane.inputs)
        assert_null_agrees(point.expressivity_null, point.expressivity_null_se, table.layers, plane.outputs)
        complexity_above = plane.complexity - point.complexity_null
        expressivity_above = plane.expressivity - point.expressivity_null
        close(point.complexity_above_null, complexity_above)
        close(point.expressivity_above_null, expressivity_above)
        close(point.distance_above_null, complexity_above - expressivity_above, 2 * TOLERANCE)
        if complexity_above < 3 * point.complexity_null_se:
            assert point.optimality_above_null is None
        else:
            expected = expressivity_above / complexity_above
            assert point.optimality_above_null == pytest.approx(expected, abs=1e-5 / complexity_above)


def test_nulls_of_a_small_sample_match_enumeration() -> None:
    """Seven positions: every one of the 5040 permutations, against the stated error alone."""
    generator = np.random.default_rng(8)
    ids = generator.integers(0, 3, size=(2, 5))
    mask = np.ones((2, 5), dtype=bool)
    mask[1, 4] = False
    states = generator.normal(size=(2, 5, 6))
    model = Emitter(ids, mask, {"only": states})
    measured = ib.Meter(probe_of(ids, mask), orders=("token",), layers=["only"], num_bins=8, batch_size=1).measure(
        model
    )
    table = bf.evaluate([states.astype(np.float32)], ids, mask, orders=("token",), num_bins=8)
    assert len(table.positions) == 7
    point = measured["token"]
    for stated, error, labels in (
        (point.complexity_null, point.complexity_null_se, table.orders["token"].inputs),
        (point.expressivity_null, point.expressivity_null_se, table.orders["token"].outputs),
    ):
        assert error <= 0.002
        assert abs(stated - bf.enumerated_null(table.layers, labels).mean) <= 4 * error + TOLERANCE


def test_nulls_can_be_left_out() -> None:
    ids, mask = tokens("right")
    point = ib.Meter(probe_of(ids, mask), orders=("bigram",), null=False).measure(tiny_model("gpt2"))["bigram"]
    for name in ("complexity_null", "expressivity_null", "complexity_above_null", "expressivity_above_null"):
        assert getattr(point, name) is None
    assert point.optimality_above_null is None
    assert point.distance_above_null is None


@pytest.mark.parametrize(("kind", "side"), [("llama", "left"), ("bert_mlm", "right")])
def test_uniform_weighting_agrees_and_has_no_baselines(kind: str, side: str) -> None:
    ids, mask = tokens(side)
    measured = ib.Meter(probe_of(ids, mask), batch_size=5, weighting="uniform").measure(tiny_model(kind))
    table = bf.evaluate(hidden_states(kind, side), ids, mask, weighting="uniform")
    assert_agrees(measured, table, primary="token")
    assert measured.ceiling is None
    for point in measured.orders.values():
        assert point.complexity_null is None
        assert point.expressivity_null is None
        assert point.complexity_above_null is None
        assert point.expressivity_above_null is None
        assert point.optimality_above_null is None
        assert point.distance_above_null is None


# --- settings of a Meter


@pytest.mark.parametrize(
    "settings",
    [
        {"orders": ("bigram",)},
        {"orders": ("token", "trigram")},
        {"orders": ("token", "trigram"), "primary": "trigram"},
        {"orders": ("quadgram", "token")},
        {"orders": ("token", "5-gram"), "primary": "5-gram"},
        {"orders": ("7-gram",)},
        {"temperature": 1.0},
        {"temperature": 0.02},
        {"num_bins": 37, "seed": 11},
        {"num_bins": 2},
        {"num_bins": 513, "orders": ("token", "bigram")},
        {"seed": 4, "weighting": "uniform", "orders": ("trigram", "bigram")},
    ],
    ids=str,
)
def test_settings_agree(settings: dict[str, Any]) -> None:
    ids, mask = tokens("right")
    measured = ib.Meter(probe_of(ids, mask), batch_size=5, null=False, **settings).measure(tiny_model("llama"))
    reference = {key: value for key, value in settings.items() if key != "primary"}
    table = bf.evaluate(hidden_states("llama", "right"), ids, mask, **reference)
    orders = settings.get("orders", bf.ORDERS)
    primary = settings.get("primary", "token" if "token" in orders else orders[0])
    assert_agrees(measured, table, primary)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_any_batch_size_gives_the_same_numbers(batch_size: int) -> None:
    ids, mask = tokens("left")
    meter = ib.Meter(probe_of(ids, mask), batch_size=batch_size)
    measured = meter.measure(tiny_model("olmo2"))
    table = bf.evaluate(hidden_states("olmo2", "left"), ids, mask)
    assert_agrees(measured, table, primary="token")
    close(measured.ceiling, table.ceiling)
    for name, plane in table.orders.items():
        point = measured[name]
        assert_null_agrees(point.complexity_null, point.complexity_null_se, table.layers, plane.inputs)


def test_a_small_memory_budget_gives_the_same_numbers() -> None:
    ids, mask = tokens("right")
    probe, model = probe_of(ids, mask), tiny_model("gpt2")
    at_once = ib.Meter(probe, batch_size=3).preflight(model)
    assert at_once.passes == 1
    meter = ib.Meter(probe, batch_size=3, memory_budget=at_once.memory * 2 // 3)
    assert meter.preflight(model).passes == 2
    measured = meter.measure(model)
    table = bf.evaluate(hidden_states("gpt2", "right"), ids, mask)
    assert_agrees(measured, table, primary="token")
    close(measured.ceiling, table.ceiling)


def test_two_measurements_are_bitwise_equal() -> None:
    ids, mask = tokens("left")
    features = sequence_features(mask)
    settings: dict[str, Any] = {"batch_size": 5, "features": list(features)}

    def measure() -> dict[str, Any]:
        meter = ib.Meter(probe_of(ids, mask, features), **settings)
        first, second = (meter.measure(tiny_model("llama"), step=3).to_dict() for _ in range(2))
        for result in (first, second):
            assert result.pop("seconds") > 0
        assert first == second
        return first

    first = measure()
    # Neither the global generators nor an earlier meter may have a say.
    torch.manual_seed(99)
    np.random.seed(99)
    assert measure() == first


# --- features


def sequence_features(mask: np.ndarray) -> dict[str, np.ndarray]:
    """Labels that are constant within a sequence: a language for most sequences, preference in pairs."""
    num_sequences, width = mask.shape
    languages = [0, 1, 2, -1, 0, 1, 2, 0, -1, 1, 2, 0, 1, 2]
    preference = [1, 0] * 7
    assert len(languages) == len(preference) == num_sequences
    return {
        "language": np.repeat(np.array(languages)[:, None], width, axis=1),
        "preference": np.repeat(np.array(preference)[:, None], width, axis=1),
    }


@pytest.mark.parametrize(("kind", "side"), [("gpt2", "left"), ("llama", "right")])
def test_sequence_features_agree(kind: str, side: str) -> None:
    ids, mask = tokens(side)
    features = sequence_features(mask)
    # Half-labelled sequences: the label is still constant where it is given.
    features["half"] = np.where(np.arange(mask.shape[1]) % 2 == 0, features["language"], -1)
    orders = ("token", "bigram")
    meter = ib.Meter(probe_of(ids, mask, features), orders=orders, features=list(features), batch_size=5)
    measured = meter.measure(tiny_model(kind))
    table = bf.evaluate(hidden_states(kind, side), ids, mask, orders=orders, features=features)
    assert_agrees(measured, table, primary="token")
    assert set(measured.features) == set(features)
    for name, feature in table.features.items():
        point = measured.features[name]
        assert point.num_positions == len(feature.labels)
        close(point.information_by_layer, feature.information_by_layer)
        close(point.information, feature.information)
        assert point.ratio == pytest.approx(feature.information / table.orders["token"].complexity, abs=1e-5)
        null = bf.sequence_null(
            feature.layers, feature.sequences, feature.labels, paired=name == "preference", repeats=200
        )
        # At least 50 permutations were asked of the package.
        allowed = 4 * math.hypot(null.std / math.sqrt(50), null.standard_error)
        assert abs(point.information_null - null.mean) <= allowed, (name, point, null)
        assert 0.6 < point.information_null_std / null.std < 1.5, (name, point, null)


def test_sequence_features_are_permuted_by_whole_sequences() -> None:
    """States that differ between sequences: permuting positions would understate the null several times."""
    ids, mask = tokens("left")
    features = {"language": sequence_features(mask)["language"]}
    generator = np.random.default_rng(30)
    states = generator.normal(size=(len(ids), 1, 12)) + generator.normal(size=(*ids.shape, 12))
    measured = ib.Meter(probe_of(ids, mask, features), layers=["only"], batch_size=5).measure(
        Emitter(ids, mask, {"only": states})
    )
    hidden = [states.astype(np.float32).astype(np.float64)]
    feature = bf.evaluate(hidden, ids, mask, features=features).features["language"]
    null = bf.sequence_null(feature.layers, feature.sequences, feature.labels)
    naive = bf.permutation_null(feature.layers, feature.labels)
    assert null.mean > 3 * naive.mean
    point = measured.features["language"]
    close(point.information, feature.information)
    allowed = 4 * math.hypot(null.std / math.sqrt(50), null.standard_error)
    assert abs(point.information_null - null.mean) <= allowed, (point, null)


def test_preference_is_swapped_within_pairs_where_one_member_is_too_short() -> None:
    """Sequence 11 keeps 7 tokens, so no valid position: the other member of its pair can still be swapped."""
    ids, mask = tokens("right")
    mask = mask.copy()
    mask[11, 7:] = False
    features = {"preference": sequence_features(mask)["preference"]}
    generator = np.random.default_rng(31)
    # States that depend on the pair: the two members of each are alike, and the pairs are not.
    pairs = np.repeat(generator.normal(size=(7, 12)), 2, axis=0)
    states = 3 * pairs[:, None, :] + generator.normal(size=(*ids.shape, 12))
    measured = ib.Meter(probe_of(ids, mask, features), features=["preference"], layers=["only"], batch_size=5).measure(
        Emitter(ids, mask, {"only": states})
    )
    hidden = [states.astype(np.float32).astype(np.float64)]
    feature = bf.evaluate(hidden, ids, mask, features=features).features["preference"]
    assert set(feature.sequences) == set(range(11))
    point = measured.features["preference"]
    close(point.information, feature.information)
    paired, free = (
        bf.sequence_null(feature.layers, feature.sequences, feature.labels, paired=flag) for flag in (True, False)
    )
    allowed = 4 * paired.std / math.sqrt(50)
    assert abs(free.mean - paired.mean) > allowed
    assert abs(point.information_null - paired.mean) <= allowed, (point, paired, free)


def test_token_features_agree() -> None:
    ids, mask = tokens("right")
    generator = np.random.default_rng(12)
    speech = ids % 4
    speech[generator.random(ids.shape) < 0.3] = -1
    # Arbitrary large label values, far from 0 … number of labels - 1.
    features = {"speech": speech, "sparse": np.where(ids % 7 == 0, 1_000_003 * (ids + 1), -1)}
    meter = ib.Meter(probe_of(ids, mask, features), orders=("bigram",), features=list(features), batch_size=5)
    measured = meter.measure(tiny_model("gpt2"))
    table = bf.evaluate(hidden_states("gpt2", "right"), ids, mask, orders=("bigram",), features=features)
    for name, feature in table.features.items():
        point = measured.features[name]
        assert point.num_positions == len(feature.labels)
        close(point.information_by_layer, feature.information_by_layer)
        close(point.information, feature.information)
        assert point.ratio == pytest.approx(feature.information / table.orders["bigram"].complexity, abs=1e-5)
        null = bf.permutation_null(feature.layers, feature.labels)
        allowed = 4 * math.hypot(null.std / math.sqrt(50), null.standard_error)
        assert abs(point.information_null - null.mean) <= allowed, (name, point, null)


def test_features_do_not_change_the_plane() -> None:
    ids, mask = tokens("left")
    features = sequence_features(mask)
    plain = ib.Meter(probe_of(ids, mask), batch_size=5).measure(tiny_model("gpt2"))
    both = ib.Meter(probe_of(ids, mask, features), features=["language"], batch_size=5).measure(tiny_model("gpt2"))
    assert set(both.features) == {"language"}
    assert both.complexity == plain.complexity
    assert both.ceiling == plain.ceiling
    assert [p.to_dict() if hasattr(p, "to_dict") else p for p in both.orders.values()] == [
        p.to_dict() if hasattr(p, "to_dict") else p for p in plain.orders.values()
    ]


# --- captured states, layers


@contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """The outputs of `modules`, one list per module, one tensor per call."""
    outputs: list[list[Tensor]] = [[] for _ in modules]

    def hook(into: list[Tensor]) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            into.append((output if isinstance(output, Tensor) else output[0]).detach().clone())

        return keep

    handles = [module.register_forward_hook(hook(into)) for module, into in zip(modules, outputs, strict=True)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class Recorder:
    """A `forward=` callable that runs the model under bf16 autocast and keeps the states it yields."""

    def __init__(self, modules: Sequence[nn.Module], ids: np.ndarray, mask: np.ndarray) -> None:
        self.modules, self.ids, self.mask = modules, ids, mask
        self.states: list[np.ndarray | None] = [None] * len(modules)
        self.rows: set[int] = set()

    def __call__(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Any:
        with recorded(self.modules) as outputs, torch.autocast("cpu", dtype=torch.bfloat16):
            result = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        for layer, calls in enumerate(outputs):
            (states,) = calls
            self._file(layer, input_ids.numpy(), attention_mask.numpy().astype(bool), states.double().numpy())
        return result

    def _file(self, layer: int, ids: np.ndarray, mask: np.ndarray, states: np.ndarray) -> None:
        """Put each row's real states where the probe has that row, however the batch was cut or trimmed."""
        store = self.states[layer]
        if store is None:
            store = np.full((*self.ids.shape, states.shape[-1]), np.nan)
            self.states[layer] = store
        for row in range(len(ids)):
            real = ids[row, mask[row]]
            (b,) = [b for b in range(len(self.ids)) if np.array_equal(self.ids[b, self.mask[b]], real)]
            store[b, self.mask[b]] = states[row, mask[row]]
            self.rows.add(b)

    def hidden(self) -> list[np.ndarray]:
        assert self.rows == set(range(len(self.ids)))
        return [states for states in self.states if states is not None]


@pytest.mark.parametrize(("kind", "side"), [("llama", "left"), ("gpt2", "right")])
def test_bf16_autocast_agrees_on_the_states_of_that_very_forward(kind: str, side: str) -> None:
    ids, mask = tokens(side)
    model = tiny_model(kind)
    if kind == "llama":
        modules = [*model.model.layers[:-1], model.model.norm]
    else:
        modules = [*model.transformer.h[:-1], model.transformer.ln_f]
    recorder = Recorder(modules, ids, mask)
    measured = ib.Meter(probe_of(ids, mask), batch_size=5, forward=recorder, null=False).measure(model)
    table = bf.evaluate(recorder.hidden(), ids, mask)
    assert_agrees(measured, table, primary="token", tolerance=1e-5)
    # bf16 was on: in float32 the states are others.
    exact = bf.evaluate(hidden_states(kind, side), ids, mask)
    assert abs(exact.entropy - table.entropy) > 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_precisions_agree(dtype: torch.dtype) -> None:
    ids, mask = tokens("right")
    model = copy.deepcopy(tiny_model("gpt2")).to(dtype)
    with recorded([*model.transformer.h[:-1], model.transformer.ln_f]) as outputs:
        measured = ib.Meter(probe_of(ids, mask), batch_size=100, null=False).measure(model)
    table = bf.evaluate([calls[-1].double().numpy() for calls in outputs], ids, mask)
    assert_agrees(measured, table, primary="token")


def test_blocks_are_raw_block_outputs() -> None:
    ids, mask = tokens("right")
    model = tiny_model("llama")
    with recorded(list(model.model.layers)) as outputs:
        measured = ib.Meter(probe_of(ids, mask), layers="blocks", batch_size=100, null=False).measure(model)
    hidden = [calls[-1].double().numpy() for calls in outputs]
    assert_agrees(measured, bf.evaluate(hidden, ids, mask), primary="token")
    for layer in range(LAYERS - 1):
        np.testing.assert_array_equal(hidden[layer][mask], hidden_states("llama", "right")[layer][mask])
    # The final norm sets the two conventions apart, here and in the measurement.
    normed = ib.Meter(probe_of(ids, mask), batch_size=100, null=False).measure(model)
    assert normed.entropy_by_layer[:-1] == measured.entropy_by_layer[:-1]
    assert abs(normed.entropy_by_layer[-1] - measured.entropy_by_layer[-1]) > 1e-4
    assert len(set(measured.layers)) == LAYERS


def test_layers_by_name_and_glob() -> None:
    ids, mask = tokens("left")
    model = tiny_model("llama")
    chosen = {
        "model.embed_tokens": model.model.embed_tokens,
        **{f"model.layers.{i}.mlp": model.model.layers[i].mlp for i in range(LAYERS)},
    }
    with recorded(list(chosen.values())) as outputs:
        measured = ib.Meter(
            probe_of(ids, mask),
            layers=["model.embed_tokens", "model.layers.*.mlp"],
            batch_size=100,
            null=False,
        ).measure(model)
    assert list(measured.layers) == list(chosen)
    table = bf.evaluate([calls[-1].double().numpy() for calls in outputs], ids, mask)
    assert_agrees(measured, table, primary="token")


def test_layers_by_callable() -> None:
    ids, mask = tokens("left")
    model = tiny_model("gpt2")

    def pick(module: Any) -> list[nn.Module]:
        return [module.transformer.h[2], module.transformer.h[0].attn]

    with recorded(pick(model)) as outputs:
        measured = ib.Meter(probe_of(ids, mask), layers=pick, batch_size=100, null=False).measure(model)
    assert len(measured.layers) == 2
    table = bf.evaluate([calls[-1].double().numpy() for calls in outputs], ids, mask)
    assert_agrees(measured, table, primary="token")


# --- chosen states, high dimension


class Emitter(nn.Module):
    """A model whose named submodules emit chosen states; it knows a sequence of the probe by its tokens."""

    def __init__(self, ids: np.ndarray, mask: np.ndarray, states: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.ids = torch.from_numpy(np.where(mask, ids, -1))
        self.states = {name: torch.from_numpy(z.astype(np.float32)) for name, z in states.items()}
        for name in states:
            self.add_module(name, nn.Identity())
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        # Padding may hold any ids, and trailing padding may have been cut off.
        width = input_ids.shape[1]
        real = input_ids.where(attention_mask.bool(), -1)
        same = (real[:, None] == self.ids[None, :, :width]).all(-1)
        assert (same.sum(-1) == 1).all()
        rows = same.int().argmax(-1)
        for name, states in self.states.items():
            z = self.get_submodule(name)(states[rows, :width])
        return z


@functools.cache
def wide_states() -> dict[str, np.ndarray]:
    """States [N, S, 4096] at the extremes of direction, all of them partly a function of the token."""
    ids, _ = tokens("right", 8)
    generator = np.random.default_rng(21)
    dim = 4096
    shape = (*ids.shape, dim)
    common = generator.normal(size=dim)
    outliers = np.ones(dim)
    outliers[generator.integers(0, dim, size=4)] = 300.0
    return {
        "isotropic": generator.normal(size=shape),
        "by_token": generator.normal(size=(VOCAB, dim))[ids] + 0.5 * generator.normal(size=shape),
        # One direction holds nearly all of the length, as in trained language models.
        "cone": 30 * common + generator.normal(size=(VOCAB, dim))[ids] + generator.normal(size=shape),
        "needle": 1000 * common + generator.normal(size=(VOCAB, dim))[ids],
        "outliers": outliers * (generator.normal(size=(VOCAB, dim))[ids] + generator.normal(size=shape)),
        "scaled": 1e6 * generator.normal(size=(VOCAB, dim))[ids] + generator.normal(size=shape),
    }


def test_temperature_one_in_4096_dimensions() -> None:
    """Where every entropy is within 1e-3 of 1, and information sits in the fifth to ninth decimal."""
    ids, mask = tokens("right", 8)
    states = wide_states()
    names = list(states)
    orders = ("token", "bigram")
    measured = ib.Meter(probe_of(ids, mask), orders=orders, layers=names, temperature=1.0, batch_size=3).measure(
        Emitter(ids, mask, states)
    )
    hidden = [states[name].astype(np.float32).astype(np.float64) for name in names]
    table = bf.evaluate(hidden, ids, mask, orders=orders, temperature=1.0)
    assert list(measured.layers) == names
    assert min(table.entropy_by_layer) > 1 - 1e-3
    for order, plane in table.orders.items():
        point = measured[order]
        for actual, expected in (
            (point.complexity_by_layer, plane.complexity_by_layer),
            (point.expressivity_by_layer, plane.expressivity_by_layer),
            ([point.complexity, point.expressivity], [plane.complexity, plane.expressivity]),
        ):
            for name, got, true in zip(names, actual, expected, strict=False):
                assert abs(got - true) <= max(0.01 * abs(true), 1e-9), (order, name, got, true)
        assert_null_agrees(point.complexity_null, point.complexity_null_se, table.layers, plane.inputs)
        # A null that is coarser than the information it is the baseline of would be of no use here.
        reference = bf.permutation_null(table.layers, plane.inputs)
        assert abs(point.complexity_null - reference.mean) <= 0.05 * plane.complexity
    close(measured.entropy_by_layer, table.entropy_by_layer, 1e-9)
    close(measured.ceiling, table.ceiling, max(0.01 * table.ceiling, 1e-9))


def test_calibrated_temperature_in_4096_dimensions() -> None:
    ids, mask = tokens("right", 8)
    states = wide_states()
    measured = ib.Meter(probe_of(ids, mask), layers=list(states), batch_size=3, null=False).measure(
        Emitter(ids, mask, states)
    )
    hidden = [states[name].astype(np.float32).astype(np.float64) for name in states]
    assert_agrees(measured, bf.evaluate(hidden, ids, mask), primary="token")


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 0.0])
def test_padding_may_hold_anything(garbage: float) -> None:
    ids, mask = tokens("left")
    states = np.random.default_rng(2).normal(size=(*ids.shape, 24))
    expected = bf.evaluate([states.astype(np.float32).astype(np.float64)], ids, mask)
    measured = ib.Meter(probe_of(ids, mask), layers=["only"], batch_size=5).measure(
        Emitter(ids, mask, {"only": np.where(mask[..., None], states, garbage)})
    )
    assert_agrees(measured, expected, primary="token")
    close(measured.ceiling, expected.ceiling)


# --- larger samples


@functools.cache
def zipf_tokens(num_sequences: int, width: int, vocabulary: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Independent tokens with frequencies 1, 1/2, 1/3 …; no padding."""
    frequencies = 1 / np.arange(1, vocabulary + 1)
    generator = np.random.default_rng(17)
    ids = generator.choice(vocabulary, size=(num_sequences, width), p=frequencies / frequencies.sum())
    return ids, np.ones_like(ids, dtype=bool)


@pytest.mark.parametrize("vocabulary", [3, 40])
def test_nulls_of_common_labels_agree(vocabulary: int) -> None:
    """Labels with hundreds of positions each; with 40 tokens, next to many rare ones."""
    ids, mask = zipf_tokens(24, 128, vocabulary)
    generator = np.random.default_rng(4)
    states = generator.normal(size=(40, 8))[ids] + generator.normal(size=(*ids.shape, 8))
    hidden = [states.astype(np.float32).astype(np.float64)]
    orders = ("token", "bigram", "trigram")
    measured = ib.Meter(probe_of(ids, mask), orders=orders, layers=["only"], num_bins=40).measure(
        Emitter(ids, mask, {"only": states})
    )
    table = bf.evaluate(hidden, ids, mask, orders=orders, num_bins=40)
    assert_agrees(measured, table, primary="token")
    for name, plane in table.orders.items():
        point = measured[name]
        assert_null_agrees(point.complexity_null, point.complexity_null_se, table.layers, plane.inputs)
        assert_null_agrees(point.expressivity_null, point.expressivity_null_se, table.layers, plane.outputs)


@pytest.mark.parametrize("spread", [0.0, 1e-5, 1e-3])
def test_collapsed_states_agree(spread: float) -> None:
    """One batch of 4,000 nearly equal states, as a model has early in training: rounding must not pile up."""
    ids, mask = zipf_tokens(8, 512)
    generator = np.random.default_rng(4)
    states = generator.normal(size=64) + spread * generator.normal(size=(*ids.shape, 64))
    hidden = [states.astype(np.float32).astype(np.float64)]
    orders = ("token", "bigram")
    measured = ib.Meter(probe_of(ids, mask), orders=orders, layers=["only"], batch_size=8, null=False).measure(
        Emitter(ids, mask, {"only": states})
    )
    table = bf.evaluate(hidden, ids, mask, orders=orders)
    close(measured.entropy, table.entropy)
    close(measured.ceiling, table.ceiling)
    for name, plane in table.orders.items():
        close(measured[name].complexity, plane.complexity)
        close(measured[name].expressivity, plane.expressivity)
