"""What README says exists, and nothing is left out of its tree."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_tree_names_every_package_once() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## What is where")[1].split("```")[1]
    package = tree[tree.index("\n  ") : tree.index("\ntests/")]
    named = Counter(name for line in package.splitlines() for name in re.findall(r"\b(\w+)/", line[:24]))
    assert named == Counter(path.parent.name for path in (ROOT / "ib_callback").glob("*/__init__.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing
