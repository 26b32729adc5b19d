"""Information corrected for chance: its formula, where it is undefined, and that it finds a known truth."""

from __future__ import annotations

import dataclasses

import brute_force as bf
import numpy as np
import pytest

import ib_callback as ib
from ib_callback.results.points import PlanePoint
from ib_callback.results.uncertainty import adjusted, adjusted_information

NULLS = {"complexity_null": 0.2, "expressivity_null": 0.1, "complexity_null_se": 0.001, "expressivity_null_se": 0.001}


def measured(ceiling=0.8, **changes):
    return ib.Measurement(
        step=0, entropy=0.9, ceiling=ceiling, features={}, layers=("h.0",), entropy_by_layer=(0.9,), num_positions=9,
        seconds=0.1, settings={"primary": "token"},
        orders={"token": PlanePoint.from_layers([0.5], [0.3], **NULLS | changes)},
    )  # fmt: skip


def test_it_solves_plain_for_the_truth():
    truth, null, ceiling = 0.3, 0.2, 0.8
    plain = truth + null * (1 - truth / ceiling)
    assert adjusted_information(plain, null, ceiling) == pytest.approx(truth)
    assert adjusted_information(null, null, ceiling) == 0.0
    assert adjusted_information(ceiling, null, ceiling) == pytest.approx(ceiling)


@pytest.mark.parametrize(("null", "ceiling"), [(0.75, 0.8), (0.8, 0.8), (0.0, 0.0)])
def test_undefined_where_nearly_every_label_occurs_once(null, ceiling):
    assert adjusted_information(0.79, null, ceiling) is None


def test_of_a_measurement():
    point = adjusted(measured())
    assert point.complexity == pytest.approx(0.3 / 0.75)
    assert point.expressivity == pytest.approx(0.2 / 0.875)
    assert point.optimality == pytest.approx(0.2 / 0.875 / 0.4)
    assert point.distance == pytest.approx(0.4 - 0.2 / 0.875)
    # No ratio where what is above the null is within its error.
    assert adjusted(measured(complexity_null=0.499)).optimality is None
    assert adjusted(measured(ceiling=0.21)) == ib.Adjusted(None, pytest.approx(0.2 / (1 - 0.1 / 0.21)), None, None)


def test_it_needs_nulls():
    bare = dataclasses.replace(measured(), orders={"token": PlanePoint.from_layers([0.5], [0.3])})
    for measurement in (bare, measured(ceiling=None)):
        with pytest.raises(ValueError, match="expected a measurement with nulls; use null=True"):
            adjusted(measurement)
    with pytest.raises(KeyError, match="'bigram' was not measured"):
        adjusted(measured(), "bigram")


def test_truth_is_nearer_than_plain_and_above_null():
    """300 labels, 900 positions: assignments are softmaxes of normal scores, and the truth is that of many draws."""
    draw = np.random.default_rng(0)
    bins, kinds = 10, 300
    vectors = draw.normal(size=(kinds, bins))

    def assign(labels):
        p = np.exp(vectors[labels] + draw.normal(size=(len(labels), bins)))
        return p / p.sum(1, keepdims=True)

    given = np.array([assign(np.full(2000, label)).mean(0) for label in range(kinds)])
    truth = bf.efficiency(given.mean(0)) - np.mean([bf.efficiency(row) for row in given])
    labels = draw.integers(kinds, size=900)
    p = assign(labels)
    plain, ceiling = bf.mutual_information(p, labels.tolist()), bf.ceiling(p)
    null = bf.permutation_null([p], labels.tolist(), repeats=30).mean
    value = adjusted_information(plain, null, ceiling)
    assert abs(value - truth) < 0.08 * truth < 0.2 * truth < min(plain - truth, truth - (plain - null))
