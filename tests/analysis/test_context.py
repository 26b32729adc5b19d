"""Widths of context: increments by hand, what they are held against, and what a probe resolves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from plot_runs import failed, measurement

from ib_callback.analysis.context import chance_increment, contexts_text, find_contexts, widths_of
from ib_callback.analysis.courses import Course
from ib_callback.estimator.increment import increment_of
from ib_callback.results.measurement import Measurement
from ib_callback.results.points import OrderIncrement, PlanePoint
from ib_callback.results.trajectory import Trajectory
from ib_callback.results.uncertainty import jackknife_error


def course(points: Iterable[Measurement], name: str = "a") -> Course:
    points = list(points)
    heads = [({"model": name, "step": point.step}, point) for point in points]
    return Course(name=name, trajectory=Trajectory(points, mixed=True), curve=None, points=heads, path=None)


def plane(complexity: float, null: float, *, error: float = 0.001, **changes: object) -> PlanePoint:
    point = PlanePoint.from_layers(
        [complexity], [0.9 * complexity], complexity_null=null, complexity_null_se=error, expressivity_null=null,
        expressivity_null_se=error,
    )  # fmt: skip
    return replace(point, **changes)


def with_orders(**orders: PlanePoint) -> Measurement:
    return replace(measurement(0), orders=orders, ceiling=1.0)


def test_increments_by_hand():
    # Of the token .3 of .8 that are free; were the trigram no better, it would have .375 of what is free there.
    token, wide = widths_of(with_orders(trigram=plane(0.9, 0.6), token=plane(0.5, 0.2)))
    assert (token.order, token.increment, token.exceeds) == ("token", None, None)
    assert token.adjusted == pytest.approx(0.375)
    assert (wide.order, wide.null_share) == ("trigram", pytest.approx(0.6))
    assert wide.increment == pytest.approx(0.4)
    assert wide.increment_chance == pytest.approx(0.6 + 0.4 * 0.375 - 0.5)
    assert wide.increment_excess == pytest.approx(0.15)
    assert wide.increment_se == pytest.approx(math.sqrt(2) * 0.001)
    assert wide.exceeds


@pytest.mark.parametrize(
    ("complexity", "error", "exceeds"),
    # By chance .25. The first is more than 15 % of that above it, .2875, the second within three errors of it as well.
    [(0.80, 0.001, True), (0.78, 0.001, None), (0.80, 0.01, None), (0.6, 0.001, None)],
)
def test_what_exceeds_chance(complexity, error, exceeds):
    wide = widths_of(with_orders(token=plane(0.5, 0.2, error=error), bigram=plane(complexity, 0.6, error=error)))[1]
    assert wide.exceeds is exceeds


def test_the_error_of_the_text_is_paired():
    ours, its = (0.31, 0.29, 0.30, 0.31, 0.29), (0.11, 0.09, 0.10, 0.11, 0.09)
    null = {"complexity_null_jackknife": (0.2,) * 5, "expressivity_null_jackknife": (0.2,) * 5}
    points = (
        plane(0.5, 0.2, complexity_jackknife=tuple(0.2 + value for value in ours), **null),
        plane(0.7, 0.6, complexity_jackknife=tuple(0.2 + value for value in its), **null),
    )
    wide = widths_of(with_orders(token=points[0], bigram=points[1]))[1]
    # Both move alike, so that nothing is left of it.
    assert jackknife_error(0.3, ours) > 0.01
    assert wide.increment_se == pytest.approx(math.sqrt(2) * 0.001, rel=1e-6)


@pytest.mark.parametrize("depends", [False, True])
def test_chance_is_about_what_permuting_wide_labels_within_narrow_ones_gives(depends):
    # States of 12 tokens, and of the one before them if they depend on that, with noise.
    random = torch.Generator().manual_seed(0)
    narrow, before = torch.randint(12, (2, 800), generator=random)
    wide = 12 * narrow + before
    centres, pairs = torch.randn(12, 8, generator=random), torch.randn(144, 8, generator=random)
    scores = centres[narrow] + (1.5 * pairs[wide] if depends else 0) + torch.randn(800, 8, generator=random)
    table = scores.double().softmax(-1)
    exact = increment_of(table, narrow, wide, None, num_permutations=20, seed=0)

    def point(labels: torch.Tensor) -> PlanePoint:
        one = torch.zeros_like(labels)
        plain = increment_of(table, one, labels, None, num_permutations=20, seed=0)
        return PlanePoint.from_layers(
            [plain.information], [plain.information], complexity_null=plain.null, expressivity_null=plain.null
        )

    ceiling = increment_of(table, torch.zeros_like(narrow), torch.arange(len(narrow)), None, num_permutations=2, seed=0)
    found = chance_increment(point(narrow), point(wide), ceiling.information)
    assert found == pytest.approx(exact.null, rel=0.15)
    excess = exact.information - found
    assert excess > 0.2 * exact.null if depends else abs(excess) < 0.15 * exact.null


def permuted(p_value: float, positions: int = 500) -> OrderIncrement:
    return OrderIncrement(
        narrower="token", information=0.3, null=0.26, null_std=0.01, p_value=p_value, num_permutations=20,
        num_positions=positions,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tested", "exceeds", "shown"),
    [(permuted(0.04), True, "yes"), (permuted(0.3), False, "no"), (permuted(1.0, 0), None, "?")],
)
def test_permutations_decide_where_they_were_made(tested, exceeds, shown):
    # The estimate would say yes of all of them.
    orders = {"token": plane(0.5, 0.2), "bigram": plane(0.8, 0.6)}
    point = replace(
        with_orders(**orders), increments={"complexity": {"bigram": tested}, "expressivity": {"bigram": permuted(0.9)}}
    )
    (found,) = find_contexts([course([point])])
    token, wide = found.widths
    assert (token.exceeds, token.increment_p_value) == (None, None)
    assert (wide.increment, wide.increment_chance, wide.increment_se) == (0.3, 0.26, 0.01)
    assert wide.increment_excess == pytest.approx(0.04)
    assert (wide.exceeds, wide.increment_p_value) == (exceeds, tested.p_value)
    row = [*found.rows()][1]
    assert (row["increment_p_value"], row["expressivity_increment_chance"]) == (tested.p_value, 0.26)
    assert row["expressivity_increment_p_value"] == 0.9
    text = contexts_text([found])
    assert f"Adds more complexity than chance: bigram {shown}. Adds more expressivity than chance: bigram no." in text
    assert "--increments" not in text
    assert "measure the model again with ib-callback measure … --increments 20" in contexts_text(
        find_contexts([course([with_orders(**orders)])])
    )


@pytest.mark.parametrize(
    ("changes", "resolved", "by"),
    [
        ({}, True, "complexity_above_null"),
        ({"complexity_above_null_se": 0.2}, False, "complexity_above_null"),
        ({"complexity_local": 0.05, "complexity_local_se": 0.01}, True, "complexity_local"),
        ({"complexity_local": 0.05, "complexity_local_se": 0.02}, False, "complexity_local"),
        ({"complexity_above_null": None}, None, None),
        ({"complexity_null_se": None}, None, "complexity_above_null"),
    ],
)
def test_what_the_probe_resolves(changes, resolved, by):
    (width,) = widths_of(with_orders(token=plane(0.5, 0.2, **changes)))
    assert (width.resolved, width.resolved_by) == (resolved, by)


def test_the_widest_order_has_all_narrower_ones_resolved():
    weak = {"complexity_local": 0.01, "complexity_local_se": 0.02}
    orders = {"token": plane(0.5, 0.2), "bigram": plane(0.7, 0.6), "trigram": plane(0.9, 0.89, **weak)}
    (found,) = find_contexts([course([with_orders(**orders, quadgram=plane(0.95, 0.93))])])
    assert [width.order for width in found.widths] == ["token", "bigram", "trigram", "quadgram"]
    assert found.widest == "bigram"
    assert [row["is_widest_resolved"] for row in found.rows()] == [False, True, False, False]
    text = contexts_text([found])
    assert "the probe resolves orders up to the bigram." in text
    assert "The null of the quadgram is 93% of the ceiling, so the size of its information cannot be read." in text


def test_which_point():
    points = [measurement(step, orders=2) for step in (0, 100, 200)]
    assert find_contexts([course(points)])[0].step == 200
    assert find_contexts([course(points)], "100")[0].step == 100
    one, other = find_contexts([course(points), course(points[:1], "b")], "200")
    assert (one.step, other.widths) == (200, ())
    assert "b: no point was measured at step 200. The nearest measured steps are 0." in contexts_text([one, other])
    with pytest.raises(ValueError, match=r"--step 7: a: .* The nearest measured steps are 0, 100, 200"):
        find_contexts([course(points)], "7")
    with pytest.raises(ValueError, match="expected a number, last or best, got 'first'"):
        find_contexts([course(points)], "first")
    with pytest.raises(ValueError, match="no point can be selected as the best"):
        find_contexts([course(points)], "best")


def test_points_that_lack_things():
    assert "no point was measured" in contexts_text(find_contexts([course([failed(0)]), course([measurement(0)])]))
    assert "Nothing can be concluded" in contexts_text(find_contexts([course([measurement(0)])]))
    bare = find_contexts([course([measurement(0, orders=3, null=False)])])
    assert all(width.exceeds is None and width.resolved is None for width in bare[0].widths)
    assert "the probe resolves no order." in contexts_text(bare)


def test_nearer_the_bound():
    # Plain .5 and .9, of which only .2 of .4 and .1 of .5 are above null.
    def point(complexity: float, expressivity: float, null: float) -> PlanePoint:
        nulls = {"complexity_null": null, "expressivity_null": null}
        errors = dict.fromkeys((f"{name}_se" for name in nulls), 0.001)
        return PlanePoint.from_layers([complexity], [expressivity], **nulls, **errors)

    text = contexts_text(
        find_contexts([course([with_orders(token=point(0.6, 0.4, 0.2), bigram=point(1.0, 0.6, 0.5))])])
    )
    assert "optimality rises with every wider order: in 0 of 1 (plain), in 0 of 1 (above null)." in text
    text = contexts_text(
        find_contexts([course([with_orders(token=point(0.6, 0.4, 0.2), bigram=point(1.0, 0.9, 0.9))])])
    )
    assert "in 1 of 1 (plain), in 0 of 1 (above null)" in text
    assert "The null alone has an optimality of 1.000 to 1.000." in text
