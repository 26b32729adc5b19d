"""The Trainer's own judgement by our numbers: metric_for_best_model, load_best_model_at_end, EarlyStoppingCallback."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import BEST, COURSE, follow
from synthetic_runs import failed, measured
from tiny_hf import Each, same_weights, tiny_callback, tiny_probe, tiny_trainer, weights
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

import ib_callback as ib
from ib_callback.hf import IBCallback

Weights = dict[int, dict[str, torch.Tensor]]


class Evaluations(TrainerCallback):
    """What every evaluation's metrics have for a callback that comes later."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        self.seen.append((state.global_step, dict(metrics)))


def judged(directory: Path, callbacks: list[TrainerCallback], metric: str, *, every: int = 1, **settings: Any) -> Any:
    """A Trainer that evaluates and saves every so many steps, and loads the best model by a metric."""
    settings = {
        "steps": 30, "eval_strategy": "steps", "eval_steps": every, "save_strategy": "steps", "save_steps": every,
        "load_best_model_at_end": True, "metric_for_best_model": metric, **settings,
    }  # fmt: skip
    return tiny_trainer(directory, callbacks, **settings)


def kept(by_step: Weights) -> TrainerCallback:
    """Remembers the weights of every step."""

    def keep(state: Any, control: Any, model: torch.nn.Module) -> None:
        by_step[state.global_step] = weights(model)

    return Each("on_step_end", keep)


@pytest.mark.parametrize(
    ("metric", "name", "interval", "evaluations", "settings"),
    [
        ("ib_optimality", "optimality", 4, 2, {}),
        ("ib_bigram_optimality", "bigram/optimality", 100, 3, {}),
        ("eval_ib_expressivity", "expressivity", 2, 4, {}),
        ("ib_distance_to_bound", "distance_to_bound", 3, 2, {"greater_is_better": False}),
        ("ib_selectable_expressivity", "expressivity", 5, 2, {}),
        ("ib_selectable_loss", "loss", 4, 2, {"greater_is_better": False}),
        ("ib_selectable_token_complexity", "token/complexity", 100, 3, {"greater_is_better": False}),
    ],
)
def test_the_loaded_weights_are_those_that_were_judged_best(
    metric: str, name: str, interval: int, evaluations: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    by_step: Weights = {}
    callback = tiny_callback(every_n_steps=interval, select_from=5)
    trainer = judged(tmp_path, [callback, kept(by_step)], metric, every=evaluations, steps=12, **settings)
    trainer.train()

    from_step = 5 if "selectable" in metric else 0
    values = {point.step: point.scalars()[name] for point in callback.trajectory}
    candidates = [values[step] for step in range(evaluations, 13, evaluations) if step >= from_step]
    assert trainer.state.best_metric == (min if settings else max)(candidates)
    assert trainer.state.best_global_step in range(evaluations, 13, evaluations)
    assert same_weights(weights(trainer.model), by_step[trainer.state.best_global_step])
    again = ib.Meter(tiny_probe(), num_bins=12, batch_size=3).measure(trainer.model)
    assert again.scalars()[name] == trainer.state.best_metric


def test_weights_that_were_best_before_the_end_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    by_step: Weights = {}
    callbacks = [tiny_callback(every_n_steps=1, orders="token"), kept(by_step)]
    trainer = judged(tmp_path, callbacks, "ib_selectable_optimality", every=5, steps=30)
    trainer.train()
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (20, BEST.optimality)
    assert not same_weights(by_step[20], by_step[30])
    assert same_weights(weights(trainer.model), by_step[20])


def test_a_run_in_which_nothing_can_be_selected_keeps_its_last_weights(tmp_path: Path) -> None:
    by_step: Weights = {}
    callback, evaluations = tiny_callback(every_n_steps=3), Evaluations()
    trainer = judged(tmp_path, [callback, kept(by_step), evaluations], "ib_selectable_optimality", every=4, steps=8)
    trainer.train()
    assert trainer.state.best_model_checkpoint is None
    assert trainer.state.best_global_step is None
    assert same_weights(weights(trainer.model), by_step[8])
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    for step, metrics in evaluations.seen:
        point = next(point for point in callback.trajectory if point.step == step)
        assert math.isnan(metrics["eval_ib_selectable_optimality"])
        assert metrics["eval_ib_optimality"] == point.optimality


@pytest.mark.parametrize(
    ("metric", "settings", "message"),
    [
        ("ib_distance_to_bound", {}, "is better when low, .* Set greater_is_better=False"),
        ("ib_optimalty", {}, "not measured; those measured: ib_complexity, .*ib_token_optimality"),
        ("ib/optimality", {}, "not measured; those measured: ib_complexity"),
        ("ib_optimality", {"load_best_model_at_end": False, "eval_strategy": "no"}, 'eval_strategy is "no"'),
    ],
)
def test_mistakes_in_the_metric_are_found_before_training(
    metric: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = judged(tmp_path, [tiny_callback()], metric, **settings)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert list(tmp_path.glob("*.jsonl")) == []


# --- at an evaluation


def test_an_evaluation_is_measured_once_and_its_numbers_reach_later_callbacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, evaluations = follow(monkeypatch), Evaluations()
    callback = tiny_callback(every_n_steps=4, orders="token")
    trainer = judged(
        tmp_path, [callback, evaluations], "ib_optimality", every=3, steps=7, eval_on_start=True, save_strategy="no",
        load_best_model_at_end=False,
    )  # fmt: skip
    trainer.train()
    # The Trainer also evaluates at the last step.
    assert [step for step, _ in evaluations.seen] == [0, 3, 6, 7]
    assert made == callback.trajectory.steps == [0, 3, 4, 6, 7]
    for step, metrics in evaluations.seen:
        assert metrics["eval_ib_optimality"] == metrics["eval_ib_token_optimality"] == COURSE[step].optimality
        assert metrics["eval_ib_phase"] == (1.0 if step >= 4 else 0.0)


def test_if_the_trainer_judges_by_another_metric_evaluations_have_the_last_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, evaluations = follow(monkeypatch), Evaluations()
    callback = tiny_callback(every_n_steps=4, orders="token")
    judged(tmp_path, [callback, evaluations], "loss", every=3, steps=6).train()
    assert made == [0, 4, 6]
    assert [m["eval_ib_optimality"] for _, m in evaluations.seen] == [COURSE[0].optimality, COURSE[6].optimality]


def test_an_evaluation_that_is_judged_is_measured_whatever_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    judging = {"eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "ib_optimality"}
    callback = tiny_callback(every_n_steps=5, orders="token", overhead_budget=1e-9)
    tiny_trainer(tmp_path, [callback], steps=12, **judging).train()
    assert callback.trajectory.steps == [0, 4, 8, 12]
    assert callback.cost.skipped == 2


@pytest.mark.parametrize("prefix", ["eval", "train"])
def test_a_second_evaluation_in_one_step(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback that evaluates by itself, before the Trainer does, is a recipe that many use."""
    made, evaluations = follow(monkeypatch), Evaluations()

    class EvaluatesToo(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            before = copy.copy(control)  # for an evaluation ends what asked for one
            trainer.evaluate(metric_key_prefix=prefix)
            return before

    ours = tiny_callback(every_n_steps=100, orders="token")
    metric = "ib_distance_to_bound"
    trainer = judged(tmp_path, [ours, evaluations, EvaluatesToo()], metric, steps=2, greater_is_better=False)
    trainer.train()
    assert [step for step, _ in evaluations.seen] == [1, 1, 2, 2]
    assert made == [0, 1, 2]
    for count, (step, metrics) in enumerate(evaluations.seen):
        ours_too = prefix == "eval" or count % 2 == 1
        assert metrics.get(f"eval_{metric}") == (COURSE[step].distance_to_bound if ours_too else None)
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (2, COURSE[2].distance_to_bound)


def test_an_evaluation_whose_measurement_fails_is_not_judged_by_earlier_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the two that are evaluated, at 3 and 6, only the first could be measured; the best, at 4, was not evaluated.
    points = [measured(step, 0.5, 0.4 if step == 4 else 0.1) for step in (0, 3, 4)]
    follow(monkeypatch, ib.Trajectory([*points, failed(6)]))
    evaluations = Evaluations()
    ours = tiny_callback(every_n_steps=4, orders="token")
    trainer = judged(tmp_path, [ours, evaluations], "ib_optimality", every=3, steps=6)
    with pytest.warns(RuntimeWarning, match="Nothing could be measured at step 6"):
        trainer.train()
    assert evaluations.seen[0][1]["eval_ib_optimality"] == 0.2
    assert math.isnan(evaluations.seen[1][1]["eval_ib_optimality"])
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (3, 0.2)


# --- EarlyStoppingCallback


def stops_early(directory: Path, metric: str, *, several: bool = False, **settings: Any) -> tuple[Trainer, Any, Any]:
    """A run along COURSE that the Trainer's own EarlyStoppingCallback watches at every step."""
    ours = tiny_callback(every_n_steps=100, orders="token")
    stock, evaluations = EarlyStoppingCallback(early_stopping_patience=3), Evaluations()
    trainer = judged(directory, [ours, stock, evaluations], metric, **settings)
    if several:
        trainer.eval_dataset = {"seen": trainer.eval_dataset[:2], "new": trainer.eval_dataset[2:]}
    trainer.train()
    return trainer, stock, evaluations


def test_the_trap_plain_distance_stops_in_the_collapse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why there are selectable numbers: by the plain distance the collapsed model is the best of the run."""
    follow(monkeypatch)
    trainer, _, _ = stops_early(tmp_path, "ib_distance_to_bound", greater_is_better=False)
    assert trainer.state.global_step == 5
    assert trainer.state.best_global_step == 2
    assert trainer.state.best_metric == COURSE[2].distance_to_bound


@pytest.mark.parametrize("several", [False, True], ids=["one dataset", "several datasets"])
def test_selectable_distance_does_not_fall_for_it(
    several: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = follow(monkeypatch)
    trainer, stock, evaluations = stops_early(
        tmp_path, "ib_selectable_distance_to_bound", several=several, greater_is_better=False
    )
    # Selectable from 15 on, better until 20, then three evaluations that are not.
    assert trainer.state.global_step == 23
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (20, BEST.distance_to_bound)
    assert stock.early_stopping_patience_counter == 3
    assert made == list(range(24))
    found = [step for step, metrics in evaluations.seen if "eval_ib_selectable_distance_to_bound" in metrics]
    assert found == list(range(1, 24)), "once an evaluation, however many datasets it is of"
    assert len(evaluations.seen) == (46 if several else 23)


def test_no_patience_is_lost_before_anything_can_be_selected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    trainer, stock, _ = stops_early(tmp_path, "ib_selectable_optimality", steps=12)
    assert trainer.state.global_step == 12
    assert stock.early_stopping_patience_counter == 0
    assert trainer.state.best_model_checkpoint is None


def test_plain_optimality_is_watched_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    trainer, _, _ = stops_early(tmp_path, "ib_optimality")
    # .1 at all of 0, 1 and 2; then it rises to .8 at 20 and stays.
    assert (trainer.state.global_step, trainer.state.best_global_step) == (23, 20)


def test_early_stopping_that_comes_first_is_refused(tmp_path: Path) -> None:
    callbacks = [EarlyStoppingCallback(), tiny_callback()]
    trainer = judged(tmp_path, callbacks, "ib_optimality")
    with pytest.raises(ValueError, match=r"EarlyStoppingCallback comes before IBCallback .*Put IBCallback first"):
        trainer.train()
    assert trainer.state.global_step == 0
    # By a number of the Trainer's own it may watch from anywhere.
    trainer = judged(tmp_path, callbacks, "loss", every=2, steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_weights_are_those_of_the_best_evaluation_when_the_schedule_never_meets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    by_step: Weights = {}
    ours: IBCallback = tiny_callback(every_n_steps=7, orders="token", select_from="fit")
    trainer = judged(tmp_path, [ours, kept(by_step)], "ib_selectable_optimality", every=4, save_total_limit=1)
    trainer.train()
    assert trainer.state.best_global_step == 20
    assert same_weights(weights(trainer.model), by_step[20])
    assert not same_weights(by_step[20], by_step[30])
    assert ours.trajectory.steps == sorted({*range(0, 31, 7), *range(0, 31, 4), 30})
