"""The information plane as a figure, by Matplotlib objects alone: no pyplot, no backend, no global state."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ib_callback.comparability import warn_of_other_tokenizers
from ib_callback.files import write_atomically
from ib_callback.measurement import Measurement
from ib_callback.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
# Up to here each point is joined to its null, and steps that were measured label the colours.
FEW_POINTS = 16
# Steps that span more than this factor are coloured by their logarithm.
LOGARITHMIC_SPAN = 50
_DRAWN_VALUES = ("complexity", "expressivity", "complexity_null", "expressivity_null")
_DARK = "0.15"
_BOUND_STYLE: dict[str, Any] = {"color": _DARK, "lw": 1.0, "ls": "--", "zorder": 1, "label": "bound"}
_CEILING_STYLE: dict[str, Any] = {"color": _DARK, "lw": 1.2, "ls": ":", "zorder": 1, "label": "ceiling"}
_EXPLANATIONS = {
    "measured": "measured",
    "last": "last point",
    "null": "null: finite sampling alone",
    "bound": "bound: expressivity = complexity",
    "ceiling": "ceiling (last point)",
}


def information_plane(
    measurements: Measurement | Iterable[Measurement],
    *,
    title: str | None = None,
    baseline: bool = True,
    orders: Sequence[str] | None = None,
) -> Figure:
    """Draw expressivity against complexity, one panel for each n-gram order.

    Points are coloured by training step and joined in its order; those that could not be measured are left
    out. A hollow marker is the null of a point, what finite sampling alone yields; few points are joined to
    theirs. The dashed diagonal is the bound, the dotted line the ceiling of the last point.

    Args:
        measurements: a trajectory, or any other measurements in the order of training, or a single one.
        title: of the whole figure.
        baseline: whether the nulls are drawn, where they were measured.
        orders: which n-gram orders to show, by default all that were measured.

    Returns:
        A figure of its own, 150 dots per inch; both axes are fractions of log(num_bins).

    Raises:
        ValueError: there is no point to draw, or an order is asked for that was not measured.
        ImportError: Matplotlib is not installed.
    """
    purpose = "Drawing the information plane"
    figure_type = require("matplotlib.figure", extra="plot", purpose=purpose).Figure
    canvas_type = require("matplotlib.backends.backend_agg", extra="plot", purpose=purpose).FigureCanvasAgg

    given = [measurements] if isinstance(measurements, Measurement) else list(measurements)
    warn_of_other_tokenizers(given)
    measured = [m for m in given if m.orders]
    if not measured:
        raise ValueError(f"expected at least one measured point to draw, got none among {len(given)} points")
    known = list(dict.fromkeys(order for m in measured for order in m.orders))
    shown = known if orders is None else list(orders)
    if not shown or not set(shown) <= set(known):
        raise ValueError(f"expected orders among {', '.join(known)}, got {', '.join(shown) or 'none'}")

    columns = len(shown) if len(shown) < 4 else 2 if len(shown) == 4 else 3
    rows = math.ceil(len(shown) / columns)
    # Nearly square panels, and room for colour bar and labels, for the legend and for the title.
    legend_columns = {1: 2, 2: 3}.get(columns, 5)
    panel_size = 4.4 if columns == 1 else 3.5
    height = panel_size * rows + 0.5 + 0.25 * math.ceil(len(_EXPLANATIONS) / legend_columns)
    size = (panel_size * columns + 1.2, height + (0.3 if title else 0.0))
    figure = figure_type(figsize=size, dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.07)
    canvas_type(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[len(shown) :]:
        unused.remove()
    del panels[len(shown) :]

    colours = _StepColours(measured)
    for index, (panel, order) in enumerate(zip(panels, shown, strict=True)):
        _draw_order(panel, order, measured, colours, baseline=baseline)
        if index + columns >= len(shown):
            panel.set_xlabel("complexity I(X;Z)\n(fraction of log num_bins)")
        if index % columns == 0:
            panel.set_ylabel("expressivity I(Y;Z)\n(fraction of log num_bins)")
    colours.draw_bar(figure, panels)
    # Below the panels: a legend within them would sooner or later hide points.
    handles = _legend_handles(panels, step=measured[0].step if len(measured) == 1 else None)
    figure.legend(handles=handles, loc="outside lower center", ncols=legend_columns, frameon=False)
    if title:
        figure.suptitle(title)
    return figure


def save_information_plane(
    measurements: Measurement | Iterable[Measurement], path: str | os.PathLike[str], **options: Any
) -> None:
    """Write the figure of `information_plane(measurements, **options)` to a file, atomically.

    The suffix of `path` decides the format, e.g. .png (150 dots per inch), .pdf or .svg.
    """
    content = io.BytesIO()
    figure = information_plane(measurements, **options)
    figure.savefig(content, format=Path(path).suffix.lstrip(".") or "png", dpi=DPI)
    write_atomically(path, content.getvalue())


class _StepColours:
    """The colour of each measurement, from dark (early) to light (late)."""

    def __init__(self, measured: Sequence[Measurement]) -> None:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize, SymLogNorm

        steps = [m.step for m in measured if m.step is not None]
        self.title = "training step"
        if len(steps) < len(measured):
            self.title = "measurement"
            steps = list(range(1, len(measured) + 1))
        self.steps = np.array(steps, dtype=float)
        low, high = self.steps.min(), self.steps.max()
        positive = min((step for step in steps if step > 0), default=1)
        self.logarithmic = high / positive > LOGARITHMIC_SPAN
        self.norm = Normalize(low, high)
        if self.logarithmic:
            # Linear from step 0, which has no logarithm, to the first one after it.
            self.norm = SymLogNorm(linthresh=positive, linscale=0.3, vmin=low, vmax=high, base=10)
        # Even to the eye and told apart by the colour-blind; its lightest end would be lost on white.
        viridis = colormaps["viridis"]
        self.scale = ScalarMappable(self.norm, ListedColormap([viridis(0.92 * i / 255) for i in range(256)]))
        self.rgba = np.asarray(self.scale.to_rgba(self.steps))

    def draw_bar(self, figure: Figure, panels: list[Axes]) -> None:
        if np.ptp(self.steps) == 0:
            return
        bar = figure.colorbar(self.scale, ax=panels, pad=0.02, aspect=30, fraction=0.05)
        bar.set_label(self.title)
        ticks = self._ticks()
        bar.set_ticks(ticks, labels=[f"{tick:,.0f}" for tick in ticks])
        bar.ax.minorticks_off()

    def _ticks(self) -> list[float]:
        """First and last step, and between them measured (if few) or round ones with room between them."""
        from matplotlib.ticker import MaxNLocator

        low, high = float(self.steps.min()), float(self.steps.max())
        if len(self.steps) <= FEW_POINTS:
            between = self.steps.tolist()
        elif self.logarithmic:
            between = [10.0**k for k in range(math.ceil(math.log10(high)))]
        else:
            between = list(MaxNLocator(6, integer=True).tick_values(low, high))
        chosen = [low, high]
        for tick in between:
            gaps = np.abs(self.norm(np.array(chosen)) - self.norm(np.array([tick])))
            if low < tick < high and gaps.min() > 0.06:
                chosen.append(tick)
        return sorted(chosen)


def _draw_order(
    panel: Axes, order: str, measured: Sequence[Measurement], colours: _StepColours, *, baseline: bool
) -> None:
    from matplotlib.collections import LineCollection

    # Undefined values become NaN, which Matplotlib leaves out.
    table = np.array(
        [[getattr(m.orders.get(order), name, None) for name in _DRAWN_VALUES] for m in measured], dtype=float
    )
    keep = np.isfinite(table[:, :2]).all(axis=1)
    points, nulls, rgba = table[keep, :2], table[keep, 2:], colours.rgba[keep]
    if not baseline:
        nulls = np.full_like(nulls, np.nan)
    few = len(points) <= FEW_POINTS
    area = 44.0 if few else 18.0 if len(points) <= 200 else 6.0

    panel.set_title(order)
    panel.axline((0, 0), slope=1, **_BOUND_STYLE)
    ceilings = [m.ceiling for m in measured if m.ceiling is not None][-1:]
    for ceiling in ceilings:
        panel.axvline(ceiling, **_CEILING_STYLE)
    panel.plot(points[:, 0], points[:, 1], color="0.6", lw=0.8, zorder=2)
    panel.scatter(points[:, 0], points[:, 1], s=area, c=rgba, linewidths=0, zorder=5, label="measured")
    if few:
        pairs = list(np.stack([nulls, points], axis=1))
        panel.add_collection(LineCollection(pairs, colors=rgba, linewidths=0.7, linestyles=":", zorder=3))
    if np.isfinite(nulls).any():
        panel.scatter(
            nulls[:, 0], nulls[:, 1], s=area, facecolors="none", edgecolors=rgba,
            linewidths=1.1 if few else 0.6, zorder=4, label="null",
        )  # fmt: skip
    if len(points) > 1:
        panel.scatter(
            points[-1:, 0], points[-1:, 1], s=max(2.2 * area, 40.0), facecolors="none", edgecolors=_DARK,
            linewidths=1.3, zorder=6, label="last",
        )  # fmt: skip
    low, high = _limits(np.concatenate([points.ravel(), nulls.ravel(), ceilings]))
    panel.set(xlim=(low, high), ylim=(low, high))
    panel.ticklabel_format(useOffset=False)


def _legend_handles(panels: list[Axes], *, step: int | None) -> list[Any]:
    from matplotlib.lines import Line2D

    # Stand-ins of one size: what is drawn may be too small to be told apart in a legend.
    dot: dict[str, Any] = {"ls": "", "marker": "o", "markersize": 6, "color": _DARK}
    ring = {**dot, "markerfacecolor": "none"}
    drawn = {artist.get_label() for panel in panels for artist in panel.get_children()}
    handles = [
        Line2D([], [], label="measured", **dot),
        Line2D([], [], label="last", **{**ring, "markersize": 9, "markeredgewidth": 1.3}),
        Line2D([], [], label="null", **ring),
        Line2D([], [], **_BOUND_STYLE),
        Line2D([], [], **_CEILING_STYLE),
    ]
    handles = [handle for handle in handles if handle.get_label() in drawn]
    for handle in handles:
        handle.set_label(_EXPLANATIONS[str(handle.get_label())])
    if step is not None:
        handles[0].set_label(f"measured at step {step:,}")
    return handles


def _limits(values: np.ndarray) -> tuple[float, float]:
    """The same limits for both axes, so that the bound is the diagonal; from 0 if the data allow."""
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    if 0 <= low < 0.6 * high:
        low = 0.0
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - margin, high + margin
