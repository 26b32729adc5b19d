"""A probe as lines of JSON, for other programs and for people."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ib_callback.common import json_lines
from ib_callback.common.errors import ProbeError
from ib_callback.common.files import write_atomically
from ib_callback.probe.content import NO_LABEL, Content
from ib_callback.probe.probe import Probe

_HEADER = "probe"
_MOST = 2**27  # positions, including padding


def write_lines(path: str | os.PathLike[str], probe: Probe) -> None:
    """Write a header and a line for each sequence.

    The header is `{"probe": {name, tokenizer, source, label_names, groups, num_bytes, length, fingerprint}}`. A line is
    `{"input_ids": […], "labels": {name: […]}}` over the real tokens, with `"padding": n` if n positions of padding come
    before them.
    """
    header = {
        "name": probe.name,
        "tokenizer": probe.tokenizer,
        "source": probe.source,
        "label_names": probe.label_names,
        "num_bytes": probe.num_bytes,
        **({} if probe.groups is None else {"groups": probe.groups}),
        "length": probe.input_ids.shape[1],
        "fingerprint": probe.fingerprint,
    }
    lines = [json.dumps({_HEADER: header}, ensure_ascii=False)]
    for row, mask in enumerate(probe.attention_mask):
        line: dict[str, Any] = {"input_ids": probe.input_ids[row][mask].tolist()}
        if probe.labels:
            line["labels"] = {name: label[row][mask].tolist() for name, label in probe.labels.items()}
        before = int(mask.int().argmax())
        lines.append(json.dumps(line | ({"padding": before} if before else {}), ensure_ascii=False))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def read_lines(path: str | os.PathLike[str]) -> Probe:
    """Read the probe from a file of `write_lines`. Without a header, the probe gets the name of the file.

    Raises:
        ProbeError: the file has another format, or its content does not match the fingerprint in its header.
        FileNotFoundError: there is no such file.
    """
    header: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = json_lines.parsed(text)
            except ValueError as error:
                raise ProbeError(f"{path}:{number}: expected one JSON object per line ({error}).") from error
            if number == 1 and isinstance(line, dict) and isinstance(line.get(_HEADER), dict):
                header = line[_HEADER]
            else:
                _check_row(line, f"{path}:{number}")
                rows.append(line)
    if not rows:
        raise ProbeError(f"{path}: expected at least one line with input_ids, got none.")
    try:
        probe = Probe(_content(Path(path), header, rows))
    except ProbeError as error:
        raise ProbeError(f"{path}: its content is not a probe: {error}") from error
    wanted = header.get("fingerprint", probe.fingerprint)
    if probe.fingerprint != wanted:
        raise ProbeError(
            f"{path}: its lines were changed: expected fingerprint {wanted}, got {probe.fingerprint}. If this was "
            'intended, remove "fingerprint" from its header.'
        )
    return probe


def _check_row(row: Any, where: str) -> None:
    found = row if isinstance(row, dict) else {}
    ids, labels, padding = found.get("input_ids"), found.get("labels", {}), found.get("padding", 0)
    if (
        not (isinstance(ids, list) and ids and isinstance(labels, dict))
        or any(not isinstance(label, list) or len(label) != len(ids) for label in labels.values())
        or not (type(padding) is int and padding >= 0)
    ):
        raise ProbeError(
            f'{where}: expected {{"input_ids": [ids], "labels": {{name: [as many]}}, "padding": 0 or more}}, where '
            f"only input_ids is required, got {json.dumps(row)[:80]}."
        )


def _content(path: Path, header: dict[str, Any], rows: list[dict[str, Any]]) -> Content:
    asked = header.get("length", 0)
    if type(asked) is not int:
        raise ProbeError(f"length: expected an integer, got {asked!r}.")
    length = max(asked, *(row.get("padding", 0) + len(row["input_ids"]) for row in rows))
    if length * len(rows) > _MOST:  # checked first, because a list that is too long would use up the memory
        raise ProbeError(
            f"length and padding: expected at most {_MOST:,} positions in total, got {len(rows):,} sequences of "
            f"{length:,}."
        )

    def padded(values: list[Any], row: dict[str, Any], by: int) -> list[Any]:
        before = [by] * row.get("padding", 0)
        return before + values + [by] * (length - len(before) - len(values))

    names = {name for row in rows for name in row.get("labels", {})}
    return Content(
        input_ids=[padded(row["input_ids"], row, 0) for row in rows],
        attention_mask=[padded([1] * len(row["input_ids"]), row, 0) for row in rows],
        labels={name: [padded(row.get("labels", {}).get(name, []), row, NO_LABEL) for row in rows] for name in names},
        label_names=header.get("label_names"),
        groups=header.get("groups"),
        name=header.get("name", path.stem),
        source=header.get("source", {"constructor": "lines"}),
        tokenizer=header.get("tokenizer"),
        # Unknown if the lines may have been changed.
        num_bytes=header.get("num_bytes") if "fingerprint" in header else None,
    )
