"""Scores of models against their metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ib_callback.plot.sheet import Note, Sheet
from ib_callback.plot.theme import MARKERS, SMALL, ThemeName, drawing, place_labels, shortened_alike, theme_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST_NAME = 18
_NAMED = 20
_SIDE = 2.9


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The panel of one metric.

    Attributes:
        metric: name of the metric, on the axis.
        values: one value for each model, NaN if undefined.
        text: text above the panel, such as the correlation.
    """

    metric: str
    values: Sequence[float]
    text: str


def scatter(
    panels: Sequence[Panel],
    scores: Sequence[float],
    *,
    score: str,
    names: Sequence[str],
    families: Sequence[str],
    notes: Sequence[str] = (),
    theme: ThemeName = "light",
    title: str | None = None,
) -> Figure:
    """Draw a panel for each metric, a point for each model, a colour and a marker for each family.

    Args:
        panels: the metrics.
        scores: scores of the models, [n].
        score: name of the score, on the axis.
        names: names of the models. Up to 20 are written beside their points, if there is room.
        families: families of the models.
        notes: lines above the panels.
        theme: "light" or "dark".
        title: title of the whole figure.

    Returns:
        A new figure, 150 dots per inch.

    Raises:
        ValueError: there are no panels, or the theme is unknown.
        ImportError: Matplotlib is not installed.
    """
    if not panels:
        raise ValueError("expected at least one metric to draw, got none")
    look = theme_of(theme)
    kinds = list(dict.fromkeys(families))
    short = shortened_alike(list(names), _LONGEST_NAME)
    with drawing(look, "Drawing scores against metrics"):
        columns = min(3, len(panels))
        sheet = Sheet(len(panels), columns, size=(_SIDE, _SIDE), theme=look, across=0.62, down=0.8)
        sheet.notes += [Note(text) for text in notes]
        for index, (panel, axes) in enumerate(zip(panels, sheet.panels, strict=True)):
            values = np.asarray(panel.values, dtype=float)
            for number, family in enumerate(kinds):
                mine = [each == family for each in families] & np.isfinite(values)
                style: dict[str, Any] = {
                    "color": look.series[number % len(look.series)], "marker": MARKERS[number % len(MARKERS)], "ls": "",
                    "markersize": 5.5,
                }  # fmt: skip
                axes.plot(values[mine], np.asarray(scores, dtype=float)[mine], zorder=3, label=family, **style)
                sheet.key(f"family {family}", family, **style)
            axes.set_title(panel.text, fontsize=SMALL, loc="left")
            axes.set_xlabel(panel.metric)
            if index % columns == 0:
                axes.set_ylabel(score)
            axes.grid(color=look.faint)
            axes.set_axisbelow(True)
            axes.margins(0.12)
            axes.locator_params(axis="x", nbins=5)
            if len(names) <= _NAMED:
                there = np.flatnonzero(np.isfinite(values)).tolist()
                labels = [(values[i], scores[i], short[i], look.muted) for i in there]
                points = np.stack([values, np.asarray(scores, dtype=float)], axis=1)
                place_labels(axes, labels, points, inches=_SIDE, theme=look)
        sheet.finish(title)
    return sheet.figure
