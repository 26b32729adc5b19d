"""The quantities, one module for each kind: its labels, its kept histograms, and how to read it from the sums."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from ib_callback.measuring.plan.plan import Quantity


def kinds() -> list[type[Quantity]]:
    """All kinds of quantities, one or more from each module of this package, sorted by `turn`."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    classes: list[Any] = [kind for module in modules for kind in vars(module).values() if inspect.isclass(kind)]
    return sorted((kind for kind in dict.fromkeys(classes) if hasattr(kind, "turn")), key=lambda kind: kind.turn)
