"""The docstrings of the installed standard library, NumPy, SciPy and torch, read from their source files."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_PACKAGES = ("numpy", "scipy", "torch")
# Not read: tests; copies of other projects; folders that some distributions leave out or package separately; and
# folders with much source and little text, which would take a third of the time.
_SKIPPED_FOLDERS = frozenset(
    "__pycache__ _dynamo _inductor _vendor distutils dist-packages encodings ensurepip f2py idlelib lib2to3 "
    "pydoc_data site-packages test testing tests third_party tkinter turtledemo".split()
)
_TRIPLE_QUOTED = re.compile(rb'""".*?"""|\'\'\'.*?\'\'\'', re.DOTALL)


def _source_files(root: Path) -> Iterator[Path]:
    """The Python files below `root`, sorted by path, because the order of the file system varies."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    yield from sorted(found, key=lambda path: path.relative_to(root).parts)


def _parse(source: bytes) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences in other people's docstrings
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return None


def _docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a definition and of everything inside it; the texts of a call like `add_docstr(f, "...")`."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield docstring
        for child in node.body:
            yield from _docstrings(child)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        for part in ast.walk(node.value):
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and "\n" in part.value:
                yield part.value


def _module_texts(path: Path) -> list[list[str]]:
    """The docstrings of one source file: of the module, and of each class, function and call in it."""
    source = path.read_bytes()
    # Parsing takes most of the time, and many files hold almost no text.
    quoted = sum(len(text) for text in _TRIPLE_QUOTED.findall(source))
    if quoted < max(600, 0.1 * len(source)):
        return []
    module = _parse(source)
    if module is None:
        return []
    own = ast.get_docstring(module, clean=False)
    texts = [[own] if own else [], *(list(_docstrings(statement)) for statement in module.body)]
    return [text for text in texts if text]


def _topics(stdlib: Path) -> list[list[str]]:
    """The language reference that `help("topic")` shows; some distributions leave it out."""
    path = stdlib / "pydoc_data" / "topics.py"
    module = _parse(path.read_bytes()) if path.is_file() else None
    tables = [node.value for node in module.body if isinstance(node, ast.Assign)] if module else []
    values = [value for table in tables if isinstance(table, ast.Dict) for value in table.values]
    topics = [value.value for value in values if isinstance(value, ast.Constant)]
    return [[topic] for topic in topics if isinstance(topic, str)]


def roots() -> list[Path]:
    """The folders that are read: the standard library first, then those of the packages."""
    found = [Path(sysconfig.get_path("stdlib"))]
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None:
            found += map(Path, spec.submodule_search_locations or ())
    return found


def modules() -> Iterator[list[list[str]]]:
    """Yield for each module one list of docstrings for each of its classes, functions and so on.

    Files are parsed, never imported. Modules are sorted by their path below each package.
    """
    folders = roots()
    yield _topics(folders[0])
    for root in folders:
        for path in _source_files(root):
            yield _module_texts(path)
