"""Counts of label pairs on a probe, the curve they give, and the curve as the bound of a Meter."""

import json
import math
import pickle
from collections import Counter

import brute_force as twin
import numpy as np
import pytest
import torch
from torch import nn

import ib_callback as ib
from ib_callback.bound import probe_curve as module
from ib_callback.bound._hard import cluster
from ib_callback.bound._joint import Joint
from ib_callback.bound.curve import FILENAME as CURVE_FILENAME
from ib_callback.run.config import RunConfig
from ib_callback.run.rules import LiveRules
from ib_callback.run.run import Run

VOCABULARY = 12


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The directory of the curves of this test, instead of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ib_callback" / "ib_curves"


def make_probe(num_sequences=12, length=24, seed=0):
    """Text of a random Markov chain, right-padded to different lengths."""
    random = np.random.RandomState(seed)
    chain = random.dirichlet([0.15] * VOCABULARY, VOCABULARY).cumsum(1)
    ids = np.zeros((num_sequences, length), np.int64)
    for s in range(1, length):
        ids[:, s] = [int(np.searchsorted(chain[token], random.rand())) % VOCABULARY for token in ids[:, s - 1]]
    mask = np.arange(length) < random.randint(length - 8, length + 1, (num_sequences, 1))
    return ib.Probe.from_tokens(ids, mask)


@pytest.fixture(scope="module")
def probe():
    return make_probe()


class TokenModel(nn.Module):
    """A model whose hidden state depends on the token at the position alone."""

    def __init__(self, seed, dim=6, spread=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        common = torch.randn(dim, generator=generator)
        self.embedding = nn.Embedding.from_pretrained(
            common + spread * torch.randn(VOCABULARY, dim, generator=generator), freeze=False
        )

    def forward(self, input_ids):
        return self.embedding(input_ids)


TOKEN_ONLY = {"layers": ["embedding"], "forward": lambda model, ids, mask: model(ids)}


def curve_meter(probe, **keywords):
    return ib.Meter(
        probe, **{"orders": ("token", "bigram"), "num_bins": 8, "bound": "ib_curve", **TOKEN_ONLY, **keywords}
    )


@pytest.mark.parametrize("widest", [1, 2, 4])
@pytest.mark.parametrize("order", ["token", "bigram"])
def test_counts_are_those_of_the_pairs_at_valid_positions(probe, order, widest):
    orders = [name for name in twin.ORDERS if twin.order_width(name) <= max(widest, twin.order_width(order))]
    joint = module.probe_joint(probe, order, orders=orders)
    ids, mask = probe.input_ids.numpy(), probe.attention_mask.numpy()
    width = twin.order_width(order)
    positions = twin.valid_positions(mask, twin.order_width(orders[-1]))
    expected = Counter((twin.input_label(ids, p, width), twin.output_label(ids, p, width)) for p in positions)
    got = {
        (tuple(joint.inputs[x].tolist()), tuple(joint.outputs[y].tolist())): int(count)
        for x, y, count in zip(joint.counts.row, joint.counts.col, joint.counts.data, strict=True)
    }
    assert got == expected
    assert joint.num_positions == len(positions)


def test_an_order_that_is_not_measured(probe):
    with pytest.raises(ValueError, match=r"order: expected one of orders= \(token\), got 'bigram'"):
        module.probe_joint(probe, "bigram", orders="token")
    with pytest.raises(ValueError, match=r"order: expected one of orders= \(token\), got 'bigram'"):
        ib.probe_curve(probe, order="bigram", orders="token")


def test_a_probe_without_a_valid_position():
    with pytest.raises(ib.ProbeError, match=r"no valid position\. Expected sequences of at least 8 real tokens"):
        module.probe_joint(ib.Probe.from_tokens([[1, 2, 3, 4, 5]]))


def test_the_curve_is_that_of_the_counts_and_says_of_what(probe):
    curve = ib.probe_curve(probe, num_codewords=8)
    joint = module.probe_joint(probe)
    plain = ib.ib_curve(joint.counts, num_codewords=8)
    np.testing.assert_array_equal(curve.complexity, plain.complexity)
    np.testing.assert_array_equal(curve.expressivity, plain.expressivity)
    expected = {"probe": probe.fingerprint, "order": "token", "K": 4, "num_positions": joint.num_positions}
    assert curve.info == expected


def test_a_curve_is_computed_once_for_each_thing_that_decides_it(probe, own_cache, monkeypatch):
    computed = []

    def compute(counts, *, num_codewords, progress):
        computed.append((counts.shape, num_codewords))
        return ib.ib_curve(counts, num_codewords=num_codewords, betas=[5.0])

    monkeypatch.setattr(module, "ib_curve", compute)
    first = ib.probe_curve(probe, num_codewords=4)
    assert ib.probe_curve(probe, num_codewords=4) == first
    assert len(computed) == 1
    others = [
        {"num_codewords": 5},
        {"num_codewords": 4, "order": "bigram"},
        {"num_codewords": 4, "orders": ("token", "bigram")},
        {"num_codewords": 4, "cache": False},
    ]
    for number, keywords in enumerate(others, start=2):
        ib.probe_curve(probe, **keywords)
        assert len(computed) == number
    ib.probe_curve(make_probe(seed=1), num_codewords=4)
    assert len(computed) == 6
    assert len(list(own_cache.glob("*.json"))) == 5


def test_a_damaged_file_is_set_aside_and_the_curve_computed_again(probe, own_cache):
    curve = ib.probe_curve(probe, num_codewords=4)
    (file,) = own_cache.glob("*.json")
    file.write_text(file.read_text()[:50])
    with pytest.warns(RuntimeWarning, match="is damaged"):
        assert ib.probe_curve(probe, num_codewords=4) == curve


@pytest.mark.parametrize("other", ["number", "info", "another curve", "an earlier format"])
def test_a_file_that_is_not_what_was_asked_for_is_computed_again(probe, own_cache, other):
    curve = ib.probe_curve(probe, num_codewords=4)
    (file,) = own_cache.glob("*.json")
    content = file.read_text()
    if other == "number":
        file.write_text(content.replace('"expressivity": [0.0, 0.', '"expressivity": [0.0, 1.'))
    elif other == "info":
        file.write_text(content.replace(probe.fingerprint, make_probe(seed=1).fingerprint))
    elif other == "another curve":
        ib.probe_curve(make_probe(seed=1), num_codewords=4, cache=False).save(file)
    else:
        file.write_text(json.dumps({k: v for k, v in json.loads(content).items() if k != "sha256"} | {"format": 1}))
        file.rename(file.with_name(file.name.replace(".2.json", ".json")))
    if other == "an earlier format":  # it is left alone
        assert ib.probe_curve(probe, num_codewords=4) == curve
        return
    assert file.read_text() != content
    with pytest.warns(RuntimeWarning, match="is damaged or cannot be read. It was moved to .* and is built again"):
        assert ib.probe_curve(probe, num_codewords=4) == curve
    assert file.read_text() == content


def test_where_nothing_can_be_kept_each_process_computes_the_same(probe, tmp_path, monkeypatch):
    kept = ib.probe_curve(probe, num_codewords=4)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="cannot be cached"):
        assert ib.probe_curve(probe, num_codewords=4) == kept


def test_the_distance_is_that_to_the_curve_in_the_unit_of_the_measurement(probe):
    model = TokenModel(0)
    diagonal = curve_meter(probe, bound="diagonal").measure(model)
    measured = curve_meter(probe).measure(model)
    curve = ib.probe_curve(probe, orders=("token", "bigram"), num_codewords=8)
    token = measured["token"]
    bound = curve.bound(token.complexity * math.log(8)) / math.log(8)
    assert token.distance_to_bound == pytest.approx(bound - token.expressivity, abs=1e-12)
    assert token.bound_ratio == pytest.approx(token.expressivity / bound, abs=1e-12)
    assert measured.distance_to_bound == token.distance_to_bound < diagonal["token"].distance_to_bound
    assert (measured["bigram"].distance_to_bound, measured["bigram"].bound_ratio) == (None, None)
    same = ("complexity", "expressivity", "optimality", "complexity_null", "distance_above_null", "complexity_by_layer")
    for order in ("token", "bigram"):
        assert all(getattr(measured[order], name) == getattr(diagonal[order], name) for name in same)
    assert diagonal["token"].bound_ratio is None
    assert ib.Measurement.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured


def test_settings_tell_the_bounds_apart(probe):
    model = TokenModel(0)
    settings = curve_meter(probe).settings(model)
    assert (settings["bound"], settings["bound_codewords"]) == ("ib_curve", 8)
    assert "bound_codewords" not in curve_meter(probe, bound="diagonal").settings(model)


def test_another_primary_order_has_a_curve_of_its_own(probe):
    measured = curve_meter(probe, primary="bigram").measure(TokenModel(0))
    assert measured["token"].distance_to_bound is None
    assert measured.distance_to_bound == measured["bigram"].distance_to_bound is not None


def test_no_model_of_the_token_alone_lies_above_the_curve(probe):
    """The point of having a curve: 50 models, of collapsed to spread embeddings, and of few to many dimensions."""
    meter = curve_meter(probe, null=False, orders="token")
    ratios = []
    for seed in range(50):
        model = TokenModel(seed, dim=(2, 6, 24)[seed % 3], spread=(0.3, 1.0, 5.0, 0.1)[seed % 4])
        point = meter.measure(model)["token"]
        assert point.distance_to_bound >= -1e-3 / math.log(8)
        ratios.append(point.bound_ratio)
    assert 0.1 < min(ratios) < max(ratios) <= 1.001


def test_a_code_found_by_the_iteration_is_measured_on_the_curve(probe):
    """The measured unit and the curve's agree: a model that makes the curve's own hard code is on the curve."""
    joint = module.probe_joint(probe, orders="token")
    curve = ib.ib_curve(joint.counts, num_codewords=8).to_efficiency(8)
    code, _ = cluster(Joint.of(joint.counts), 8, sweeps=30, tolerance=0.0, seed=0)
    model = TokenModel(0, dim=16)
    points = ib.reference_points(16, 8)
    with torch.no_grad():
        model.embedding.weight[torch.from_numpy(joint.inputs[:, 0])] = points[torch.from_numpy(code)]
    point = ib.Meter(probe, orders="token", num_bins=8, temperature=0.01, null=False, **TOKEN_ONLY).measure(model)[
        "token"
    ]
    assert point.expressivity == pytest.approx(curve.expressivity[-1], abs=0.02)
    assert curve.bound(point.complexity) - point.expressivity == pytest.approx(0, abs=0.02)


def test_uniform_weighting_has_no_curve(probe):
    with pytest.raises(ValueError, match=r'bound="ib_curve" bounds mutual information, but weighting=\'uniform\''):
        curve_meter(probe, weighting="uniform")


def test_a_bound_that_is_none(probe):
    with pytest.raises(ValueError, match="bound: expected one of 'diagonal', 'ib_curve', got 'curve'"):
        curve_meter(probe, bound="curve")


def test_the_curve_is_there_after_preflight_and_travels_with_the_meter(probe, monkeypatch):
    meter = curve_meter(probe)
    model = TokenModel(0)
    meter.preflight(model)
    monkeypatch.setattr(module, "ib_curve", None)  # any further computation would fail
    assert meter.curve() is meter.curve()
    assert meter.measure(model).distance_to_bound is not None
    meter.forward = None  # a lambda cannot be pickled
    assert pickle.loads(pickle.dumps(meter)).curve() == meter.curve()
    assert curve_meter(probe, bound="diagonal").curve() is None


@pytest.mark.parametrize("name", ["bigram/distance_to_bound", "bigram/bound_ratio"])
def test_what_the_curve_does_not_bound_cannot_be_watched(name):
    which = {"primary": "token", "bound": "ib_curve"}
    for settings in ({"early_stopping": ib.PlateauStopping(name, mode="max")}, {"select": name}):
        with pytest.raises(ValueError, match=rf"no metric '{name}' is measured\. .* exists for the primary order only"):
            LiveRules(["token", "bigram"], config=RunConfig(**settings), **which)
    config = RunConfig(select="token/bound_ratio", early_stopping=ib.PlateauStopping())
    LiveRules(["token", "bigram"], config=config, **which)
    with pytest.raises(ValueError, match=r"no metric 'token/bound_ratio' is measured\. bound_ratio needs bound="):
        LiveRules(["token"], config=RunConfig(select="token/bound_ratio"))


def test_names_of_metrics_are_those_of_a_measurement(probe):
    measured = curve_meter(probe).measure(TokenModel(0))
    rules = LiveRules(["token", "bigram"], primary="token", bound="ib_curve")
    assert set(measured.scalars()) == {*rules.metrics, "seconds", "overhead", "tokens_seen"}


@pytest.mark.parametrize("writes", [True, False])
def test_a_run_keeps_its_curve_beside_its_trajectory(probe, tmp_path, writes):
    meter = curve_meter(probe)
    followed = Run(meter, every_n_steps=2, log_plane=False)
    followed.begin(TokenModel(0), directory=tmp_path / "run", writes=writes)
    file = tmp_path / "run" / CURVE_FILENAME
    assert file.exists() == writes
    if writes:
        assert ib.IBCurve.load(file) == meter.curve()
        followed.end(0)


def test_the_pictures_of_a_run_have_its_curve(probe, tmp_path, monkeypatch):
    from ib_callback import plot

    meter, seen = curve_meter(probe), []
    for name in ("save_information_plane", "plane_by_layer", "over_steps", "encoded"):
        monkeypatch.setattr(plot, name, lambda *_, **given: seen.append(given.get("curve")))
    followed = Run(meter, every_n_steps=2)
    followed.begin(TokenModel(0), directory=tmp_path / "run")
    for step in range(2):
        followed.record(TokenModel(0), step)
    assert seen == [meter.curve()] * 2
    followed.pictures(final=True)
    assert meter.curve() in seen[2:]
    followed.end(0)


def test_a_curve_that_cannot_be_written_is_a_warning(probe, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(ib.IBCurve, "save", fail)
    followed = Run(curve_meter(probe), every_n_steps=2, log_plane=False)
    with pytest.warns(RuntimeWarning) as warned:
        followed.begin(TokenModel(0), directory=tmp_path / "run")
    followed.end(0)
    assert any("ib_curve.json could not be written" in str(warning.message) for warning in warned)
    assert not (tmp_path / "run" / CURVE_FILENAME).exists()
