"""Pictures of a run, as Matplotlib figures outside pyplot, and as files.

`information_plane` shows a run in its planes. `plane_by_layer` shows one measurement layer by layer. `over_steps`
shows the numbers along the run. `compare` shows several runs in the same planes. `annotated_plane` shows one plane
with words in it, for new readers. `save` writes any of them.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ib_callback.common.files import write_atomically
from ib_callback.common.optional import require
from ib_callback.plot.annotated import annotated_plane
from ib_callback.plot.comparison import compare
from ib_callback.plot.layers import plane_by_layer
from ib_callback.plot.plane import information_plane
from ib_callback.plot.steps import over_steps
from ib_callback.plot.theme import DPI
from ib_callback.results.measurement import Measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "annotated_plane",
    "compare",
    "information_plane",
    "over_steps",
    "plane_by_layer",
    "save",
    "save_information_plane",
]

# Resolution of points that become an image within a vector file: that of a printer.
_VECTOR_DPI = 300
# Keep texts as texts, do not put random names into the file, and ignore user settings that would crop the picture.
_SAVING: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "ib_callback", "pdf.fonttype": 42, "ps.fonttype": 42,
    "savefig.bbox": None, "savefig.transparent": False,
}  # fmt: skip
# Marks a picture as written by this package. Not every format has room for it.
_MARK = "ib_callback"
_MARKED = tuple(
    place.replace("…", _MARK).encode()
    for place in ("Creator\0…", "<dc:title>…</dc:title>", "/Creator (…)", "%%Creator: …\n")
)
_DATES = {"png": (), "svg": ("Date",), "pdf": ("CreationDate",), "ps": ("CreationDate",), "eps": ("CreationDate",)}
_METADATA: dict[str, Any] = {kind: {"Creator": _MARK, **dict.fromkeys(dates)} for kind, dates in _DATES.items()}


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure to a file atomically. The same figure always gives the same file.

    Args:
        figure: a figure of this module.
        path: the suffix decides the format: .png (150 dots per inch), .svg and .pdf, whose texts stay texts, and all
            other formats that Matplotlib writes. Without a suffix the format is PNG.

    Raises:
        ValueError: Matplotlib does not write this format.
        OSError: the file cannot be written.
    """
    write_atomically(path, encoded(figure, _suffix_of(path)))


def check_format(path: str | os.PathLike[str]) -> None:
    """Check that Matplotlib writes pictures in the format of a path.

    Raises:
        ValueError: it does not write this format.
        ImportError: Matplotlib is not installed.
    """
    backends = require("matplotlib.backend_bases", extra="plot", purpose="Drawing a picture")
    _check_suffix(_suffix_of(path), backends.FigureCanvasBase.get_supported_filetypes())


def _suffix_of(path: str | os.PathLike[str]) -> str:
    return Path(path).suffix.lstrip(".").lower() or "png"


def _check_suffix(suffix: str, known: Iterable[str]) -> None:
    if suffix not in known:
        raise ValueError(f"expected a picture file in one of the formats {', '.join(sorted(known))}, got .{suffix}")


def encoded(figure: Figure, suffix: str = "png") -> bytes:
    """The content of the file that `save` would write."""
    from matplotlib import rc_context

    _check_suffix(suffix, figure.canvas.get_supported_filetypes())
    content = io.BytesIO()
    with rc_context(_SAVING):
        figure.savefig(
            content,
            format=suffix,
            dpi=_VECTOR_DPI if suffix in ("svg", "pdf", "ps") else DPI,
            facecolor=figure.get_facecolor(),
            metadata=_METADATA.get(suffix),
        )
    return content.getvalue()


def may_be_replaced(path: str | os.PathLike[str]) -> bool:
    """Whether a path is free, or has a PNG, SVG, PDF or PostScript picture that this package wrote.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return True
    return any(mark in content for mark in _MARKED)


def save_information_plane(
    measurements: Measurement | Iterable[Measurement], path: str | os.PathLike[str], **options: Any
) -> None:
    """Write the figure of `information_plane(measurements, **options)` to a file; see `save`."""
    save(information_plane(measurements, **options), path)
