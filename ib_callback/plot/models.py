"""Many models in one plane: a colour for each family, a marker for each model, and faint lines for their training."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ib_callback.plot import data
from ib_callback.plot.frame import draw_bounds, draw_chance, mark_untrained, note_absent, plane_sheet, square_limits
from ib_callback.plot.planes import Plane, planes_of
from ib_callback.plot.sheet import Note, Sheet
from ib_callback.plot.theme import MARKERS, ThemeName, drawing, place_labels, shortened_alike, theme_of
from ib_callback.results.measurement import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST_LABEL = 26
_LONGEST_NAME = 48
_LABELLED = 24


@dataclass(frozen=True, kw_only=True, eq=False)
class Placed:
    """A model to draw.

    Attributes:
        name: name beside its point.
        family: family, which decides the colour.
        point: the point that is compared.
        course: all points of its training, joined by a faint line.
    """

    name: str
    family: str
    point: Measurement
    course: Sequence[Measurement]


def models_in_plane(
    models: Sequence[Placed],
    *,
    orders: Sequence[str] | None = None,
    planes: Sequence[str] | None = None,
    notes: Sequence[str] = (),
    theme: ThemeName = "light",
    title: str | None = None,
) -> Figure:
    """Draw one point of each of many models in the planes of `information_plane`.

    Args:
        models: models with the point to draw.
        orders: the n-gram orders to show, by default only the primary one of the first model.
        planes: the planes to show, by default all that the models have.
        notes: lines above the panels.
        theme: "light" or "dark".
        title: title of the whole figure.

    Returns:
        A new figure, 150 dots per inch. Both axes are fractions of log(num_bins).

    Raises:
        ValueError: there are no models, no model has a requested order or plane, or the theme is unknown.
        ImportError: Matplotlib is not installed.
    """
    points = data.given([model.point for model in models])
    shown = data.orders_of(points, [data.primary_of(points)] if orders is None else orders)
    chosen = planes_of(points, shown, planes)
    look = theme_of(theme)
    with drawing(look, "Drawing models in one plane"):
        sheet = plane_sheet(shown, look, chosen)
        sheet.notes += [Note(text) for text in notes]
        styles = _styles(sheet, models)
        for panel, (order, plane) in zip(sheet.panels, itertools.product(shown, chosen), strict=True):
            _draw(sheet, panel, models, order, plane, styles)
        sheet.finish(title)
    return sheet.figure


def _styles(sheet: Sheet, models: Sequence[Placed]) -> list[dict[str, Any]]:
    """A colour for each family, and a marker for each model within it."""
    families = list(dict.fromkeys(model.family for model in models))
    names = shortened_alike([model.name for model in models], _LONGEST_NAME)
    styles = []
    seen: dict[str, int] = {}
    for model, name in zip(models, names, strict=True):
        number = seen[model.family] = seen.get(model.family, -1) + 1
        # If there are more families than colours, families of one colour have different markers.
        turn, colour = divmod(families.index(model.family), len(sheet.theme.series))
        styles.append({"color": sheet.theme.series[colour], "marker": MARKERS[(number + turn) % len(MARKERS)]})
        family = f" ({model.family})" if model.family != model.name else ""
        sheet.key(f"model {model.name}", f"{name}{family}", ls="", markersize=6, **styles[-1])
    return styles


def _draw(
    sheet: Sheet, panel: Axes, models: Sequence[Placed], order: str, plane: Plane, styles: Sequence[dict[str, Any]]
) -> None:
    ends = np.concatenate([plane.values([model.point], order) for model in models])
    nulls = np.concatenate([plane.values([model.point], order, "_null") for model in models])
    courses = [plane.values(model.course, order) for model in models]
    chance = [np.zeros((1, 2))] if plane.is_local else [nulls]
    square_limits(panel, *data.finite_range(ends, *courses, *chance))
    labels = []
    names = shortened_alike([model.name for model in models], _LONGEST_LABEL)
    drawn: set[int] = set()
    for model, end, null, course, style, name in zip(models, ends, nulls, courses, styles, names, strict=True):
        there = course[np.isfinite(course).all(axis=1)]
        if len(there) > 1 and id(model.course) not in drawn:
            drawn.add(id(model.course))
            panel.plot(*there.T, color=style["color"], lw=0.9, alpha=0.4, zorder=2, label=f"course of {model.name}")
            sheet.key("course", "all points of the training", color=sheet.theme.muted, lw=0.9, alpha=0.6)
        if not np.isfinite(end).all():
            continue
        panel.plot(
            *end[:, None], ls="", markersize=7.5, markeredgecolor=sheet.theme.paper, markeredgewidth=0.8, zorder=6,
            label=model.name, **style,
        )  # fmt: skip
        if model.point.step == 0:
            mark_untrained(sheet, panel, end, style["color"])
        if not plane.is_local and np.isfinite(null).all():
            panel.plot(*null[:, None], ls="", zorder=4, label="null", color=style["color"], marker="x", markersize=5)
            sheet.key("null", "null: what chance alone gives", ls="", marker="x", color=sheet.theme.ink, markersize=5.5)
        labels.append((*end, name, style["color"] if sheet.theme.name == "dark" else sheet.theme.ink))
    note_absent(sheet, panel, int((~np.isfinite(ends).all(axis=1)).sum()), order)
    if plane.is_local:
        draw_chance(sheet, panel, np.concatenate([plane.values([m.point], order, "_se") for m in models]))
    draw_bounds(sheet, panel, None)
    if 1 < len(models) <= _LABELLED:
        place_labels(panel, labels, np.concatenate([ends, *courses]), inches=sheet.size[0], theme=sheet.theme)
