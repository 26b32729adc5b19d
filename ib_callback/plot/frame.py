"""Parts that all pictures of the plane share: square panels, the bound, chance, arrows and colours of steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ib_callback.plot.data import count_label, decades, spans_much
from ib_callback.plot.planes import PLAIN, Plane
from ib_callback.plot.sheet import Sheet
from ib_callback.plot.theme import FONT, Theme
from ib_callback.results.metrics import SIGNIFICANT_STANDARD_ERRORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Places of the arrowheads as shares of the course, and the shortest stretch that has one, as a share of the panel.
_ARROWS = (0.125, 0.375, 0.625, 0.875)
_SHORTEST = 0.09
_VERTICES = 16
# Places for the arrow "better", as shares of the panel: below the bound, which is preferred, and above it.
_CORNERS = (((0.965, 0.04), (0.875, 0.13)), ((0.135, 0.865), (0.045, 0.955)))


def plane_sheet(
    orders: Sequence[str], theme: Theme, planes: Sequence[Plane] = (PLAIN,), unit: str = "(fraction of log num_bins)"
) -> Sheet:
    """Make a sheet with a labelled square panel for each order and plane.

    All planes of an order stand side by side. Each order has a row if there are several.
    """
    shown = list(itertools.product(orders, planes))
    columns = len(shown) if len(shown) < 4 else 2 if len(shown) == 4 else 3
    room = {}
    is_plain = [*planes] == [PLAIN]
    if not is_plain:
        columns = len(planes) if len(orders) > 1 < len(planes) else columns
        # Axes are labelled in each column, and in each row unless the next row has the same planes.
        room = {"across": 0.95, "down": 0.62 if len(orders) > 1 else 1.0}
    side = 3.9 if columns == 1 else 2.1 if columns == 4 else 2.9
    sheet = Sheet(len(shown), columns, size=(side, side), theme=theme, bottom=0.78, left=1.08, **room)
    for index, (panel, (order, plane)) in enumerate(zip(sheet.panels, shown, strict=True)):
        if is_plain:
            panel.set_title(order)
        else:
            # On the left, because a note may stand on the right.
            panel.set_title(f"{order}: {plane.name}", loc="left", fontsize=FONT)
        panel.grid(color=theme.faint)
        panel.set_axisbelow(True)
        is_first, is_last = index % columns == 0, index + columns >= len(shown)
        if is_last or shown[index + columns][1] != plane:
            panel.set_xlabel(plane.label("complexity") + (f"\n{unit}" if is_last else ""))
        if is_first or shown[index - 1][1] != plane:
            panel.set_ylabel(plane.label("expressivity") + (f"\n{unit}" if is_first else ""))
    return sheet


def square_limits(panel: Axes, low: float, high: float, *, from_zero: bool = True) -> None:
    """Give both axes of a square panel the same limits, from 0 if that costs little room."""
    from matplotlib.ticker import MaxNLocator

    if from_zero and 0 <= low < 0.6 * high:
        low = 0.0
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    panel.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    panel.ticklabel_format(useOffset=False)


def draw_bounds(sheet: Sheet, panel: Axes, curve: np.ndarray | None) -> None:
    """Draw the diagonal and, if there is one, the IB curve. The limits of the panel must be final."""
    style: dict[str, Any] = {"color": sheet.theme.ink, "lw": 1.0, "ls": (0, (5, 3))}
    panel.axline((0, 0), slope=1, zorder=1.5, label="diagonal", **style)
    sheet.key("diagonal", "the bound: expressivity = complexity", **style)
    if curve is not None and len(curve):
        style = {"color": sheet.theme.bound, "lw": 1.6}
        # More complexity never costs expressivity.
        beyond = max(curve[-1, 0], panel.get_xlim()[1])
        whole = np.concatenate([curve, [[beyond, curve[:, 1].max()]]])
        panel.plot(*whole.T, zorder=1.6, label="IB curve", scalex=False, scaley=False, **style)
        sheet.key("IB curve", "IB curve: the bound for codes of the probe's tokens", **style)


def draw_chance(sheet: Sheet, panel: Axes, errors: np.ndarray) -> None:
    """Draw chance in a plane of values above chance: the origin, and bands that cannot be told from its axes.

    Args:
        sheet: its legend explains chance.
        panel: a panel with final limits.
        errors: standard errors of all points, [points, 2]. The largest decides, so that no point is outside by chance.
    """
    from matplotlib.patches import Patch

    style: dict[str, Any] = {"ls": "", "marker": "x", "color": sheet.theme.ink, "markersize": 7, "markeredgewidth": 1.8}
    sheet.plot(panel, np.zeros((2, 1)), "chance", "chance: no local information", zorder=4, **style)
    fill: dict[str, Any] = {"color": sheet.theme.muted, "alpha": 0.22, "lw": 0}
    bands: tuple[Any, ...] = (panel.axvspan, panel.axhspan)
    for index, band in enumerate(bands):
        known = errors[np.isfinite(errors[:, index]), index]
        if len(known) and known.max() > 0:
            reach = SIGNIFICANT_STANDARD_ERRORS * known.max()
            band(-reach, reach, zorder=0.5, label="near chance", **fill)
            text = f"within {SIGNIFICANT_STANDARD_ERRORS:.0f} standard errors of 0 (largest error)"
            sheet.handles["near chance"] = Patch(label=text, **fill)


def draw_arrows(panel: Axes, course: np.ndarray, colour: Any) -> None:
    """Draw arrowheads along a course, [points, 2], in the direction of training. The limits must be final."""
    from ib_callback.plot.data import thinned

    course = course[thinned(len(course), _VERTICES)]
    low, high = np.array([panel.get_xlim(), panel.get_ylim()]).T
    steps = np.diff((course - low) / (high - low), axis=0)
    lengths = np.hypot(*steps.T)
    if not len(lengths) or lengths.sum() < _SHORTEST:
        return
    ends = lengths.cumsum()
    for index in dict.fromkeys(int(np.searchsorted(ends, share * ends[-1])) for share in _ARROWS):
        if lengths[index] < _SHORTEST:
            continue
        begin, end = course[index], course[index + 1]
        # An arrow so short that only its head is seen.
        tail, head = begin + 0.5 * (end - begin), begin + 0.56 * (end - begin)
        style = {"arrowstyle": "-|>,head_length=0.45,head_width=0.22", "color": colour, "lw": 0, "shrinkA": 0}
        panel.annotate(
            "", xy=tuple(head), xytext=tuple(tail), arrowprops={**style, "shrinkB": 0, "mutation_scale": 11}, zorder=3.2
        ).set_label("arrow")


def mark_better(panel: Axes, theme: Theme, points: np.ndarray) -> np.ndarray:
    """Draw an arrow with the word "better" in the emptier corner; return the places that it covers, [places, 2].

    Args:
        panel: a panel with final limits.
        theme: decides the colour.
        points: all points of the panel, [points, 2].
    """
    low, high = np.array([panel.get_xlim(), panel.get_ylim()]).T
    shares = (points[np.isfinite(points).all(axis=1)] - low) / (high - low)

    def hidden(corner: tuple[tuple[float, float], tuple[float, float]]) -> int:
        (x, y), _ = corner
        return int(((np.abs(shares[:, 0] - x) < 0.4) & (np.abs(shares[:, 1] - y) < 0.2)).sum())

    tail, head = corner = min(_CORNERS, key=hidden)
    arrow = {"arrowstyle": "-|>,head_length=0.4,head_width=0.2", "color": theme.muted, "lw": 1.4, "mutation_scale": 11}
    panel.annotate(
        "", xy=head, xytext=tail, xycoords="axes fraction", arrowprops={**arrow, "shrinkA": 0, "shrinkB": 0}, zorder=2
    ).set_label("better arrow")
    right = corner is _CORNERS[0]
    panel.text(
        head[0] - 0.01 if right else tail[0], 0.035 if right else 0.885, "better", color=theme.muted, fontsize=8,
        ha="right" if right else "left", va="bottom", transform=panel.transAxes, zorder=2, label="better",
    )  # fmt: skip
    taken = np.array([(x, y) for x in np.linspace(0.66, 0.97, 6) for y in (0.04, 0.1)])
    return low + (taken if right else taken[:, ::-1]) * (high - low)


def name_bound(panel: Axes, theme: Theme) -> np.ndarray:
    """Write "the bound" along the diagonal; return the places that the words cover, [places, 2].

    The panel must be square, with the same limits for both axes.
    """
    low, high = panel.get_xlim()
    at = max(low, panel.get_ylim()[0]) + 0.8 * (high - low)
    panel.annotate(
        "the bound", xy=(at, at), xytext=(-4, 4), textcoords="offset points", rotation=45, rotation_mode="anchor",
        ha="center", va="bottom", color=theme.ink, fontsize=8, zorder=2,
    ).set_label("name of the bound")  # fmt: skip
    along = at + np.linspace(-0.12, 0.12, 7) * (high - low)
    return np.stack([along - 0.03 * (high - low), along + 0.03 * (high - low)], axis=1)


def mark_untrained(sheet: Sheet, panel: Axes, point: np.ndarray, colour: str, what: str = "") -> None:
    """Draw a diamond around the point of step 0, [2]; `what` says which model that is, if it is known."""
    ring: dict[str, Any] = {"ls": "", "marker": "D", "markerfacecolor": "none", "markeredgewidth": 1.2, "markersize": 9}
    panel.plot(*point[:, None], zorder=6, label="untrained", color=colour, **ring)
    sheet.key(
        "untrained", f"step 0: {f'the {what} model' if what else 'before training'}", color=sheet.theme.ink, **ring
    )


def note_absent(sheet: Sheet, panel: Axes, absent: int, order: str) -> None:
    """Write above a panel how many points or runs it lacks."""
    if absent:
        text = f"{absent:,} without {order}" if panel.get_title() else f"{absent:,} missing"
        panel.set_title(text, loc="right", fontsize=7, color=sheet.theme.muted)


class StepColours:
    """A colour for each number, such as a step.

    Args:
        numbers: one number for each point.
        title: what the numbers are.
        theme: decides which part of the colour map is used, because the rest would not be seen on its paper.
        logarithmic: whether the colours follow the logarithm. By default they do if the numbers span a large factor.

    Attributes:
        norm: maps a number to its position on the colour scale.
        rgba: colour of each point, [points, 4].
    """

    def __init__(self, numbers: np.ndarray, title: str, theme: Theme, *, logarithmic: bool | None = None) -> None:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize, SymLogNorm

        self.numbers, self.title = numbers, title
        low, high = float(numbers.min()), float(numbers.max())
        positive = min((number for number in numbers if number > 0), default=1.0)
        self.logarithmic = spans_much(numbers) if logarithmic is None else logarithmic
        self.norm = Normalize(low, high)
        if self.logarithmic:
            # Linear between step 0, which has no logarithm, and the first step after it.
            self.norm = SymLogNorm(linthresh=positive, linscale=0.3, vmin=low, vmax=high, base=10)
        # Viridis is even to the eye, and colour-blind readers can tell its colours apart.
        first, last = theme.steps
        part = ListedColormap(colormaps["viridis"](np.linspace(first, last, 256)))
        self.scale = ScalarMappable(self.norm, part)
        self.rgba = np.asarray(self.scale.to_rgba(numbers))

    def draw_bar(self, sheet: Sheet) -> None:
        """Draw the colour bar beside the panels, if there is more than one colour."""
        if np.ptp(self.numbers) == 0:
            return
        bar = sheet.figure.colorbar(self.scale, cax=sheet.add_bar())
        bar.set_label(self.title)
        ticks = self._ticks()
        bar.set_ticks(ticks, labels=[count_label(tick, self.title) for tick in ticks])
        bar.ax.minorticks_off()
        bar.outline.set_linewidth(0.5)

    def _ticks(self) -> list[float]:
        """The first number, the last number, and round numbers between them that are not too near to these."""
        from matplotlib.ticker import MaxNLocator

        low, high = float(self.numbers.min()), float(self.numbers.max())
        between = decades(low, high) if self.logarithmic else MaxNLocator(6, integer=True).tick_values(low, high)
        return [low, *(float(tick) for tick in between if 0.07 < self.norm(tick) < 0.93), high]
