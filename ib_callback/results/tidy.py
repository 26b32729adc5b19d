"""Measurements as a table with one row for each point, for pandas, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

from ib_callback.common.optional import require
from ib_callback.results.measurement import Measurement

# Columns that hold text; all others hold numbers.
TEXTS = ("model", "revision", "family", "stage", "source", "error")


def rows_of(points: Iterable[tuple[Mapping[str, Any], Measurement]]) -> list[dict[str, Any]]:
    """Rows that all have the same columns.

    Args:
        points: each point with the columns that come before its numbers.

    Returns:
        For each point: those columns; every number by its logged name, without prefix; and `error`, why the point is
        missing. Undefined and missing values are None.
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
    # Otherwise a column without any number would hold None objects.
    empty = {name: float for name in frame.columns if name not in TEXTS and frame[name].isna().all()}
    return frame.astype(empty)


def to_csv(rows: list[dict[str, Any]]) -> str:
    """CSV text with a header; None becomes an empty cell. Empty without rows."""
    if not rows:
        return ""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_json(rows: list[dict[str, Any]]) -> str:
    """A JSON list with one object on each line; strict JSON, with None as null."""
    lines = [json.dumps(row, allow_nan=False, ensure_ascii=False) for row in rows]
    return "[\n" + ",\n".join(lines) + "\n]\n"
