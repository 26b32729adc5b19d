from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from plot_runs import (
    artist,
    artists,
    failed,
    labels,
    legend_texts,
    measurement,
    notes,
    nothing_overlaps,
    run,
    with_errors,
    with_views,
)
from synthetic_runs import C, E
from synthetic_runs import run as synthetic_run

from ib_callback.plot import information_plane, over_steps
from ib_callback.plot.data import learning_rates_beside
from ib_callback.results.phases import PhaseRule
from ib_callback.results.trajectory import Trajectory

QUANTITIES = ("complexity", "expressivity", "optimality", "distance_to_bound")


def line(panel, label="token: measured"):
    x, y = artist(panel, label).get_data()
    return np.asarray(x, dtype=float), np.asarray(y, dtype=float)


def test_four_numbers_are_drawn_over_their_steps_with_what_belongs_beside():
    trajectory = run([0, 10, 100])
    figure = over_steps(trajectory)
    assert len(figure.axes) == 4
    for panel, name in zip(figure.axes, QUANTITIES, strict=True):
        steps, values = line(panel)
        assert steps.tolist() == [0, 10, 100]
        assert values.tolist() == [getattr(m["token"], name) for m in trajectory]
    for panel, name in zip(
        figure.axes, ("complexity_null", "expressivity_null", "optimality_above_null"), strict=False
    ):
        assert line(panel, f"token: {name}")[1].tolist() == [getattr(m["token"], name) for m in trajectory]
    assert line(figure.axes[0], "ceiling")[1].tolist() == [m.ceiling for m in trajectory]
    assert [artist(panel, "the bound").get_ydata()[0] for panel in figure.axes[2:]] == [1.0, 0.0]
    assert [panel.get_ylabel().split("\n")[0] for panel in figure.axes] == [
        "complexity I(X;Z)", "expressivity I(Y;Z)", "optimality", "distance to the bound",
    ]  # fmt: skip
    # 100 bins: log2(100) = 6.644.
    assert all(panel.get_ylabel().endswith("(fraction of 6.64 bits)") for panel in figure.axes[:2])
    assert [panel.get_xlabel() for panel in figure.axes[2:]] == ["training step"] * 2


def test_the_loss_has_a_panel_where_it_was_measured():
    points = [replace(measurement(step), loss=8.0 - step, loss_se=0.5) for step in (0, 1)] + [failed(2)]
    figure = over_steps(points)
    assert len(figure.axes) == 5
    panel = figure.axes[0]
    assert panel.get_ylabel().startswith("next-token loss")
    assert not artists(panel, "train_loss")
    assert line(panel, "loss")[1].tolist()[:2] == [8.0, 7.0]
    assert artists(panel, "standard error")
    assert [axes.get_xlabel() for axes in figure.axes] == [""] * 3 + ["training step"] * 2
    nothing_overlaps(figure)


@pytest.mark.parametrize("loss", [None, 8.0])
def test_the_training_loss_is_drawn_in_the_panel_of_the_loss(loss):
    points = [replace(measurement(step), loss=loss, train_loss=9.0 - step) for step in (0, 1)]
    figure = over_steps([replace(points[0], train_loss=None), points[1]])
    panel = figure.axes[0]
    assert panel.get_ylabel().startswith("next-token loss")
    values = line(panel, "train_loss")[1]
    assert np.isnan(values[0]) and values[1] == 8.0
    assert ("loss on the probe" in legend_texts(figure)) is (loss is not None)
    assert "training loss" in legend_texts(figure)
    nothing_overlaps(figure)


def tokens_axis(panel):
    return next((child for child in panel.child_axes if child.get_label() == "tokens"), None)


@pytest.mark.parametrize("log", [False, True])
def test_a_second_axis_counts_tokens_where_they_are_known(log):
    # Two batch sizes: 100 tokens a step up to step 10, then 1,000 a step.
    seen = {0: None, 10: 1_000, 100: 91_000, 1000: 991_000}
    points = [replace(measurement(step), tokens_seen=tokens) for step, tokens in seen.items()]
    figure = over_steps(points, log=log)
    nothing_overlaps(figure)
    for panel in figure.axes[:2]:
        axis = tokens_axis(panel)
        assert axis.get_xlabel() == "training tokens"
        assert axis.get_xlim() == panel.get_xlim() and axis.get_xscale() == panel.get_xscale()
        places = dict(zip([text.get_text() for text in axis.get_xticklabels()], axis.get_xticks(), strict=True))
        # Step 100 has 91K tokens, and each step from there on has 1K more.
        expected = {"0": 0, "1K": 10, "10K": 19, "100K": 109} if log else {"0": 0, "200K": 209, "400K": 409}
        assert {name: places[name] for name in expected} == pytest.approx(expected)
    assert [tokens_axis(panel) for panel in figure.axes[2:]] == [None, None]


def test_no_axis_of_tokens_where_it_would_mislead():
    for seen in ((None, None, None), (None, 500, 500), (None, None, 800)):
        points = [replace(measurement(step), tokens_seen=tokens) for step, tokens in zip((1, 2, 3), seen, strict=True)]
        assert tokens_axis(over_steps(points).axes[0]) is None
    points = [replace(measurement(step), tokens_seen=10 * step) for step in (0, 1, 2)]
    assert tokens_axis(over_steps(points, x="tokens").axes[0]) is None, "the x-axis itself counts them"


@pytest.mark.parametrize("x", ["step", "tokens"])
def test_the_learning_rate_is_a_strip_under_the_first_panel(x):
    points = [replace(measurement(step), loss=8.0, tokens_seen=64 * step) for step in (0, 10, 20)]
    rates = {5: 0.25, 10: 0.5, 20: 0.0, 30: 0.125}
    figure = over_steps(points, learning_rate=rates, x=x, log=True)
    nothing_overlaps(figure)
    assert len(figure.axes) == 6
    strip, panel = figure.axes[5], figure.axes[0]
    scale = 1 if x == "step" else 64
    at, values = line(strip, "learning rate")
    assert at.tolist() == [5 * scale, 10 * scale, 20 * scale], "not beyond the last point"
    assert values.tolist() == [0.25, 0.5, 0.0]
    assert strip.get_xlim() == panel.get_xlim() and strip.get_xscale() == panel.get_xscale()
    assert [text.get_text() for text in strip.get_yticklabels()] == ["0", "5e-1"]
    whole, below = panel.get_position(), strip.get_position()
    assert below.y1 < whole.y0 and (below.x0, below.x1) == pytest.approx((whole.x0, whole.x1))
    # Together they are as high as their neighbour.
    beside = figure.axes[1].get_position()
    assert (below.y0, whole.y1) == pytest.approx((beside.y0, beside.y1))


@pytest.mark.parametrize("rates", [{}, {100: 0.1}])
def test_without_a_known_learning_rate_there_is_no_strip(rates):
    assert len(over_steps(run([0, 10]), learning_rate=rates).axes) == 4
    assert len(over_steps(run([None, None]), learning_rate={1: 0.1}).axes) == 4


def state(folder, history):
    folder.mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_text(history if isinstance(history, str) else json.dumps(history))


def test_learning_rates_are_those_of_the_newest_checkpoint(tmp_path):
    assert learning_rates_beside(tmp_path / "nowhere") == {}
    assert learning_rates_beside(tmp_path) == {}
    logged = [{"step": 1, "learning_rate": 0.5, "loss": 8.0}, {"step": 2, "eval_loss": 7.0}]
    state(tmp_path / "checkpoint-9", {"log_history": [*logged, {"step": 9, "learning_rate": 0.125}]})
    state(tmp_path / "checkpoint-10", {"log_history": [*logged, {"step": 10, "learning_rate": 0.25}]})
    state(tmp_path / "checkpoint-last", {"log_history": [{"step": 3, "learning_rate": 1.0}]})
    assert learning_rates_beside(tmp_path) == {1: 0.5, 10: 0.25}
    # A file that was cut off is passed over.
    state(tmp_path / "checkpoint-11", '{"log_history": [{"st')
    assert learning_rates_beside(tmp_path) == {1: 0.5, 10: 0.25}
    state(tmp_path, {"log_history": logged})
    assert learning_rates_beside(tmp_path) == {1: 0.5}


@pytest.mark.parametrize(
    "history",
    [
        [], 5, {"log_history": None}, {"log_history": [None, 5]},
        {"log_history": [{"step": "1", "learning_rate": 1.0}]},
        {"log_history": [{"step": 1, "learning_rate": "high"}, {"step": True, "learning_rate": 1}]},
        '{"log_history": [{"step": 1, "learning_rate": NaN}]}', "[" * 100_000, "",
    ],
    ids=range(9),
)  # fmt: skip
def test_a_strange_state_of_the_trainer_has_no_learning_rates(history, tmp_path):
    state(tmp_path, history)
    assert learning_rates_beside(tmp_path) == {}


@pytest.mark.parametrize("loss", [None, 8.0])
@pytest.mark.parametrize(("views", "shown"), [(["readout", "late"], ["readout"]), (["prediction", "readout"], None)])
def test_the_score_of_the_output_has_a_panel_where_it_was_measured(views, shown, loss):
    shown = shown or ["readout", "prediction"]
    points = [replace(with_views(measurement(step, orders=2), *views, error=0.01), loss=loss) for step in (0, 10)]
    figure = over_steps([*points, failed(20)], orders=["token", "bigram"])
    assert len(figure.axes) == 5 + (loss is not None)
    panel = figure.axes[0 if loss is None else 1]
    assert panel.get_ylabel() == "local score\n(expressivity² / complexity)"
    names = [f"{view}/{order}" for order in ("token", "bigram") for view in shown]
    assert {text for text in labels(panel) if "measured" in text} == {f"{name}: measured" for name in names}
    for name in names:
        steps, values = line(panel, f"{name}: measured")
        assert steps.tolist() == [0, 10, 20]
        assert values[:2].tolist() == [point[name].score_local for point in points] and np.isnan(values[2])
    assert len(artists(panel, "standard error")) == len(names)
    drawn = [artist(panel, f"{name}: measured") for name in names]
    drawn += [artist(figure.axes[-4], f"{order}: measured") for order in ("token", "bigram")]
    assert len({each.get_color() for each in drawn}) == len({each.get_marker() for each in drawn}) == len(drawn)
    legend = [text for text in legend_texts(figure) if text.endswith(": measured")]
    assert len(legend) == len(drawn)
    assert legend[0] == ("prediction/token: measured" if "prediction" in shown else "readout/token: measured")
    nothing_overlaps(figure)


def test_where_no_view_has_a_score_there_is_no_panel_of_it():
    for points in ([with_views(measurement(0), "late")], [with_views(measurement(0), "readout", local=False)]):
        assert len(over_steps(points).axes) == 4


def test_the_bound_that_was_measured_against_is_named():
    settings = {"primary": "token", "num_bins": 100, "bound": "ib_curve"}
    assert "IB curve − expressivity" in over_steps(run([0, 10], settings=settings)).axes[3].get_ylabel()
    assert "complexity − expressivity" in over_steps(run([0, 10])).axes[3].get_ylabel()


def test_orders_have_colours_and_markers_of_their_own():
    figure = over_steps(run([0, 10], orders=3), orders=["token", "trigram"])
    assert {text for text in labels(figure.axes[0]) if "measured" in text} == {"token: measured", "trigram: measured"}
    lines = [artist(figure.axes[0], f"{order}: measured") for order in ("token", "trigram")]
    assert len({drawn.get_color() for drawn in lines}) == len({drawn.get_marker() for drawn in lines}) == 2
    assert [text for text in legend_texts(figure) if "measured" in text] == ["token: measured", "trigram: measured"]
    assert not [text for text in labels(over_steps(run([0, 10], orders=3)).axes[0]) if "bigram" in text]


def test_a_logarithmic_axis_shows_step_0():
    for log in (True, None):
        figure = over_steps(run([0, 1, 10, 100, 1000]), log=log)
        panel = figure.axes[2]
        figure.draw_without_rendering()
        assert panel.get_xscale() == "symlog"
        low, high = panel.get_xlim()
        assert low < 0 and high > 1000
        assert [text.get_text() for text in panel.get_xticklabels()] == ["0", "1", "10", "100", "1,000"]
        assert panel.get_xlabel() == "training step, logarithmic"
    for even in ([0, 500, 1000], range(0, 40_000, 500)):
        assert over_steps(run(even), log=None).axes[2].get_xscale() == "linear"
    assert over_steps(run([0]), log=True).axes[2].get_xscale() == "linear"


def test_points_that_are_missing_interrupt_the_line_and_are_marked():
    points = [
        measurement(0),
        measurement(10),
        failed(20),
        measurement(30),
        failed(40),
        measurement(50),
        measurement(60),
    ]
    figure = over_steps(points)
    panel = figure.axes[0]
    steps, values = line(panel)
    assert np.isnan(values).tolist() == [False, False, True, False, True, False, False]
    assert steps.tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert artist(panel, "missing").get_xdata().tolist() == [20, 40]
    assert notes(figure) == "Not drawn: 2 of 7 points could not be measured (steps 20, 40)."
    assert "not measured (2)" in legend_texts(figure)
    # Between two gaps, no line would show a point.
    assert artist(panel, "token: complexity_null").get_markevery() == [3]


def test_of_a_long_run_only_lonely_points_are_marked():
    points = [failed(step) if step in (99, 101) else measurement(step) for step in range(200)]
    assert artist(over_steps(points).axes[0], "token: measured").get_markevery() == [100]


def test_bands_of_standard_errors():
    points = [with_errors(step, error) for step, error in ((0, 0.01), (10, 0.02), (20, None))]
    figure = over_steps(points)
    for panel, name in zip(figure.axes, QUANTITIES, strict=True):
        (outline,) = [path.vertices for path in artist(panel, "standard error").get_paths()]
        at_10 = outline[outline[:, 0] == 10][:, 1]
        value = getattr(points[1]["token"], name)
        assert [at_10.min(), at_10.max()] == pytest.approx([value - 0.02, value + 0.02])
        assert outline[:, 0].max() == 10
    assert "± 1 standard error" in legend_texts(figure)
    assert not artists(over_steps(run([0, 10])).axes[0], "standard error")


def test_phases_are_shaded():
    trajectory = synthetic_run([*C, *np.linspace(C[-1], 0.35, 8)], [*E, *[E[-1]] * 8])
    phases = trajectory.phases()
    figure = over_steps(trajectory)
    for panel in figure.axes:
        spans = {}
        for name in ("initial", "fitting", "compression"):
            corners = artist(panel, name).get_extents().transformed(panel.transData.inverted())
            spans[name] = (corners.x0, corners.x1)
        left, right = panel.get_xlim()
        assert spans["initial"] == pytest.approx((left, phases.fit_start))
        assert spans["fitting"] == pytest.approx((phases.fit_start, phases.compression_start))
        assert spans["compression"] == pytest.approx((phases.compression_start, right))
        fills = [np.mean(artist(panel, name).get_facecolor()[:3]) for name in spans]
        assert len({round(float(fill), 2) for fill in fills}) == 3, "told apart in grey"
    assert f"fitting phase, from step {phases.fit_start:,}" in legend_texts(figure)


@pytest.mark.parametrize("picture", [over_steps, information_plane])
def test_phases_are_those_of_the_run_s_own_rule(picture):
    points = synthetic_run(C, E)
    strict = Trajectory(points, phase_rule=PhaseRule(drop=0.5))
    for trajectory, seen in ((points, True), (strict, False)):
        assert any(text.startswith("compression phase") for text in legend_texts(picture(trajectory))) is seen


def test_axes_begin_at_zero_where_that_costs_little():
    figure = over_steps(run([0, 10]))
    assert all(-0.1 < panel.get_ylim()[0] <= 0 for panel in figure.axes)
    figure = over_steps(synthetic_run([0.8, 0.79], [0.78, 0.77], nulls=[0.75, 0.75]))
    assert figure.axes[0].get_ylim()[0] > 0.7


def test_negative_distances_are_drawn():
    panel = over_steps(synthetic_run([0.3, 0.2], [0.4, 0.5])).axes[3]
    assert line(panel)[1].tolist() == pytest.approx([-0.1, -0.3])
    low, high = panel.get_ylim()
    assert low < -0.3 and high > 0


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("steps", [[7], [0, 10], [None, None], range(3000)])
def test_nothing_overlaps_and_nothing_is_cut_off(steps, log):
    figure = over_steps(run(steps, orders=2), log=log, orders=["token", "bigram"], title="a run", theme="dark")
    nothing_overlaps(figure)


def test_mistakes_are_errors():
    with pytest.raises(ValueError, match="at least one measured point to draw, got none among 1 points"):
        over_steps([failed(0)])
    with pytest.raises(ValueError, match="expected orders among token, got bigram"):
        over_steps(run([0]), orders=["bigram"])
    with pytest.raises(TypeError, match="expected measurements, as a Trajectory has them, got str"):
        over_steps("ib_trajectory.jsonl")
