from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import recorded_runs
from synthetic_runs import (
    CASES,
    COLLAPSE_AT_THE_END,
    FALLEN,
    FIT_ONLY_C,
    STOPPING,
    C,
    Case,
    E,
    curve,
    failed,
    measured,
    real,
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


NOT_ARMED, MISSING, IMPROVING, WAITING, PLATEAU, DIVERGING, MEMORISING, COLLAPSED = StopReason


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
    # Recognised at 16, where the complexity is 20.8 % under its highest median.
    rule = PlateauStopping(phase_rule=PhaseRule(drop=0.2))
    assert rule.replay(run(C, E)[:16]).reason is NOT_ARMED
    assert rule.update(run(C, E)[16]).reason is IMPROVING


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
    # With "immediately" points are not examined; a ratio is undefined, an expressivity is 0.
    assert reason is (DIVERGING if (arm, monitor) == ("immediately", "expressivity") else COLLAPSED)


def test_an_undefined_value_is_missing():
    rule = PlateauStopping("token/optimality_above_null", mode="max", arm="immediately", patience=1)
    # Above its null by less than three standard errors of it, .001 each: no ratio.
    undefined = measured(100, 0.5, 0.5, null=0.499)
    assert rule.update(measured(0, 0.5, 0.25)).reason is IMPROVING
    assert rule.update(undefined) == StopDecision(
        False, MISSING, "token/optimality_above_null is undefined at this point"
    )
    assert rule.update(measured(200, 0.5, 0.25)).reason is PLATEAU


def test_words_of_earlier_versions_are_understood():
    assert (StopReason("not armed"), StopReason("waiting")) == (NOT_ARMED, WAITING)
    with pytest.raises(ValueError, match="'never' is not a valid StopReason"):
        StopReason("never")


def test_messages_say_what_was_found():
    rule = PlateauStopping(**STOPPING)
    messages = [rule.update(point).message for point in run(C, E, without=[22])]
    assert messages[0] == "the compression phase has not been recognised yet"
    assert messages[20] == "distance_to_bound has a new best value, 0.06"
    same = "distance_to_bound has not improved on 0.06 (step 2000) for"
    assert messages[21] == f"{same} 1 measurement, and the rule acts after 3"
    assert messages[22] == "the point could not be measured (NaN in h.0)"
    assert messages[24] == f"{same} 3 measurements, so the run has reached a plateau"
    rule.replay(COLLAPSE_AT_THE_END)
    said = rule.update(measured(3100, 0.02, 0.002)).message
    assert said.endswith("11 measurements, because representations have collapsed")
    rule = PlateauStopping(arm="fit", patience=3)
    said = rule.replay(run(FIT_ONLY_C, E)[:8]).message
    assert said.endswith("for 3 measurements, and the median of these is worse by 0.0705, so the run diverges")


# --- with the guard: the loss on held-out text


def with_loss(trajectory: Trajectory, losses: Sequence[float], train: Sequence[float] | None = None) -> Trajectory:
    told = train or [None] * len(losses)
    return Trajectory(replace(m, loss=x, train_loss=t) for m, x, t in zip(trajectory, losses, told, strict=True))


def flat_from(losses: Sequence[float]) -> int:
    """The first measurement from which the loss stays within .05 nats of its minimum over the whole run."""
    return max((i + 1 for i, loss in enumerate(losses) if loss > min(losses) + 0.05), default=0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("overfit", MEMORISING), ("overfit_160", MEMORISING), ("overfit_1000", MEMORISING), ("lr_spike", COLLAPSED)],
)
def test_real_runs_that_went_wrong_are_stopped_with_their_own_reason(name, reason):
    trajectory = real(name)
    step, found = first_stop(PlateauStopping(), trajectory)
    assert found is reason
    losses = [m.loss for m in trajectory]
    assert trajectory.steps.index(step) - losses.index(min(losses)) <= 8


@pytest.mark.parametrize("name", ["healthy_2x64", "healthy_4x128", "healthy_6x192"])
@pytest.mark.parametrize("monitor", ["distance_to_bound", "optimality", "readout/token/score_local"])
def test_no_healthy_run_is_stopped_early(name, monitor):
    rule = PlateauStopping(monitor, mode="min" if monitor == "distance_to_bound" else "max")
    assert first_stop(rule, real(name))[0] is None


def test_a_real_run_that_has_become_flat_is_stopped():
    trajectory = real("small")
    losses = [m.loss for m in trajectory]
    step, reason = first_stop(PlateauStopping(), trajectory)
    assert reason is PLATEAU
    stopped = trajectory.steps.index(step)
    assert flat_from(losses) <= stopped <= flat_from(losses) + 8
    assert losses[stopped] - min(losses) <= 0.05


def trained_on(*, falling: float = 0.0, improving: float = 0.0, seed: int = 0) -> Trajectory:
    """60 points: the loss falls until 15, then by so much a point, with noise of .004 nats; the distance likewise."""
    random = np.random.RandomState(seed)
    number = np.arange(60)
    losses = 4 + 4 * np.exp(-number / 3) - falling * number + 0.004 * random.standard_normal(60)
    complexity = np.array([0.3, 0.02, *curve((0, 0.2), (8, 0.5), (57, 0.5))])
    expressivity = np.array([0.03, 0.002, *curve((0, 0.1), (8, 0.25), (57, 0.25))])
    expressivity += improving * np.maximum(number - 10, 0) + 0.001 * random.standard_normal(60)
    return with_loss(run(complexity, np.abs(expressivity)), losses.tolist())


@pytest.mark.parametrize("seed", range(10))
def test_a_run_trained_on_for_three_times_its_steps_is_stopped(seed):
    trajectory = trained_on(seed=seed)
    losses = [m.loss for m in trajectory]
    flat = flat_from(losses)
    assert 4 * flat <= len(losses)
    step, reason = first_stop(PlateauStopping(), trajectory)
    assert reason is PLATEAU
    assert trajectory.steps.index(step) <= flat + 8
    assert trajectory[trajectory.steps.index(step)].loss - min(losses) <= 0.05


@pytest.mark.parametrize("seed", range(5))
def test_both_must_be_flat(seed):
    rule = PlateauStopping()
    # .01 nats a point are .05 in five; .001 a point is the noise of the distance, .005 in five.
    assert first_stop(rule, trained_on(falling=0.01, seed=seed)) == (None, IMPROVING)
    rule.reset()
    assert first_stop(rule, trained_on(improving=0.002, seed=seed)) == (None, IMPROVING)
    assert "is flat over" in rule._decision.message
    assert "distance_to_bound improves" in rule._decision.message


def test_a_dense_schedule_is_not_taken_for_a_plateau():
    """The loss falls by .35 nats while the steps double: by .0125 in the last five of 200 points."""
    steps = np.arange(0, 2000, 10)
    losses = 8 - 0.5 * np.log(1 + steps / 10)
    complexity, expressivity = ([a, b, *[c] * 198] for a, b, c in ((0.3, 0.02, 0.5), (0.03, 0.002, 0.2)))
    points = with_loss(run(complexity, expressivity, steps=steps.tolist()), losses.tolist())
    assert first_stop(PlateauStopping(), points) == (None, IMPROVING)


def test_divergence_is_told_from_memorising_by_the_training_loss():
    losses = [5, 4, 3.5, 3.2, 3.1, 3.0, 3.1, 3.2, 3.3, 3.4, 3.5]
    course = run([0.3, 0.02, *curve((0, 0.3), (8, 0.5))], [0.03, 0.002, *curve((0, 0.1), (8, 0.2))])
    reasons = {}
    for name, train in (("falls", [x - 0.2 * i for i, x in enumerate(losses)]), ("rises", losses)):
        reasons[name] = first_stop(PlateauStopping(), with_loss(course, losses, train))
    # Worse from 6 on, five times by 10.
    assert reasons == {"falls": (1000, MEMORISING), "rises": (1000, DIVERGING)}


@pytest.mark.parametrize(("guard", "step"), [("loss", 1000), (0.15, 1100)])
def test_the_guard_is_a_tolerance(guard, step):
    losses = [5, 4, 3.5, 3.2, 3.1, 3.0, 3.1, 3.2, 3.3, 3.4, 3.5, 3.45]
    course = run([0.3, 0.02, *curve((0, 0.3), (9, 0.5))], [0.03, 0.002, *curve((0, 0.1), (9, 0.2))])
    assert first_stop(PlateauStopping(guard=guard), with_loss(course, losses))[0] == step


def test_a_rule_that_does_not_act():
    rule, acts = PlateauStopping(act=False), PlateauStopping()
    for point in real("overfit"):
        decision, other = rule.update(point), acts.update(point)
        assert not decision.stop
        assert (decision.would_stop, decision.reason, decision.message) == (other.stop, other.reason, other.message)
    assert decision.would_stop


def test_from_trained_weights_it_acts_from_the_first_point_and_without_the_guard():
    # The loss on the probe rises, as it does in fine-tuning.
    course = with_loss(run([0.5] * 12, [0.2, 0.21, 0.22, *[0.22] * 9]), [3.0 + 0.1 * i for i in range(12)])
    points = [replace(m, predictive_information=3.0) for m in course]
    # No improvement on point 2 from 3 to 7.
    assert first_stop(PlateauStopping(), Trajectory(points)) == (700, PLATEAU)
    # Given as a tolerance, the guard is on: the loss is worse from 1 on, and there are no phases to memorise in.
    assert first_stop(PlateauStopping(guard=0.05), Trajectory(points)) == (500, DIVERGING)
    declared = PlateauStopping(phase_rule=PhaseRule(from_trained=True))
    assert first_stop(declared, course) == (700, PLATEAU)


# --- without it: exactly the published rule


def published(trajectory: Trajectory, arm: str, patience: int) -> int | None:
    """A plateau of the plain distance from a phase of the plain plane on, written down by itself."""
    known = trajectory.phases(plane="plain", tolerance=None).known
    best, waited = math.inf, 0
    for point, phase in zip(trajectory, known, strict=True):
        if phase < {"immediately": 0, "fit": 1, "compression": 2}[arm]:
            continue
        distance = point.complexity - point.expressivity
        waited = 0 if distance < best else waited + 1
        best = min(best, distance)
        if waited == patience:
            return point.step
    return None


@pytest.mark.parametrize("name", recorded_runs.REAL)
@pytest.mark.parametrize("arm", ["immediately", "fit", "compression"])
@pytest.mark.parametrize("patience", [2, 5])
def test_without_a_guard_it_is_exactly_the_published_rule(name, arm, patience):
    rule = PlateauStopping(arm=arm, patience=patience, guard=None)
    rule.reset("distance_to_bound")  # nothing to be warned of here
    assert first_stop(rule, real(name))[0] == published(real(name), arm, patience)


def test_the_published_rule_examines_no_point_for_collapse():
    rule = PlateauStopping("complexity", arm="fit", guard=None)
    rule.replay(COLLAPSE_AT_THE_END)
    assert (rule.best, rule.best_step) == (0.02, 2100)


def test_the_distance_in_the_fit_is_warned_of():
    rule = PlateauStopping(arm="fit", guard=None)
    with pytest.warns(RuntimeWarning, match=r"grows while a model fits.*5\.11.*4\.21.*guard"):
        rule.check(metric_names(["token"]))


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
    later = [replace(point, dispersion=3.0 - point.step) for point in points[2:]]
    rule = PlateauStopping("dispersion", arm="immediately")
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
        ({"guard": 0.0}, 'guard: expected "loss", a tolerance in nats .*, or None .*, got 0.0'),
        ({"guard": "val_loss"}, "guard: expected .* got 'val_loss'"),
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


# --- when there is nothing to judge yet, or nothing to save any more

# Fit from 100 on (the record of the expressivity is passed at 300).
_C = [0.3, 0.02, *curve((0, 0.2), (20, 0.5))]
_E = [0.03, 0.002, *curve((0, 0.1), (20, 0.3))]


def course(losses: Sequence[float], *, steps: Sequence[int] | None = None, first: int = 0, **told: Any) -> Trajectory:
    """Of these losses, from a point of the course on."""
    part = slice(first, first + len(losses))
    return with_loss(run(_C[part], _E[part], steps=steps), losses, **told)


@pytest.mark.parametrize(
    "trajectory",
    [
        # The loss rises in the first steps, and falls then.
        course([8.30, 8.36, 8.40, 8.41, 8.40, 8.38, 8.36, 8.2, 7.8], steps=[0, 1, 2, 3, 4, 5, 6, 8, 10]),
        with_loss(run([0.3] * 9, [0.03] * 9, steps=range(9)), [8.3, 8.36, 8.4, 8.4, 8.4, 8.4, 8.4, 8.3, 7.9]),
        # Without step 0: it warms up, or its loss rises first.
        course([8.30 - 0.0005 * n for n in range(9)], steps=range(1, 10), first=5),
        course([8.30, *[8.40] * 8], steps=range(1, 10), first=5),
        # Too short a stretch for how long the run is: a restart of the learning rate.
        course([8.0, 6.0, 5.0, 4.5, 4.2, 4.0, *[4.2] * 8], steps=[*range(0, 6000, 1000), *range(5010, 5090, 10)]),
    ],
    ids=["a bump", "a bump before the fit", "warming up", "a bump, step 0 missing", "a short stretch"],
)
def test_a_run_that_has_hardly_begun_or_was_briefly_worse_is_not_stopped(trajectory):
    assert first_stop(PlateauStopping(), trajectory)[0] is None


def test_a_restart_of_the_learning_rate_may_last_an_eighth_of_the_steps():
    worse = course([8.0, 6.0, 5.0, 4.5, 4.2, 4.0, *[4.2] * 8], steps=[*range(0, 600, 100), *range(550, 950, 50)])
    assert first_stop(PlateauStopping(), worse) == (750, MEMORISING)


NOT_FINITE = "RepresentationError: representations that are zero, NaN or infinite (…): h.0: 7"


@pytest.mark.parametrize(
    ("error", "guard", "reason"),
    [
        (NOT_FINITE, "loss", DIVERGING),
        (NOT_FINITE, 0.1, DIVERGING),
        ("OutOfMemoryError: 3 GiB", "loss", MISSING),
    ],
)
@pytest.mark.parametrize("losses", [[8.0 - 0.3 * n for n in range(8)], None], ids=["a loss", "none"])
def test_a_run_whose_states_are_not_finite_any_more_is_stopped(losses, error, guard, reason):
    good = run(_C[:8], _E[:8]) if losses is None else course(losses)
    points = [*good, *(replace(failed(100 * n), error=error) for n in range(8, 20))]
    rule = PlateauStopping(guard=guard, patience=4)
    stop, found = first_stop(rule, points)
    assert stop == (1100 if reason is DIVERGING else None)
    if stop is not None:
        assert found is DIVERGING
        assert "not been finite for 4 measurements" in rule.replay(points[:12]).message
    assert first_stop(PlateauStopping(guard=None, patience=4), points)[0] is None


def test_a_run_that_has_learned_token_frequencies_alone_is_dead():
    """Its fit never begins: complexity and expressivity stay where the collapse left them."""
    losses = [8.3, 7.5, 6.5, *[6.1] * 40]
    dead = with_loss(run([0.3, 0.1, *[0.02] * 41], [0.03, 0.01, *[0.002] * 41]), losses)
    rule = PlateauStopping()
    stop, reason = first_stop(rule, dead)
    # Ten measurements in the last half of the steps, the first of them after the loss has come to stand still.
    assert reason is COLLAPSED
    assert 1000 <= stop <= 2500
    # A loss that has not fallen at all may be that of a long warm-up.
    warming = with_loss(run([0.3] * 43, [0.03] * 43), [8.3] * 43)
    assert first_stop(PlateauStopping(), warming)[0] is None


@pytest.mark.parametrize(
    ("train", "trained", "told"),
    [
        (None, True, "and the training loss is not known, so the run diverges"),
        ([8.0, 6.0, 5.0, 4.5, 4.2, 4.0, *[4.3] * 8], None, "and the training loss rises too, so the run diverges"),
    ],
)
def test_a_message_claims_of_the_training_loss_what_is_known(train, trained, told):
    trajectory = course([8.0, 6.0, 5.0, 4.5, 4.2, 4.0, *[4.4] * 8], train=train)
    rule = PlateauStopping(guard=0.03, phase_rule=PhaseRule(from_trained=trained))
    stop, reason = first_stop(rule, trajectory)
    assert reason is DIVERGING
    assert rule.replay(trajectory[: trajectory.steps.index(stop) + 1]).message.endswith(told)


def test_from_trained_weights_a_numeric_guard_knows_memorising():
    losses = [4.0, 3.8, 3.7, *[3.9] * 8]
    train = [4.0, 3.5, 3.0, *[2.5 - 0.1 * n for n in range(8)]]
    rule = PlateauStopping(guard=0.03, phase_rule=PhaseRule(from_trained=True))
    assert first_stop(rule, course(losses, train=train, first=5))[1] is MEMORISING


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_little_patience_does_not_make_memorising_something_else(patience):
    assert first_stop(PlateauStopping(patience=patience), real("overfit_160"))[1] in (MEMORISING, PLATEAU)


@pytest.mark.parametrize("tolerance", [None, 0.5])
def test_the_guard_counts_and_no_tolerance_of_the_phase_rule(tolerance):
    rule = PlateauStopping(phase_rule=PhaseRule(tolerance=tolerance))
    assert first_stop(rule, real("overfit")) == first_stop(PlateauStopping(), real("overfit"))


def test_from_trained_weights_a_plateau_counts_only_if_the_training_loss_is_flat():
    """Without the guard: the metric stands still from the first point on."""
    still = run([0.5] * 20, [0.25] * 20)
    falling = with_loss(still, [4.0] * 20, train=[3.0 - 0.05 * n for n in range(20)])
    flat = with_loss(still, [4.0] * 20, train=[3.0 - 0.05 * min(n, 8) for n in range(20)])
    trained = {"phase_rule": PhaseRule(from_trained=True)}
    rule = PlateauStopping(**trained)
    assert first_stop(rule, falling)[0] is None
    assert rule.replay(falling).reason is IMPROVING
    assert first_stop(PlateauStopping(**trained), flat)[1] is PLATEAU
    assert first_stop(PlateauStopping(**trained), with_loss(still, [4.0] * 20))[0] == 500


def test_once_points_had_a_loss_those_without_one_decide_nothing():
    points = [m if n % 8 == 0 else replace(m, loss=None) for n, m in enumerate(real("healthy_4x128"))]
    rule = PlateauStopping(arm="fit")
    decisions = [rule.update(point) for point in points]
    assert not any(decision.stop for decision in decisions)
    assert [d.reason for d, m in zip(decisions, points, strict=True) if m.loss is None] == [MISSING] * sum(
        m.loss is None for m in points
    )


def test_armed_by_the_fit_without_a_loss_it_warns_with_the_cure():
    with pytest.warns(RuntimeWarning, match=r"reached 4\.21\. Use arm=\"compression\""):
        PlateauStopping(arm="fit").replay(real("small", loss=False)[:3])
    with pytest.warns(RuntimeWarning, match=r"Use guard=\"loss\", .* or arm=\"compression\""):
        PlateauStopping(arm="fit", guard=None).replay(real("small")[:3])
