"""What pictures of the plane have in common: square panels, the diagonal, the IB curve, and the colours of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ib_callback.plot.data import decades, spans_much
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


class StepColours:
    """A colour for each number, such as a step.

    Args:
        numbers: of each point.
        title: what they are.
        theme: decides the part of the colour map that is seen on its paper.
        logarithmic: whether the colours follow the logarithm; by default, if the numbers span much.

    Attributes:
        norm: number to position on the colour scale.
        rgba: colour of each point, [points, 4].
    """

    def __init__(self, numbers: np.ndarray, title: str, theme: Theme, *, logarithmic: bool | None = None) -> None:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize, SymLogNorm

        self.numbers, self.title = numbers, title
        low, high = float(numbers.min()), float(numbers.max())
        positive = min((number for number in numbers if number > 0), default=1.0)
        self.logarithmic = spans_much(numbers) if logarithmic is None else logarithmic
        self.norm = Normalize(low, high)
        if self.logarithmic:
            # Linear from step 0, which has no logarithm, to the first one after it.
            self.norm = SymLogNorm(linthresh=positive, linscale=0.3, vmin=low, vmax=high, base=10)
        # Even to the eye and told apart by the colour-blind.
        first, last = theme.steps
        part = ListedColormap(colormaps["viridis"](np.linspace(first, last, 256)))
        self.scale = ScalarMappable(self.norm, part)
        self.rgba = np.asarray(self.scale.to_rgba(numbers))

    def draw_bar(self, sheet: Sheet) -> None:
        """A bar beside the panels, if there is more than one colour."""
        if np.ptp(self.numbers) == 0:
            return
        bar = sheet.figure.colorbar(self.scale, cax=sheet.add_bar())
        bar.set_label(self.title)
        ticks = self._ticks()
        bar.set_ticks(ticks, labels=[f"{tick:,.0f}" for tick in ticks])
        bar.ax.minorticks_off()
        bar.outline.set_linewidth(0.5)

    def _ticks(self) -> list[float]:
        """First and last number, and between them round ones that are not too near to these."""
        from matplotlib.ticker import MaxNLocator

        low, high = float(self.numbers.min()), float(self.numbers.max())
        between = decades(low, high) if self.logarithmic else MaxNLocator(6, integer=True).tick_values(low, high)
        return [low, *(float(tick) for tick in between if 0.07 < self.norm(tick) < 0.93), high]
