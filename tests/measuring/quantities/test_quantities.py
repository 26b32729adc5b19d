"""Every quantity of the table, as the Meter measures it, against its definition, and what must not matter."""

from __future__ import annotations

import brute_force as bf
import numpy as np
import pytest
import quantities as q
import torch
from tiny_models import llama, make_probe

import ib_callback as ib
from ib_callback.results.metrics import FEATURE, PLANE

ORDERS = ("token", "bigram")
SETTINGS = {"orders": ORDERS, "num_bins": 20, "standard_errors": 5, "batch_size": 3}
PROBE = make_probe(highest=8)
MODEL = llama().eval()
MODEL.lm_head.weight.data *= 50  # or its predictions were all alike
CHANCE = [x.chance for x in (*PLANE, *FEATURE)]
# Random subsets of positions estimate them.
ESTIMATED = [x.name for x in PLANE if x.kind in ("baseline", "error")]
FROM_ESTIMATES = [x.name for x in (*PLANE, *FEATURE) if "above_null" in x.name or x.name in CHANCE]


def labelled(ids: torch.Tensor, mask: torch.Tensor) -> ib.Probe:
    """The label is the parity of a token, which a renaming of tokens must keep."""
    return ib.Probe.from_tokens(ids, mask, labels={"parity": torch.where(mask, ids % 2, -1)})


@pytest.fixture(scope="module")
def measured() -> ib.Measurement:
    return ib.measure(MODEL, labelled(PROBE.input_ids, PROBE.attention_mask), features=("parity",), **SETTINGS)


@pytest.fixture(scope="module")
def table() -> bf.Table:
    ids, mask = PROBE.input_ids, PROBE.attention_mask
    with torch.no_grad():
        states = MODEL(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states[1:]
    labels = {"parity": np.where(mask.numpy(), ids.numpy() % 2, -1)}
    hidden = [state.double().numpy() for state in states]
    return bf.evaluate(hidden, ids.numpy(), mask.numpy(), orders=ORDERS, features=labels, num_bins=20)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("quantity", PLANE, ids=lambda quantity: quantity.name)
def test_of_the_plane(measured, table, order, quantity):
    point, plane = measured[order], table.orders[order]
    sums = {name: getattr(point, name) for name in ESTIMATED}
    sums |= {"complexity": plane.complexity, "expressivity": plane.expressivity, "bound": plane.complexity}
    value, expected = getattr(point, quantity.name), q.expected_of(quantity.name, sums)
    if expected is None:
        assert value is None
    else:
        # A ratio above null may divide by little.
        assert value == pytest.approx(expected, abs=1e-6, rel=1e-4 if quantity.name in FROM_ESTIMATES else 0)
    if quantity.kind == "baseline":
        labels = plane.inputs if quantity.name.startswith("complexity") else plane.outputs
        null = bf.permutation_null(table.layers, labels, repeats=100)
        assert value == pytest.approx(null.mean, abs=0.006)


def test_nulls_and_ceiling_by_layer(measured, table):
    ceilings = [bf.ceiling(layer) for layer in table.layers]
    assert measured.ceiling_by_layer == pytest.approx(ceilings, abs=1e-6)
    for order in ORDERS:
        point, plane = measured[order], table.orders[order]
        for side, labels in (("complexity", plane.inputs), ("expressivity", plane.outputs)):
            by_layer = getattr(point, f"{side}_null_by_layer")
            for layer, null in zip(table.layers, by_layer, strict=True):
                assert null == pytest.approx(bf.permutation_null([layer], labels, repeats=100).mean, abs=0.008)
            assert np.mean(by_layer) == pytest.approx(getattr(point, f"{side}_null"), abs=1e-3)


@pytest.mark.parametrize("quantity", FEATURE, ids=lambda quantity: quantity.name)
def test_of_a_feature(measured, table, quantity):
    point, feature = measured.features["parity"], table.features["parity"]
    sums = {x.name: getattr(point, x.name) for x in FEATURE if x.kind == "measured"}
    sums |= {"information": feature.information, "complexity": table.orders["token"].complexity}
    sums |= {name: getattr(measured["token"], name) for name in ("complexity_above_null", "complexity_null_se")}
    expected = q.FEATURE[quantity.name](sums)
    value = getattr(point, quantity.name)
    # A ratio above null may divide by little.
    relative = 1e-4 if quantity.name in FROM_ESTIMATES else 0
    assert value == (None if expected is None else pytest.approx(expected, abs=1e-6, rel=relative))


def test_the_order_of_sequences_does_not_matter(measured):
    # Backwards: the same groups of neighbours.
    turned = labelled(PROBE.input_ids.flip(0), PROBE.attention_mask.flip(0))
    again = ib.measure(MODEL, turned, features=("parity",), **SETTINGS)
    estimated = [*ESTIMATED, *FROM_ESTIMATES, *(f"{name}_se" for name in FROM_ESTIMATES)]
    q.assert_same(again, measured, tolerance=1e-6, but=[*estimated, "information_null", "information_null_std"])
    for order in ORDERS:
        for name in ("complexity_null", "expressivity_null"):
            assert getattr(again[order], name) == pytest.approx(getattr(measured[order], name), abs=0.008)


def test_the_names_of_tokens_do_not_matter(measured):
    renamed = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    name_of = torch.stack([2 * renamed, 2 * renamed + 1], dim=1).flatten()  # keeps the parity
    other = llama().eval()
    with torch.no_grad():
        other.get_input_embeddings().weight[name_of] = MODEL.get_input_embeddings().weight
        other.get_output_embeddings().weight[name_of] = MODEL.get_output_embeddings().weight
    probe = labelled(name_of[PROBE.input_ids], PROBE.attention_mask)
    q.assert_same(ib.measure(other, probe, features=("parity",), **SETTINGS), measured, tolerance=1e-6)


def test_batches_do_not_matter(measured):
    probe = labelled(PROBE.input_ids, PROBE.attention_mask)
    other = ib.measure(MODEL, probe, features=("parity",), **SETTINGS | {"batch_size": 10})
    q.assert_same(other, measured, tolerance=1e-6)
