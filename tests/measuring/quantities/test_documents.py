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
from ib_callback.measuring.quantities.documents import FEWEST, NEAREST, linear_shift, long_enough, shift
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


@pytest.mark.parametrize("offset", [16, 20, "half"])
@pytest.mark.parametrize("lengths", [[60] * 4, [52, 90, 51, 64, 200]])
def test_a_linear_shift_pairs_positions_at_one_distance(lengths, offset):
    sequences = np.repeat(np.arange(len(lengths)), lengths)
    places, partners = linear_shift(sequences, offset)
    assert (sequences[places] == sequences[partners]).all()
    assert (np.diff(places) > 0).all()
    for number, length in enumerate(lengths):
        distance = (partners - places)[sequences[places] == number]
        wanted = length // 2 if offset == "half" else offset
        assert distance.tolist() == [wanted] * (length - wanted), "all pairs that there are"


@pytest.mark.parametrize("lengths", [[60] * 6, [60, 30, 70, 55, 20, 60]], ids=["all", "short ones left out"])
@pytest.mark.parametrize("keywords", [{}, {"baseline": "linear", "baseline_offset": 18}], ids=["circular", "linear"])
def test_by_loops_over_positions(lengths, keywords):
    probe = probe_of(lengths)
    model = llama(max_position_embeddings=128).eval()
    measured = ib.measure(model, probe, orders=ORDERS, num_bins=BINS, batch_size=4, standard_errors=3, **keywords)
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
    sequences = np.array([table.positions[i][0] for i in kept])
    pairs = linear_shift(sequences, 18) if keywords else (np.arange(len(kept)), shift(sequences, seed=0))
    offset = {
        sequences[i]: table.positions[kept[j]][1] - table.positions[kept[i]][1] for i, j in zip(*pairs, strict=True)
    }
    first = {b: min(s for other, s in table.positions if other == b) for b in offset}
    if keywords:
        kept = [i for i in kept if table.positions[i][1] - first[(b := table.positions[i][0])] + 18 < number[b]]
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


def test_a_linear_shift_stands_in_the_settings():
    model, probe = llama(max_position_embeddings=128).eval(), probe_of([60] * 4)
    found = {}
    for baseline in (True, "circular", "linear"):
        point = ib.measure(model, probe, orders="token", num_bins=BINS, baseline=baseline)
        found[baseline] = {name: value for name, value in point.settings.items() if name.startswith("baseline")}
    assert found == {True: {}, "circular": {}, "linear": {"baseline": "linear", "baseline_offset": 16}}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"baseline": "square"}, "baseline: expected True, False, 'circular' or 'linear', got 'square'"),
        ({"baseline_offset": 16}, 'baseline_offset: expected None unless baseline="linear", got 16'),
        ({"baseline": "circular", "baseline_offset": "half"}, "expected None unless baseline=\"linear\", got 'half'"),
        ({"baseline": "linear", "baseline_offset": 15}, "baseline_offset: expected .* 16.*15"),
        ({"baseline": "linear", "baseline_offset": "third"}, "baseline_offset: expected .*third"),
    ],
)
def test_shifts_that_there_are_not(keywords, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ib.Meter(probe_of([60] * 4), **keywords)


@pytest.mark.parametrize(
    ("lengths", "keywords"),
    [
        ([40] * 8 + [60] * 3, {}),
        ([60] * 4, {"baseline": "linear", "baseline_offset": 32}),
        ([60] * 4, {"baseline": False}),
        ([60] * 4, {"weighting": "uniform"}),
        ([60] * 4, {"weighting": "uniform", "baseline": "linear"}),
    ],
    ids=["short ones", "over half would be lost", "not wanted", "uniform weights", "uniform weights, linear"],
)
def test_none_where_there_is_none(lengths, keywords):
    model = llama(max_position_embeddings=128).eval()
    point = ib.measure(model, probe_of(lengths), orders="token", num_bins=BINS, **keywords)["token"]
    names = {name for name in vars(point) if "baseline" in name or "local" in name or "scaled" in name}
    assert {getattr(point, name) or None for name in names - {"num_positions_local"}} == {None}


def test_documents_of_sixty_tokens_are_enough_at_four_grams():
    positions = valid_positions(np.ones((3, 60), bool), 4)
    assert len(long_enough(positions)) == len(positions) == 3 * 53
    assert FEWEST <= 53
    measured = ib.measure(llama(max_position_embeddings=64).eval(), probe_of([60] * 4), num_bins=BINS)
    assert {point.num_positions_local for point in measured.orders.values()} == {4 * 53}
    assert None not in [point.complexity_local for point in measured.orders.values()]


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


def measure_planted(code, probe: ib.Probe, **keywords) -> ib.Measurement:
    keywords = {"orders": "token", "layers": ["layer"], "num_bins": BINS, "standard_errors": True} | keywords
    return ib.measure(Planted(code), probe, **keywords)


def above_permutations(code, probe: ib.Probe) -> dict[str, float]:
    """What planted states say beyond labels that are permuted over all positions, by loops."""
    ids = probe.input_ids
    with torch.no_grad():
        states = Planted(code)(ids, probe.attention_mask).double().numpy()
    table = bf.evaluate([states], ids.numpy(), probe.attention_mask.numpy(), orders=["token"], num_bins=BINS)
    plane = table.orders["token"]
    return {
        side: getattr(plane, side) - bf.permutation_null(table.layers, labels, repeats=12).mean
        for side, labels in (("complexity", plane.inputs), ("expressivity", plane.outputs))
    }


# Student's t of 15 degrees of freedom, 95 %.
REACH = 2.131


def holds_zero(point, name: str) -> bool:
    return abs(getattr(point, name)) <= REACH * getattr(point, f"{name}_se")


def documents(number: int = 48, length: int = 64) -> ib.Probe:
    """Each draws its tokens from six of its own."""
    drawn = torch.randint(0, 6, (number, length), generator=torch.Generator().manual_seed(6))
    return ib.Probe.from_tokens((3 * torch.arange(number)[:, None] + drawn) % VOCABULARY)


def test_states_that_say_which_document_it_is_have_no_local_information():
    def document(ids):
        return ids.sum(1, keepdim=True).expand_as(ids) % VOCABULARY

    probe = documents()
    point = measure_planted(document, probe)["token"]
    for side, truth in above_permutations(document, probe).items():
        assert holds_zero(point, f"{side}_local")
        assert getattr(point, f"{side}_document") == pytest.approx(truth, abs=3e-3)
        assert getattr(point, f"{side}_document") > 4 * getattr(point, f"{side}_document_se")
    assert point.optimality_local is None
    assert point.optimality > 0.9, "which looks like the best of models"


def test_states_that_say_the_token_alone_have_all_of_it():
    generator = torch.Generator().manual_seed(2)
    probe = ib.Probe.from_tokens(torch.randint(0, 24, (48, 64), generator=generator))
    point = measure_planted(lambda ids: ids, probe)["token"]
    truth = above_permutations(lambda ids: ids, probe)
    assert point.complexity_local == pytest.approx(truth["complexity"], abs=3e-3)
    assert point.complexity_local > 20 * point.complexity_local_se
    assert abs(point.complexity_document) < 3e-3
    assert holds_zero(point, "expressivity_local")
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


def measure_drift(code, first: torch.Tensor) -> tuple[float, list[float]]:
    """Local complexity, and with linear shifts by 16, 32, 64 and half of the length, of what has nothing local in it.

    Tokens are drawn from six, of which the first one, [N, S], moves on along the document; the state knows that one.
    """
    drawn = torch.randint(0, 6, first.shape, generator=torch.Generator().manual_seed(8))
    shifts = [{}, *({"baseline": "linear", "baseline_offset": offset} for offset in (16, 32, 64, "half"))]
    circular, *linear = (
        measure_planted(code, ib.Probe.from_tokens(drawn + first), **each)["token"].complexity_local for each in shifts
    )
    return circular, linear


def test_drift_that_is_alike_in_all_documents_is_local_by_a_circular_shift_and_not_by_a_linear_one():
    place = torch.arange(256)
    circular, linear = measure_drift(lambda ids: (place // 32).expand_as(ids), (24 * place // 256).expand(24, -1))
    assert circular > 0.2
    assert np.abs(linear).max() < 0.05 * circular


def test_where_each_document_drifts_on_its_own_a_linear_baseline_falls_with_the_offset():
    topics = torch.randint(0, 4, (24, 4), generator=torch.Generator().manual_seed(9)).repeat_interleave(64, 1)
    circular, linear = measure_drift(lambda ids: ids // 6, 6 * topics)
    assert 0 < linear[0] < 0.5 * circular
    assert linear[0] < linear[1] < linear[2]


def test_where_sequences_are_too_short_the_number_of_positions_says_why():
    probe = probe_of([30, 40, 25, 60])
    meter = ib.Meter(probe, orders=ORDERS, num_bins=BINS)
    model = llama(max_position_embeddings=128).eval()
    found = meter.measure(model)
    # Of the last sequence 57 positions are valid with bigrams: 60 tokens less one before and two behind.
    assert [found[order].num_positions_local for order in ORDERS] == [57, 57]
    assert found["token"].complexity_baseline is found["token"].complexity_local is None
    assert found["token"].complexity_local_by_layer == ()
    assert f"no local information (57 of {found.num_positions} positions have a label from far away)" in str(found)
    assert "local information uses 57 of the positions" in meter.preflight(model).describe()
    without = ib.measure(model, probe, orders=ORDERS, num_bins=BINS, baseline=False)
    assert without["token"].num_positions_local is None
    assert "local" not in str(without)
