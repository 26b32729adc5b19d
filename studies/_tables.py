"""Tables of the studies, as markdown."""

from __future__ import annotations

from collections.abc import Sequence


def heading(text: str, level: int) -> str:
    return f"\n{'#' * level} {text}\n"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def prose(text: str) -> str:
    """A paragraph on one line."""
    return " ".join(text.split()) + "\n"
