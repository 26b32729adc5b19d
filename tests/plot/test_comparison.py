from __future__ import annotations

import warnings

import numpy as np
import pytest
from plot_runs import (
    SETTINGS,
    artist,
    artists,
    direct_labels,
    failed,
    legend_texts,
    measurement,
    notes,
    nothing_overlaps,
    run,
)

from ib_callback.plot import compare, information_plane


def test_every_run_is_a_line_with_its_name_at_its_end():
    runs = {"small": run([0, 10, 20]), "large": run([0, 10], scale=1.2)}
    figure = compare(runs)
    (panel,) = figure.axes
    for name, trajectory in runs.items():
        values = [[m["token"].complexity, m["token"].expressivity] for m in trajectory]
        assert np.array_equal(artist(panel, name).get_xydata(), values)
    firsts = [m.get_xydata()[0].tolist() for m in artists(panel, "first")]
    assert firsts == [[t[0].complexity, t[0].expressivity] for t in runs.values()]
    lasts = [m.get_xydata()[0].tolist() for m in artists(panel, "last")]
    assert lasts == [[t[-1].complexity, t[-1].expressivity] for t in runs.values()]
    nulls = [m.get_xydata()[0].tolist() for m in artists(panel, "null")]
    assert nulls == [[t[-1]["token"].complexity_null, t[-1]["token"].expressivity_null] for t in runs.values()]
    assert direct_labels(panel) == ["small", "large"]
    assert legend_texts(figure)[:2] == ["small", "large"]


def test_runs_are_told_apart_without_colour():
    (panel,) = compare({f"run {i}": run([0, 10]) for i in range(28)}).axes
    looks = [artist(panel, f"run {i}") for i in range(28)]
    without_colour = {(look.get_marker(), str(look._dash_pattern)) for look in looks[:12]}
    assert len(without_colour) == 12
    assert len({(look.get_marker(), str(look._dash_pattern), look.get_color()) for look in looks}) == 28
    assert direct_labels(panel) == [], "of so many, the names would hide what they name"


def test_a_model_measured_once_is_a_point():
    figure = compare({"gpt2": measurement(None), "gpt2-medium": measurement(None, scale=1.1)})
    (panel,) = figure.axes
    assert len(artist(panel, "gpt2").get_xydata()) == 1
    assert not artists(panel, "first")
    assert artist(panel, "gpt2").get_linestyle() == "None"


def test_other_settings_are_a_warning_and_a_note():
    other = {**SETTINGS, "num_bins": 64, "probe": "b" * 64}
    with pytest.warns(RuntimeWarning, match=r"Not comparable: a and b differ in num_bins: 100 vs 64; probe: a{8}… vs"):
        figure = compare({"a": run([0, 10]), "b": run([0, 10], settings=other)})
    assert "Not comparable: a and b differ in num_bins: 100 vs 64; probe: aaaaaaaa… vs bbbbbbbb…" in notes(figure)


def test_another_model_is_a_note_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = compare(
            {
                "a": run([0, 10], settings={**SETTINGS, "layers": ["h.0"], "dtype": "float32"}),
                "b": run([0, 10], settings={**SETTINGS, "layers": ["h.0", "h.1"], "dtype": "bfloat16"}),
            }
        )
        pairs = run([0, 10], settings={**SETTINGS, "feature_probes": {"preference": "c" * 64}})
        assert notes(compare({"a": run([0, 10]), "b": pairs})) == "The runs differ in feature_probes."
        assert "Not comparable" not in notes(information_plane([*run([0]), pairs[1]]))
    assert notes(figure) == "The runs differ in layers, dtype."
    assert notes(compare({"a": run([0]), "b": run([0])})) == ""


def test_missing_points_are_counted_by_run_and_a_run_may_lack_an_order():
    runs = {"a": [measurement(0, orders=2), failed(10), measurement(20, orders=2)], "b": run([0, 10])}
    figure = compare(runs, orders=["token", "bigram"])
    assert "a: Not drawn: 1 of 3 points could not be measured (step 10)." in notes(figure)
    token, bigram = figure.axes
    assert len(artist(token, "a").get_xydata()) == 2
    assert not artists(bigram, "b")
    assert bigram.get_title(loc="right") == "1 without bigram"


@pytest.mark.parametrize("count", [2, 10, 30])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_overlaps_and_nothing_is_cut_off(count, theme):
    name = "runs/2026-11-24/a-run-with-a-very-long-name-indeed/version_{}/checkpoints"
    runs = {name.format(i): run([0, 10, 20], scale=1 + i / 50) for i in range(count)}
    figure = compare(runs, theme=theme, title="several runs")
    nothing_overlaps(figure)
    # What they have in common is left out, not what tells them apart.
    assert legend_texts(figure)[:count] == [f"version_{i}" for i in range(count)]
    texts = [text for text in figure.axes[0].texts if text.get_gid() == "direct label"]
    boxes = [text.get_bbox_patch().get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    if count == 2:
        assert [text.get_text() for text in texts] == ["version_0", "version_1"]


def test_mistakes_are_errors():
    with pytest.raises(TypeError, match=r'expected runs by name, \{"name": trajectory, …\}, got Trajectory'):
        compare(run([0]))
    with pytest.raises(ValueError, match="at least one run to draw, got none"):
        compare({})
    with pytest.raises(ValueError, match="bad: expected at least one measured point to draw, got none among 1 points"):
        compare({"good": run([0]), "bad": [failed(0)]})
    with pytest.raises(ValueError, match="expected orders among token, got bigram"):
        compare({"a": run([0]), "b": run([0])}, orders=["bigram"])


def test_turns_are_marked():
    runs = {"a": run([0, 10, 100]), "b": run([0, 10, 100], scale=0.8)}
    figure = compare(runs, marks={"a": 10})
    (panel,) = figure.axes
    star = artist(panel, "turn")
    assert star.get_xydata().tolist() == [[runs["a"][1].complexity, runs["a"][1].expressivity]]
    assert "turn to compression" in legend_texts(figure)
    assert "turn to compression" not in legend_texts(compare(runs))
