"""The overlap of a probe with training text, against sets of tuples."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import ib_callback as ib
from ib_callback.probe import overlap as overlap_module
from ib_callback.probe.overlap import ngram_hashes


def twin(probe: ib.Probe, rows: list[list[int]], n: int):
    """Sequences that share an n-gram, those that occur as a whole (ends aside), n-grams and how many are found."""
    seen = {tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)}
    sequences, duplicates, total, found = [], [], 0, 0
    for number in range(len(probe)):
        tokens = probe.input_ids[number][probe.attention_mask[number]].tolist()
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        hits = sum(gram in seen for gram in grams)
        total, found = total + len(grams), found + hits
        if hits:
            sequences.append(number)
        core = tokens[1:-1] if len(tokens) >= n + 2 else tokens
        inside = any(row[i : i + len(core)] == core for row in rows for i in range(len(row) - len(core) + 1))
        if len(tokens) >= n and inside:
            duplicates.append(number)
    return tuple(sequences), tuple(duplicates), total, found


def facts(found):
    return found.sequences, found.duplicates, found.num_ngrams, found.found_ngrams


def make_probe(seed=0, vocabulary=5, rows=12, length=20):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    lengths = torch.randint(2, length + 1, (rows,), generator=generator)
    mask = torch.arange(length) < lengths[:, None]
    if seed % 2:
        mask = mask.flip(1)
    return ib.Probe.from_tokens(ids, mask)


def training_rows(probe, seed):
    """Random rows, some with a whole sequence or a part of one of the probe in them."""
    generator = np.random.default_rng(seed)
    rows = [generator.integers(0, 5, generator.integers(0, 40)).tolist() for _ in range(30)]
    for number in (0, 3, 5):
        tokens = probe.input_ids[number][probe.attention_mask[number]].tolist()
        rows[number] = rows[number] + tokens + rows[number + 1]
        rows[number + 10] = [4, *tokens[1:-1], 4]
        rows[number + 20] = tokens[: len(tokens) // 2]
    return rows


@pytest.mark.parametrize("chunk", [1, 50, 1 << 16])
@pytest.mark.parametrize(("seed", "n"), [(0, 1), (1, 2), (2, 4), (3, 6), (4, 13), (5, 7)])
def test_agrees_with_sets_of_tuples(seed, n, chunk, monkeypatch):
    monkeypatch.setattr(overlap_module, "CHUNK", chunk)
    probe = make_probe(seed)
    rows = training_rows(probe, seed)
    found = probe.overlap(rows, n=n)
    assert facts(found) == twin(probe, rows, n)
    assert found.share == found.found_ngrams / found.num_ngrams
    assert (found.num_texts, found.num_tokens) == (30, sum(map(len, rows)))
    assert found.too_short == int((probe.attention_mask.sum(1) < n).sum())
    assert [s > 0 for s in found.share_of_sequence] == [i in found.sequences for i in range(len(probe))]


def test_hashes_of_every_length_are_those_of_the_polynomial():
    tokens = np.random.default_rng(0).integers(0, 50_000, 40)
    mixed = [int(token) * 0xBF58476D1CE4E5B9 % 2**64 for token in tokens]
    mixed = [value ^ (value >> 29) for value in mixed]
    for n in range(1, 30):
        expected = [
            sum(value * pow(0x9E3779B97F4A7C15, n - 1 - j, 2**64) for j, value in enumerate(mixed[i : i + n])) % 2**64
            for i in range(len(tokens) - n + 1)
        ]
        assert ngram_hashes(tokens, n).tolist() == expected
    assert len(ngram_hashes(tokens, 41)) == 0


# --- kinds of data

IDS = [[5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize(
    "data",
    [
        IDS,
        [np.array(row, np.uint16) for row in IDS],
        [torch.tensor(row) for row in IDS],
        (row for row in IDS),
        [{"input_ids": row, "text": 3} for row in IDS],
        [{"input_ids": torch.tensor(row)} for row in IDS],
        [(torch.tensor(row), torch.tensor(1)) for row in IDS],
        datasets.Dataset.from_dict({"input_ids": IDS, "labels": IDS}),
        datasets.Dataset.from_dict({"input_ids": IDS}).with_format("torch"),
        datasets.Dataset.from_dict({"input_ids": IDS}).to_iterable_dataset(),
    ],
    ids="lists arrays tensors generator rows tensor_rows tuples dataset torch_dataset iterable_dataset".split(),
)
def test_rows_of_token_ids(data):
    probe = ib.Probe.from_tokens([[2, 3, 4, 5, 9], [6, 7, 8, 5, 5], [0, 0, 0, 0, 0]])
    found = probe.overlap(data, n=3)
    assert facts(found) == ((0, 1), (0,), 9, 3)
    assert (found.num_texts, found.num_tokens) == (2, 12)


@pytest.mark.parametrize("kind", [np.array, lambda ids: np.array(ids, np.uint16), torch.tensor])
@pytest.mark.parametrize("part", [7, 100])
def test_one_long_array(kind, part, monkeypatch):
    monkeypatch.setattr(overlap_module, "CHUNK", part)
    probe = make_probe(2)
    stream = [token for row in training_rows(probe, 2) for token in row]
    found = probe.overlap(kind(stream), n=4)
    assert facts(found) == twin(probe, [stream], 4)
    assert (found.num_texts, found.num_tokens) == (1, len(stream))


def test_a_table_of_packed_blocks():
    probe = make_probe(2)
    blocks = np.random.default_rng(1).integers(0, 5, (20, 16))
    assert facts(probe.overlap(blocks, n=4)) == twin(probe, blocks.tolist(), 4)


@pytest.fixture(scope="module")
def tokenizer():
    words = "the cat sat on a mat and then it went to sleep for rest of day".split()
    result = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *words])}, unk_token="?"))
    result.pre_tokenizer = pre_tokenizers.Whitespace()
    return result


def test_texts(tokenizer):
    text = "the cat sat on a mat and then it went to sleep for the rest of the day"
    probe = ib.Probe.from_texts([text, "a mat " * 10], tokenizer)
    other = "it went to the cat and the day"
    for data in ([text, other], [{"text": text}, {"text": other}], datasets.Dataset.from_dict({"text": [text, other]})):
        found = probe.overlap(data, tokenizer)
        assert facts(found) == ((0,), (0,), 6 + 8, 6)
    assert facts(probe.overlap([{"document": text}], tokenizer, text_column="document")) == facts(found)
    assert not probe.overlap([other], tokenizer)
    assert probe.overlap([other, text], tokenizer, max_texts=1).num_texts == 1
    assert str(found) == (
        "1 of 2 sequences share a run of 13 tokens with the 2 texts (26 tokens) examined. 1 of them occur there as a "
        "whole. 42.86% of the 13-grams occur there"
    )


def test_sequences_that_are_too_short_are_counted():
    found = ib.Probe.from_tokens([[1, 2, 3]]).overlap([[1, 2, 3]])
    assert not found
    assert (found.share, found.too_short) == (0.0, 1)
    assert "1 sequence has fewer than 13 tokens and cannot be judged" in str(found)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("text", TypeError, r"data: expected texts, .*got str. Pass a single text as \[text\]"),
        (3, TypeError, "data: expected texts, .*got int"),
        ({"text": ["a"]}, TypeError, "data: expected texts, .*got dict"),
        (["text"], ib.ProbeError, "expected tokenizer=, got None"),
        ([{"question": "?"}], ib.ProbeError, "a column input_ids or 'text', got question in row 0"),
        ([1, 2, 3], TypeError, r"sequence of token ids, got int of shape \(\).*Pass a single sequence as \[ids\]"),
        ([[0.5, 1.0]], TypeError, "got list of shape .* dtype float64 at index 0"),
        ([[[1, 2]]], TypeError, r"got list of shape \(1, 2\)"),
    ],
)
def test_data_that_cannot_be_compared(data, error, message):
    with pytest.raises(error, match=message):
        make_probe().overlap(data)


@pytest.mark.parametrize("keywords", [{"n": 0}, {"max_texts": 0}])
def test_settings_out_of_range(keywords):
    with pytest.raises(ValueError, match="expected an integer of at least 1, got 0"):
        make_probe().overlap(IDS, **keywords)
