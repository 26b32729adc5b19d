"""The published corrections of information for small samples, against what is planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import entropy

import _comparators
import ib_callback as ib

LABELS, BINS, POSITIONS = 40, 20, 1200


def planted(share: float) -> tuple[torch.Tensor, np.ndarray, float]:
    """Hard assignments [T, 1, n] that say something of their labels [T], and how much; efficiency.

    share: of positions whose bin depends on the label.
    """
    generator = np.random.RandomState(3)
    given = share * generator.dirichlet(np.full(BINS, 0.5), LABELS) + (1 - share) / BINS
    truth = (entropy(given.mean(0)) - entropy(given, axis=1).mean()) / np.log(BINS)
    labels = generator.randint(LABELS, size=POSITIONS)
    bins = [generator.choice(BINS, p=given[label]) for label in labels]
    return torch.eye(BINS, dtype=torch.float64)[bins][:, None], labels, float(truth)


def test_information_is_that_of_the_package() -> None:
    z, labels = torch.randn(50, 2, 8, dtype=torch.float64), torch.arange(50) % 7
    tables = torch.stack([ib.soft_assign(part, ib.reference_points(8, 10).double(), 0.1) for part in z.unbind(1)], 1)
    found = _comparators.information(tables, labels.numpy())
    for part, value in zip(z.unbind(1), found, strict=True):
        wanted = ib.soft_mutual_information(part, labels, num_bins=10, temperature=0.1)
        assert value == pytest.approx(float(wanted), abs=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_corrections_come_near_the_planted_information(share: float) -> None:
    tables, labels, truth = planted(share)
    plain, _ = _comparators.curves(tables, labels)
    found = _comparators.shuffle_corrections(tables, [labels, labels], {"last": 0, "mean": None})
    assert found["last/ssr/complexity"] == found["mean/ssr/complexity"] == found["last/ssr/expressivity"]
    assert plain[-1, 0] > truth + 0.05
    assert found["last/ssr/complexity"] == pytest.approx(truth, abs=0.03)
    assert found["last/bae/complexity"] == pytest.approx(truth, abs=0.03)


def test_extrapolation_finds_the_limit_of_its_own_curve() -> None:
    t = np.array(_comparators.SHARES)
    limit, fit = _comparators.bounded_extrapolation(0.2 + 0.5 / (1 + 3 * t))
    assert limit == pytest.approx(0.2, abs=1e-6)
    assert fit == pytest.approx(1.0, abs=1e-9)


def test_a_fixed_ratio_of_biases_is_taken_off() -> None:
    shuffled = np.array([0.6, 0.3])
    assert _comparators.scaled_shuffle_reduction(0.1 + 0.8 * shuffled, shuffled) == pytest.approx(0.1)
