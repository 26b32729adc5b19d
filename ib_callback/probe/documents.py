"""Documents of which probes for several tokenizers are made: texts alone, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ib_callback.common.errors import ProbeError
from ib_callback.probe import builtin_text
from ib_callback.probe._preferences import CHOSEN, COLUMNS, written_out
from ib_callback.probe._rows import C4, TULU, rows_of

KNOWN = ("c4", "tulu", "builtin")


def documents(source: str, *, text_column: str = "text") -> Iterator[str]:
    """The texts of a known corpus or of a file, in order, read no further than needed.

    Args:
        source: "c4", English C4's validation split; "tulu", the preferred conversations of Tulu 3's preference pairs,
            written as `Role: content`; "builtin", the held-out part of the text that every installation has; or a file
            as for `Probe.from_dataset`: .txt with a document a line, .jsonl, .json, .parquet or .csv, also .gz.
        text_column: of a file with columns.

    Raises:
        ProbeError: it cannot be reached or read, or a row has no text.
    """
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
