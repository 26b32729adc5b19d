"""A figure laid out in inches: panels, a colour bar, title and notes above, the legend below.

Everything has its place before it is drawn, which costs a third of what Matplotlib's constrained layout takes, keeps
square panels square, and tells labels where they are.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ib_callback.plot.theme import CHARACTER, DPI, FONT, INCH, SMALL, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINE = 1.35  # of the font size
_LEGEND_FONT = FONT - 0.5
_TITLE_FONT = FONT + 3
_BAR = (0.12, 0.16)  # gap and width


@dataclass(frozen=True)
class Note:
    """A line that belongs to the picture.

    Attributes:
        text: what the reader must know.
        alarm: whether the numbers drawn must not be compared.
    """

    text: str
    alarm: bool = False


@dataclass(frozen=True, kw_only=True)
class Margins:
    """Inches around the panels and between them."""

    left: float = 0.85
    right: float = 0.2
    bottom: float = 0.62
    top: float = 0.34
    across: float = 0.55
    down: float = 0.62


DEFAULT_MARGINS = Margins()


class Sheet:
    """Panels in rows, with one legend and notes for all; `finish` gives everything its place.

    Args:
        count: number of panels.
        columns: of panels.
        size: width and height of a panel, in inches.
        theme: its colours.
        margins: around the panels.

    Attributes:
        figure: of its own, known to no pyplot.
        panels: by row.
        handles: entries of the legend, by a name of their own.
        notes: what is to be said above the panels.
    """

    def __init__(
        self, count: int, columns: int, *, size: tuple[float, float], theme: Theme, margins: Margins = DEFAULT_MARGINS
    ) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.columns, self.size, self.theme, self.margins = columns, size, theme, margins
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

    def finish(self, title: str | None) -> None:
        """Put title and notes above the panels and the legend below, where it hides no point."""
        handles = list(self.handles.values())
        margins, (panel_width, panel_height) = self.margins, self.size
        rows = math.ceil(len(self.panels) / self.columns)
        grid_width = self.columns * panel_width + (self.columns - 1) * margins.across
        grid_height = rows * panel_height + (rows - 1) * margins.down
        width = margins.left + grid_width + (margins.right if self.bar is None else sum(_BAR) + 0.75)
        head = self._head(title, width)
        head_height = sum(_LINE * style["fontsize"] for _, style in head) / INCH + (0.14 if head else 0.0)
        legend_columns = _legend_columns(handles, width - 0.2)
        legend_rows = math.ceil(len(handles) / legend_columns)
        legend_height = (legend_rows * 1.62 + 1.2) * _LEGEND_FONT / INCH if handles else 0.0
        floor = legend_height + margins.bottom
        height = floor + grid_height + margins.top + head_height

        self.figure.set_size_inches(width, height)
        for index, panel in enumerate(self.panels):
            row, column = divmod(index, self.columns)
            left = margins.left + column * (panel_width + margins.across)
            bottom = floor + (rows - 1 - row) * (panel_height + margins.down)
            panel.set_position((left / width, bottom / height, panel_width / width, panel_height / height))
        if self.bar is not None:
            left = margins.left + grid_width + _BAR[0]
            self.bar.set_position((left / width, floor / height, _BAR[1] / width, grid_height / height))
        if handles:
            self.figure.legend(
                handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.02 / height), ncols=legend_columns,
                frameon=False, borderaxespad=0.0,
            )  # fmt: skip
        top = height - 0.08
        for line, style in head:
            self.figure.text(0.12 / width, top / height, line, ha="left", va="top", **style)
            top -= _LINE * style["fontsize"] / INCH

    def _head(self, title: str | None, width: float) -> list[tuple[str, dict[str, Any]]]:
        lines: list[tuple[str, dict[str, Any]]] = []
        if title:
            style = {"fontsize": _TITLE_FONT, "fontweight": "bold", "color": self.theme.ink, "gid": "title"}
            lines += [(line, style) for line in _wrapped(title, width - 0.3, 1.15 * _TITLE_FONT)]
        for note in self.notes:
            colour = self.theme.alarm if note.alarm else self.theme.muted
            style = {"fontsize": SMALL, "color": colour, "gid": "note"}
            lines += [(line, style) for line in _wrapped(note.text, width - 0.3, SMALL)]
        return lines


def _wrapped(text: str, width: float, size: float) -> list[str]:
    """Lines of a text, none much longer than `width` inches at a font size in points."""
    return textwrap.wrap(text, max(20, int(width * INCH / (CHARACTER * size))), break_on_hyphens=False)


def _legend_columns(handles: Sequence[Any], width: float) -> int:
    """As many columns as fit, each as wide as its longest entry."""
    entries = [(len(str(handle.get_label())) * CHARACTER + 5.2) * _LEGEND_FONT / INCH for handle in handles]
    for columns in range(min(len(entries), 5), 1, -1):
        rows = math.ceil(len(entries) / columns)
        # As Matplotlib deals them out: the first columns have one more if they are not equally long.
        longer = len(entries) - (rows - 1) * columns
        lengths = [rows] * longer + [rows - 1] * (columns - longer)
        starts = [sum(lengths[:index]) for index in range(columns)]
        if sum(max(entries[s : s + n], default=0.0) for s, n in zip(starts, lengths, strict=True)) <= width:
            return columns
    return 1
