"""How docstrings are shown: doctests as code, which Markdown would take for quotations."""

from __future__ import annotations

from typing import Any

import griffe


def fenced(text: str) -> str:
    """Docstring with each doctest, up to the next empty line, in a block of code."""
    lines: list[str] = []
    inside = False
    for line in text.split("\n"):
        begins, ends = not inside and line.startswith(">>> "), inside and not line.strip()
        lines += ["```pycon"] if begins else ["```"] if ends else []
        inside = (inside or begins) and not ends
        lines.append(line)
    return "\n".join([*lines, "```"] if inside else lines)


class Doctests(griffe.Extension):
    """Every docstring, as it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring in place."""
        if obj.docstring is not None and ">>> " in obj.docstring.value:
            obj.docstring.value = fenced(obj.docstring.value)
