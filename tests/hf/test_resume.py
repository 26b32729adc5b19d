"""Runs that are interrupted and go on from a checkpoint, with the callback, without it, and with another one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import COURSE, follow
from synthetic_runs import STOPPING
from tiny_hf import Each, numbers, same_weights, tiny_callback, tiny_model, tiny_probe, tiny_trainer, weights
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

import ib_callback as ib
from ib_callback.run.summary import Selected

OLD = "ib_trajectory.1.jsonl"
SAVES = {"steps": 10, "save_strategy": "steps", "save_steps": 5}


def at(trajectory: ib.Trajectory, *steps: int) -> list[dict[str, float]]:
    return [numbers(point) for point in trajectory if point.step in steps]


def resumed(directory: Path, step: int, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    """A run from the checkpoint of that step on; what the model was before is of no consequence."""
    trainer = tiny_trainer(directory, callbacks, model=tiny_model(seed=99), **{**SAVES, **settings})
    trainer.train(resume_from_checkpoint=str(directory / f"checkpoint-{step}"))
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[ib.Trajectory, dict[str, torch.Tensor]]:
    """A run of ten steps that was never interrupted: its points at every second step, and its last weights."""
    callback = tiny_callback(every_n_steps=2)
    trainer = tiny_trainer(tmp_path_factory.mktemp("whole"), [callback], **{**SAVES, "save_strategy": "no"})
    trainer.train()
    assert callback.trajectory.steps == [0, 2, 4, 6, 8, 10]
    return callback.trajectory, weights(trainer.model)


Whole = tuple[ib.Trajectory, dict[str, torch.Tensor]]


# --- without the callback before, or after


def test_a_checkpoint_without_the_callback_is_resumed_with_its_state(tmp_path: Path, whole: Whole) -> None:
    tiny_trainer(tmp_path, [], **SAVES).train()
    callback = tiny_callback(every_n_steps=2)
    trainer = resumed(tmp_path, 5, callback, restore_callback_states_from_checkpoint=True)
    # Without any point yet, one where the run resumes.
    assert callback.trajectory.steps == [5, 6, 8, 10]
    assert at(callback.trajectory, 6, 8, 10) == at(whole[0], 6, 8, 10)
    assert callback.trajectory[0].error is None
    assert same_weights(weights(trainer.model), whole[1])


@pytest.mark.parametrize("steps", [5, 3])
def test_a_run_resumed_with_no_steps_to_go_measures_the_last_one(tmp_path: Path, steps: int) -> None:
    tiny_trainer(tmp_path, [tiny_callback(every_n_steps=2)], **SAVES).train()
    callback = tiny_callback(every_n_steps=2)
    loaded: list[dict[str, torch.Tensor]] = []
    first = Each("on_train_begin", lambda state, control, model: loaded.append(weights(model)))
    resumed(tmp_path, 5, first, callback, steps=steps)
    assert callback.trajectory.steps == [0, 2, 4, 5]
    model = tiny_model()
    model.load_state_dict(loaded[0])
    assert numbers(callback.trajectory[-1]) == numbers(callback._run.meter.measure(model, step=5))
    assert not callback.trajectory[-1].scheduled


def test_a_checkpoint_with_the_callback_is_resumed_without_its_state(tmp_path: Path, whole: Whole) -> None:
    tiny_trainer(tmp_path, [tiny_callback(every_n_steps=2)], **SAVES).train()
    trainer = resumed(tmp_path, 5, restore_callback_states_from_checkpoint=True)
    assert trainer.state.global_step == 10
    assert same_weights(weights(trainer.model), whole[1])


def test_the_abandoned_end_of_a_run_that_went_on_without_the_callback_is_dropped(tmp_path: Path) -> None:
    first = tiny_callback(every_n_steps=2)
    tiny_trainer(tmp_path, [first], lr_scheduler_type="constant", **SAVES).train()
    assert first.trajectory.steps == [0, 2, 4, 6, 8, 10]
    # From step 5 on other weights than before, which nobody has measured.
    between = {**SAVES, "steps": 15, "lr_scheduler_type": "constant", "label_smoothing_factor": 0.5}
    resumed(tmp_path, 5, **between)

    callback = tiny_callback(every_n_steps=2)
    resumed(tmp_path, 10, callback, **between)
    assert callback.trajectory.steps == [0, 2, 4, 10, 12, 14, 15]
    assert callback.trajectory[:3] == first.trajectory[:3]
    assert at(callback.trajectory, 10) != at(first.trajectory, 10)
    assert ib.Trajectory.load(tmp_path / OLD) == first.trajectory


def test_points_of_another_run_in_the_same_directory_are_not_continued(tmp_path: Path) -> None:
    other = tiny_callback(every_n_steps=2)
    tiny_trainer(tmp_path, [other], **SAVES).train()
    tiny_trainer(tmp_path, [], model=tiny_model(seed=4), **SAVES).train()

    callback = tiny_callback(every_n_steps=2)
    resumed(tmp_path, 5, callback)
    assert callback.trajectory.steps == [5, 6, 8, 10]
    assert ib.Trajectory.load(tmp_path) == callback.trajectory
    assert ib.Trajectory.load(tmp_path / OLD) == other.trajectory


@pytest.mark.parametrize("own", [True, False], ids=["the run's own", "of another run"])
def test_the_checkpoint_of_that_step_is_recorded_if_it_is_the_one_resumed_from(own: bool, tmp_path: Path) -> None:
    tiny_trainer(tmp_path, [], logging_steps=1, **SAVES).train()
    trainer = tiny_trainer(tmp_path / "other", [], model=tiny_model(seed=4), logging_steps=1, **SAVES)
    trainer.train()
    callback = tiny_callback(every_n_steps=2, select="optimality", output_dir=tmp_path / "points")
    came_from = tmp_path if own else tmp_path / "other"
    tiny_trainer(tmp_path, [callback], **SAVES).train(resume_from_checkpoint=str(came_from / "checkpoint-5"))
    assert callback.selected.fallback
    lines = (tmp_path / "points" / "ib_checkpoints.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == ([5, 10] if own else [10])


def test_the_trainer_forgets_what_was_best_by_other_settings(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, [tiny_callback(select="optimality", select_from=0)], **SAVES).train()
    again = tiny_callback(select="optimality", num_bins=13)
    with pytest.warns(RuntimeWarning, match="a new trajectory begins here"):
        trainer = resumed(tmp_path, 5, again)
    # Nothing can be selected yet: what is kept meanwhile is that of the lowest loss since.
    lowest = min(again.trajectory, key=lambda point: point.loss)
    assert again.selected == Selected(
        step=lowest.step, value=lowest.loss, path=tmp_path / f"checkpoint-{lowest.step}", fallback=True
    )
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (lowest.step, lowest.loss)


# --- a run that had been stopped


def stopping() -> Any:
    rule = ib.PlateauStopping(**STOPPING)
    return tiny_callback(every_n_steps=1, orders="token", early_stopping=rule, select="optimality")


def test_the_step_after_a_run_that_had_stopped_is_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    follow(monkeypatch)
    first, again = stopping(), stopping()
    saving = {"steps": 30, "save_steps": 4, "save_total_limit": 1}
    tiny_trainer(tmp_path, [first], **{**SAVES, **saving}).train()
    left = sorted(tmp_path.glob("checkpoint-*"))
    assert [path.name for path in left] == ["checkpoint-20", "checkpoint-23"]
    capsys.readouterr()

    trainer = resumed(tmp_path, 23, again, **saving)
    assert "this run had stopped at step 23: distance_to_bound has not improved" in capsys.readouterr().err
    # The Trainer takes one step before it looks. It is no part of the run, though by the interval it would be saved.
    assert trainer.state.global_step == 24
    assert sorted(tmp_path.glob("checkpoint-*")) == left


@pytest.mark.parametrize(("strategy", "asked"), [("steps", False), ("epoch", False), ("steps", True)])
def test_the_step_after_it_is_not_judged(
    strategy: str, asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    seen: list[tuple[int, float | None]] = []

    class Looks(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
            seen.append((state.global_step, metrics.get("eval_ib_selectable_optimality")))

    def ask(state: Any, control: Any, model: Any) -> None:
        # By a callback that comes later, which has the last word.
        control.should_evaluate = control.should_evaluate or asked

    judged = {
        "steps": 30, "save_strategy": strategy, "save_steps": 1, "eval_strategy": strategy, "eval_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "ib_selectable_optimality",
    }  # fmt: skip
    rule = ib.PlateauStopping(**STOPPING)
    callbacks = [tiny_callback(every_n_steps=1, orders="token", early_stopping=rule), Each("on_step_end", ask), Looks()]
    tiny_trainer(tmp_path, callbacks, **judged).train()
    # At the ends of epochs, 16 and 23, the second is the better one.
    first, best = list(seen), 20 if strategy == "steps" else 23
    trainer = resumed(tmp_path, 23, *callbacks, **judged)
    assert first[-1] == (23, COURSE[23].optimality)
    assert [step for step, _ in seen[len(first) :]] == ([24] if asked else [])
    assert all(value is not None and math.isnan(value) for _, value in seen[len(first) :])
    assert (trainer.state.global_step, trainer.state.best_global_step) == (24, best)
    assert not (tmp_path / "checkpoint-24").exists()
    assert "eval_ib_optimality" in trainer.evaluate(), "of the model that was loaded: judging is over"


# --- what the Trainer restores of its own


def test_early_stopping_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    judged = {
        "steps": 30, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True,
        "metric_for_best_model": "ib_selectable_distance_to_bound", "greater_is_better": False,
        "restore_callback_states_from_checkpoint": True,
    }  # fmt: skip

    def callbacks() -> list[TrainerCallback]:
        return [tiny_callback(every_n_steps=1, orders="token"), EarlyStoppingCallback(early_stopping_patience=3)]

    tiny_trainer(tmp_path, callbacks(), **{**SAVES, **judged}).train()
    trainer = resumed(tmp_path, 22, *callbacks(), **judged)
    # Two of the three evaluations without improvement lie before the interruption.
    assert (trainer.state.global_step, trainer.state.best_global_step) == (23, 20)
    meter = ib.Meter(tiny_probe(), orders="token", num_bins=12, batch_size=3)
    assert trainer.state.best_metric == COURSE[20].distance_to_bound
    assert meter.measure(trainer.model, step=20).complexity == COURSE[20].complexity
