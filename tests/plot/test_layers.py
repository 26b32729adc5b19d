from __future__ import annotations

import numpy as np
import pytest
from plot_runs import artist, artists, direct_labels, failed, legend_texts, measurement, notes, nothing_overlaps, run

from ib_callback.plot import plane_by_layer

FOUR = (*(f"model.layers.{i}" for i in range(3)), "model.norm")
EIGHTY = (*(f"transformer.h.{i}" for i in range(79)), "transformer.ln_f")


@pytest.mark.parametrize("names", [FOUR, EIGHTY, ("encoder",)])
def test_every_layer_is_a_point_and_they_are_joined_in_order(names):
    point = measurement(1000, orders=2, layers=names)
    figure = plane_by_layer(point)
    assert [panel.get_title() or panel.get_title(loc="left") for panel in figure.axes[:2]] == ["token", "bigram"]
    for panel, order in zip(figure.axes, ("token", "bigram"), strict=False):
        values = np.stack([point[order].complexity_by_layer, point[order].expressivity_by_layer], axis=1)
        assert np.array_equal(artist(panel, "layers").get_offsets(), values)
        assert np.array_equal(artist(panel, "course").get_xydata(), values)
        colours = artist(panel, "layers").get_facecolors()
        assert len(np.unique(colours, axis=0)) == len(names), "each depth has its colour"
        low, high = panel.get_xlim()
        assert low < values.min() < values.max() < high
    if len(names) > 1:
        mean = artist(figure.axes[0], "mean").get_xydata()
        assert np.allclose(mean, [[point.complexity, point.expressivity]], rtol=1e-12)
        assert figure.axes[-1].get_ylabel() == "depth (1 is the first layer)"
    else:
        assert not artists(figure.axes[0], "mean"), "it would lie on the layer"
        assert len(figure.axes) == 2, "and there is no bar of one colour"


def test_few_layers_are_all_named_and_of_many_some():
    assert direct_labels(plane_by_layer(measurement(0, layers=FOUR)).axes[0]) == ["layers.0", "layers.1", "layers.2",
                                                                                  "norm"]  # fmt: skip
    assert direct_labels(plane_by_layer(measurement(0, layers=EIGHTY)).axes[0]) == ["h.0", "h.13", "h.26", "h.40",
                                                                                    "h.53", "h.66", "ln_f"]  # fmt: skip


def test_long_names_keep_what_tells_them_apart():
    names = [f"base_model.model.encoder.block.{i}.a_very_long_name_of_a_submodule.{i}" for i in (3, 14)]
    short = direct_labels(plane_by_layer(measurement(0, layers=names)).axes[0])
    assert [name[:7] for name in short] == ["block.3", "block.1"]
    assert short[0].endswith(".3") and short[1].endswith(".14")
    assert all(len(name) <= 24 for name in short)
    for few in (["encoder"], ["0", "1"]):
        assert direct_labels(plane_by_layer(measurement(0, layers=few)).axes[0]) == few


@pytest.mark.parametrize("names", [FOUR, EIGHTY])
def test_nothing_overlaps_and_nothing_is_cut_off(names):
    nothing_overlaps(plane_by_layer(measurement(1000, orders=4, layers=names), theme="dark"))


def test_the_null_is_a_cross_or_a_number_where_it_would_press_the_layers_together():
    near = plane_by_layer(measurement(0, layers=FOUR))
    (far,) = plane_by_layer(measurement(0, layers=("h.0",))).axes
    # Complexity .4 to .55 and expressivity from .233 on; the nulls are .1 and .09.
    assert not artists(near.axes[0], "null")
    assert near.axes[0].get_title(loc="right") == "null of the mean: 0.100, 0.090"
    assert far.get_title(loc="right") == "null of the mean: 0.100, 0.090"
    wide = measurement(0, orders=1, layers=FOUR, scale=1.0)
    lowest = type(wide["token"]).from_layers(
        [0.1, 0.5], [0.05, 0.2], complexity_null=0.12, complexity_null_se=0.0, expressivity_null=0.11,
        expressivity_null_se=0.0,
    )  # fmt: skip
    changed = {"orders": {"token": lowest}, "layers": ("a", "b"), "entropy_by_layer": (0.7, 0.7)}
    figure = plane_by_layer(type(wide)(**{**wide.__dict__, **changed}))
    assert artist(figure.axes[0], "null").get_xydata().tolist() == [[0.12, 0.11]]
    assert "null of the mean: what chance alone gives" in legend_texts(figure)


def test_the_title_is_the_step_and_mistakes_are_errors():
    assert notes(plane_by_layer(measurement(12_500))) == "By layer, step 12,500"
    assert notes(plane_by_layer(measurement(None))) == "By layer"
    assert notes(plane_by_layer(measurement(3), title="a model")) == "a model"
    with pytest.raises(ValueError, match="expected a point that was measured, got one that was not: NaN in h"):
        plane_by_layer(failed(3))
    with pytest.raises(TypeError, match=r"expected one Measurement, such as trajectory\[-1\], got Trajectory"):
        plane_by_layer(run([0]))
    with pytest.raises(ValueError, match="expected orders among token, got bigram"):
        plane_by_layer(measurement(0), orders=["bigram"])
