"""The same documents under several tokenizers, to measure models of different families on the same texts."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ib_callback.common.errors import ProbeError
from ib_callback.common.network import trouble
from ib_callback.probe import builtin_text
from ib_callback.probe._preferences import CHOSEN, COLUMNS, written_out
from ib_callback.probe._rows import C4, TULU, rows_of
from ib_callback.probe._texts import Sizes, documents, texts_content
from ib_callback.probe._tokenizing import Encoder
from ib_callback.probe.content import Content

DOCUMENTS = "documents"


def contents_for(
    texts: Iterable[str],
    tokenizers: Mapping[str, Any],
    sizes: Sizes,
    *,
    name: str,
    labels: Mapping[str, Iterable[Any]] | None,
    groups: Iterable[Any] | None = None,
) -> dict[str, Content]:
    """The contents for `Probe.for_tokenizers`, by the name of the tokenizer."""
    if not isinstance(tokenizers, Mapping) or not tokenizers:
        raise TypeError(f"tokenizers: expected {{name: tokenizer}} with at least one, got {type(tokenizers).__name__}.")
    assert sizes.min_length is not None
    encoders = [Encoder(tokenizer, sizes.min_length) for tokenizer in tokenizers.values()]
    chosen = []
    read = 0
    for document in documents(texts, labels, groups):
        read += 1
        if all(len(encode(document.text).ids) >= sizes.min_length for encode in encoders):
            chosen.append(document)
        if len(chosen) == sizes.num_sequences:
            break
    if read == 0:
        raise ProbeError("texts: expected at least one text, got none. Perhaps the iterator was already used up.")
    if not chosen:
        raise ProbeError(
            f"texts: expected a text of at least min_length={sizes.min_length} tokens under every tokenizer "
            f"({', '.join(tokenizers)}), got {read} texts, all of them shorter. Pass longer texts or lower min_length."
        )
    if sizes.num_sequences is not None and len(chosen) < sizes.num_sequences:
        short = read - len(chosen)
        of_them = "none of them is too short"
        if short:
            of_them = (
                f"{short} of them {'has' if short == 1 else 'have'} fewer than min_length={sizes.min_length} tokens"
            )
            of_them += " under at least one tokenizer"
        warnings.warn(
            f"asked for {sizes.num_sequences} documents, got {len(chosen)}: there were {read} documents, and "
            f"{of_them}.",
            stacklevel=3,
        )
    kept = [document.text for document in chosen]
    kept_labels = {feature: [document.labels[feature] for document in chosen] for feature in labels or {}}
    kept_groups = None if groups is None else [document.group for document in chosen]
    all_of_them = replace(sizes, num_sequences=None)
    more = {
        "constructor": "for_tokenizers",
        DOCUMENTS: hashlib.sha256(json.dumps(kept).encode()).hexdigest(),
        "tokenizers": ", ".join(tokenizers),
        "texts_read": str(read),
    }
    contents = {}
    for key, tokenizer in tokenizers.items():
        content = texts_content(
            kept, tokenizer, all_of_them, name=f"{name}-{key}", labels=kept_labels, groups=kept_groups
        )
        contents[key] = replace(content, source={**content.source, **more})
    return contents


def texts_of(source: str, *, text_column: str = "text") -> Iterator[str]:
    """The texts of a known corpus or of a file, in order, read no further than needed.

    Args:
        source: "c4", the validation split of English C4; "tulu", the preferred conversations of Tulu 3's preference
            pairs, written as `Role: content`; "builtin", the held-out part of the text that every installation has; or
            a file as for `Probe.from_dataset`: .txt with a document a line, .jsonl, .json, .parquet or .csv, also .gz.
        text_column: the column with the text, for a file with columns.

    Raises:
        ProbeError: the source cannot be reached or read, or a row has no text.
    """
    try:
        yield from _texts_of(source, text_column)
    except ProbeError as error:
        in_the_way = trouble(error)
        if in_the_way is None:
            raise
        raise ProbeError(
            f'{error} {in_the_way}: use texts from a file (.jsonl, .parquet, .csv, .txt), or "builtin", the texts that '
            "every installation has. You can also copy the cache of the hub (HF_HOME) from a machine with a network."
        ) from error


def _texts_of(source: str, text_column: str) -> Iterator[str]:
    if source == "builtin":
        yield from builtin_text.split()[1]
        return
    if source == "tulu":
        rows = rows_of(TULU, columns=COLUMNS, config=None, split="train", revision=None)
        for index, row in enumerate(rows):
            yield written_out(row.get(CHOSEN), index)
        return
    if source == "c4":
        rows, text_column = rows_of(C4, columns=["text"], config="en", split="validation", revision=None), "text"
    else:
        rows = rows_of(Path(source), columns=[text_column], config=None, split=None, revision=None)
    for index, row in enumerate(rows):
        text = row.get(text_column)
        if text is not None and not isinstance(text, str):
            raise ProbeError(f"{source}: expected a text in column {text_column!r} of row {index}, got {text!r:.80}.")
        if text is None and text_column not in row:
            raise ProbeError(
                f"{source}: expected a column {text_column!r}, got the columns {', '.join(map(str, row))}. Name the "
                "one with the text."
            )
        yield text or ""
