"""Which labels a feature has, and which null: by whole sequences, by swapped pairs, or by positions."""

import numpy as np
import pytest
import torch
from tiny_models import make_probe

import ib_callback as ib
from ib_callback.measuring.planner import make_plan
from ib_callback.measuring.quantities.features import Feature, feature_labels
from ib_callback.probe.ngrams import valid_positions

ORDERS = {"token": 1, "bigram": 2}


def planned(labels, *, null=True):
    probe = make_probe(labels={"feature": labels})
    plan = make_plan(probe, ORDERS, ("feature",), batch_size=4, null=null, seed=0)
    (feature,) = (quantity for quantity in plan.quantities if isinstance(quantity, Feature))
    return plan, feature


def test_feature_without_a_labelled_valid_position():
    labels = torch.full((10, 16), -1)
    labels[:, 0] = 1  # no position of order 2 begins there
    with pytest.raises(ib.ProbeError, match="feature 'feature': expected labels"):
        planned(labels)


def test_labels_of_sequences_are_permuted_and_those_of_positions_drawn():
    of_sequence = torch.arange(10)[:, None].expand(10, 16) % 2
    plan, feature = planned(of_sequence)
    assert feature.permutations.kept.shape == (101, 2)
    assert feature.null is None
    assert feature.permutations.count.sum(1).tolist() == [plan.num_positions] * 101
    of_position = torch.arange(16).expand(10, 16) % 2
    plan, feature = planned(of_position)
    assert feature.permutations is None
    assert plan.nulls[feature.null.number] is feature.null
    # Every labelled position alone is where the null's curve begins.
    assert plan.label_sets[feature.number + 1].name == ("single", "feature")
    assert plan.label_sets[feature.number + 1].num_labels == plan.num_positions


def test_without_nulls_only_the_labels_are_planned_for():
    plan, feature = planned(torch.arange(16).expand(10, 16) % 2, null=False)
    assert (feature.permutations, feature.null, plan.nulls) == (None, None, ())
    assert len(plan.label_sets) == 5


def test_labels_are_renumbered():
    table = np.full((2, 8), 7)
    table[1] = 3
    table[0, 4] = -1
    positions = valid_positions(np.ones((2, 8), bool), 1)
    labels = feature_labels("feature", table, positions, seed=0)
    assert labels.num_labels == 2
    assert labels.values.tolist() == [1, 1, 1, 1, -1, 1, 1] + [0] * 7
