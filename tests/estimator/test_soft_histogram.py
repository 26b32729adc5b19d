"""The streaming histogram against the slow float64 twin, and however the data are cut up."""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import brute_force
import numpy as np
import pytest
import torch
from torch import Tensor

from ib_callback.common.errors import RepresentationError
from ib_callback.estimator.functional import soft_entropy, soft_mutual_information
from ib_callback.estimator.soft_histogram import SoftHistogram
from ib_callback.estimator.temperature import calibrated_temperature

DIM, NUM_LABELS, NUM_BINS, SEED = 16, 12, 40, 3
# Labels that never occur in `sample`.
UNSEEN = (4, 11)


def sample(num: int = 150, dtype: torch.dtype = torch.float64, dim: int = DIM) -> tuple[Tensor, Tensor]:
    rng = np.random.RandomState(0)
    labels = rng.choice([x for x in range(NUM_LABELS) if x not in UNSEEN], num)
    z = rng.standard_normal((NUM_LABELS, dim))[labels] + rng.standard_normal((num, dim))
    return torch.from_numpy(z).to(dtype), torch.from_numpy(labels)


def make(**changed: Any) -> SoftHistogram:
    arguments = {"dim": DIM, "num_labels": NUM_LABELS, "num_bins": NUM_BINS, "seed": SEED, **changed}
    return SoftHistogram(**arguments)


def filled(*parts: tuple[Tensor, Tensor], **changed: Any) -> SoftHistogram:
    histogram = make(**changed)
    for z, labels in parts or (sample(),):
        histogram.update(z, labels)
    return histogram


def read(histogram: SoftHistogram) -> Tensor:
    """Everything that can be read off, in one vector; NaN where a label is unseen."""
    scalars = [histogram.entropy(), histogram.mutual_information(), histogram.mutual_information("uniform")]
    return torch.cat([torch.tensor(scalars, dtype=torch.float64), histogram.conditional_entropy()])


def assert_same(first: SoftHistogram, second: SoftHistogram, tolerance: float = 0.0) -> None:
    assert first.num_positions == second.num_positions
    torch.testing.assert_close(read(first), read(second), rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-6)])
@pytest.mark.parametrize("temperature", ["calibrated", 1.0])
def test_agrees_with_the_twin(dtype: torch.dtype, tolerance: float, temperature: float | str) -> None:
    # 1e-7 for float64: the reference points are float32 by definition, the twin's are not rounded.
    z, labels = sample(dtype=dtype)
    number = calibrated_temperature(DIM, NUM_BINS) if isinstance(temperature, str) else temperature
    points = brute_force.reference_points(DIM, NUM_BINS, SEED)
    rows = np.stack([brute_force.soft_assignment(row, points, number) for row in z.double().numpy()])
    names = labels.tolist()

    histogram = filled((z, labels), temperature=temperature)
    assert histogram.num_positions == len(names)
    assert histogram.entropy() == pytest.approx(brute_force.overall_entropy(rows), abs=tolerance)
    for weighting in ("empirical", "uniform"):
        expected = brute_force.mutual_information(rows, names, weighting)
        assert histogram.mutual_information(weighting) == pytest.approx(expected, abs=tolerance)
    conditional = histogram.conditional_entropy()
    assert conditional.shape == (NUM_LABELS,)
    assert conditional.dtype == torch.float64
    for x in range(NUM_LABELS):
        if x in UNSEEN:
            assert math.isnan(conditional[x])
        else:
            expected = brute_force.efficiency(rows[labels.numpy() == x].sum(axis=0))
            assert float(conditional[x]) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("spread", [1.0, 0.03])
def test_temperature_one_at_dim_4096(spread: float) -> None:
    """The bar of the pure function, 1 % of I or 1e-9, holds for data that come in pieces."""
    rng = np.random.RandomState(2)
    z = torch.from_numpy(rng.standard_normal(4096) + spread * rng.standard_normal((300, 4096))).float()
    labels = torch.from_numpy(rng.randint(0, NUM_LABELS, 300))
    points = brute_force.reference_points(4096, 100, 0)
    rows = np.stack([brute_force.soft_assignment(row, points, 1.0) for row in z.double().numpy()])
    expected = brute_force.mutual_information(rows, labels.tolist())
    histogram = SoftHistogram(4096, NUM_LABELS, temperature=1.0)
    for part in range(0, 300, 37):
        histogram.update(z[part : part + 37], labels[part : part + 37])
    assert abs(histogram.mutual_information() - expected) <= max(0.01 * expected, 1e-9)
    assert abs(histogram.mutual_information() - expected) <= 0.01 * expected


def test_agrees_with_the_pure_functions() -> None:
    z, labels = sample()
    settings: dict[str, Any] = {"num_bins": NUM_BINS, "seed": SEED}
    histogram = filled((z, labels))
    assert histogram.entropy() == pytest.approx(float(soft_entropy(z, **settings)), abs=1e-13)
    for weighting in ("empirical", "uniform"):
        expected = float(soft_mutual_information(z, labels, weighting=weighting, **settings))
        assert histogram.mutual_information(weighting) == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_updates_and_merges_equal_one_pass(size: int, dtype: torch.dtype, tolerance: float) -> None:
    z, labels = sample(dtype=dtype)
    whole = filled((z, labels))
    parts = list(zip(z.split(size), labels.split(size), strict=True))
    assert_same(filled(*parts), whole, tolerance)

    merged = make()
    for part in parts:
        merged.merge(filled(part))
    assert_same(merged, whole, tolerance)


def test_order_of_positions_does_not_matter() -> None:
    z, labels = sample()
    order = torch.from_numpy(np.random.RandomState(1).permutation(len(labels)))
    assert_same(filled((z[order], labels[order])), filled((z, labels)), 1e-12)


def test_merge_leaves_the_other_as_it_is() -> None:
    z, labels = sample()
    first, second = filled((z[:50], labels[:50])), filled((z[50:], labels[50:]))
    first.merge(second)
    first.merge(second)
    assert first.num_positions == 250
    assert_same(second, filled((z[50:], labels[50:])))


def test_empty_updates_and_merges_add_nothing() -> None:
    histogram = filled()
    histogram.update(torch.zeros(0, DIM), torch.zeros(0, dtype=torch.int64))
    histogram.merge(make())
    assert_same(histogram, filled())


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"dim": 8}, "dim is 8, here 16"),
        ({"num_labels": 13}, "num_labels is 13, here 12"),
        ({"num_bins": 41, "temperature": 1.0}, "num_bins is 41, here 40; temperature is 1.0, here"),
        ({"seed": 4}, "seed is 4, here 3"),
        ({"temperature": 0.5}, "temperature is 0.5, here"),
    ],
)
def test_other_settings_are_named_and_never_taken_over(changed: dict[str, Any], named: str) -> None:
    histogram, other = filled(), make(**changed)
    with pytest.raises(ValueError, match=f"merge: the other histogram was made with other settings: {named}"):
        histogram.merge(other)
    with pytest.raises(ValueError, match=f"load_state_dict: the state was made with other settings: {named}"):
        histogram.load_state_dict(other.state_dict())
    assert_same(histogram, filled())


def test_only_histograms_merge() -> None:
    with pytest.raises(TypeError, match=r"other: expected a SoftHistogram, got dict\. Load a saved state"):
        make().merge(filled().state_dict())  # type: ignore[arg-type]


def test_the_calibrated_temperature_is_a_number_like_any_other() -> None:
    given = make(temperature=calibrated_temperature(DIM, NUM_BINS))
    given.merge(filled())
    assert_same(given, filled())


def test_state_goes_through_a_file_and_the_sums_go_on() -> None:
    z, labels = sample()
    stream = io.BytesIO()
    torch.save(filled((z[:70], labels[:70])).state_dict(), stream)
    stream.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    resumed.update(z[70:], labels[70:])
    assert_same(resumed, filled((z[:70], labels[:70]), (z[70:], labels[70:])))
    assert_same(pickle.loads(pickle.dumps(resumed)), resumed)


def test_state_is_a_copy_both_ways() -> None:
    z, labels = sample()
    histogram = filled((z, labels))
    state = histogram.state_dict()
    histogram.update(z, labels)
    loaded = make()
    loaded.load_state_dict(state)
    loaded.update(z, labels)
    again = make()
    again.load_state_dict(state)
    assert_same(again, filled((z, labels)))


@pytest.mark.parametrize("key", ["settings", "sums", "counts"])
def test_incomplete_states_are_refused(key: str) -> None:
    state = filled().state_dict()
    del state[key]
    with pytest.raises(ValueError, match=r"state: expected settings and \{'sums': .* got "):
        make().load_state_dict(state)


@pytest.mark.parametrize("value", [torch.zeros(2, 2, dtype=torch.float64), torch.zeros(12, 40), [[0.0]]])
def test_states_of_the_wrong_form_are_refused_whole(value: Any) -> None:
    histogram = filled()
    for key in ("sums", "counts"):
        with pytest.raises(ValueError, match=r"state: expected settings and \{'sums': "):
            histogram.load_state_dict({**make().state_dict(), key: value})
    assert_same(histogram, filled())


def test_an_empty_histogram_has_no_entropy() -> None:
    with pytest.raises(RuntimeError, match=r"expected at least 1 position, got none. Call update"):
        make().entropy()
    with pytest.raises(RuntimeError, match=r"expected at least 1 position, got none. Call update"):
        make().mutual_information()
    assert bool(make().conditional_entropy().isnan().all())


BAD_UPDATES: list[tuple[Any, Any, type[Exception], str]] = [
    (torch.ones(3, DIM), torch.tensor([0, 12, -1]), ValueError, "in 0 ... 11, got a minimum of -1"),
    (torch.ones(3, DIM), torch.tensor([0, 1, 12]), ValueError, "a minimum of 0 and a maximum of 12. Drop"),
    (torch.ones(3, DIM), torch.tensor([0, -1, 1]), ValueError, "a minimum of -1 and a maximum of 1. Drop"),
    (torch.ones(3, DIM), torch.zeros(3), TypeError, "labels: expected an integer tensor"),
    (torch.ones(3, DIM), torch.zeros(2, dtype=torch.int64), ValueError, r"labels: expected shape \(3,\)"),
    (torch.ones(3, 8), torch.tensor([0, 1, 2]), ValueError, r"z: .* T >= 0 and dim = 16, got \(3, 8\)"),
    (torch.ones(DIM), torch.tensor([0]), ValueError, r"z: .* got \(16,\)"),
    (torch.ones(3, DIM).long(), torch.tensor([0, 1, 2]), TypeError, "z: expected a floating-point tensor"),
    (torch.ones(3, DIM).tril(-1), torch.tensor([0, 1, 2]), RepresentationError, "1 of 3 vectors"),
    (torch.full((3, DIM), math.nan), torch.tensor([0, 1, 2]), RepresentationError, "3 of 3 vectors"),
]  # fmt: skip


@pytest.mark.parametrize(("z", "labels", "error", "match"), BAD_UPDATES)
def test_a_failed_update_adds_nothing(z: Any, labels: Any, error: type[Exception], match: str) -> None:
    histogram = filled()
    with pytest.raises(error, match=match):
        histogram.update(z, labels)
    assert_same(histogram, filled())


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="num_labels: expected an integer of at least 1, got 0"):
        make(num_labels=0)
    with pytest.raises(TypeError, match="num_labels: expected an integer"):
        make(num_labels=2.0)
    with pytest.raises(ValueError, match="dim"):
        make(dim=1)
    with pytest.raises(ValueError, match="num_bins"):
        make(num_bins=1)
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
        make(temperature=-1.0)
    with pytest.raises(ValueError, match='weighting: expected "empirical" or "uniform"'):
        filled().mutual_information("bayes")


def test_no_graph_is_kept() -> None:
    z, labels = sample()
    histogram = filled((z.requires_grad_(), labels))
    assert not histogram.conditional_entropy().requires_grad
    assert not histogram.state_dict()["sums"].requires_grad
    assert_same(histogram, filled())


def test_inference_mode_anywhere() -> None:
    z, labels = sample()
    with torch.inference_mode():
        inside = make()
        inside.update(z[:50], labels[:50])
        state = inside.state_dict()
    inside.update(z[50:], labels[50:])
    loaded = make()
    with torch.inference_mode():
        loaded.load_state_dict(state)
    loaded.update(z[50:], labels[50:])
    expected = filled((z[:50], labels[:50]), (z[50:], labels[50:]))
    assert_same(inside, expected)
    assert_same(loaded, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    part = sample(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = filled(part)
        assert_same(mixed, filled(part))
    assert_same(mixed, filled(part))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_quantised_in_float32(dtype: torch.dtype) -> None:
    z, labels = sample(dtype=dtype)
    assert_same(filled((z, labels)), filled((z.float(), labels)))


def test_repr_names_the_settings() -> None:
    assert repr(filled(temperature=0.5)) == (
        "SoftHistogram(dim=16, num_labels=12, num_bins=40, seed=3, temperature=0.5; 150 positions)"
    )
