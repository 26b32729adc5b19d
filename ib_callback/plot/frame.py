"""What every picture of the plane has: square panels of the orders, their labels, the diagonal and the IB curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ib_callback.plot.sheet import Sheet
from ib_callback.plot.theme import Theme
from ib_callback.results.metrics import PLANE_BY_NAME

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMPLEXITY, EXPRESSIVITY = (
    f"{PLANE_BY_NAME[name].label}\n(fraction of log num_bins)" for name in ("complexity", "expressivity")
)


def plane_sheet(orders: Sequence[str], theme: Theme) -> Sheet:
    """A sheet with a square panel for each order, named and labelled."""
    columns = len(orders) if len(orders) < 4 else 2 if len(orders) == 4 else 3
    side = 3.9 if columns == 1 else 2.9
    sheet = Sheet(len(orders), columns, size=(side, side), theme=theme)
    for index, (panel, order) in enumerate(zip(sheet.panels, orders, strict=True)):
        panel.set_title(order)
        panel.grid(color=theme.faint)
        panel.set_axisbelow(True)
        if index + columns >= len(orders):
            panel.set_xlabel(COMPLEXITY)
        if index % columns == 0:
            panel.set_ylabel(EXPRESSIVITY)
    return sheet


def square_limits(panel: Axes, low: float, high: float, *, from_zero: bool = True) -> None:
    """The same limits for both axes of a square panel, so that the diagonal is one; from 0 if the data allow."""
    from matplotlib.ticker import MaxNLocator

    if from_zero and 0 <= low < 0.6 * high:
        low = 0.0
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    panel.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    panel.ticklabel_format(useOffset=False)


def draw_bounds(sheet: Sheet, panel: Axes, curve: np.ndarray | None) -> None:
    """The diagonal and, where there is one, the IB curve; the panel's limits are final."""
    style: dict[str, Any] = {"color": sheet.theme.ink, "lw": 1.0, "ls": (0, (5, 3))}
    panel.axline((0, 0), slope=1, zorder=1.5, label="diagonal", **style)
    sheet.key("diagonal", "diagonal: expressivity = complexity", **style)
    if curve is not None and len(curve):
        style = {"color": sheet.theme.bound, "lw": 1.6}
        # More complexity never costs expressivity.
        beyond = max(curve[-1, 0], panel.get_xlim()[1])
        whole = np.concatenate([curve, [[beyond, curve[:, 1].max()]]])
        panel.plot(*whole.T, zorder=1.6, label="IB curve", scalex=False, scaley=False, **style)
        sheet.key("IB curve", "IB curve of the probe (achievable)", **style)
