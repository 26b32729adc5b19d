"""The same documents under several tokenizers, so that models of different families are measured on the same texts."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from ib_callback.common.checks import check_integer
from ib_callback.common.errors import ProbeError
from ib_callback.probe._tokenizing import Encoder
from ib_callback.probe.probe import Probe

DOCUMENTS = "documents"


def probes_for(
    texts: Iterable[str],
    tokenizers: Mapping[str, Any],
    *,
    num_sequences: int | None = None,
    max_length: int = 512,
    min_length: int = 16,
    labels: Mapping[str, Iterable[Any]] | None = None,
    name: str = "texts",
) -> dict[str, Probe]:
    """One probe for each tokenizer, all of the same documents in the same order.

    A document counts only if it has `min_length` tokens under every tokenizer. Each is cut at `max_length` tokens of
    each tokenizer, and so not at the same letter: pass texts that are cut already if that matters.
    `source["documents"]` is the same in all of them: SHA-256 over the texts.

    Args:
        texts: documents; read in order, and no further than needed. Those that count are kept in memory meanwhile.
        tokenizers: by a name of your choice, which becomes part of the probe's.
        num_sequences: how many to take; None: all.
        max_length: most tokens of a sequence.
        min_length: least tokens, under each tokenizer.
        labels: as for `Probe.from_texts`, one for each text, skipped ones too.
        name: of the probes, before the name of the tokenizer.

    Raises:
        ProbeError: no document is long enough under every tokenizer, or lengths or labels cannot be used.
        TypeError: `tokenizers` is no mapping, or what `Probe.from_texts` refuses.

    Warns:
        UserWarning: fewer than `num_sequences` documents are long enough.
    """
    if not isinstance(tokenizers, Mapping) or not tokenizers:
        raise TypeError(
            "tokenizers: expected {name: tokenizer} with at least one, got "
            f"{'none' if isinstance(tokenizers, Mapping) else type(tokenizers).__name__}."
        )
    if isinstance(texts, (str, bytes)):
        raise TypeError(f"texts: expected an iterable of strings, one a document, got {type(texts).__name__}.")
    if num_sequences is not None:
        check_integer("num_sequences", num_sequences, minimum=1, cure="None takes all documents")
    check_integer("min_length", min_length, minimum=1, cure="16 is the default")
    encoders = [Encoder(tokenizer, min_length) for tokenizer in tokenizers.values()]
    columns = {label: list(column) for label, column in (labels or {}).items()}
    chosen: list[str] = []
    numbers: list[int] = []
    number = -1
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts: expected strings, got {type(text).__name__} at index {number}.")
        if all(len(encode([text])[0].ids) >= min_length for encode in encoders):
            chosen.append(text)
            numbers.append(number)
        if len(chosen) == num_sequences:
            break
    if not chosen:
        raise ProbeError(
            f"texts: expected a text of at least min_length={min_length} tokens under every tokenizer "
            f"({', '.join(tokenizers)}), got none. Pass longer texts or lower min_length."
        )
    if num_sequences is not None and len(chosen) < num_sequences:
        warnings.warn(
            f"asked for {num_sequences} documents, got {len(chosen)}: of the others none has min_length={min_length} "
            "tokens under every tokenizer.",
            stacklevel=3,
        )
    kept = {label: _at(column, numbers, label) for label, column in columns.items()}
    documents = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
    lengths = {"max_length": max_length, "min_length": min_length}
    return {
        key: _with_source(
            Probe.from_texts(chosen, tokenizer, labels=kept or None, name=f"{name}-{key}", **lengths),
            {
                "constructor": "for_tokenizers",
                DOCUMENTS: documents,
                "tokenizers": ", ".join(tokenizers),
                "texts_read": str(number + 1),
            },
        )
        for key, tokenizer in tokenizers.items()
    }


def _at(column: list[Any], numbers: list[int], label: str) -> list[Any]:
    if numbers[-1] >= len(column):
        raise ProbeError(
            f"labels[{label!r}]: expected an entry for each text (skipped ones too), got {len(column)}, none for text "
            f"{numbers[-1]}."
        )
    return [column[number] for number in numbers]


def _with_source(probe: Probe, more: Mapping[str, str]) -> Probe:
    twin = copy.copy(probe)
    twin._source = {**probe.source, **more}
    return twin
