from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from plot_runs import (
    artist,
    artists,
    direct_labels,
    failed,
    legend_texts,
    measurement,
    nothing_overlaps,
    run,
    with_views,
)

from ib_callback.bound.curve import IBCurve
from ib_callback.plot import compare, information_plane
from ib_callback.results.measurement import Measurement

BOTH = ("readout", "prediction")
# Views and whether there are local numbers, and the planes that follow: name, order and the numbers' ending.
CASES: dict[str, tuple[Sequence[str], bool, list[tuple[str, str, str]]]] = {
    "an older version": ((), False, [("", "token", "")]),
    "without an output": (("late", "last"), True, [("local", "token", "_local"), ("plain", "token", "")]),
    "without the prediction": (
        ("readout",), True,
        [("readout", "readout/token", "_local"), ("local", "token", "_local"), ("plain", "token", "")],
    ),
    "all": (
        ("prediction", "late", "readout"), True,
        [("prediction", "prediction/token", "_local"), ("readout", "readout/token", "_local"),
         ("local", "token", "_local"), ("plain", "token", "")],
    ),
    "short sequences": (
        BOTH, False, [("prediction", "prediction/token", ""), ("readout", "readout/token", ""), ("plain", "token", "")],
    ),
}  # fmt: skip
STEPS = (0, 10, 40)


def points(*views: str, steps: Sequence[int] = STEPS, orders: int = 1, **options: Any) -> list[Measurement]:
    return [with_views(point, *views, **options) for point in run(steps, orders=orders)]


def one(given: Sequence[Measurement], **options: Any) -> Any:
    return information_plane(given, **options)


def several(given: Sequence[Measurement], **options: Any) -> Any:
    return compare({"a": given, "b": given[:-1]}, **options)


def panels(figure: Any) -> list[Any]:
    """Without the colour bar."""
    return [panel for panel in figure.axes if artists(panel, "diagonal")]


def titles(figure: Any) -> list[str]:
    return [panel.get_title() or panel.get_title(loc="left") for panel in panels(figure)]


def values(given: Sequence[Measurement], order: str, ending: str) -> list[list[float]]:
    return [[getattr(m[order], f"{name}{ending}") for name in ("complexity", "expressivity")] for m in given]


@pytest.mark.parametrize("picture", [one, several])
@pytest.mark.parametrize("case", CASES)
def test_every_plane_that_the_points_have_is_drawn_with_its_numbers_and_its_chance(case, picture):
    views, local, expected = CASES[case]
    given = points(*views, local=local)
    figure = picture(given)
    assert titles(figure) == [f"token: {name}" if name else "token" for name, _, _ in expected]
    for panel, (_, order, ending) in zip(panels(figure), expected, strict=True):
        course = artist(panel, "course" if picture is one else "a").get_xydata()
        assert np.array_equal(course, values(given, order, ending))
        assert panel.get_xlabel().startswith("local complexity" if ending else "complexity: information about")
        if ending:
            assert artist(panel, "chance").get_xydata().tolist() == [[0.0, 0.0]]
            assert not artists(panel, "null")
        else:
            null = artists(panel, "null")[0]
            drawn = null.get_offsets() if picture is one else null.get_xydata()
            assert np.array_equal(drawn[-1:], values(given, order, "_null")[-1:])
            assert not artists(panel, "chance")
    assert ("chance: no local information" in legend_texts(figure)) is local
    nothing_overlaps(figure)


@pytest.mark.parametrize("picture", [one, several])
def test_planes_can_be_chosen(picture):
    given = points("readout")
    assert titles(picture(given, planes=["readout", "plain"])) == ["token: readout", "token: plain"]
    assert titles(picture(given, planes=["plain"])) == titles(picture(given, planes="plain")) == ["token"]
    for asked, got in ((["prediction"], "prediction"), (["local", "late"], "local, late"), ([], "none")):
        with pytest.raises(ValueError, match=f"expected planes among readout, local, plain, got {got}$"):
            picture(given, planes=asked)


@pytest.mark.parametrize("picture", [one, several])
def test_step_0_is_marked_and_named_in_every_plane_that_has_it(picture):
    lost = [with_views(measurement(0), *BOTH, lost=["token"]), *points(*BOTH)[1:]]
    for given, marked in (
        (points(*BOTH), [True] * 4),
        (points(*BOTH, steps=(5, 10, 40)), [False] * 4),
        ([failed(0), *points(*BOTH)[1:]], [False] * 4),
        (lost, [False, False, False, True]),
    ):
        figure = picture(given)
        assert [bool(artists(panel, "untrained")) for panel in panels(figure)] == marked
        assert ("step 0: before training" in legend_texts(figure)) is any(marked)
        for panel in panels(figure):
            course = artist(panel, "course" if picture is one else "a").get_xydata()
            assert all(np.array_equal(drawn.get_xydata(), course[:1]) for drawn in artists(panel, "untrained"))
            assert ("step 0" in direct_labels(panel)) is (picture is one and bool(artists(panel, "untrained")))
    assert not artists(information_plane(measurement(0)).axes[0], "untrained"), "the legend says the step"


def test_what_a_plane_lacks_is_left_out_and_counted():
    given = [*points(*BOTH, orders=4), with_views(measurement(60, orders=4), "readout", lost=["quadgram"])]
    figure = information_plane(given)
    absent = {f"{order}: prediction" for order in given[0]} | {"quadgram: local", "quadgram: readout"}
    for title, panel in zip(titles(figure), panels(figure), strict=True):
        assert panel.get_title(loc="right") == ("1 missing" if title in absent else "")
        assert len(artist(panel, "course").get_xydata()) == 4 - (title in absent)
    nothing_overlaps(figure)
    alone = compare({"a": points("readout"), "b": points()}, planes=["readout"])
    assert alone.axes[0].get_title(loc="right") == "1 missing"


@pytest.mark.parametrize("picture", [one, several])
def test_what_is_within_three_standard_errors_of_an_axis_is_shaded(picture):
    given = [
        with_views(measurement(step), "readout", error=error) for step, error in ((0, 0.01), (10, 0.02), (20, None))
    ]
    figure = picture(given)
    *others, plain = panels(figure)
    for panel in others:
        across, upright = (
            band.get_extents().transformed(panel.transData.inverted()) for band in artists(panel, "near chance")
        )
        assert [across.x0, across.x1, upright.y0, upright.y1] == pytest.approx([-0.06, 0.06] * 2)
    assert not artists(plain, "near chance")
    assert "within 3 standard errors of 0 (largest error)" in legend_texts(figure)
    assert not any(artists(panel, "near chance") for panel in panels(picture(points("readout"))))


def test_baseline_false_leaves_out_chance():
    figure = information_plane(points(*BOTH, error=0.01), baseline=False)
    for name in ("chance", "near chance", "null", "ceiling"):
        assert not any(artists(panel, name) for panel in panels(figure))


def test_curve_and_ceiling_are_of_the_plain_plane():
    curve = IBCurve([0.0, 1.0], [0.0, 0.8], [0.0, 2.0], mutual_information=1.0, num_codewords=100)
    for picture, names in ((one, ("IB curve", "ceiling")), (several, ("IB curve",))):
        for local in (True, False):
            *others, plain = panels(picture(points(*BOTH, local=local), curve=curve))
            assert all(artists(plain, name) for name in names)
            assert not any(artists(panel, name) for panel in others for name in names)


def test_of_several_orders_each_has_a_row_and_each_plane_one_scale():
    given = points(*BOTH, orders=3)
    figure = information_plane(given, orders=list(given[0].orders))
    drawn = panels(figure)
    assert titles(figure)[:5] == [
        "token: prediction",
        "token: readout",
        "token: local",
        "token: plain",
        "bigram: prediction",
    ]
    boxes = [panel.get_position() for panel in drawn]
    for row in range(3):
        assert len({box.y0 for box in boxes[4 * row : 4 * row + 4]}) == 1
    limits = [{panel.get_xlim() for panel in drawn[column::4]} for column in range(4)]
    assert [len(each) for each in limits] == [1] * 4
    assert len(set.union(*limits)) == 4
    assert all(panel.get_xlim() == panel.get_ylim() for panel in drawn)


@pytest.mark.parametrize(
    ("orders", "planes"),
    [(1, None), (1, ["local", "readout"]), (5, None), (4, ["prediction"]), (2, ["plain", "local"])],
)
def test_nothing_overlaps_and_nothing_is_cut_off(orders, planes):
    given = points(*BOTH, orders=orders, error=0.01)
    every = list(given[0].orders)
    nothing_overlaps(information_plane(given, orders=every, planes=planes, title="a run", theme="dark"))
    nothing_overlaps(compare({"a": given, "b": given[:2]}, planes=planes, orders=every))


def test_by_default_there_is_one_order_where_there_are_several_planes():
    given = points(*BOTH, orders=3)
    names = [f"token: {plane}" for plane in ("prediction", "readout", "local", "plain")]
    assert titles(information_plane(given)) == names
    assert titles(information_plane(given, planes=["local"])) == [f"{order}: local" for order in given[0].orders]
