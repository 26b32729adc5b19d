"""The slow twin against values worked out by hand, closed forms and quadrature, so that it can be trusted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import brute_force as bf
import mpmath
import numpy as np
import pytest
from scipy import integrate

LEFT, RIGHT = [1.0, 0.0], [0.0, 1.0]
# Entropy in bits of a biased coin, 1/3 against 2/3.
THIRD = math.log2(3) - 2 / 3


@pytest.mark.parametrize(
    ("mask", "widest", "expected"),
    [
        ([1, 1, 1, 1, 1, 0], 1, [0, 1, 2, 3]),
        ([1, 1, 1, 1, 1, 0], 2, [1, 2]),
        ([0, 1, 1, 1, 1, 1], 2, [2, 3]),
        ([1, 1, 1, 1, 1, 1], 3, [2]),
        ([1, 1, 1, 0, 1, 1, 1], 1, [0, 1, 4, 5]),
        ([1, 1, 1, 0, 1, 1, 1], 2, []),
    ],
)
def test_valid_positions_have_real_tokens_on_both_sides(mask: list[int], widest: int, expected: list[int]) -> None:
    assert bf.valid_positions(np.array([mask], dtype=bool), widest) == [(0, s) for s in expected]


def test_labels_are_the_tokens_up_to_and_after_the_position() -> None:
    ids = np.array([[9, 9, 9, 9, 9, 9], [10, 11, 12, 13, 14, 15]])
    assert bf.input_label(ids, (1, 2), 1) == (12,)
    assert bf.output_label(ids, (1, 2), 1) == (13,)
    assert bf.input_label(ids, (1, 2), 3) == (10, 11, 12)
    assert bf.output_label(ids, (1, 2), 3) == (13, 14, 15)
    assert [bf.order_width(name) for name in ("token", "bigram", "trigram", "quadgram", "7-gram")] == [
        1,
        2,
        3,
        4,
        7,
    ]


def test_reference_points_are_numpys_normals_on_the_sphere() -> None:
    # The first four normals of RandomState(0), known from many NumPy tutorials.
    a, b, c, d = 1.76405235, 0.40015721, 0.97873798, 2.2408932
    expected = [[a / math.hypot(a, b), b / math.hypot(a, b)], [c / math.hypot(c, d), d / math.hypot(c, d)]]
    np.testing.assert_allclose(bf.reference_points(2, 2, seed=0), expected, rtol=1e-8)


def test_soft_assignment_by_hand() -> None:
    # cos is 1 and -1, so the odds are exp(2 / temperature) = 3; the length of z plays no part.
    points = np.array([[1.0, 0.0], [-1.0, 0.0]])
    for scale in (1e-3, 1.0, 1e3):
        z = np.array([scale, 0.0])
        np.testing.assert_allclose(bf.soft_assignment(z, points, 2 / math.log(3)), [0.75, 0.25], rtol=1e-14)


@pytest.mark.parametrize("kappa", [0.01, 1.0, 7.5, 300.0])
def test_divergence_in_three_dimensions_is_the_langevin_closed_form(kappa: float) -> None:
    with mpmath.workdps(40):
        k = mpmath.mpf(kappa)
        expected = mpmath.log(k / mpmath.sinh(k)) + k * mpmath.coth(k) - 1
        assert mpmath.almosteq(bf.vmf_divergence(k, 3), expected, rel_eps=1e-25)


@pytest.mark.parametrize(("dim", "num_bins"), [(2, 2), (2, 1000), (3, 100), (32, 100), (768, 50), (4096, 100)])
def test_calibrated_temperature_satisfies_its_equation_by_quadrature(dim: int, num_bins: int) -> None:
    kappa = 1 / bf.calibrated_temperature(dim, num_bins)

    def exponent(angle: float, strength: float) -> float:
        return strength * math.cos(angle) + (dim - 2) * math.log(math.sin(angle)) if angle else -math.inf

    # Shift by the value at the mode, and integrate about it: a narrow density is neither lost nor overflows.
    half = (dim - 2) / 2
    cosine = kappa / (half + math.hypot(half, kappa))
    mode = math.acos(cosine) if dim > 2 else 1e-300
    peak = exponent(mode, kappa)
    width = 1 / math.sqrt(dim + kappa)

    def integral(factor: Callable[[float], float], strength: float, centre: float, shift: float) -> float:
        edges = sorted({0.0, *(min(max(centre + i * width, 0.0), math.pi) for i in range(-12, 13, 2)), math.pi})

        def integrand(angle: float) -> float:
            return factor(angle) * math.exp(exponent(angle, strength) - shift)

        parts = [
            integrate.quad(integrand, a, b, epsabs=0, epsrel=1e-11)[0] for a, b in itertools.pairwise(edges) if b > a
        ]
        return math.fsum(parts)

    normaliser = integral(lambda t: 1.0, kappa, mode, peak)
    mean_cosine = integral(math.cos, kappa, mode, peak) / normaliser
    uniform = integral(lambda t: 1.0, 0.0, math.pi / 2, 0.0)
    divergence = kappa * mean_cosine - (math.log(normaliser) + peak) + math.log(uniform)
    assert divergence == pytest.approx(math.log(num_bins), rel=1e-8)


def test_entropies_by_hand() -> None:
    assert bf.efficiency(np.array([5.0, 5.0, 5.0])) == pytest.approx(1.0, abs=1e-15)
    assert bf.efficiency(np.array([4.0, 0.0])) == 0.0
    assert bf.efficiency(np.array([2.0, 1.0])) == pytest.approx(THIRD, abs=1e-15)


def test_information_of_two_positions_by_hand() -> None:
    rows = np.array([LEFT, RIGHT])
    assert bf.mutual_information(rows, ["a", "b"]) == pytest.approx(1.0, abs=1e-15)
    assert bf.mutual_information(rows, ["a", "a"]) == pytest.approx(0.0, abs=1e-15)
    assert bf.ceiling(rows) == pytest.approx(1.0, abs=1e-15)


def test_weightings_by_hand() -> None:
    rows = np.array([LEFT, LEFT, RIGHT])
    labels = ["a", "b", "b"]
    # H(Z given a) = 0 with one position, H(Z given b) = 1 with two.
    assert bf.mutual_information(rows, labels, "empirical") == pytest.approx(THIRD - 2 / 3, abs=1e-15)
    assert bf.mutual_information(rows, labels, "uniform") == pytest.approx(THIRD - 1 / 2, abs=1e-15)
    with pytest.raises(ValueError, match="unknown weighting 'other'"):
        bf.mutual_information(rows, labels, "other")


def test_ceiling_subtracts_the_entropy_of_single_assignments() -> None:
    rows = np.array([[0.75, 0.25], [0.25, 0.75]])
    single = 2 - 0.75 * math.log2(3)
    assert bf.ceiling(rows) == pytest.approx(1 - single, abs=1e-15)


def test_permutation_nulls_by_hand() -> None:
    rows = np.array([LEFT, LEFT, RIGHT])
    # Label a falls on one position; the other two share b, and disagree (entropy 1, weight 2/3) in two of
    # three cases.
    values = [THIRD - 2 / 3, THIRD - 2 / 3, THIRD]
    enumerated = bf.enumerated_null([rows], ["a", "b", "b"])
    assert enumerated.mean == pytest.approx(np.mean(values), abs=1e-14)
    assert enumerated.std == pytest.approx(np.std(values), abs=1e-14)
    assert enumerated.standard_error == 0.0
    sampled = bf.permutation_null([rows], ["a", "b", "b"], repeats=2000)
    assert sampled.standard_error == pytest.approx(np.std(values) / math.sqrt(2000), rel=0.1)
    assert abs(sampled.mean - np.mean(values)) < 4 * sampled.standard_error


def test_sampled_null_agrees_with_enumeration_over_layers() -> None:
    generator = np.random.default_rng(5)
    layers = [generator.dirichlet(np.full(6, 0.3), size=6) for _ in range(2)]
    labels = [3, 1, 3, 2, 2, 3]
    enumerated = bf.enumerated_null(layers, labels)
    sampled = bf.permutation_null(layers, labels, repeats=2000)
    assert abs(sampled.mean - enumerated.mean) < 4 * sampled.standard_error
    assert sampled.std == pytest.approx(enumerated.std, rel=0.1)


def test_paired_null_by_hand() -> None:
    # Two pairs, one position a sequence: the preferred state is LEFT in both, or the second pair is swapped.
    rows = np.array([LEFT, RIGHT, LEFT, RIGHT])
    null = bf.sequence_null([rows], [0, 1, 2, 3], [1, 0, 1, 0], paired=True)
    assert null.mean == pytest.approx(0.5, abs=1e-15)
    assert null.std == pytest.approx(0.5, abs=1e-15)
    assert null.standard_error == 0.0


def test_sequence_null_by_hand() -> None:
    # Labels 1, 0, 0 over three sequences of two equal positions each: the case of the permutation null above,
    # where permuting the six positions would have mixed states within sequences.
    rows = np.array([LEFT, LEFT, LEFT, LEFT, RIGHT, RIGHT])
    values = [THIRD - 2 / 3, THIRD - 2 / 3, THIRD]
    null = bf.sequence_null([rows], [0, 0, 1, 1, 2, 2], [1, 1, 0, 0, 0, 0], repeats=1000)
    assert abs(null.mean - np.mean(values)) < 4 * null.standard_error
    assert null.std == pytest.approx(np.std(values), rel=0.1)


def test_table_where_states_are_a_function_of_the_token() -> None:
    """z depends on the current token alone, so that complexity is the ceiling, here worked out by hand."""
    ids = np.array([[0, 1, 0, 1, 0, 7], [7, 7, 1, 0, 0, 1]])
    mask = np.array([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]], dtype=bool)
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(8, 5))
    hidden = [embeddings[ids], np.full((2, 6, 5), 3.0)]
    hidden[0][~mask] = np.nan
    features = {"side": np.array([[4] * 6, [2, 2, -1, 2, 2, 2]])}
    table = bf.evaluate(hidden, ids, mask, orders=("token", "bigram"), features=features, num_bins=10, temperature=0.5)
    # Widest order 2: (0, 1) token 1, (0, 2) token 0, (1, 3) token 0.
    assert table.positions == [(0, 1), (0, 2), (1, 3)]
    points = bf.reference_points(5, 10, seed=0)
    zero, one = (bf.soft_assignment(embeddings[token], points, 0.5) for token in (0, 1))
    mean = (2 * zero + one) / 3
    entropy = bf.efficiency(mean)
    information = entropy - (2 * bf.efficiency(zero) + bf.efficiency(one)) / 3
    assert information > 0.01
    token, bigram = table.orders["token"], table.orders["bigram"]
    assert table.entropy_by_layer[0] == pytest.approx(entropy, abs=1e-14)
    assert token.complexity_by_layer == pytest.approx([information, 0.0], abs=1e-14)
    assert token.complexity == pytest.approx(information / 2, abs=1e-14)
    assert table.ceiling == pytest.approx(information / 2, abs=1e-14)
    assert bigram.inputs == [(0, 1), (1, 0), (1, 0)]
    assert bigram.outputs == [(0, 1), (1, 0), (0, 1)]
    # Next tokens 0, 1, 0: the states of tokens 1 and 0 meet under label 0.
    expected = entropy - (2 * bf.efficiency(one + zero) + bf.efficiency(zero)) / 3
    assert token.expressivity_by_layer == pytest.approx([expected, 0.0], abs=1e-14)
    # The feature covers all three positions: labels 4, 4, 2.
    side = table.features["side"]
    assert (side.sequences, side.labels) == ([0, 0, 1], [4, 4, 2])
    assert side.information_by_layer[0] == pytest.approx(expected, abs=1e-14)


def test_feature_information_is_over_the_positions_that_carry_the_label() -> None:
    ids = np.zeros((2, 4), dtype=np.int64)
    mask = np.ones((2, 4), dtype=bool)
    hidden = [np.random.default_rng(1).normal(size=(2, 4, 3))]
    values = np.array([[0, -1, 1, 1], [-1, -1, -1, 0]])
    table = bf.evaluate(hidden, ids, mask, orders=("token",), features={"f": values}, num_bins=5, temperature=0.3)
    feature = table.features["f"]
    # (1, 3) is labelled but has no next token.
    assert (feature.sequences, feature.labels) == ([0, 0], [0, 1])
    points = bf.reference_points(3, 5, seed=0)
    first, second = (bf.soft_assignment(hidden[0][0, s], points, 0.3) for s in (0, 2))
    expected = bf.efficiency(first + second) - (bf.efficiency(first) + bf.efficiency(second)) / 2
    assert feature.information == pytest.approx(expected, abs=1e-14)


def test_output_embeddings_by_hand() -> None:
    ids, mask = np.array([[3, 5, 5, 7, 7, 9]]), np.array([[1, 1, 1, 1, 1, 0]], bool)
    assert bf.frequent_tokens(ids, mask, 2) == [5, 7]
    assert bf.frequent_tokens(ids, mask, 9) == [5, 7, 3]
    # Without their means, states and embeddings point left and right.
    states = np.array([[[4.0, 9.0], [8.0, 9.0]]])
    rows = np.array([[1.0, 2.0], [5.0, 2.0]])
    odds = math.exp(2 / bf.calibrated_temperature(2, 2))
    found = bf.readout_assignments(states, rows, [(0, 0), (0, 1)])
    np.testing.assert_allclose(found, [[odds / (1 + odds), 1 / (1 + odds)], [1 / (1 + odds), odds / (1 + odds)]])
    # With the mean of the second alone, the first points left and the second nowhere.
    np.testing.assert_allclose(bf.readout_assignments(states, rows, [(0, 0)], [(0, 1)]), found[:1])


def test_grouped_shares_by_hand() -> None:
    logits = np.log([[[1.0, 2.0, 3.0, 4.0], [4.0, 4.0, 1.0, 1.0]]])
    np.testing.assert_allclose(bf.grouped_shares(logits, [2, 0], [(0, 0), (0, 1)]), [[0.3, 0.1, 0.6], [0.1, 0.4, 0.5]])
