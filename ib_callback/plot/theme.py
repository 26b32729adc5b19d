"""How the figures look, light and dark: colours that the colour-blind tell apart, and labels beside points."""

from __future__ import annotations

import math
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
# Width of a character as a share of the font size, for texts that must be placed before they are drawn.
CHARACTER = 0.56
INCH = 72.0  # in points

# Told apart without colour as well.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1.5, 1.5, 1.5)))


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of one theme.

    Attributes:
        paper: behind everything.
        ink: texts, axes and the diagonal.
        muted: what is to be seen second.
        faint: grid lines.
        alarm: notes that forbid a comparison.
        bound: the IB curve.
        series: one for each run or order, after Okabe and Ito, without those too near the paper.
        steps: which part of viridis colours the steps; the rest would be lost on the paper.
        hatch: strokes across the initial phase.
        phases: fills of the initial, the fitting and the compression phase, of different lightness.
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
    phases: tuple[str, str, str]


_THEMES = {
    "light": Theme(
        name="light", paper="#ffffff", ink="#262626", muted="#737373", faint="#e4e4e4", alarm="#b03a00",
        bound="#cc3d8a",
        series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#262626"),
        steps=(0.0, 0.92), hatch="#cdcdcd", phases=("#e2e2e2", "#ffffff", "#f1efdc"),
    ),
    "dark": Theme(
        name="dark", paper="#16191d", ink="#e8e8e8", muted="#9a9a9a", faint="#30353b", alarm="#ff9d66",
        bound="#ff8ac4",
        series=("#56b4e9", "#e69f00", "#2fc79a", "#e39fc6", "#f0e442", "#ff7f3f", "#ffffff"),
        steps=(0.35, 1.0), hatch="#4b535c", phases=("#343a41", "#16191d", "#262a1f"),
    ),
}  # fmt: skip


def theme_of(name: str) -> Theme:
    """The theme of a name.

    Raises:
        ValueError: there is none.

    >>> theme_of("dark").paper
    '#16191d'
    """
    if name not in _THEMES:
        raise ValueError(f"theme: expected one of {', '.join(_THEMES)}, got {name!r}")
    return _THEMES[name]


@contextmanager
def drawing(theme: Theme, purpose: str) -> Iterator[None]:
    """Within it, Matplotlib's settings are its defaults and the theme; whatever the user has set is put back.

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
    """Names of at most so many characters each; if any is too long, what all have in common is left out first.

    >>> shortened_alike(["runs/a-long-name/version_1/csv", "runs/a-long-name/version_22/csv"], 16)
    ['version_1', 'version_22']
    """
    if len(names) > 1 and any(len(name) > most for name in names):
        parts = [re.split(r"(?<=[/_. -])", name) for name in names]
        fewest = min(map(len, parts))
        ahead = next((i for i in range(fewest) if len({p[i] for p in parts}) > 1), fewest - 1)
        behind = next((i for i in range(fewest - ahead) if len({p[-1 - i] for p in parts}) > 1), 0)
        # With the word before what differs, which says what it counts.
        names = ["".join(p[max(0, ahead - 1) : len(p) - behind]).rstrip("/_. -") for p in parts]
    return [shortened(name, most) for name in names]


def shortened(name: str, most: int) -> str:
    """A name of at most so many characters: its beginning and its end, which tell names apart.

    >>> shortened("a-very-long-name-of-a-run-seed-3", 16)
    'a-very-l…-seed-3'
    """
    return name if len(name) <= most else f"{name[: most // 2]}…{name[len(name) - (most - most // 2 - 1) :]}"


def place_labels(
    panel: Axes, labels: Sequence[tuple[float, float, str, str]], obstacles: Any, *, inches: float, theme: Theme
) -> None:
    """Write labels beside their points, each where it hides the fewest points; one without room is left out.

    Args:
        panel: with its final limits.
        labels: x, y, text, colour of each.
        obstacles: x and y of what should stay visible, [points, 2].
        inches: side of the square panel, approximately.
        theme: for the halo and the leader line.
    """
    import numpy as np

    (x0, x1), (y0, y1) = panel.get_xlim(), panel.get_ylim()
    scale = inches * INCH / np.array([x1 - x0, y1 - y0])
    dots = (np.asarray(obstacles, dtype=float).reshape(-1, 2) - (x0, y0)) * scale
    side = inches * INCH
    # The diagonal, near which many points lie, is an obstacle of its own.
    along = np.linspace(0, side, 60)
    dots = np.concatenate([dots, np.stack([along, along + (x0 - y0) * scale[1]], axis=1)])
    taken: list[tuple[float, float, float, float]] = []
    for x, y, text, colour in labels:
        at = (np.array([x, y]) - (x0, y0)) * scale
        width, height = len(text) * CHARACTER * SMALL, SMALL * 1.3
        best: tuple[float, Any, float, float, bool] | None = None
        for distance in (9.0, 18.0, 30.0, 45.0):
            for turn in range(12):
                # Below the diagonal is where the room is.
                angle = math.radians(-45 + 30 * ((turn + 1) // 2) * (1 if turn % 2 else -1))
                anchor = at + distance * np.array([math.cos(angle), math.sin(angle)])
                left = anchor[0] - (
                    width if math.cos(angle) < -0.3 else width / 2 if abs(math.cos(angle)) <= 0.3 else 0
                )
                below = anchor[1] - height / 2
                box = (left - 1, below - 1, left + width + 1, below + height + 1)
                inside = (
                    (dots[:, 0] > box[0]) & (dots[:, 0] < box[2]) & (dots[:, 1] > box[1]) & (dots[:, 1] < box[3])
                )  # fmt: skip
                cost = 4.0 * np.count_nonzero(inside) + 0.15 * distance + 0.3 * turn
                hides = any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken)
                hides = hides or box[0] < 0 or box[1] < 0 or box[2] > side or box[3] > side
                cost += 1e6 * hides
                if best is None or cost < best[0]:
                    best = (cost, box, left, below, hides)
        assert best is not None
        _, box, left, below, hides = best
        if hides:
            continue
        taken.append(box)
        centre = (left + width / 2, below + height / 2)
        away = math.dist(at, (min(max(at[0], box[0]), box[2]), min(max(at[1], box[1]), box[3])))
        # Not an outline of the letters, of which a vector file would have no text.
        halo = {"facecolor": theme.paper, "edgecolor": "none", "alpha": 0.7, "pad": 0.6}
        leader = {"arrowstyle": "-", "lw": 0.6, "shrinkA": 0, "shrinkB": 2.5}
        panel.annotate(
            text, xy=(x, y), xytext=(x0 + centre[0] / scale[0], y0 + centre[1] / scale[1]), textcoords="data",
            ha="center", va="center", fontsize=SMALL, color=colour, zorder=9, gid="direct label",
            arrowprops={**leader, "color": colour} if away > 6 else None,
            bbox=halo,
        )  # fmt: skip
