"""Checkpoints that the callback selects: `select=` and `select_from=`."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import BEST, follow
from tiny_hf import Each, same_weights, tiny_callback, tiny_trainer, weights
from transformers import TrainerCallback

import ib_callback as ib
from ib_callback.hf import IBCallback
from ib_callback.run.checkpoints import FILENAME
from ib_callback.run.summary import Selected


def checkpoints(directory: Path) -> set[int]:
    """The steps of those that are there."""
    return {int(path.name.removeprefix("checkpoint-")) for path in directory.glob("checkpoint-*")}


def recorded(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / FILENAME).read_text().splitlines()]


def selecting(**keywords: Any) -> IBCallback:
    return tiny_callback(**{"every_n_steps": 1, "orders": "token", "select": "optimality", **keywords})


def steps_kept(by_step: dict[int, dict[str, torch.Tensor]]) -> TrainerCallback:
    def keep(state: Any, control: Any, model: torch.nn.Module) -> None:
        by_step[state.global_step] = weights(model)

    return Each("on_step_end", keep)


@pytest.mark.parametrize(
    ("select", "saving", "told"),
    [
        ("loss", {"save_total_limit": 2}, ["protects one best checkpoint from save_total_limit=2"]),
        ("loss", {"save_strategy": "best", "load_best_model_at_end": True}, ["loads one best model at the end"]),
        ("loss", {}, []),
        (None, {"save_total_limit": 2}, []),
    ],
)
def test_two_callbacks_cannot_both_keep_their_best(
    select: str | None, saving: dict[str, Any], told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    callbacks = [selecting(), selecting(prefix="code/", select=select)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny_trainer(tmp_path, callbacks, steps=2, **{"save_strategy": "steps", "save_steps": 2, **saving}).train()
    said = [str(each.message) for each in caught if "callbacks of this Trainer have select=" in str(each.message)]
    assert len(said) == len(told)
    assert all(part in text and text.startswith("2 callbacks") for part, text in zip(told, said, strict=True))


SAVES_BEST = {"save_strategy": "best", "load_best_model_at_end": True}


@pytest.mark.parametrize(("limit", "left"), [(2, {20, 30}), (3, {20, 28, 30}), (None, set(range(2, 31, 2)))])
def test_the_best_checkpoint_outlives_the_limit_and_so_does_the_last(
    limit: int | None, left: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    callback = selecting()
    trainer = tiny_trainer(tmp_path, [callback], steps=30, save_strategy="steps", save_steps=2, save_total_limit=limit)
    trainer.train()
    assert checkpoints(tmp_path) == left
    path = tmp_path / "checkpoint-20"
    assert callback.selected == Selected(step=20, value=BEST.optimality, path=path)
    assert (trainer.state.best_global_step, trainer.state.best_model_checkpoint) == (20, str(path))
    assert recorded(tmp_path) == [{"step": step, "path": f"checkpoint-{step}"} for step in range(2, 31, 2)]
    state = json.loads((tmp_path / "checkpoint-30" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(path)


@pytest.mark.parametrize("directory", ["out", "./out", "sub/../out"])
def test_the_trainer_knows_the_best_checkpoint_by_a_relative_path(
    directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    saving = {"steps": 30, "save_strategy": "steps", "save_steps": 10, "save_total_limit": 1}
    callback = selecting()
    tiny_trainer(Path(directory), [callback], **saving).train()
    assert checkpoints(tmp_path / "out") == {20, 30}
    assert callback.selected.path == tmp_path / "out" / "checkpoint-20"


def test_every_checkpoint_is_measured_whatever_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = follow(monkeypatch)
    callback = selecting(every_n_steps=1000)

    def save(state: Any, control: Any, model: Any) -> None:
        control.should_save = control.should_save or state.global_step == 7

    saving = {"save_strategy": "steps", "save_steps": 4}
    # A callback that comes later asks for a checkpoint which nobody could foresee.
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", message="No checkpoint could be selected")
        tiny_trainer(tmp_path, [callback, Each("on_step_end", save)], steps=18, **saving).train()
    assert made == callback.trajectory.steps == [0, 4, 7, 8, 12, 16, 18]
    assert [entry["step"] for entry in recorded(tmp_path)] == [4, 7, 8, 12, 16, 18]


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_checkpoint_at_the_end_of_an_epoch(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = follow(monkeypatch)
    callback = selecting(every_n_steps=1000, select_from=0)
    tiny_trainer(tmp_path, [callback], steps=20, save_strategy=strategy, save_steps=16).train()
    # An epoch has 16 steps.
    assert made == [0, 16, 20]
    assert callback.selected is not None
    assert callback.selected.path == tmp_path / "checkpoint-20"


def test_saving_only_what_is_better_by_a_callback_of_ones_own(tmp_path: Path) -> None:
    """The recipe of docs/rules.md."""
    callback = tiny_callback(every_n_steps=4)

    class SavesTheBetter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            best = callback.trajectory.best(by="loss", select_from=0)
            if best is not None and best.step == state.global_step:
                control.should_save = True

    tiny_trainer(tmp_path, [callback, SavesTheBetter()], steps=20, save_strategy="no").train()
    losses = [point.loss for point in callback.trajectory]
    records = [p.step for n, p in enumerate(callback.trajectory) if n and p.loss < min(losses[:n])]
    assert sorted(checkpoints(tmp_path)) == records
    assert len(records) > 0


# --- save_strategy="best" without evaluation


@pytest.mark.parametrize("metric", [None, "ib_optimality", "ib_distance_to_bound"])
def test_saves_whenever_a_point_is_the_best_and_loads_it_in_the_end(
    metric: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    by_step: dict[int, dict[str, torch.Tensor]] = {}
    callback = selecting()
    # transformers demands a metric with this strategy, and takes "loss" if the best model is to be loaded.
    named = {} if metric is None else {"metric_for_best_model": metric}
    trainer = tiny_trainer(tmp_path, [callback, steps_kept(by_step)], steps=30, **SAVES_BEST, **named)
    trainer.train()
    # The compression is recognised at 15, and the optimality rises until 20.
    assert checkpoints(tmp_path) == {15, 16, 17, 18, 19, 20}
    assert [entry["step"] for entry in recorded(tmp_path)] == [15, 16, 17, 18, 19, 20]
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (20, BEST.optimality)
    assert same_weights(weights(trainer.model), by_step[20])
    assert not same_weights(by_step[20], by_step[30])


def test_the_best_checkpoint_is_the_best_point_as_measured(tmp_path: Path) -> None:
    callback = tiny_callback(every_n_steps=2, select="expressivity", select_from=3)
    trainer = tiny_trainer(tmp_path, [callback], steps=12, **SAVES_BEST, save_total_limit=1)
    trainer.train()
    best = callback.trajectory.best("expressivity", 3)
    assert best is not None
    assert best.step in (4, 6, 8, 10)
    assert checkpoints(tmp_path) == {best.step}
    assert callback.selected == Selected(
        step=best.step, value=best.expressivity, path=tmp_path / f"checkpoint-{best.step}"
    )
    again = callback._run.meter.measure(trainer.model)
    assert again.expressivity == best.expressivity == trainer.state.best_metric


def test_early_stopping_and_selection_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    by_step: dict[int, dict[str, torch.Tensor]] = {}
    callback = selecting(early_stopping=ib.PlateauStopping(patience=3, min_delta=0.01))
    trainer = tiny_trainer(tmp_path, [callback, steps_kept(by_step)], steps=30, **SAVES_BEST, save_total_limit=1)
    trainer.train()
    assert trainer.state.global_step == 23
    assert checkpoints(tmp_path) == {20}
    assert same_weights(weights(trainer.model), by_step[20])


# --- who decides when to save


@pytest.mark.parametrize(
    ("select", "settings", "message"),
    [
        (None, {**SAVES_BEST}, 'save_strategy="best" without evaluation never saves anything: expected select='),
        (
            "optimality",
            {**SAVES_BEST, "eval_strategy": "steps", "eval_steps": 2},
            'save_strategy="best" with evaluation saves by metric_for_best_model, and select="optimality" wants to '
            'decide as well. Use one of them: metric_for_best_model="ib_selectable_optimality" without select=',
        ),
        ("token/complexity", {"save_strategy": "no"}, 'select="token/complexity" chooses among checkpoints'),
    ],
)
def test_nobody_or_two_decide(select: str | None, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [tiny_callback(select=select)], **settings)
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_trainers_own_best_model_may_cost_the_selected_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    saving = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    judged = {**saving, "metric_for_best_model": "loss", "load_best_model_at_end": True}
    with pytest.warns(
        RuntimeWarning,
        match=r'its own best model \(metric_for_best_model="loss"\) from save_total_limit=2, and can protect only one: '
        r'what select="optimality" chooses may be deleted\. Use metric_for_best_model="ib_selectable_optimality"',
    ):
        tiny_trainer(tmp_path / "limited", [selecting()], steps=20, save_total_limit=2, **judged).train()

    callback = selecting()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        trainer = tiny_trainer(tmp_path / "unlimited", [callback], steps=30, **judged)
        trainer.train()
    # Both go their own ways: the Trainer by its loss, which we leave to it.
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert trainer.state.best_metric == min(losses.values()) == losses[trainer.state.best_global_step]
    assert callback.selected is not None
    assert callback.selected.step == 20
