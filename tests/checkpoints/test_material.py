"""Whether the ids of a probe are those of the tokenizer of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from word_tokenizer import word_tokenizer

from ib_callback.checkpoints.load import Loading
from ib_callback.checkpoints.local import find_local
from ib_callback.checkpoints.material import Asked, material_for
from ib_callback.common.errors import ProbeError
from ib_callback.probe.probe import Probe

TEXTS = ["a b c d e f g h i j a c e g i b d f h j"] * 4


def long_words() -> Tokenizer:
    """The same ids stand for other words, of seven letters each."""
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2} | {letter * 7: 3 + i for i, letter in enumerate("abcdefghij")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def model(path: Path, tokenizer: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]").save_pretrained(path)
    return path


def probe_file(path: Path, tokenizer: Any = None) -> str:
    Probe.from_texts(TEXTS, tokenizer or word_tokenizer(), max_length=32).save(path)
    return str(path)


def material(path: Path, **asked: Any) -> dict[str, Any]:
    return material_for(find_local(path, "m"), Asked(**asked), Loading(), print)


def test_ids_of_the_models_own_tokenizer_are_taken(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    file = probe_file(tmp_path / "probe.safetensors")
    assert len(material(model(tmp_path / "m", word_tokenizer()), probe=file)["m"].probe) == 4
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


def test_ids_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    file = probe_file(tmp_path / "probe.safetensors")
    # 20 letters and 19 spaces are 39 bytes, of 20 words of seven letters 159; four texts.
    with pytest.raises(ProbeError, match=r"of the tokenizer of m, by which they would be 636 bytes of text, got.* 156"):
        material(model(tmp_path / "m", long_words()), probe=file)
    right = word_tokenizer()
    right.add_special_tokens(["[CLS]", "[SEP]"])
    right.save(str(tmp_path / "t.json"))
    assert material(tmp_path / "m", probe=file, tokenizer=str(tmp_path / "t.json"))


def test_where_bytes_are_not_known_the_number_of_entries_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, file = model(tmp_path / "m", word_tokenizer()), probe_file(tmp_path / "probe.safetensors")
    monkeypatch.setattr(Probe, "num_bytes", None)  # as of slow tokenizers
    assert material(where, probe=file)
    monkeypatch.setattr(Probe, "tokenizer", "Slow, 99 entries")
    with pytest.warns(RuntimeWarning, match=r"of 99 entries \(Slow, 99 entries\), and that of m has 13"):
        material(where, probe=file)


def test_a_model_without_a_tokenizer_is_not_asked(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert material(tmp_path / "m", probe=probe_file(tmp_path / "probe.safetensors"))
