"""Probes of the same documents under several tokenizers, and what is said where they are compared."""

from __future__ import annotations

import hashlib
import json
import warnings

import pytest
import torch
from tiny_models import llama
from tokenizers import Tokenizer, models, pre_tokenizers

import ib_callback as ib
from ib_callback.plot import information_plane
from ib_callback.probe import builtin_text
from ib_callback.probe.several_tokenizers import texts_of
from ib_callback.results.measurement import settings_differences


def words() -> Tokenizer:
    result = Tokenizer(models.WordLevel({word: i for i, word in enumerate("? a bb ccc dddd".split())}, unk_token="?"))
    result.pre_tokenizer = pre_tokenizers.Whitespace()
    return result


def letters() -> Tokenizer:
    result = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate("? a b c d".split())}, unk_token="?"))
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split("", behavior="isolated")]
    )
    return result


# Words and letters: 8 and 8, 2 and 8 (too few words), 8 and 16, 3 and 3 (too few of both), 10 and 22.
TEXTS = ["a " * 8, "dddd dddd", "bb " * 8, "a a a", "a bb ccc dddd bb a ccc bb a ccc"]


@pytest.fixture(scope="module")
def probes():
    return ib.Probe.for_tokenizers(
        TEXTS,
        {"words": words(), "letters": letters()},
        min_length=8,
        max_length=12,
        labels={"topic": [0, 1, 2, 3, None]},
    )


def test_the_same_documents_enter_every_probe(probes):
    assert list(probes) == ["words", "letters"]
    assert [probe.attention_mask.sum(1).tolist() for probe in probes.values()] == [[8, 8, 10], [8, 12, 12]]
    for key, probe in probes.items():
        own = ib.Probe.from_texts(
            [TEXTS[0], TEXTS[2], TEXTS[4]], {"words": words(), "letters": letters()}[key],
            min_length=8, max_length=12, labels={"topic": [0, 2, None]},
        )  # fmt: skip
        assert probe.fingerprint == own.fingerprint
        assert probe.name == f"texts-{key}"
    documents = hashlib.sha256(json.dumps([TEXTS[0], TEXTS[2], TEXTS[4]]).encode()).hexdigest()
    assert {probe.source["documents"] for probe in probes.values()} == {documents}
    assert probes["words"].source | {"tokenizers": "words, letters", "texts_read": "5"} == probes["words"].source
    assert probes["words"].fingerprint != probes["letters"].fingerprint


def test_a_saved_probe_still_says_which_documents_they_were(probes, tmp_path):
    probes["words"].save(tmp_path / "probe.safetensors")
    assert ib.Probe.load(tmp_path / "probe.safetensors").source == probes["words"].source


def test_no_more_is_read_than_needed():
    def texts():
        yield from TEXTS[:3]
        raise AssertionError("read on")

    two = ib.Probe.for_tokenizers(texts(), {"w": words(), "l": letters()}, num_sequences=2, min_length=8, name="two")
    assert [len(probe) for probe in two.values()] == [2, 2]
    assert two["w"].name == "two-w"


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (TEXTS, "got 3: there were 5 documents, and 2 of them have fewer than min_length=8 tokens under at least one"),
        (TEXTS[:2], "got 1: there were 2 documents, and 1 of them has fewer than min_length=8 tokens"),
        (TEXTS[::2], "got 3: there were 3 documents, and none of them is too short"),
    ],
)
def test_fewer_documents_than_asked_for(texts, told):
    """The number of documents and the number of short ones are told separately."""
    with pytest.warns(UserWarning, match=f"asked for 9 documents, {told}"):
        ib.Probe.for_tokenizers(texts, {"w": words(), "l": letters()}, num_sequences=9, min_length=8)


@pytest.mark.parametrize(
    ("texts", "tokenizers", "keywords", "error", "message"),
    [
        (TEXTS, [words()], {}, TypeError, r"tokenizers: expected \{name: tokenizer\} with at least one, got list"),
        (TEXTS, {}, {}, TypeError, "with at least one, got dict"),
        ("text", {"w": words()}, {}, TypeError, "texts: expected an iterable of strings, one per document, got str"),
        ([3], {"w": words()}, {}, TypeError, "texts: expected strings, got int at index 0"),
        ([], {"w": words()}, {}, ib.ProbeError, "texts: expected at least one text, got none"),
        (TEXTS, {"w": words()}, {"min_length": 99}, ib.ProbeError, r"every tokenizer \(w\), got 5 texts, all"),
        (TEXTS, {"w": words()}, {"num_sequences": 0}, ValueError, "num_sequences: expected an integer of at least 1"),
        (TEXTS, {"w": words()}, {"min_length": 8, "labels": {"t": [1]}}, ib.ProbeError, "expected 5 entries.*got 1"),
        (TEXTS, {"w": words()}, {"min_length": 8, "max_length": 4}, ib.ProbeError, "min_length: expected at most"),
        (TEXTS, {"w": len}, {}, TypeError, "tokenizer: expected a transformers tokenizer"),
    ],
)  # fmt: skip
def test_what_cannot_be(texts, tokenizers, keywords, error, message):
    with pytest.raises(error, match=message):
        ib.Probe.for_tokenizers(texts, tokenizers, **keywords)


@pytest.fixture(scope="module")
def measurements(probes):
    model = llama().eval()
    settings = {"orders": "token", "num_bins": 10, "null": False}
    return [
        ib.measure(model, probes[key], step=step, **settings) for step, key in enumerate(["words", "letters", "words"])
    ]


def test_settings_know_the_documents(probes, measurements):
    assert {m.settings["documents"] for m in measurements} == {probes["words"].source["documents"]}
    (difference,) = settings_differences(measurements[0], measurements[1])
    assert difference.startswith('probe: "')
    assert difference.endswith(" (the same documents, another tokenizer)")
    assert settings_differences(measurements[0], measurements[2]) == []


def test_comparing_them_is_a_warning(measurements):
    message = "these measurements are of the same documents under 2 tokenizers. A token is a different piece of text"
    with pytest.warns(RuntimeWarning, match=message):
        information_plane(measurements)
    with pytest.warns(RuntimeWarning, match=message):
        ib.Trajectory(measurements).correlations()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        information_plane(measurements[::2])
        ib.Trajectory(measurements[::2]).correlations()
        # Other texts are another matter.
        other = ib.measure(
            llama(), ib.Probe.from_tokens(torch.ones(2, 9, dtype=torch.long)), step=3, orders="token", num_bins=10
        )
        information_plane([measurements[0], other])


# --- documents by name


def test_documents_are_texts_of_files_and_of_what_every_installation_has(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "body": "uno"}\n{"text": "two", "body": null}\n')
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert list(texts_of(str(tmp_path / "a.jsonl"))) == list(texts_of(str(tmp_path / "a.txt"))) == ["one", "two"]
    assert list(texts_of(str(tmp_path / "a.jsonl"), text_column="body")) == ["uno", ""]
    assert list(texts_of("builtin")) == list(builtin_text.split()[1])


@pytest.mark.parametrize(
    ("content", "column", "message"),
    [
        ('{"text": "one"}\n', "body", "expected a column 'body', got the columns text"),
        ('{"text": 5}\n', "text", "expected a text in column 'text' of row 0, got 5"),
        (None, "text", "no such file"),
    ],
)
def test_files_that_are_no_documents(tmp_path, content, column, message):
    if content is not None:
        (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ib.ProbeError, match=message):
        list(texts_of(str(tmp_path / "a.jsonl"), text_column=column))
