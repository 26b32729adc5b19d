"""Replays of stopping rules against a loop by hand, and what they saved and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
from synthetic_runs import C, E, curve, failed, measured, real, run

from ib_callback.analysis.courses import Course
from ib_callback.analysis.replay import RULES, Replay, replay_run, replay_runs, replays_text
from ib_callback.results.measurement import Measurement
from ib_callback.results.stopping import PlateauStopping
from ib_callback.results.trajectory import Trajectory


def course(points: Sequence[Measurement], name: str = "a") -> Course:
    return Course(name=name, trajectory=Trajectory(points, mixed=True), curve=None, points=[], path=None)


def with_losses(losses: Sequence[float | None], **changes: object) -> list[Measurement]:
    return [replace(p, loss=loss, **changes) for p, loss in zip(run(C, E), losses, strict=True)]


# Lowest, 4.0, at 10, step 1,000; then up by .1 a point to 6.0 at 30.
RISING = curve((0, 8.0), (10, 4.0), (30, 6.0))


@cache
def example() -> Replay:
    return replay_run(course(with_losses(RISING)), PlateauStopping(patience=3))


@pytest.mark.parametrize("guard", ["loss", 0.2, None])
@pytest.mark.parametrize("patience", [2, 5])
@pytest.mark.parametrize("monitor", ["distance_to_bound", "optimality"])
@pytest.mark.parametrize("name", ["overfit", "healthy_4x128", "flat"])
def test_a_replay_is_a_loop_over_the_rule(name, monitor, patience, guard):
    points = with_losses(curve((0, 8.0), (12, 4.0), (30, 4.0))) if name == "flat" else list(real(name))
    settings = {"mode": "max" if monitor == "optimality" else "min", "patience": patience, "guard": guard}
    rule, expected = PlateauStopping(monitor, **settings), (None, None)
    for point in points:
        decision = rule.update(point)
        expected = (None, decision.reason.value)
        if decision.stop:
            expected = (point.step, decision.reason.value)
            break
    stop = replay_run(course(points), PlateauStopping(monitor, **settings)).stops[0]
    assert (stop.step, stop.reason, stop.message) == (*expected, decision.message)


def test_what_is_saved_and_what_it_costs_by_hand():
    stops = {stop.rule: stop for stop in example().stops}
    assert tuple(stops) == RULES
    # No better at 1,100, 1,200 and 1,300.
    alone = stops["loss alone"]
    assert (alone.step, alone.reason, alone.steps_saved) == (1300, "plateau", 1700)
    assert alone.share_saved == pytest.approx(17 / 30)
    assert (alone.loss, alone.above_lowest, alone.above_last) == pytest.approx((4.3, 0.3, -1.7))
    assert alone.best_above_lowest == 0
    oracle, end = stops["oracle"], stops["no stopping"]
    assert (oracle.step, oracle.above_lowest, oracle.steps_saved) == (1000, 0.0, 2000)
    assert (end.step, end.steps_saved, end.share_saved, end.above_last) == (None, 0, 0.0, 0.0)
    assert end.above_lowest == pytest.approx(2.0)


def test_a_rule_that_stops_before_the_minimum_costs_even_if_the_best_is_kept():
    losses = curve((0, 8.0), (5, 5.0), (10, 5.2), (20, 4.0), (30, 4.0))
    stops = {stop.rule: stop for stop in replay_run(course(with_losses(losses)), PlateauStopping(patience=3)).stops}
    assert stops["loss alone"].step == 800
    assert stops["loss alone"].best_above_lowest == pytest.approx(1.0)
    assert stops["oracle"].step == 2000


def test_tokens_and_time():
    points = [
        replace(point, tokens_seen=1000 * index, seconds=2.0, overhead=0.1)
        for index, point in enumerate(with_losses(RISING))
    ]
    alone = replay_run(course(points), PlateauStopping(patience=3)).stops[1]
    assert alone.tokens_saved == 17_000
    # Fourteen measurements of two seconds are a tenth of 280 s, and all 31 of 620 s.
    assert alone.seconds_saved == pytest.approx(340.0)
    assert example().stops[1].tokens_saved is None
    assert example().stops[1].seconds_saved is None


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (list(run(C, E)), "No held-out loss was measured, so the cost of a stop is not known"),
        ([failed(0), *with_losses(RISING)[1:]], "Missing points: 1 of 31."),
        ([*with_losses(RISING), measured(None, 0.3, 0.1)], "Points left out because they have no step: 1."),
        ([measured(0, 0.3, 0.1)], "With fewer than two points there is nothing to replay"),
        ([failed(0), failed(100)], "the cost of a stop is not known"),
    ],
)
def test_what_is_missing_is_said(points, said):
    replays = replay_runs([course(points)], PlateauStopping())
    text = replays_text(replays, PlateauStopping())
    assert said in text
    assert all(set(row) == set(next(example().rows())) for row in replays[0].rows())
    assert ("Nothing can be concluded" in text) == all(point.loss is None for point in points)


def test_a_point_without_a_loss_has_that_of_the_last_one_before_it():
    points = with_losses(RISING)
    points[13] = replace(points[13], loss=None)
    rule = PlateauStopping("loss", guard=None, arm="immediately", patience=3)
    assert replay_run(course(points), rule).stops[0].step == 1400
    points[14:] = [replace(point, loss=None) for point in points[14:]]
    end = replay_run(course(points), rule).stops[-1]
    assert end.loss == pytest.approx(4.2)


def test_a_number_that_one_run_lacks():
    good = [replace(point, companions={"rankme": {"h.0": 2.0}}) for point in with_losses(RISING)]
    rule = PlateauStopping("rankme", mode="max", guard=None, arm="immediately")
    found = replay_runs([course(with_losses(RISING), "lacks"), course(good, "has")], rule)
    assert [bool(each.stops) for each in found] == [False, True]
    assert "lacks: " in replays_text(found, rule)
    with pytest.raises(ValueError, match="rankme"):
        replay_runs([course(with_losses(RISING))], rule)


def test_conclusions():
    text = replays_text([example()], PlateauStopping(patience=3))
    assert "Loss alone stops 1 of 1 runs and saves 57% of their steps (median). All runs end 0.300 nats above" in text
    assert "1 run is too few to show which rule is better." in text
    assert "learning rate" in text
