from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from synthetic_runs import (
    CASES,
    COLLAPSE_AT_THE_END,
    FALLEN,
    FIT_ONLY_C,
    STOPPING,
    C,
    Case,
    E,
    failed,
    measured,
    replaced,
    run,
    with_others,
)

from ib_callback.results.measurement import Measurement
from ib_callback.results.metrics import metric_names
from ib_callback.results.phases import PhaseRule, PhaseTracker
from ib_callback.results.stopping import PlateauStopping, StopDecision, StopReason
from ib_callback.results.trajectory import Trajectory


def first_stop(rule: PlateauStopping, trajectory: Trajectory) -> tuple[int | None, StopReason | None]:
    """Step and reason of the first stop; of none, the reason of the last decision."""
    decision = None
    for point in trajectory:
        decision = rule.update(point)
        if decision.stop:
            return point.step, decision.reason
    return None, None if decision is None else decision.reason


@pytest.mark.parametrize("case", [case for case in CASES if len(case.trajectory)], ids=str)
def test_stops_at(case: Case):
    rule = PlateauStopping(**{**STOPPING, **case.settings})
    assert first_stop(rule, case.trajectory) == (case.stop, case.reason)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_interrupted_run_makes_the_same_decisions(case: Case):
    settings = {**STOPPING, **case.settings, "smoothing": 2}
    whole = PlateauStopping(**settings)
    decisions = [whole.update(point) for point in case.trajectory]
    for length in range(0, len(case.trajectory) + 1, 3):
        resumed = PlateauStopping(**settings)
        resumed.update(measured(0, 0.9, 0.8))  # of an earlier use of the rule; replay forgets it
        assert resumed.replay(case.trajectory[:length]) == (decisions[length - 1] if length else None)
        assert [resumed.update(point) for point in case.trajectory[length:]] == decisions[length:]
        assert (resumed.best, resumed.best_step) == (whole.best, whole.best_step)


@pytest.mark.parametrize("case", [case for case in CASES if len(case.trajectory)], ids=str)
@pytest.mark.parametrize("expressivity", [0.001, 0.8])
def test_points_off_the_schedule_leave_the_decision_as_it_was(case: Case, expressivity: float):
    rule, other = (PlateauStopping(**{**STOPPING, **case.settings}) for _ in range(2))
    expected = None
    for point in with_others(case.trajectory, 0.4, expressivity):
        if point.scheduled:
            expected = rule.update(point)
        assert other.update(point) == expected
    assert (other.best, other.best_step) == (rule.best, rule.best_step)


def decisions(rule: PlateauStopping, distances: list[float | None]) -> list[StopReason]:
    """Of distances from a complexity of .5, None for points that failed."""
    points = [failed(s) if d is None else measured(s, 0.5, 0.5 - d) for s, d in enumerate(distances)]
    return [rule.update(point).reason for point in points]


NOT_ARMED, MISSING, IMPROVING, WAITING, PLATEAU, DIVERGING = StopReason


def test_the_reason_of_each_decision():
    rule = PlateauStopping(arm="immediately", patience=2)
    found = decisions(rule, [0.25, 0.125, None, 0.125, None, 0.1250001])
    assert found == [IMPROVING, IMPROVING, MISSING, WAITING, MISSING, PLATEAU]
    assert (rule.best, rule.best_step) == (0.125, 1)


def test_an_improvement_ends_the_wait_even_after_a_stop():
    rule = PlateauStopping(arm="immediately", patience=1)
    assert decisions(rule, [0.25, 0.25, 0.125, 0.125]) == [IMPROVING, PLATEAU, IMPROVING, PLATEAU]


@pytest.mark.parametrize(
    ("settings", "values", "last"),
    [
        # An improvement must be more than 10 % of .25, or of the floor, or .1 as such.
        ({"min_delta": 0.1}, [0.25, 0.2265625], WAITING),
        ({"min_delta": 0.1}, [0.25, 0.21875], IMPROVING),
        ({"min_delta": 0.1, "floor": 0.5}, [0.25, 0.21875], WAITING),
        ({"min_delta": 0.1, "relative": False}, [0.25, 0.1875], WAITING),
        ({"min_delta": 0.1, "relative": False}, [0.25, 0.125], IMPROVING),
        ({"min_delta": 0.1}, [-0.25, -0.265625], WAITING),
        ({"min_delta": 0.1}, [-0.25, -0.28125], IMPROVING),
        ({"min_delta": 0.1}, [0.0, -0.0009765625], WAITING),
        ({"min_delta": 0.1}, [0.0, -0.001953125], IMPROVING),
        # Small steps add up.
        ({"min_delta": 0.1}, [0.25, 0.234375, 0.21875], IMPROVING),
        ({"min_delta": 0.0}, [0.25, 0.2499999], IMPROVING),
    ],
)
def test_the_smallest_change_that_is_an_improvement(settings, values, last):
    assert decisions(PlateauStopping(arm="immediately", **settings), values)[-1] is last


@pytest.mark.parametrize(
    ("settings", "worse", "reason"),
    [
        ({}, [0.265625, 0.2578125, 0.28125], PLATEAU),  # median 6 % above .25
        ({}, [0.265625, 0.5, 0.28125], DIVERGING),  # 12.5 %
        ({"divergence": 0.2}, [0.265625, 0.5, 0.28125], PLATEAU),
        ({"floor": 1.0}, [0.265625, 0.28125, 0.34375], PLATEAU),  # .03 of 1.0
    ],
)
def test_a_plateau_is_told_from_divergence(settings, worse, reason):
    rule = PlateauStopping(arm="immediately", patience=3, **settings)
    assert decisions(rule, [0.25, *worse]) == [IMPROVING, WAITING, WAITING, reason]


def test_smoothing_takes_the_median_and_waits_for_enough_points():
    rule = PlateauStopping(arm="immediately", patience=2, smoothing=3)
    # Medians: .25 from the third on, .125 at the sixth; a single low value is no improvement.
    values = [0.5, 0.25, 0.25, 0.0625, 0.25, 0.125, 0.125]
    assert decisions(rule, values) == [WAITING, WAITING, IMPROVING, WAITING, PLATEAU, IMPROVING, WAITING]


def test_values_before_arming_count_for_nothing():
    rule = PlateauStopping(**STOPPING)
    rule.replay(run(C, E)[:15])
    assert rule.best is None
    # The first point in the compression phase, worse than that of the collapse by far.
    assert rule.update(run(C, E)[15]).reason is IMPROVING
    assert rule.best == pytest.approx(0.18)
    assert rule.best_step == 1500


def test_the_phase_rule_decides_when_it_is_armed():
    rule = PlateauStopping(phase_rule=PhaseRule(persistence=1))
    assert rule.replay(run(C, E)[:13]).reason is NOT_ARMED
    assert rule.update(run(C, E)[13]).reason is IMPROVING


def test_collapsed_points_are_no_improvement():
    rule = PlateauStopping("complexity", **STOPPING)
    rule.replay(COLLAPSE_AT_THE_END)
    assert (rule.best, rule.best_step) == (0.30, 2000)
    # .02 would be far better than .30.
    assert min(C[i] if i not in FALLEN else 0.02 for i in range(15, 31)) == 0.02


def test_a_single_collapsed_point_does_not_make_a_plateau_a_divergence():
    trajectory = run(replaced(C, {22: 0.02}), replaced(E, {22: 0.002}))
    assert first_stop(PlateauStopping(**STOPPING), trajectory) == (2300, PLATEAU)


def test_without_arming_points_are_not_examined():
    # No null: phases would be looked for with a warning.
    rule = PlateauStopping(arm="immediately", patience=1)
    assert [rule.update(measured(s, 0.5, 0.25, null=None)).stop for s in (0, 1)] == [False, True]


@pytest.mark.parametrize(
    ("monitor", "mode", "values"),
    [
        ("optimality", "max", [0.5, 0.625, 0.5]),
        ("token/expressivity_above_null", "max", [0.25, 0.3125, 0.25]),
        ("token/distance_above_null", "min", [0.25, 0.1875, 0.25]),
        ("entropy", "max", [0.9, 0.9, 0.9]),
    ],
)
def test_any_metric_can_be_monitored(monitor, mode, values):
    points = [measured(step, 0.5, e) for step, e in enumerate([0.25, 0.3125, 0.25])]
    rule = PlateauStopping(monitor, mode=mode, arm="immediately", patience=1)
    found = [rule.update(point).reason for point in points]
    best = max(values) if mode == "max" else min(values)
    assert rule.best == best
    assert rule.best_step == values.index(best)
    assert [reason is IMPROVING for reason in found] == [True, values[1] == best != values[0], False]


@pytest.mark.parametrize("monitor", ["preference", "preference/information"])
def test_a_feature_can_be_monitored_by_its_name(monitor):
    rule = PlateauStopping(monitor, mode="max", arm="immediately", patience=1)
    points = [measured(s, 0.5, 0.25, preference=p) for s, p in enumerate([0.01, 0.02, 0.015])]
    assert [rule.update(p).reason for p in points] == [IMPROVING, IMPROVING, DIVERGING]
    assert rule.best == 0.02


@pytest.mark.parametrize("monitor", ["optimality", "token/optimality_above_null", "expressivity"])
@pytest.mark.parametrize("arm", ["compression", "fit", "immediately"])
def test_a_run_that_ends_dead_is_stopped(monitor: str, arm: Any):
    """Though a ratio to a complexity of 0 is undefined for good."""
    complexity = [0.01, 0.1, 0.3, 0.5, 0.6, 0.6, 0.55, 0.5, 0.45, 0.42, 0.4, 0.4]
    expressivity = [0.0, 0.05, 0.15, 0.25, 0.3, 0.32, 0.33, 0.34, 0.35, 0.36, 0.37, 0.38]
    rule = PlateauStopping(monitor, mode="max", patience=4, arm=arm)
    step, reason = first_stop(rule, run([*complexity, *[0.0] * 8], [*expressivity, *[0.0] * 8]))
    assert step is not None
    assert 1200 <= step <= 1800
    assert reason is DIVERGING


def test_an_undefined_value_is_missing():
    rule = PlateauStopping("token/optimality_above_null", mode="max", arm="immediately", patience=1)
    # Above its null by less than three standard errors of it, .001 each: no ratio.
    undefined = measured(100, 0.5, 0.5, null=0.499)
    assert rule.update(measured(0, 0.5, 0.25)).reason is IMPROVING
    assert rule.update(undefined) == StopDecision(
        False, MISSING, "token/optimality_above_null is undefined at this point"
    )
    assert rule.update(measured(200, 0.5, 0.25)).reason is PLATEAU


def test_messages_say_what_was_found():
    rule = PlateauStopping(**STOPPING)
    messages = [rule.update(point).message for point in run(C, E, without=[22])]
    assert messages[0] == "the compression phase has not been recognised yet"
    assert messages[20] == "distance_to_bound is at its best, 0.06"
    assert messages[21] == "no improvement on 0.06 at step 2000 for 1 of 3 measurements"
    assert messages[22] == "the point could not be measured (NaN in h.0)"
    assert messages[24] == "distance_to_bound: no improvement on 0.06 at step 2000 for 3 measurements: a plateau"
    rule.replay(COLLAPSE_AT_THE_END)
    assert rule.update(measured(3100, 0.02, 0.002)).message.endswith("11 measurements: representations have collapsed")
    rule = PlateauStopping(arm="fit", patience=3)
    assert rule.replay(run(FIT_ONLY_C, E)[:8]).message.endswith("for 3 measurements: diverging, by 0.0705")


# --- mistakes


def test_an_unknown_metric_is_an_error_at_the_first_good_point():
    rule = PlateauStopping("distance")
    rule.update(failed(0))
    with pytest.raises(
        ValueError, match=r"'distance', mode='min'.* no metric 'distance'.*: complexity, .*token/complexity"
    ):
        rule.update(measured(100, 0.5, 0.25))


def test_a_metric_of_an_order_that_is_not_measured_is_an_error_before_any_measurement():
    rule = PlateauStopping("bigram/distance_to_bound")
    with pytest.raises(ValueError, match=r"no metric 'bigram/distance_to_bound' .*token/distance_to_bound"):
        rule.check(metric_names(["token"]))
    assert rule.check(metric_names(["token", "bigram"])) == "bigram/distance_to_bound"
    assert PlateauStopping("preference", mode="max").check(metric_names([], ["preference"])) == "preference/information"


def test_points_of_before_the_metric_was_measured_count_as_undefined():
    points = [measured(step, 0.5, 0.5 - 0.0625 * step) for step in range(5)]
    later = [replace(point, loss=3.0 - point.step) for point in points[2:]]
    rule = PlateauStopping("loss", arm="immediately")
    assert rule.replay([*points[:2], *later]).reason is IMPROVING
    assert (rule.best, rule.best_step) == (-1.0, 4)


def test_metric_names_are_those_of_a_measurement():
    point: Measurement = measured(0, 0.5, 0.25, preference=0.01)
    assert set(point.scalars()) == {
        *metric_names(["token"], ["preference"], views=()),
        "seconds",
        "overhead",
        "tokens_seen",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "lowest"}, 'mode must be "min".* or "max", got \'lowest\''),
        ({"arm": "now"}, "arm must be one of compression, fit, immediately, got 'now'"),
        ({"patience": 0}, "patience: expected an integer of at least 1, got 0; it is a number of measurements"),
        ({"smoothing": 0}, "smoothing: expected an integer of at least 1, got 0"),
        ({"min_delta": -0.1}, "min_delta must be at least 0 and less than inf, got -0.1"),
        ({"divergence": float("nan")}, "divergence must be at least 0"),
        ({"floor": float("inf")}, "floor must be at least 0 and less than inf, got inf"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        PlateauStopping(**settings)


def test_a_number_of_points_must_be_an_integer():
    with pytest.raises(TypeError, match=r"patience: expected an integer .*got 2\.5 .*number of measurements"):
        PlateauStopping(patience=2.5)  # type: ignore[arg-type]


def test_it_can_follow_the_phases_of_the_run():
    rule, own = PlateauStopping(**STOPPING, phase_rule=PhaseRule(drop=0.5)), PlateauStopping(**STOPPING)
    phases = PhaseTracker()
    for point in run(C, E):
        phases.update(point)
        assert rule.update(point, phases) == own.update(point)


def test_other_values_of_the_wrong_type():
    with pytest.raises(TypeError, match=r"min_delta must be a number, got '0\.1'"):
        PlateauStopping(min_delta="0.1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"monitor: expected the name of a metric, .*, got 3"):
        PlateauStopping(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("monitor", "mode"), [("optimality", "min"), ("bigram/complexity", "max"), ("preference", "min")]
)
def test_the_wrong_direction_is_a_warning(monitor, mode):
    rule = PlateauStopping(monitor, mode=mode)
    with pytest.warns(RuntimeWarning, match=f"'{monitor}'.*did you mean mode='{'max' if mode == 'min' else 'min'}'"):
        rule.check(metric_names(["token", "bigram"], ["preference"]))
