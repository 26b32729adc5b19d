"""Runs to draw, and how to look at what was drawn."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ib_callback.results.measurement import Measurement
from ib_callback.results.points import PlanePoint
from ib_callback.results.trajectory import Trajectory

ORDERS = ("token", "bigram", "trigram", "quadgram", "5-gram")
SETTINGS = {"primary": "token", "num_bins": 100, "probe": "a" * 64, "bound": "diagonal"}


def measurement(
    step: int | None,
    *,
    orders: int = 1,
    null: bool = True,
    scale: float = 1.0,
    layers: Sequence[str] = ("h.0",),
    settings: dict[str, Any] | None = None,
) -> Measurement:
    """A point whose numbers all differ; the wider the order, the more of it is null."""
    late = (step or 0) / 40_000
    points = {}
    for k, order in enumerate(ORDERS[:orders]):
        complexity, baseline = scale * (0.4 + 0.02 * k - late / 5), scale * (0.1 + 0.06 * k - late / 20)
        nulls = {"complexity_null": baseline, "expressivity_null": 0.9 * baseline} if null else {}
        errors = dict.fromkeys((f"{name}_se" for name in nulls), 0.001)
        depths = [1 + 0.5 * i / len(layers) for i in range(len(layers))]
        points[order] = PlanePoint.from_layers(
            [complexity * depth for depth in depths],
            [(complexity / 2 + baseline / 3) * depth**0.5 for depth in depths],
            **nulls, **errors,
        )  # fmt: skip
    ceiling = scale * (0.6 - late / 4) if null else None
    return Measurement(
        step=step, entropy=0.75, ceiling=ceiling, orders=points, features={}, layers=layers,
        entropy_by_layer=(0.75,) * len(layers), num_positions=9810, seconds=1.5, settings=settings or SETTINGS,
    )  # fmt: skip


def failed(step: int) -> Measurement:
    return Measurement.failed(step, "NaN in h.0", settings=SETTINGS)


def run(steps: Iterable[int | None], **options: Any) -> Trajectory:
    return Trajectory(measurement(step, **options) for step in steps)


def with_errors(step: int, error: float | None) -> Measurement:
    """A point whose numbers have this standard error."""
    whole = measurement(step)
    names = ("complexity_se", "expressivity_se", "optimality_se", "distance_to_bound_se")
    return replace(whole, orders={"token": replace(whole["token"], **dict.fromkeys(names, error))})


def with_views(
    point: Measurement, *views: str, local: bool = True, error: float | None = None, lost: Sequence[str] = ()
) -> Measurement:
    """The point with views, and all of it with local numbers but for orders that lost them; all numbers differ."""
    if not point.orders:
        return point

    def points(share: float) -> dict[str, PlanePoint]:
        found = {}
        for order, plain in point.orders.items():
            changed = {name: share * getattr(plain, name) for name in ("complexity", "expressivity")}
            if local and order not in lost:
                complexity, expressivity = 0.3 * changed["complexity"], 0.2 * changed["expressivity"]
                changed |= {"complexity_local": complexity, "expressivity_local": expressivity}
                changed |= {"score_local": expressivity**2 / complexity}
                names = ("complexity_local_se", "expressivity_local_se", "score_local_se")
                changed |= dict.fromkeys(names, error)
            found[order] = replace(plain, **changed)
        return found

    return replace(point, orders=points(1.0), views={view: points(0.9 - 0.1 * k) for k, view in enumerate(views)})


def artists(panel: Any, label: str) -> list[Any]:
    return [child for child in panel.get_children() if child.get_label() == label]


def artist(panel: Any, label: str) -> Any:
    (found,) = artists(panel, label)
    return found


def labels(panel: Any) -> set[str]:
    return {str(child.get_label()) for child in panel.get_children()}


def legend_texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def notes(figure: Any) -> str:
    """What stands above the panels, title and notes, as one line."""
    return " ".join(text.get_text() for text in figure.texts)


def direct_labels(panel: Any) -> list[str]:
    return [text.get_text() for text in panel.texts if text.get_gid() == "direct label"]


def nothing_overlaps(figure: Any) -> None:
    """Panels, bar, legend and the lines above lie within the figure, and not on each other, nor do titles."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        titles = [title for title in (axes._left_title, axes.title, axes._right_title) if title.get_text()]
        places = [title.get_window_extent(renderer) for title in titles]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(places))
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
    boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
    boxes += [text.get_window_extent(renderer) for text in figure.texts]
    for index, box in enumerate(boxes):
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        # Lines of a text may touch.
        assert not any(
            min(box.x1, other.x1) - max(box.x0, other.x0) > 1 and min(box.y1, other.y1) - max(box.y0, other.y0) > 1
            for other in boxes[:index]
        )
