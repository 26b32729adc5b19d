"""A label that the last layers of a model encode with a known strength is found in proportion, and only there."""

from __future__ import annotations

import brute_force as bf
import numpy as np
import pytest
import torch
from torch import nn

import ib_callback as ib

LENGTH, DIM, VOCABULARY, MARKERS = 14, 12, 40, 8
STRENGTHS = (0.0, 0.3, 0.6, 1.2, 2.4)
SETTINGS = {"orders": ("token",), "layers": ["stack.*"], "num_bins": 16, "batch_size": 16}


class Planted(nn.Module):
    """The first token of a sequence tells its label; the last two of three layers move all later states that way."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.embed = nn.Embedding.from_pretrained(torch.randn(VOCABULARY, DIM, generator=generator))
        self.directions = nn.Embedding.from_pretrained(torch.randn(MARKERS, DIM, generator=generator))
        self.stack = nn.ModuleList(nn.Identity() for _ in range(3))
        self.strength = strength

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        # As in a text, states differ between sequences: that is what makes the null by positions too low.
        topic = self.embed(input_ids.cumsum(1) % VOCABULARY) + self.embed(input_ids[:, 1:2])
        states = self.stack[0](self.embed(input_ids) + topic)
        label = self.directions(input_ids[:, :1] % MARKERS)
        for layer in self.stack[1:]:
            states = layer(states + self.strength * label)
        return states


def probe_of(markers: list[int], name: str, labels: list[int] | None = None) -> ib.Probe:
    """Sequences whose first token is their label, which is given on the second half of each only."""
    ids = torch.randint(MARKERS, VOCABULARY, (len(markers), LENGTH), generator=torch.Generator().manual_seed(8))
    ids[:, 0] = torch.tensor(markers)
    rows = torch.tensor(markers if labels is None else labels)[:, None].expand(-1, LENGTH)
    return ib.Probe.from_tokens(ids, labels={name: torch.where(torch.arange(LENGTH) >= 4, rows, -1)}, name=name)


MAIN = ib.Probe.from_tokens(torch.randint(0, VOCABULARY, (20, LENGTH), generator=torch.Generator().manual_seed(9)))
PREFERENCE = [1, 0] * 20
LANGUAGE = [i % 7 for i in range(42)]


def swapped(seed: int) -> list[int]:
    """Which of each pair is preferred, at random."""
    flips = np.random.default_rng(seed).integers(0, 2, len(PREFERENCE) // 2)
    return [int(value) for flip in flips for value in ((1, 0) if flip else (0, 1))]


def shuffled(seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(LANGUAGE).tolist()


KINDS = pytest.mark.parametrize(
    ("name", "markers", "at_random"),
    [("preference", PREFERENCE, swapped), ("language", LANGUAGE, shuffled)],
    ids=["preference", "language"],
)


def states_of(model: Planted, probe: ib.Probe) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    handles = [
        layer.register_forward_hook(lambda *args: found.append(args[2].double().numpy())) for layer in model.stack
    ]
    with torch.no_grad():
        model(probe.input_ids, probe.attention_mask)
    for handle in handles:
        handle.remove()
    return found


@KINDS
def test_information_rises_with_the_strength_and_is_that_of_the_brute_force(name, markers, at_random):
    probe = probe_of(markers, name)
    meter = ib.Meter(MAIN, feature_probes=[probe], **SETTINGS)
    found = []
    for strength in STRENGTHS:
        model = Planted(strength)
        measured = meter.measure(model)
        table = bf.evaluate(
            states_of(model, probe), probe.input_ids.numpy(), probe.attention_mask.numpy(),
            orders=("token",), features={name: probe.labels[name].numpy()}, num_bins=16,
        )  # fmt: skip
        point, expected = measured.features[name], table.features[name]
        assert point.information_by_layer == pytest.approx(expected.information_by_layer, abs=1e-6)
        assert point.information == pytest.approx(expected.information, abs=1e-6)
        assert point.ratio == pytest.approx(expected.information / measured.complexity, abs=1e-5)
        found.append(point)
    values = [point.information for point in found]
    assert values == sorted(values)
    assert values[-1] > 3 * values[0]
    # Strength 0 says nothing beyond chance, a strong one far more; the first layer encodes nothing at any strength.
    assert abs(found[0].information - found[0].information_null) < 3 * found[0].information_null_std
    assert found[-1].information - found[-1].information_null > 20 * found[-1].information_null_std
    first = [point.information_by_layer[0] for point in found]
    assert first == pytest.approx([first[0]] * len(first), abs=1e-9)
    for point in found[2:]:
        assert point.information_by_layer[0] < point.information_by_layer[1] < point.information_by_layer[2]


@KINDS
def test_labels_at_random_lie_within_their_null(name, markers, at_random):
    """By whole sequences, as labels are exchangeable; a null by positions would call most of this a signal."""
    model = Planted(STRENGTHS[-1])
    beyond_positions = 0
    for seed in range(6):
        probe = probe_of(markers, name, at_random(seed))
        point = ib.measure(model, MAIN, feature_probes=[probe], **SETTINGS).features[name]
        assert abs(point.information - point.information_null) < 3 * point.information_null_std
        # The same labels under which they count as varying within a sequence: one token of another label.
        rows = probe.labels[name].clone()
        rows[0, -2] = rows[rows >= 0].max() + 1
        other = ib.Probe.from_tokens(probe.input_ids, labels={name: rows})
        naive = ib.measure(model, MAIN, feature_probes=[other], **SETTINGS).features[name]
        beyond_positions += naive.information - naive.information_null > 3 * naive.information_null_std
    assert beyond_positions >= 4


@KINDS
def test_the_p_value_of_labels_at_random_is_uniform_and_of_a_planted_label_the_smallest(name, markers, at_random):
    planted = probe_of(markers, name)
    meter = ib.Meter(MAIN, feature_probes=[planted], **SETTINGS)
    assert meter.measure(Planted(STRENGTHS[-1])).features[name].information_p_value == pytest.approx(1 / 101)
    found = []
    for seed in range(20):
        probe = probe_of(markers, name, at_random(seed))
        point = ib.measure(Planted(STRENGTHS[-1]), MAIN, feature_probes=[probe], **SETTINGS).features[name]
        assert point.information_p_value is not None
        found.append(point.information_p_value)
    # The distance of Kolmogorov and Smirnov: more than 0.35 in 1 of 100 cases of 20.
    below = np.arange(1, len(found) + 1) / len(found)
    assert np.abs(np.sort(found) - below + 0.5 / len(found)).max() < 0.35


def test_permutations_that_change_nothing_or_names_only_count():
    """Of two pairs there are four swaps, of which two at a time are alike: p is about 1/2 or 1."""
    ids = torch.randint(2, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(2))
    for labels in ([1, 0, 1, 0], [1, 0, 0, 1]):
        probe = ib.Probe.from_tokens(ids, labels={"preference": torch.tensor(labels)[:, None].expand(-1, LENGTH)})
        point = ib.measure(Planted(0.0), MAIN, feature_probes=[probe], **SETTINGS).features["preference"]
        p_value = point.information_p_value
        above = point.information > point.information_null
        assert p_value == 1.0 if not above else 0.35 < p_value < 0.65
