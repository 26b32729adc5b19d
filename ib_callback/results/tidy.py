"""Measurements as a table, one row a point: for pandas, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

from ib_callback.common.optional import require
from ib_callback.results.measurement import Measurement

# Columns that hold texts; all others hold numbers.
TEXTS = ("model", "revision", "family", "stage", "source", "error")


def rows_of(points: Iterable[tuple[Mapping[str, Any], Measurement]]) -> list[dict[str, Any]]:
    """Rows that all have the same columns.

    Args:
        points: each with the columns that go before its numbers.

    Returns:
        Those columns, every number under its name as logged, without prefix, and `error`: why a point is missing. What
        is undefined or missing is None.
    """
    found = [(head, measurement.scalars(), measurement.error) for head, measurement in points]
    heads = dict.fromkeys(name for head, _, _ in found for name in head)
    names = heads | dict.fromkeys(name for _, scalars, _ in found for name in scalars)
    return [{**names, **head, **scalars, "error": error} for head, scalars, error in found]


def to_pandas(rows: list[dict[str, Any]]) -> Any:
    """A `pandas.DataFrame`; a number that is None is NaN.

    Raises:
        ImportError: pandas is not installed.
    """
    pandas = require("pandas", extra="pandas", purpose="A table as a DataFrame")
    frame = pandas.DataFrame(rows)
    # A column without any number would hold None objects.
    empty = {name: float for name in frame.columns if name not in TEXTS and frame[name].isna().all()}
    return frame.astype(empty)


def to_csv(rows: list[dict[str, Any]]) -> str:
    """With a header; what is None is empty. Empty without rows."""
    if not rows:
        return ""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_json(rows: list[dict[str, Any]]) -> str:
    """A list of objects, one a line; strict JSON, None as null."""
    lines = [json.dumps(row, allow_nan=False, ensure_ascii=False) for row in rows]
    return "[\n" + ",\n".join(lines) + "\n]\n"
