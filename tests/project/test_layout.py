"""The packages: imports go one way, levels are small enough to read, and importing the library is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ib_callback"
# From the lowest to the highest; packages of one level do not know each other.
LEVELS = (
    {"common"},
    {"estimator", "probe", "results"},
    {"bound"},
    {"measuring", "plot"},
    {"run"},
    {"analysis", "checkpoints", "hf", "lightning"},
    {"cli"},
)
LEVEL = {package: number for number, packages in enumerate(LEVELS) for package in packages}
MOST_ENTRIES = 16


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a module imports anywhere: inside functions and for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else str(node.module))
    return {name for name in found if name.partition(".")[0] == "ib_callback"}


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_package_has_its_level() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(LEVEL)
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == {"__init__.py", "__main__.py", "py.typed"}


def test_no_import_of_a_higher_package_nor_of_one_beside() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, names in IMPORTS.items()
        for imported in names
        if module not in ("ib_callback", "ib_callback.__main__")
        and package_of(module) != package_of(imported)
        and (imported == "ib_callback" or LEVEL[package_of(imported)] >= LEVEL[package_of(module)])
    ]
    assert not wrong


def test_no_circle_among_modules() -> None:
    # Raises a CycleError that names the circle.
    order = list(TopologicalSorter(IMPORTS).static_order())
    assert len(order) == len(MODULES)


def test_no_private_module_of_another_package() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, names in IMPORTS.items()
        for imported in names
        if any(part.startswith("_") and part != "__init__" for part in imported.split("."))
        and module.split(".")[:2] != imported.split(".")[:2]
    ]
    assert not wrong


@pytest.mark.parametrize("root", [PACKAGE, ROOT / "tests"], ids=lambda path: path.name)
def test_each_level_can_be_read_at_a_glance(root: Path) -> None:
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    sizes = {
        str(folder.relative_to(ROOT)): len([path for path in folder.iterdir() if path.name != "__pycache__"])
        for folder in folders
        if folder.name != "__pycache__" and "fixtures" not in folder.parts
    }
    assert {folder: size for folder, size in sizes.items() if size > MOST_ENTRIES} == {}


def test_tests_mirror_the_packages() -> None:
    tested = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*") if (path / "__init__.py").is_file()}
    folders = {str(path.parent.relative_to(ROOT / "tests")) for path in (ROOT / "tests").rglob("test_*.py")}
    assert tested <= folders


def test_importing_the_library_imports_nothing_that_is_not_needed_for_it() -> None:
    heavy = ("scipy.optimize", "pandas", "matplotlib", "transformers", "lightning", "pytorch_lightning", "datasets",
             "wandb")  # fmt: skip
    script = f"import sys, ib_callback; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
