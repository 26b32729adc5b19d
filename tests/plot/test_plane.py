from __future__ import annotations

import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import SymLogNorm
from plot_runs import (
    ORDERS,
    artist,
    artists,
    direct_labels,
    failed,
    labels,
    legend_texts,
    measurement,
    notes,
    nothing_overlaps,
    run,
    with_errors,
)
from synthetic_runs import C, E
from synthetic_runs import run as synthetic_run

from ib_callback.plot import compare, information_plane, over_steps, plane_by_layer, save, save_information_plane
from ib_callback.results.measurement import Measurement
from ib_callback.results.trajectory import Trajectory

KNOWN = {"measured", "initial", "fitting", "compression", "last", "null", "diagonal", "IB curve", "ceiling", "ceilings"}


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
        # These numbers are below their start all along: the run never leaves its initial phase.
        assert np.array_equal(artist(panel, "initial").get_offsets(), values)
        assert np.array_equal(artist(panel, "null").get_offsets(), nulls)
        assert np.array_equal(artist(panel, "last").get_xydata(), values[-1:])
        assert np.array_equal(artist(panel, "course").get_xydata(), values)
        assert list(artist(panel, "ceiling").get_xdata()) == [trajectory[-1].ceiling] * 2
        ceilings = [segment[0, 0] for segment in artist(panel, "ceilings").get_segments()]
        assert ceilings == [m.ceiling for m in trajectory]
        assert artist(panel, "diagonal").get_slope() == 1
        assert artist(panel, "diagonal").get_xy1() == (0, 0)


def test_nulls_are_crosses_and_joined_to_their_few_points():
    trajectory = run([0, 10, 20])
    (panel,) = panels(information_plane(trajectory), 1)
    assert np.array_equal(artist(panel, "null").get_edgecolors(), artist(panel, "initial").get_facecolors())
    ends = [
        [(p.complexity_null, p.expressivity_null), (p.complexity, p.expressivity)]
        for p in (m["token"] for m in trajectory)
    ]
    assert np.array_equal(artist(panel, "joins").get_segments(), ends)
    (many,) = panels(information_plane(run(range(30))), 1)
    assert not artists(many, "joins")


def test_phases_have_markers_of_their_own_and_their_beginnings_are_named():
    # By the numbers of the synthetic runs: collapse, fit from 400 on, compression from 1,000 on.
    complexity, expressivity = [*C, *np.linspace(C[-1], 0.35, 8)], [*E, *[E[-1]] * 8]
    trajectory = synthetic_run(complexity, expressivity)
    phases = trajectory.phases()
    assert phases.compression_start is not None
    figure = information_plane(trajectory)
    (panel,) = panels(figure, 1)
    shapes = set()
    for number, name in enumerate(("initial", "fitting", "compression")):
        drawn = artist(panel, name)
        shapes.add(drawn.get_paths()[0].vertices.tobytes())
        mine = [m for m, phase in zip(trajectory, phases.phases, strict=True) if phase == number]
        assert np.array_equal(drawn.get_offsets(), [[m.complexity, m.expressivity] for m in mine])
    assert len(shapes) == 3
    assert direct_labels(panel) == ["step 0", "fitting", "compression"]
    assert legend_texts(figure)[:3] == [
        "initial phase",
        f"fitting phase, from step {phases.fit_start:,}",
        f"compression phase, from step {phases.compression_start:,}",
    ]


def test_axes_are_labelled_with_their_unit_and_share_their_limits():
    for panel in panels(information_plane(run([0, 10], orders=2)), 2):
        assert (
            panel.get_xlabel()
            == "complexity: information about\nthe preceding context\n(fraction of log₂ 100 = 6.64 bits)"
        )
        assert panel.get_xlim() == panel.get_ylim()
    single = information_plane(run([0])).axes[0]
    assert (
        single.get_ylabel()
        == "expressivity: information about\nthe following context\n(fraction of log₂ 100 = 6.64 bits)"
    )


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_everything_drawn_lies_within_the_limits(scale):
    (panel,) = panels(information_plane(run([0, 10, 20_000], scale=scale)), 1)
    low, high = panel.get_xlim()
    shown = np.concatenate([artist(panel, name).get_offsets().ravel() for name in ("initial", "null")])
    assert low < min(shown)
    assert max(shown) < artist(panel, "ceiling").get_xdata()[0] < high < 1.2 * 0.6 * scale
    assert panel.get_xlim() == panel.get_ylim()


def test_failed_points_are_left_out_and_counted():
    good = [measurement(0), measurement(20)]
    figure = information_plane(Trajectory([good[0], failed(10), good[1]]))
    values = [[m["token"].complexity, m["token"].expressivity] for m in good]
    assert np.array_equal(artist(figure.axes[0], "initial").get_offsets(), values)
    assert notes(figure) == "Not drawn: 1 of 3 points could not be measured (step 10)."
    assert notes(information_plane(run([0, 10]))) == ""


def test_an_order_missing_from_some_points_is_drawn_from_the_others():
    figure = information_plane([measurement(0), measurement(10, orders=2), measurement(20, orders=2)])
    token, bigram = panels(figure, 2)
    assert len(artist(token, "initial").get_offsets()) == 3
    assert len(artist(bigram, "initial").get_offsets()) == 2
    assert [panel.get_title(loc="right") for panel in (token, bigram)] == ["", "1 without bigram"]
    colours = [artist(panel, "initial").get_facecolors() for panel in (token, bigram)]
    assert np.array_equal(colours[1], colours[0][1:])


def test_without_nulls_and_without_baseline():
    unmeasured = information_plane(run([0, 10], null=False))
    assert labels(unmeasured.axes[0]) & KNOWN == {"initial", "last", "diagonal"}
    begin = ["initial phase", "last point", "step 0: before training"]
    assert legend_texts(unmeasured) == [*begin, "the bound: expressivity = complexity"]
    unwanted = information_plane(run([0, 10]), baseline=False)
    assert labels(unwanted.axes[0]) & KNOWN == {"initial", "last", "diagonal"}


def test_a_single_measurement():
    figure = information_plane(measurement(12_500))
    assert len(figure.axes) == 1
    assert labels(figure.axes[0]) & KNOWN == {"measured", "null", "diagonal", "ceiling"}
    assert legend_texts(figure)[0] == "measured at step 12,500"
    assert len(artist(figure.axes[0], "measured").get_offsets()) == 1


@pytest.mark.parametrize(
    ("steps", "logarithmic", "ticks"),
    [
        ([0, 500, 1000], False, ["0", "200", "400", "600", "800", "1,000"]),
        ([7, 7 * 50], False, ["7", "60", "120", "180", "240", "300", "350"]),
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
    phase = "initial" if steps[0] == 0 else "fitting"
    lightness = artist(figure.axes[0], phase).get_facecolors()[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) >= 0).all()
    assert lightness[-1] - lightness[0] > 0.5


def test_a_final_model_without_a_step_has_no_place_among_checkpoints_and_is_said_to_be_left_out():
    points = [measurement(5), measurement(10), measurement(None)]
    for figure in (information_plane(points), over_steps(points)):
        assert "Not drawn: 1 point has no step, so the place among the others is unknown." in notes(figure)
    assert information_plane(points).axes[-1].get_ylabel() == "training step"
    assert over_steps(points).axes[2].get_xlabel() == "training step"
    assert len(artist(information_plane(points).axes[0], "fitting").get_offsets()) == 2


def test_points_without_steps_are_numbered():
    figure = information_plane([measurement(None), measurement(None), measurement(5)])
    assert figure.axes[-1].get_ylabel() == "measurement"
    assert [text.get_text() for text in figure.axes[-1].get_yticklabels()] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("orders", "steps"),
    [*((orders, steps) for orders in (1, 2, 3, 4, 5) for steps in ([500], [0, 10, 20])), (4, range(3000))],
)
def test_nothing_overlaps_and_nothing_is_cut_off(orders, steps):
    points = [*run(steps, orders=orders), failed(5000)]
    figure = information_plane(points, title="a run with a name that is rather long for one line " * 2)
    nothing_overlaps(figure)
    for axes in figure.axes[:orders]:
        box = axes.get_window_extent()
        assert box.width == pytest.approx(box.height, rel=1e-6), "the diagonal is one"


def test_the_primary_order_comes_first_and_all_have_one_scale():
    settings = {"primary": "trigram", "num_bins": 100}
    drawn = panels(information_plane(run([0, 10], orders=3, settings=settings)), 3)
    assert [panel.get_title() for panel in drawn] == ["trigram", "token", "bigram"]
    assert len({panel.get_xlim() for panel in drawn}) == 1


def test_standard_errors_are_drawn_where_they_were_measured():
    points = [with_errors(0, 0.02), with_errors(10, None), with_errors(20, 0.01)]
    figure = information_plane(points)
    (across, upright) = artists(figure.axes[0], "standard error")
    widths = [float(np.ptp(segment[:, 0])) for segment in across.get_segments()]
    heights = [float(np.ptp(segment[:, 1])) for segment in upright.get_segments()]
    assert widths == pytest.approx([0.04, 0.0, 0.02])
    assert heights == pytest.approx([0.04, 0.0, 0.02])
    assert "± 1 standard error" in legend_texts(figure)
    assert not artists(information_plane(run([0, 10])).axes[0], "standard error")


def test_settings_that_changed_along_the_run_are_a_note():
    changed = measurement(20, settings={"primary": "token", "num_bins": 64, "probe": "a" * 64, "bound": "diagonal"})
    figure = information_plane([measurement(0), measurement(10), changed])
    assert notes(figure) == "Not all points can be compared: the settings changed at step 20: num_bins: 100 vs 64"
    (note,) = figure.texts
    assert note.get_color() != figure.axes[0].xaxis.label.get_color()


@pytest.mark.parametrize("negative", [False, True])
def test_points_above_the_diagonal_and_negative_ones_are_within_the_limits(negative):
    point = synthetic_run([-0.02 if negative else 0.3, 0.1], [0.4, 0.6])
    (panel,) = panels(information_plane(point), 1)
    low, high = panel.get_xlim()
    assert high > 0.6
    assert (low < -0.02) == negative or low > -0.1


def test_a_long_run_stays_a_small_file(tmp_path):
    path = tmp_path / "plane.svg"
    figure = information_plane(run(range(3000), orders=4))
    for panel in panels(figure, 4):
        assert artist(panel, "initial").get_rasterized()
        assert len(artist(panel, "initial").get_offsets()) == 3000
        shown = artist(panel, "null").get_offsets()
        assert 10 <= len(shown) <= 41
    save(figure, path)
    assert path.stat().st_size < 1_000_000
    assert not artist(information_plane(run(range(20))).axes[0], "initial").get_rasterized()


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
    assert png_size(path.read_bytes()) == pytest.approx(tuple(inches * 150), abs=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["information_plane.png"]
    dark = (matplotlib.image.imread(path)[..., :3] < 0.5).any(axis=-1)
    assert 0.005 < dark.mean() < 0.2
    with pytest.raises(ValueError, match=r"formats .*png.*svg.*, got \.doc"):
        save(information_plane(trajectory), tmp_path / "plane.doc")
    assert [entry.name for entry in tmp_path.iterdir()] == ["information_plane.png"]


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


def test_texts_of_a_vector_file_stay_texts_and_the_same_figure_is_the_same_file(tmp_path):
    for name in ("a.svg", "b.svg"):
        save_information_plane(run([0, 10], orders=2), tmp_path / name, title="a run")
    content = (tmp_path / "a.svg").read_bytes()
    assert content == (tmp_path / "b.svg").read_bytes()
    root = ElementTree.fromstring(content)
    texts = {"".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"a run", "token", "bigram", "training step"} <= texts


EVERY_PICTURE = {
    "plane": lambda **options: information_plane(run([0, 10], orders=2), **options),
    "layers": lambda **options: plane_by_layer(measurement(10, layers=("h.0", "h.1")), **options),
    "steps": lambda **options: over_steps(run([0, 10]), **options),
    "compare": lambda **options: compare({"a": run([0, 10]), "b": run([0, 20])}, **options),
}


@pytest.mark.parametrize("picture", EVERY_PICTURE)
def test_the_theme_decides_the_colours(picture):
    light, dark = (EVERY_PICTURE[picture](theme=theme) for theme in ("light", "dark"))
    for figure, is_light in ((light, True), (dark, False)):
        panel = figure.axes[0]
        papers = [figure.get_facecolor(), panel.get_facecolor()]
        inks = [panel.xaxis.label.get_color(), panel.title.get_color(), panel.spines["left"].get_edgecolor()]
        inks += [text.get_color() for text in figure.legends[0].get_texts()]
        inks += [tick.get_color() for tick in panel.get_xticklabels()]
        assert all((brightness(paper) > 0.5) == is_light for paper in papers)
        assert all((brightness(ink) < 0.4) == is_light for ink in inks)
    with pytest.raises(ValueError, match="theme: expected one of light, dark, got 'sepia'"):
        EVERY_PICTURE[picture](theme="sepia")


def brightness(colour):
    return float(np.dot(matplotlib.colors.to_rgb(colour), [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("picture", EVERY_PICTURE)
def test_global_settings_neither_change_nor_matter(picture, tmp_path):
    before = matplotlib.rcParams.copy()
    save(EVERY_PICTURE[picture](), tmp_path / "plain.svg")
    assert matplotlib.rcParams.copy() == before
    users = {
        "font.size": 20, "axes.facecolor": "red", "xtick.color": "lime", "xtick.labelsize": 20, "axes.grid": True,
        "savefig.bbox": "tight", "legend.frameon": True, "lines.linewidth": 5, "xtick.major.size": 9,
        "figure.autolayout": True, "figure.facecolor": "green", "font.family": "monospace",
    }  # fmt: skip
    with matplotlib.rc_context(users):
        mine = matplotlib.rcParams.copy()
        figure = EVERY_PICTURE[picture]()
        save(figure, tmp_path / "theirs.svg")
        assert matplotlib.rcParams.copy() == mine
    assert isinstance(figure.canvas, FigureCanvasAgg)
    assert (tmp_path / "theirs.svg").read_bytes() == (tmp_path / "plain.svg").read_bytes()


ALONE = """
import sys
sys.path[:0] = sys.argv[3:] + [sys.argv[1]]
import test_plane
assert "matplotlib.pyplot" not in sys.modules, "imported by the test module"
for picture in test_plane.EVERY_PICTURE.values():
    test_plane.save(picture(), sys.argv[2])
assert "matplotlib.pyplot" not in sys.modules, "pyplot was imported"
import matplotlib
assert not isinstance(dict.__getitem__(matplotlib.rcParams, "backend"), str), "a backend was chosen"
"""


def test_no_backend_is_chosen_and_pyplot_not_imported(tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    path = tmp_path / "plane.png"
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(Path(__file__).parent), str(path), *sys.path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert path.exists()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ImportError, match=r"Drawing the information plane needs .*ib-callback\[plot\]"):
        information_plane(measurement(0))
