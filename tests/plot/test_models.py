from __future__ import annotations

import pytest
from plot_runs import artist, direct_labels, labels, legend_texts, measurement, notes, nothing_overlaps, run, with_views

from ib_callback.plot.models import Placed, models_in_plane


def placed(name: str, family: str, *, scale: float = 1.0, steps: tuple[int, ...] = (0, 1000)) -> Placed:
    course = list(run(steps, scale=scale))
    return Placed(name=name, family=family, point=course[-1], course=course)


def test_families_have_colours_and_models_markers() -> None:
    models = [placed("olmo-1b", "olmo"), placed("olmo-7b", "olmo", scale=1.1), placed("smol", "llama", scale=0.8)]
    figure = models_in_plane(models, notes=["beware of something"], theme="dark")
    (panel,) = figure.axes
    first, second, other = (artist(panel, model.name) for model in models)
    assert first.get_color() == second.get_color() != other.get_color()
    assert first.get_marker() != second.get_marker()
    point = models[0].point
    assert (first.get_xdata()[0], first.get_ydata()[0]) == (point.complexity, point.expressivity)
    line = artist(panel, "course of olmo-1b")
    assert list(line.get_xdata()) == [each.complexity for each in models[0].course]
    assert line.get_alpha() < 0.5
    assert {*direct_labels(panel)} == {"olmo-1b", "olmo-7b", "smol"}
    assert "olmo-1b (olmo)" in legend_texts(figure)
    assert "beware of something" in notes(figure)
    nothing_overlaps(figure)


def test_untrained_models_and_orders_that_are_not_there() -> None:
    untrained = measurement(0, orders=2)
    models = [
        Placed(name="a", family="a", point=untrained, course=[untrained]),
        Placed(name="b", family="b", point=measurement(10), course=[]),
    ]
    figure = models_in_plane(models, orders=["token", "bigram"])
    assert "untrained" in labels(figure.axes[0])
    assert "b" not in labels(figure.axes[1])
    with pytest.raises(ValueError, match="expected orders among token, bigram"):
        models_in_plane(models, orders=["trigram"])


def test_every_plane_that_a_model_has() -> None:
    point = with_views(measurement(10), "prediction", error=0.001)
    figure = models_in_plane([Placed(name="a", family="a", point=point, course=[point])])
    assert len(figure.axes) == 3
    assert "chance" in labels(figure.axes[0])
    many = [placed(f"m{i}", f"family {i}", scale=1 + i / 50) for i in range(9)]
    (panel,) = models_in_plane(many, planes=["plain"]).axes
    # Of more families than colours those of one colour have other markers.
    assert len({(artist(panel, m.name).get_color(), artist(panel, m.name).get_marker()) for m in many}) == 9
