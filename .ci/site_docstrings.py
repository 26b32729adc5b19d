"""How docstrings are shown: doctests as code, and what a function returns as the sentence that it is."""

from __future__ import annotations

import re
from typing import Any

import griffe


def fenced(text: str) -> str:
    """Docstring with each doctest, up to the next empty line, in a block of code: Markdown takes it for a quotation."""
    lines: list[str] = []
    inside = False
    for line in text.split("\n"):
        begins, ends = not inside and line.startswith(">>> "), inside and not line.strip()
        lines += ["```pycon"] if begins else ["```"] if ends else []
        inside = (inside or begins) and not ends
        lines.append(line)
    return "\n".join([*lines, "```"] if inside else lines)


def typed(text: str, annotation: str) -> str:
    """Docstring with the type in front of what is returned, where the parser takes words before a colon for one."""
    return re.sub(r"^(Returns:\n +)(?=[^\n]*: )", lambda match: f"{match[1]}{annotation}: ", text, flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Every docstring, as it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring in place."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
            if isinstance(obj, griffe.Function) and obj.returns is not None:
                obj.docstring.value = typed(obj.docstring.value, str(obj.returns))
