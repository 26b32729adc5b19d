"""Entropy, input and output information and their ratio against layers, several models in one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ib_callback.plot.sheet import Note, Sheet
from ib_callback.plot.theme import LINES, MARKERS, ThemeName, drawing, shortened_alike, theme_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST_NAME = 48
# Rows of panels: the number, its label, and of which chance and document are drawn.
_ROWS = (
    ("complexity", "input information I(X;Z)\n(fraction of log num_bins)"),
    ("expressivity", "output information I(Y;Z)\n(fraction of log num_bins)"),
    ("ratio", "ratio\n(output / input)"),
)


def layer_profile(
    models: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    notes: Sequence[str] = (),
    theme: ThemeName = "light",
    title: str | None = None,
) -> Figure:
    """Draw the layers of several models: a column of panels for each order, and the entropy below.

    The hatched band is chance, from nothing to the null of each layer; the plain band above it is what the document
    adds, from null to document baseline. The ratio has a dotted line for that of the nulls, and is 1 on the bound.

    Args:
        models: by name, a row for each layer of each order, as `ib_callback.analysis.profile.rows_of_profiles` has.
        notes: what to say above the panels.
        theme: "light" or "dark".
        title: of the whole figure.

    Returns:
        A figure of its own, 150 dots per inch.

    Raises:
        ValueError: no layers, or an unknown theme.
        ImportError: Matplotlib is not installed.
    """
    orders = list(dict.fromkeys(row["order"] for rows in models.values() for row in rows))
    if not orders:
        raise ValueError("expected at least one layer to draw, got none")
    look = theme_of(theme)
    with drawing(look, "Drawing the layers of models"):
        sheet = Sheet(len(_ROWS) * len(orders) + 1, len(orders), size=(2.6, 1.9), theme=look, across=0.62, down=0.5)
        sheet.notes += [Note(text) for text in notes]
        names = shortened_alike(list(models), _LONGEST_NAME)
        for index, (rows, name) in enumerate(zip(models.values(), names, strict=True)):
            style: dict[str, Any] = {
                "color": look.series[index % len(look.series)], "ls": LINES[index % len(LINES)],
                "marker": MARKERS[index % len(MARKERS)], "markersize": 3, "lw": 1.3,
            }  # fmt: skip
            sheet.key(f"model {index}", name, **style)
            for column, order in enumerate(orders):
                of_order = [row for row in rows if row["order"] == order]
                for line, (quantity, _) in enumerate(_ROWS):
                    _draw(sheet, sheet.panels[line * len(orders) + column], of_order, quantity, style)
                if column == 0:
                    _draw(sheet, sheet.panels[-1], of_order, "entropy", style)
        _label(sheet, orders)
        sheet.finish(title)
    return sheet.figure


def _draw(sheet: Sheet, panel: Axes, rows: Sequence[Mapping[str, Any]], quantity: str, style: dict[str, Any]) -> None:
    from matplotlib.patches import Patch

    def column(name: str) -> np.ndarray:
        return np.array([row.get(name) for row in rows], dtype=float)

    at, values, null = column("number"), column(quantity), column(f"{quantity}_null")
    # Every layer marked only where they are few enough to be told apart.
    panel.plot(at, values, zorder=4, label=quantity, markevery=max(1, len(at) // 12), **style)
    if np.isfinite(null).any():
        panel.plot(at, null, zorder=3, label="null", color=style["color"], lw=1.0, ls=LINES[2])
        sheet.key("null", "chance alone", color=sheet.theme.ink, lw=1.0, ls=LINES[2])
    if quantity != "ratio" and np.isfinite(null).any():
        muted = sheet.theme.muted
        band: dict[str, Any] = {"lw": 0, "color": style["color"]}
        hatched: dict[str, Any] = {"facecolor": "none", "edgecolor": style["color"], "hatch": "////", "lw": 0}
        panel.fill_between(at, 0, null, zorder=1, label="chance", alpha=0.45, **hatched)
        hatched["edgecolor"] = muted
        sheet.handles["chance"] = Patch(label="chance: labels permuted over positions", **hatched)
        upper = null + column(f"{quantity}_document")
        if np.isfinite(upper).any():
            panel.fill_between(at, null, upper, zorder=1, label="document", alpha=0.3, **band)
            sheet.handles["document"] = Patch(label="what the document adds", lw=0, color=muted, alpha=0.4)


def _label(sheet: Sheet, orders: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for line, (quantity, label) in enumerate(_ROWS):
        panels = sheet.panels[line * len(orders) : (line + 1) * len(orders)]
        # One scale for all orders, so that they can be compared.
        limits = np.array([panel.get_ylim() for panel in panels])
        low = 0.0 if quantity != "ratio" or limits[:, 0].min() > 0 else limits[:, 0].min()
        for panel, order in zip(panels, orders, strict=True):
            panel.set_ylim(low, max(limits[:, 1].max(), 1.03 if quantity == "ratio" else 0.0))
            if line == 0:
                panel.set_title(order)
            if quantity == "ratio":
                panel.axhline(1.0, color=sheet.theme.ink, lw=0.9, ls=(0, (5, 3)), zorder=1.5, label="bound")
                sheet.key("bound", "on the bound", color=sheet.theme.ink, lw=0.9, ls=(0, (5, 3)))
        panels[0].set_ylabel(label)
    sheet.panels[-1].set_ylabel("entropy H(Z)\n(fraction of log num_bins)")
    for index, panel in enumerate(sheet.panels):
        panel.grid(color=sheet.theme.faint)
        panel.set_axisbelow(True)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        last = index == len(sheet.panels) - 1 or (len(orders) > 1 and 2 * len(orders) < index < 3 * len(orders))
        if last:
            panel.set_xlabel("layer")
