"""Feature probes: the same numbers as a measurement of their own, at a part of the cost."""

import pickle
import warnings
from types import SimpleNamespace

import brute_force as bf
import numpy as np
import pytest
import torch
from tiny_models import llama, make_probe, numbers

import ib_callback as ib
from ib_callback.measuring.settings import label_names, named_features

SETTINGS = {"num_bins": 20, "batch_size": 3, "orders": ("token", "bigram")}


def pairs(name="pairs", **labels):
    """Preference pairs with a prompt that carries no label, of different lengths; the last pair is short."""
    ids = torch.randint(2, 40, (8, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(12) < torch.tensor([12, 9, 11, 12, 10, 12, 12, 4])[:, None]
    preferred = torch.tensor([1, 0] * 4)[:, None].expand(8, 12)
    answer = (torch.arange(12) >= 4) & mask
    labels = labels or {"preference": torch.where(answer, preferred, -1)}
    return ib.Probe.from_tokens(ids, mask, labels=labels, name=name)


def spoken():
    """A label of each sequence, missing in two, and one of each token, missing in some."""
    probe = pairs()
    rows = torch.tensor([0, 1, 2, -1, 2, 1, 0, -1])[:, None].expand(8, 12)
    return pairs(language=rows, speech=torch.where(probe.input_ids % 5 == 0, -1, probe.input_ids % 3))


@pytest.fixture(scope="module")
def model():
    return llama().eval()


@pytest.fixture(scope="module")
def measured(model):
    return ib.measure(model, make_probe(), feature_probes=[pairs(), spoken()], **SETTINGS)


def test_features_are_those_of_a_measurement_of_the_probe_itself(model, measured):
    alone = ib.measure(model, make_probe(), **SETTINGS)
    assert list(measured.features) == ["preference", "language", "speech"]
    assert measured.orders == alone.orders
    assert (measured.entropy, measured.num_positions) == (alone.entropy, alone.num_positions)
    for probe in (pairs(), spoken()):
        own = ib.measure(model, probe, **SETTINGS)
        for name, expected in own.features.items():
            found = measured.features[name]
            for number in ("information", "information_null", "information_null_std", "information_by_layer"):
                assert getattr(found, number) == pytest.approx(getattr(expected, number), abs=1e-9), (name, number)
            assert found.num_positions == expected.num_positions
            # Of the main probe, not of its own.
            assert found.ratio == pytest.approx(found.information / alone.complexity, rel=1e-12)


def test_features_agree_with_the_brute_force(model, measured):
    probe = spoken()
    with torch.no_grad():
        mask = probe.attention_mask.long()
        hidden = model(probe.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:]
    tables = {name: labels.numpy() for name, labels in probe.labels.items()}
    table = bf.evaluate(
        [states.double().numpy() for states in hidden], probe.input_ids.numpy(), probe.attention_mask.numpy(),
        orders=SETTINGS["orders"], features=tables, num_bins=20,
    )  # fmt: skip
    for name, feature in table.features.items():
        assert measured.features[name].information_by_layer == pytest.approx(feature.information_by_layer, abs=1e-6)
        assert measured.features[name].num_positions == len(feature.labels)
    language = table.features["language"]
    null = bf.sequence_null(language.layers, language.sequences, language.labels)
    point = measured.features["language"]
    assert point.information_null == pytest.approx(null.mean, abs=4 * null.std / 10)
    assert point.information_null_std == pytest.approx(null.std, rel=0.4)


def test_nothing_but_the_features_is_planned_for_and_read(model):
    meter = ib.Meter(make_probe(), feature_probes=[pairs()], **SETTINGS)
    (other,) = meter._further_meters()
    plan = other.plan()
    assert [label_set.name for label_set in plan.label_sets] == [("feature", "preference")]
    assert not plan.single
    assert plan.nulls == ()
    own = ib.Meter(pairs(), **SETTINGS).plan()
    assert plan.num_positions == own.label_sets[-1].num_positions < own.num_positions
    assert plan.memory(2, 20) < own.memory(2, 20) / 2


def test_settings_tell_which_probes_they_were(measured):
    fingerprints = {"preference": pairs().fingerprint, "language": spoken().fingerprint, "speech": spoken().fingerprint}
    assert measured.settings["feature_probes"] == fingerprints
    assert measured.settings["features"] == []
    assert "label_names" not in measured.settings
    assert ib.Measurement.from_dict(measured.to_dict()) == measured
    from ib_callback.results.measurement import settings_differences

    without = {k: v for k, v in measured.settings.items() if k != "feature_probes"}
    assert settings_differences(without, measured)[0].startswith("feature_probes: absent vs {")


def test_logged_like_any_feature(measured):
    names = {name for name in measured.metrics() if name.startswith("ib/preference")}
    logged = ("information", "information_null", "information_null_std", "information_p_value", "ratio")
    logged += ("ratio_above_null",)
    assert names == {f"ib/preference/{name}" for name in logged}
    # Its positions, not its sequences, are what is permuted.
    assert measured.features["speech"].information_p_value is None
    assert "ib/speech/information_p_value" not in measured.metrics()


def test_a_preflight_covers_them(model):
    report = ib.Meter(make_probe(), feature_probes=[pairs()], **SETTINGS).preflight(model)
    assert [name for name, _ in report.feature_probes] == ["pairs"]
    assert "; features of pairs: 8 sequences, " in report.describe()
    foreign = ib.Probe.from_tokens([[500] * 12, [3] * 12], labels={"preference": [[1] * 12, [0] * 12]}, name="foreign")
    with pytest.raises(ib.ModelError, match="probe 'foreign': token id 500 is outside"):
        ib.Meter(make_probe(), feature_probes=[foreign], **SETTINGS).preflight(model)
    short = ib.Probe.from_tokens([[5, 6, 7]], labels={"preference": [[1, 1, 1]]}, name="short")
    with pytest.raises(ib.ProbeError, match="probe 'short': no valid position"):
        ib.Meter(make_probe(), feature_probes=[short], **SETTINGS).preflight(model)


def test_a_label_at_no_valid_position(model):
    last = ib.Probe.from_tokens([[5, 6, 7, 8, 9]], labels={"end": [[-1, -1, -1, -1, 1]]})
    with pytest.raises(ib.ProbeError, match=r"feature 'end': expected labels .* at some of the 2 valid positions"):
        ib.measure(model, make_probe(), feature_probes=[last], **SETTINGS)


def test_settings_changed_later_reach_them(model):
    # As the callbacks do: for each run they choose layers, forward and the bar.
    meter = ib.Meter(make_probe(), feature_probes=[pairs()], **SETTINGS)
    meter.layers = ["model.layers.0"]
    calls = []

    def forward(model, ids, mask):
        calls.append(len(ids))
        return model(ids, attention_mask=mask)

    meter.forward = forward
    point = meter.measure(model)
    assert point.layers == ("model.layers.0",)
    assert len(point.features["preference"].information_by_layer) == 1
    assert calls == [3, 3, 3, 1, 3, 3, 2]


def test_groups_of_layers_and_copies_change_nothing(model, measured):
    meter = ib.Meter(make_probe(), feature_probes=(p for p in [pairs(), spoken()]), **SETTINGS)
    needed = max(m.plan().memory(1, 20) for m in (meter, *meter._further_meters()))
    grouped = ib.Meter(make_probe(), feature_probes=[pairs(), spoken()], memory_budget=needed, **SETTINGS)
    point = grouped.measure(model)
    for name, feature in measured.features.items():
        assert point.features[name].information_by_layer == pytest.approx(feature.information_by_layer, abs=1e-9)
        assert point.features[name].information_null == pytest.approx(feature.information_null, abs=1e-9)
    assert numbers(pickle.loads(pickle.dumps(meter)).measure(model)) == numbers(measured)


def test_uniform_weights_have_no_null(model):
    point = ib.measure(model, make_probe(), feature_probes=pairs(), weighting="uniform", **SETTINGS)
    assert point.features["preference"].information_null is None


# --- names


def test_a_mapping_tells_labels_of_one_name_apart(model):
    meter = ib.Meter(make_probe(), feature_probes={"tulu": pairs(), "other": pairs("other")}, **SETTINGS)
    assert meter.feature_names == ("tulu_preference", "other_preference")
    point = meter.measure(model)
    # Swapped within pairs whatever it is called here.
    assert point.features["tulu_preference"] == point.features["other_preference"]
    own = ib.measure(model, pairs(), **SETTINGS).features["preference"]
    assert point.features["tulu_preference"].information_null_std == pytest.approx(own.information_null_std, abs=1e-9)


def labelled(**labels):
    return make_probe(labels={name: torch.zeros(10, 16, dtype=torch.long) for name in labels})


@pytest.mark.parametrize(
    ("main", "probes", "error", "message"),
    [
        (make_probe, lambda: [pairs(), pairs("b")], ValueError,
         "'preference' of probe 'b' has the name of a label of probe 'pairs'.*for \"other_preference\""),
        (lambda: labelled(preference=1), lambda: [pairs()], ValueError, "has the name of a label of the main probe"),
        (make_probe, lambda: [pairs(token=torch.zeros(8, 12, dtype=torch.long))], ValueError,
         "the feature 'token' of probe 'pairs' has the name of an n-gram order"),
        (make_probe, lambda: [make_probe()], ib.ProbeError, "expected probes with labels, got Probe"),
        (make_probe, lambda: ["tulu"], TypeError, "expected ib_callback.Probe objects, .*got str"),
        (make_probe, lambda: "tulu", TypeError, "expected ib_callback.Probe objects, .*got str"),
        (make_probe, lambda: 3, TypeError, "expected ib_callback.Probe objects, .*got int"),
        (make_probe, lambda: {"a/b": pairs()}, ValueError, 'expected names, not empty and without "/", got \'a/b\''),
    ],
)  # fmt: skip
def test_probes_that_cannot_be(main, probes, error, message):
    with pytest.raises(error, match=message):
        ib.Meter(main(), feature_probes=probes(), **SETTINGS)


def test_names_of_labels_go_into_the_settings():
    probe = SimpleNamespace(
        label_names={"language": ["de", "en"], "domain": [str(i) for i in range(101)], "speech": []}
    )
    assert label_names(probe, {"language": "c4_language", "domain": "c4_domain", "speech": "speech"}) == {
        "c4_language": ["de", "en"]
    }
    assert label_names(pairs(), {"preference": "preference"}) == {}


def test_no_feature_probes_are_no_settings():
    assert named_features((), ["token"], []) == []
    assert "feature_probes" not in ib.Meter(make_probe(), layers=["only"]).__dict__


# --- labels


@pytest.mark.parametrize("kind", ["sequence", "position"])
def test_one_label_alone_carries_no_information(model, kind):
    values = torch.zeros(8, 12, dtype=torch.long)
    if kind == "position":
        values[:, ::2] = -1
    point = ib.measure(model, make_probe(), feature_probes=pairs(only=values), **SETTINGS).features["only"]
    assert point.information == pytest.approx(0, abs=1e-7)
    assert point.information_null == pytest.approx(0, abs=1e-7)
    assert point.information_null_std == pytest.approx(0, abs=1e-7)


def test_a_failing_feature_fails_the_point():
    model = llama().eval()
    probe = pairs()
    with torch.no_grad():
        model.model.embed_tokens.weight[39] = float("nan")
    ids = torch.where(probe.input_ids == 39, 38, probe.input_ids)
    ids[2, 5] = 39
    broken = ib.Probe.from_tokens(ids, probe.attention_mask, labels=dict(probe.labels))
    main = make_probe(highest=38)
    assert ib.measure(model, main, **SETTINGS).error is None
    named = r"^feature probe 'tokens': representations .* zero, NaN or infinite"
    with warnings.catch_warnings(), pytest.raises(ib.RepresentationError, match=named):
        ib.measure(model, main, feature_probes=[broken], **SETTINGS)


def test_at_least_fifty_permutations_of_whole_sequences():
    from ib_callback.measuring.quantities.features import feature_labels
    from ib_callback.probe.ngrams import valid_positions

    probe = spoken()
    positions = valid_positions(probe.attention_mask.numpy(), 2)
    language = feature_labels("language", probe.labels["language"].numpy(), positions, seed=0)
    assert len(language.permuted) >= 50
    # Sequences without a label keep none; the last one has one valid position and no label.
    assert (language.permuted[:, [3, 7]] == -1).all()
    assert (np.sort(language.permuted[:, [0, 1, 2, 4, 5, 6]], axis=1) == [0, 0, 1, 1, 2, 2]).all()
    assert len({tuple(row) for row in language.permuted}) > 30
    speech = feature_labels("speech", probe.labels["speech"].numpy(), positions, seed=0)
    assert speech.permuted is None
    swapped = feature_labels("preference", pairs().labels["preference"].numpy(), positions, seed=0).permuted
    assert len(swapped) >= 50
    # Sequence 7 has no token of an answer at all, so these are no pairs throughout.
    assert set(map(tuple, swapped[:, :2].tolist())) >= {(0, 1), (1, 0)}


@pytest.mark.parametrize(("pairs", "warns"), [(20, True), (256, False)])
def test_too_few_preference_pairs_are_told_before_training(pairs, warns):
    labels = torch.tensor([1, 0]).repeat(pairs)[:, None].expand(2 * pairs, 6)
    ids = torch.randint(2, 40, (2 * pairs, 6), generator=torch.Generator().manual_seed(1))
    probe = ib.Probe.from_tokens(ids, labels={"preference": labels}, name="few")
    meter = ib.Meter(make_probe(), orders=["token"], feature_probes=probe)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        meter.preflight(llama().eval())
    told = [str(each.message) for each in caught if "pairs" in str(each.message)]
    assert len(told) == warns
    assert all("'preference' of probe 'few': only 20 pairs. About 256 are needed" in text for text in told)
