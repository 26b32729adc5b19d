"""Reads what an offline run of Weights & Biases wrote, for W&B itself has no reader for it."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HEADER = 7
_BLOCK = 32 * 1024
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """Rows of the history in the order of logging, step metrics by glob, the summary, and where the files are."""

    files: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    step_metrics: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def table(self, row: dict[str, Any], key: str) -> list[dict[str, Any]]:
        """The rows of a table that was logged under `key`, each by the names of its columns."""
        assert row[f"{key}/_type"] == "table-file"
        table = json.loads((self.files / row[f"{key}/path"]).read_text())
        return [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]


def read_offline_runs(directory: Path) -> list[OfflineRun]:
    """All finished offline runs below a directory, the oldest first."""
    return [_read(path) for path in sorted(directory.glob("**/run-*.wandb"))]


def _read(path: Path) -> OfflineRun:
    # wandb.finish() returns before the process that writes the file has written the end of it.
    deadline = time.monotonic() + 60
    while (run := _parse(path)) is None:
        assert time.monotonic() < deadline, f"{path}: the run has not been finished"
        time.sleep(0.05)
    return run


def _parse(path: Path) -> OfflineRun | None:
    """The run, or None as long as its end is not there."""
    from wandb.proto.wandb_internal_pb2 import Record

    run, complete = OfflineRun(files=path.parent / "files"), False
    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            run.rows.append(_values(record.history.item))
        elif kind == "summary":
            run.summary.update(_values(record.summary.update))
        elif kind in ("config", "run"):
            run.config.update(_values((record.config if kind == "config" else record.run.config).update))
        elif kind == "exit":
            complete = True
        elif kind == "metric" and record.metric.glob_name:
            run.step_metrics[record.metric.glob_name] = record.metric.step_metric
    return run if complete else None


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(content: bytes) -> Iterator[bytes]:
    """The whole records of a LevelDB log: chunks of checksum 4, length 2, type 1 and data, in blocks of 32 KiB."""
    assert b":W&B".startswith(content[:4]), content[:_HEADER]
    offset, parts = _HEADER, []
    while offset + 7 <= len(content):
        left = _BLOCK - offset % _BLOCK
        if left < 7:
            offset += left
            continue
        _, length, kind = struct.unpack("<IHB", content[offset : offset + 7])
        assert kind in (_FULL, _FIRST, _MIDDLE, _LAST), kind
        if offset + 7 + length > len(content):
            return
        parts.append(content[offset + 7 : offset + 7 + length])
        offset += 7 + length
        if kind in (_FULL, _LAST):
            yield b"".join(parts)
            parts = []
