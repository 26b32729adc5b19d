from __future__ import annotations

import math

import pytest
from plot_runs import artist, direct_labels, labels, legend_texts, notes, nothing_overlaps

from ib_callback.plot.scatter import Panel, scatter


def test_a_panel_a_metric_and_a_colour_a_family() -> None:
    panels = [
        Panel(metric="optimality", values=[0.1, 0.2, 0.3, 0.4], text="r +0.64"),
        Panel(metric="preference/ratio", values=[0.3, math.nan, 0.1, 0.2], text="r -0.10"),
    ]
    figure = scatter(
        panels, [1.0, 2.0, 3.0, 2.5], score="mmlu_pro", names=["m0", "m1", "m2", "m3"], families=["a", "a", "b", "b"],
        notes=["small"], title="Scores",
    )  # fmt: skip
    first, second = figure.axes
    assert list(artist(first, "a").get_xdata()) == [0.1, 0.2]
    assert list(artist(first, "b").get_ydata()) == [3.0, 2.5]
    assert list(artist(second, "a").get_xdata()) == [0.3]
    assert {*direct_labels(first)} == {"m0", "m1", "m2", "m3"}
    assert (first.get_xlabel(), first.get_ylabel(), second.get_ylabel()) == ("optimality", "mmlu_pro", "")
    assert first.get_title(loc="left") == "r +0.64"
    assert {"a", "b"} <= labels(first)
    assert legend_texts(figure) == ["a", "b"]
    assert "small" in notes(figure)
    nothing_overlaps(figure)


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="at least one metric"):
        scatter([], [1.0], score="x", names=["a"], families=["a"])
