"""A figure laid out in inches: panels, a colour bar, title and notes above, the legend below.

Everything has its place before it is drawn, which costs a third of what Matplotlib's constrained layout takes, keeps
square panels square, and tells labels where they are.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ib_callback.plot.theme import CHARACTER, DPI, FONT, INCH, SMALL, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINE = 1.35  # of the font size
_TITLE_FONT = FONT + 3
# In inches: left of all panels, right of them, and with a colour bar its gap, its width and its labels.
_LEFT, _RIGHT = 0.85, 0.2
_BAR_GAP, _BAR_WIDTH, _BAR_LABELS = 0.12, 0.16, 0.75


@dataclass(frozen=True)
class Note:
    """A line that belongs to the picture.

    Attributes:
        text: what the reader must know.
        alarm: whether the numbers drawn must not be compared.
    """

    text: str
    alarm: bool = False


class Sheet:
    """Panels in rows, with one legend and notes for all; `finish` gives everything its place.

    Args:
        count: number of panels.
        columns: of panels.
        size: width and height of a panel, in inches.
        theme: its colours.
        top, bottom: inches above and below all panels.
        across, down: inches between panels.
        left: inches left of all panels.

    Attributes:
        figure: of its own, known to no pyplot.
        panels: by row.
        handles: entries of the legend, by a name of their own.
        notes: what is to be said above the panels.
    """

    def __init__(
        self,
        count: int,
        columns: int,
        *,
        size: tuple[float, float],
        theme: Theme,
        top: float = 0.34,
        bottom: float = 0.62,
        across: float = 0.55,
        down: float = 0.62,
        left: float = _LEFT,
    ) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.columns, self.size, self.theme = columns, size, theme
        self.top, self.bottom, self.across, self.down, self.left = top, bottom, across, down, left
        self.figure = Figure(figsize=size, dpi=DPI)
        FigureCanvasAgg(self.figure)
        # Each its own rectangle, for axes in one place are taken for the same ones; `finish` moves them.
        self.panels = [self.figure.add_axes((0, index / count, 1, 1 / count)) for index in range(count)]
        self.bar: Axes | None = None
        self.handles: dict[str, Any] = {}
        self.notes: list[Note] = []

    def add_bar(self) -> Axes:
        """Room for a colour bar to the right of all panels."""
        self.bar = self.figure.add_axes((0.9, 0.1, 0.05, 0.8))
        return self.bar

    def key(self, name: str, label: str, **style: Any) -> None:
        """Put a line or a marker into the legend, once for each name."""
        from matplotlib.lines import Line2D

        self.handles[name] = Line2D([], [], label=label, **style)

    def plot(self, panel: Axes, points: Any, name: str, text: str, *, zorder: float, **style: Any) -> None:
        """Draw a line or markers, [2, points], under a name, which the legend explains."""
        panel.plot(*points, zorder=zorder, label=name, **style)
        self.key(name, text, **style)

    def finish(self, title: str | None) -> None:
        """Put title and notes above the panels and the legend below, where it hides no point."""
        panel_width, panel_height = self.size
        rows = math.ceil(len(self.panels) / self.columns)
        grid_width = self.columns * panel_width + (self.columns - 1) * self.across
        grid_height = rows * panel_height + (rows - 1) * self.down
        width = self.left + grid_width + (_RIGHT if self.bar is None else _BAR_GAP + _BAR_WIDTH + _BAR_LABELS)
        floor = self._legend(width) + self.bottom
        head = self._head(title, width)
        head_height = sum(_LINE * style["fontsize"] / INCH for _, style in head) + (0.14 if head else 0.0)
        height = floor + grid_height + self.top + head_height

        self.figure.set_size_inches(width, height)
        inches = (width, height, width, height)
        for index, panel in enumerate(self.panels):
            row, column = divmod(index, self.columns)
            left = self.left + column * (panel_width + self.across)
            bottom = floor + (rows - 1 - row) * (panel_height + self.down)
            panel.set_position(_shares((left, bottom, panel_width, panel_height), inches))
        if self.bar is not None:
            self.bar.set_position(_shares((self.left + grid_width + _BAR_GAP, floor, _BAR_WIDTH, grid_height), inches))
        top = height - 0.08
        for line, style in head:
            self.figure.text(0.12 / width, top / height, line, ha="left", va="top", **style)
            top -= _LINE * style["fontsize"] / INCH

    def _legend(self, width: float) -> float:
        """Add the legend in as many columns as fit into the width; its height."""
        handles = list(self.handles.values())
        for columns in range(min(len(handles), 5), 0, -1):
            legend = self.figure.legend(
                handles=handles, loc="lower center", ncols=columns, frameon=False, borderaxespad=0.4
            )
            extent = legend.get_window_extent()
            if columns == 1 or extent.width / DPI <= width - 0.3:
                return extent.height / DPI + 0.1
            legend.remove()
        return 0.0

    def _head(self, title: str | None, width: float) -> list[tuple[str, dict[str, Any]]]:
        """Lines of title and notes, none much longer than the width, and how they look."""
        texts: list[tuple[str, dict[str, Any]]] = []
        if title:
            bold = {"fontsize": _TITLE_FONT, "fontweight": "bold", "color": self.theme.ink, "gid": "title"}
            texts.append((title, bold))
        for note in self.notes:
            colour = self.theme.alarm if note.alarm else self.theme.muted
            texts.append((note.text, {"fontsize": SMALL, "color": colour, "gid": "note"}))
        lines = []
        for text, style in texts:
            # Bold characters are wider.
            character = CHARACTER * style["fontsize"] * (1.15 if "fontweight" in style else 1.0)
            longest = max(20, int((width - 0.3) * INCH / character))
            lines += [(line, style) for line in textwrap.wrap(text, longest, break_on_hyphens=False)]
        return lines


def _shares(box: tuple[float, ...], whole: tuple[float, ...]) -> Any:
    return tuple(part / all_of_it for part, all_of_it in zip(box, whole, strict=True))
