"""Probes of texts: tokenised in order, cut, padded, and what is refused."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from word_tokenizer import word_tokenizer

from ib_callback import Probe, ProbeError


def test_texts_are_taken_in_order_and_padded_on_the_right() -> None:
    texts = ["a b c", "d", "e f g h i j", "b"]
    probe = Probe.from_texts(texts, word_tokenizer(), max_length=6, min_length=4)
    assert probe.input_ids.tolist() == [[1, 3, 4, 5, 2, 0], [1, 7, 8, 9, 10, 2]]
    assert probe.attention_mask.tolist() == [[True] * 5 + [False], [True] * 6]
    assert probe.source["texts_read"] == "4"
    assert probe.tokenizer == "tokenizers.Tokenizer, 13 entries"


def test_a_fast_tokenizer_without_pad_token() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer())
    assert tokenizer.pad_token is None
    probe = Probe.from_texts(["a b c", "e f g h i j"], tokenizer, max_length=6, min_length=1)
    assert probe.input_ids.tolist() == [[1, 3, 4, 5, 2, 0], [1, 7, 8, 9, 10, 2]]
    assert probe.tokenizer is not None
    assert probe.tokenizer.startswith(type(tokenizer).__name__)
    assert probe.tokenizer.endswith("13 entries")


def test_a_slow_tokenizer() -> None:
    # ByT5: a byte is its value + 3, the end of the text is 1
    probe = Probe.from_texts(["abc", "abcdef"], ByT5Tokenizer(), max_length=5, min_length=1)
    a = ord("a") + 3
    assert probe.input_ids.tolist() == [[a, a + 1, a + 2, 1, 0], [a, a + 1, a + 2, a + 3, 1]]
    assert probe.attention_mask.tolist() == [[True] * 4 + [False], [True] * 5]


class LikeMistrals(PreTrainedTokenizerFast):
    """Refuses what the tokenizer of mistral-common refuses."""

    is_fast = False
    backend_tokenizer = None

    def __call__(self, text: Any, return_offsets_mapping: bool = False, **kwargs: Any) -> Any:
        known = {"add_special_tokens", "padding", "truncation", "max_length", "return_attention_mask"}
        if unknown := {*kwargs} - known - {"return_special_tokens_mask", "verbose"}:
            raise ValueError(f"Kwargs {sorted(unknown)} are not supported.")
        if return_offsets_mapping:
            raise ValueError("`return_offsets_mapping` is not supported.")
        return super().__call__(text, **kwargs)


def test_a_tokenizer_that_takes_few_arguments() -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer())
    probe = Probe.from_texts(["a b c", "c d"], LikeMistrals(tokenizer_object=word_tokenizer()), min_length=2)
    assert torch.equal(probe.input_ids, Probe.from_texts(["a b c", "c d"], fast, min_length=2).input_ids)


def test_texts_are_consumed_no_further_than_needed() -> None:
    read = []

    def endless() -> Iterator[str]:
        while True:
            read.append(len(read))
            yield "a" if len(read) % 2 else "a b c d e"

    probe = Probe.from_texts(endless(), word_tokenizer(), num_sequences=3, min_length=5)
    assert len(probe) == 3
    assert len(read) == 6


@pytest.mark.parametrize("kind", ["raw", "fast"])
def test_settings_of_the_tokenizer_are_neither_used_nor_changed(kind: str) -> None:
    raw = word_tokenizer()
    raw.enable_truncation(3, stride=1, strategy="only_first")
    raw.enable_padding(length=9, pad_id=12, pad_token="j", direction="left")
    tokenizer = raw if kind == "raw" else PreTrainedTokenizerFast(tokenizer_object=raw)
    backend = raw if kind == "raw" else tokenizer.backend_tokenizer
    before = (backend.truncation, backend.padding, backend.to_str())
    states = []

    def texts() -> Iterator[str]:
        yield "a b c d e"
        states.append((backend.truncation, backend.padding, backend.to_str()))
        yield "f g"

    probe = Probe.from_texts(texts(), tokenizer, max_length=6, min_length=1)
    assert probe.input_ids.tolist() == [[1, 3, 4, 5, 6, 2], [1, 8, 9, 2, 0, 0]]
    assert [*states, (backend.truncation, backend.padding, backend.to_str())] == [before, before]


def test_half_a_surrogate_pair_is_named() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer())
    for kind in (tokenizer, word_tokenizer()):
        with pytest.raises(ProbeError, match=r"valid Unicode, got 'a \\ud83d"):
            Probe.from_texts(["a b c", "a \ud83d b"], kind, min_length=1)


def test_settings_are_put_back_when_encoding_fails() -> None:
    tokenizer = word_tokenizer()
    with pytest.raises(ProbeError, match="half a surrogate pair"):
        Probe.from_texts(["a \ud800"], tokenizer)
    assert tokenizer.truncation is None
    assert tokenizer.padding is None


def test_no_warning_about_length(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), model_max_length=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe = Probe.from_texts(["a b c d e f g h"], tokenizer, max_length=8, min_length=1)
    assert probe.input_ids.shape == (1, 8)
    assert caplog.records == []
    tokenizer("a b c d e f g h")
    assert "longer than the specified maximum" in caplog.text


def test_labels_of_texts_cover_their_tokens_and_skip_with_them() -> None:
    probe = Probe.from_texts(
        ["a b c", "skipped", "d e", "f g h"],
        word_tokenizer(),
        min_length=4,
        labels={"language": [4, 9, None, np.int64(0)], "good": torch.tensor([1, 1, 0, 1])},
    )
    assert probe.labels["language"].tolist() == [[4, 4, 4, 4, 4], [-1] * 5, [0, 0, 0, 0, 0]]
    assert probe.labels["good"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 0, -1], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, "de"], r"labels\['f'\]: expected only integers or only strings, got 'de' at index 1 after integers"),
        (["en", 1], r"got 1 at index 1 after strings\. Turn all labels into one of the two"),
        ([0, 0.5], "got float 0.5 at index 1"),
        ([0, -3], "got int -3 at index 1"),
        ([0], "expected 2 entries.*got 1"),
        ([0, 1, 2], "expected 2 entries.*got 3"),
        ("en", "one label or None per text, got str"),
        (5, "one label or None per text, got int"),
    ],
)
def test_unusable_labels_of_texts_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        Probe.from_texts(["a b", "c d"], word_tokenizer(), min_length=1, labels={"f": labels})


def test_too_few_labels_for_an_iterator_are_refused() -> None:
    with pytest.raises(ProbeError, match="got 1 entries, so text 1 has none"):
        Probe.from_texts(iter(["a b", "c d"]), word_tokenizer(), min_length=1, labels={"f": [0]})


def test_fewer_than_asked_for_warns() -> None:
    with pytest.warns(UserWarning, match="asked for 5 sequences, got 2: there were 3 texts") as caught:
        probe = Probe.from_texts(["a b", "c", "d e"], word_tokenizer(), num_sequences=5, min_length=4)
    assert len(probe) == 2
    assert caught[0].filename == __file__


def test_none_long_enough_is_an_error() -> None:
    with pytest.raises(
        ProbeError, match=r"min_length=16 tokens, got 2 texts, and the longest has 5\. .*lower min_length"
    ):
        Probe.from_texts(["a b c", "d"], word_tokenizer())
    with pytest.raises(ProbeError, match="expected at least one text, got none"):
        Probe.from_texts([], word_tokenizer())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"texts": "a b c"}, TypeError, r"expected an iterable of strings.*got str.*\[text\]"),
        ({"texts": ["a b", None]}, TypeError, "expected strings, got NoneType at index 1"),
        ({"texts": [{"text": "a b"}]}, TypeError, "got dict at index 0.*dataset"),
        ({"tokenizer": str.split}, TypeError, "tokenizer: expected a transformers tokenizer.*got method_descriptor"),
        ({"max_length": 8}, ProbeError, "min_length: expected at most max_length=8, got 16"),
        ({"max_length": 1, "min_length": 1}, ProbeError, "room for the tokenizer's special tokens.*got 1"),
        ({"num_sequences": 0}, ValueError, "num_sequences: expected an integer of at least 1, got 0"),
        ({"num_sequences": True}, TypeError, "num_sequences: expected an integer of at least 1, got True"),
        ({"max_length": None}, TypeError, "max_length: expected an integer of at least 1, got None"),
        ({"min_length": 2.5}, TypeError, "min_length: expected an integer of at least 1, got 2.5"),
    ],
)
def test_unusable_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    defaults = {"texts": ["a b c"], "tokenizer": word_tokenizer()}
    with pytest.raises(error, match=message):
        Probe.from_texts(**(defaults | arguments))


def byte_tokenizer(*, begins: bool = False, trims: bool = False) -> Tokenizer:
    """A token for each byte of UTF-8; "<s>" before a text if it `begins` so."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<s>": 0} | {letter: i for i, letter in enumerate(alphabet, 1)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    ("texts", "tokenizer", "length", "expected"),
    [
        (["abcdef", "xyz"], byte_tokenizer(), 9, 5 + 2),
        (["abcdef", "xyz"], byte_tokenizer(), 4, 3 + 2),
        (["abcdef", "xyz"], byte_tokenizer(begins=True), 4, 3 + 3),
        (["äbc", "日本"], byte_tokenizer(begins=True), 9, 4 + 6),
        # The end of a sequence is amid a character, which counts whole; its first token is, and it does not count.
        (["日本"], byte_tokenizer(begins=True), 6, 6),
        (["日本"], byte_tokenizer(), 9, 3),
        (["a b  c"], byte_tokenizer(), 9, 5),
        (["a b  c"], byte_tokenizer(trims=True), 9, 5),
        (["a b  c d"], word_tokenizer(), 5, 6),  # of white space between words too
        (["a b  c d"], word_tokenizer(), 9, 8),
    ],
)
def test_the_bytes_that_are_predicted(texts: list[str], tokenizer: Any, length: int, expected: int, fast: bool) -> None:
    given = PreTrainedTokenizerFast(tokenizer_object=tokenizer) if fast else tokenizer
    probe = Probe.from_texts([*texts, ""], given, max_length=length, min_length=3)
    assert probe.num_bytes == expected
    several = Probe.for_tokenizers(texts, {"a": given, "b": ByT5Tokenizer()}, max_length=length, min_length=3)
    assert [probe.num_bytes for probe in several.values()] == [expected, None]
    rows = [{"text": text} for text in texts]
    assert Probe.from_dataset(rows, given, max_length=length, min_length=3, num_sequences=None).num_bytes == expected


def test_bytes_of_other_probes() -> None:
    assert Probe.from_texts(["abc"], ByT5Tokenizer(), min_length=1).num_bytes is None
    given = Probe.from_tokens([[1, 2, 3]], num_bytes=7)
    unknown = Probe.from_tokens([[1, 2, 3]])
    assert (given.num_bytes, unknown.num_bytes) == (7, None)
    assert given.fingerprint == unknown.fingerprint
    with pytest.raises(ValueError, match="num_bytes: expected an integer of at least 0"):
        Probe.from_tokens([[1]], num_bytes=-1)
    pairs = [{"prompt": "ab ", "chosen": "cdé", "rejected": "f"}]
    assert Probe.from_preferences(pairs, byte_tokenizer()).num_bytes == 6 + 3
    assert (Probe.builtin(num_sequences=2, max_length=16).num_bytes or 0) > 2 * 15
