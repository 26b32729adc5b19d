"""The null from random subsets, against permutations of real labels."""

import numpy as np
import pytest
import torch

from ib_callback.estimator.histogram import divergence, entropy
from ib_callback.measuring.plan.null import LabelCounts, SubsetCurve, design_subsets


def permutation_nulls(p, labels, repeats):
    """Information of permuted labels, by its definition."""
    random = np.random.RandomState(9)
    values = []
    total = float(entropy(p.sum(0)))
    for _ in range(repeats):
        shuffled = random.permutation(labels)
        conditional = 0.0
        for label in np.unique(labels):
            members = p[torch.from_numpy(np.flatnonzero(shuffled == label))]
            conditional += len(members) / len(p) * float(entropy(members.sum(0)))
        values.append(total - conditional)
    return np.array(values)


def curve_of(p, design):
    whole = p.sum(0)
    subsets = torch.stack([p[torch.from_numpy(s)].sum(0) for s in design.subsets])
    parts = [p[torch.from_numpy(part)].sum(0) for part in design.parts]
    unions = torch.from_numpy(design.unions) @ torch.stack(parts) if parts else torch.zeros(0, p.shape[1])
    single = float(entropy(whole) - entropy(p).mean())
    return SubsetCurve.estimate(design, divergence(subsets, whole).numpy(), divergence(unions, whole).numpy(), single)


@pytest.mark.parametrize("num_positions", [300, 6000])  # direct subsets only; unions of a partition as well
def test_null_is_that_of_permuted_labels_within_its_error(num_positions):
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(3 * torch.randn(num_positions, 20, generator=generator, dtype=torch.float64), -1)
    # A Zipf-like labelling: a few labels hold much, many occur once.
    labels = np.minimum(np.random.RandomState(1).zipf(1.5, num_positions), num_positions)
    counts = LabelCounts.of(np.unique(labels, return_counts=True)[1])
    design = design_subsets(num_positions, [counts], seed=0)
    assert bool(design.parts) == (num_positions == 6000)
    null, error = curve_of(p, design).null(counts)
    truth = permutation_nulls(p, labels, 60)
    assert error < 0.002
    assert abs(null - truth.mean()) < 4 * np.hypot(error, truth.std(ddof=1) / np.sqrt(60))


@pytest.mark.parametrize("num_positions", [30, 1000, 2100])  # direct subsets only; unions of a partition as well
def test_its_error_is_how_far_other_subsets_would_lead(num_positions):
    # In few directions, where subsets with positions in common, and those that leave no position out, are most alike.
    generator = torch.Generator().manual_seed(6)
    scores = torch.randn(num_positions, 3, generator=generator, dtype=torch.float64)
    p = torch.softmax(0.4 * scores @ torch.randn(3, 20, generator=generator, dtype=torch.float64), -1)
    zipf = num_positions / np.arange(1, num_positions)
    labellings = [
        np.full(2, num_positions // 2),
        np.full(4, num_positions // 4),
        (zipf[:59] / 4.66).astype(int),
        np.maximum(zipf[: num_positions // 3] / 7, 1).astype(int),
    ]
    counts = [LabelCounts.of(labels[labels > 0]) for labels in labellings]
    curves = [curve_of(p, design_subsets(num_positions, counts, seed)) for seed in range(80)]
    nulls, errors = np.array([[curve.null(each) for each in counts] for curve in curves]).transpose(2, 1, 0)
    ratio = nulls.std(axis=1, ddof=1) / np.sqrt((errors**2).mean(1))
    assert ratio == pytest.approx(1, abs=0.2), "that of 80 seeds is known to 8 %"


def test_labels_that_occur_once_or_cover_everything_are_exact():
    p = torch.softmax(torch.randn(50, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64), -1)
    once = LabelCounts.of(np.ones(50, int))
    everything = LabelCounts.of(np.array([50]))
    curve = curve_of(p, design_subsets(50, [once, everything], seed=0))
    exact = float(entropy(p.sum(0)) - entropy(p).mean())
    assert curve.null(once) == (pytest.approx(exact, abs=1e-12), 0.0)
    assert curve.null(everything) == (pytest.approx(0.0, abs=1e-12), 0.0)


def test_spread_of_null_is_near_that_of_permutations():
    p = torch.softmax(2 * torch.randn(600, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64), -1)
    labels = np.random.RandomState(4).randint(0, 12, 600)
    counts = LabelCounts.of(np.bincount(labels))
    spread = curve_of(p, design_subsets(600, [counts], seed=0)).spread_of_null(counts)
    truth = permutation_nulls(p, labels, 100).std(ddof=1)
    assert 0.7 * truth < spread < 4 * truth  # stated as an upper estimate


def test_label_counts_are_shares_of_positions():
    counts = LabelCounts.of(np.array([1, 3, 1, 5]))
    assert counts.count.tolist() == [1, 3, 5]
    assert counts.share.tolist() == [0.2, 0.3, 0.5]


def test_design_is_reproducible_and_leaves_numpys_global_state_alone():
    state = np.random.get_state()[1].copy()
    counts = [LabelCounts.of(np.array([1, 2, 5, 40]))]
    first, second = design_subsets(48, counts, seed=5), design_subsets(48, counts, seed=5)
    assert all(np.array_equal(a, b) for a, b in zip(first.subsets, second.subsets, strict=True))
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    for subset in first.subsets:
        assert len(np.unique(subset)) == len(subset)  # without replacement
