"""The planes of a run: plain, local, and the planes of the two views of the output, readout and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ib_callback.plot import data
from ib_callback.results.measurement import Measurement
from ib_callback.results.metrics import FIRST_VIEW

_WORDS = {
    "complexity": "information about\nthe preceding context",
    "expressivity": "information about\nthe following context",
}


@dataclass(frozen=True)
class Plane:
    """Which complexity and expressivity of a measurement are the axes.

    Attributes:
        name: the name that users give, and that stands above its panels.
        view: view of the measurement; "" for the states of all measured layers.
        is_local: whether the numbers are above the document baseline. Chance is then the origin, otherwise the null.
    """

    name: str
    view: str = ""
    is_local: bool = False

    def values(self, points: Sequence[Measurement], order: str, of: str = "") -> np.ndarray:
        """Complexity and expressivity of every point, [points, 2]; with `of`, their "_null" or "_se"."""
        name = f"{self.view}/{order}" if self.view else order
        return data.plane(points, name, f"{'_local' if self.is_local else ''}{of}")

    def label(self, axis: str) -> str:
        """The label of an axis, "complexity" or "expressivity", on two lines."""
        return f"{'local ' if self.is_local else ''}{axis}: {_WORDS[axis]}"


PLAIN = Plane("plain")
# In the order of a picture. Each plane takes the first form that was measured; `information_plane` gives the reason.
_FORMS = {
    **{view: (Plane(view, view, is_local=True), Plane(view, view)) for view in (FIRST_VIEW, "readout")},
    "local": (Plane("local", is_local=True),),
    "plain": (PLAIN,),
}
# Names that users can give.
NAMES = tuple(_FORMS)


def planes_of(points: Sequence[Measurement], orders: Sequence[str], asked: Sequence[str] | None) -> list[Plane]:
    """The planes to draw: the requested ones, by default all that some point has for one of these orders.

    Raises:
        ValueError: no point has a requested plane, or no plane is requested.
    """
    known = {}
    for name, forms in _FORMS.items():
        for form in forms:
            tables = (form.values(points, order) for order in orders)
            if form is PLAIN or any(np.isfinite(table).all(axis=1).any() for table in tables):
                known[name] = form
                break
    if asked is None:
        return list(known.values())
    asked = [asked] if isinstance(asked, str) else list(dict.fromkeys(asked))
    if not asked or not set(asked) <= set(known):
        raise ValueError(f"expected planes among {', '.join(known)}, got {', '.join(asked) or 'none'}")
    return [known[name] for name in asked]
