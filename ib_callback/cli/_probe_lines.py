"""A probe as lines of JSON, for other programs and for people."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ib_callback.common.errors import ProbeError
from ib_callback.common.files import write_atomically
from ib_callback.probe.content import NO_LABEL, Content
from ib_callback.probe.probe import Probe

_HEADER = "probe"


def write_lines(path: str | os.PathLike[str], probe: Probe) -> None:
    """Write a header, `{"probe": {name, tokenizer, source, label_names, length, fingerprint}}`, and then for each
    sequence `{"input_ids": […], "labels": {name: […]}}` over its real tokens; `"padding": n` where n come before.
    """
    header = {
        "name": probe.name,
        "tokenizer": probe.tokenizer,
        "source": probe.source,
        "label_names": probe.label_names,
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
    """The probe of a file as `write_lines` writes it; the header may be missing, and then the name is the file's.

    Raises:
        ProbeError: not such a file, or its content does not add up to the fingerprint in its header.
        FileNotFoundError: there is no such file.
    """
    header: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError as error:
                raise ProbeError(f"{path}:{number}: expected one JSON object a line ({error}).") from error
            if number == 1 and isinstance(line, dict) and isinstance(line.get(_HEADER), dict):
                header = line[_HEADER]
            elif isinstance(line, dict) and isinstance(line.get("input_ids"), list) and line["input_ids"]:
                _check_row(line, f"{path}:{number}")
                rows.append(line)
            else:
                raise ProbeError(f'{path}:{number}: expected {{"input_ids": [ids], …}}, got {text.strip()[:60]}.')
    if not rows:
        raise ProbeError(f"{path}: expected at least one line with input_ids, got none.")
    probe = _probe(Path(path), header, rows)
    wanted = header.get("fingerprint", probe.fingerprint)
    if probe.fingerprint != wanted:
        raise ProbeError(
            f"{path}: its lines were changed: expected fingerprint {wanted}, got {probe.fingerprint}. Take "
            '"fingerprint" out of its header if that is meant.'
        )
    return probe


def _check_row(row: dict[str, Any], where: str) -> None:
    if not isinstance(row.get("labels", {}), dict):
        raise ProbeError(f'{where}: expected {{"labels": {{name: [labels]}}}}, got {str(row["labels"])[:60]}.')
    padding = row.get("padding", 0)
    if type(padding) is not int or padding < 0:
        raise ProbeError(f'{where}: expected "padding" to be 0 or more, the tokens before, got {padding!r}.')


def _probe(path: Path, header: dict[str, Any], rows: list[dict[str, Any]]) -> Probe:
    if type(header.get("length", 0)) is not int:
        raise ProbeError(f'{path}: expected "length" in the header to be an integer, got {header["length"]!r}.')
    ends = [row.get("padding", 0) + len(row["input_ids"]) for row in rows]
    shape = len(rows), max(*ends, header.get("length", 0), 0)
    names = sorted({name for row in rows for name in row.get("labels", {})})
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, bool)
    labels = {name: np.full(shape, NO_LABEL, np.int64) for name in names}
    for place, (row, end) in enumerate(zip(rows, ends, strict=True)):
        real = slice(row.get("padding", 0), end)
        mask[place, real] = True
        try:
            ids[place, real] = _integers(row["input_ids"])
            for name, label in row.get("labels", {}).items():
                labels[name][place, real] = _integers(label)
        except (TypeError, ValueError) as error:
            raise ProbeError(
                f"{path}: sequence {place}: expected integers, and as many labels as ids ({error})."
            ) from error
    return Probe(
        Content(
            input_ids=ids,
            attention_mask=mask,
            labels=labels,
            label_names=header.get("label_names"),
            name=header.get("name", path.stem),
            source=header.get("source", {"constructor": "lines"}),
            tokenizer=header.get("tokenizer"),
        )
    )


def _integers(values: list[Any]) -> np.ndarray:
    array = np.array(values)
    if array.dtype.kind not in "iu":
        raise ValueError(f"got {array.dtype}")
    return array
