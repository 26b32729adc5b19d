from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plot_runs import SETTINGS, artist, artists, legend_texts, measurement, notes, run

from ib_callback.bound.curve import IBCurve
from ib_callback.common.errors import TrajectoryError
from ib_callback.plot import compare, information_plane, plane_by_layer
from ib_callback.plot.bound import curve_beside

NATS = IBCurve([0.0, 1.0, 2.0], [0.0, 0.8, 1.0], [0.0, 2.0, math.inf], mutual_information=1.0, num_codewords=100)
IN_THE_PLANE = np.array([[0.0, 0.0], [1.0, 0.8], [2.0, 1.0]]) / math.log(100)
TEXT = "IB curve: the bound for codes of the probe's tokens"


def stored(**changes: Any) -> dict[str, Any]:
    return {
        "format": 1, "unit": "nats", "complexity": [0.0, 1.0, 2.0], "expressivity": [0.0, 0.8, 1.0],
        "betas": [1.0, 2.0, 4.0], "mutual_information": 1.2, "num_codewords": 100, "probe": SETTINGS["probe"],
        "order": "token", "num_positions": 9810, **changes,
    }  # fmt: skip


def write(directory: Path, **changes: Any) -> Path:
    path = directory / "ib_curve.json"
    path.write_text(json.dumps(stored(**changes)))
    return path


def test_the_curve_is_drawn_in_the_units_of_the_plane_in_the_panel_of_its_order_alone():
    figure = information_plane(run([0, 10], orders=3), curve=NATS)
    token, bigram, trigram, _ = figure.axes
    drawn = artist(token, "IB curve").get_xydata()
    assert np.allclose(drawn[:3], IN_THE_PLANE, rtol=1e-12)
    # More complexity never costs expressivity: to the edge of the panel.
    assert drawn[3, 0] >= token.get_xlim()[1]
    assert drawn[3, 1] == drawn[2, 1]
    assert not artists(bigram, "IB curve") and not artists(trigram, "IB curve")
    assert TEXT in legend_texts(figure)
    limits = token.get_xlim()
    assert limits == information_plane(run([0, 10], orders=3)).axes[0].get_xlim(), "the curve may be cut off"


def test_a_curve_that_names_its_order_is_drawn_there():
    curve = NATS.with_info(order="bigram")
    token, bigram, _ = information_plane(run([0, 10], orders=2), curve=curve).axes
    assert not artists(token, "IB curve")
    assert artist(bigram, "IB curve")


def test_every_picture_of_the_plane_can_have_it_in_any_unit():
    for figure in (
        plane_by_layer(measurement(0), curve=NATS.to_bits()),
        compare({"a": run([0, 10]), "b": run([0, 20])}, curve=NATS.to_efficiency(20)),
    ):
        assert np.allclose(artist(figure.axes[0], "IB curve").get_xydata()[:3], IN_THE_PLANE, rtol=1e-12)
        assert TEXT in legend_texts(figure)


def test_a_curve_of_another_probe_is_not_drawn_and_the_picture_says_so():
    figure = information_plane(run([0, 10]), curve=NATS.with_info(probe="b" * 64))
    assert not artists(figure.axes[0], "IB curve")
    assert TEXT not in legend_texts(figure)
    assert notes(figure) == "The IB curve is not drawn: it belongs to another probe."
    other = information_plane(run([0, 10], settings={**SETTINGS, "K": 4}), curve=NATS.with_info(K=2))
    assert not artists(other.axes[0], "IB curve")
    assert "it belongs to other positions" in notes(other)
    unknown = information_plane(run([0, 10], settings={"primary": "token"}), curve=NATS)
    assert not artists(unknown.axes[0], "IB curve")
    assert "which the settings do not say" in notes(unknown)


def test_the_file_beside_a_trajectory(tmp_path):
    assert curve_beside(tmp_path / "ib_curve.json") is None
    write(tmp_path)
    curve = curve_beside(tmp_path / "ib_curve.json")
    assert curve == IBCurve.load(tmp_path / "ib_curve.json")
    assert (curve.info["order"], curve.info["probe"]) == ("token", SETTINGS["probe"])
    drawn = artist(information_plane(run([0, 10]), curve=curve).axes[0], "IB curve").get_xydata()
    assert np.allclose(drawn[:3], IN_THE_PLANE, rtol=1e-12)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1', json.dumps(stored(format=2))])
def test_a_file_that_is_none_is_an_error_with_a_cure(tmp_path, content):
    path = tmp_path / "ib_curve.json"
    path.write_text(content)
    with pytest.raises(TrajectoryError, match=r"ib_curve\.json: expected .*Or move .*ib_curve\.json away"):
        curve_beside(path)
