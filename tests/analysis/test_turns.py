"""Turns of synthetic runs whose transition, flat loss and correlations are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from synthetic_runs import C, E, curve, failed, measured, real, run

from ib_callback.analysis.courses import Course
from ib_callback.analysis.turns import conclusions, find_turns, turns_text
from ib_callback.results.measurement import Measurement
from ib_callback.results.points import PlanePoint
from ib_callback.results.trajectory import Trajectory

# Collapse until 200, fit until the maximum at 1,000, compression until 2,000, and no change until 3,000.
TURN = 1000


def course(points: Sequence[Measurement], name: str = "a", size: int | None = None) -> Course:
    heads = [({"model": name, "num_parameters": size, "tokens": None, "step": point.step}, point) for point in points]
    return Course(name=name, trajectory=Trajectory(points, mixed=True), curve=None, points=heads, path=None)


def with_losses(trajectory: Trajectory, losses: Sequence[float | None], **changes: object) -> list[Measurement]:
    return [replace(p, loss=loss, **changes) for p, loss in zip(trajectory, losses, strict=True)]


# From 8 by .2 a point to 4.0 at 20; the first within .05 nats for good is 20, step 2,000.
LOSSES = curve((0, 8.0), (20, 4.0), (30, 4.0))


def test_a_turn_before_the_loss_is_flat():
    (found,) = find_turns([course(with_losses(run(C, E), LOSSES))])
    assert (found.fit, found.step, found.turn.at, found.flat.at) == (200, TURN, TURN, 2000)
    assert found.turn.earliest <= TURN <= found.turn.latest
    assert found.flat.earliest == 1900
    assert found.flat.latest == 2000
    assert found.together == "before"
    assert found.falls  # more than half-way
    assert [(stage.name, stage.first, stage.last) for stage in found.stages] == [
        ("fitting", 200, 900),
        ("compression", 1000, 3000),
    ]


@pytest.mark.parametrize(
    ("flat_at", "together"), [(300, "after"), (1000, "cannot tell"), (2500, "before")]
)  # fmt: skip
def test_whether_both_coincide(flat_at, together):
    losses = curve((0, 8.0), (flat_at // 100, 4.0), (30, 4.0))
    (found,) = find_turns([course(with_losses(run(C, E), losses))])
    assert found.flat.at == flat_at
    assert found.together == together


def test_whether_the_bound_is_approached():
    noise = 0.002 * np.random.RandomState(0).standard_normal(len(C))
    (found,) = find_turns([course(list(run((np.array(C) + noise).tolist(), E)))])
    # In the fit both axes grow, the distance between them, and their ratio.
    assert [stage.bound for stage in found.stages] == ["disagree", "approaches"]


def test_correlations_of_each_phase_are_those_of_scipy():
    trajectory = run(C, E)
    (found,) = find_turns([course(list(trajectory))])
    for stage, part in zip(found.stages, (slice(2, 10), slice(10, 31)), strict=True):
        steps, complexity = trajectory.steps[part], trajectory.values("complexity")[part]
        optimality = trajectory.values("token/optimality_above_null")[part]
        assert stage.complexity.pearson == pytest.approx(stats.pearsonr(steps, complexity).statistic, abs=1e-12)
        assert stage.complexity.spearman == pytest.approx(stats.spearmanr(steps, complexity).statistic, abs=1e-12)
        assert stage.optimality.pearson == pytest.approx(stats.pearsonr(steps, optimality).statistic, abs=1e-12)
    (log,) = find_turns([course(list(trajectory))], log=True)
    steps = np.log(trajectory.steps[10:31])
    expected = stats.pearsonr(steps, trajectory.values("complexity")[10:31]).statistic
    assert log.stages[1].complexity.pearson == pytest.approx(expected, abs=1e-12)
    assert log.stages[1].complexity.spearman == found.stages[1].complexity.spearman


def test_the_interval_of_the_turn_holds_the_known_one():
    held, wide = 0, []
    for seed in range(20):
        noise = 0.004 * np.random.RandomState(seed).standard_normal(len(C))
        points = run(np.clip(np.array(C) + noise, 0.001, None).tolist(), E)
        (found,) = find_turns([course(list(points))])
        held += found.turn.earliest <= TURN <= found.turn.latest
        wide.append(found.turn.latest - found.turn.earliest)
    assert held >= 19
    assert np.median(wide) <= 800


def test_the_interval_of_the_flat_loss_holds_the_known_one():
    # 4 + 4 exp(-step / 400) is .05 over its last value, 4.0022, at step 1,736.
    steps = range(0, 3001, 100)
    clean = 4 + 4 * np.exp(-np.array(steps) / 400)
    known = 400 * np.log(4 / (clean[-1] - 4 + 0.05))
    held = 0
    for seed in range(40):
        losses = clean + 0.005 * np.random.RandomState(seed).standard_normal(len(clean))
        (found,) = find_turns([course(with_losses(run(C, E), losses.tolist()))])
        held += found.flat.earliest <= known <= (found.flat.latest or 3000)
    assert held >= 38


def test_errors_on_the_text_widen_the_interval_of_the_flat_loss():
    def points(spread: float) -> list[Measurement]:
        # 5 groups; without one of them, or two, the losses move by as much, to and fro, but for the lowest.
        found = with_losses(run(C, E), LOSSES)
        for index, point in enumerate(found):
            moved = [point.loss + spread * (-1) ** group * (index != 20) for group in range(9)]
            found[index] = replace(point, loss_jackknife=tuple(moved))
        return found

    (narrow,), (wide,) = (find_turns([course(points(spread))]) for spread in (0.0, 0.2))
    assert wide.flat.at == narrow.flat.at
    assert wide.flat.earliest < narrow.flat.earliest
    assert (narrow.flat.latest, wide.flat.latest) == (2000, None)


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (with_losses(run(C[3:], E[3:], steps=range(300, 3100, 100)), LOSSES[3:]), "first point is at step 300"),
        ([measured(500, 0.3, 0.1)], "A single point does not show a phase"),
        ([failed(0), failed(100)], "No point was measured"),
        (list(run(C, E)), "Fewer than two points have a held-out loss"),
        (list(run(C, E, without=[4, 7])), "Missing points: 2 of 31, the first at step 400"),
        (with_losses(run(C, E), [None, *LOSSES[1:]]), "Points without a held-out loss: 1."),
        (with_losses(run(C, E), [8.0, *curve((0, 7.0), (14, 4.0), (29, 6.0))]), "does not stay flat"),
        ([*run(C, E), measured(None, 0.3, 0.1)], "Points left out because they have no step: 1."),
        (list(run(E, C)), "No compression was recognised"),
        (with_losses(run(C[:5], E[:5]), LOSSES[:5]), "noise of the loss is not known"),
    ],
)
def test_what_is_missing_is_said(points, said):
    turns = find_turns([course(points)])
    assert said in turns_text(turns)
    assert set(turns[0].row()) == set(find_turns([course(list(run(C, E)))])[0].row())


def test_trained_weights_have_no_phases():
    points = [replace(point, predictive_information=1.0) for point in run(C, E)]
    (found,) = find_turns([course(points)])
    assert (found.turn, found.stages) == (None, ())
    assert "trained weights" in " ".join(found.notes)


def test_a_run_off_the_bound_has_a_second_phase_of_that_name():
    # From 10 on both fall by half.
    off = run([*C[:11], *curve((0, 0.49), (20, 0.25))][:31], [*E[:11], *curve((0, 0.195), (20, 0.10))][:31])
    (found,) = find_turns([course(list(off))])
    assert found.turn is None
    assert [stage.name for stage in found.stages] == ["fitting", "off the bound"]
    assert found.stages[1].first == 1000


def test_without_a_turn_the_second_phase_begins_where_the_loss_is_flat():
    # The complexity keeps rising, and the expressivity does not: the small model of the paper.
    points = run([*C[:10], *curve((0, 0.50), (20, 0.60))], [*E[:10], *[0.2] * 21])
    (found,) = find_turns([course(with_losses(points, curve((0, 8.0), (12, 4.0), (30, 4.0))))])
    assert [(stage.name, stage.first, stage.bound) for stage in found.stages[1:]] == [
        ("after the loss is flat", 1200, "leaves")
    ]
    assert found.stages[1].complexity.spearman == pytest.approx(1.0)
    assert "1 model has a second phase. It moves away from the bound." in conclusions([found])


def test_a_late_fall_back_is_seen():
    # Nearer until 20, and then away, by less.
    points = run(C, [*E[:20], *curve((0, 0.24), (10, 0.22))])
    (found,) = find_turns([course(list(points))])
    assert found.stages[1].late != "approaches"


def test_a_memorising_model_has_a_phase_of_its_own():
    (found,) = find_turns([course(list(real("overfit")))])
    assert found.stages[-1].name == "memorising"
    assert found.flat is None


def test_smallest_first_and_unknown_sizes_last():
    points = list(run(C, E))
    given = [course(points, "unknown"), course(points, "large", 1_000), course(points, "small", 10)]
    assert [turn.name for turn in find_turns(given)] == ["small", "large", "unknown"]


def test_tokens():
    points = [replace(point, tokens_seen=10 * point.step) for point in with_losses(run(C, E), LOSSES)]
    (found,) = find_turns([course(points)], x="tokens")
    assert (found.turn.at, found.step, found.flat.at) == (10 * TURN, TURN, 20_000)
    with pytest.raises(ValueError, match="tokens are known, got 30 of 31 points of a"):
        find_turns([course(list(run(C, E)))], x="tokens")


def test_another_order_and_another_plane():
    points = []
    for point, (complexity, expressivity) in zip(run(E, E), zip(C, E, strict=True), strict=True):
        wide = PlanePoint.from_layers(
            [complexity], [expressivity], complexity_null=0.0, complexity_null_se=0.001, expressivity_null=0.0,
            expressivity_null_se=0.001,
        )  # fmt: skip
        points.append(replace(point, orders={**point.orders, "bigram": wide}))
    (token,), (bigram,) = (find_turns([course(points)], order=order) for order in (None, "bigram"))
    assert (token.order, token.turn) == ("token", None)
    assert (bigram.order, bigram.turn.at, bigram.plane) == ("bigram", TURN, "above_null")
    (plain,) = find_turns([course(points)], order="bigram", plane="plain")
    assert plain.plane == "plain"
    with pytest.raises(ValueError, match="--order: expected one of token, bigram, got 'trigram'"):
        find_turns([course(points)], order="trigram")
    with pytest.raises(ValueError, match="--plane readout: expected models that were measured on this plane"):
        find_turns([course(points)], plane="readout")
    # One that lacks the order says so.
    text = turns_text(find_turns([course(points), course(list(run(C, E)), "b")], order="bigram"))
    assert "b: Missing points: 31 of 31" in text


def test_conclusions():
    turned, flat = (list(run(C, E)), list(run(E, E)))
    assert "Nothing can be concluded about a turn" in turns_text(find_turns([course(flat)]))
    text = turns_text(find_turns([course(turned, "a"), course(flat, "b")]))
    assert "1 of 2 models turns to compression: no flat loss to compare with in 1" in text
    early = curve((0, 8.0), (10, 4.0), (30, 4.0))
    told = turns_text(find_turns([course(with_losses(run(C, E), early), name) for name in "abc"]))
    assert "the order of turn and flat loss is not certain in 3" in told
    assert "nothing about others" not in told
