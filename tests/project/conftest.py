"""What tests of the code in pages and in examples share."""

from __future__ import annotations

import ast
import importlib
import inspect
import pydoc
import re
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def unknown_names() -> Callable[..., list[str]]:
    """Of a piece of code: the names and keywords of ours that it uses and that do not exist."""
    return find_unknown_names


def find_unknown_names(source: str, **given: Any) -> list[str]:
    """The code knows the names that it imports from us, and those that are given."""
    tree = ast.parse(source)
    known, found = imported_names(tree)
    known = {**given, **known}

    def resolved(node: ast.expr) -> Any:
        """The thing of ours that an expression names, else None."""
        if isinstance(node, ast.Name):
            return known.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := resolved(node.value)) is not None:
            if hasattr(owner, node.attr):
                return getattr(owner, node.attr)
            found.append(f"{ast.unparse(node)} does not exist")
        return None

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolved(node)
        elif isinstance(node, ast.Call) and callable(called := resolved(node.func)):
            parameters = inspect.signature(called).parameters
            if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
                wrong = [each.arg for each in node.keywords if each.arg and each.arg not in parameters]
                found += [f"{ast.unparse(node.func)} takes no {keyword}=" for keyword in wrong]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # The class_path of a configuration.
            paths = re.findall(r"class_path: (ib_callback[\w.]+)", node.value)
            found += [f"{path} does not exist" for path in paths if pydoc.locate(path) is None]
    return list(dict.fromkeys(found))


def imported_names(tree: ast.Module) -> tuple[dict[str, Any], list[str]]:
    """What is imported from us, by the name that the code uses; and what it imports that does not exist."""
    known: dict[str, Any] = {}
    missing: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours = [alias for alias in node.names if alias.name.partition(".")[0] == "ib_callback"]
            known |= {alias.asname or alias.name: importlib.import_module(alias.name) for alias in ours}
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "ib_callback":
            module = importlib.import_module(str(node.module))
            missing += [f"{node.module} has no {alias.name}" for alias in node.names if not hasattr(module, alias.name)]
            known |= {alias.asname or alias.name: getattr(module, alias.name, None) for alias in node.names}
    return known, missing
