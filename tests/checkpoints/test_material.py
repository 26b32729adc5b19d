"""Whether the ids of a probe are those of the tokenizer of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from word_tokenizer import word_tokenizer

from ib_callback.checkpoints.load import Loading
from ib_callback.checkpoints.local import find_local
from ib_callback.checkpoints.material import Asked, material_for
from ib_callback.common.errors import ProbeError
from ib_callback.probe.probe import Probe, builtin_text

TEXTS = ["a b c d e f g h i j a c e g i b d f h j"] * 4


def other_words() -> Tokenizer:
    """The same ids stand for parts of words, which are put together as others."""
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2} | {part: 3 + i for i, part in enumerate("ab cd ef gh ij".split())}
    vocabulary |= {letter: 8 + i for i, letter in enumerate("abcdefghij")} | {"abcd": 18}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
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
    with pytest.raises(
        ProbeError, match=r"of the tokenizer of m, got ids of another tokenizer .* only \d+% of the pairs"
    ):
        material(model(tmp_path / "m", other_words()), probe=file)
    right = word_tokenizer()
    right.add_special_tokens(["[CLS]", "[SEP]"])
    right.save(str(tmp_path / "t.json"))
    assert material(tmp_path / "m", probe=file, tokenizer=str(tmp_path / "t.json"))


def test_texts_come_back_from_their_own_tokenizer_and_not_from_another(tmp_path: Path) -> None:
    own, other = builtin_text.default_tokenizer(), other_words()
    Probe.builtin(num_sequences=8).save(tmp_path / "probe.safetensors")
    assert material(model(tmp_path / "own", own), probe=str(tmp_path / "probe.safetensors"))
    with pytest.raises(ProbeError, match=r"of the tokenizer of m"):
        material(model(tmp_path / "other", other), probe=str(tmp_path / "probe.safetensors"))


def test_ids_that_were_made_up_are_of_no_tokenizer(tmp_path: Path) -> None:
    Probe.from_tokens([[3, 4, 5] * 8] * 4).save(tmp_path / "ids.safetensors")
    assert material(model(tmp_path / "m", other_words()), probe=str(tmp_path / "ids.safetensors"))


def test_a_model_without_a_tokenizer_is_not_asked(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert material(tmp_path / "m", probe=probe_file(tmp_path / "probe.safetensors"))
