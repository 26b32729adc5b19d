"""What every picture of the plane has: square panels of the orders, their labels, the diagonal and the IB curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ib_callback.plot.theme import Theme, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPLEXITY = "complexity I(X;Z)\n(fraction of log num_bins)"
EXPRESSIVITY = "expressivity I(Y;Z)\n(fraction of log num_bins)"
DIAGONAL = "diagonal: expressivity = complexity"
IB_CURVE = "IB curve of the probe (achievable)"


def plane_panels(orders: Sequence[str], theme: Theme, *, beside: float = 1.2) -> tuple[Figure, list[Axes], float]:
    """A figure with a panel for each order, and the side of a panel in inches, approximately.

    Args:
        orders: one panel each.
        theme: of the grid.
        beside: inches for labels and a colour bar.
    """
    columns = len(orders) if len(orders) < 4 else 2 if len(orders) == 4 else 3
    rows = math.ceil(len(orders) / columns)
    size = 4.4 if columns == 1 else 3.5
    figure, panels = new_figure(rows, columns, width=size * columns + beside, height=size * rows + 0.5)
    for unused in panels[len(orders) :]:
        unused.remove()
    panels = panels[: len(orders)]
    for index, (panel, order) in enumerate(zip(panels, orders, strict=True)):
        panel.set_title(order)
        panel.grid(color=theme.faint)
        panel.set_axisbelow(True)
        if index + columns >= len(orders):
            panel.set_xlabel(COMPLEXITY)
        if index % columns == 0:
            panel.set_ylabel(EXPRESSIVITY)
    return figure, panels, size - 0.7


def square_limits(panel: Axes, low: float, high: float) -> None:
    """The same limits for both axes and a square panel, so that the diagonal is one; from 0 if the data allow."""
    if 0 <= low < 0.6 * high:
        low = 0.0
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    panel.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin))
    panel.set_box_aspect(1)
    panel.ticklabel_format(useOffset=False)


def draw_bounds(panel: Axes, curve: np.ndarray | None, theme: Theme, handles: dict[str, Any]) -> None:
    """The diagonal and, where there is one, the IB curve; the panel's limits are final."""
    from matplotlib.lines import Line2D

    style: dict[str, Any] = {"color": theme.ink, "lw": 1.0, "ls": (0, (5, 3))}
    panel.axline((0, 0), slope=1, zorder=1.5, label="diagonal", **style)
    handles["diagonal"] = Line2D([], [], label=DIAGONAL, **style)
    if curve is not None and len(curve):
        style = {"color": theme.bound, "lw": 1.6}
        # More complexity never costs expressivity.
        beyond = max(curve[-1, 0], panel.get_xlim()[1])
        whole = np.concatenate([curve, [[beyond, curve[:, 1].max()]]])
        panel.plot(*whole.T, zorder=1.6, label="IB curve", scalex=False, scaley=False, **style)
        handles["IB curve"] = Line2D([], [], label=IB_CURVE, **style)
