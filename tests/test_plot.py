from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import SymLogNorm

from ib_callback.measurement import Measurement
from ib_callback.plot import information_plane, save_information_plane
from ib_callback.points import PlanePoint
from ib_callback.trajectory import Trajectory

ORDERS = ("token", "bigram", "trigram", "quadgram", "5-gram")


def measurement(step: int | None, *, orders: int = 1, null: bool = True, scale: float = 1.0) -> Measurement:
    """A point whose numbers all differ; the wider the order, the more of it is null."""
    late = (step or 0) / 40_000
    points = {}
    for k, order in enumerate(ORDERS[:orders]):
        complexity, baseline = scale * (0.4 + 0.02 * k - late / 5), scale * (0.1 + 0.06 * k - late / 20)
        nulls = {"complexity_null": baseline, "expressivity_null": 0.9 * baseline} if null else {}
        errors = dict.fromkeys((f"{name}_se" for name in nulls), 0.001)
        points[order] = PlanePoint.from_layers([complexity], [complexity / 2 + baseline / 3], **nulls, **errors)
    ceiling = scale * (0.6 - late / 4) if null else None
    return Measurement(
        step=step, entropy=0.75, ceiling=ceiling, orders=points, features={}, layers=("h.0",),
        entropy_by_layer=(0.75,), num_positions=9810, seconds=1.5, settings={"primary": "token"},
    )  # fmt: skip


def run(steps: Any, **options: Any) -> Trajectory:
    return Trajectory(measurement(step, **options) for step in steps)


def artist(panel: Any, label: str) -> Any:
    (found,) = [child for child in panel.get_children() if child.get_label() == label]
    return found


def labels(panel: Any) -> set[str]:
    known = {"measured", "last", "null", "bound", "ceiling"}
    return {str(child.get_label()) for child in panel.get_children()} & known


def legend_texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def panels(figure: Any, count: int) -> list[Any]:
    """The panels without the colour bar, which comes after them."""
    return figure.axes[:count]


def test_every_point_of_every_order_is_drawn_where_it_was_measured():
    trajectory = run([0, 10, 20, 40], orders=4)
    drawn = panels(information_plane(trajectory), 4)
    assert [panel.get_title() for panel in drawn] == ["token", "bigram", "trigram", "quadgram"]
    for panel, order in zip(drawn, ORDERS, strict=False):
        values = np.array([[m[order].complexity, m[order].expressivity] for m in trajectory])
        nulls = np.array([[m[order].complexity_null, m[order].expressivity_null] for m in trajectory])
        assert np.array_equal(artist(panel, "measured").get_offsets(), values)
        assert np.array_equal(artist(panel, "null").get_offsets(), nulls)
        assert np.array_equal(artist(panel, "last").get_offsets(), values[-1:])
        assert any(np.array_equal(line.get_xydata(), values) for line in panel.lines)
        assert list(artist(panel, "ceiling").get_xdata()) == [trajectory[-1].ceiling] * 2
        assert artist(panel, "bound").get_slope() == 1
        assert artist(panel, "bound").get_xy1() == (0, 0)


def test_null_markers_are_hollow_and_joined_to_their_few_points():
    trajectory = run([0, 10, 20])
    (panel,) = panels(information_plane(trajectory), 1)
    assert len(artist(panel, "null").get_facecolors()) == 0
    assert np.array_equal(artist(panel, "null").get_edgecolors(), artist(panel, "measured").get_facecolors())
    (joins,) = [c for c in panel.collections if hasattr(c, "get_segments")]
    ends = [
        [(p.complexity_null, p.expressivity_null), (p.complexity, p.expressivity)]
        for p in (m["token"] for m in trajectory)
    ]
    assert np.array_equal(joins.get_segments(), ends)
    (many,) = panels(information_plane(run(range(30))), 1)
    assert not [c for c in many.collections if hasattr(c, "get_segments")]


def test_axes_are_labelled_with_their_unit_and_share_their_limits():
    for panel in panels(information_plane(run([0, 10], orders=2)), 2):
        assert panel.get_xlabel() == "complexity I(X;Z)\n(fraction of log num_bins)"
        assert panel.get_xlim() == panel.get_ylim()
    single = information_plane(run([0])).axes[0]
    assert single.get_ylabel() == "expressivity I(Y;Z)\n(fraction of log num_bins)"


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_everything_drawn_lies_within_the_limits(scale):
    (panel,) = panels(information_plane(run([0, 10, 20_000], scale=scale)), 1)
    low, high = panel.get_xlim()
    shown = np.concatenate([artist(panel, name).get_offsets().ravel() for name in ("measured", "null")])
    assert low < min(shown)
    assert max(shown) < artist(panel, "ceiling").get_xdata()[0] < high < 1.2 * 0.6 * scale


def test_failed_points_are_left_out():
    good = [measurement(0), measurement(20)]
    mixed = Trajectory([good[0], Measurement.failed(10, "NaN", settings={}), good[1]])
    (panel,) = panels(information_plane(mixed), 1)
    values = [[m["token"].complexity, m["token"].expressivity] for m in good]
    assert np.array_equal(artist(panel, "measured").get_offsets(), values)


def test_an_order_missing_from_some_points_is_drawn_from_the_others():
    figure = information_plane([measurement(0), measurement(10, orders=2), measurement(20, orders=2)])
    token, bigram = panels(figure, 2)
    assert len(artist(token, "measured").get_offsets()) == 3
    assert len(artist(bigram, "measured").get_offsets()) == 2
    colours = [artist(panel, "measured").get_facecolors() for panel in (token, bigram)]
    assert np.array_equal(colours[1], colours[0][1:])


def test_without_nulls_and_without_baseline():
    unmeasured = information_plane(run([0, 10], null=False))
    assert labels(unmeasured.axes[0]) == {"measured", "last", "bound"}
    assert legend_texts(unmeasured) == ["measured", "last point", "bound: expressivity = complexity"]
    unwanted = information_plane(run([0, 10]), baseline=False)
    assert labels(unwanted.axes[0]) == {"measured", "last", "bound", "ceiling"}


def test_a_single_measurement():
    figure = information_plane(measurement(12_500))
    assert len(figure.axes) == 1
    assert labels(figure.axes[0]) == {"measured", "null", "bound", "ceiling"}
    assert legend_texts(figure)[0] == "measured at step 12,500"
    assert len(artist(figure.axes[0], "measured").get_offsets()) == 1


@pytest.mark.parametrize(
    ("steps", "logarithmic", "ticks"),
    [
        ([0, 500, 1000], False, ["0", "500", "1,000"]),
        ([7, 7 * 50], False, ["7", "350"]),
        ([0, 1, 10, 100, 1000], True, ["0", "1", "10", "100", "1,000"]),
        (range(3000), True, ["0", "1", "10", "100", "1,000", "2,999"]),
        (range(1000, 1031), False, ["1,000", "1,005", "1,010", "1,015", "1,020", "1,025", "1,030"]),
    ],
)
def test_colours_follow_the_step_logarithmically_over_decades(steps, logarithmic, ticks):
    figure = information_plane(run(steps))
    bar = figure.axes[-1]
    figure.draw_without_rendering()
    assert bar.get_ylabel() == "training step"
    assert [text.get_text() for text in bar.get_yticklabels()] == ticks
    assert isinstance(bar._colorbar.norm, SymLogNorm) == logarithmic
    # Lightness tells the order even without colour.
    lightness = artist(figure.axes[0], "measured").get_facecolors()[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) >= 0).all()
    assert lightness[-1] - lightness[0] > 0.5


def test_points_without_steps_are_numbered():
    figure = information_plane([measurement(None), measurement(None), measurement(5)])
    assert figure.axes[-1].get_ylabel() == "measurement"
    assert [text.get_text() for text in figure.axes[-1].get_yticklabels()] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("orders", "steps"),
    [*((orders, steps) for orders in (1, 2, 3, 4, 5) for steps in ([500], [0, 10, 20])), (4, range(3000))],
)
def test_nothing_overlaps_and_nothing_is_cut_off(orders, steps):
    figure = information_plane(run(steps, orders=orders), title="a run")
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
    boxes += [figure.legends[0].get_window_extent(renderer), figure._suptitle.get_window_extent(renderer)]
    for index, box in enumerate(boxes):
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:index])
    for axes in figure.axes[:orders]:
        box = axes.get_window_extent(renderer)
        assert 0.8 < box.width / box.height < 1.25


def test_orders_can_be_chosen():
    trajectory = run([0, 10], orders=3)
    figure = information_plane(trajectory, orders=["trigram", "token"])
    assert [panel.get_title() for panel in panels(figure, 2)] == ["trigram", "token"]
    with pytest.raises(ValueError, match="expected orders among token, bigram, trigram, got quadgram"):
        information_plane(trajectory, orders=["quadgram"])
    with pytest.raises(ValueError, match="expected orders among token, bigram, trigram, got none"):
        information_plane(trajectory, orders=[])


@pytest.mark.parametrize("points", [[], [Measurement.failed(0, "NaN", settings={})]])
def test_nothing_to_draw_is_an_error(points):
    with pytest.raises(ValueError, match=f"at least one measured point.*none among {len(points)} points"):
        information_plane(Trajectory(points))


def png_size(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def test_the_saved_file_is_a_png_of_the_figure_at_150_dots_per_inch(tmp_path):
    trajectory = run([0, 10, 20], orders=2)
    path = tmp_path / "information_plane.png"
    save_information_plane(trajectory, path, title="a run")
    inches = information_plane(trajectory, title="a run").get_size_inches()
    assert png_size(path.read_bytes()) == tuple((inches * 150).astype(int))
    assert [entry.name for entry in tmp_path.iterdir()] == ["information_plane.png"]
    dark = (matplotlib.image.imread(path)[..., :3] < 0.5).any(axis=-1)
    assert 0.005 < dark.mean() < 0.2


def test_the_suffix_decides_the_format(tmp_path):
    save_information_plane(run([0, 10]), tmp_path / "plane.pdf")
    save_information_plane(run([0, 10]), tmp_path / "plane")
    assert (tmp_path / "plane.pdf").read_bytes().startswith(b"%PDF")
    png_size((tmp_path / "plane").read_bytes())


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "plane.png"
    save_information_plane(run([0, 10]), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="at least one measured point"):
        save_information_plane([], path)
    assert path.read_bytes() == before


def test_global_settings_are_left_alone(tmp_path):
    before = matplotlib.rcParams.copy()
    figure = information_plane(run([0, 10]))
    save_information_plane(run([0, 10]), tmp_path / "plane.png")
    assert isinstance(figure.canvas, FigureCanvasAgg)
    assert matplotlib.rcParams.copy() == before


ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
import test_plot
assert "matplotlib.pyplot" not in sys.modules, "imported by the test module"
test_plot.save_information_plane(test_plot.run([0, 10], orders=2), sys.argv[2])
assert "matplotlib.pyplot" not in sys.modules, "pyplot was imported"
import matplotlib
assert not isinstance(dict.__getitem__(matplotlib.rcParams, "backend"), str), "a backend was chosen"
"""


def test_no_backend_is_chosen_and_pyplot_not_imported(tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    path = tmp_path / "plane.png"
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(Path(__file__).parent), str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert path.exists()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"Drawing the information plane needs .*ib-callback\[plot\]"):
        information_plane(measurement(0))
