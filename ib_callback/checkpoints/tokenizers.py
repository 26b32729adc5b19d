"""Load and use the tokenizers of models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ib_callback.checkpoints.hub import by_name
from ib_callback.checkpoints.place import Checkpoint
from ib_callback.common.errors import ProbeError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")


def load_tokenizer(name: str, **keywords: Any) -> Any:
    """Load a tokenizer from a file `tokenizer.json`, from a folder, or by a name on the hub."""
    path = Path(name)
    if path.is_file():
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises no more specific class
            raise ValueError(f"--tokenizer {name}: expected a tokenizer.json, got another file ({error})") from error
    if path.suffix == ".json":
        raise ValueError(
            f"--tokenizer {name}: expected a file, a folder or a name on the hub, but there is no such file"
        )
    from transformers import AutoTokenizer

    return by_name(
        f"--tokenizer {name}", name, partial(AutoTokenizer.from_pretrained, name, **keywords), "tokenizer.json"
    )


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of tokens that are not text, for a tokenizer of transformers or a `tokenizers.Tokenizer`."""
    if hasattr(tokenizer, "all_special_ids"):
        return set(tokenizer.all_special_ids)
    return {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def there_and_back(tokenizer: Any, ids: list[int]) -> list[int]:
    """Decode ids to text with a tokenizer, and encode the text again."""
    if hasattr(tokenizer, "all_special_ids"):
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False).ids


def quick_tokenizer_of(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer in separate files beside a checkpoint; None without one, or if it is inside a GGUF file.

    Reading it from a GGUF file takes long, and would download the whole file.
    """
    if any(name.endswith(".gguf") for name in getattr(checkpoint.place, "weights", ())):
        return None
    for folder in checkpoint.place.fetch_tokenizer():
        if any((folder / name).is_file() for name in _FILES):
            return load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    return None


def tokenizer_of(checkpoint: Checkpoint, *, gguf: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a checkpoint, or beside the run to which it belongs.

    Raises:
        ProbeError: there is no tokenizer.
        ValueError: it cannot be loaded.
    """
    folders = checkpoint.place.fetch_tokenizer()
    for folder in folders:
        if any((folder / name).is_file() for name in _FILES):
            return load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
        files = sorted(folder.glob(gguf or "*.gguf"))
        if len(files) == 1:
            return load_tokenizer(str(folder), gguf_file=files[0].name)
    where = ", ".join(map(str, folders)) or checkpoint.place.source
    raise ProbeError(f"{checkpoint.name}: has no tokenizer in {where}. Name one with --tokenizer, or give --probe FILE")
