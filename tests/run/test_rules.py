from __future__ import annotations

import inspect
import math
import pickle
import re
from dataclasses import replace
from typing import Any

import pytest
import recorded_runs
from synthetic_runs import COLLAPSE_AT_THE_END, STOPPING, C, E, failed, measured, real, run

from ib_callback.results.selection import Selection
from ib_callback.results.stopping import PlateauStopping, StopReason, guarded_rule
from ib_callback.results.trajectory import Trajectory
from ib_callback.run.config import RunConfig
from ib_callback.run.rules import LiveRules


def rules(**settings: Any) -> LiveRules:
    features = ["preference"] if settings.pop("features", False) else []
    return LiveRules(["token"], features, RunConfig(**settings), views=())


def along(live: LiveRules, trajectory: Trajectory, name: str) -> list[float]:
    """What is logged under a name at each point."""
    logged = []
    for point in trajectory:
        live.update(point)
        logged.append(live.shown().get(name, math.nan))
    return logged


def along_all(live: LiveRules, trajectory: Trajectory, name: str) -> list[float | None]:
    """What stock callbacks get under a name at each point."""
    found = []
    for point in trajectory:
        live.update(point)
        found.append(live.numbers()[name])
    return found


def same(found: list[float], expected: list[float]) -> bool:
    return found == pytest.approx(expected, nan_ok=True)


# --- the numbers


def test_the_phase_is_the_one_known_at_each_point():
    # The fit shows at point 4; the compression, which begins at 10, is recognised at 15.
    assert along(rules(), run(C, E), "phase") == [0.0] * 4 + [1.0] * 11 + [2.0] * 16


def test_what_can_be_selected_is_a_number_from_the_recognition_on():
    before = [math.nan] * 15
    values = [E[i] / C[i] for i in range(15, 31)]
    assert values[0] == pytest.approx(0.55)
    assert same(along(rules(), run(C, E), "selectable/optimality"), before + values)
    from_fit = along(rules(select_from="fit"), run(C, E), "selectable/optimality")
    assert same(from_fit, [math.nan] * 4 + [E[i] / C[i] for i in range(4, 31)])
    from_step = along(rules(select_from=2950), run(C, E), "selectable/distance_to_bound")
    assert same(from_step, [math.nan] * 30 + [C[30] - E[30]])


def test_a_collapsed_point_cannot_be_selected():
    assert same(along(rules(), COLLAPSE_AT_THE_END, "selectable/complexity")[15:], [*C[15:21], *[math.nan] * 10])


def test_an_undefined_number_is_nan():
    # Within three standard errors (.001) of the null there is no ratio to it.
    live = rules(select_from=0)
    live.update(measured(0, 0.5, 0.5, null=0.499))
    assert live.numbers()["token/optimality_above_null"] is None
    assert live.numbers()["selectable/token/optimality_above_null"] is None
    assert live.numbers()["selectable/optimality"] == 1.0


def test_a_missing_point_changes_no_number():
    live = rules()
    for point in run(C, E):
        live.update(point)
    before = live.numbers()
    live.update(failed(3100))
    assert live.numbers() == before
    assert before["complexity"] == 0.3


def test_before_any_point_nothing_is_known():
    live = rules(early_stopping=PlateauStopping())
    assert set(live.numbers().values()) == {None}
    assert live.shown() == {}
    assert live.decision is None


def test_every_name_is_known_before_anything_was_measured():
    live = rules(features=True)
    assert set(live.names) == set(live.numbers())
    live.update(measured(0, 0.5, 0.25, preference=0.125))
    assert set(live.names) <= set(live.numbers())
    assert live.numbers()["preference/information"] == 0.125
    assert {"phase", "selectable/optimality", "selectable/preference/information"} <= set(live.names)
    # Of these neither direction is the better one.
    unordered = ("entropy", "ceiling", "token/complexity_null", "preference/information_null", "phase")
    assert not {f"selectable/{name}" for name in unordered} & set(live.names)


def test_for_people_those_of_the_primary_order_and_the_features():
    metrics = ["complexity", "expressivity", "optimality", "distance_to_bound", "preference/information"]
    live = rules(features=True, select_from=0)
    live.update(measured(0, 0.5, 0.25, preference=0.02))
    assert set(live.shown()) == {"phase", *(f"selectable/{name}" for name in metrics)}


def test_which_way_is_better():
    directions = rules(features=True).directions
    assert directions["selectable/optimality"] == directions["selectable/token/expressivity"] == "max"
    assert directions["selectable/preference/information"] == "max"
    assert directions["selectable/distance_to_bound"] == directions["selectable/token/complexity"] == "min"


# --- stopping and selection


def test_the_decision_is_that_of_the_rule():
    live = rules(early_stopping=PlateauStopping(**STOPPING))
    decided = {}
    for point in run(C, E):
        live.update(point)
        assert live.decision is not None
        decided[point.step] = (live.decision.stop, live.decision.reason)
    # Better until 2000, and not at the next three points.
    assert decided[1400] == (False, StopReason.NOT_ARMED)
    assert decided[2200] == (False, StopReason.WAITING)
    assert decided[2300] == (True, StopReason.PLATEAU)


@pytest.mark.parametrize("select_from", ["compression", "fit", 2000])
@pytest.mark.parametrize("seen_before", [0, 31])
def test_a_replay_is_what_the_updates_were(select_from, seen_before):
    trajectory = Trajectory([*run(C, E, without=[3, 17])[:25], *COLLAPSE_AT_THE_END[25:]])
    settings: dict[str, Any] = {"select": "optimality", "select_from": select_from}
    updated = rules(early_stopping=PlateauStopping(**STOPPING), **settings)
    for point in trajectory:
        updated.update(point)
    replayed = rules(early_stopping=PlateauStopping(**STOPPING), **settings)
    for point in run(E, C)[:seen_before]:  # another run
        replayed.update(point)
    replayed.replay(trajectory)
    assert replayed.numbers() == updated.numbers()
    assert replayed.decision == updated.decision
    replayed.replay(())
    assert replayed.decision is None
    assert set(replayed.numbers().values()) == {None}


def test_the_choice_is_among_the_points_with_a_checkpoint():
    live = rules(select="optimality")
    # .4 / .5 and so on: the optimality rises until 2000.
    choice = live.choose(run(C, E), {500, 1500, 1900})
    assert choice.best is not None
    assert choice.best.measurement.step == 1900
    assert live.choose(run(C, E), ()).best is None


def test_without_select_nothing_is_selected_and_the_optimality_decides_what_could_be():
    live = rules()
    assert not live.selects
    assert live.stopping is None
    assert (live.selection.by, live.selection.select_from) == ("optimality", "compression")
    assert rules(select="complexity").selects


def test_a_selection_is_taken_as_it_is():
    selection = Selection("token/complexity", mode="max", select_from=500)
    live = rules(select=selection)
    assert live.selection == selection
    assert live.selects
    assert same(along(live, run(C, E)[:7], "selectable/complexity"), [math.nan] * 5 + C[5:7])
    assert rules(select=selection, select_from=500).selection == selection


def test_a_feature_can_be_selected_by_its_name():
    live = rules(select="preference", features=True)
    assert live.selection.by == "preference"
    assert live.selection.mode == "max"


# --- the guard


def guarded(losses: dict[int, float]) -> Trajectory:
    """The usual run with a loss of 3 nats, or what is given for a step."""
    return Trajectory(replace(m, loss=losses.get(m.step or 0, 3.0)) for m in run(C, E))


def test_what_is_worse_than_the_lowest_loss_so_far_cannot_be_selected():
    # From 15 on; 3.2 at 17, and 2.9 at 20, after which 3.0 is too much.
    found = along(rules(), guarded({1700: 3.2, 2000: 2.9}), "selectable/optimality")
    assert [i for i, value in enumerate(found) if not math.isnan(value)] == [15, 16, 18, 19, 20]
    unguarded = along(rules(guard=None), guarded({1700: 3.2, 2000: 2.9}), "selectable/optimality")
    assert [i for i, value in enumerate(unguarded) if not math.isnan(value)] == list(range(15, 31))


def test_one_guard_for_the_run_unless_a_rule_has_its_own():
    stopping, selection = PlateauStopping(), Selection("complexity")
    both = rules(early_stopping=stopping, select=selection, guard=None)
    assert (both.stopping.guard, both.selection.guard) == (None, None)
    assert (both.phase_rule.plane, both.phase_rule.tolerance) == ("plain", None)
    assert guarded_rule(both.stopping.phase_rule, both.stopping.guard) == both.phase_rule
    own = rules(early_stopping=PlateauStopping(guard=0.1), select=selection, guard=0.2)
    assert (own.stopping.guard, own.selection.guard, own.phase_rule.tolerance) == (0.1, 0.2, 0.2)
    assert rules(early_stopping=stopping).stopping is stopping


@pytest.mark.parametrize("of_run", ["loss", None, 0.2])
@pytest.mark.parametrize("of_stopping", ["loss", None, 0.1])
@pytest.mark.parametrize("of_selection", ["loss", None, 0.3])
def test_a_guard_that_was_given_to_a_rule_counts_for_it(of_run, of_stopping, of_selection):
    live = rules(early_stopping=PlateauStopping(guard=of_stopping), select=Selection(guard=of_selection), guard=of_run)
    assert (live.stopping.guard, live.selection.guard) == (of_stopping, of_selection)
    # And each reads phases by its own: without a guard as published, else by the loss, whatever the others do.
    assert live.phase_rule.plane == ("plain" if of_selection is None else None)
    points = real("overfit")
    for point in points:
        live.update(point)
    alone = PlateauStopping(guard=of_stopping)
    assert live.decision == alone.replay(points)
    assert rules(guard=of_run).selection.guard == rules(early_stopping=PlateauStopping(), guard=of_run).stopping.guard


@pytest.mark.parametrize("name", [name for name, run in recorded_runs.REAL.items() if "loss" in run])
def test_the_loss_from_the_first_step_on_is_a_safe_key_for_stock_callbacks(name):
    """Which keep the best of what was logged, and cannot let go of it: of the loss that is the lowest."""
    live, points = rules(select_from=0), real(name)
    assert live.directions["selectable/loss"] == "min"
    found = along_all(live, points, "selectable/loss")
    losses = [point.loss for point in points]
    assert min(value for value in found if value is not None) == min(losses)
    assert found.index(min(losses)) == losses.index(min(losses))


@pytest.mark.parametrize("rule", [PlateauStopping, Selection])
def test_a_guard_that_a_command_line_passes_on_as_the_default_is_given_by_nobody(rule):
    default = inspect.signature(rule).parameters["guard"].default
    assert type(default) is str  # which every file format can hold
    config = RunConfig(early_stopping=PlateauStopping(guard=default), select=Selection(guard=default), guard=None)
    assert config.stopping.guard is config.selection.guard is None


def test_a_guard_that_nobody_gave_is_the_loss_all_the_same():
    for rule in (PlateauStopping(), Selection()):
        assert rule.guard == "loss"
        assert replace(rule, guard="loss").guard == "loss"
    assert Selection() == Selection(guard="loss")
    assert repr(Selection()) == repr(Selection(guard="loss"))
    assert repr(PlateauStopping()) == repr(PlateauStopping(guard="loss"))
    copied = pickle.loads(pickle.dumps(RunConfig(select=Selection(), guard=None)))
    assert copied.selection.guard is None


def test_a_rule_that_does_not_act_is_logged():
    live = rules(early_stopping=PlateauStopping(**STOPPING, act=False))
    assert "would_stop" in live.names
    assert along(live, run(C, E), "would_stop") == [0.0] * 23 + [1.0] * 8
    assert not live.decision.stop
    assert "would_stop" not in rules(early_stopping=PlateauStopping()).names


def test_a_run_from_trained_weights_logs_no_phase_and_selects_from_the_first_point():
    live = rules(select="optimality", from_trained=True)
    live.update(measured(0, 0.5, 0.25))
    assert "phase" not in live.shown()
    assert live.shown()["selectable/optimality"] == 0.5


@pytest.mark.parametrize(
    ("settings", "points", "said"),
    [
        ({"select": "optimality"}, run(C, E), ["points have no loss"]),
        ({"select": "optimality"}, guarded({}), []),
        ({"select": "optimality", "guard": None}, run(C, E), []),
        (
            {"select": "optimality", "from_trained": True},
            guarded({}),
            ["the run begins from trained weights, .*guard="],
        ),
        (
            {"select": "optimality", "from_trained": True, "guard": 0.1},
            guarded({}),
            ["trained weights, [^(]*first point on$"],
        ),
        (
            {"early_stopping": PlateauStopping(**STOPPING, act=False)},
            run(C, E),
            ["have no loss", "training would stop: .*"],
        ),
        ({}, real("overfit"), ["The model has been memorising since step 140"]),
        ({}, real("small"), ["moves away from the bound. The 1B model"]),
        (
            {"early_stopping": PlateauStopping()},
            [m if n % 2 else replace(m, loss=4.0) for n, m in enumerate(run(C, E))][:9],
            ["some points have no loss"],
        ),
        (
            {"select": "optimality"},
            [replace(m, predictive_information=2.0, loss=4.0) for m in run(C, E)][3:9],
            [r"at step 300, already predicts better .* by 2\.0 nats\..*from_trained=True"],
        ),
        (
            {"select": "optimality", "from_trained": True, "guard": 0.1},
            run(C, E)[:5],
            ["begins from trained weights", "points have no loss on held-out text, so rules act without the guard"],
        ),
    ],
)
def test_what_is_said_of_a_run_is_said_once(settings, points, said):
    live, found = rules(**settings), []
    for point in points:
        live.update(point)
        found += live.remarks()
    assert len(found) == len(said)
    for text, pattern in zip(found, said, strict=True):
        assert re.search(pattern, text)


def test_when_anything_can_happen_is_said():
    told = rules(early_stopping=PlateauStopping(), select="optimality").describe()
    assert re.search(r"^stops when held-out loss .* flat for 5 points, or .* 0\.03 nats above.*at the 8th point", told)
    assert re.search(
        r"keeps the checkpoint with the best optimality of those .* 0\.03 nats of the lowest, from the", told
    )
    told = rules(early_stopping=PlateauStopping(arm="fit", act=False), select="complexity", guard=None).describe()
    assert re.search(
        r"^would stop \(act=False.*when distance_to_bound has not improved for 5 points, from the fitting phase on",
        told,
    )
    assert "held-out" not in told
    told = rules(early_stopping=PlateauStopping(patience=1), select="optimality", select_from=1000)
    assert "; until then the one with the lowest loss" in told.describe()
    # The guard cannot look at a loss that is not measured.
    assert told.describe(has_loss=False) == (
        "stops when distance_to_bound has not improved for 1 point, from the compression phase on, which short runs "
        "may never reach, at the 8th point of the run at the earliest; keeps the checkpoint with the best optimality, "
        "from step 1,000 on; until then the latest one"
    )
    # A trained model has no phases, and the guard is off unless it is a number.
    trained = {"early_stopping": PlateauStopping(), "select": "optimality", "from_trained": True}
    told = rules(**trained).describe()
    assert "phase" not in told and "held-out" not in told and told.count("from the first point on") == 2
    told = rules(**trained, guard=0.1).describe()
    assert "begun to fit" not in told and "within 0.1 nats of the lowest, from the first point on" in told
    assert rules(select="optimality", select_from=0).describe().endswith("nats of the lowest, from step 0 on")
    assert rules(select="loss", select_from=0).describe() == "keeps the checkpoint with the lowest loss, from step 0 on"
    assert rules().describe() == ""


def test_what_the_published_rule_gives_up_is_said():
    assert "ignores the loss" in rules(select="optimality", guard=None).given_up
    assert rules(guard=None).given_up == rules(select="optimality").given_up == ""


# --- mistakes


@pytest.mark.parametrize(
    ("select", "name"),
    [
        ("optimalty", "optimalty"),
        ("preference", "preference"),  # not measured here
        ("bigram/optimality", "bigram/optimality"),
        (Selection("bigram/complexity"), "bigram/complexity"),
    ],
)
def test_a_metric_to_select_by_that_is_not_measured_lists_those_that_are(select, name):
    message = f"select='{name}' cannot work: no metric '{name}' is measured. Measured metrics: complexity, .*token/comp"
    with pytest.raises(ValueError, match=message):
        rules(select=select)


@pytest.mark.parametrize("monitor", ["distance", "bigram/distance_to_bound", "preference"])
def test_a_metric_to_stop_on_that_is_not_measured_lists_those_that_are(monitor):
    message = f"PlateauStopping.*cannot work: no metric '{monitor}' is measured.*token/distance_to_bound"
    with pytest.raises(ValueError, match=message):
        rules(early_stopping=PlateauStopping(monitor))
    if monitor == "preference":
        accepted = rules(early_stopping=PlateauStopping(monitor, mode="max"), features=True)
        assert accepted.stopping is not None


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"early_stopping": "plateau"}, TypeError, "early_stopping: expected an ib.PlateauStopping or None, got 'plat"),
        ({"early_stopping": True}, TypeError, "early_stopping: expected an ib.PlateauStopping or None, got True"),
        ({"select": 5}, TypeError, "select: expected the name of a metric or feature, or an ib.Selection, got 5"),
        ({"select": True}, TypeError, "select: expected the name .* got True"),
        ({"select": "entropy"}, ValueError, "neither high nor low entropy is known to be better"),
        ({"select_from": "later"}, ValueError, 'select_from must be "compression", "fit" or a step .*, got \'later\''),
        ({"select": "optimality", "select_from": -1}, ValueError, "select_from must be .* got -1"),
    ],
)
def test_mistakes_say_what_was_expected(settings, error, message):
    with pytest.raises(error, match=message):
        rules(**settings)


def test_points_measured_before_the_metric_was_are_no_error():
    """A run resumed with `mix_settings=True` and another feature probe; the rules were checked when they were made."""
    rule = PlateauStopping("preference", mode="max", arm="immediately")
    live = rules(features=True, early_stopping=rule, select="preference")
    earlier = run(C[:3], E[:3])
    live.replay(earlier)
    assert live.decision is not None
    assert (live.decision.stop, live.decision.reason) == (False, StopReason.MISSING)
    assert live.choose(earlier, available=set(earlier.steps)).best is None
    # A rule that nobody has checked still says that there is no such metric.
    with pytest.raises(ValueError, match=r"cannot work: no metric 'preference' is measured"):
        rule.replay(earlier)
