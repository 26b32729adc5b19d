"""English prose that every installation has: the documentation inside Python, NumPy, SciPy and torch.

It needs no network, so a probe (`Probe.builtin`), the demo and tests can use it anywhere. The text depends only
on the installed versions. If `corpus_fingerprint` is equal on two machines, they have the same text.
"""

from __future__ import annotations

import gc
import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy
import scipy
import torch

from ib_callback.common.cache import build_once, user_cache_directory
from ib_callback.common.checks import check_integer
from ib_callback.common.errors import ProbeError
from ib_callback.common.files import write_atomically
from ib_callback.common.optional import require
from ib_callback.probe import _docstrings, _prose
from ib_callback.probe._docstrings import modules
from ib_callback.probe._prose import paragraphs

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CORPUS = "documentation of the Python standard library, NumPy, SciPy and torch"
TOKENIZER = "byte-level BPE of the built-in text, 4096 entries"
END_OF_TEXT = "<|endoftext|>"

_MIN_DOCUMENT = 800  # characters: over 128 tokens for the usual tokenizers
_MAX_DOCUMENT = 4000
_HELD_OUT_DOCUMENTS = 512
_SHARED_WORDS = 8  # a common run of this many words is a copy, not a coincidence

_WORD = re.compile(r"[a-z]+")

Content = TypeVar("Content")


def _kept(build: Callable[[], Content]) -> Callable[[], Content]:
    """The result of `build`, made once a process and, if the user has a cache directory, once a machine.

    Reading the sources takes about seven seconds, and reading the file a tenth of one. The name of the file says
    all that decides the content: what is installed where, and the code that reads it.
    """

    @lru_cache(maxsize=1)
    def kept() -> Content:
        folder = user_cache_directory()
        if folder is None:
            return build()
        path = folder / "builtin_text" / f"{build.__name__.strip('_')}-{_installation()}.json"
        return build_once(path, build, write=_write, read=_read, what="the built-in text")

    return wraps(build)(kept)


@lru_cache(maxsize=1)
def _installation() -> str:
    roots = [str(root) for root in _docstrings.roots()]
    code = [Path(file).read_text(encoding="utf-8") for file in (__file__, _docstrings.__file__, _prose.__file__)]
    facts = [platform.python_version(), numpy.__version__, scipy.__version__, torch.__version__, *roots, *code]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _write(path: Path, content: object) -> None:
    text = json.dumps(content).encode()
    write_atomically(path, hashlib.sha256(text).hexdigest().encode() + b"\n" + text)


def _read(path: Path) -> Any:
    digest, _, text = path.read_bytes().partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise ValueError(f"{path} is damaged")
    return _as_tuples(json.loads(text))


def _as_tuples(content: object) -> object:
    return tuple(map(_as_tuples, content)) if isinstance(content, list) else content


def _pieces(parts: list[str]) -> list[list[str]]:
    """Cut a long text between paragraphs, into documents of nearly equal length."""
    length = sum(map(len, parts))
    target = length / max(1, round(length / _MAX_DOCUMENT))
    pieces: list[list[str]] = [[]]
    reached = 0
    for part in parts:
        enough = min(sum(map(len, pieces[-1])), length - reached) >= _MIN_DOCUMENT
        if enough and reached >= target * len(pieces):
            pieces.append([])
        pieces[-1].append(part)
        reached += len(part)
    return pieces


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Turn garbage collection off. It would double the time: syntax trees are millions of objects without cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_kept
def _documents() -> tuple[tuple[str, ...], ...]:
    """All documents as tuples of paragraphs; no paragraph occurs twice."""
    seen: set[str] = set()
    documents: list[list[str]] = []
    with _without_garbage_collection():
        for module in modules():
            rest: list[str] = []
            for text in module:
                fresh = []
                for paragraph in (paragraph for docstring in text for paragraph in paragraphs(docstring)):
                    key = " ".join(_WORD.findall(paragraph.lower()))
                    if key not in seen:
                        seen.add(key)
                        fresh.append(paragraph)
                if sum(map(len, fresh)) >= _MIN_DOCUMENT:
                    documents += _pieces(fresh)
                else:
                    rest += fresh
            if sum(map(len, rest)) >= _MIN_DOCUMENT:
                documents += _pieces(rest)
    return tuple(map(tuple, documents))


def _join(parts: Iterable[str]) -> str:
    return "\n\n".join(parts)


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return zip(*(words[start:] for start in range(_SHARED_WORDS)), strict=False)


@_kept
def _split() -> tuple[tuple[str, ...], tuple[str, ...]]:
    found = _documents()
    if len(found) < 8:
        raise ProbeError(
            "built-in text: expected the source files of the standard library, NumPy, SciPy and torch, got "
            f"{len(found)} documents from the installed ones. Make the probe from your own texts: "
            "Probe.from_texts(texts, tokenizer)."
        )
    ordered = sorted(found, key=lambda parts: hashlib.sha256(_join(parts).encode()).digest())
    num_held_out = min(_HELD_OUT_DOCUMENTS, len(ordered) // 4)
    held_out = ordered[:num_held_out]
    known = {run for parts in held_out for part in parts for run in _runs(part)}
    training = []
    for parts in ordered[num_held_out:]:
        text = _join(part for part in parts if known.isdisjoint(_runs(part)))
        if len(text) >= _MIN_DOCUMENT // 2:
            training.append(text)
    return tuple(training), tuple(_join(parts) for parts in held_out)


@_kept
def _default_tokenizer() -> str:
    return train_tokenizer(_split()[0]).to_str()


def documents() -> list[str]:
    """All documents. Each longer class, function or topic is one; the short texts of a module together are one.

    Returns:
        Texts of 800 characters or more, in the order of the files that they come from. Paragraphs are separated by
        an empty line; no paragraph occurs twice in the whole list.
    """
    return [_join(parts) for parts in _documents()]


def split() -> tuple[list[str], list[str]]:
    """The text to train on and the held-out text: `(training, held_out)`.

    The documents are ordered by the SHA-256 of their text, which mixes the sources. The first 512 are held out.
    Paragraphs of training documents that share a run of eight words with a held-out document are removed.

    Raises:
        ProbeError: the installation comes without the source files that hold the text.
    """
    training, held_out = _split()
    return list(training), list(held_out)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """Train a byte-level BPE tokenizer. It can encode any text, without unknown tokens.

    The same texts give the same tokenizer. Its only special token, `<|endoftext|>`, has the id 0; encoding
    does not add it.

    Args:
        texts: what to train on.
        vocab_size: number of entries, at least 257: the 256 bytes and the special token.

    Returns:
        A `tokenizers.Tokenizer`.

    Raises:
        ImportError: the package `tokenizers` is missing.
        ValueError: `vocab_size` is under 257.
    """
    check_integer("vocab_size", vocab_size, minimum=257, cure="4096 is a good start")
    tokenizers = require("tokenizers", extra="hf", purpose="The built-in tokenizer")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def default_tokenizer() -> Tokenizer:
    """The tokenizer of `Probe.builtin()`: 4096 entries, trained on `split()[0]` once per process.

    Every call returns a new object, so padding or truncation that you set on one does not affect others.
    """
    tokenizers = require("tokenizers", extra="hf", purpose="The built-in tokenizer")
    return tokenizers.Tokenizer.from_str(_default_tokenizer())


@lru_cache(maxsize=1)
def corpus_fingerprint() -> str:
    """Hex SHA-256 over all documents in order; equal on machines with the same built-in text."""
    digest = hashlib.sha256()
    for parts in _documents():
        text = _join(parts).encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def source() -> dict[str, str]:
    """The `source` of a probe of this text: the corpus, and the versions that it depends on, by name."""
    return {
        "constructor": "builtin",
        "corpus": CORPUS,
        "corpus_fingerprint": corpus_fingerprint(),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "torch": str(torch.__version__),
    }
