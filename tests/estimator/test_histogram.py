"""Segment sums and entropies."""

import math

import numpy as np
import pytest
import torch

from ib_callback.estimator.histogram import divergence, entropy, segment_sum, sensitivity


def test_segment_sum_adds_listed_rows_and_leaves_empty_segments_zero():
    rows = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    sums = segment_sum(
        rows, torch.tensor([2, 2, 0, 1], dtype=torch.int32), torch.tensor([0, 3, 3, 4], dtype=torch.int32)
    )
    assert sums.tolist() == [[7.0, 70.0], [0.0, 0.0], [2.0, 20.0]]


def test_segment_sum_is_differentiable():
    rows = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    members, offsets = torch.tensor([3, 0, 1, 2]), torch.tensor([0, 2, 4])
    assert torch.autograd.gradcheck(lambda r: segment_sum(r, members, offsets), (rows,))


def test_entropy_of_known_distributions():
    histograms = torch.tensor([[2.0, 2.0, 2.0, 2.0], [0.0, 7.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    np.testing.assert_allclose(entropy(histograms).numpy(), [1.0, 0.0, 0.5], atol=1e-15)


def test_entropy_does_not_depend_on_how_many_rows_there_are():
    histograms = torch.rand(5000, 100, generator=torch.Generator().manual_seed(0))
    whole = entropy(histograms)
    assert whole.dtype == torch.float64
    assert torch.equal(whole[1234:1240], entropy(histograms[1234:1240]))


def test_entropies_within_1e_9_of_uniform_are_told_apart():
    # H = log n - delta**2 / 2 for half of the bins raised and half lowered by delta, up to delta**4.
    delta = 1e-4
    flat = torch.full((100,), 0.01)
    raised = flat.double() * (1 + delta * torch.tensor([1.0, -1.0]).repeat(50))
    gap = float(entropy(flat) - entropy(raised))
    assert gap == pytest.approx(delta**2 / 2 / math.log(100), rel=1e-5)


def test_entropy_gradient_is_finite_where_a_bin_underflowed():
    counts = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    entropy(counts).backward()
    assert torch.isfinite(counts.grad).all()


def test_divergence_matches_its_definition():
    q, p = np.array([0.2, 0.0, 0.8]), np.array([0.5, 0.25, 0.25])
    expected = (0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.25)) / math.log(3)
    got = divergence(torch.from_numpy(q * 10)[None], torch.from_numpy(p * 3))
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_sensitivity_is_the_size_of_the_gradient():
    q = torch.tensor([[0.1, 0.2, 0.7], [1.0, 1.0, 1.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    logs = q.clamp_min(1e-30).log().requires_grad_()
    entropy(logs.exp()).sum().backward()
    torch.testing.assert_close(sensitivity(q), logs.grad.norm(dim=-1), rtol=1e-9, atol=1e-15)
