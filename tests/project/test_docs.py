"""Equations are numbered without gaps, and what the code cites is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
EQUATIONS = re.findall(r"^### E(\d+) ", (ROOT / "docs/mathematics.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_equations_are_numbered_in_order() -> None:
    assert [int(number) for number in EQUATIONS] == list(range(1, len(EQUATIONS) + 1))


def test_every_cited_equation_exists() -> None:
    cited: set[str] = set()
    for path in (ROOT / "ib_callback").rglob("*.py"):
        for citation in re.findall(r"\(([^()]*)\sof\sdocs/mathematics\.md", path.read_text(encoding="utf-8")):
            cited |= set(re.findall(r"\bE(\d+)\b", citation))
    assert {"3", "6", "11", "12", "22"} <= cited
    assert cited <= set(EQUATIONS)


def test_pages_that_the_code_names_exist() -> None:
    named = {
        page
        for path in (ROOT / "ib_callback").rglob("*.py")
        for page in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text(encoding="utf-8"))
    }
    assert {page for page in named if not (ROOT / page).exists()} == set()
