"""The file of a probe gives back exactly what was saved, or says why not."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from word_tokenizer import word_tokenizer

from ib_callback import Probe, ProbeError

IDS = [[11, 12, 13, 14], [21, 22, 23, 0], [31, 32, 0, 0]]
RIGHT = [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
LABELS = {"language": [[0, 0, 0, 0], [1, 1, 1, -1], [2, 2, -1, -1]]}


def small_probe() -> Probe:
    return Probe.from_tokens(IDS, RIGHT, labels=LABELS, name="small")


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


def test_bytes_of_the_text_are_kept_and_unknown_in_older_files(tmp_path: Path) -> None:
    for number in (0, 7, None):
        Probe.from_tokens(IDS, num_bytes=number).save(tmp_path / "probe")
        assert Probe.load(tmp_path / "probe").num_bytes == number
    assert Probe.load(tmp_path / "probe").fingerprint == Probe.from_tokens(IDS, num_bytes=7).fingerprint


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
        with pytest.raises(ProbeError, match=r"probe\.safetensors: .*it is incomplete.*make the probe again"):
            Probe.load(saved)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format_version": "2"}, "probe.safetensors: expected probe format 1, got 2.*pip install --upgrade"),
        ({"format_version": "one"}, "expected probe format 1, got one"),
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


@pytest.mark.parametrize("changed", [{}, {"name": "other"}, {"tokenizer": "another"}])
def test_a_header_without_a_checksum_is_refused(changed: dict[str, str], saved: Path) -> None:
    edit_header(saved, sealed=False, header_sha256=None, **changed)
    with pytest.raises(ProbeError, match="not a probe file, or its header was damaged or changed"):
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
        ({"language": "abc"}, "expected a list of strings that differ, got 'abc'"),
        ({"language": ["a", "b", 3]}, "expected a list of strings"),
        ({"language": ["a", "b", "a"]}, "expected a list of strings that differ"),
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
    with pytest.raises(ProbeError, match="cannot be loaded as a probe: it is a folder"):
        Probe.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors: this probe file does not exist\. Make a probe"):
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


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("entry", ["source", "label_names", "groups", "num_bytes"])
@pytest.mark.parametrize("text", [DEEP, "9" * 5000, "1e999", "[1e999]", "nothing", '"text"'])
def test_a_header_that_somebody_made_up_is_refused_in_words(entry: str, text: str, saved: Path) -> None:
    edit_header(saved, **{entry: text})
    with pytest.raises(ProbeError, match=rf"probe.safetensors: cannot be loaded as a probe: .*{entry}"):
        Probe.load(saved)


@pytest.mark.parametrize(
    "changed", [{"name": None}, {"num_bytes": "-4"}, {"groups": "[0]"}, {"groups": "[null, 0, 0]"}]
)
def test_a_header_that_does_not_fit_its_tensors_is_refused(changed: dict[str, str | None], saved: Path) -> None:
    edit_header(saved, **changed)
    with pytest.raises(ProbeError, match=r"probe.safetensors: cannot be loaded as a probe: its content is not a probe"):
        Probe.load(saved)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ProbeError, match="pipe: cannot be loaded as a probe: it is a pipe, not a file"):
        Probe.load(tmp_path / "pipe")
    with pytest.raises(ProbeError, match="it is a device or a socket, not a file"):
        Probe.load(os.devnull)


@pytest.mark.parametrize("act", [Probe.load, small_probe().save])
@pytest.mark.parametrize("address", ["https://example.com/probe.safetensors", "s3://bucket/probe.safetensors"])
def test_an_address_is_no_file(act: Any, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProbeError, match=f"^{address}: expected a probe file on this machine, got the address of a"):
        act(address)
    assert not list(tmp_path.iterdir())


def test_a_home_in_a_path_is_that_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    small_probe().save("~/folder/probe.safetensors")
    assert (tmp_path / "folder" / "probe.safetensors").is_file()
    assert Probe.load("~/folder/probe.safetensors").fingerprint == small_probe().fingerprint
