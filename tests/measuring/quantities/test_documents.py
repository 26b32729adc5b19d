"""The document baseline: labels shifted along their own document, against loops over them, and what it is blind to."""

from __future__ import annotations

from statistics import fmean

import brute_force as bf
import numpy as np
import pytest
import torch
from tiny_models import llama
from torch import nn

import ib_callback as ib
from ib_callback.measuring.quantities.documents import FEWEST, NEAREST, long_enough, shift
from ib_callback.probe.ngrams import valid_positions

ORDERS = ("token", "bigram")
VOCABULARY, DIM, BINS = 32, 16, 12


def probe_of(lengths: list[int], *, highest: int = 12) -> ib.Probe:
    ids = torch.randint(2, highest, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(3))
    return ib.Probe.from_tokens(ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


@pytest.mark.parametrize("lengths", [[60] * 4, [52, 90, 51, 64, 200]])
def test_labels_come_from_far_away_in_the_same_sequence(lengths):
    sequences = np.repeat(np.arange(len(lengths)), lengths)
    start = np.repeat(np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    places = shift(sequences, seed=0)
    assert sorted(places) == list(range(len(sequences)))
    assert (sequences[places] == sequences).all()
    distance = np.abs(places - np.arange(len(sequences)))
    around = np.repeat(lengths, lengths) - distance
    assert np.minimum(distance, around).min() >= NEAREST
    # One offset for each sequence, whatever else there is.
    offset = (places - start - (np.arange(len(sequences)) - start)) % np.repeat(lengths, lengths)
    assert all(len(set(offset[sequences == s])) == 1 for s in range(len(lengths)))
    alone = shift(sequences[sequences == 2], seed=0)
    assert (alone == places[sequences == 2] - start[sequences == 2]).all()
    assert (shift(sequences, seed=1) != places).any()


def test_offsets_are_uniform():
    sequences = np.repeat(np.arange(3000), 48)
    offsets = (shift(sequences, seed=5) - np.arange(len(sequences)))[::48] % 48
    found = np.bincount(offsets, minlength=33)
    assert found[:NEAREST].sum() == 0
    assert len(found) == 33
    # 17 values of 176 each; five standard deviations.
    assert np.abs(found[NEAREST:] - 3000 / 17).max() < 5 * (3000 / 17) ** 0.5


@pytest.mark.parametrize("lengths", [[60] * 6, [60, 30, 70, 55, 20, 60]], ids=["all", "short ones left out"])
def test_by_loops_over_positions(lengths):
    probe = probe_of(lengths)
    model = llama(max_position_embeddings=128).eval()
    measured = ib.measure(model, probe, orders=ORDERS, num_bins=BINS, batch_size=4, standard_errors=3)
    ids, mask = probe.input_ids.numpy(), probe.attention_mask.numpy()
    with torch.no_grad():
        states = model(
            input_ids=probe.input_ids, attention_mask=probe.attention_mask.long(), output_hidden_states=True
        ).hidden_states[1:]
    table = bf.evaluate([s.double().numpy() for s in states], ids, mask, orders=ORDERS, num_bins=BINS)
    number = {b: sum(b == other for other, _ in table.positions) for b, _ in table.positions}
    kept = [i for i, (b, _) in enumerate(table.positions) if number[b] >= 48]
    place = {table.positions[i]: i for i in kept}
    # By which offset is a matter of chance; the rest is counted out here.
    shifted = shift(np.array([table.positions[i][0] for i in kept]), seed=0)
    offset = {
        table.positions[i][0]: table.positions[kept[j]][1] - table.positions[i][1]
        for i, j in zip(kept, shifted, strict=True)
    }
    first = {b: min(s for other, s in table.positions if other == b) for b in offset}
    for order in ORDERS:
        plane, point = table.orders[order], measured[order]
        far = []
        for b, s in (table.positions[i] for i in kept):
            circle = first[b] + (s - first[b] + offset[b]) % number[b]
            far.append(plane.inputs[place[b, circle]])
        baseline = [bf.mutual_information(layer[kept], far) for layer in table.layers]
        assert point.complexity_baseline_by_layer == pytest.approx(baseline, abs=1e-6)
        assert point.expressivity_baseline_by_layer == point.complexity_baseline_by_layer
        for side, labels in (("complexity", plane.inputs), ("expressivity", plane.outputs)):
            local = [
                bf.mutual_information(layer[kept], [labels[i] for i in kept]) - far_away
                for layer, far_away in zip(table.layers, baseline, strict=True)
            ]
            assert getattr(point, f"{side}_local_by_layer") == pytest.approx(local, abs=1e-6)
            assert getattr(point, f"{side}_local") == pytest.approx(fmean(local), abs=1e-6)
            scaled = (getattr(plane, side) - fmean(baseline)) / (1 - fmean(baseline) / table.ceiling)
            assert getattr(point, f"{side}_scaled") == pytest.approx(scaled, abs=1e-5)
        assert point.num_positions_local == len(kept)


@pytest.mark.parametrize(
    ("lengths", "keywords"),
    [([40] * 8 + [60] * 3, {}), ([60] * 4, {"baseline": False}), ([60] * 4, {"weighting": "uniform"})],
    ids=["over half of the positions would be lost", "not wanted", "uniform weights"],
)
def test_none_where_there_is_none(lengths, keywords):
    model = llama(max_position_embeddings=128).eval()
    point = ib.measure(model, probe_of(lengths), orders="token", num_bins=BINS, **keywords)["token"]
    names = [name for name in vars(point) if "baseline" in name or "local" in name or "scaled" in name]
    assert {getattr(point, name) or None for name in names} == {None}


def test_documents_of_sixty_tokens_are_enough_at_four_grams():
    positions = valid_positions(np.ones((3, 60), bool), 4)
    assert len(long_enough(positions)) == len(positions) == 3 * 53
    assert FEWEST <= 53


class Planted(nn.Module):
    """States made of what a function of the ids says, through an embedding: no context but that."""

    def __init__(self, code) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed = nn.Embedding.from_pretrained(4 * torch.randn(VOCABULARY, DIM, generator=generator))
        self.layer = nn.Identity()
        self.code = code

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embed(self.code(input_ids)))


def measure_planted(code, probe: ib.Probe) -> ib.Measurement:
    return ib.measure(Planted(code), probe, orders="token", layers=["layer"], num_bins=BINS, standard_errors=True)


def documents(number: int = 48, length: int = 64) -> ib.Probe:
    """Each draws its tokens from six of its own."""
    drawn = torch.randint(0, 6, (number, length), generator=torch.Generator().manual_seed(6))
    return ib.Probe.from_tokens((3 * torch.arange(number)[:, None] + drawn) % VOCABULARY)


def test_states_that_say_which_document_it_is_have_no_local_information():
    point = measure_planted(lambda ids: ids.sum(1, keepdim=True).expand_as(ids) % VOCABULARY, documents())["token"]
    for side in ("complexity", "expressivity"):
        # Shifted labels of a document are the same ones, so that it is nothing at all for one of both sides.
        assert abs(getattr(point, f"{side}_local")) <= 3 * getattr(point, f"{side}_local_se")
        assert getattr(point, f"{side}_document") > 4 * getattr(point, f"{side}_document_se")
        plain, null = getattr(point, side), getattr(point, f"{side}_null")
        assert getattr(point, f"{side}_document") == pytest.approx(plain - null, abs=0.01)
    assert point.optimality_local is None
    assert point.optimality > 0.9, "which looks like the best of models"


def test_states_that_say_the_token_alone_have_all_of_it():
    generator = torch.Generator().manual_seed(2)
    probe = ib.Probe.from_tokens(torch.randint(0, 24, (48, 64), generator=generator))
    point = measure_planted(lambda ids: ids, probe)["token"]
    assert point.complexity_local == pytest.approx(point.complexity - point.complexity_null, abs=0.01)
    assert point.complexity_local > 20 * point.complexity_local_se
    assert abs(point.complexity_document) < 0.01
    assert abs(point.expressivity_local) < 4 * point.expressivity_local_se
    assert abs(point.optimality_local) < 0.05


def test_the_parts_add_up():
    point = measure_planted(lambda ids: (ids + ids[:, :1]) % VOCABULARY, documents())["token"]
    for side in ("complexity", "expressivity"):
        parts = [getattr(point, f"{side}_{part}") for part in ("null", "document", "local")]
        assert sum(parts) == pytest.approx(getattr(point, side), abs=1e-12)


def test_a_contrast_does_not_see_what_only_document_and_token_say_together():
    """The state says whether document and token are alike in parity: who knows the document knows that of the token."""
    rows = torch.randint(8, 24, (48, 64), generator=torch.Generator().manual_seed(2))
    rows[:, 0] = 8 + torch.arange(48) % 16  # as many even documents as odd ones
    point = measure_planted(lambda ids: (ids + ids[:, :1]) % 2, ib.Probe.from_tokens(rows))["token"]
    assert abs(point.complexity_local) < 4 * point.complexity_local_se
    within = measure_planted(lambda ids: ids % 2, ib.Probe.from_tokens(rows))["token"]
    assert within.complexity_local > 50 * abs(point.complexity_local), "as much as of one and the same document"
