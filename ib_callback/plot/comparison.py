"""Several runs or models in one information plane."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ib_callback.bound.curve import IBCurve
from ib_callback.plot import data
from ib_callback.plot.bound import curve_in_plane, why_not_drawn
from ib_callback.plot.data import RASTERISED_ABOVE
from ib_callback.plot.frame import (
    draw_arrows,
    draw_bounds,
    draw_chance,
    mark_better,
    mark_untrained,
    name_bound,
    note_absent,
    plane_sheet,
    square_limits,
)
from ib_callback.plot.planes import PLAIN, Plane, planes_of
from ib_callback.plot.sheet import Note, Sheet
from ib_callback.plot.theme import LINES, MARKERS, ThemeName, drawing, place_labels, shortened_alike, theme_of
from ib_callback.results.measurement import Measurement, warn_of_other_tokenizers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST_LABEL = 22
_LONGEST_NAME = 48
# With more runs, names beside points would hide the points.
_LABELLED = 12
_MARKED = 40
# Beginnings of phases: marker, its size, and what the legend says.
_BEGINNINGS = {"fitting": ("P", 9, "fitting begins"), "turn": ("*", 13, "turn to compression")}


def compare(
    runs: Mapping[str, Measurement | Iterable[Measurement]],
    *,
    orders: Sequence[str] | Literal["all"] | None = None,
    planes: Sequence[str] | None = None,
    curve: IBCurve | None = None,
    marks: Mapping[str, int] | None = None,
    theme: ThemeName = "light",
    title: str | None = None,
) -> Figure:
    """Draw several runs, or single measurements of several models, in one information plane of each kind.

    The planes are those of `information_plane`. Each run has its own colour, marker and kind of line. A hollow marker
    is its first point, with a diamond around it if that is step 0. A large marker with its name is the last point, and
    a cross is the null of the last point. A plus marks where fitting begins, and a star where compression begins. A
    note gives both steps. Arrowheads show the direction of training. In planes of local numbers, chance is the origin,
    and shaded bands show what lies within three standard errors of an axis, if errors are known. Runs with different
    settings are still drawn, with a warning and a note in the picture.

    Args:
        runs: a trajectory or a measurement by name.
        orders: the n-gram orders to show; "all": every order that was measured. By default the primary one of the
            first run, or all if there is only one plane.
        planes: the planes to show, by default all that the runs have.
        curve: the IB curve of the probe of the first run. The plain panel of its order shows it.
        marks: the step of the turn to compression by name of the run. By default the phases of each run decide.
        theme: "light" or "dark".
        title: title of the whole figure.

    Returns:
        A new figure, 150 dots per inch. Both axes are fractions of log(num_bins).

    Raises:
        ValueError: a run has no measured point, no run has a requested order or plane, or the theme is unknown.
        TypeError: `runs` is not a mapping of names to measurements.
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
    every = orders == "all" or orders is None
    shown = data.orders_of(everything, None if every else orders)
    chosen = planes_of(everything, shown, planes)
    if orders is None and (len(chosen) > 1 or planes is not None):
        shown = [data.primary_of(first)]
        chosen = planes_of(everything, shown, planes)
    look = theme_of(theme)
    warn_of_other_tokenizers(everything)
    notes = data.comparison_notes(courses)
    for note in notes:
        if note.alarm:
            warnings.warn(f"{note.text}. They are still drawn in one plane", RuntimeWarning, stacklevel=2)
    with drawing(look, "Drawing several runs in one plane"):
        sheet = plane_sheet(shown, look, chosen, data.unit(everything))
        sheet.notes += notes
        begun = {}
        for name, measurements in runs.items():
            phases = data.phases_of(measurements, courses[str(name)]) if marks is None else None
            steps = {} if phases is None else {"fitting": phases.fit_start, "turn": phases.compression_start}
            begun[str(name)] = {key: step for key, step in steps.items() if step is not None}
            if phases is not None and begun[str(name)]:
                sheet.notes.append(Note(f"{name}: {data.phases_sentence(phases)}"))
        if marks is not None:
            begun = {name: {"turn": marks[name]} if name in marks else {} for name in courses}
        styles = _styles(sheet, courses)
        measured = next(point for point in reversed(first) if point.orders)
        for panel, (order, plane) in zip(sheet.panels, itertools.product(shown, chosen), strict=True):
            of_plane = curve_in_plane(curve, order, measured) if plane is PLAIN else None
            _draw(sheet, panel, courses, order, plane, styles, of_plane, begun)
        for name, points in courses.items():
            sheet.notes += [Note(f"{name}: {note.text}", note.alarm) for note in data.notes_of_run(points)]
        sheet.notes += why_not_drawn(curve, measured)
        sheet.finish(title)
    return sheet.figure


def _styles(sheet: Sheet, courses: Mapping[str, Sequence[Measurement]]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each run; the legend explains them."""
    styles = {}
    names = shortened_alike(list(courses), _LONGEST_NAME)
    for index, (name, short) in enumerate(zip(courses, names, strict=True)):
        colours = sheet.theme.series
        # Lines and colours change at different times, so that the eighth run does not look like the first.
        line = LINES[(index + index // len(colours)) % len(LINES)] if len(courses[name]) > 1 else ""
        styles[name] = {"color": colours[index % len(colours)], "marker": MARKERS[index % len(MARKERS)], "ls": line}
        sheet.key(f"run {name}", short, markersize=6, lw=1.3, **styles[name])
    return styles


def _draw(
    sheet: Sheet, panel: Axes, courses: Mapping[str, Sequence[Measurement]], order: str, plane: Plane,
    styles: Mapping[str, dict[str, Any]], curve: np.ndarray | None, begun: Mapping[str, Mapping[str, int]],
) -> None:  # fmt: skip
    theme = sheet.theme
    tables = {name: plane.values(points, order) for name, points in courses.items()}
    drawn = {name: np.flatnonzero(np.isfinite(table).all(axis=1)) for name, table in tables.items()}
    nulls = {name: plane.values(points, order, "_null")[drawn[name][-1:]] for name, points in courses.items()}
    chance = [[0.0]] if plane.is_local else nulls.values()
    square_limits(panel, *data.finite_range(*tables.values(), *chance))
    labels = []
    for name, short in zip(tables, shortened_alike(list(tables), _LONGEST_LABEL), strict=True):
        points, style = tables[name][drawn[name]], styles[name]
        if not len(points):
            continue
        panel.plot(
            *points.T, zorder=3, label=name, lw=1.3, markersize=3.5, markevery=max(1, len(points) // _MARKED),
            rasterized=len(points) > RASTERISED_ABOVE, **style,
        )  # fmt: skip
        ends: dict[str, Any] = {**style, "ls": "", "markersize": 7.5}
        if len(points) > 1:
            hollow: dict[str, Any] = {"markerfacecolor": theme.paper}
            panel.plot(*points[:1].T, zorder=5, label="first", markeredgewidth=1.2, **ends, **hollow)
            sheet.key("first", "first point of a run", ls="", marker="o", color=theme.ink, markersize=6.5, **hollow)
            if courses[name][drawn[name][0]].step == 0:
                mark_untrained(sheet, panel, points[0], style["color"], data.start_label(courses[name]))
        panel.plot(*points[-1:].T, zorder=6, label="last", markeredgecolor=theme.paper, markeredgewidth=0.8, **ends)
        draw_arrows(panel, points, style["color"])
        for what, (marker, size, text) in _BEGINNINGS.items():
            turn = [at for at in drawn[name].tolist() if courses[name][at].step == begun[name].get(what, -1)]
            if turn:
                mark: dict[str, Any] = {"ls": "", "marker": marker, "markersize": size, "markeredgecolor": theme.paper}
                panel.plot(*tables[name][turn].T, zorder=7, label=what, color=style["color"], **mark)
                sheet.key(what, text, color=theme.ink, **mark)
        if np.isfinite(nulls[name]).all():
            panel.plot(*nulls[name].T, zorder=4, label="null", **{**ends, "marker": "x", "markersize": 5})
            sheet.key(
                "null",
                "null of the last point",
                ls="",
                marker="x",
                color=theme.ink,
                markersize=5.5,
            )
        labels.append((*points[-1], short, style["color"] if theme.name == "dark" else theme.ink))
    note_absent(sheet, panel, sum(not len(points) for points in drawn.values()), order)
    if plane.is_local:
        errors = [plane.values(points, order, "_se")[drawn[name]] for name, points in courses.items()]
        draw_chance(sheet, panel, np.concatenate(errors))
    draw_bounds(sheet, panel, curve)
    everything = np.concatenate(list(tables.values()))
    words = [name_bound(panel, theme), mark_better(panel, theme, everything)]
    if 1 < len(tables) <= _LABELLED:
        everything = np.concatenate([everything, *words])
        place_labels(panel, labels, everything, inches=sheet.size[0], theme=theme)
