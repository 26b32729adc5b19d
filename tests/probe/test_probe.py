"""The probe: what it accepts, what its fingerprint covers, and that its file gives back exactly what was saved."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import pickle
import struct
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from word_tokenizer import word_tokenizer

from ib_callback import Probe, ProbeError

IDS = [[11, 12, 13, 14], [21, 22, 23, 0], [31, 32, 0, 0]]
RIGHT = [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
LABELS = {"language": [[0, 0, 0, 0], [1, 1, 1, -1], [2, 2, -1, -1]]}


def small_probe() -> Probe:
    return Probe.from_tokens(IDS, RIGHT, labels=LABELS, name="small")


# ---------------------------------------------------------------- from_tokens


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_ids_of_every_integer_kind_become_long(dtype: torch.dtype) -> None:
    for ids in (IDS, torch.tensor(IDS, dtype=dtype), torch.tensor(IDS, dtype=dtype).numpy(), np.array(IDS, np.uint16)):
        probe = Probe.from_tokens(ids)
        assert probe.input_ids.dtype == torch.long
        assert probe.input_ids.tolist() == IDS
        assert probe.attention_mask.dtype == torch.bool
        assert probe.attention_mask.all()


def test_parts_are_as_given() -> None:
    probe = small_probe()
    assert len(probe) == 3
    assert probe.num_tokens == 9
    assert probe.attention_mask.tolist() == [[bool(x) for x in row] for row in RIGHT]
    assert {name: label.tolist() for name, label in probe.labels.items()} == LABELS
    assert probe.labels["language"].dtype == torch.long
    assert (probe.name, probe.tokenizer, probe.source) == ("small", None, {"constructor": "from_tokens"})
    assert "small" in repr(probe)
    assert probe.fingerprint[:12] in repr(probe)


def test_tensors_are_contiguous_copies() -> None:
    ids, mask, label = torch.tensor(IDS).T, torch.ones(4, 3), torch.zeros(4, 3, dtype=torch.int32)
    mask = mask.long()
    probe = Probe.from_tokens(ids, mask, labels={"f": label})
    ids.zero_()
    mask.zero_()
    label.fill_(7)
    assert probe.input_ids.T.tolist() == IDS
    assert probe.attention_mask.all()
    assert (probe.labels["f"] == 0).all()
    assert all(t.is_contiguous() for t in (probe.input_ids, probe.attention_mask, probe.labels["f"]))
    probe.verify()


@pytest.mark.parametrize(
    "mask",
    [
        [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]],
        [[0, 1, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]],
        [[True, True, False, False]] * 3,
    ],
    ids=["left", "both ends", "booleans"],
)
def test_padding_at_the_ends_is_accepted_and_emptied(mask: list[list[int]]) -> None:
    ids = [[5, 6, 7, 8]] * 3
    probe = Probe.from_tokens(ids, mask, labels={"f": [[4, 4, 4, 4]] * 3})
    for b in range(3):
        for s in range(4):
            real = bool(mask[b][s])
            assert probe.attention_mask[b, s] == real
            assert probe.input_ids[b, s] == (ids[b][s] if real else 0)
            assert probe.labels["f"][b, s] == (4 if real else -1)


def test_a_hole_is_refused() -> None:
    with pytest.raises(ProbeError, match="padding amid the tokens of sequence 1"):
        Probe.from_tokens(IDS, [[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [1, 2, 3]}, r"expected \[N, S\].*got shape \[3\]"),
        ({"input_ids": np.zeros((2, 3, 4), int)}, r"expected \[N, S\].*got shape \[2, 3, 4\]"),
        ({"input_ids": []}, "at least 1, got shape"),
        ({"input_ids": torch.zeros(0, 5, dtype=torch.long)}, r"at least 1, got shape \[0, 5\]"),
        ({"input_ids": [[1, 2], [3]]}, "rows of different lengths"),
        ({"input_ids": torch.ones(2, 3)}, "expected an integer dtype, got torch.float32"),
        ({"input_ids": [[0.5, 1.0]]}, "expected an integer dtype, got float64"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.bool)}, "expected an integer dtype, got torch.bool"),
        ({"input_ids": [["a", "b"]]}, "expected an integer dtype"),
        ({"input_ids": [[1, 2], [3, -7]]}, "got -7 in sequence 1"),
        ({"attention_mask": [[1, 1]]}, r"attention_mask: expected \[N, S\] = \[3, 4\].*got shape \[1, 2\]"),
        ({"attention_mask": [[1, 1, 1, 2]] * 3}, "attention_mask: expected 1 or true .*got 2"),
        ({"attention_mask": torch.zeros(3, 4)}, "attention_mask: expected an integer dtype, got torch.float32"),
        ({"attention_mask": [[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]}, "got none in sequence 1"),
        ({"labels": {"f": [0, 1, 2]}}, r"labels\['f'\]: expected \[N, S\] = \[3, 4\].*got shape \[3\]"),
        ({"labels": {"f": [[0, 0, 0, -2]] * 3}}, r"labels\['f'\]: expected 0 or more.*got -2 in sequence 0"),
        ({"labels": {"f": torch.zeros(3, 4)}}, r"labels\['f'\]: expected an integer dtype"),
        ({"labels": {3: IDS}}, "names that are non-empty strings, got 3"),
        ({"labels": IDS}, "labels: expected {name: .* got list"),
        ({"name": ""}, "name: expected a non-empty string"),
    ],
)
def test_unusable_content_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        Probe.from_tokens(**({"input_ids": IDS} | arguments))


def test_negative_ids_and_labels_under_padding_are_no_error() -> None:
    probe = Probe.from_tokens([[7, 8, -100]], [[1, 1, 0]], labels={"f": [[1, 0, -100]]})
    assert probe.input_ids.tolist() == [[7, 8, 0]]
    assert probe.labels["f"].tolist() == [[1, 0, -1]]


# ---------------------------------------------------------------- frozen


@pytest.mark.parametrize("attribute", "input_ids attention_mask labels name fingerprint source other".split())
def test_attributes_cannot_be_assigned(attribute: str) -> None:
    with pytest.raises(AttributeError, match=attribute):
        setattr(small_probe(), attribute, "anything")


def test_labels_and_source_cannot_be_extended() -> None:
    probe = small_probe()
    with pytest.raises(TypeError, match="item assignment"):
        probe.labels["new"] = probe.input_ids  # type: ignore[index]
    probe.source["constructor"] = "elsewhere"
    assert probe.source["constructor"] == "from_tokens"


@pytest.mark.parametrize("part", ["input_ids", "attention_mask", "label"])
def test_edits_in_place_are_noticed(part: str, tmp_path: Path) -> None:
    probe = small_probe()
    probe.verify()
    tensor = probe.labels["language"] if part == "label" else getattr(probe, part)
    tensor[0, 0] = 5 if part != "attention_mask" else False
    with pytest.raises(ProbeError, match="'small' was changed in place"):
        probe.verify()
    with pytest.raises(ProbeError, match="'small' was changed in place"):
        probe.save(tmp_path / "p.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "pickle"])
def test_copies_for_other_processes_are_equal(duplicate: Any) -> None:
    probe = small_probe()
    other = duplicate(probe)
    other.verify()
    assert other.fingerprint == probe.fingerprint
    assert other.name == probe.name
    assert torch.equal(other.labels["language"], probe.labels["language"])


# ---------------------------------------------------------------- fingerprint


def test_fingerprint_changes_with_every_single_id_mask_and_label() -> None:
    ids, mask, label = torch.tensor(IDS), torch.tensor(RIGHT), torch.tensor(LABELS["language"])
    seen = {small_probe().fingerprint}
    changes = 0
    for b, s in torch.tensor(RIGHT).nonzero().tolist():
        other_ids, other_label = ids.clone(), label.clone()
        other_ids[b, s] += 1
        other_label[b, s] += 1
        seen.add(Probe.from_tokens(other_ids, mask, labels={"language": label}).fingerprint)
        seen.add(Probe.from_tokens(ids, mask, labels={"language": other_label}).fingerprint)
        changes += 2
    for b, length in enumerate([4, 3, 2]):
        other_mask = mask.clone()
        other_mask[b, length - 1] = 0
        seen.add(Probe.from_tokens(ids, other_mask, labels={"language": label}).fingerprint)
        changes += 1
    assert len(seen) == 1 + changes


def test_fingerprint_tells_padding_from_id_zero() -> None:
    assert Probe.from_tokens([[4, 0]]).fingerprint != Probe.from_tokens([[4, 0]], [[1, 0]]).fingerprint


def test_fingerprint_covers_shapes_and_label_names() -> None:
    variants = [
        Probe.from_tokens([[1, 2, 3, 4]]),
        Probe.from_tokens([[1, 2], [3, 4]]),
        Probe.from_tokens([[1], [2], [3], [4]]),
        Probe.from_tokens([[1, 2], [3, 4]], labels={"a": [[0, 0], [0, 0]]}),
        Probe.from_tokens([[1, 2], [3, 4]], labels={"b": [[0, 0], [0, 0]]}),
        Probe.from_tokens([[1, 2], [3, 4]], labels={"a": [[0, 0], [0, 0]], "b": [[0, 0], [0, 0]]}),
    ]
    assert len({probe.fingerprint for probe in variants}) == len(variants)


def test_fingerprint_ignores_padding_content_label_order_dtype_and_name() -> None:
    f, g = [[1, 1, 5]], [[2, 2, 6]]
    first = Probe.from_tokens([[7, 8, 9]], [[1, 1, 0]], labels={"f": f, "g": g}, name="one")
    second = Probe.from_tokens(
        torch.tensor([[7, 8, 50]], dtype=torch.int32),
        np.array([[True, True, False]]),
        labels={"g": [[2, 2, 0]], "f": [[1, 1, -1]]},
        name="two",
    )
    assert first.fingerprint == second.fingerprint
    assert list(first.labels) == list(second.labels) == ["f", "g"]


# ---------------------------------------------------------------- from_texts


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
        with pytest.raises(ProbeError, match=r"half a surrogate pair, '\\ud83d', at character 2 of 'a "):
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
        ([0, "de"], r"labels\['f'\]: expected integers throughout, or strings.*got 'de' at index 1 after integers"),
        (["en", 1], "got 1 at index 1 after strings. Make them all of one kind"),
        ([0, 0.5], "got float 0.5 at index 1"),
        ([0, -3], "got -3 at index 1"),
        ([0], "expected 2 entries.*got 1"),
        ([0, 1, 2], "expected 2 entries.*got 3"),
        ("en", "one label or None for each text, got str"),
        (5, "one label or None for each text, got int"),
    ],
)
def test_unusable_labels_of_texts_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        Probe.from_texts(["a b", "c d"], word_tokenizer(), min_length=1, labels={"f": labels})


def test_too_few_labels_for_an_iterator_are_refused() -> None:
    with pytest.raises(ProbeError, match="got 1, none for text 1"):
        Probe.from_texts(iter(["a b", "c d"]), word_tokenizer(), min_length=1, labels={"f": [0]})


def test_fewer_than_asked_for_warns() -> None:
    with pytest.warns(UserWarning, match="asked for 5 sequences, got 2: there were 3 texts") as caught:
        probe = Probe.from_texts(["a b", "c", "d e"], word_tokenizer(), num_sequences=5, min_length=4)
    assert len(probe) == 2
    assert caught[0].filename == __file__


def test_none_long_enough_is_an_error() -> None:
    with pytest.raises(ProbeError, match=r"min_length=16 tokens, got 2 texts, the longest of 5\. .*lower min_length"):
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


# ---------------------------------------------------------------- files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "probe.safetensors"
    small_probe().save(path)
    return path


def data_start(content: bytes) -> int:
    """A safetensors file: the header's length in 8 bytes, the header, the data."""
    return 8 + struct.unpack("<Q", content[:8])[0]


def edit_header(path: Path, *, sealed: bool = True, **metadata: str | None) -> None:
    """Change entries of the header's metadata, and if `sealed`, its checksum with them; None removes one."""
    content = path.read_bytes()
    start = data_start(content)
    header = json.loads(content[8:start])
    for key, value in metadata.items():
        if value is None:
            del header["__metadata__"][key]
        else:
            header["__metadata__"][key] = value
    if sealed:
        entries = sorted([key, value] for key, value in header["__metadata__"].items() if key != "header_sha256")
        header["__metadata__"]["header_sha256"] = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[start:])


@pytest.mark.parametrize("highest", [50_000, 2**31 - 1, 2**31, 2**40])
def test_a_file_gives_back_what_was_saved(highest: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, highest, (5, 9), generator=generator)
    ids[0, 0] = highest
    mask = torch.arange(9) < torch.tensor([9, 4, 1, 9, 6])[:, None]
    labels = {"a": torch.randint(-1, 3, (5, 9), generator=generator), "ü": ids // 2}
    probe = Probe.from_tokens(ids, mask, labels=labels, name="näme")
    path = tmp_path / "probe.safetensors"
    probe.save(path)
    loaded = Probe.load(str(path))
    for name in ("input_ids", "attention_mask"):
        assert getattr(loaded, name).dtype == getattr(probe, name).dtype
        assert torch.equal(getattr(loaded, name), getattr(probe, name))
    assert list(loaded.labels) == ["a", "ü"]
    for name, label in probe.labels.items():
        assert loaded.labels[name].dtype == torch.long
        assert torch.equal(loaded.labels[name], label)
    assert (loaded.name, loaded.source, loaded.tokenizer) == ("näme", probe.source, None)
    assert loaded.fingerprint == probe.fingerprint
    loaded.verify()


def test_a_file_says_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    probe = Probe.from_texts(["a b c d"], word_tokenizer(), min_length=1, name="letters")
    probe.save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format_version"] == "1"
    assert metadata["name"] == "letters"
    assert metadata["fingerprint"] == probe.fingerprint
    assert metadata["tokenizer"] == probe.tokenizer == "tokenizers.Tokenizer, 13 entries"
    assert json.loads(metadata["source"]) == probe.source
    assert Probe.load(path).tokenizer == probe.tokenizer


def test_ids_take_four_bytes_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    Probe.from_tokens(torch.full((100, 512), 50_000)).save(path)
    assert path.stat().st_size < 100 * 512 * 5 + 2000


def test_a_loaded_probe_does_not_depend_on_its_file(saved: Path) -> None:
    probe = Probe.load(saved)
    saved.write_bytes(b"\xff" * saved.stat().st_size)
    assert probe.input_ids.tolist() == IDS
    probe.verify()


def test_saving_replaces_in_one_step(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Probe.from_tokens([[1, 2, 3]])
    other.save(saved)
    assert Probe.load(saved).fingerprint == other.fingerprint

    def no_space(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="no space left"):
        small_probe().save(saved)
    assert Probe.load(saved).fingerprint == other.fingerprint
    assert list(saved.parent.iterdir()) == [saved]


def test_any_damage_to_the_data_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    start = data_start(content)
    # 3 × 4 ids and labels of 4 bytes, 3 × 4 mask entries of 1 byte
    assert len(content) - start == 12 * 9
    for position in range(start, len(content)):
        for flip in (0x01, 0x02, 0x80):
            damaged = bytearray(content)
            damaged[position] ^= flip
            saved.write_bytes(damaged)
            with pytest.raises(ProbeError, match="damaged or changed"):
                Probe.load(saved)


def test_damage_to_the_header_never_changes_what_is_loaded(saved: Path) -> None:
    Probe.from_tokens(IDS, RIGHT, labels=LABELS, label_names={"language": ["de", "en", "fr"]}).save(saved)
    content = saved.read_bytes()
    probe = Probe.load(saved)
    refused = 0
    for position in range(data_start(content)):
        for flip in (0x01, 0x80):
            damaged = bytearray(content)
            damaged[position] ^= flip
            saved.write_bytes(damaged)
            try:
                loaded = Probe.load(saved)
            except ProbeError:
                refused += 1
                continue
            assert torch.equal(loaded.input_ids, probe.input_ids)
            assert torch.equal(loaded.attention_mask, probe.attention_mask)
            assert torch.equal(loaded.labels["language"], probe.labels["language"])
            assert loaded.label_names == probe.label_names
            assert (loaded.name, loaded.source, loaded.tokenizer) == (probe.name, probe.source, probe.tokenizer)
    assert refused > data_start(content)


def test_a_file_cut_short_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for length in range(0, len(content), 7):
        saved.write_bytes(content[:length])
        with pytest.raises(ProbeError, match=r"probe\.safetensors: .*not a whole one.*make the probe again"):
            Probe.load(saved)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format_version": "2"}, "probe.safetensors: expected probe format 1, got 2.*pip install --upgrade"),
        ({"format_version": "one"}, "expected probe format 1, got one"),
        ({"format_version": None}, "header has no format_version"),
        ({"fingerprint": None}, "header has no fingerprint"),
        ({"name": None, "source": None}, "header has no name, source"),
        ({"name": ""}, "name: expected a non-empty string"),
        ({"fingerprint": "0" * 64}, "expected fingerprint 0000"),
        ({"label_names": "[]"}, "expected {feature: .*got list"),
        ({"label_names": '{"language": ["de"]}'}, "expected a name for each number up to 2, got 1 names"),
    ],
)
def test_an_unusable_header_is_refused(metadata: dict[str, str | None], message: str, saved: Path) -> None:
    edit_header(saved, **metadata)
    with pytest.raises(ProbeError, match=message):
        Probe.load(saved)


def test_a_header_without_a_checksum_is_refused(saved: Path) -> None:
    edit_header(saved, sealed=False, header_sha256=None)
    with pytest.raises(ProbeError, match="its header has no header_sha256"):
        Probe.load(saved)


def test_a_header_that_was_changed_is_refused(saved: Path) -> None:
    edit_header(saved, sealed=False, name="other")
    with pytest.raises(ProbeError, match="its header was damaged or changed"):
        Probe.load(saved)


def test_names_of_labels(tmp_path: Path) -> None:
    names = {"language": ("de", "en", "fr", "it")}
    probe = Probe.from_tokens(IDS, RIGHT, labels=LABELS, label_names={"language": list(names["language"])})
    assert probe.label_names == names
    assert probe.fingerprint == small_probe().fingerprint
    probe.label_names.clear()
    probe.save(tmp_path / "p")
    assert Probe.load(tmp_path / "p").label_names == probe.label_names == names
    assert pickle.loads(pickle.dumps(probe)).label_names == names
    assert small_probe().label_names == {}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"other": ["a"]}, r"label_names\['other'\]: expected one of the labels \['language'\]"),
        ({"language": ["a", "b"]}, "a name for each number up to 2, got 2 names"),
        ({"language": "abc"}, "expected a list of strings, got 'abc'"),
        ({"language": ["a", "b", 3]}, "expected a list of strings"),
        ({"language": ["a", "b", "a"]}, "expected names that differ"),
        (["a", "b", "c"], "expected {feature: .*got list"),
    ],
)
def test_unusable_names_of_labels_are_refused(names: Any, message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        Probe.from_tokens(IDS, RIGHT, labels=LABELS, label_names=names)


def test_a_file_that_may_not_be_read_is_not_said_to_be_damaged(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        Probe.load(saved)


def test_other_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.safetensors"
    text.write_text("this is a text, not a probe, and long enough to be read as a header\n")
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, weights)
    with pytest.raises(ProbeError, match=r"text\.safetensors: cannot be loaded.*not a safetensors file"):
        Probe.load(text)
    with pytest.raises(ProbeError, match=r"weights\.safetensors: cannot be loaded.*not a probe file"):
        Probe.load(weights)
    with pytest.raises(ProbeError, match="not a safetensors file"):
        Probe.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing.safetensors: no such probe file. .*probe.save"):
        Probe.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"input_ids": torch.ones(1, 2, dtype=torch.int32)}, "expected input_ids, attention_mask and labels"),
        ({"extra": torch.ones(1, 2)}, "expected input_ids, attention_mask and labels"),
        ({"attention_mask": torch.ones(1, 2)}, "damaged or changed"),
        ({"labels/f": torch.ones(1, 2)}, "damaged or changed"),
    ],
    ids=["missing", "extra", "mask dtype", "label dtype"],
)
def test_other_tensors_are_refused(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    complete = {"input_ids": torch.ones(1, 2, dtype=torch.int32), "attention_mask": torch.ones(1, 2, dtype=torch.bool)}
    content = tensors if list(tensors) == ["input_ids"] else complete | tensors
    metadata = {"format_version": "1", "name": "n", "source": "{}", "fingerprint": "0"}
    safetensors.torch.save_file(content, path, metadata)
    edit_header(path)
    with pytest.raises(ProbeError, match=message):
        Probe.load(path)


def test_files_need_safetensors_and_say_how_to_get_it(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r'Loading a probe needs .*pip install "ib-callback\[hf\]"'):
        Probe.load(saved)
    with pytest.raises(ImportError, match=r'Saving a probe needs .*pip install "ib-callback\[hf\]"'):
        small_probe().save(saved)
