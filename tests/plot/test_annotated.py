from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from plot_runs import artist, artists, direct_labels, failed, measurement, notes, nothing_overlaps, run, with_views
from synthetic_runs import C, E
from synthetic_runs import run as synthetic_run

from ib_callback.plot import annotated_plane, save


def texts(panel: Any) -> str:
    return " ".join(" ".join(label.split()) for label in direct_labels(panel))


def course(panel: Any) -> np.ndarray:
    return np.asarray(artist(panel, "measured").get_offsets())


@pytest.fixture(scope="module")
def told() -> Any:
    """A run that collapses, fits and compresses."""
    return annotated_plane(synthetic_run(C, E))


def test_it_names_the_models_the_phases_the_bound_and_the_better_direction(told: Any) -> None:
    trajectory = synthetic_run(C, E)
    phases = trajectory.phases()
    panel = told.axes[0]
    assert phases.compression_start is not None
    for words in (
        f"fitting from step {phases.fit_start:,}:", f"compression from step {phases.compression_start:,}:",
        f"trained, step {trajectory[-1].step:,}",
    ):  # fmt: skip
        assert words in texts(panel)
    assert artist(panel, "better").get_text() == "better"
    assert artist(panel, "name of the bound").get_text().startswith("the bound")
    assert artist(panel, "diagonal").get_slope() == 1
    assert artists(panel, "arrow")
    nothing_overlaps(told)


def test_texts_lie_within_the_panel_and_not_on_each_other(told: Any) -> None:
    told.draw_without_rendering()
    renderer = told.canvas.get_renderer()
    panel = told.axes[0]
    from matplotlib.text import Text

    boxes = [Text.get_window_extent(t, renderer) for t in panel.texts if t.get_gid() == "direct label"]
    assert len(boxes) >= 3
    for index, box in enumerate(boxes):
        assert panel.bbox.x0 <= box.x0 and box.x1 <= panel.bbox.x1
        assert panel.bbox.y0 <= box.y0 and box.y1 <= panel.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:index])


def test_the_collapse_is_named_where_the_complexity_is_lowest_before_the_fit() -> None:
    complexity = [0.5, 0.3, 0.05, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4]
    expressivity = [0.2, 0.1, 0.03, 0.08, 0.12, 0.2, 0.25, 0.27, 0.28, 0.29]
    (panel,) = annotated_plane(synthetic_run(complexity, expressivity)).axes[:1]
    step = synthetic_run(complexity, expressivity)[2].step
    assert f"collapse, step {step:,}" in texts(panel)
    (flat,) = annotated_plane(synthetic_run([0.3, *complexity[4:]], [0.1, *expressivity[4:]])).axes[:1]
    assert "collapse" not in texts(flat)


@pytest.mark.parametrize(
    ("views", "plane"),
    [(("prediction", "readout"), "readout"), (("prediction",), "prediction"), (("late",), "local"), ((), "plain")],
)
def test_it_shows_the_readout_plane_or_what_there_is(views: tuple[str, ...], plane: str) -> None:
    points = [with_views(point, *views) if views else point for point in run([0, 10, 40])]
    panel = annotated_plane(points).axes[0]
    assert panel.get_xlabel().startswith("information about the preceding context\n")
    assert f"{plane} plane (fraction of log₂ 100 = 6.64 bits)" in panel.get_xlabel()
    assert panel.get_ylabel().endswith(f"expressivity, {plane} plane")
    order, suffix = f"{plane}/token" if plane in views else "token", "" if plane == "plain" else "_local"
    expected = [[getattr(p[order], f"{name}{suffix}") for name in ("complexity", "expressivity")] for p in points]
    assert course(panel) == pytest.approx(np.array(expected))
    assert bool(artists(panel, "chance")) is (plane != "plain")


def test_the_loss_has_a_panel_where_it_was_measured() -> None:
    without = run([0, 10, 40])
    assert len(annotated_plane(without).axes) == 1
    points = [replace(point, loss=8.0 - number) for number, point in enumerate(without)]
    figure = annotated_plane([*points, failed(50)], title="A run")
    assert np.asarray(artist(figure.axes[1], "measured loss").get_offsets()).tolist() == [[0, 8], [10, 7], [40, 6]]
    assert "A run" in notes(figure) and "1 of 4 points could not be measured" in notes(figure)
    nothing_overlaps(figure)


def test_a_single_point_is_drawn_and_none_is_an_error() -> None:
    assert direct_labels(annotated_plane(measurement(7)).axes[0]) == ["step 7"]
    with pytest.raises(ValueError, match="at least one measured point"):
        annotated_plane([failed(0)])
    with pytest.raises(ValueError, match="theme: expected one of light, dark"):
        annotated_plane(measurement(7), theme="blue")  # type: ignore[arg-type]


def test_a_dark_file_is_small_and_no_wider_than_a_page(tmp_path: Any, told: Any) -> None:
    dark = annotated_plane(synthetic_run(C, E), theme="dark")
    assert dark.get_facecolor() != told.get_facecolor()
    save(dark, tmp_path / "dark.png")
    content = (tmp_path / "dark.png").read_bytes()
    assert int.from_bytes(content[16:20], "big") <= 1200, "the width in the header of a PNG"
    assert len(content) < 200_000
