"""The Information Bottleneck curve: closed forms, a slow twin, what it must obey, bad input, files."""

import json
import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.optimize import brentq

import ib_callback as ib
from ib_callback.bound._hard import cluster
from ib_callback.bound._joint import Joint
from ib_callback.bound._solver import Solver

CPU = torch.device("cpu")


def plogp(p):
    p = np.asarray(p, np.float64)
    return float((p[p > 0] * np.log(p[p > 0])).sum())


def mutual_information(joint):
    joint = np.asarray(joint, np.float64) / np.sum(joint)
    return plogp(joint) - plogp(joint.sum(0)) - plogp(joint.sum(1))


def achieved(joint, encoder):
    """(I(X;T), I(Y;T)) of a code p(t|x), from the definitions."""
    joint = np.asarray(joint, np.float64) / np.sum(joint)
    return mutual_information(joint.sum(1)[:, None] * encoder), mutual_information(joint.T @ encoder)


def random_joint(rows, columns, seed, concentration=0.3):
    random = np.random.RandomState(seed)
    return random.dirichlet([concentration] * columns, rows) * random.rand(rows, 1)


def binary_entropy(p):
    return -plogp([p, 1 - p])


@pytest.mark.parametrize("flip", [0.02, 0.1, 0.3, 0.45])
def test_binary_symmetric_channel(flip):
    """1 − h(α ∗ h⁻¹(1 − R)) bits: Mrs. Gerber's lemma, Wyner & Ziv 1973."""
    curve = ib.ib_curve([[1 - flip, flip], [flip, 1 - flip]])
    for rate in np.linspace(0, math.log(2), 60):
        inverse = brentq(lambda p, rate=rate: binary_entropy(p) - (math.log(2) - rate), 0, 0.5)
        expected = math.log(2) - binary_entropy(flip * (1 - inverse) + (1 - flip) * inverse)
        assert curve.bound(rate) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("sparse", [False, True])
def test_where_y_is_a_function_of_x_the_curve_is_the_diagonal_up_to_its_entropy(sparse):
    random = np.random.RandomState(0)
    joint = np.zeros((60, 12))
    joint[np.arange(60), np.arange(60) % 12] = random.rand(60)
    curve = ib.ib_curve(sp.csr_matrix(joint) if sparse else joint)
    entropy = -plogp(joint.sum(0) / joint.sum())
    complexity = np.linspace(0, 2 * entropy, 50)
    np.testing.assert_allclose(curve.bound(complexity), np.minimum(complexity, entropy), atol=1e-12)
    assert curve.num_codewords == 12


def test_independent_variables_have_the_curve_zero():
    random = np.random.RandomState(0)
    curve = ib.ib_curve(np.outer(random.rand(20), random.rand(30)), num_codewords=5)
    np.testing.assert_allclose(curve.bound([0.0, 0.5, 9.0]), 0.0, atol=1e-4)
    assert curve.mutual_information == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("joint", [np.ones((5, 1)), np.ones((1, 5)), [[3.0]], [[0, 2, 0], [0, 1, 0]]])
def test_one_row_or_column_has_the_exact_trivial_curve(joint):
    curve = ib.ib_curve(joint, num_codewords=4)
    assert (curve.complexity.tolist(), curve.expressivity.tolist()) == ([0.0], [0.0])
    assert (curve.mutual_information, curve.bound(1.0)) == (0.0, 0.0)


def twin(joint, beta, encoder, iterations):
    """Equations 16 to 18 of Tishby, Pereira & Bialek, in loops."""
    joint = joint / joint.sum()
    px = joint.sum(1)
    conditional = joint / px[:, None]
    for _ in range(iterations):
        pt = px @ encoder
        decoder = (px[:, None] * encoder).T @ conditional / pt[:, None]
        for x in range(len(px)):
            kl = [sum(p * math.log(p / q) for p, q in zip(conditional[x], row, strict=True)) for row in decoder]
            weights = pt * np.exp(-beta * np.array(kl))
            encoder[x] = weights / weights.sum()
    return encoder


def test_an_iteration_is_that_of_the_equations():
    joint = random_joint(6, 5, 1, concentration=2.0)
    start = np.random.RandomState(2).dirichlet([1.0] * 4, 6)
    expected = twin(joint, 3.0, start.copy(), 1)
    solver = Solver(Joint.of(joint), dtype=torch.float64, device=CPU)
    got, _ = solver._iterate(torch.from_numpy(start), 3.0)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(solver.information(got), achieved(joint, expected), atol=1e-12)


@pytest.mark.parametrize("beta", [2.0, 5.0, 20.0])
def test_no_point_of_the_twin_from_any_start_lies_above_the_curve(beta):
    joint = random_joint(8, 6, 3, concentration=1.0)
    curve = ib.ib_curve(joint)
    for seed in range(3):
        start = np.random.RandomState(seed).dirichlet([0.2] * 8, 8) * 0.99 + 0.01 / 8
        complexity, expressivity = achieved(joint, twin(joint, beta, start, 150))
        assert expressivity <= curve.bound(complexity) + 1e-4


def test_extrapolation_never_lowers_the_objective():
    joint = Joint.of(random_joint(20, 20, 0))
    solver = Solver(joint, dtype=torch.float64, device=CPU)
    encoder = torch.from_numpy(np.random.RandomState(0).dirichlet([1.0] * 8, 20))
    values = []
    for _ in range(8):
        encoder = solver.solve(encoder, 4.0, max_iterations=3, tolerance=0.0)
        complexity, expressivity = solver.information(encoder)
        values.append(expressivity - complexity / 4.0)
    assert (np.diff(values) >= -1e-12).all()
    assert values[-1] > values[0]


def test_sequential_clustering_ends_where_no_single_move_gains():
    joint = random_joint(12, 8, 5)
    code, best = cluster(Joint.of(joint), 3, sweeps=50, tolerance=0.0, seed=0)
    assert best == pytest.approx(achieved(joint, np.eye(3)[code])[1], abs=1e-12)
    for row in range(12):
        for other in range(3):
            moved = code.copy()
            moved[row] = other
            assert achieved(joint, np.eye(3)[moved])[1] <= best + 1e-12


@pytest.mark.parametrize("num_codewords", [None, 2, 5])
@pytest.mark.parametrize("seed", range(2))
def test_shape_of_the_curve(num_codewords, seed):
    joint = random_joint(15, 10, seed)
    curve = ib.ib_curve(joint, num_codewords=num_codewords)
    c, e = curve.complexity, curve.expressivity
    assert (c[0], e[0], curve.betas[0]) == (0.0, 0.0, 0.0)
    assert (np.diff(c) > 0).all()
    assert (np.diff(e) > 0).all()
    assert (np.diff(np.diff(e) / np.diff(c)) <= 1e-12).all()
    assert (e <= np.minimum(c, curve.mutual_information)).all()
    assert curve.mutual_information == pytest.approx(mutual_information(joint), abs=1e-12)
    if num_codewords is None:
        assert e[-1] == pytest.approx(curve.mutual_information, abs=1e-12)
        assert curve.num_codewords == 15
    else:
        assert c[-1] <= math.log(num_codewords) + 1e-12


def test_more_codewords_reach_higher():
    joint = random_joint(20, 15, 7)
    at = np.linspace(0, 4, 30)
    few, more, most = (ib.ib_curve(joint, num_codewords=n).bound(at) for n in (3, 6, 20))
    assert (few <= more + 1e-3).all()
    assert (more <= most + 1e-3).all()


@pytest.mark.parametrize(("concentration", "seed"), [(0.1, 7), (0.1, 11), (0.3, 7), (1.0, 1), (1.0, 3)])
def test_of_all_partitions_of_a_small_joint_none_lies_above(concentration, seed):
    joint = random_joint(6, 5, seed, concentration=concentration)
    curve = ib.ib_curve(joint, num_codewords=3)
    for number in range(3**5):
        code = [number // 3**place % 3 for place in range(5)] + [0]
        complexity, expressivity = achieved(joint, np.eye(3)[code])
        assert expressivity <= curve.bound(complexity) + 1e-4


def test_dense_sparse_and_scaled_joints_have_the_same_curve():
    dense = random_joint(25, 20, 0)
    dense[dense < 0.005] = 0
    few = {"num_codewords": 6, "betas": [20.0, 6.0, 3.0]}
    expected = ib.ib_curve(dense, **few)
    coo = sp.coo_matrix(dense)
    tensor = torch.from_numpy(dense)
    for same in (sp.csr_matrix(dense), coo, tensor.to_sparse_coo(), tensor, 8 * dense, dense.tolist()):
        assert ib.ib_curve(same, **few) == expected
    # Entries of a sparse matrix that occur twice add up.
    twice = sp.coo_matrix((np.tile(coo.data / 2, 2), (np.tile(coo.row, 2), np.tile(coo.col, 2))), shape=coo.shape)
    assert ib.ib_curve(twice, **few) == expected


def test_products_of_sparse_and_dense_tables_agree():
    joint = random_joint(40, 30, 0, concentration=0.02)
    joint[joint < 1e-3] = 0
    reduced = Joint.of(joint)
    encoder = np.random.RandomState(0).dirichlet([1.0] * 5, len(reduced.rows))
    sparse = Solver(reduced, dtype=torch.float64, device=CPU)
    assert isinstance(sparse._encode, tuple)
    dense = Solver(reduced, dtype=torch.float64, device=CPU)
    dense._encode, dense._decode = dense._dense(reduced.conditional), dense._dense(reduced.probability.T.tocsr())
    start = torch.from_numpy(encoder)
    results = [solver.solve(start, 4.0, max_iterations=30, tolerance=0.0) for solver in (sparse, dense)]
    np.testing.assert_allclose(results[0], results[1], atol=1e-9)


def test_float32_alters_a_code_by_less_than_1e_5_nats():
    joint = Joint.of(random_joint(60, 60, 0))
    code, _ = cluster(joint, 8, sweeps=20, tolerance=0.0, seed=0)
    found = []
    for dtype in (torch.float64, torch.float32):
        solver = Solver(joint, dtype=dtype, device=CPU)
        encoder = 0.99 * solver.hard(code) + 0.01 / 8
        found.append([])
        for beta in (30.0, 12.0, 8.0):
            encoder = solver.solve(encoder, beta, max_iterations=60, tolerance=0.0)
            found[-1].append(solver.information(encoder))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    assert found[0][2][0] < found[0][1][0] < found[0][0][0]  # softer and softer


def test_rows_and_columns_that_cannot_be_told_apart_are_one():
    base = np.array([[3, 1, 0], [1, 5, 2], [0, 2, 7]])
    doubled = np.repeat(np.repeat(base, [1, 2, 3], axis=0), [2, 1, 2], axis=1) * np.array([1, 1, 2, 3, 4, 5])[:, None]
    joint = Joint.of(doubled)
    assert joint.probability.shape == (3, 3)
    assert joint.mutual_information == pytest.approx(mutual_information(doubled), abs=1e-12)
    assert joint.rows.sum() == pytest.approx(1)


def test_rows_and_columns_of_zeros_make_no_difference():
    joint = random_joint(6, 5, 0)
    padded = np.zeros((9, 8))
    padded[np.ix_([0, 1, 3, 5, 6, 8], [1, 2, 4, 5, 7])] = joint
    assert ib.ib_curve(padded) == ib.ib_curve(joint)


def test_the_result_is_the_same_on_every_run_and_for_any_number_of_threads():
    joint = sp.csr_matrix(random_joint(80, 60, 0, concentration=0.02).round(3))
    before = torch.get_num_threads()
    curves = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        curves.append(ib.ib_curve(joint, num_codewords=7, betas=[20.0, 8.0, 4.0, 2.0]))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert curves[0] == curves[1]


@pytest.mark.parametrize("sparse", [False, True])
def test_what_the_process_is_set_to_makes_no_difference(sparse):
    """In a training step under autocast, or where tensors are made on an accelerator by default."""
    joint = random_joint(100, 90, 0)
    joint = sp.csr_matrix(joint * (joint > 0.1)) if sparse else joint
    settings = {"num_codewords": 60, "betas": [8.0, 3.0]}  # 6,000 entries: float32
    expected = ib.ib_curve(joint, **settings)
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert ib.ib_curve(joint, **settings) == expected
    torch.set_float32_matmul_precision("medium")
    try:
        assert ib.ib_curve(joint, **settings) == expected
    finally:
        torch.set_float32_matmul_precision("highest")


def test_new_starts_are_made_on_the_cpu_wherever_tensors_are_by_default():
    joint = random_joint(12, 10, 0)
    with torch.device("meta"):
        curve = ib.ib_curve(joint, num_codewords=5)
    assert curve == ib.ib_curve(joint, num_codewords=5)


def test_sequential_clustering_at_a_beta_ends_where_no_single_move_gains():
    joint = random_joint(12, 8, 5)
    code, expressivity = cluster(Joint.of(joint), 5, sweeps=50, tolerance=0.0, seed=0, beta=2.5)

    def objective(code):
        complexity, expressivity = achieved(joint, np.eye(5)[code])
        return expressivity - complexity / 2.5

    assert expressivity == pytest.approx(achieved(joint, np.eye(5)[code])[1], abs=1e-12)
    for row in range(12):
        for other in range(5):
            moved = code.copy()
            moved[row] = other
            assert objective(moved) <= objective(code) + 1e-12


def test_betas_can_be_chosen():
    joint = random_joint(10, 8, 0)
    curve = ib.ib_curve(joint, betas=[3.0, 6.0, 2.0])
    assert set(curve.betas) <= {0.0, 2.0, 3.0, 6.0, math.inf}
    full = ib.ib_curve(joint)
    at = np.linspace(0, 3, 20)
    assert (curve.bound(at) <= full.bound(at) + 1e-4).all()
    # The slope of the curve at a solution is 1/β.
    for c, e, beta in zip(curve.complexity[1:-1], curve.expressivity[1:-1], curve.betas[1:-1], strict=True):
        assert (full.bound(at) <= e + (at - c) / beta + 1e-4).all()


def test_ten_times_the_iterations_gain_little():
    joint = random_joint(60, 50, 0, concentration=0.05)
    betas = np.geomspace(1, 50, 12)
    curve = ib.ib_curve(joint, num_codewords=10, betas=betas, max_iterations=30)
    longer = ib.ib_curve(joint, num_codewords=10, betas=betas, max_iterations=300, tolerance=0.0)
    at = np.linspace(0, 3, 50)
    assert (longer.bound(at) - curve.bound(at)).max() < 0.01 * curve.mutual_information


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("sharpness", [1.0, 8.0])
def test_no_random_soft_assignment_of_tokens_lies_above_the_curve_for_as_many_codewords(seed, sharpness):
    random = np.random.RandomState(seed)
    joint, bins = _JOINTS[seed % len(_JOINTS)]
    scores = sharpness * random.randn(len(joint), bins)
    if seed % 2:
        # Models that have learned: tokens with similar successors are assigned alike.
        scores = sharpness * 10 * (joint / joint.sum(1, keepdims=True)) @ random.randn(joint.shape[1], bins)
    encoder = np.exp(scores - scores.max(1, keepdims=True))
    complexity, expressivity = achieved(joint, encoder / encoder.sum(1, keepdims=True))
    assert expressivity <= _curve(seed % len(_JOINTS)).bound(complexity) + 1e-3


_JOINTS = [(random_joint(30, 30, seed, concentration=0.05), bins) for seed, bins in ((100, 4), (101, 8), (102, 30))]
_CURVES: dict[int, ib.IBCurve] = {}


def _curve(number):
    if number not in _CURVES:
        joint, bins = _JOINTS[number]
        _CURVES[number] = ib.ib_curve(joint, num_codewords=bins)
    return _CURVES[number]


@pytest.mark.parametrize(
    ("joint", "message"),
    [
        ([[1.0, -0.5], [1.0, 1.0]], "1 below zero"),
        ([[1.0, math.nan], [math.inf, 1.0]], "2 entries that are NaN or infinite"),
        (sp.csr_matrix([[1.0, -1.0]]), "1 below zero"),
        (torch.tensor([[1.0, math.nan]]), "1 entries that are NaN"),
        ([1.0, 2.0], r"two dimensions, got shape \(2,\)"),
        (torch.ones(2, 2, 2).to_sparse_coo(), r"two dimensions, got shape \(2, 2, 2\)"),
        (np.zeros((3, 2)), r"shape \(3, 2\) without a positive entry"),
        (np.zeros((0, 0)), "without a positive entry"),
        ([], "two dimensions"),
    ],
)
def test_a_joint_that_cannot_be(joint, message):
    with pytest.raises(ValueError, match=message):
        ib.ib_curve(joint)


@pytest.mark.parametrize("joint", [[["a"]], torch.ones(2, 2, dtype=torch.complex64), np.ones((2, 2), complex)])
def test_a_joint_that_is_not_of_numbers(joint):
    with pytest.raises(TypeError, match="joint: expected real numbers, got dtype"):
        ib.ib_curve(joint)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"num_codewords": 1}, ValueError, "num_codewords: expected an integer of at least 2, got 1"),
        ({"num_codewords": 2.5}, TypeError, "num_codewords: expected an integer"),
        ({"betas": []}, ValueError, "betas: expected at least one number"),
        ({"betas": [1.0, 0.0]}, ValueError, "all finite and above 0"),
        ({"betas": [math.inf]}, ValueError, "all finite and above 0"),
        ({"max_iterations": 0}, ValueError, "max_iterations: expected an integer of at least 1"),
        ({"tolerance": -1.0}, ValueError, "tolerance: expected a number of nats"),
        ({"seed": -1}, ValueError, "seed: expected an integer of at least 0"),
    ],
)
def test_settings_that_cannot_be(keywords, error, message):
    with pytest.raises(error, match=message):
        ib.ib_curve(np.eye(3), **keywords)


def test_a_large_joint_needs_a_number_of_codewords():
    joint = sp.identity(5000, format="csr") + sp.csr_matrix(([1.0], ([0], [1])), shape=(5000, 5000))
    with pytest.raises(ValueError, match=r"5,000 different rows.* such as 100"):
        ib.ib_curve(joint)


def test_extreme_scales_and_integers():
    joint = random_joint(6, 5, 0)
    expected = ib.ib_curve(joint)
    for scale in (2.0**-1000, 2.0**1000):
        assert ib.ib_curve(joint * scale) == expected
    counts = np.random.RandomState(0).randint(0, 9, (6, 5))
    assert ib.ib_curve(counts) == ib.ib_curve(torch.from_numpy(counts)) == ib.ib_curve(counts.astype(float))


@pytest.fixture(scope="module")
def curve():
    return ib.ib_curve(random_joint(12, 9, 0), num_codewords=4)


def test_bound_at_its_corners_between_and_beyond(curve):
    np.testing.assert_array_equal(curve.bound(curve.complexity), curve.expressivity)
    middle = (curve.complexity[1:] + curve.complexity[:-1]) / 2
    np.testing.assert_allclose(curve.bound(middle), (curve.expressivity[1:] + curve.expressivity[:-1]) / 2)
    assert curve.bound(-1e-17) == 0.0
    assert curve.bound(99.0) == curve.expressivity[-1]
    assert isinstance(curve.bound(0.1), float)
    assert curve.bound(np.zeros((2, 3))).shape == (2, 3)
    with pytest.raises(ValueError, match="complexity: expected numbers, got NaN"):
        curve.bound([0.0, math.nan])


def test_units(curve):
    bits, efficiency = curve.to_bits(), curve.to_efficiency(4)
    np.testing.assert_allclose(bits.complexity * math.log(2), curve.complexity)
    np.testing.assert_allclose(efficiency.expressivity * math.log(4), curve.expressivity)
    assert efficiency.mutual_information == pytest.approx(curve.mutual_information / math.log(4))
    assert bits.bound(0.3) == pytest.approx(curve.bound(0.3 * math.log(2)) / math.log(2))
    np.testing.assert_allclose(efficiency.to_bits().complexity, bits.complexity)
    assert (curve.unit, bits.unit, efficiency.unit) == ("nats", "bits", "efficiency")
    assert efficiency.complexity[-1] <= 1 + 1e-12


def test_arrays_cannot_be_changed(curve):
    with pytest.raises(ValueError, match="read-only"):
        curve.complexity[0] = 1.0


def test_saved_and_loaded(curve, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    curve = curve.with_info(order="token", num_positions=7)
    curve.save("~/ib_curve.json")
    assert ib.IBCurve.load("~/ib_curve.json") == ib.IBCurve.load(tmp_path / "ib_curve.json") == curve
    content = json.loads((tmp_path / "ib_curve.json").read_text())
    assert (content["format"], content["unit"], content["num_codewords"]) == (2, "nats", 4)
    assert (content["order"], content["num_positions"]) == ("token", 7)
    curve.to_bits().save(tmp_path / "bits.json")
    again = ib.IBCurve.load(tmp_path / "bits.json")
    np.testing.assert_allclose(again.complexity, curve.complexity, rtol=1e-15)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize("end", ["", "\r\n", "\n\n"])
def test_a_file_whose_line_break_was_changed_is_read(curve, end, tmp_path):
    path = tmp_path / "ib_curve.json"
    curve.save(path)
    path.write_bytes(path.read_bytes().removesuffix(b"\n") + end.encode())
    assert ib.IBCurve.load(path) == curve


@pytest.mark.parametrize("name", ["complexity", "unit", "sha256"])
def test_what_a_curve_says_about_itself_has_names_of_its_own(curve, name):
    with pytest.raises(
        ValueError, match=f"info: expected names that the file of a curve does not use itself, got {name}"
    ):
        curve.with_info(order="token", **{name: 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a file written by IBCurve.save"),
        ("[]", "expected a file written by IBCurve.save"),
        ('{"format": 1, "unit": "nats"}', "expected a file written by IBCurve.save"),
        ({"format": 3}, ".*format 3 in 'nats' is unknown to this"),
        ({"format": 2}, ".*its checksum does not match its content"),
        ({"expressivity": [0.0, 0.51, 0.6]}, ".*not concave, or exceeds its complexity or its mutual information"),
        ({"expressivity": [0.0, 0.4, 0.7]}, ".*not concave, or exceeds its complexity or its mutual information"),
        ({"expressivity": [0.0, 0.1, 0.5]}, ".*not concave, or exceeds its complexity or its mutual information"),
        ({"unit": "bits"}, ".*format 1 in 'bits' is unknown to this"),
        ({"complexity": [0.0, 1.0, 0.5]}, ".*corners: expected finite values that ascend"),
        ({"complexity": [0.0]}, ".*corners: expected finite values that ascend"),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    path = tmp_path / "curve.json"
    whole = {
        "format": 1, "unit": "nats", "mutual_information": 0.6, "num_codewords": 3,
        "complexity": [0.0, 0.5, 1.0], "expressivity": [0.0, 0.4, 0.5], "betas": [0.0, 2.0, None],
    }  # fmt: skip
    path.write_text(json.dumps(whole))
    assert ib.IBCurve.load(path).betas[-1] == math.inf
    path.write_text(content if isinstance(content, str) else json.dumps(whole | content))
    with pytest.raises(ValueError, match=f"curve.json: {message}"):
        ib.IBCurve.load(path)


def test_a_flip_of_any_bit_is_refused(tmp_path):
    path = tmp_path / "ib_curve.json"
    ib.ib_curve([[3, 1], [1, 4]], betas=[3.0]).with_info(order="token", probe="00ff").save(path)
    content = path.read_bytes()
    ib.IBCurve.load(path)
    for number in range(0, 8 * len(content), 3):
        damaged = bytearray(content)
        damaged[number // 8] ^= 1 << number % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"ib_curve\.json: expected .*Compute the curve again"):
            ib.IBCurve.load(path)
