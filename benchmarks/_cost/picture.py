"""One figure of what cost.py has found, from its JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _cost.counts import Constant
from _cost.sides import BINS, BOTH, EVALUATION, LOGITS, OPTIONS, ORDERS, SIDES, TRUNK
from _cost.tables import clock, limit, median_ratio, merged, ratios
from ib_callback.plot.theme import DPI, MARKERS, SMALL, drawing, theme_of

THEME = theme_of("light")
Group = Mapping[str, Any]
Draw = Callable[[Any], None]


def draw_parts(parts: Mapping[str, Any], file: Path) -> None:
    """Sides as bars on the left, cost against everything else on the right; only what there is.

    Raises:
        ImportError: Matplotlib is not installed.
        SystemExit: the file has nothing that can be drawn.
    """
    tables = merged(parts)
    small: list[Draw] = []
    if "models" in tables:
        groups = list(tables["models"].values())
        small.append(lambda panel: _by_group(panel, groups, "parameters", "parameters of the model"))
    for part, sides, label in (("bins", BINS, "bins"), ("orders", ORDERS, "n-gram orders")):
        if part in tables:
            found = list(tables[part].values())
            small.append(lambda panel, found=found, sides=sides, label=label: _by_side(panel, found, sides, label))
    if "probe" in tables:
        probes = list(tables["probe"].values())
        small.append(lambda panel: _seconds(panel, probes))
    if "ranks" in tables:
        shared = list(tables["ranks"].values())
        small.append(lambda panel: _ranks(panel, shared))
    if "theirs" in tables:
        theirs = list(tables["theirs"].values())
        small.append(lambda panel: _theirs(panel, theirs))
    if "mmlu" in parts:
        small.append(lambda panel: _mmlu(panel, parts["mmlu"]))
    if "share" in parts:
        small.append(lambda panel: _share(panel, parts["share"]))
    bars = list(tables.get("sides", {}).values())
    if not small and not bars:
        raise SystemExit("nothing to draw")
    with drawing(THEME, "the picture"):
        from matplotlib.figure import Figure

        columns = 1 if len(small) < 2 else 2
        rows = max(1, -(-len(small) // columns))
        most = max((len(group["sides"]) for group in bars), default=0)
        height = max(2.7 * rows, 0.32 * most * max(1, 0.6 * len(bars)) + 1.2)
        figure = Figure(figsize=(6.2 * bool(bars) + 3.7 * columns * bool(small), height), dpi=DPI, layout="constrained")
        ratios_of_width = ([1.6] if bars else []) + [1.0] * columns * bool(small)
        grid = figure.add_gridspec(rows, len(ratios_of_width), width_ratios=ratios_of_width)
        if bars:
            _bars(figure.add_subplot(grid[:, 0]), bars)
        for index, draw in enumerate(small):
            draw(figure.add_subplot(grid[index // columns, bool(bars) + index % columns]))
        figure.savefig(file)


def _bars(panel: Any, groups: Sequence[Group]) -> None:
    """Sides of all models, in forwards of the trunk; a short line is what a side is held to."""
    there = {name for group in groups for name in group["sides"]}
    names = [name for name in (LOGITS, EVALUATION, *SIDES, *OPTIONS) if name in there]
    thick = 0.8 / len(groups)
    for number, group in enumerate(groups):
        colour = THEME.series[number % len(THEME.series)]
        for place, name in enumerate(names):
            found = ratios(group["sides"].get(name, {}), TRUNK, clock(group))
            if not found:
                continue
            y, middle = place + (number - (len(groups) - 1) / 2) * thick, statistics.median(found)
            panel.barh(y, middle, 0.9 * thick, color=colour, alpha=0.75)
            panel.plot([min(found), max(found)], [y, y], color=THEME.ink, linewidth=1)
            panel.annotate(
                f"{middle:.2f}", (max(found), y), (4, 0), textcoords="offset points", va="center", fontsize=SMALL,
                color=THEME.muted,
            )  # fmt: skip
            bar = limit(group, name)
            of_trunk = None if bar is None else median_ratio(group, bar[1]) if bar[1] != TRUNK else 1.0
            if bar is not None and of_trunk is not None:
                ends = [y - thick / 2, y + thick / 2]
                panel.plot([bar[0] * of_trunk] * 2, ends, color=THEME.alarm, linewidth=2)
    panel.axvline(1.0, color=THEME.ink, linewidth=0.8, linestyle=":")
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.4 + 0.45 * (len(groups) + 1), -0.6)  # room for the legend below the last bar
    panel.set_xlim(0, 1.06 * panel.get_xlim()[1])  # and for the last number
    panel.set_xlabel("forwards of the trunk")
    panel.set_title("A measurement and what it is compared with")
    handles = [
        _key(THEME.series[number % len(THEME.series)], "s", _short(group)) for number, group in enumerate(groups)
    ]
    handles += [_key(THEME.alarm, "|", "held to (at 128 x 512 on a CPU, 16 x 512 on a GPU)")]
    panel.legend(handles=handles, loc="lower right", frameon=False)


def _by_group(panel: Any, groups: Sequence[Group], x: str, label: str) -> None:
    for number, name in enumerate(BOTH):
        points = sorted((group[x], ratios(group["sides"].get(name, {}), TRUNK, clock(group))) for group in groups)
        _line(panel, [(at, found) for at, found in points if found], number, name)
    _axes(panel, label, log=True, title="By size of the model")
    ticks = sorted({group[x] for group in groups})
    panel.set_xticks(ticks, [f"{tick / 1e6:,.0f} M" for tick in ticks])


def _by_side(panel: Any, groups: Sequence[Group], sides: Mapping[str, Any], label: str) -> None:
    for number, group in enumerate(groups):
        points = [(side.x, ratios(group["sides"].get(name, {}), TRUNK, clock(group))) for name, side in sides.items()]
        _line(panel, [(at, found) for at, found in points if found], number, f"{_short(group)}, loss=False")
    ticks = [side.x for side in sides.values()]
    _axes(panel, label, log=max(ticks) > 10, title=f"By {label}")
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _seconds(panel: Any, groups: Sequence[Group]) -> None:
    for model, name in sorted({(group["model"], name) for group in groups for name in (TRUNK, *BOTH)}):
        points = sorted(
            (group["sequences"], group["sides"][name][clock(group)])
            for group in groups
            if group["model"] == model and name in group["sides"]
        )
        number = len(panel.lines)
        _line(panel, points, number, name if len({group["model"] for group in groups}) == 1 else f"{model}, {name}")
    panel.set_yscale("log")
    _axes(panel, "sequences of the probe", log=True, y="seconds", title="By size of the probe")
    ticks = sorted({group["sequences"] for group in groups})
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])


def _ranks(panel: Any, groups: Sequence[Group]) -> None:
    for group in groups:
        several = "" if len(groups) == 1 else f"{group['model']}, "
        for what in ("slowest", "all together"):
            points = []
            for name, record in group["sides"].items():
                one = next(iter(record["against"]))
                top = record["total"] if what == "all together" else record[clock(group)]
                below = record["against"][one]["cpu" if what == "all together" else clock(group)]
                points.append((int(name.split()[0]), [a / b for a, b in zip(top, below, strict=True)]))
            _line(panel, points, len(panel.lines), several + what)
    _axes(panel, "processes", y="time of one process", title="Shared by processes")
    panel.set_xticks(sorted({int(name.split()[0]) for group in groups for name in group["sides"]}))


def _theirs(panel: Any, groups: Sequence[Group]) -> None:
    group = groups[0]
    names = list(group["sides"])
    for place, name in enumerate(names):
        found = ratios(group["sides"][name], TRUNK, clock(group))
        panel.barh(place, statistics.median(found), color=THEME.series[0], alpha=0.75)
        panel.annotate(
            f"{statistics.median(found):.2f}", (statistics.median(found), place), (3, 0), textcoords="offset points",
            va="center", fontsize=SMALL, color=THEME.muted,
        )  # fmt: skip
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    _axes(panel, "forwards of the trunk", y="", title=f"LLMInferrer, {_short(group)}")


def _mmlu(panel: Any, found: Mapping[str, Any]) -> None:
    rows = found["rows"]
    for place, row in enumerate(rows):
        share = 100 * row["by_count"]
        panel.barh(place, share, color=THEME.series[2], alpha=0.75)
        panel.annotate(
            f"{share:.2g} %", (share, place), (3, 0), textcoords="offset points", va="center", fontsize=SMALL,
            color=THEME.muted,
        )  # fmt: skip
    panel.set_yticks(range(len(rows)), [f"{row['shots']}-shot,\n{row['way']}" for row in rows], fontsize=SMALL)
    panel.invert_yaxis()
    panel.margins(x=0.18)
    _axes(panel, "a measurement's tokens, % of MMLU's", y="", title="Beside MMLU (counted, not run)")


def _share(panel: Any, found: Mapping[str, Any]) -> None:
    for style, table in zip(("-", ":"), found["tables"], strict=False):
        constant = Constant(**table["ratio"])
        ratio = f"{constant.value:.2f} ({constant.origin})"
        models = list(dict.fromkeys(row["model"] for row in table["rows"]))
        for number, model in enumerate(models):
            rows = [row for row in table["rows"] if row["model"] == model]
            panel.plot(
                [row["gpus"] for row in rows], [100 * row["share"] for row in rows], linestyle=style, markersize=4,
                marker=MARKERS[number], color=THEME.series[number], label=f"{model}, {ratio}",
            )  # fmt: skip
    panel.set_yscale("log")
    _axes(panel, "GPUs", log=True, y="% of training time", title="Share of training time (arithmetic)")
    ticks = sorted({row["gpus"] for table in found["tables"] for row in table["rows"]})
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])


def _line(panel: Any, points: Sequence[tuple[float, Sequence[float]]], number: int, label: str) -> None:
    """Medians joined by a line, with the range of the rounds."""
    if points:
        x, middle = [at for at, _ in points], [statistics.median(found) for _, found in points]
        reach = [[abs(m - end(found)) for m, (_, found) in zip(middle, points, strict=True)] for end in (min, max)]
        panel.errorbar(
            x, middle, reach, color=THEME.series[number % len(THEME.series)], marker=MARKERS[number % len(MARKERS)],
            markersize=4, linewidth=1.2, elinewidth=0.8, label=label,
        )  # fmt: skip


def _axes(panel: Any, label: str, *, log: bool = False, y: str = "forwards of the trunk", title: str = "") -> None:
    if log:
        panel.set_xscale("log")
        panel.minorticks_off()
    panel.set_xlabel(label)
    panel.set_ylabel(y)
    panel.set_title(title)
    panel.grid(visible=True, color=THEME.faint)
    panel.set_axisbelow(True)
    if labels := panel.get_legend_handles_labels()[1]:
        # Room above the lines.
        low, high = panel.get_ylim()
        room = 0.12 * len(labels) + 0.05
        if panel.get_yscale() == "log":
            panel.set_ylim(low, high * (high / low) ** room)
        else:
            low = min(low, 0.97) if y == "forwards of the trunk" else 0.0
            panel.set_ylim(low, high + room * (high - low))
        panel.legend(fontsize=SMALL, frameon=False, loc="upper left")


def _key(colour: str, marker: str, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker=marker, markersize=8, markeredgewidth=2, linestyle="", label=label)


def _short(group: Group) -> str:
    return f"{group['model']}, {group['sequences']} x {group['length']}, {group['device']}"
