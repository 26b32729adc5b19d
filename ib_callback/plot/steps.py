"""Pictures over steps: loss, local score of the output, complexity, expressivity, optimality, distance to the bound."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ib_callback.plot import data
from ib_callback.plot.sheet import Sheet
from ib_callback.plot.theme import LINES, MARKERS, SMALL, ThemeName, drawing, theme_of
from ib_callback.results.measurement import Measurement
from ib_callback.results.metrics import FIRST_VIEW, PLANE, WHOLE, Quantity
from ib_callback.results.phases import Phase, Phases

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN = [quantity for quantity in PLANE if quantity.primary]
# These are shown if they were measured.
_SHOWN_OF_WHOLE = [quantity for quantity in WHOLE if quantity.primary]
_SHOWN_OF_VIEWS = [quantity for quantity in PLANE if quantity.drawn_of]
_IN_UNITS = ("complexity", "expressivity")
_MARKED = 40
_MANY = 300
_FEW_MISSING = 16
# Length of the linear part of a logarithmic axis, in decades.
_LINEAR = 0.4
_HATCHES = {Phase.INITIAL: "////", Phase.FITTING: "", Phase.COMPRESSION: "", Phase.MEMORISING: "...."}


def over_steps(
    measurements: Iterable[Measurement],
    *,
    orders: Sequence[str] | None = None,
    log: bool | None = False,
    theme: ThemeName = "light",
    title: str | None = None,
    x: str = "step",
    learning_rate: Mapping[int, float] | None = None,
) -> Figure:
    """Draw loss, local score of the output, complexity, expressivity, optimality and distance to the bound over steps.

    The first panel has the loss on the probe and, where it was recorded, the training loss. The second panel has the
    local score of the prediction and of the readout. Both panels are left out if nothing for them was measured. Thin
    lines show the nulls of complexity and expressivity, and optimality above null. A band is one standard error to
    either side. Phases are shaded. A point that could not be measured interrupts the line. A second x-axis at the top
    shows the training tokens, if they are known.

    Args:
        measurements: a trajectory, or any other measurements in the order of training.
        orders: the n-gram orders to show, by default only the primary one.
        log: whether the axis of the steps is logarithmic; it is then linear between step 0 and the first step after
            it. None: it is logarithmic if most steps lie in the first fifth of the run.
        theme: "light" or "dark".
        title: title of the whole figure.
        x: what the x-axis counts: "step", or "tokens" for the training tokens seen so far.
        learning_rate: learning rates by step; a strip under the first panel shows them.

    Returns:
        A new figure, 150 dots per inch. It has four panels, and one more each for the loss and for the local score if
        they were measured.

    Raises:
        ValueError: there is no point to draw, an order was not measured, the theme is unknown, or `x` is "tokens" and
            the tokens of a point are not known.
        ImportError: Matplotlib is not installed.
    """
    points, left_out = data.placed(data.given(measurements))
    shown = data.orders_of(points, [data.primary_of(points)] if orders is None else orders)
    look = theme_of(theme)
    with drawing(look, "Drawing the numbers over steps"):
        whole = [each for each in _SHOWN_OF_WHOLE if any(_has_loss(point, each.name) for point in points)]
        of_views = {each.name: _series(points, each, shown) for each in _SHOWN_OF_VIEWS}
        quantities = [*whole, *(each for each in _SHOWN_OF_VIEWS if of_views[each.name]), *_SHOWN]
        # An order has the same colour in all panels.
        colours = [*shown, *dict.fromkeys(itertools.chain(*of_views.values()))]
        steps, name = data.numbered(points, x)
        tokens = _tokens(points, steps) if name == "training step" else None
        top = 0.12 if tokens is None else 0.5
        sheet = Sheet(len(quantities), 2, size=(3.5, 2.1), theme=look, top=top, bottom=0.48, across=0.9, down=0.14)
        if log is None:
            log = data.crowds_at_the_start(steps)
        phases = data.phases_of(measurements, points)
        bounds = {point.settings.get("bound") for point in points if point.orders}
        bound = "IB curve" if bounds == {"ib_curve"} else "complexity" if "ib_curve" not in bounds else "bound"
        course = _Course(sheet, points, steps)
        for panel, quantity in zip(sheet.panels, quantities, strict=True):
            unit = f"\n{data.short_unit(points)}" if quantity.name in _IN_UNITS else ""
            panel.set_ylabel(quantity.label.format(bound=bound) + unit)
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
        if learning_rate and name != "measurement":
            course.draw_rates(learning_rate, name, log=log)
        if tokens is not None:
            for panel in sheet.panels[:2]:
                _add_tokens(panel, *tokens, logarithmic=logarithmic)
        for panel in sheet.panels[:-2]:
            panel.tick_params(labelbottom=False)
        for panel in sheet.panels[-2:]:
            panel.set_xlabel(name + (", logarithmic" if logarithmic else ""))
        sheet.notes += [*data.notes_of_run(points), *left_out]
        sheet.finish(title)
    return sheet.figure


def _has_loss(point: Measurement, name: str) -> bool:
    """Whether a point has a number of the whole model; the training loss belongs to the panel of the loss."""
    return getattr(point, name) is not None or (name == "loss" and point.train_loss is not None)


def _tokens(points: Sequence[Measurement], steps: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps and tokens of the points whose tokens are known; None if they do not increase along the run."""
    pairs = zip(steps.tolist(), points, strict=True)
    seen = [(step, 0 if step == 0 else point.tokens_seen) for step, point in pairs]
    known = np.array([pair for pair in seen if pair[1] is not None], dtype=float)
    if len(known) < 2 or known[-1, 1] <= 0 or (np.diff(known, axis=0) <= 0).any():
        return None
    return known[:, 0], known[:, 1]


def _add_tokens(panel: Axes, steps: np.ndarray, tokens: np.ndarray, *, logarithmic: bool) -> None:
    """Add an axis of tokens at the top of a panel with final limits."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

    low, high = float(tokens[0]), float(tokens[-1])
    ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    if logarithmic:
        ticks = [*([0.0] if low <= 0 else []), *data.decades(float(tokens[tokens > 0].min()), high * 1.001)]
    # Axes of this panel alone: Matplotlib's secondary axes cannot follow an axis that is linear near 0.
    axis = panel.inset_axes((0, 0, 1, 1), label="tokens")
    axis.set_xscale(panel.get_xscale(), **({"linthresh": _first(steps), "linscale": _LINEAR} if logarithmic else {}))
    axis.set_xlim(panel.get_xlim())
    axis.xaxis.set_major_locator(FixedLocator(np.interp(ticks, tokens, steps).tolist()))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FixedFormatter([data.count_label(tick, "tokens") for tick in ticks]))
    axis.xaxis.tick_top()
    axis.xaxis.set_label_position("top")
    axis.set_xlabel("training tokens")
    axis.yaxis.set_visible(False)
    axis.patch.set_visible(False)
    axis.spines[:].set_visible(False)


def _first(steps: np.ndarray) -> float:
    """The first step after step 0."""
    return float(steps[steps > 0].min())


def _series(points: Sequence[Measurement], quantity: Quantity, orders: Sequence[str]) -> list[str]:
    """The orders of views, such as "readout/token", that have a quantity at some point; the view shown first leads."""
    views = sorted(quantity.drawn_of, key=lambda view: view != FIRST_VIEW)
    names = [f"{view}/{order}" for order in orders for view in views]
    return [name for name in names if np.isfinite(data.column(points, name, quantity.name)).any()]


def _scale(panel: Axes, steps: np.ndarray, name: str, *, log: bool) -> bool:
    """Set up the axes; whether the axis of the steps is logarithmic, which needs two different steps."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    panel.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    low, high = float(steps.min()), float(steps.max())
    positive = steps[steps > 0]
    logarithmic = log and len(positive) > 0 and high > low
    if logarithmic:
        first = _first(steps)
        panel.set_xscale("symlog", linthresh=first, linscale=_LINEAR)
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
    """Begin the axis at 0 if that costs little room, so that changes do not look larger than they are."""
    low, high = panel.dataLim.y0, panel.dataLim.y1
    low, high = min(low, high), max(low, high)
    if 0 <= low < 0.6 * high:
        panel.set_ylim(-0.04 * high, 1.06 * high)


def _isolated(values: np.ndarray) -> np.ndarray:
    """Which values have no measured neighbour, so that no line leads to them."""
    there = np.isfinite(values)
    padded = np.concatenate([[False], there, [False]])
    return there & ~padded[:-2] & ~padded[2:]


class _Course:
    """The points of a run, drawn into the panels of a sheet."""

    def __init__(self, sheet: Sheet, points: Sequence[Measurement], steps: np.ndarray) -> None:
        self.sheet, self.theme, self.points, self.steps = sheet, sheet.theme, points, steps

    def draw(self, panel: Axes, quantity: Quantity, order: str, index: int, *, several: bool) -> None:
        """Draw a quantity of one order, its error, and the quantity that belongs beside it."""
        colour = self.theme.series[index % len(self.theme.series)]
        marker = MARKERS[index % len(MARKERS)]
        values, error, beside = (
            data.column(self.points, order, name) for name in (quantity.name, f"{quantity.name}_se", quantity.beside)
        )
        # In a long run, only points that no line shows have a marker.
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
            key, text = (
                ("above", "above null: both minus their nulls") if above else ("null", "null: what chance alone gives")
            )
            self.sheet.key(key, text, **style)

    def draw_whole(self, panel: Axes, quantity: Quantity) -> None:
        """Draw a quantity of the whole model and its error; beside the loss, the training loss."""
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
        training = np.array([point.train_loss for point in self.points], dtype=float)
        if quantity.name == "loss" and np.isfinite(training).any():
            if np.isfinite(values).any():
                self.sheet.key("loss", "loss on the probe", color=colour, lw=1.5, marker="o", markersize=4)
            style: dict[str, Any] = {"color": self.theme.muted, "lw": 1.1, "ls": LINES[1]}
            panel.plot(
                self.steps, training, zorder=3, label="train_loss", marker="s", markersize=3,
                markevery=np.flatnonzero(_isolated(training)).tolist(), **style,
            )  # fmt: skip
            self.sheet.key("train_loss", "training loss", **style)

    def draw_rates(self, rates: Mapping[int, float], name: str, *, log: bool) -> None:
        """Draw learning rates by step in a strip under the first panel, within the range of the points."""
        from matplotlib.ticker import FixedFormatter, FixedLocator

        known = np.array(sorted(rates.items()), dtype=float)
        at = np.array([point.step for point in self.points], dtype=float)
        known = known[(known[:, 0] >= at.min()) & (known[:, 0] <= at.max())]
        if not len(known) or (np.diff(at) <= 0).any():
            return
        strip, panel = self.sheet.add_strip(0), self.sheet.panels[0]
        steps, values = np.interp(known[:, 0], at, self.steps), known[:, 1]
        _scale(strip, self.steps, name, log=log)
        marker = "o" if len(known) == 1 else ""
        strip.plot(steps, values, color=self.theme.ink, lw=1.2, marker=marker, markersize=3, label="learning rate")
        highest = float(values.max()) or 1.0
        strip.set(xlim=panel.get_xlim(), ylim=(min(0.0, float(values.min())) - 0.1 * highest, 1.15 * highest))
        strip.yaxis.set_major_locator(FixedLocator([0.0, highest]))
        digits, power = f"{highest:.2e}".split("e")
        strip.yaxis.set_major_formatter(FixedFormatter(["0", f"{float(digits):g}e{int(power)}"]))
        strip.set_ylabel("learning\nrate", fontsize=SMALL, labelpad=1)
        strip.tick_params(axis="y", labelsize=SMALL)
        strip.grid(color=self.theme.faint)
        strip.set_axisbelow(True)
        strip.tick_params(labelbottom=False)

    def _band(self, panel: Axes, values: np.ndarray, error: np.ndarray, colour: str) -> None:
        """Draw one standard error to either side, if it is known."""
        from matplotlib.patches import Patch

        if np.isfinite(error).any():
            band: dict[str, Any] = {"color": colour, "alpha": 0.25}
            panel.fill_between(
                self.steps, values - error, values + error, lw=0, zorder=2, label="standard error", **band
            )
            self.sheet.handles.setdefault("standard error", Patch(label="± 1 standard error", **band))

    def draw_reference(self, panel: Axes, name: str) -> None:
        """Draw what a quantity is compared with: the bound (optimality 1, distance 0), or the ceiling of complexity."""
        bounds = {"optimality": 1.0, "distance_to_bound": 0.0}
        ceilings = np.array([point.ceiling for point in self.points], dtype=float)
        if name in bounds:
            style: dict[str, Any] = {"color": self.theme.ink, "lw": 0.9, "ls": (0, (5, 3)), "label": "the bound"}
            panel.axhline(bounds[name], zorder=1.5, **style)
            self.sheet.key("bound", **style)
        elif name == "complexity" and np.isfinite(ceilings).any():
            style = {"color": self.theme.muted, "lw": 1.2, "ls": (0, (1, 1.6))}
            self.sheet.plot(panel, (self.steps, ceilings), "ceiling", "ceiling", zorder=1.6, **style)

    def mark_missing(self, panel: Axes) -> None:
        """Mark each point that could not be measured by a cross at the bottom."""
        absent = self.steps[[not point.orders for point in self.points]]
        if len(absent):
            marker = "x" if len(absent) <= _FEW_MISSING else "|"
            style: dict[str, Any] = {"ls": "", "marker": marker, "color": self.theme.alarm, "markersize": 4.5}
            at = np.full(len(absent), 0.03)
            panel.plot(absent, at, transform=panel.get_xaxis_transform(), zorder=5, label="missing", **style)
            self.sheet.key("missing", f"not measured ({len(absent):,})", **style)

    def shade(self, panel: Axes, phases: Phases) -> None:
        """Shade the background by phase."""
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
