"""Several runs or models in one information plane."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ib_callback.bound.curve import IBCurve
from ib_callback.plot import data
from ib_callback.plot.bound import curve_in_plane, why_not_drawn
from ib_callback.plot.data import RASTERISED_ABOVE
from ib_callback.plot.frame import draw_bounds, plane_sheet, square_limits
from ib_callback.plot.sheet import Note
from ib_callback.plot.theme import LINES, MARKERS, Theme, ThemeName, drawing, place_labels, shortened_alike, theme_of
from ib_callback.results.measurement import Measurement, warn_of_other_tokenizers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST_LABEL = 22
_LONGEST_NAME = 48
# Of more runs, names at the points would hide what they name.
_LABELLED = 12
_MARKED = 40


def compare(
    runs: Mapping[str, Measurement | Iterable[Measurement]],
    *,
    orders: Sequence[str] | None = None,
    curve: IBCurve | None = None,
    theme: ThemeName = "light",
    title: str | None = None,
) -> Figure:
    """Draw several runs, or single measurements of several models, in one information plane.

    Each run has a colour, a marker and a kind of line of its own; a hollow marker is its first point, a large one its
    last, with its name, and a cross the null of the last. Runs measured with other settings are drawn all the same,
    with a warning, and a note in the picture.

    Args:
        runs: a trajectory or a measurement by name.
        orders: which n-gram orders to show, one panel each, by default the primary one of the first run alone.
        curve: the IB curve of the probe of the first run; drawn in the panel of its order.
        theme: "light" or "dark".
        title: of the whole figure.

    Returns:
        A figure of its own, 150 dots per inch; both axes are fractions of log(num_bins).

    Raises:
        ValueError: a run without a measured point, an order that none of them has, or an unknown theme.
        TypeError: no mapping of names to measurements.
        ImportError: Matplotlib is not installed.
    """
    if not isinstance(runs, Mapping):
        raise TypeError(f'expected runs by name, {{"name": trajectory, …}}, got {type(runs).__name__}')
    if not runs:
        raise ValueError("expected at least one run to draw, got none")
    courses = {}
    for name, measurements in runs.items():
        try:
            courses[str(name)] = data.given(measurements)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    first = next(iter(courses.values()))
    everything = [point for points in courses.values() for point in points]
    shown = data.orders_of(everything, [data.primary_of(first)] if orders is None else orders)
    look = theme_of(theme)
    warn_of_other_tokenizers(everything)
    notes = data.comparison_notes(courses)
    for note in notes:
        if note.alarm:
            warnings.warn(f"{note.text}. They are drawn in one plane all the same", RuntimeWarning, stacklevel=2)
    with drawing(look, "Drawing several runs in one plane"):
        sheet = plane_sheet(shown, look)
        handles: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        measured = next(point for point in reversed(first) if point.orders)
        for panel, order in zip(sheet.panels, shown, strict=True):
            _draw(panel, courses, order, curve_in_plane(curve, order, measured), look, handles, rest, sheet.size[0])
        for name, points in courses.items():
            notes += [Note(f"{name}: {note.text}", note.alarm) for note in data.changed_settings_note(points)]
            notes += [Note(f"{name}: {note.text}") for note in data.missing_note(points)]
        if reason := why_not_drawn(curve, measured):
            notes.append(Note(reason))
        sheet.finish(handles=[*handles.values(), *rest.values()], title=title, notes=notes)
    return sheet.figure


def _draw(
    panel: Axes,
    courses: Mapping[str, Sequence[Measurement]],
    order: str,
    curve: np.ndarray | None,
    theme: Theme,
    handles: dict[str, Any],
    rest: dict[str, Any],
    size: float,
) -> None:
    from matplotlib.lines import Line2D

    tables = {name: data.plane(points, order) for name, points in courses.items()}
    nulls = {name: data.plane(points, order, "_null") for name, points in courses.items()}
    drawn = {name: np.flatnonzero(np.isfinite(table).all(axis=1)) for name, table in tables.items()}
    last_nulls = {name: nulls[name][drawn[name][-1:]] for name in tables}
    square_limits(panel, *data.finite_range(*tables.values(), *last_nulls.values()))
    labels = []
    names = dict(zip(tables, shortened_alike(list(tables), _LONGEST_NAME), strict=True))
    short = dict(zip(tables, shortened_alike(list(tables), _LONGEST_LABEL), strict=True))
    for index, (name, table) in enumerate(tables.items()):
        points = table[drawn[name]]
        colour, marker = theme.series[index % len(theme.series)], MARKERS[index % len(MARKERS)]
        # Not in step with the colours, so that the eighth run is not like the first.
        line = LINES[(index + index // len(theme.series)) % len(LINES)]
        style: dict[str, Any] = {"color": colour, "ls": line, "lw": 1.3, "marker": marker}
        if len(courses[name]) == 1:
            style["ls"] = ""
        handles[name] = Line2D([], [], label=names[name], markersize=6, **style)
        if not len(points):
            continue
        every = max(1, len(points) // _MARKED)
        panel.plot(
            *points.T, zorder=3, label=name, markersize=3.5, markevery=every, rasterized=len(points) > RASTERISED_ABOVE,
            **style,
        )  # fmt: skip
        ends: dict[str, Any] = {"color": colour, "ls": "", "marker": marker, "markersize": 7.5}
        if len(points) > 1:
            panel.plot(*points[:1].T, zorder=5, label="first", markerfacecolor=theme.paper, markeredgewidth=1.2, **ends)
            rest["first"] = Line2D(
                [], [], ls="", marker="o", color=theme.ink, markerfacecolor=theme.paper, markersize=6.5,
                label="first point (of any run)",
            )  # fmt: skip
        panel.plot(*points[-1:].T, zorder=6, label="last", markeredgecolor=theme.paper, markeredgewidth=0.8, **ends)
        if np.isfinite(last_nulls[name]).all():
            panel.plot(*last_nulls[name].T, zorder=4, label="null", **{**ends, "marker": "x", "markersize": 5})
            rest["null"] = Line2D(
                [], [], ls="", marker="x", color=theme.ink, markersize=5.5, label="null of the last point"
            )
        labels.append((*points[-1], short[name], colour if theme.name == "dark" else theme.ink))
    absent = [name for name in tables if not len(drawn[name])]
    if absent:
        panel.set_title(f"{len(absent)} without {order}", loc="right", fontsize=7, color=theme.muted)
    draw_bounds(panel, curve, theme, rest)
    if 1 < len(tables) <= _LABELLED:
        place_labels(panel, labels, _obstacles(tables.values()), inches=size, theme=theme)


def _obstacles(tables: Iterable[np.ndarray]) -> np.ndarray:
    points = np.concatenate(list(tables))
    points = points[np.isfinite(points).all(axis=1)]
    return points[:: max(1, len(points) // 400)]
