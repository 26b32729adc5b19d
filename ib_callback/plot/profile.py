"""Entropy, complexity, expressivity and optimality by layer, several models in one figure."""

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
# Strokes of the chance bands: each model has its own direction, so that bands that overlap can be told apart.
_STROKES = ("////", "\\\\\\\\", "----", "||||")
# Rows of panels: the number and the label of its axis.
_ROWS = (
    ("complexity", "complexity I(X;Z)\n(fraction of log num_bins)"),
    ("expressivity", "expressivity I(Y;Z)\n(fraction of log num_bins)"),
    ("ratio", "optimality\n(expressivity / complexity)"),
)


def layer_profile(
    models: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    notes: Sequence[str] = (),
    theme: ThemeName = "light",
    title: str | None = None,
) -> Figure:
    """Draw the layers of several models: a column of panels for each order, and the entropy below.

    Each layer has two bands. The hatched chance band ends at the null: the information that labels give when they are
    permuted over positions. The plain document band lies above it and ends at the document baseline: the information
    of labels from far away in the same document. Only what exceeds both bands is about the local context. Optimality
    is 1 on the bound; its dotted line is the ratio of both nulls.

    Args:
        models: rows by name of the model, one for each layer of each order, from
            `ib_callback.analysis.profile.rows_of_profiles`.
        notes: lines above the panels.
        theme: "light" or "dark".
        title: title of the whole figure.

    Returns:
        A new figure, 150 dots per inch. Information is in fractions of log(num_bins).

    Raises:
        ValueError: there is no layer, or the theme is unknown.
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
                    _draw(sheet, sheet.panels[line * len(orders) + column], of_order, quantity, style, index)
                if column == 0:
                    _draw(sheet, sheet.panels[-1], of_order, "entropy", style, index)
        _label(sheet, orders)
        sheet.finish(title)
    return sheet.figure


def _draw(
    sheet: Sheet, panel: Axes, rows: Sequence[Mapping[str, Any]], quantity: str, style: dict[str, Any], index: int
) -> None:
    from matplotlib.patches import Patch

    def column(name: str) -> np.ndarray:
        return np.array([row.get(name) for row in rows], dtype=float)

    at, values, null = column("number"), column(quantity), column(f"{quantity}_null")
    # With many layers only some are marked, because the markers would merge.
    panel.plot(at, values, zorder=4, label=quantity, markevery=max(1, len(at) // 12), **style)
    if np.isfinite(null).any():
        panel.plot(at, null, zorder=3, label="null", color=style["color"], lw=1.0, ls=LINES[2])
        sheet.key("null", "null: what chance alone gives", color=sheet.theme.ink, lw=1.0, ls=LINES[2])
    if quantity != "ratio" and np.isfinite(null).any():
        muted = sheet.theme.muted
        band: dict[str, Any] = {"lw": 0, "color": style["color"]}
        hatched: dict[str, Any] = {"facecolor": "none", "edgecolor": style["color"], "lw": 0}
        hatched["hatch"] = _STROKES[index % len(_STROKES)]
        panel.fill_between(at, 0, null, zorder=1, label="chance", alpha=0.45, **hatched)
        hatched |= {"edgecolor": muted, "hatch": _STROKES[0]}
        sheet.handles["chance"] = Patch(label="chance band: up to the null", **hatched)
        upper = null + column(f"{quantity}_document")
        if np.isfinite(upper).any():
            panel.fill_between(at, null, upper, zorder=1, label="document", alpha=0.3, **band)
            text = "document band: null to document baseline"
            sheet.handles["document"] = Patch(label=text, lw=0, color=muted, alpha=0.4)


def _label(sheet: Sheet, orders: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for line, (quantity, label) in enumerate(_ROWS):
        panels = sheet.panels[line * len(orders) : (line + 1) * len(orders)]
        # All orders have one scale, so that they can be compared.
        limits = np.array([panel.get_ylim() for panel in panels])
        low = 0.0 if quantity != "ratio" or limits[:, 0].min() > 0 else limits[:, 0].min()
        for panel, order in zip(panels, orders, strict=True):
            panel.set_ylim(low, max(limits[:, 1].max(), 1.03 if quantity == "ratio" else 0.0))
            if line == 0:
                panel.set_title(order)
            if quantity == "ratio":
                panel.axhline(1.0, color=sheet.theme.ink, lw=0.9, ls=(0, (5, 3)), zorder=1.5, label="bound")
                sheet.key("bound", "the bound", color=sheet.theme.ink, lw=0.9, ls=(0, (5, 3)))
        panels[0].set_ylabel(label)
    sheet.panels[-1].set_ylabel("entropy H(Z)\n(fraction of log num_bins)")
    for index, panel in enumerate(sheet.panels):
        panel.grid(color=sheet.theme.faint)
        panel.set_axisbelow(True)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        last = index == len(sheet.panels) - 1 or (len(orders) > 1 and 2 * len(orders) < index < 3 * len(orders))
        if last:
            panel.set_xlabel("layer")
