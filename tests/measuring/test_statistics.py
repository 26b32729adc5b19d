"""What is said of a probe without a model: counted by hand, and the null beside random states."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from ib_callback import Probe, ProbeError, soft_mutual_information
from ib_callback.measuring.plan.null import LabelCounts
from ib_callback.measuring.planner import make_plan
from ib_callback.measuring.statistics import isotropic_null, probe_statistics


def made_probe() -> Probe:
    random = np.random.RandomState(0)
    ids = random.randint(0, 5, (12, 20))
    mask = np.arange(20) < random.randint(9, 21, 12)[:, None]
    half = np.arange(12)[:, None] % 2 + np.zeros_like(ids)
    by_position = np.where(random.random_sample(ids.shape) < 0.5, random.randint(2, 5, ids.shape), -1)
    labels = {"preference": half, "language": half // 1 * 3, "pos": by_position}
    names = {"language": ["de", "en", "fr", "it"]}
    return Probe.from_tokens(ids, mask, labels=labels, label_names=names)


def by_hand(probe: Probe) -> dict[tuple[str, int], Counter]:
    """Counter of the n-grams before and after each valid position."""
    counted: dict[tuple[str, int], Counter] = {}
    for ids, mask in zip(probe.input_ids.tolist(), probe.attention_mask.tolist(), strict=True):
        length = sum(mask)
        for s in range(3, length - 4):
            for order in (1, 2, 3, 4):
                counted.setdefault(("before", order), Counter())[tuple(ids[s - order + 1 : s + 1])] += 1
                counted.setdefault(("after", order), Counter())[tuple(ids[s + 1 : s + 1 + order])] += 1
    return counted


def test_labels_of_the_orders() -> None:
    probe = made_probe()
    statistics = probe_statistics(probe, dim=16)
    counted = by_hand(probe)
    assert statistics.num_positions == counted["before", 1].total()
    for order, (name, sides) in enumerate(statistics.orders.items(), 1):
        assert name == ("token", "bigram", "trigram", "quadgram")[order - 1]
        for side, found in zip(("before", "after"), sides, strict=True):
            counts = counted[side, order]
            once = sum(count == 1 for count in counts.values())
            assert (found.labels, found.singletons) == (len(counts), once)
            assert found.singleton_share == pytest.approx(once / statistics.num_positions)
            assert 0 <= found.expected_null <= 1


def test_labels_of_features() -> None:
    probe = made_probe()
    features = probe_statistics(probe, dim=16).features
    valid = np.zeros(probe.input_ids.shape, bool)
    for row, length in enumerate(probe.attention_mask.sum(1).tolist()):
        valid[row, 3 : length - 4] = True
    language = probe.labels["language"].numpy()
    assert features["language"].counts == {
        "de": (6, int((valid & (language == 0)).sum())),
        "it": (6, int((valid & (language == 3)).sum())),
    }
    assert list(features["preference"].counts) == ["0", "1"]
    pos = probe.labels["pos"].numpy()
    for number in (2, 3, 4):
        here = pos == number
        assert features["pos"].counts[str(number)] == (int(here.any(1).sum()), int((valid & here).sum()))
    assert features["language"].null == "permuted by whole sequences"
    assert features["preference"].null.startswith("swapped within pairs: only 6 pairs. About 256 are needed")
    assert features["pos"].null == "labels vary within sequences: permuted over positions"


def test_a_feature_that_no_valid_position_carries() -> None:
    labels = {"edge": [[1] + [-1] * 9], "middle": [[1] * 10]}
    features = probe_statistics(Probe.from_tokens([[*range(10)]], labels=labels), dim=16).features
    assert features["edge"].counts == {}
    assert "cannot be measured" in features["edge"].null
    assert features["middle"].counts == {"1": (1, 3)}


def test_a_probe_without_valid_positions_is_refused() -> None:
    with pytest.raises(ProbeError, match=r"no valid position\. Expected sequences of at least 8 real tokens"):
        probe_statistics(Probe.from_tokens([[1, 2, 3]]))


def test_memory_is_that_of_the_plan() -> None:
    probe = made_probe()
    orders = {"token": 1, "bigram": 2, "trigram": 3, "quadgram": 4}
    plan = make_plan(probe, orders, tuple(probe.labels), batch_size=5, null=True, seed=0)
    assert probe_statistics(probe, num_layers=7, num_bins=30, batch_size=5).memory == plan.memory(7, 30)


@pytest.mark.parametrize(
    "sizes", [[1] * 600, [2] * 300, [600], [300, 300], [1] * 100 + [5] * 40 + [100, 200], [60] * 10]
)
def test_the_expected_null_is_what_random_states_reach(sizes: list[int]) -> None:
    dim, bins, repeats = 24, 20, 12
    random = np.random.RandomState(1)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    reached = []
    for _ in range(repeats):
        z = torch.from_numpy(random.standard_normal((len(labels), dim)))
        reached.append(float(soft_mutual_information(z, torch.from_numpy(labels), num_bins=bins)))
    expected = isotropic_null(LabelCounts.of(np.array(sizes)), len(labels), dim=dim, num_bins=bins)
    assert expected == pytest.approx(np.mean(reached), abs=0.006)
