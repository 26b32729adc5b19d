"""Loss and monitored number with the stops of rules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plot_runs import artist, artists, failed, legend_texts, measurement, notes, nothing_overlaps

from ib_callback.plot.stops import MOST_RUNS, stops_over_steps

STEPS = (0, 10, 20, 30)


def points(tokens=None):
    found = [replace(measurement(step), loss=8 - step / 10) for step in STEPS]
    return [replace(p, tokens_seen=None if tokens is None else tokens * p.step) for p in found]


def test_the_numbers_and_the_stops():
    stops = {"the rule": 20, "loss alone": None, "oracle": 30}
    figure = stops_over_steps({"a": [*points(), failed(40)]}, {"a": "optimality"}, {"a": stops})
    loss, monitored = figure.axes
    assert artist(loss, "values").get_xydata()[:4].tolist() == [[0, 8], [10, 7], [20, 6], [30, 5]]
    assert np.isnan(artist(loss, "values").get_ydata()[4])
    assert artist(monitored, "values").get_ydata()[0] == pytest.approx(points()[0].optimality)
    for panel in figure.axes:
        assert artist(panel, "the rule").get_xdata()[0] == 20
        assert artists(panel, "loss alone") == []
    assert legend_texts(figure) == ["stop by the rule", "stop by loss alone", "stop by oracle"]
    assert "a: not stopped by loss alone." in notes(figure)
    nothing_overlaps(figure)


def test_over_tokens_and_of_several_runs():
    runs = {name: points(1_000) for name in "ab"}
    figure = stops_over_steps(
        runs,
        dict.fromkeys(runs, "distance_to_bound"),
        {name: {"oracle": 30} for name in runs},
        x="tokens",
        theme="dark",
    )
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["a", "a", "b", "b"]
    assert artist(figure.axes[0], "oracle").get_xdata()[0] == 30_000
    assert figure.axes[0].get_xlabel() == "training tokens"
    nothing_overlaps(figure)


def test_what_cannot_be_drawn():
    many = {str(number): points() for number in range(MOST_RUNS + 1)}
    with pytest.raises(ValueError, match="1 to 8 runs to draw, got 9"):
        stops_over_steps(many, {}, {})
    with pytest.raises(ValueError, match="at least one measured point"):
        stops_over_steps({"a": [failed(0)]}, {"a": "optimality"}, {"a": {}})
