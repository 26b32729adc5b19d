"""Complexity, expressivity, optimality and distance to the bound along a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ib_callback.plot import data
from ib_callback.plot.sheet import Margins, Sheet
from ib_callback.plot.theme import LINES, MARKERS, Theme, ThemeName, drawing, theme_of
from ib_callback.results.measurement import Measurement
from ib_callback.results.phases import Phase, Phases

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_QUANTITIES = {
    "complexity": "complexity I(X;Z)",
    "expressivity": "expressivity I(Y;Z)",
    "optimality": "optimality\n(expressivity / complexity)",
    "distance_to_bound": "distance to the bound\n({bound} − expressivity)",
}
# What is drawn beside a number, thinner. The distance above null is nearly the distance: both nulls are much alike.
_BESIDE = {
    "complexity": "complexity_null",
    "expressivity": "expressivity_null",
    "optimality": "optimality_above_null",
}
_MARKED = 40
_MANY = 300
_FEW_MISSING = 16
_MARGINS = Margins(top=0.12, bottom=0.48, across=0.9, down=0.14)
_HATCHES = {Phase.INITIAL: "////", Phase.FITTING: "", Phase.COMPRESSION: ""}


def over_steps(
    measurements: Iterable[Measurement],
    *,
    orders: Sequence[str] | None = None,
    log: bool | None = False,
    theme: ThemeName = "light",
    title: str | None = None,
) -> Figure:
    """Draw complexity, expressivity, optimality and distance to the bound over training steps.

    Beside complexity and expressivity stand their nulls, beside optimality and distance the same numbers above null;
    a band is one standard error to either side, where it was measured. Phases are shaded, and a point that could not
    be measured interrupts the line.

    Args:
        measurements: a trajectory, or any other measurements in the order of training.
        orders: which n-gram orders to show, by default the primary one alone.
        log: a logarithmic axis for the steps, linear from step 0 to the first one after it; None: if most steps
            lie near the first one.
        theme: "light" or "dark".
        title: of the whole figure.

    Returns:
        A figure of its own, 150 dots per inch, with four panels.

    Raises:
        ValueError: there is no point to draw, an order is asked for that was not measured, or an unknown theme.
        ImportError: Matplotlib is not installed.
    """
    points = data.given(measurements)
    shown = data.orders_of(points, [data.primary_of(points)] if orders is None else orders)
    look = theme_of(theme)
    with drawing(look, "Drawing the numbers over steps"):
        sheet = Sheet.of(len(_QUANTITIES), 2, size=(3.5, 2.1), theme=look, margins=_MARGINS)
        steps, name = data.numbered(points)
        if log is None:
            log = data.crowds_at_the_start(steps)
        phases = data.phases_of(points, data.rule_of(measurements))
        bounds = {point.settings.get("bound") for point in points if point.orders}
        bound = "IB curve" if bounds == {"ib_curve"} else "complexity" if "ib_curve" not in bounds else "bound"
        handles: dict[str, Any] = {}
        for panel, (quantity, label) in zip(sheet.panels, _QUANTITIES.items(), strict=True):
            panel.set_ylabel(label.format(bound=bound))
            panel.grid(color=look.faint)
            panel.set_axisbelow(True)
            logarithmic = _scale(panel, steps, log=log)
            for index, order in enumerate(shown):
                _draw(panel, points, steps, quantity, order, index, look, handles, several=len(shown) > 1)
            _reference(panel, points, quantity, look, handles)
            _mark_missing(panel, points, steps, look, handles)
            panel.ticklabel_format(axis="y", useOffset=False)
            _from_zero(panel)
            _shade(panel, steps, phases, look, handles)
        for panel in sheet.panels[:2]:
            panel.tick_params(labelbottom=False)
        for panel in sheet.panels[2:]:
            panel.set_xlabel(name + (", logarithmic" if logarithmic else ""))
        notes = [*data.changed_settings_note(points), *data.missing_note(points)]
        sheet.finish(handles=list(handles.values()), title=title, notes=notes)
    return sheet.figure


def _scale(panel: Axes, steps: np.ndarray, *, log: bool) -> bool:
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
            ticks = [float(step) for step in steps[data.thinned(steps, 6)]]
        panel.xaxis.set_major_locator(FixedLocator(ticks))
        panel.xaxis.set_minor_locator(NullLocator())
    else:
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if high > low:
        scale = panel.xaxis.get_transform()
        first_at, last_at = scale.transform([low, high])
        margin = 0.03 * (last_at - first_at)
        left, right = scale.inverted().transform([first_at - margin, last_at + margin])
        panel.set_xlim(float(left), float(right))
    else:
        panel.set_xlim(low - 1, high + 1)
    return logarithmic


def _from_zero(panel: Axes) -> None:
    """Begin at 0 where that costs little, so that changes are not made to look larger than they are."""
    low, high = panel.dataLim.y0, panel.dataLim.y1
    low, high = min(low, high), max(low, high)
    if 0 <= low < 0.6 * high:
        panel.set_ylim(-0.04 * high, 1.06 * high)


def _draw(
    panel: Axes,
    points: Sequence[Measurement],
    steps: np.ndarray,
    quantity: str,
    order: str,
    index: int,
    theme: Theme,
    handles: dict[str, Any],
    *,
    several: bool,
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colour = theme.series[index % len(theme.series)]
    values = data.column(points, order, quantity)
    error = data.column(points, order, f"{quantity}_se")
    second = _BESIDE.get(quantity, "")
    beside = data.column(points, order, second)
    marker = MARKERS[index % len(MARKERS)]
    # In a long run, only the points that no line would show.
    marked = np.isfinite(values) if np.isfinite(values).sum() <= _MARKED else _isolated(values)
    style: dict[str, Any] = {
        "color": colour,
        "lw": 0.9 if len(points) > _MANY else 1.5,
        "marker": marker,
        "markersize": 4,
    }
    panel.plot(
        steps, values, zorder=4, label=f"{order}: measured", markevery=np.flatnonzero(marked).tolist(), **style
    )  # fmt: skip
    handles[f"{order} measured"] = Line2D([], [], label=f"{order}: measured", **style)
    if np.isfinite(error).any():
        panel.fill_between(
            steps, values - error, values + error, color=colour, alpha=0.25, lw=0, zorder=2, label="standard error"
        )
        handles["standard error"] = Patch(color=colour, alpha=0.25, label="± 1 standard error")
    if np.isfinite(beside).any():
        above = second.endswith("above_null")
        style = {"color": colour if several else theme.muted, "lw": 1.1, "ls": LINES[3] if above else LINES[1]}
        alone = np.flatnonzero(_isolated(beside)).tolist()
        panel.plot(
            steps, beside, zorder=3, label=f"{order}: {second}", marker=marker, markersize=3,
            markerfacecolor=theme.paper, markevery=alone, **style,
        )  # fmt: skip
        key, text = ("above", "above null, a lower baseline") if above else ("null", "null: finite sampling alone")
        handles[key] = Line2D([], [], label=text, **{**style, **({"color": theme.ink} if several else {})})


def _isolated(values: np.ndarray) -> np.ndarray:
    """Which values have no neighbour, so that no line leads to them."""
    there = np.isfinite(values)
    padded = np.concatenate([[False], there, [False]])
    return there & ~padded[:-2] & ~padded[2:]


def _reference(
    panel: Axes, points: Sequence[Measurement], quantity: str, theme: Theme, handles: dict[str, Any]
) -> None:
    """Optimality 1 and distance 0 are on the bound; complexity and expressivity cannot exceed the ceiling."""
    from matplotlib.lines import Line2D

    if quantity in ("optimality", "distance_to_bound"):
        style: dict[str, Any] = {"color": theme.ink, "lw": 0.9, "ls": (0, (5, 3))}
        at = 1.0 if quantity == "optimality" else 0.0
        panel.axhline(at, zorder=1.5, label="on the bound", **style)
        handles["bound"] = Line2D([], [], label="on the bound", **style)
    elif quantity == "complexity":
        ceilings = np.array([point.ceiling for point in points], dtype=float)
        if np.isfinite(ceilings).any():
            style = {"color": theme.muted, "lw": 1.2, "ls": (0, (1, 1.6))}
            steps, _ = data.numbered(points)
            panel.plot(steps, ceilings, zorder=1.6, label="ceiling", **style)
            handles["ceiling"] = Line2D([], [], label="ceiling", **style)


def _mark_missing(
    panel: Axes, points: Sequence[Measurement], steps: np.ndarray, theme: Theme, handles: dict[str, Any]
) -> None:
    from matplotlib.lines import Line2D

    absent = steps[[not point.orders for point in points]]
    if len(absent):
        style: dict[str, Any] = {
            "ls": "",
            "marker": "x" if len(absent) <= _FEW_MISSING else "|",
            "color": theme.alarm,
            "markersize": 4.5,
        }
        at = np.full(len(absent), 0.03)
        panel.plot(absent, at, transform=panel.get_xaxis_transform(), zorder=5, label="missing", **style)
        handles["missing"] = Line2D([], [], label=f"not measured ({len(absent):,})", **style)


def _shade(panel: Axes, steps: np.ndarray, phases: Phases | None, theme: Theme, handles: dict[str, Any]) -> None:
    from matplotlib.patches import Patch

    if phases is None:
        return
    left, right = panel.get_xlim()
    labels = data.phase_labels(phases)
    sequence = np.array(phases.phases)
    for phase, label in labels.items():
        mine = np.flatnonzero(sequence == phase)
        begin = left if mine[0] == 0 else steps[mine[0]]
        end = right if mine[-1] == len(steps) - 1 else steps[mine[-1] + 1]
        fill: dict[str, Any] = {
            "facecolor": theme.phases[phase], "edgecolor": theme.hatch, "hatch": _HATCHES[phase], "lw": 0,
        }  # fmt: skip
        panel.axvspan(begin, end, zorder=0, label=phase.name.lower(), **fill)
        if mine[0] > 0:
            panel.axvline(begin, color=theme.muted, lw=0.7, zorder=1)
        fill.update(lw=0.6, edgecolor=theme.muted)
        handles[phase.name] = Patch(label=label, **fill)
    panel.set_xlim(left, right)
