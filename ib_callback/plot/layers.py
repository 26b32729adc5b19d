"""The information plane by layer, at one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ib_callback.bound.curve import IBCurve
from ib_callback.plot import data
from ib_callback.plot.bound import curve_in_plane, why_not_drawn
from ib_callback.plot.frame import StepColours, draw_bounds, mark_better, name_bound, plane_sheet, square_limits
from ib_callback.plot.sheet import Sheet
from ib_callback.plot.theme import SMALL, ThemeName, drawing, place_labels, shortened_alike, theme_of
from ib_callback.results.measurement import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Up to _NAMED layers are all named. With more layers, _SOME are named: the first, the last and some between.
_NAMED = 12
_SOME = 7
_LONGEST_NAME = 24


def plane_by_layer(
    measurement: Measurement,
    *,
    orders: Sequence[str] | None = None,
    curve: IBCurve | None = None,
    theme: ThemeName = "light",
    title: str | None = None,
) -> Figure:
    """Draw the layers of one measurement in the information plane.

    Each layer is a point with its name beside it, and a line joins the layers from the first to the last. With more
    than 12 layers, seven are named. The diamond is the mean over layers, which the plane of a run shows, and the cross
    is the null of this mean. If the null is out of the range of the layers, its value is written above the panel.

    Args:
        measurement: a measurement that succeeded.
        orders: the n-gram orders to show, one panel each; by default all, the primary one first.
        curve: the IB curve of the probe. The panel of its order, by default the primary one, shows it.
        theme: "light" or "dark".
        title: title of the whole figure, by default the step.

    Returns:
        A new figure, 150 dots per inch. Both axes are fractions of log(num_bins).

    Raises:
        ValueError: the measurement failed, an order was not measured, or the theme is unknown.
        TypeError: `measurement` is not a single measurement.
        ImportError: Matplotlib is not installed.
    """
    if not isinstance(measurement, Measurement):
        raise TypeError(f"expected one Measurement, such as trajectory[-1], got {type(measurement).__name__}")
    if measurement.error is not None:
        raise ValueError(f"expected a point that was measured, got one that was not: {measurement.error}")
    shown = data.orders_of(data.given(measurement), orders)
    look = theme_of(theme)
    names = shortened_alike(measurement.layers, _LONGEST_NAME)
    with drawing(look, "Drawing the information plane by layer"):
        sheet = plane_sheet(shown, look, unit=data.unit([measurement]))
        colours = StepColours(np.arange(1.0, len(names) + 1), "depth (1 is the first layer)", look, logarithmic=False)
        for panel, order in zip(sheet.panels, shown, strict=True):
            _draw(sheet, panel, measurement, order, names, colours, curve_in_plane(curve, order, measurement))
        colours.draw_bar(sheet)
        if title is None:
            title = "By layer" if measurement.step is None else f"By layer, step {measurement.step:,}"
        sheet.notes += why_not_drawn(curve, measurement)
        sheet.finish(title)
    return sheet.figure


def _draw(
    sheet: Sheet, panel: Axes, measurement: Measurement, order: str, names: Sequence[str], colours: StepColours,
    curve: np.ndarray | None,
) -> None:  # fmt: skip
    theme = sheet.theme
    point = measurement[order]
    layers = np.stack([point.complexity_by_layer, point.expressivity_by_layer], axis=1).astype(float)
    mean = np.array([point.complexity, point.expressivity], dtype=float)
    null = np.array([point.complexity_null, point.expressivity_null], dtype=float)

    square_limits(panel, *data.finite_range(layers, mean), from_zero=False)
    panel.plot(*layers.T, color=theme.muted, lw=0.9, zorder=3, label="course")
    area = 40.0 if len(layers) <= _NAMED else 22.0
    panel.scatter(layers[:, 0], layers[:, 1], s=area, c=colours.rgba, linewidths=0, zorder=5, label="layers")
    dot: dict[str, Any] = {"ls": "", "color": theme.ink, "markersize": 5.5}
    sheet.key("layers", "a layer", marker="o", **dot)
    if len(layers) > 1 and np.isfinite(mean).all():
        shape = {**dot, "marker": "D", "markerfacecolor": theme.paper, "markeredgewidth": 1.2}
        sheet.plot(panel, mean[:, None], "mean", "mean over layers", zorder=6, **shape)
    low, high = panel.get_xlim()
    if np.isfinite(null).all() and ((low > null) | (null > high)).any():
        # If the axes reached the null, the layers would merge into one point.
        text = "null of the mean: " + ", ".join(dict.fromkeys(f"{value:.3f}" for value in null))
        panel.set_title(text, loc="right", fontsize=SMALL, color=theme.muted)
        panel.set_title("")
        panel.set_title(order, loc="left")
    elif np.isfinite(null).all():
        text = "null of the mean: what chance alone gives"
        sheet.plot(panel, null[:, None], "null", text, zorder=6, marker="x", **dot)
    draw_bounds(sheet, panel, curve)
    taken = [name_bound(panel, theme), mark_better(panel, theme, np.concatenate([layers, [mean, null]]))]

    chosen = data.thinned(len(names), len(names) if len(names) <= _NAMED else _SOME)
    labels = [(*layers[index], names[index], theme.ink) for index in chosen]
    place_labels(panel, labels, np.concatenate([layers, [mean, null], *taken]), inches=sheet.size[0], theme=theme)
