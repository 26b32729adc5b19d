"""Increments of a model: those of the measured orders, found where there is something to find."""

from __future__ import annotations

import itertools
import statistics

import brute_force as bf
import pytest
import torch
from tiny_hf import tiny_model, tiny_probe

import ib_callback as ib
from ib_callback.measuring.increments import mean_increments, ngram_labels

BINS = 8


@pytest.mark.parametrize(("side", "quantity"), [("preceding", "complexity"), ("trailing", "expressivity")])
def test_of_a_model_it_is_the_difference_between_two_measured_orders_by_layer(side, quantity):
    model = tiny_model()
    measured = ib.Meter(tiny_probe(), num_bins=BINS).measure(model)
    meter = ib.Meter(tiny_probe(), num_bins=BINS, batch_size=5, memory_budget=1)  # a pass for each layer
    found = ib.model_increments(meter, model, "token", "trigram", side=side, num_permutations=3)
    assert list(found) == list(measured.layers)
    by_layer = [getattr(measured[order], f"{quantity}_by_layer") for order in ("token", "trigram")]
    for increment, narrow, wide in zip(found.values(), *by_layer, strict=True):
        assert increment.information == pytest.approx(wide - narrow, abs=1e-6)


def test_what_a_bigram_of_a_model_adds_is_found_and_what_it_cannot_add_is_not():
    class Sees(torch.nn.Module):
        """Each state is an embedding of the token, and with `link` also of the token before."""

        def __init__(self, link):
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.table = torch.nn.Embedding.from_pretrained(torch.randn(6, 16, generator=generator))
            self.layer = torch.nn.Identity()
            self.link = link

        def forward(self, input_ids, attention_mask):
            noise = torch.randn(*input_ids.shape, 16, generator=torch.Generator().manual_seed(1))
            before = torch.roll(self.table(input_ids), 1, dims=1)
            return self.layer(self.table(input_ids) + self.link * before + 0.3 * noise)

    ids = torch.randint(0, 6, (20, 24), generator=torch.Generator().manual_seed(2))
    meter = ib.Meter(
        ib.Probe.from_tokens(ids), num_bins=BINS, layers=["layer"], orders=("token", "bigram"), batch_size=20
    )
    (without,) = ib.model_increments(meter, Sees(0.0), num_permutations=19).values()
    (with_link,) = ib.model_increments(meter, Sees(0.7), num_permutations=19).values()
    (within,) = ib.model_increments(meter, Sees(0.7), num_permutations=19, within_sequences=True).values()
    assert without.p_value > 0.05
    assert with_link.p_value == within.p_value == 0.05
    assert with_link.information == within.information
    assert with_link.z_score > 5


def test_the_mean_over_layers_is_that_of_what_each_layer_gives():
    model, meter = tiny_model(), ib.Meter(tiny_probe(), num_bins=BINS, orders=("token", "trigram", "bigram"))
    found = mean_increments(meter, model, num_permutations=5)
    sides = {"complexity": "preceding", "expressivity": "trailing"}
    assert [*found] == [*sides]
    assert all([*orders] == ["bigram", "trigram"] for orders in found.values())
    for quantity, (narrow, wide) in itertools.product(sides, [("token", "bigram"), ("bigram", "trigram")]):
        tested = found[quantity][wide]
        by_layer = ib.model_increments(meter, model, narrow, wide, side=sides[quantity], num_permutations=5)
        assert tested.narrower == narrow
        assert tested.information == pytest.approx(statistics.fmean(i.information for i in by_layer.values()), abs=1e-9)
        assert tested.null == pytest.approx(statistics.fmean(i.null for i in by_layer.values()), abs=1e-9)
        assert {tested.num_positions} == {i.num_positions for i in by_layer.values()}
        assert tested.null_std <= statistics.fmean(i.null_std for i in by_layer.values()) + 1e-9


def test_the_mean_of_one_layer_is_that_layer():
    model = tiny_model()
    meter = ib.Meter(tiny_probe(), num_bins=BINS, layers=["transformer.h.1"], orders=("token", "bigram"))
    tested = mean_increments(meter, model, num_permutations=5)["expressivity"]["bigram"]
    (alone,) = ib.model_increments(meter, model, side="trailing", num_permutations=5).values()
    for name in ("information", "null", "null_std", "p_value", "num_permutations", "num_positions"):
        assert getattr(tested, name) == pytest.approx(getattr(alone, name), abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bigram", "token"), "wide: expected an order wider than narrow='bigram', got 'token'"),
        (("token", "5-gram"), "widest: expected '5-gram' or a wider order, got 'quadgram'"),
        (("token", "words"), "words"),
    ],
)
def test_orders_of_a_model_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        ib.model_increments(ib.Meter(tiny_probe(), num_bins=BINS), tiny_model(), *arguments)


# --- labels


def test_labels_of_a_probe_are_those_of_the_meter():
    ids = torch.randint(0, 3, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) < torch.tensor([[9], [7], [2], [8]])
    probe = ib.Probe.from_tokens(ids, mask)
    for side, label in (("preceding", bf.input_label), ("trailing", bf.output_label)):
        positions, labels = ngram_labels(probe, "bigram", side=side, widest="trigram")
        where = [tuple(row) for row in positions.tolist()]
        assert where == bf.valid_positions(mask.numpy(), 3)
        expected = [label(ids.numpy(), position, 2) for position in where]
        # The same partition: equal numbers where and only where contexts are equal.
        assert [[a == b for b in expected] for a in expected] == [[a == b for b in labels] for a in labels.tolist()]


def test_bad_requests_for_labels():
    probe = ib.Probe.from_tokens(torch.arange(4).view(1, 4))
    with pytest.raises(ValueError, match='side: expected "preceding" or "trailing"'):
        ngram_labels(probe, "token", side="left")
    with pytest.raises(ValueError, match="widest: expected 'bigram' or a wider order, got 'token'"):
        ngram_labels(probe, "bigram", widest="token")
    with pytest.raises(ib.ProbeError, match="no valid position"):
        ngram_labels(probe, "token", widest="trigram")
