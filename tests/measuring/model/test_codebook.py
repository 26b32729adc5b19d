"""Codebooks aimed at the output: readout and prediction against loops over float64 states, planted, of many models."""

from __future__ import annotations

import itertools
import types
import warnings
from collections import Counter
from typing import Any, NamedTuple

import brute_force as bf
import numpy as np
import pytest
import quantities as q
import torch
import transformers as tf
from torch import nn

import ib_callback as ib
from ib_callback.measuring import meter as meter_module
from ib_callback.measuring import thinning
from ib_callback.measuring.model import codebook
from ib_callback.measuring.quantities.documents import shift

SEED = 3
VOCABULARY = 140
SIZES = {"vocab_size": VOCABULARY, "initializer_range": 0.3}


def llama(**changes: Any) -> Any:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = sizes | SIZES | {"max_position_embeddings": 96, "pad_token_id": None} | changes
    return tf.LlamaForCausalLM(tf.LlamaConfig(**config)).eval()


def gpt2(**changes: Any) -> Any:
    torch.manual_seed(2)
    config = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 96, "bos_token_id": 0, "eos_token_id": 0}
    config |= SIZES | changes
    return tf.GPT2LMHeadModel(tf.GPT2Config(**config)).eval()


def ragged(number: int = 10, width: int = 72, highest: int = VOCABULARY) -> ib.Probe:
    """Padded on either side; some tokens are frequent, so that there are labels to say something about."""
    generator = np.random.default_rng(5)
    ids = np.minimum(generator.geometric(0.02, size=(number, width)), highest) - 1
    mask = np.zeros((number, width), bool)
    for row in range(number):
        length = int(generator.integers(60, width + 1))
        mask[row, slice(width - length, width) if row % 2 else slice(length)] = True
    mask[3] = np.arange(width) < 20  # too short for labels from far away
    return ib.Probe.from_tokens(torch.from_numpy(ids), torch.from_numpy(mask))


PROBE = ragged()


class Twin(NamedTuple):
    """Soft assignments [T, bins] at `positions`, in float64."""

    assignments: np.ndarray
    positions: list[tuple[int, int]]


def outputs(model: Any, probe: ib.Probe) -> tuple[np.ndarray, np.ndarray]:
    """[N, S, dim] last states after the final norm, and [N, S, V] logits, in float64, of one plain call."""
    with torch.no_grad():
        found = model(input_ids=probe.input_ids, attention_mask=probe.attention_mask.long(), output_hidden_states=True)
    return found.hidden_states[-1].double().numpy(), found.logits.double().numpy()


def readout_twin(model: Any, probe: ib.Probe, widest: int = 4, of: Any = None) -> Twin:
    """`of` are the sequences that the mean is of; None: all."""
    ids, mask = probe.input_ids.numpy(), probe.attention_mask.numpy()
    rows = model.get_output_embeddings().weight.detach().double().numpy()[bf.frequent_tokens(ids, mask, 100)]
    positions = bf.valid_positions(mask, widest)
    of_mean = [position for position in positions if of is None or position[0] in of]
    return Twin(bf.readout_assignments(outputs(model, probe)[0], rows, positions, of_mean), positions)


def prediction_twin(model: Any, probe: ib.Probe, widest: int = 4, positions: Any = None) -> Twin:
    """`positions`: where; None: all valid ones."""
    ids, mask = probe.input_ids.numpy(), probe.attention_mask.numpy()
    positions = positions or bf.valid_positions(mask, widest)
    return Twin(bf.grouped_shares(outputs(model, probe)[1], bf.frequent_tokens(ids, mask, 99), positions), positions)


def agrees(point: Any, twin: Twin, order: str, probe: ib.Probe = PROBE, seed: int = SEED) -> None:
    """Plain, local and null numbers of one order."""
    ids, width = probe.input_ids.numpy(), bf.order_width(order)
    labels = {
        "complexity": [bf.input_label(ids, position, width) for position in twin.positions],
        "expressivity": [bf.output_label(ids, position, width) for position in twin.positions],
    }
    number = Counter(row for row, _ in twin.positions)
    kept = [i for i, (row, _) in enumerate(twin.positions) if number[row] >= 48]
    # How far labels are shifted is a matter of chance.
    far = [kept[place] for place in shift(np.array([twin.positions[i][0] for i in kept]), seed)]
    shifted = [labels["complexity"][i] for i in far]
    baseline = bf.mutual_information(twin.assignments[kept], shifted)
    for side, of_side in labels.items():
        expected = bf.mutual_information(twin.assignments, of_side)
        assert getattr(point, side) == pytest.approx(expected, abs=1e-6)
        assert getattr(point, f"{side}_by_layer") == (getattr(point, side),)
        local = bf.mutual_information(twin.assignments[kept], [of_side[i] for i in kept]) - baseline
        assert getattr(point, f"{side}_local") == pytest.approx(local, abs=1e-6)
        assert getattr(point, f"{side}_baseline") == pytest.approx(baseline, abs=1e-6)
        null = bf.permutation_null([twin.assignments], of_side, repeats=40)
        error = np.hypot(getattr(point, f"{side}_null_se"), null.standard_error)
        assert abs(getattr(point, f"{side}_null") - null.mean) <= 4 * error + 1e-6
    assert point.num_positions_local == len(kept)
    c, e = point.complexity_local, point.expressivity_local
    assert point.score_local == (None if point.optimality_local is None else pytest.approx(e**2 / c))
    assert point.complexity_document == pytest.approx(point.complexity_baseline - point.complexity_null)


MODELS = {
    "tied": lambda: llama(tie_word_embeddings=True),
    "untied": lambda: llama(tie_word_embeddings=False),
    "gpt2, tied": gpt2,
    "gpt2, untied": lambda: gpt2(tie_word_embeddings=False),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_by_loops_in_float64(make):
    model = make()
    measured = ib.measure(model, PROBE, seed=SEED, batch_size=4)
    assert measured.settings["readout"] == {"tokens": 100, "mean": "all positions"}
    twins = {"readout": readout_twin(model, PROBE), "prediction": prediction_twin(model, PROBE)}
    assert measured.settings["prediction"] == {"positions": len(twins["prediction"].positions), "groups": 100}
    for name, twin in twins.items():
        for order in bf.ORDERS:
            agrees(measured[f"{name}/{order}"], twin, order)
        point = measured[f"{name}/token"]
        assert point.complexity > 0.01, "or nothing would show"
        assert point.num_positions_local < len(twin.positions), "one sequence is too short"
    assert measured.readout["bigram"] == measured["readout/bigram"]
    assert measured.prediction["bigram"] == measured["prediction/bigram"]


@pytest.mark.parametrize("number", [170, 330])
def test_predictions_of_some_positions_by_loops(monkeypatch, number):
    monkeypatch.setattr(thinning, "POSITIONS", number)
    model = llama()
    meter = ib.Meter(PROBE, orders="token", seed=SEED, batch_size=4)
    measured = meter.measure(model)
    where = meter.prediction_positions()
    positions = list(zip(where.sequence.tolist(), where.offset.tolist(), strict=True))
    assert set(positions) < set(bf.valid_positions(PROBE.attention_mask.numpy(), 1))
    assert number * 0.6 < len(positions) <= number
    assert measured.settings["prediction"] == {"positions": len(positions), "groups": 100}
    agrees(measured["prediction/token"], prediction_twin(model, PROBE, positions=positions), "token")
    agrees(measured["readout/token"], readout_twin(model, PROBE, widest=1), "token")


def test_standard_errors_are_those_of_groups_left_out():
    model = llama()
    measured = ib.measure(model, PROBE, orders="token", seed=SEED, batch_size=4, standard_errors=5)
    plain = ib.measure(model, PROBE, orders="token", seed=SEED, batch_size=2)
    ids = PROBE.input_ids.numpy()
    left_out = [{2 * g, 2 * g + 1} for g in range(5)]
    left_out += [a | b for a, b in itertools.pairwise(left_out)]
    for name, twin in (("readout", readout_twin(model, PROBE, 1)), ("prediction", prediction_twin(model, PROBE, 1))):
        point = measured[f"{name}/token"]
        for side, label in (("complexity", bf.input_label), ("expressivity", bf.output_label)):
            omitted = []
            for rows in left_out:
                rest = [i for i, (row, _) in enumerate(twin.positions) if row not in rows]
                labels = [label(ids, twin.positions[i], 1) for i in rest]
                omitted.append(bf.mutual_information(twin.assignments[rest], labels))
            assert getattr(point, f"{side}_jackknife") == pytest.approx(omitted, abs=1e-6)
            value = getattr(point, side)
            assert getattr(point, f"{side}_se") == pytest.approx(q.jackknife_error(value, omitted, 5), rel=1e-3)
            assert value == pytest.approx(getattr(plain[f"{name}/token"], side), abs=1e-9)
        for number in ("complexity_local", "expressivity_local", "complexity_above_null", "score_local"):
            assert 0 < getattr(point, f"{number}_se") < 0.1


# --- the mean


def test_one_pass_with_states_that_wait_is_two_passes_to_the_last_bit(monkeypatch):
    model = llama()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    meter = ib.Meter(PROBE, orders="token", batch_size=3)
    first = meter.measure(model)
    calls.clear()
    one = meter.measure(model)
    assert len(calls) == 4
    monkeypatch.setattr(codebook, "KEPT", 0)
    monkeypatch.setattr(codebook, "EVERY", 1)
    monkeypatch.setattr(meter_module, "KEPT", 0)
    calls.clear()
    two = meter.measure(model)
    assert len(calls) == 8
    assert first.readout == one.readout == two.readout


@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
def test_where_states_may_not_wait_the_mean_is_that_of_some_sequences(batch_size, monkeypatch):
    """The same ones whatever the batch size is, which a lack of memory changes amid a run."""
    monkeypatch.setattr(meter_module, "KEPT", 10_000)
    monkeypatch.setattr(codebook, "EVERY", 2)
    model = llama()
    meter = ib.Meter(PROBE, orders="token", seed=SEED, batch_size=batch_size)
    measured = meter.measure(model)
    rows = sorted({row for row, _ in bf.valid_positions(PROBE.attention_mask.numpy(), 1)})[::2]
    twin = readout_twin(model, PROBE, widest=1, of=rows)
    number = sum(row in rows for row, _ in twin.positions)
    assert measured.settings["readout"] == {"tokens": 100, "mean": f"{number} positions"}
    agrees(measured["readout/token"], twin, "token")
    whole = ib.measure(model, PROBE, orders="token", seed=SEED)["readout/token"]
    assert measured["readout/token"].complexity == pytest.approx(whole.complexity, rel=0.1)
    assert measured["readout/token"] != whole


# --- planted data

SYMBOLS, DIM, OTHERS = 8, 16, 4
# What the logit of a symbol is where the state is the embedding of it: its squared norm.
PEAK = 9.0


def balanced(number: int = 24) -> ib.Probe:
    """In each sequence every pair of symbols follows on each other exactly once: a de Bruijn sequence, as a circle.

    The first two symbols are those of no other sequence.
    """
    circle = []
    for i in range(SYMBOLS):
        circle.append(i)
        for j in range(i + 1, SYMBOLS):
            circle += [i, j]
    generator = np.random.default_rng(7)
    rows = []
    for first, second in itertools.islice(itertools.permutations(range(SYMBOLS), 2), number):
        turned = np.roll(circle, -int(generator.choice([s for s in range(62) if circle[s] != circle[s + 1]])))
        names = np.full(SYMBOLS, -1)
        names[turned[:2]] = first, second
        names[names < 0] = generator.permutation(sorted({*range(SYMBOLS)} - {first, second}))
        rows.append([*names[turned], first])
    return ib.Probe.from_tokens(torch.from_numpy(np.array(rows)))


class Trunk(nn.Module):
    def __init__(self, states: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity()])
        self.states = states

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layers[0](self.states(input_ids))


class Oracle(nn.Module):
    """Knows the probe by heart: its state is what `code` makes of the current and the next token and the document.

    It knows a document by its first two tokens, and reads nothing ahead after these.
    """

    base_model_prefix = "model"

    def __init__(self, probe: ib.Probe, code: Any) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(num_hidden_layers=1, vocab_size=SYMBOLS + OTHERS)
        self.lm_head = nn.Linear(DIM, SYMBOLS + OTHERS, bias=False)
        self.lm_head.weight.data = PEAK**0.5 * torch.eye(DIM)[: SYMBOLS + OTHERS]
        self.known = {tuple(row[:2]): (number, [*row[1:], 0]) for number, row in enumerate(probe.input_ids.tolist())}
        self.code = code
        self.model = Trunk(self.states)

    def states(self, input_ids: torch.Tensor) -> torch.Tensor:
        rows = []
        for row in input_ids.tolist():
            number, follows = self.known[tuple(row[:2])]
            rows += [self.code(x, y, number, self.lm_head.weight) for x, y in zip(row, follows, strict=False)]
        return torch.stack(rows).view(*input_ids.shape, DIM)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, logits_to_keep=0):
        return tf.modeling_outputs.CausalLMOutput(logits=self.lm_head(self.model(input_ids)[:, -logits_to_keep:]))


# Embeddings are orthogonal and of one length. Without their mean they are corners of a simplex: the cosine of two of
# them is -1/7, and that of one with the sum of two is sqrt((1 - 1/7) / 2). A state is away from the mean state as the
# sum of its symbols is from theirs.
APART = -1 / (SYMBOLS - 1)


def corners(weights: dict[int, int]) -> np.ndarray:
    """[symbols] cosines of a sum of symbols with each of them."""
    number = sum(weights.values())
    squared = sum(w**2 for w in weights.values()) + APART * (number**2 - sum(w**2 for w in weights.values()))
    dots = [weights.get(j, 0) + APART * (number - weights.get(j, 0)) for j in range(SYMBOLS)]
    return np.array(dots) / squared**0.5


CODES = {
    "current": (lambda x, y, number, table: table[x], lambda x, y: {x: 1}, 1.0),
    "next": (lambda x, y, number, table: table[y], lambda x, y: {y: 1}, 1.0),
    "sum of both": (lambda x, y, number, table: table[x] + table[y], lambda x, y: dict(Counter([x, y])), 1.0),
    "mean of both": (lambda x, y, number, table: (table[x] + table[y]) / 2, lambda x, y: dict(Counter([x, y])), 0.5),
    "neither": (lambda x, y, number, table: table[number % SYMBOLS], None, 1.0),
}


def softmax(scores: np.ndarray) -> np.ndarray:
    return np.exp(scores) / np.exp(scores).sum()


def planted(kind: str, view: str) -> np.ndarray:
    """[x, y, bins] the assignment where x is followed by y, in closed form."""
    _, symbols, share = CODES[kind]
    temperature = bf.calibrated_temperature(DIM, SYMBOLS)
    table = []
    for x, y in itertools.product(range(SYMBOLS), repeat=2):
        weights = symbols(x, y)
        if view == "readout":
            table.append(softmax(corners(weights) / temperature))
        else:
            shares = softmax(np.array([PEAK * share * weights.get(v, 0) for v in range(SYMBOLS + OTHERS)]))
            table.append(np.append(shares[:SYMBOLS], shares[SYMBOLS:].sum()))
    return np.array(table).reshape(SYMBOLS, SYMBOLS, -1)


@pytest.mark.parametrize("kind", CODES)
def test_states_made_of_embeddings_say_what_was_planted(kind):
    probe = balanced()
    model = Oracle(probe, CODES[kind][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="the hidden states of .* nearly coincide")
        measured = ib.measure(model, probe, orders="token", seed=SEED, batch_size=5)
    assert measured.settings["loss"]["path"] == "head"
    positions = bf.valid_positions(probe.attention_mask.numpy(), 1)
    ids = probe.input_ids.numpy()
    inputs, trailing = ([int(ids[row, s + ahead]) for row, s in positions] for ahead in (0, 1))
    shifted = [inputs[place] for place in shift(np.array([row for row, _ in positions]), SEED)]
    for view in ("readout", "prediction"):
        point = measured[f"{view}/token"]
        if kind == "neither":
            # Each document has every symbol as often on either side, and its state is one of another kind.
            assert (point.complexity, point.expressivity) == pytest.approx((0, 0), abs=1e-6)
            assert (point.complexity_local, point.expressivity_local) == pytest.approx((0, 0), abs=1e-6)
            continue
        table = planted(kind, view)
        whole = bf.efficiency(table.mean((0, 1)))
        known = [whole - np.mean([bf.efficiency(part) for part in table.mean(axis)]) for axis in (1, 0)]
        assert (point.complexity, point.expressivity) == pytest.approx(tuple(known), abs=1e-6)
        if kind in ("current", "next"):
            says, not_says = known if kind == "current" else known[::-1]
            assert says == pytest.approx(whole - bf.efficiency(table[0, 0]))
            assert not_says == pytest.approx(0, abs=1e-12)
        else:
            assert known[0] == pytest.approx(known[1])
            assert known[0] > 0.02
        far = bf.mutual_information(table[inputs, trailing], shifted)
        local = [value - far for value in known]
        assert (point.complexity_local, point.expressivity_local) == pytest.approx(tuple(local), abs=1e-6)
        assert far < 0.1 * max(known), "what is far away says little"


def test_noise_says_nothing_of_either():
    probe, generator = balanced(48), torch.Generator().manual_seed(4)
    noise = {key: torch.randn(DIM, generator=generator) for key in itertools.product(range(48), range(65))}
    places = {number: itertools.cycle(range(65)) for number in range(48)}
    model = Oracle(probe, lambda x, y, number, table: noise[number, next(places[number])])
    measured = ib.measure(model, probe, orders="token", standard_errors=True)
    for view in ("readout", "prediction"):
        point = measured[f"{view}/token"]
        for side in ("complexity", "expressivity"):
            for number in (f"{side}_local", f"{side}_above_null"):
                assert abs(getattr(point, number)) < 3 * getattr(point, f"{number}_se")
        assert point.score_local is None


@pytest.mark.filterwarnings("ignore:the hidden states of all layers nearly coincide")
def test_uniform_predictions_say_nothing():
    probe = balanced()
    model = Oracle(probe, CODES["next"][0])
    table = model.lm_head.weight.data.clone()
    model.code = lambda x, y, number, _: table[y]
    model.lm_head.weight.data.zero_()
    meter = ib.Meter(probe, orders="token")
    assert meter.preflight(model).describe().endswith("; no readout: its output embeddings are zero or all alike")
    measured = meter.measure(model)
    assert measured["prediction/token"].complexity == measured["prediction/token"].expressivity == 0
    assert measured["token"].expressivity > 0.4
    assert measured.readout == {}
    assert measured.settings["readout"] == {"why": "its output embeddings are zero or all alike"}
