"""One plane of a run with words in it, for readers who see an information plane for the first time, and the loss."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ib_callback.plot import data
from ib_callback.plot.frame import mark_better
from ib_callback.plot.planes import Plane, planes_of
from ib_callback.plot.theme import CHARACTER, DPI, FONT, INCH, SMALL, Theme, ThemeName, drawing, theme_of
from ib_callback.results.measurement import Measurement
from ib_callback.results.phases import Phase, Phases

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The plane on which phases are read comes first, then what else may have been measured.
_PREFERRED = ("readout", "prediction", "local", "plain")
# In inches.
_WIDTH, _HEIGHT, _HEAD, _LINE = 8.0, 3.95, 0.16, 0.16
_PLANE, _LOSS = (0.88, 0.66, 4.62, 3.2), (6.22, 0.66, 1.62, 3.2)
# A collapse: before the fit, complexity falls by more than this share, as for the phases.
_COLLAPSE = 1 / 3
_WORDS = {
    Phase.FITTING: "fitting{since}:\nit learns about both",
    Phase.COMPRESSION: "compression{since}:\nit drops some of the past\nand keeps the future",
    Phase.MEMORISING: "memorising{since}:\nthe held-out loss rises",
}
_DISTANCES = (7.0, 13.0, 20.0, 30.0, 42.0, 56.0)
# Up to this distance, in points, a text needs no line to its place.
_BESIDE = 13.0
_DIRECTIONS = 16
# Where the direction of training is shown, as shares of the length of the course.
_ARROWS = (0.22, 0.5, 0.72)


@dataclass(frozen=True)
class _Label:
    """Words that belong to a place in the panel.

    Attributes:
        at: the place, [2].
        text: the words, in one or more lines.
        colour: colour of the words.
        size: size of the font.
    """

    at: np.ndarray
    text: str
    colour: str
    size: float = FONT


def annotated_plane(
    measurements: Measurement | Iterable[Measurement], *, theme: ThemeName = "light", title: str | None = None
) -> Figure:
    """Draw one plane of a run with words in it, and the loss beside it.

    The picture names the bound, the better direction, the untrained model, the collapse, the trained model and the
    phases. Each phase has its own colour. The picture shows the primary order on one plane. This is the readout plane,
    on which phases are found. Without a readout plane it is the first of prediction, local and plain that was measured.
    Arrowheads show the direction of training. Points that could not be measured are left out, and a line above the
    panels counts them.

    Args:
        measurements: a trajectory, or any other measurements in the order of training, or a single one.
        theme: "light" or "dark".
        title: title of the whole figure.

    Returns:
        A new figure, 8 inches wide at 150 dots per inch, which is readable at 800 pixels. Both axes are fractions of
        log(num_bins). There is a panel of the loss if the loss was measured.

    Raises:
        ValueError: there is no point to draw, or the theme is unknown.
        TypeError: an argument is not a measurement.
        ImportError: Matplotlib is not installed.
    """
    points, left_out = data.placed(data.given(measurements))
    look = theme_of(theme)
    order = data.primary_of(points)
    known = {plane.name: plane for plane in planes_of(points, [order], None)}
    plane = next(known[name] for name in _PREFERRED if name in known)
    found = data.phases_of(measurements, points)
    table = plane.values(points, order)
    keep = np.isfinite(table).all(axis=1)
    drawn = [point for point, there in zip(points, keep, strict=True) if there]
    phases = [None if found is None else found.phases[index] for index in np.flatnonzero(keep)]
    with drawing(look, "Drawing the annotated plane"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        notes = [(note.text, look.alarm if note.alarm else look.muted) for note in data.notes_of_run(points) + left_out]
        head = [(line, colour, SMALL) for text, colour in notes for line in _wrapped(text)]
        head = [*([(title, look.ink, FONT + 2)] if title else []), *head]
        height = _HEIGHT + _LINE * len(head) + (0.08 if head else 0.0)
        figure = Figure(figsize=(_WIDTH, height), dpi=DPI)
        FigureCanvasAgg(figure)
        for line, (text, colour, size) in enumerate(head):
            top = 1 - (0.08 + _LINE * line) / height
            figure.text(0.015, top, text, ha="left", va="top", color=colour, fontsize=size, gid="note")
        losses = np.array([math.nan if point.loss is None else point.loss for point in points])
        has_loss = bool(np.isfinite(losses).any())
        widest = (*_PLANE[:2], _PLANE[2] if has_loss else _WIDTH - _PLANE[0] - 0.2, _PLANE[3])
        _draw_plane(_panel(figure, widest), look, plane, table[keep], drawn, phases, found)
        if has_loss:
            _draw_loss(_panel(figure, _LOSS), look, points, losses, found)
    return figure


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, int((_WIDTH - 0.3) * INCH / (CHARACTER * SMALL)), break_on_hyphens=False)


def _panel(figure: Figure, inches: tuple[float, float, float, float]) -> Axes:
    width, height = figure.get_size_inches()
    left, bottom, across, up = inches
    panel = figure.add_axes((left / width, bottom / height, across / width, up / height))
    panel.grid(color=figure.axes[0].xaxis.label.get_color(), alpha=0.1)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    return panel


def _colours(look: Theme) -> dict[Phase | None, str]:
    return {
        None: look.series[0], Phase.INITIAL: look.muted, Phase.FITTING: look.series[0],
        Phase.COMPRESSION: look.series[1], Phase.MEMORISING: look.bound,
    }  # fmt: skip


def _draw_plane(
    panel: Axes, look: Theme, plane: Plane, course: np.ndarray, points: Sequence[Measurement],
    phases: Sequence[Phase | None], found: Phases | None,
) -> None:  # fmt: skip
    kind = f"{'local ' if plane.is_local else ''}{{}}, {plane.name} plane"
    panel.set_xlabel(f"information about the preceding context\n{kind.format('complexity')} {data.unit(points)}")
    panel.set_ylabel(f"information about the following context\n{kind.format('expressivity')}")
    _limit(panel, course)
    low, high = np.array([panel.get_xlim(), panel.get_ylim()]).T
    panel.axline((0, 0), slope=1, color=look.ink, lw=1.2, ls=(0, (5, 3)), zorder=1.5, label="diagonal")
    colours = _colours(look)
    for (begin, end), phase in zip(itertools.pairwise(course), phases, strict=False):
        panel.plot(
            *np.stack([begin, end], axis=1), color=colours[phase], lw=1.8, zorder=3, label="course", scalex=False,
            scaley=False, solid_capstyle="round",
        )  # fmt: skip
    x, y = course.T
    panel.scatter(x, y, s=9, c=[colours[phase] for phase in phases], zorder=4, linewidths=0, label="measured")
    _arrows(panel, course, look)
    mark_better(panel, look, course)
    labels = _names(course, points, phases, found, look)
    for label in labels:
        panel.plot(*label.at[:, None], "o", color=look.ink, markersize=6.5, zorder=5, label="named")
    labels += _phase_words(course, phases, found, colours)
    if plane.is_local:
        panel.plot([0], [0], "x", color=look.muted, markersize=7, markeredgewidth=1.6, zorder=4, label="chance")
        labels.append(_Label(np.zeros(2), "chance: no information", look.muted, SMALL))
    along = np.linspace(max(low), min(high), 60)
    bound = np.stack([along, along], axis=1)
    words = _name_bound(panel, look)
    better = low + np.array([(x, y) for x in np.linspace(0.84, 0.98, 6) for y in (0.03, 0.08, 0.13)]) * (high - low)
    _write(panel, look, labels, np.concatenate([_dense(course), bound, words, better]))


def _arrows(panel: Axes, course: np.ndarray, look: Theme) -> None:
    """Draw arrowheads along the course, which show the direction of training."""
    scale = _pixels(panel)
    steps = np.diff(course, axis=0)
    lengths = np.hypot(*(steps * scale).T)
    if not lengths.sum() > 0:
        return
    ends = lengths.cumsum()
    for index in dict.fromkeys(int(np.searchsorted(ends, share * ends[-1])) for share in _ARROWS):
        middle = course[index] + 0.5 * steps[index]
        tip = middle + 3.5 * steps[index] / lengths[index]
        style = {"arrowstyle": "-|>,head_length=0.5,head_width=0.28", "color": look.ink, "lw": 0, "shrinkA": 0}
        panel.annotate(
            "",
            xy=tuple(tip),
            xytext=tuple(middle),
            arrowprops={**style, "shrinkB": 0, "mutation_scale": 12},
            zorder=3.5,
        ).set_label("arrow")


def _limit(panel: Axes, course: np.ndarray) -> None:
    """Set limits with room for the words: from 0 where the numbers allow it, and nearly half more above the course."""
    from matplotlib.ticker import MaxNLocator

    least, most = course.min(axis=0), course.max(axis=0)
    least = np.where(least >= 0, 0.0, least)
    span = np.where(most > least, most - least, 1.0)
    panel.set_xlim(least[0] - 0.03 * span[0], least[0] + 1.12 * span[0])
    panel.set_ylim(least[1] - 0.05 * span[1], least[1] + 1.45 * span[1])
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    panel.ticklabel_format(useOffset=False)


def _dense(course: np.ndarray) -> np.ndarray:
    """The course with places between its points, so that words avoid its lines too."""
    if len(course) < 2:
        return course
    pieces = [np.linspace(begin, end, 12) for begin, end in itertools.pairwise(course)]
    return np.concatenate(pieces)


def _name_bound(panel: Axes, look: Theme) -> np.ndarray:
    """Name the diagonal, and return the places that the words cover, [places, 2]."""
    low, high = np.array([panel.get_xlim(), panel.get_ylim()]).T
    begin, end = max(low), min(high)
    if end <= begin:
        return np.zeros((0, 2))
    at = begin + 0.62 * (end - begin)
    scale = _pixels(panel)
    angle = math.degrees(math.atan2(scale[1], scale[0]))
    panel.annotate(
        "the bound: both are equal", xy=(at, at), xytext=(-3, 3), textcoords="offset points",
        rotation=angle, rotation_mode="anchor", ha="center", va="bottom", color=look.ink, fontsize=SMALL + 0.5,
        zorder=2,
    ).set_label("name of the bound")  # fmt: skip
    along = begin + np.linspace(0.1, 1.0, 40) * (end - begin)
    beside = np.stack([along, along], axis=1)
    return np.concatenate([beside + np.array([-shift, shift]) * DPI / INCH / scale for shift in (4.0, 9.0)])


def _pixels(panel: Axes) -> np.ndarray:
    """Pixels for a unit of each axis, [2]."""
    corners = panel.transData.transform([(0.0, 0.0), (1.0, 1.0)])
    return np.asarray(corners[1] - corners[0])


def _names(
    course: np.ndarray, points: Sequence[Measurement], phases: Sequence[Phase | None], found: Phases | None, look: Theme
) -> list[_Label]:
    """Labels for the untrained model, the bottom of the collapse and the trained model, if the run has them."""
    if len(points) < 2:
        step = points[0].step
        return [_Label(course[0], "measured" if step is None else f"step {step:,}", look.ink)]
    labels = []
    if points[0].step == 0:
        labels.append(_Label(course[0], data.start_label(points) or "step 0", look.ink))
    collapse = _collapse(course, phases)
    if collapse is not None:
        labels.append(_Label(course[collapse], f"collapse, step {points[collapse].step:,}", look.ink))
    last = points[-1].step
    name = "last point" if last is None else f"step {last:,}"
    has_learned = found is None or found.trained or found.fit_start is not None
    labels.append(_Label(course[-1], f"trained, {name}" if has_learned else name, look.ink))
    return labels


def _collapse(course: np.ndarray, phases: Sequence[Phase | None]) -> int | None:
    """Position of the lowest complexity before the model fits; None without a collapse."""
    initial = [index for index, phase in enumerate(phases) if phase == Phase.INITIAL]
    if not initial:
        return None
    # The fit begins at the lowest point of the collapse.
    until = min(initial[-1] + 2, len(course))
    lowest = int(np.argmin(course[:until, 0]))
    has_fallen = course[lowest, 0] < (1 - _COLLAPSE) * course[: lowest + 1, 0].max()
    return lowest if has_fallen and 0 < lowest < len(course) - 1 else None


def _phase_words(
    course: np.ndarray, phases: Sequence[Phase | None], found: Phases | None, colours: dict[Phase | None, str]
) -> list[_Label]:
    """Labels that say what happens in each phase after the first, at the middle of the phase."""
    if found is None:
        return []
    since = {
        Phase.FITTING: found.fit_start,
        Phase.COMPRESSION: found.compression_start,
        Phase.MEMORISING: found.memorising_start,
    }
    labels = []
    for phase, words in _WORDS.items():
        mine = [index for index, each in enumerate(phases) if each == phase]
        if mine:
            begin = since[phase]
            text = words.format(since="" if begin is None else f" from step {begin:,}")
            stretch = course[mine[0] : mine[-1] + 2]
            lengths = np.concatenate([[0.0], np.hypot(*np.diff(stretch, axis=0).T).cumsum()])
            middle = stretch[int(np.searchsorted(lengths, 0.5 * lengths[-1]))]
            labels.append(_Label(middle, text, colours[phase], FONT - 0.5))
    return labels


def _write(panel: Axes, look: Theme, labels: Sequence[_Label], obstacles: np.ndarray) -> None:
    """Write labels beside their places, where they hide the least; a label without room is left out."""
    origin = panel.transData.transform([(panel.get_xlim()[0], panel.get_ylim()[0])])[0]
    inverse = panel.transData.inverted()
    room = np.array([panel.bbox.width, panel.bbox.height])
    dots = panel.transData.transform(obstacles) - origin
    point = DPI / INCH
    marks = panel.transData.transform(np.stack([label.at for label in labels])) - origin
    taken: list[tuple[np.ndarray, np.ndarray]] = []
    # The longest texts find the least room, so they come first.
    for label, mark in sorted(zip(labels, marks, strict=True), key=lambda pair: -pair[0].text.count("\n")):
        lines = label.text.split("\n")
        size = np.array([max(map(len, lines)) * CHARACTER * 0.95, 1.25 * len(lines)]) * label.size
        half = (size / 2 + 1) * point
        places = []
        for distance, turn in itertools.product(_DISTANCES, range(_DIRECTIONS)):
            angle = 2 * math.pi * turn / _DIRECTIONS
            way = np.array([math.cos(angle), math.sin(angle)])
            centre = mark + way * (distance * point + half)
            box = centre - half, centre + half
            if (box[0] < 2).any() or (box[1] > room - 2).any() or any(_meet(box, other) for other in taken):
                continue
            hidden = ((dots > box[0]) & (dots < box[1])).all(axis=1).sum()
            covered = ((marks > box[0] - 6) & (marks < box[1] + 6)).all(axis=1).sum()
            line = mark + np.linspace(0, 1, 20)[:, None] * (centre - mark)
            crossed = sum(((line > other[0]) & (line < other[1])).all(axis=1).any() for other in taken)
            cost = 2.0 * hidden + 20.0 * covered + 40.0 * crossed + 0.3 * distance
            places.append((cost, distance, centre, box))
        if not places:
            continue
        _, distance, centre, box = min(places, key=operator.itemgetter(0))
        taken.append(box)
        if distance > _BESIDE:
            dots = np.concatenate([dots, mark + np.linspace(0, 1, 20)[:, None] * (centre - mark)])
        leader = {"arrowstyle": "-", "lw": 0.7, "shrinkA": 0, "shrinkB": 3, "color": label.colour}
        halo = {"facecolor": look.paper, "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
        panel.annotate(
            label.text, xy=tuple(label.at), xytext=tuple(inverse.transform(centre + origin)), ha="center", va="center",
            fontsize=label.size, color=label.colour, zorder=9, gid="direct label", bbox=halo,
            arrowprops=leader if distance > _BESIDE else None,
        )  # fmt: skip


def _meet(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    return bool((a[0] < b[1]).all() and (b[0] < a[1]).all())


def _draw_loss(
    panel: Axes, look: Theme, points: Sequence[Measurement], losses: np.ndarray, found: Phases | None
) -> None:
    """The loss over the steps of training, in the colours of the phases."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    steps, name = data.numbered(points)
    there = np.flatnonzero(np.isfinite(losses))
    colours = _colours(look)
    phases = [None if found is None else found.phases[index] for index in there]
    course = np.stack([steps[there], losses[there]], axis=1)
    for (begin, end), phase in zip(itertools.pairwise(course), phases, strict=False):
        panel.plot(*np.stack([begin, end], axis=1), color=colours[phase], lw=1.8, label="loss", solid_capstyle="round")
    x, y = course.T
    panel.scatter(x, y, s=9, c=[colours[phase] for phase in phases], zorder=4, linewidths=0, label="measured loss")
    panel.set_xlabel(name)
    panel.text(
        0.1, 0.985, "loss on held-out text\n(nats a token)", fontsize=FONT, ha="left", va="top",
        transform=panel.transAxes,
    )  # fmt: skip
    panel.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: data.count_label(value, name)))
    panel.yaxis.set_major_locator(MaxNLocator(5))
    panel.margins(x=0.05)
    panel.set_ylim(top=panel.get_ylim()[1] + 0.2 * np.ptp(panel.get_ylim()))
