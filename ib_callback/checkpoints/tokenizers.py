"""Tokenizers of models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ib_callback.checkpoints.hub import is_id, ways_out
from ib_callback.checkpoints.place import Checkpoint
from ib_callback.common.errors import ProbeError
from ib_callback.common.messages import describe
from ib_callback.common.network import patiently, trouble

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")


def load_tokenizer(name: str, **keywords: Any) -> Any:
    """A tokenizer of a file `tokenizer.json`, of a folder or of a name on the hub."""
    path = Path(name)
    if path.is_file():
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises no other class
            raise ValueError(f"--tokenizer {name}: expected a tokenizer.json, got another file ({error})") from error
    from transformers import AutoTokenizer

    # Asked here first, for transformers asks ten times, over a minute, and then does not say what was in the way.
    asks = is_id(name) and not path.exists()
    unreachable = _in_the_way(_about, name) if asks else None
    try:
        return AutoTokenizer.from_pretrained(name, **keywords, **({"local_files_only": True} if unreachable else {}))
    except ImportError:
        raise
    except Exception as error:
        # Of a download that was cut off transformers says that there is no such file.
        in_the_way = unreachable or (_in_the_way(_file_of, name) if asks else None) or error
        if trouble(in_the_way) is not None:
            said = " ".join(describe(in_the_way).split())[:300]
            raise ValueError(
                f"--tokenizer {name}: cannot be loaded ({said}), and is not whole in the cache. "
                f"{ways_out(name, in_the_way)}; or a file, --tokenizer tokenizer.json"
            ) from error
        # Of a damaged file transformers and `tokenizers` raise what comes along.
        raise ValueError(f"--tokenizer {name}: cannot be loaded ({error})") from error


def _in_the_way(ask: Callable[[str], Any], name: str) -> Exception | None:
    """What keeps the hub from answering; None if it does, whatever it says."""
    try:
        patiently(lambda: ask(name), name)
    except Exception as error:
        return error if trouble(error) is not None else None
    return None


def _about(name: str) -> Any:
    import huggingface_hub

    return huggingface_hub.HfApi().model_info(name)


def _file_of(name: str) -> Any:
    import huggingface_hub

    return huggingface_hub.hf_hub_download(name, "tokenizer.json")


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of tokens that are no text, of a tokenizer of transformers or a `tokenizers.Tokenizer`."""
    if hasattr(tokenizer, "all_special_ids"):
        return set(tokenizer.all_special_ids)
    return {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def there_and_back(tokenizer: Any, ids: list[int]) -> list[int]:
    """The ids of the text that a tokenizer makes of ids."""
    if hasattr(tokenizer, "all_special_ids"):
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False).ids


def quick_tokenizer_of(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer that lies with a checkpoint in files of its own; None without one, or if it is in a GGUF file.

    To read it out of a GGUF file takes long, and all of it would be downloaded.
    """
    if any(name.endswith(".gguf") for name in getattr(checkpoint.place, "weights", ())):
        return None
    for folder in checkpoint.place.fetch_tokenizer():
        if any((folder / name).is_file() for name in _FILES):
            return load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    return None


def tokenizer_of(checkpoint: Checkpoint, *, gguf: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lies with a checkpoint, or with the run that it is of.

    Raises:
        ProbeError: there is none.
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
