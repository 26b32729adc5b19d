"""Increments between labels, against a loop over dictionaries and the chain rule."""

from __future__ import annotations

import brute_force as bf
import numpy as np
import pytest
import torch

from ib_callback.estimator.increment import information_increment

BINS = 8


def sample(number=160, seed=0, link=0.0, of_sequence=0.0):
    """States that depend on the narrow label, by `link` on the wide one, and by `of_sequence` on the sequence."""
    generator = torch.Generator().manual_seed(seed)
    narrow = torch.randint(0, 4, (number,), generator=generator)
    sequence = torch.arange(number) // 10
    wide = torch.randint(0, 3, (number,), generator=generator)
    if of_sequence:
        wide = sequence % 3  # clusters in sequences, which the states know
    z = torch.randn(4, 16, generator=generator)[narrow] + link * torch.randn(3, 16, generator=generator)[wide]
    z = z + of_sequence * torch.randn(number, 16, generator=generator)[sequence]
    return z + 0.5 * torch.randn(number, 16, generator=generator), narrow, wide, sequence


def test_increment_is_the_difference_of_informations_and_null_that_of_permuted_labels():
    z, narrow, wide, _ = sample(60, link=1.0)
    found = information_increment(z.double(), narrow, wide, num_bins=BINS, num_permutations=300)
    points = bf.reference_points(16, BINS, 0)
    rows = np.array([bf.soft_assignment(row.numpy(), points, bf.calibrated_temperature(16, BINS)) for row in z])
    n, w = narrow.tolist(), wide.tolist()
    of_narrow = bf.mutual_information(rows, n)
    assert found.information == pytest.approx(bf.mutual_information(rows, list(zip(n, w, strict=True))) - of_narrow)
    draw = np.random.default_rng(3)
    values = []
    for _ in range(300):
        permuted = list(w)
        for label in set(n):
            members = [i for i, x in enumerate(n) if x == label]
            for i, j in zip(members, draw.permutation(members), strict=True):
                permuted[i] = w[j]
        values.append(bf.mutual_information(rows, list(zip(n, permuted, strict=True))) - of_narrow)
    assert found.null == pytest.approx(np.mean(values), abs=5 * np.std(values) / np.sqrt(150))
    assert found.null_std == pytest.approx(np.std(values), rel=0.25)
    assert found.above_null == pytest.approx(found.information - found.null)
    assert found.z_score == pytest.approx(found.above_null / found.null_std)
    assert found.p_value == pytest.approx(1 / 301)
    assert found.num_positions == 60
    assert "60 positions count" in str(found)


def test_without_a_link_p_values_are_uniform():
    p = [information_increment(*sample(80, seed)[:3], num_bins=BINS, num_permutations=39).p_value for seed in range(60)]
    # 60 uniform values: the mean's standard deviation is 0.037.
    assert 0.38 < np.mean(p) < 0.64
    assert np.mean(np.array(p) <= 0.1) < 0.25


def test_within_sequences_what_they_share_does_not_count():
    z, narrow, wide, sequence = sample(160, of_sequence=1.0)
    plain = information_increment(z, narrow, wide, num_bins=BINS, num_permutations=39)
    assert plain.p_value == pytest.approx(1 / 40)  # a link through the sequence alone
    beyond = information_increment(z, narrow, wide, within=sequence, num_bins=BINS, num_permutations=39)
    assert beyond.num_positions == 0  # one wide label a sequence: nothing can be told apart
    assert (beyond.z_score, beyond.p_value, beyond.above_null) == (None, 1.0, 0.0)
    assert beyond.information == plain.information


def test_strata_finer_than_narrow_labels():
    """Some positions of a label can move and others cannot; with 2 movable ones there are two arrangements."""
    z = torch.randn(5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    narrow, wide = torch.zeros(5, dtype=torch.long), torch.tensor([0, 1, 0, 0, 1])
    within = torch.tensor([0, 0, 1, 1, 2])
    found = information_increment(z, narrow, wide, within=within, num_bins=BINS, num_permutations=50)
    points = bf.reference_points(16, BINS, 0)
    rows = np.array([bf.soft_assignment(row.numpy(), points, bf.calibrated_temperature(16, BINS)) for row in z])
    base = bf.mutual_information(rows, [0] * 5)
    both = [bf.mutual_information(rows, w) - base for w in ([0, 1, 0, 0, 1], [1, 0, 0, 0, 1])]
    assert found.num_positions == 2
    assert found.information == pytest.approx(both[0])
    assert min(both) < found.null < max(both)
    assert found.null_std == pytest.approx(abs(both[0] - both[1]) / 2, rel=0.1)


def test_the_same_on_every_call_and_global_state_is_left_alone():
    z, narrow, wide, _ = sample(40)
    state = np.random.get_state()[1].copy()
    assert information_increment(z, narrow, wide, num_permutations=5) == information_increment(
        z, narrow, wide, num_permutations=5
    )
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"wide": torch.zeros(3, dtype=torch.long)}, ValueError, r"labels: expected shape \(40,\)"),
        ({"within": torch.zeros(40)}, TypeError, "labels: expected an integer tensor"),
        ({"num_permutations": 1}, ValueError, "num_permutations: expected an integer of at least 2"),
        ({"z": torch.zeros(40)}, ValueError, r"z: expected shape \[T, dim\]"),
    ],
)
def test_bad_arguments(changes, error, message):
    z, narrow, wide, _ = sample(40)
    arguments = {"z": z, "narrow": narrow, "wide": wide} | changes
    with pytest.raises(error, match=message):
        information_increment(**arguments)
