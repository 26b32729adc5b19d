"""Complexity, expressivity, optimality, distance to the bound, loss and the output's local score along a run."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ib_callback.plot import data
from ib_callback.plot.sheet import Sheet
from ib_callback.plot.theme import LINES, MARKERS, ThemeName, drawing, theme_of
from ib_callback.results.measurement import Measurement
from ib_callback.results.metrics import PLANE, WHOLE, Quantity
from ib_callback.results.phases import Phase, Phases

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN = [quantity for quantity in PLANE if quantity.primary]
# Shown where they were measured.
_SHOWN_OF_WHOLE = [quantity for quantity in WHOLE if quantity.primary]
_SHOWN_OF_VIEWS = [quantity for quantity in PLANE if quantity.drawn_of]
_MARKED = 40
_MANY = 300
_FEW_MISSING = 16
_HATCHES = {Phase.INITIAL: "////", Phase.FITTING: "", Phase.COMPRESSION: "", Phase.MEMORISING: "...."}


def over_steps(
    measurements: Iterable[Measurement],
    *,
    orders: Sequence[str] | None = None,
    log: bool | None = False,
    theme: ThemeName = "light",
    title: str | None = None,
    x: str = "step",
) -> Figure:
    """Draw complexity, expressivity, optimality, distance to the bound and the probe's loss over training steps.

    Beside complexity and expressivity stand their nulls, beside optimality and distance the same numbers above null;
    a band is one standard error to either side, where it was measured. Beside the loss is the local score of what the
    model puts out, its readout and its prediction. Phases are shaded, and a point that could not be measured interrupts
    the line.

    Args:
        measurements: a trajectory, or any other measurements in the order of training.
        orders: which n-gram orders to show, by default the primary one alone.
        log: a logarithmic axis for the steps, linear from step 0 to the first one after it; None: if most steps
            lie near the first one.
        theme: "light" or "dark".
        title: of the whole figure.
        x: what training is counted in: "step", or "tokens", which it had seen.

    Returns:
        A figure of its own, 150 dots per inch, with four panels, and one more each for the loss and for the score,
        where they were measured.

    Raises:
        ValueError: there is no point to draw, an order is asked for that was not measured, or an unknown theme; or
            tokens are asked for and not known.
        ImportError: Matplotlib is not installed.
    """
    points, left_out = data.placed(data.given(measurements))
    shown = data.orders_of(points, [data.primary_of(points)] if orders is None else orders)
    look = theme_of(theme)
    with drawing(look, "Drawing the numbers over steps"):
        whole = [each for each in _SHOWN_OF_WHOLE if any(getattr(point, each.name) is not None for point in points)]
        of_views = {each.name: _series(points, each, shown) for each in _SHOWN_OF_VIEWS}
        quantities = [*_SHOWN, *whole, *(each for each in _SHOWN_OF_VIEWS if of_views[each.name])]
        # Each with a colour of its own, the same in all panels.
        colours = [*shown, *dict.fromkeys(itertools.chain(*of_views.values()))]
        sheet = Sheet(len(quantities), 2, size=(3.5, 2.1), theme=look, top=0.12, bottom=0.48, across=0.9, down=0.14)
        steps, name = data.numbered(points, x)
        if log is None:
            log = data.crowds_at_the_start(steps)
        phases = data.phases_of(measurements, points)
        bounds = {point.settings.get("bound") for point in points if point.orders}
        bound = "IB curve" if bounds == {"ib_curve"} else "complexity" if "ib_curve" not in bounds else "bound"
        course = _Course(sheet, points, steps)
        for panel, quantity in zip(sheet.panels, quantities, strict=True):
            panel.set_ylabel(quantity.label.format(bound=bound))
            panel.grid(color=look.faint)
            panel.set_axisbelow(True)
            logarithmic = _scale(panel, steps, name, log=log)
            if quantity in whole:
                course.draw_whole(panel, quantity)
            else:
                for order in of_views.get(quantity.name, shown):
                    course.draw(panel, quantity, order, colours.index(order), several=len(shown) > 1)
            course.draw_reference(panel, quantity.name)
            course.mark_missing(panel)
            panel.ticklabel_format(axis="y", useOffset=False)
            _from_zero(panel)
            if phases is not None:
                course.shade(panel, phases)
        for panel in sheet.panels[:-2]:
            panel.tick_params(labelbottom=False)
        for panel in sheet.panels[-2:]:
            panel.set_xlabel(name + (", logarithmic" if logarithmic else ""))
        sheet.notes += [*data.notes_of_run(points), *left_out]
        sheet.finish(title)
    return sheet.figure


def _series(points: Sequence[Measurement], quantity: Quantity, orders: Sequence[str]) -> list[str]:
    """The orders of views, "readout/token", that have a quantity at any point."""
    names = [f"{view}/{order}" for order in orders for view in quantity.drawn_of]
    return [name for name in names if np.isfinite(data.column(points, name, quantity.name)).any()]


def _scale(panel: Axes, steps: np.ndarray, name: str, *, log: bool) -> bool:
    """Whether the axis is logarithmic, for which there must be two steps."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    panel.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    low, high = float(steps.min()), float(steps.max())
    positive = steps[steps > 0]
    logarithmic = log and len(positive) > 0 and high > low
    if logarithmic:
        first = float(positive.min())
        panel.set_xscale("symlog", linthresh=first, linscale=0.4)
        ticks = sorted({*([0.0] if low <= 0 else []), *data.decades(first, high * 1.001)})
        if len(ticks) < 3:
            ticks = [float(step) for step in steps[data.thinned(len(steps), 6)]]
        panel.xaxis.set_major_locator(FixedLocator(ticks))
        panel.xaxis.set_minor_locator(NullLocator())
    else:
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: data.count_label(value, name)))
    panel.margins(x=0.03)
    return logarithmic


def _from_zero(panel: Axes) -> None:
    """Begin at 0 where that costs little, so that changes are not made to look larger than they are."""
    low, high = panel.dataLim.y0, panel.dataLim.y1
    low, high = min(low, high), max(low, high)
    if 0 <= low < 0.6 * high:
        panel.set_ylim(-0.04 * high, 1.06 * high)


def _isolated(values: np.ndarray) -> np.ndarray:
    """Which values have no neighbour, so that no line leads to them."""
    there = np.isfinite(values)
    padded = np.concatenate([[False], there, [False]])
    return there & ~padded[:-2] & ~padded[2:]


class _Course:
    """The points of a run, drawn into the panels of a sheet."""

    def __init__(self, sheet: Sheet, points: Sequence[Measurement], steps: np.ndarray) -> None:
        self.sheet, self.theme, self.points, self.steps = sheet, sheet.theme, points, steps

    def draw(self, panel: Axes, quantity: Quantity, order: str, index: int, *, several: bool) -> None:
        """A quantity of one order with its error, and what belongs beside it."""
        colour = self.theme.series[index % len(self.theme.series)]
        marker = MARKERS[index % len(MARKERS)]
        values, error, beside = (
            data.column(self.points, order, name) for name in (quantity.name, f"{quantity.name}_se", quantity.beside)
        )
        # In a long run, only the points that no line would show.
        marked = np.isfinite(values) if np.isfinite(values).sum() <= _MARKED else _isolated(values)
        width = 0.9 if len(self.points) > _MANY else 1.5
        style: dict[str, Any] = {"color": colour, "lw": width, "marker": marker, "markersize": 4}
        label = f"{order}: measured"
        panel.plot(self.steps, values, zorder=4, label=label, markevery=np.flatnonzero(marked).tolist(), **style)
        self.sheet.key(label, label, **style)
        self._band(panel, values, error, colour)
        if np.isfinite(beside).any():
            above = quantity.beside.endswith("above_null")
            style = {"color": colour if several else self.theme.muted, "lw": 1.1, "ls": LINES[3] if above else LINES[1]}
            panel.plot(
                self.steps, beside, zorder=3, label=f"{order}: {quantity.beside}", marker=marker, markersize=3,
                markerfacecolor=self.theme.paper, markevery=np.flatnonzero(_isolated(beside)).tolist(), **style,
            )  # fmt: skip
            if several:
                style["color"] = self.theme.ink
            key, text = ("above", "above null, a lower baseline") if above else ("null", "null: finite sampling alone")
            self.sheet.key(key, text, **style)

    def draw_whole(self, panel: Axes, quantity: Quantity) -> None:
        """A quantity that is of no order, with its error."""
        values, error = (
            np.array([getattr(point, name) for point in self.points], dtype=float)
            for name in (quantity.name, f"{quantity.name}_se")
        )
        marked = np.isfinite(values) if np.isfinite(values).sum() <= _MARKED else _isolated(values)
        colour, width = self.theme.ink, 0.9 if len(self.points) > _MANY else 1.5
        panel.plot(
            self.steps, values, zorder=4, label=quantity.name, color=colour, lw=width, marker="o", markersize=4,
            markevery=np.flatnonzero(marked).tolist(),
        )  # fmt: skip
        self._band(panel, values, error, colour)

    def _band(self, panel: Axes, values: np.ndarray, error: np.ndarray, colour: str) -> None:
        """One standard error to either side, where it is known."""
        from matplotlib.patches import Patch

        if np.isfinite(error).any():
            band: dict[str, Any] = {"color": colour, "alpha": 0.25}
            panel.fill_between(
                self.steps, values - error, values + error, lw=0, zorder=2, label="standard error", **band
            )
            self.sheet.handles.setdefault("standard error", Patch(label="± 1 standard error", **band))

    def draw_reference(self, panel: Axes, name: str) -> None:
        """Optimality 1 and distance 0 are on the bound; complexity and expressivity cannot exceed the ceiling."""
        bounds = {"optimality": 1.0, "distance_to_bound": 0.0}
        ceilings = np.array([point.ceiling for point in self.points], dtype=float)
        if name in bounds:
            style: dict[str, Any] = {"color": self.theme.ink, "lw": 0.9, "ls": (0, (5, 3)), "label": "on the bound"}
            panel.axhline(bounds[name], zorder=1.5, **style)
            self.sheet.key("bound", **style)
        elif name == "complexity" and np.isfinite(ceilings).any():
            style = {"color": self.theme.muted, "lw": 1.2, "ls": (0, (1, 1.6))}
            self.sheet.plot(panel, (self.steps, ceilings), "ceiling", "ceiling", zorder=1.6, **style)

    def mark_missing(self, panel: Axes) -> None:
        """A cross below for each point that could not be measured."""
        absent = self.steps[[not point.orders for point in self.points]]
        if len(absent):
            marker = "x" if len(absent) <= _FEW_MISSING else "|"
            style: dict[str, Any] = {"ls": "", "marker": marker, "color": self.theme.alarm, "markersize": 4.5}
            at = np.full(len(absent), 0.03)
            panel.plot(absent, at, transform=panel.get_xaxis_transform(), zorder=5, label="missing", **style)
            self.sheet.key("missing", f"not measured ({len(absent):,})", **style)

    def shade(self, panel: Axes, phases: Phases) -> None:
        """Phases as stretches of the background."""
        from matplotlib.patches import Patch

        left, right = panel.get_xlim()
        sequence = np.array(phases.phases)
        for phase, label in data.phase_labels(phases).items():
            mine = np.flatnonzero(sequence == phase)
            begin = left if mine[0] == 0 else self.steps[mine[0]]
            end = right if mine[-1] == len(self.steps) - 1 else self.steps[mine[-1] + 1]
            fill: dict[str, Any] = {"facecolor": self.theme.phases[phase], "hatch": _HATCHES[phase]}
            panel.axvspan(begin, end, zorder=0, label=phase.name.lower(), lw=0, edgecolor=self.theme.hatch, **fill)
            if mine[0] > 0:
                panel.axvline(begin, color=self.theme.muted, lw=0.7, zorder=1)
            self.sheet.handles[phase.name] = Patch(label=label, lw=0.6, edgecolor=self.theme.muted, **fill)
        panel.set_xlim(left, right)
