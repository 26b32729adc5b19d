"""What is measured, one module for each kind: its labels, the histograms it keeps, and how it is read out."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from ib_callback.measuring.plan.plan import Quantity


def kinds() -> list[type[Quantity]]:
    """The kinds that there are, one or more in each module of this package, in their turns."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    classes: list[Any] = [kind for module in modules for kind in vars(module).values() if inspect.isclass(kind)]
    return sorted((kind for kind in dict.fromkeys(classes) if hasattr(kind, "turn")), key=lambda kind: kind.turn)
