"""Import of optional dependencies, with an error that names the extra to install."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import `module`, or raise an ImportError that says what it is needed for and which extra installs it.

    Args:
        module: dotted module name, e.g. `"matplotlib.figure"`.
        extra: the extra of this package that installs it.
        purpose: what the module is needed for, as the subject of a sentence.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise ImportError(
            f'{purpose} needs the package "{missing}", which is not installed. '
            f'Install it with: pip install "ib-callback[{extra}]"',
            name=missing,
        ) from error


def is_installed(module: str) -> bool:
    """Whether a top-level module can be found, without importing it; a substitute in `sys.modules` counts."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module that was put into sys.modules by hand
        return True
