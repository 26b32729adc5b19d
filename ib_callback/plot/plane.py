"""The information planes of a run: expressivity against complexity, one panel for each plane and n-gram order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ib_callback.bound.curve import IBCurve
from ib_callback.plot import data
from ib_callback.plot.bound import curve_in_plane, why_not_drawn
from ib_callback.plot.data import FEW_POINTS, RASTERISED_ABOVE
from ib_callback.plot.frame import (
    StepColours,
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
from ib_callback.plot.sheet import Sheet
from ib_callback.plot.theme import ThemeName, drawing, place_labels, theme_of
from ib_callback.results.measurement import Measurement, warn_of_other_tokenizers
from ib_callback.results.phases import Phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Shapes, so that phases can be told apart without colour.
PHASE_MARKERS = {Phase.INITIAL: "s", Phase.FITTING: "o", Phase.COMPRESSION: "^", Phase.MEMORISING: "v"}
# A long run shows this many of each, evenly spread over the points.
_CEILINGS_SHOWN = 40
_NULLS_SHOWN = 40
_ERRORS_SHOWN = 200


def information_plane(
    measurements: Measurement | Iterable[Measurement],
    *,
    orders: Sequence[str] | None = None,
    planes: Sequence[str] | None = None,
    curve: IBCurve | None = None,
    theme: ThemeName = "light",
    title: str | None = None,
    baseline: bool = True,
    x: str = "step",
) -> Figure:
    """Draw expressivity against complexity, one panel for each plane and n-gram order.

    There are four planes. "plain" has the numbers of all measured layers, and "local" has the same numbers above the
    document baseline. "readout" and "prediction" are about the model's output. They show local numbers, because the
    score of these follows the loss and because plain numbers would repeat what documents and chance give. Without a
    document baseline they show plain numbers. All orders of a plane have the same scale.

    The colour of a point is its training step, its shape is its phase, and a line with arrowheads joins the points in
    the order of training. Points that could not be measured are left out and counted. A cross is the null of a point:
    what finite sampling alone gives. If there are few points, a line joins each to its null. In planes of local numbers
    chance is the origin, and shaded bands show what lies within three standard errors of an axis, if errors are known.
    A diamond surrounds the point of step 0. The dashed diagonal is the bound, expressivity = complexity. The plain
    plane also shows the IB curve, if one is given, the ceiling of the last point as a dotted line, and the ceilings of
    all points as ticks at the upper edge.

    Args:
        measurements: a trajectory, any other measurements in the order of training, or a single measurement.
        orders: the n-gram orders to show. By default the primary one; if there is only one plane, all that were
            measured, the primary one first.
        planes: the planes to show, by default all that the points have.
        curve: the IB curve of the probe. The plain panel of its order, by default the primary one, shows it.
        theme: "light" or "dark".
        title: title of the whole figure.
        baseline: whether to draw chance and ceilings, if they were measured.
        x: what colours show: "step", or "tokens" for the training tokens seen so far.

    Returns:
        A new figure, 150 dots per inch. Both axes are fractions of log(num_bins).

    Raises:
        ValueError: there is no point to draw, an order or a plane was not measured, the theme is unknown, or `x` is
            "tokens" and the tokens of a point are not known.
        ImportError: Matplotlib is not installed.
    """
    points, left_out = data.placed(data.given(measurements))
    shown = data.orders_of(points, orders)
    chosen = planes_of(points, shown, planes)
    if orders is None and len(chosen) > 1:
        shown = [data.primary_of(points)]
        chosen = planes_of(points, shown, planes)
    look = theme_of(theme)
    warn_of_other_tokenizers(points)
    with drawing(look, "Drawing the information plane"):
        sheet = plane_sheet(shown, look, chosen, data.unit(points))
        drawn = [point for point in points if point.orders]
        colours = StepColours(*data.numbered(drawn, x), look)
        phases = data.phases_of(measurements, points)
        known = None if phases is None else [p for p, m in zip(phases.phases, points, strict=True) if m.orders]
        texts = {"measured": "measured"}
        if phases is not None:
            texts = {phase.name.lower(): text for phase, text in data.phase_labels(phases).items()}
        elif drawn[0].step is not None and len(drawn) == 1:
            texts["measured"] += f" at step {drawn[0].step:,}"
        pictures = [
            _Panel(sheet, panel, order, plane, drawn, colours, known, texts)
            for panel, (order, plane) in zip(sheet.panels, itertools.product(shown, chosen), strict=True)
        ]
        for plane in chosen:
            # All orders have one scale, so that they can be compared at a glance.
            mine = [picture for picture in pictures if picture.plane is plane]
            limits = data.finite_range(*(picture.extent(baseline=baseline) for picture in mine))
            for picture in mine:
                square_limits(picture.panel, *limits)
                of_plane = curve_in_plane(curve, picture.order, drawn[-1]) if plane is PLAIN else None
                picture.draw(of_plane, baseline=baseline)
        colours.draw_bar(sheet)
        sheet.notes += [*data.notes_of_run(points), *left_out, *why_not_drawn(curve, drawn[-1])]
        sheet.finish(title)
    return sheet.figure


class _Panel:
    """The panel of one order in one plane."""

    def __init__(
        self, sheet: Sheet, panel: Axes, order: str, plane: Plane, points: Sequence[Measurement], colours: StepColours,
        phases: Sequence[Phase | None] | None, texts: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.sheet, self.panel, self.order, self.ink, self.texts = sheet, panel, order, sheet.theme.ink, texts
        self.plane = plane
        table = plane.values(points, order)
        self.keep = np.isfinite(table).all(axis=1)
        self.absent = int(len(points) - self.keep.sum())
        self.points, self.rgba = table[self.keep], colours.rgba[self.keep]
        self.nulls = plane.values(points, order, "_null")[self.keep]
        self.errors = plane.values(points, order, "_se")[self.keep]
        self.untrained = table[self.keep & [point.step == 0 for point in points]]
        self.start = data.start_label(points)
        # Only plain numbers have a ceiling.
        ceilings = [point.ceiling if plane is PLAIN else None for point in points]
        self.ceilings = np.array(ceilings, dtype=float)[self.keep]
        self.phases = None if phases is None else np.array(phases)[self.keep]
        few, many = len(self.points) <= FEW_POINTS, len(self.points) > 200
        self.few, self.area = few, 36.0 if few else 7.0 if many else 18.0
        self.rasterised = len(self.points) > RASTERISED_ABOVE

    def extent(self, *, baseline: bool) -> np.ndarray:
        """All values that the limits must include."""
        chance = np.zeros(1) if self.plane.is_local else np.concatenate([self.nulls.ravel(), self.ceilings])
        return np.concatenate([self.points.ravel(), *([chance] if baseline else [])])

    def draw(self, curve: np.ndarray | None, *, baseline: bool) -> None:
        # In the order of the legend; zorder decides what covers what.
        self._points()
        if baseline and self.plane.is_local:
            draw_chance(self.sheet, self.panel, self.errors)
        elif baseline:
            self._nulls()
        self._errors()
        draw_bounds(self.sheet, self.panel, curve)
        draw_arrows(self.panel, self.points, self.sheet.theme.muted)
        if baseline:
            self._ceilings()
        self._names()
        note_absent(self.sheet, self.panel, self.absent, self.order)

    def _ceilings(self) -> None:
        there = np.flatnonzero(np.isfinite(self.ceilings))
        if not len(there):
            return
        style: dict[str, Any] = {"color": self.ink, "lw": 1.2, "ls": (0, (1, 1.6))}
        self.panel.axvline(self.ceilings[there[-1]], zorder=1.4, label="ceiling", **style)
        ticks = "; ticks above: each point" if len(self.ceilings) > 1 else ""
        self.sheet.key("ceiling", f"ceiling (last point{ticks})", **style)
        shown = there[data.thinned(len(there), _CEILINGS_SHOWN)]
        if len(shown) > 1:
            self.panel.vlines(
                self.ceilings[shown], 0.965, 1.0, colors=self.rgba[shown], lw=1.2, zorder=1.4, label="ceilings",
                transform=self.panel.get_xaxis_transform(),
            )  # fmt: skip

    def _nulls(self) -> None:
        from matplotlib.collections import LineCollection

        if not np.isfinite(self.nulls).all(axis=1).any():
            return
        if self.few:
            pairs = list(np.stack([self.nulls, self.points], axis=1))
            joins = LineCollection(pairs, colors=self.rgba, linewidths=0.6, alpha=0.45, zorder=2.5, label="joins")
            self.panel.add_collection(joins, autolim=False)
        # Many nulls along the diagonal would merge into a band that looks like measured points.
        shown = data.thinned(len(self.points), _NULLS_SHOWN)
        x, y = self.nulls[shown].T
        self.panel.scatter(
            x, y, s=0.8 * max(self.area, 12.0), c=self.rgba[shown], marker="x", zorder=4, label="null",
            linewidths=1.1 if self.few else 0.6,
        )  # fmt: skip
        self.sheet.key("null", "null: what chance alone gives", ls="", marker="x", color=self.ink, markersize=5.5)

    def _errors(self) -> None:
        if len(self.points) > _ERRORS_SHOWN or not np.isfinite(self.errors).any():
            return
        (x, y), (dx, dy) = self.points.T, np.nan_to_num(self.errors).T
        style: dict[str, Any] = {"colors": self.rgba, "linewidths": 1.0, "zorder": 4.5}
        self.panel.hlines(y, x - dx, x + dx, label="standard error", **style)
        self.panel.vlines(x, y - dy, y + dy, label="standard error", **style)
        self.sheet.key("standard error", "± 1 standard error", ls="", marker="+", color=self.ink, markersize=8)

    def _points(self) -> None:
        self.panel.plot(*self.points.T, color=self.sheet.theme.muted, lw=0.8, alpha=0.6, zorder=3, label="course")
        dot: dict[str, Any] = {"ls": "", "color": self.ink, "markersize": 5.5}
        groups = {"measured": np.ones(len(self.points), dtype=bool)}
        if self.phases is not None:
            groups = {phase.name.lower(): self.phases == phase for phase in PHASE_MARKERS}
        for name, chosen in groups.items():
            if not chosen.any():
                continue
            marker = "o" if name == "measured" else PHASE_MARKERS[Phase[name.upper()]]
            x, y = self.points[chosen].T
            self.panel.scatter(
                x, y, s=self.area, c=self.rgba[chosen], marker=marker, linewidths=0, zorder=5,
                label=name, rasterized=self.rasterised,
            )  # fmt: skip
            self.sheet.key(name, self.texts[name], marker=marker, **dot)
        if len(self.points) > 1:
            style = {**dot, "marker": "o", "markerfacecolor": "none", "markeredgewidth": 1.3, "markersize": 9}
            self.sheet.plot(self.panel, self.points[-1:].T, "last", "last point", zorder=6, **style)
            for point in self.untrained:
                mark_untrained(self.sheet, self.panel, point, self.ink, self.start)

    def _names(self) -> None:
        """Name step 0 and the first point of each phase but the initial one, where the panel has it."""
        name = f"step 0 ({self.start})" if self.start else "step 0"
        labels = [(*point, name, self.ink) for point in self.untrained if len(self.points) > 1]
        for phase in (Phase.FITTING, Phase.COMPRESSION, Phase.MEMORISING) if self.phases is not None else ():
            begun = np.flatnonzero(self.phases == phase)
            # A phase that does not follow another one began before the run did.
            if len(begun) and begun[0] > 0:
                x, y = self.points[begun[0]]
                labels.append((x, y, phase.name.lower(), self.ink))
        chance = np.zeros((int(self.plane.is_local), 2))
        drawn = np.concatenate([self.points, *([self.nulls] if not self.plane.is_local else [])])
        words = [name_bound(self.panel, self.sheet.theme), mark_better(self.panel, self.sheet.theme, drawn)]
        dots = np.concatenate([self.points, chance, *words])
        place_labels(self.panel, labels, dots, inches=self.sheet.size[0], theme=self.sheet.theme)
