"""What stock callbacks keep, and runs from trained weights, in the study of the rules."""

from __future__ import annotations

from dataclasses import replace

import pytest
from synthetic_runs import C, E, run

import ib_callback as ib
import rules


def course(losses: list[float]) -> rules.Course:
    points = ib.Trajectory(replace(m, loss=loss) for m, loss in zip(run(C, E), losses, strict=True))
    return rules.Course("made up", points, {"other": losses})


@pytest.mark.parametrize(
    ("metric", "start", "kept"),
    [
        # Fitting is recognised at point 4, compression at 15; optimality is highest, .8, from point 20 on: the first
        # of equal ones stays.
        ("optimality", "compression", 20),
        ("optimality", "fit", 20),
        ("loss", 0, 30),
    ],
)
def test_the_best_of_what_was_selectable(metric, start, kept):
    falling = course([5.0 - 0.1 * number for number in range(31)])
    assert rules.best_of_selectable(falling, metric, start) == kept
    lost = falling.lost(kept)["other"]
    assert lost == pytest.approx(0.1 * (30 - kept))


def test_what_the_loss_has_left_behind_later_is_kept_all_the_same():
    # The loss falls by a nat at the last point, where the optimality is what it was since 20.
    late = course([3.0] * 30 + [2.0])
    assert rules.best_of_selectable(late, "optimality", "compression") == 20
    # While `select=` looks again at every point.
    assert rules.chosen(late, "optimality")[0] == 30


def test_nothing_is_kept_where_nothing_could_be_selected():
    rising = course([3.0] * 10 + [4.0] * 21)
    assert rules.best_of_selectable(rising, "optimality", "compression") is None


@pytest.mark.parametrize("probe", ["novels", "c4"])
@pytest.mark.parametrize("path", sorted(rules.FINE_TUNING.glob("llama_*.json")), ids=lambda path: path.stem)
def test_runs_from_trained_weights_have_no_phases_and_no_demands(path, probe):
    tuned = rules.of_fine_tuning(path, probe)
    assert tuned.kind == "fine-tuning"
    assert tuned.points.phases().trained
    assert {"novels", "c4"} <= set(tuned.unseen)
    # The rules know of it, too: without a guard the first point counts, and stopping is not armed by a phase.
    assert rules.chosen(tuned, "optimality")[0] is not None
    assert tuned.name not in {course.name for course in rules.courses_of_all()}
