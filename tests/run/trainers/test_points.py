"""When a run is measured, what that leaves, and that the training is what it would be without."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Loop
from scripted import follow
from tiny_hf import measured, numbers, random_states, same_weights, tiny_model, weights

import ib_callback as ib
from ib_callback.results.trajectory import FILENAME
from ib_callback.run import run as run_module
from ib_callback.run.checkpoints import CheckpointFile


def test_the_training_is_the_same_with_and_without(loop: Loop, tmp_path: Path) -> None:
    """Weights, optimizer and random states are the same bits, and nothing is left on the model."""

    def choose_modes(model: torch.nn.Module, step: int) -> None:
        model.transformer.h[0].eval()  # a user's choice, to be kept

    rules = {"early_stopping": ib.PlateauStopping(act=False), "select": "optimality", "select_from": 1}
    outcomes = []
    for follows in (False, True):
        keywords = {"every_n_steps": 4, "save_every": 10, "on_step": choose_modes, **rules}
        outcome = loop.train(tmp_path / str(follows), steps=30, follows=follows, **keywords)
        assert outcome.model.config.resid_pdrop > 0
        outcomes.append((outcome, random_states()))
    (without, random_without), (outcome, random_with) = outcomes
    assert not same_weights(outcome.weights, weights(tiny_model())), "nothing was learned, so nothing was tested"
    assert same_weights(outcome.weights, without.weights)
    assert random_with == random_without
    assert outcome.left == without.left
    assert outcome.modes == without.modes
    assert set(outcome.modes) == {True, False}
    assert outcome.optimizer["param_groups"] == without.optimizer["param_groups"]
    assert outcome.optimizer["state"].keys() == without.optimizer["state"].keys()
    assert all(same_weights(m, without.optimizer["state"][i]) for i, m in outcome.optimizer["state"].items())
    followed = outcome.followed
    measured_at = [step for step in range(31) if step % 4 == 0 or (step and step % 10 == 0)]
    assert followed.trajectory.steps == measured_at
    assert all(point.error is None for point in followed.trajectory)
    assert followed.selected is not None
    assert followed.decision is not None


def test_measures_at_the_start_by_schedule_and_at_the_end(loop: Loop, tmp_path: Path) -> None:
    outcome = loop.train(tmp_path, every_n_steps=5, log_plane=True)
    trajectory = outcome.followed.trajectory
    assert trajectory.steps == [0, 5, 10, 12]
    assert ib.Trajectory.load(tmp_path) == trajectory
    assert (tmp_path / "information_plane.png").read_bytes().startswith(b"\x89PNG")
    assert numbers(trajectory[-1]) == measured(outcome.model, 12)
    assert numbers(trajectory[0]) == measured(tiny_model(), 0)
    shares = [point.overhead for point in trajectory]
    assert all(share is not None and 0 < share <= 1 for share in shares)
    assert shares[-1] < shares[0], "training takes time as well"
    assert outcome.followed.cost.points == 4


@pytest.mark.filterwarnings("ignore:phases are found from the plain expressivity:RuntimeWarning")
def test_a_preset_is_followed_as_its_settings_are(loop: Loop, tmp_path: Path) -> None:
    settings = {"preset": "paper", "num_bins": 100, "orders": "token"}
    outcome = loop.train(tmp_path, steps=2, every_n_steps=1, **settings)
    assert numbers(outcome.followed.trajectory[-1]) == measured(outcome.model, 2, **settings)
    assert ib.Trajectory.load(tmp_path) == outcome.followed.trajectory


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ib.logarithmic(per_decade=2), [0, 1, 3, 10, 12]),
        (lambda step: step in (4, 7), [0, 4, 7, 12]),
        (500, [0, 12]),
        (6, [0, 6, 12]),
    ],
    ids=["logarithmic", "callable", "beyond the run", "divides the run"],
)
@pytest.mark.filterwarnings("ignore:The schedule .* never fires:RuntimeWarning")
def test_schedules(
    loop: Loop, schedule: Any, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = follow(monkeypatch)
    outcome = loop.train(tmp_path, every_n_steps=schedule, orders="token")
    assert made == outcome.followed.trajectory.steps == expected


@pytest.mark.parametrize(
    ("schedule", "expected"), [(5, [5, 10, 12]), (ib.logarithmic(2), [1, 3, 10, 12]), ([0, 7], [0, 7, 12])]
)
def test_a_run_that_leaves_out_its_start(loop: Loop, schedule: Any, expected: list[int], tmp_path: Path) -> None:
    outcome = loop.train(tmp_path, every_n_steps=schedule, at_start=False, orders="token")
    assert outcome.followed.trajectory.steps == expected


def test_a_schedule_that_never_fires_is_a_warning(trainer: Loop, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"The schedule .* never fires between step 0 and the last one, 4: only"):
        outcome = trainer.train(tmp_path, steps=4, every_n_steps=lambda step: step == 5, orders="token")
    assert outcome.followed.trajectory.steps == [0, 4]


def test_a_schedule_that_fails_costs_points_and_not_the_run(loop: Loop, tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="The schedule failed.*ZeroDivisionError"):
        outcome = loop.train(tmp_path, steps=6, every_n_steps=lambda step: 1 // (4 - step) > 0, orders="token")
    assert outcome.step == 6
    assert outcome.followed.trajectory.steps == [0, 3, 6]


def test_no_warnings_of_our_own_in_a_good_run(loop: Loop, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.train(tmp_path, steps=4, every_n_steps=2, log_plane=True)
    said = [str(warning.message) for warning in caught if "ib_callback" in warning.filename]
    assert said == [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)] == []


# --- files


def test_a_fresh_run_moves_the_files_of_an_old_one_away(loop: Loop, tmp_path: Path) -> None:
    old = loop.train(tmp_path, save_every=6, orders="token").followed.trajectory
    new = loop.train(tmp_path, steps=5, save_every=5, orders="token").followed.trajectory
    assert ib.Trajectory.load(tmp_path) == new
    assert ib.Trajectory.load(tmp_path / "ib_trajectory.1.jsonl") == old
    lines = (tmp_path / "ib_checkpoints.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert '"step": 5' in lines[0]


def test_a_second_training_of_the_same_follower_begins_anew(loop: Loop, tmp_path: Path) -> None:
    first = loop.train(tmp_path, steps=4, every_n_steps=2, orders="token")
    trajectory = first.followed.trajectory
    again = loop.train(tmp_path, steps=4, again=first.followed)
    assert again.followed is first.followed
    assert again.followed.trajectory.steps == trajectory.steps == [0, 2, 4]
    assert list(map(numbers, again.followed.trajectory)) == list(map(numbers, trajectory))
    assert ib.Trajectory.load(tmp_path) == again.followed.trajectory
    assert ib.Trajectory.load(tmp_path / "ib_trajectory.1.jsonl") == trajectory


def test_an_output_directory_of_its_own(loop: Loop, tmp_path: Path) -> None:
    loop.train(tmp_path / "run", steps=2, output_dir=tmp_path / "elsewhere", orders="token")
    assert (tmp_path / "elsewhere" / FILENAME).is_file()
    assert not (tmp_path / "run" / FILENAME).exists()


def test_two_that_follow_one_training_live_side_by_side(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    keywords = {"steps": 4, "every_n_steps": 2, "save_every": 2, "orders": "token", "select": "optimality"}
    loop.train(tmp_path, beside=[{"prefix": "code/", "every_n_steps": 1}], **keywords)
    points = [ib.Trajectory.load(tmp_path / f"{stem}_trajectory.jsonl").steps for stem in ("ib", "code")]
    assert points == [[0, 2, 4], [0, 1, 2, 3, 4]]
    for stem in ("ib", "code"):
        assert list(CheckpointFile(tmp_path, name=f"{stem}_checkpoints.jsonl").existing()) == [2, 4]
        assert (tmp_path / f"{stem}_run.json").is_file()
    # Each finds its own points and files again.
    loop.train(tmp_path, beside=[{"prefix": "code/", "every_n_steps": 1}], **{**keywords, "steps": 6}, resume=True)
    points = [ib.Trajectory.load(tmp_path / f"{stem}_trajectory.jsonl").steps for stem in ("ib", "code")]
    assert points == [[0, 2, 4, 6], [0, 1, 2, 3, 4, 5, 6]]


def test_two_callbacks_with_one_prefix_are_refused(trainer: Loop, tmp_path: Path) -> None:
    steps: list[int] = []
    with pytest.raises(ValueError, match=r"expected a prefix= of its own for each IBCallback.*got 'ib/' twice.*code/"):
        trainer.train(
            tmp_path, output_dir=tmp_path / "a", beside=[{"output_dir": tmp_path / "b"}], orders="token",
            on_step=lambda model, step: steps.append(step),
        )  # fmt: skip
    assert steps == []


def test_a_relative_directory_survives_a_change_of_the_working_directory(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def go(model: torch.nn.Module, step: int) -> None:
        os.chdir(tmp_path / "elsewhere")

    loop.train(tmp_path / "run", steps=4, every_n_steps=2, output_dir="here", orders="token", on_step=go)
    assert ib.Trajectory.load(tmp_path / "here").steps == [0, 2, 4]
    assert list((tmp_path / "elsewhere").iterdir()) == []


# --- what it costs


class Clock:
    """Time that passes only where the test says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A measurement takes three seconds, and a step of the training one by `take_one`."""
    clock = Clock()
    monkeypatch.setattr(run_module, "time", clock)
    follow(monkeypatch)
    measure = ib.Meter.measure

    def slowly(*args: Any, **kwargs: Any) -> ib.Measurement:
        clock.now += 3.0
        return measure(*args, **kwargs)

    monkeypatch.setattr(ib.Meter, "measure", slowly)
    return clock


def take_one(clock: Clock) -> Any:
    def step_end(model: torch.nn.Module, step: int) -> None:
        clock.now += 1.0

    return step_end


def test_points_are_skipped_while_the_share_is_above_the_budget(
    loop: Loop, clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keywords = {"every_n_steps": 1, "orders": "token", "overhead_budget": 0.25}
    followed = loop.train(tmp_path, steps=30, on_step=take_one(clock), **keywords).followed
    # After k measurements, 3 k seconds of 3 k + n at step n are a quarter at n = 9 k. The last step is measured anyway.
    assert followed.trajectory.steps == [0, 9, 18, 27, 30]
    assert [point.overhead for point in followed.trajectory] == [1.0, 6 / 15, 9 / 27, 12 / 39, 15 / 45]
    cost = followed.cost
    assert (cost.points, cost.seconds, cost.share) == (5, 15.0, 1 / 3)
    assert cost.skipped in (26, 27), "a loop of one's own does not say that its last step is the last"
    said = f"5 measurements took 15.0 s, 33.3% of the time; {cost.skipped} more were skipped to save time"
    assert f"ib_callback: {said}\n" in capsys.readouterr().err


def test_without_a_budget_the_cost_is_said_all_the_same(
    loop: Loop, clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop.train(tmp_path, steps=28, every_n_steps=10, orders="token", on_step=take_one(clock))
    assert "ib_callback: 4 measurements took 12.0 s, 30.0% of the time\n" in capsys.readouterr().err


def test_a_budget_that_is_kept_skips_nothing(loop: Loop, clock: Clock, tmp_path: Path) -> None:
    keywords = {"every_n_steps": 4, "orders": "token", "overhead_budget": 0.9}
    followed = loop.train(tmp_path, on_step=take_one(clock), **keywords).followed
    assert followed.trajectory.steps == [0, 4, 8, 12]
    assert followed.cost.skipped == 0


def test_checkpoints_to_select_from_are_measured_whatever_the_budget(loop: Loop, clock: Clock, tmp_path: Path) -> None:
    keywords = {"every_n_steps": 1, "orders": "token", "overhead_budget": 0.01, "select": "optimality"}
    followed = loop.train(tmp_path, save_every=5, select_from=0, on_step=take_one(clock), **keywords).followed
    assert followed.trajectory.steps == [0, 5, 10, 12]
