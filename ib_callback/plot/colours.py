"""The colour of each step, from dark to light, and the bar that explains it."""

from __future__ import annotations

import numpy as np

from ib_callback.plot.data import FEW_POINTS, decades, spans_much
from ib_callback.plot.sheet import Sheet
from ib_callback.plot.theme import Theme


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
        """First and last number, and between them those there are (if few) or round ones with room between them."""
        from matplotlib.ticker import MaxNLocator

        low, high = float(self.numbers.min()), float(self.numbers.max())
        if len(self.numbers) <= FEW_POINTS:
            between = self.numbers.tolist()
        elif self.logarithmic:
            between = decades(low, high)
        else:
            between = list(MaxNLocator(6, integer=True).tick_values(low, high))
        chosen = [low, high]
        for tick in between:
            gaps = np.abs(self.norm(np.array(chosen)) - self.norm(np.array([tick])))
            if low < tick < high and gaps.min() > 0.07:
                chosen.append(tick)
        return sorted(chosen)
