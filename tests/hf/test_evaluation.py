"""Our numbers among the metrics of an evaluation: for whoever asks for them, and in nobody's way."""

from __future__ import annotations

import copy
import json
import math
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from scripted import BEST, COURSE, follow
from tiny_hf import Each, measured, tiny_callback, tiny_model, tiny_trainer
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_utils import default_compute_objective

EVALUATING = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def ours(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if key.startswith("eval_ib_")}


def strict(path: Path) -> Any:
    """JSON as the standard has it: without NaN and infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path}: {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"metric_for_best_model": "ib_selectable_optimality"},
        {"metric_for_best_model": "ib_selectable_distance_to_bound", "greater_is_better": False},
        {"metric_for_best_model": "ib_optimality", "load_best_model_at_end": True},
    ],
    ids=["not watched", "watched, high", "watched, low", "best at the end"],
)
def test_every_state_is_strict_json(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be selected before step 15, and the ratio above null is undefined at first."""
    follow(monkeypatch)
    callback = tiny_callback(every_n_steps=1, orders="token")
    trainer = tiny_trainer(tmp_path, [callback], steps=5, **{**EVALUATING, **settings})
    trainer.train()
    trainer.save_state()
    trainer.save_metrics("eval", trainer.evaluate())
    states = [strict(path) for path in sorted(tmp_path.rglob("trainer_state.json"))]
    assert len(states) == 6
    assert [row["ib/complexity"] for row in states[-1]["log_history"] if "ib/complexity" in row] == [
        point.complexity for point in COURSE[:6]
    ]
    judged = settings.get("metric_for_best_model") == "ib_optimality"
    assert all((state["best_metric"] is None) != judged for state in states)
    assert strict(tmp_path / "eval_results.json")["eval_ib_optimality"] is not None
    assert "save_to_json" not in vars(trainer.state)


def test_a_best_metric_is_kept_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    callbacks = [tiny_callback(every_n_steps=100, orders="token"), EarlyStoppingCallback(early_stopping_patience=3)]
    settings = {**EVALUATING, "load_best_model_at_end": True, "metric_for_best_model": "ib_selectable_optimality"}
    trainer = tiny_trainer(tmp_path, callbacks, steps=30, save_total_limit=2, **settings)
    trainer.train()
    assert trainer.state.global_step == 23
    (last,) = [path for path in tmp_path.rglob("trainer_state.json") if "checkpoint-23" in str(path)]
    assert strict(last)["best_metric"] == trainer.state.best_metric == BEST.optimality


@pytest.mark.parametrize(
    "copy", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))], ids=["copy", "pickle"]
)
def test_a_copy_of_the_state_saves_itself(copy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)

    def save_a_copy(state: Any, control: Any, model: Any) -> None:
        other = copy(state)
        other.global_step, other.best_metric = 99, -math.inf
        other.save_to_json(str(tmp_path / "copy.json"))

    callbacks = [tiny_callback(every_n_steps=1, orders="token"), Each("on_step_end", save_a_copy)]
    tiny_trainer(tmp_path, callbacks, steps=1, metric_for_best_model="ib_selectable_optimality", **EVALUATING).train()
    saved = strict(tmp_path / "copy.json")
    assert (saved["global_step"], saved["best_metric"]) == (99, None)


@pytest.mark.parametrize("event", ["on_train_begin", "on_step_begin"], ids=["before ours", "after ours"])
def test_what_others_put_before_the_saving_of_the_state_stays(event: str, tmp_path: Path) -> None:
    saved: list[str] = []

    def put(state: Any, control: Any, model: Any) -> None:
        before = state.save_to_json
        state.save_to_json = lambda path: (saved.append(path), before(path))

    trainer = tiny_trainer(
        tmp_path,
        [Each(event, put), tiny_callback()],
        steps=1,
        metric_for_best_model="ib_selectable_optimality",
        **EVALUATING,
    )
    trainer.train()
    assert len(saved) == 1
    trainer.save_state()
    assert len(saved) == 2


# --- a notebook


class Table:
    """As much of `NotebookTrainingTracker` as is used."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write_line(self, values: dict[str, Any]) -> None:
        self.lines.append(values)

    def remove_child(self) -> None:
        pass


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Trainer's callback for notebooks, with a table that remembers."""
    display = types.ModuleType("IPython.display")
    display.HTML = display.display = lambda *shown: None  # type: ignore[attr-defined]
    ipython = types.ModuleType("IPython")
    ipython.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    from transformers.utils.notebook import NotebookProgressCallback

    class Remembers(NotebookProgressCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.training_tracker = self.table = Table()

        on_step_end = on_train_end = on_prediction_step = lambda self, *args, **kwargs: None

    return Remembers()


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("watched", [None, "ib_optimality"])
def test_the_table_of_a_notebook_stays_at_its_own_columns(
    watched: str | None, first: bool, notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    seen: list[dict[str, float]] = []

    class Later(TrainerCallback):
        def on_evaluate(self, *args: Any, metrics: dict[str, float], **kwargs: Any) -> None:
            seen.append(dict(metrics))

    callback = tiny_callback(every_n_steps=1)
    callbacks = [notebook, callback, Later()] if first else [callback, notebook, Later()]
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": watched}
    trainer = tiny_trainer(tmp_path, callbacks, steps=3, **settings)
    trainer.train()
    for line in notebook.table.lines:
        assert set(line) == {"Step", "Training Loss", "Validation Loss"}
    assert len(notebook.table.lines) == len(seen) == 3
    assert all("eval_ib_optimality" in metrics for metrics in seen)
    assert "eval_ib_optimality" in trainer.evaluate()
    assert "on_evaluate" not in vars(notebook)


def test_the_objective_of_a_search_is_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default it is the sum of all metrics, or the loss where there are no others."""
    follow(monkeypatch)
    objectives: list[tuple[float, float]] = []

    class Searching(Trainer):
        def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
            metrics = super()._evaluate(*args, **kwargs)
            objectives.append((default_compute_objective(metrics), metrics["eval_loss"]))
            return metrics

    class Begins(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.is_hyper_param_search = True

    callbacks = [Begins(), tiny_callback(every_n_steps=1)]
    tiny_trainer(tmp_path, callbacks, steps=2, kind=Searching, eval_strategy="steps", eval_steps=1).train()
    assert len(objectives) == 2
    assert all(objective == loss for objective, loss in objectives)


# --- after the training


@pytest.mark.parametrize("best", [False, True], ids=["last weights", "best weights"])
def test_an_evaluation_after_the_training_has_the_numbers_of_the_model_as_it_is(best: bool, tmp_path: Path) -> None:
    callback = tiny_callback(every_n_steps=2, orders="token")
    settings: dict[str, Any] = {**EVALUATING, "eval_steps": 2, "save_steps": 2}
    if best:  # the higher loss, which is the first one
        settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = tiny_trainer(tmp_path, [callback], steps=4, **settings)
    trainer.train()
    metrics = trainer.evaluate()
    wanted = {
        f"eval_{name.replace('/', '_')}": value for name, value in measured(trainer.model, 0, orders="token").items()
    }
    found = ours(metrics)
    assert wanted.items() <= found.items()
    assert all(math.isfinite(value) for value in found.values())
    assert trainer.state.best_global_step == (2 if best else None)
    at = [point.step for point in callback.trajectory if point.complexity == found["eval_ib_complexity"]]
    assert at == [2 if best else 4]
    assert callback.trajectory.steps == [0, 2, 4], "no point is added"
    assert "eval_ib_optimality" not in trainer.evaluate(metric_key_prefix="test")


@pytest.mark.parametrize("loaded", [False, True], ids=["last weights", "other weights"])
def test_each_evaluation_dataset_has_the_numbers_after_the_training(
    loaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weights that no point has they are measured once."""
    callback = tiny_callback(every_n_steps=1, orders="token")
    trainer = tiny_trainer(tmp_path, [callback], steps=1, eval_strategy="steps", eval_steps=1)
    rows = trainer.eval_dataset
    trainer.eval_dataset = {"first": rows, "second": rows}
    trainer.train()
    if loaded:
        trainer.model.load_state_dict(tiny_model(seed=9).state_dict())
    measure, passes = callback._run.meter.measure, []
    monkeypatch.setattr(callback._run.meter, "measure", lambda *args, **kw: passes.append(1) or measure(*args, **kw))
    expected = measured(trainer.model, 1, orders="token")["ib/complexity"]
    for dataset in (None, {"second": rows}, {"third": rows, "first": rows}, rows):
        assert trainer.evaluate(dataset)["eval_ib_complexity"] == expected
    assert "eval_ib_complexity" in trainer.evaluate(rows, metric_key_prefix="eval_of_mine")
    assert len(passes) == loaded


def test_an_evaluation_before_any_training_is_left_alone(tmp_path: Path) -> None:
    assert not ours(tiny_trainer(tmp_path, [tiny_callback()]).evaluate())


# --- what goes wrong


def test_the_metric_that_is_judged_by_is_there_whatever_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = tiny_callback(every_n_steps=1, orders="token")
    trainer = tiny_trainer(tmp_path, [callback], steps=3, metric_for_best_model="ib_optimality", **EVALUATING)

    def fail() -> Any:
        raise OSError("gone")

    monkeypatch.setattr(callback._run, "numbers", fail)
    with pytest.warns(RuntimeWarning, match="IBCallback._add_numbers failed, and training goes on. OSError: gone"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.best_metric is None
