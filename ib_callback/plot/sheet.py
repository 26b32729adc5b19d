"""A figure with a layout in inches: panels, a colour bar, title and notes above, the legend below.

All places are computed before drawing. This takes a third of the time of Matplotlib's constrained layout, keeps square
panels square, and makes the places of labels known in advance.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ib_callback.plot.theme import CHARACTER, DPI, FONT, INCH, SMALL, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINE = 1.35  # height of a line as a multiple of the font size
_TITLE_FONT = FONT + 3
# In inches: room left and right of all panels; gap, width and labels of a colour bar.
_LEFT, _RIGHT = 0.85, 0.2
_BAR_GAP, _BAR_WIDTH, _BAR_LABELS = 0.12, 0.16, 0.75
# Height of a strip, and the gap above it.
_STRIP, _STRIP_GAP = 0.42, 0.1


@dataclass(frozen=True)
class Note:
    """A line of text above the panels.

    Attributes:
        text: what the reader must know.
        alarm: whether it says that numbers cannot be compared.
    """

    text: str
    alarm: bool = False


class Sheet:
    """Panels in rows with a common legend and notes. `finish` puts everything in its place.

    Args:
        count: number of panels.
        columns: number of columns of panels.
        size: width and height of a panel, in inches.
        theme: the colours.
        top, bottom: inches above and below all panels.
        across, down: inches between panels.
        left: inches left of all panels.

    Attributes:
        figure: a new figure, which pyplot does not know.
        panels: the panels, row by row.
        handles: entries of the legend by an internal name.
        notes: lines above the panels.
        strips: low panels with the same x-axis, by the index of the panel under which they are.
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
        # Each has another rectangle, because Matplotlib takes axes in one place for the same; `finish` moves them.
        self.panels = [self.figure.add_axes((0, index / count, 1, 1 / count)) for index in range(count)]
        self.bar: Axes | None = None
        self.strips: dict[int, Axes] = {}
        self.handles: dict[str, Any] = {}
        self.notes: list[Note] = []

    def add_bar(self) -> Axes:
        """Add axes for a colour bar to the right of all panels."""
        self.bar = self.figure.add_axes((0.9, 0.1, 0.05, 0.8))
        return self.bar

    def add_strip(self, index: int) -> Axes:
        """Make a low panel under one of the panels, which becomes lower by as much."""
        self.strips[index] = self.figure.add_axes((0, 0, 0.5, 0.5), label=f"strip {index}")
        return self.strips[index]

    def key(self, name: str, label: str, **style: Any) -> None:
        """Add a line or a marker to the legend, once for each name."""
        from matplotlib.lines import Line2D

        self.handles[name] = Line2D([], [], label=label, **style)

    def plot(self, panel: Axes, points: Any, name: str, text: str, *, zorder: float, **style: Any) -> None:
        """Draw a line or markers, [2, points], and explain them in the legend."""
        panel.plot(*points, zorder=zorder, label=name, **style)
        self.key(name, text, **style)

    def finish(self, title: str | None) -> None:
        """Put title and notes above the panels and the legend below them, where it does not hide points."""
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
            taken = 0.0
            if index in self.strips:
                self.strips[index].set_position(_shares((left, bottom, panel_width, _STRIP), inches))
                taken = _STRIP + _STRIP_GAP
            panel.set_position(_shares((left, bottom + taken, panel_width, panel_height - taken), inches))
        if self.bar is not None:
            self.bar.set_position(_shares((self.left + grid_width + _BAR_GAP, floor, _BAR_WIDTH, grid_height), inches))
        top = height - 0.08
        for line, style in head:
            self.figure.text(0.12 / width, top / height, line, ha="left", va="top", **style)
            top -= _LINE * style["fontsize"] / INCH

    def _legend(self, width: float) -> float:
        """Add the legend in as many columns as fit into the width; return its height in inches."""
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
        """The lines of title and notes, wrapped to the width, and their style."""
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
