"""How figures look: light and dark themes whose colours the colour-blind can tell apart, and labels beside points."""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ib_callback.common.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ThemeName = Literal["light", "dark"]
DPI = 150
FONT = 9.0
SMALL = 7.5
# Width of a character as a share of the font size. Texts must be placed before they are drawn.
CHARACTER = 0.56
INCH = 72.0  # in points

# Markers and lines can be told apart without colour.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
# Directions from a point to its label, the best first. There is most room below the diagonal.
_ANGLES = [math.radians(-45 + turn) for turn in (0, 30, -30, 60, -60, 90, -90, 120, -120, 150, -150, 180)]
# Dots nearer than this look like one, in points (1/72 inch).
_APART = 7.0
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1.5, 1.5, 1.5)))


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of one theme.

    Attributes:
        paper: behind everything.
        ink: texts, axes and the diagonal.
        muted: less important lines and texts.
        faint: grid lines.
        alarm: notes that numbers cannot be compared.
        bound: the IB curve.
        series: colours of runs or orders, from Okabe and Ito, without those that the paper would hide.
        steps: the part of viridis that colours steps. The paper would hide the rest.
        hatch: strokes across the initial phase.
        phases: fills of the initial, fitting, compression and memorising phase, each of another lightness.
    """

    name: str
    paper: str
    ink: str
    muted: str
    faint: str
    alarm: str
    bound: str
    series: tuple[str, ...]
    steps: tuple[float, float]
    hatch: str
    phases: tuple[str, str, str, str]


_THEMES = {
    "light": Theme(
        name="light", paper="#ffffff", ink="#262626", muted="#737373", faint="#e4e4e4", alarm="#b03a00",
        bound="#cc3d8a",
        series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#262626"),
        steps=(0.0, 0.92), hatch="#cdcdcd", phases=("#e2e2e2", "#ffffff", "#f1efdc", "#f3dcd8"),
    ),
    "dark": Theme(
        name="dark", paper="#16191d", ink="#e8e8e8", muted="#9a9a9a", faint="#30353b", alarm="#ff9d66",
        bound="#ff8ac4",
        series=("#56b4e9", "#e69f00", "#2fc79a", "#e39fc6", "#f0e442", "#ff7f3f", "#ffffff"),
        steps=(0.35, 1.0), hatch="#4b535c", phases=("#343a41", "#16191d", "#262a1f", "#3a2624"),
    ),
}  # fmt: skip


def theme_of(name: str) -> Theme:
    """The theme with this name.

    Raises:
        ValueError: there is no such theme.

    >>> theme_of("dark").paper
    '#16191d'
    """
    if name not in _THEMES:
        raise ValueError(f"theme: expected one of {', '.join(_THEMES)}, got {name!r}")
    return _THEMES[name]


@contextmanager
def drawing(theme: Theme, purpose: str) -> Iterator[None]:
    """Use Matplotlib's defaults and the theme within the context, and restore the user's settings afterwards.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    style = require("matplotlib.style", extra="plot", purpose=purpose)
    require("matplotlib.figure", extra="plot", purpose=purpose)
    with style.context(["default", _settings(theme)]):
        yield


def _settings(theme: Theme) -> dict[str, Any]:
    ink = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"), theme.ink
    )
    paper = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), theme.paper)
    return {
        **ink,
        **paper,
        "font.size": FONT,
        "axes.titlesize": FONT + 1,
        "axes.linewidth": 0.7,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        "xtick.labelsize": FONT - 0.5,
        "ytick.labelsize": FONT - 0.5,
        "legend.fontsize": FONT - 0.5,
        "axes.grid": False,
        "grid.color": theme.faint,
        "grid.linewidth": 0.6,
        "hatch.linewidth": 0.5,
        "path.simplify_threshold": 0.3,
    }


def shortened_alike(names: Sequence[str], most: int) -> list[str]:
    """Shorten names to at most `most` characters each.

    Words are separated by "/" or ".". Words with which all names begin are removed. If a name is too long, so are
    words with which all names end. No name then begins with a number.

    >>> shortened_alike(["runs/a-long-name/version_1/csv", "runs/a-long-name/version_22/csv"], 16)
    ['version_1', 'version_22']
    >>> shortened_alike(["model.layers.0", "model.layers.1"], 16)
    ['layers.0', 'layers.1']
    """
    parts = [re.split(r"(?<=[/.])", name) for name in names]
    ahead = _in_common(parts)
    if any(p[ahead][:1].isdigit() for p in parts):
        ahead = max(0, ahead - 1)
    too_long = any(len(name) > most for name in names)
    behind = _in_common([p[ahead:][::-1] for p in parts]) if too_long else 0
    return [shortened("".join(p[ahead : len(p) - behind]).rstrip("/."), most) for p in parts]


def _in_common(parts: Sequence[Sequence[str]]) -> int:
    """Number of parts with which all lists begin, fewer than the shortest list has; 0 for a single list."""
    fewest = min(map(len, parts)) - 1 if len(parts) > 1 else 0
    return next((i for i in range(fewest) if len({p[i] for p in parts}) > 1), fewest)


def shortened(name: str, most: int) -> str:
    """Shorten a name to at most `most` characters: its beginning and its end, which tell names apart.

    >>> shortened("a-very-long-name-of-a-run-seed-3", 16)
    'a-very-l…-seed-3'
    """
    return name if len(name) <= most else f"{name[: most // 2]}…{name[len(name) - (most - most // 2 - 1) :]}"


def place_labels(
    panel: Axes, labels: Sequence[tuple[float, float, str, str]], obstacles: Any, *, inches: float, theme: Theme
) -> None:
    """Write labels beside their points. Each hides as few points as possible; a label without room is left out.

    Args:
        panel: a panel with final limits.
        labels: x, y, text and colour of each label.
        obstacles: x and y of what should stay visible, [points, 2]; NaN is ignored.
        inches: approximate side of the square panel.
        theme: decides the colours of halo and leader line.
    """
    import numpy as np

    low, high = np.array([panel.get_xlim(), panel.get_ylim()]).T
    side = inches * INCH
    scale = side / (high - low)
    dots = (np.asarray(obstacles, dtype=float).reshape(-1, 2) - low) * scale
    others = dots[np.isfinite(dots).all(axis=1)]
    # The diagonal is an obstacle too.
    along = np.linspace(0, side, 60)
    dots = np.concatenate([dots, np.stack([along, along + (low[0] - low[1]) * scale[1]], axis=1)])
    taken: list[tuple[Any, Any]] = []
    for x, y, text, colour in labels:
        apart = np.hypot(*(others - (np.array([x, y]) - low) * scale).T) > _APART
        half = np.array([len(text) * CHARACTER * SMALL, SMALL * 1.3]) / 2 + 1
        places = []
        for distance, (rank, angle) in itertools.product((8.0, 18.0, 30.0, 45.0), enumerate(_ANGLES)):
            centre = (np.array([x, y]) - low) * scale + (distance + half) * (math.cos(angle), math.sin(angle))
            box = centre - half, centre + half
            if (box[0] < 0).any() or (box[1] > side).any() or any(_overlap(box, other) for other in taken):
                continue
            hidden = ((dots > box[0]) & (dots < box[1])).all(axis=1).sum()
            # A label that is nearer to another point than to its own would be read as the label of that point.
            gaps = np.hypot(*np.maximum(np.maximum(box[0] - others, others - box[1]), 0.0).T)
            strange = ((gaps < distance) & apart).any()
            places.append((4.0 * hidden + 3.0 * strange + 0.15 * distance + 0.3 * rank, distance, centre, box))
        if not places:
            continue
        _, distance, centre, box = min(places, key=operator.itemgetter(0))
        taken.append(box)
        # A box instead of outlined letters, which vector files would not store as text.
        halo = {"facecolor": theme.paper, "edgecolor": "none", "alpha": 0.7, "pad": 0.6}
        leader = {"arrowstyle": "-", "lw": 0.6, "shrinkA": 0, "shrinkB": 2.5, "color": colour}
        panel.annotate(
            text, xy=(x, y), xytext=low + centre / scale, textcoords="data", ha="center", va="center", fontsize=SMALL,
            color=colour, zorder=9, gid="direct label", arrowprops=leader if distance > 8 else None, bbox=halo,
        )  # fmt: skip


def _overlap(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    """Whether two boxes overlap. Each box is its lower left and its upper right corner."""
    return bool((a[0] < b[1]).all() and (b[0] < a[1]).all())
