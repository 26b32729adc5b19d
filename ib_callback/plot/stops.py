"""Where rules would have stopped runs: loss and monitored metric over steps, with a line at each stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ib_callback.plot import data
from ib_callback.plot.sheet import Note, Sheet
from ib_callback.plot.theme import LINES, ThemeName, drawing, shortened_alike, theme_of
from ib_callback.results.measurement import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# With more runs the picture could not be read.
MOST_RUNS = 8
_LONGEST_NAME = 40


def stops_over_steps(
    runs: Mapping[str, Sequence[Measurement]],
    monitors: Mapping[str, str],
    stops: Mapping[str, Mapping[str, int | None]],
    *,
    x: str = "step",
    notes: Sequence[str] = (),
    theme: ThemeName = "light",
    title: str | None = None,
) -> Figure:
    """Draw the held-out loss and the monitored number, one row for each run, with a line where each rule stops it.

    Args:
        runs: points with steps, by name of the run; at most 8 runs.
        monitors: full name of the monitored number, by name of the run.
        stops: by name of the run and name of the rule, the step at which the rule stops; None: it does not stop.
        x: what the x-axis counts: "step", or "tokens" for the training tokens seen so far.
        notes: lines above the panels.
        theme: "light" or "dark".
        title: title of the whole figure.

    Raises:
        ValueError: no run or too many, one without a measured point, or tokens that are not known.
        ImportError: Matplotlib is not installed.
    """
    if not 0 < len(runs) <= MOST_RUNS:
        raise ValueError(f"expected 1 to {MOST_RUNS} runs to draw, got {len(runs)}. Draw fewer at a time")
    for points in runs.values():
        data.given(points)
    look = theme_of(theme)
    with drawing(look, "Drawing where runs would have been stopped"):
        sheet = Sheet(2 * len(runs), 2, size=(3.5, 2.1), theme=look, across=0.95, down=0.8)
        sheet.notes += [Note(text) for text in notes]
        rules = list(dict.fromkeys(rule for of_run in stops.values() for rule in of_run))
        for index, (name, points) in enumerate(runs.items()):
            steps, what = data.numbered(points, x)
            shown = shortened_alike(list(runs), _LONGEST_NAME)[index]
            loss = np.array([point.loss for point in points], dtype=float)
            monitored = np.array([point.scalars().get(monitors[name]) for point in points], dtype=float)
            at = {point.step: step for point, step in zip(points, steps, strict=True)}
            for panel, label, values in zip(
                sheet.panels[2 * index :], ("held-out loss\n(nats a token)", monitors[name]), (loss, monitored),
                strict=False,
            ):  # fmt: skip
                panel.plot(steps, values, color=look.ink, lw=1.3, marker="o", markersize=2.5, zorder=3, label="values")
                panel.set_ylabel(label)
                panel.set_title(shown, loc="left", fontsize=9)
                panel.grid(color=look.faint)
                panel.set_axisbelow(True)
                _label_steps(panel, what)
                for number, rule in enumerate(rules):
                    step = stops[name].get(rule)
                    style: dict[str, Any] = {"color": look.series[number % len(look.series)], "lw": 1.6}
                    style["ls"] = LINES[number % len(LINES)]
                    sheet.key(rule, f"stop by {rule}", **style)
                    if step is not None:
                        panel.axvline(at[step], zorder=2, label=rule, **style)
            never = [rule for rule in rules if stops[name].get(rule) is None]
            sheet.notes += [Note(f"{shown}: not stopped by {' and '.join(never)}.")] if never else []
        sheet.finish(title)
    return sheet.figure


def _label_steps(panel: Axes, what: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: data.count_label(value, what)))
    panel.set_xlabel(what)
