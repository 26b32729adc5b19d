from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hf import (
    Each,
    measured,
    numbers,
    random_states,
    same_weights,
    tiny_callback,
    tiny_model,
    tiny_trainer,
    weights,
)
from transformers import Trainer, TrainerCallback

import ib_callback as ib

# --- training is not disturbed ---


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"torch_compile": True, "torch_compile_backend": "aot_eager", "bf16": True},
    ],
    ids=["gradient checkpointing", "bf16", "compiled", "compiled with bf16"],
)
def test_training_is_bitwise_the_same_with_and_without(arguments: dict[str, Any], tmp_path: Path) -> None:
    left: dict[str, Any] = {}

    def train(name: str, callbacks: list[TrainerCallback]) -> None:
        torch._dynamo.reset()
        trainer = tiny_trainer(
            tmp_path / name, callbacks, steps=30, gradient_accumulation_steps=2, lr_scheduler_type="cosine", **arguments
        )
        assert trainer.model.config.resid_pdrop > 0
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        left[name] = weights(trainer.model), trainer.optimizer.state_dict(), random_states(), losses

    callback = tiny_callback(every_n_steps=5, log_plane=len(arguments) == 1)
    train("without", [])
    train("with", [callback])
    assert callback.trajectory.steps == list(range(0, 31, 5))
    assert all(point.error is None for point in callback.trajectory)

    (weights_a, optimizer_a, random_a, losses_a), (weights_b, optimizer_b, random_b, losses_b) = left.values()
    assert not same_weights(weights_a, weights(tiny_model())), "nothing was learned, so nothing was tested"
    assert same_weights(weights_a, weights_b)
    assert losses_a == losses_b
    assert random_a == random_b
    assert optimizer_a["param_groups"] == optimizer_b["param_groups"]
    assert optimizer_a["state"].keys() == optimizer_b["state"].keys()
    for index, moments in optimizer_a["state"].items():
        assert same_weights(moments, optimizer_b["state"][index])


# --- when it measures ---


def test_the_last_step_of_a_run_that_is_given_in_epochs(tmp_path: Path) -> None:
    callback = tiny_callback(every_n_steps=100)
    tiny_trainer(tmp_path, [callback], steps=-1, num_train_epochs=0.5).train()
    assert callback.trajectory.steps == [0, 8]


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_evaluate", "on_epoch_end"])
def test_the_last_step_when_another_callback_ends_the_training(event: str, tmp_path: Path) -> None:
    """Wherever it ends: the weights measured are those of the last step, not the best ones loaded after it."""
    evaluations: list[int] = []
    at_step: dict[int, dict[str, torch.Tensor]] = {}

    class GrowsWorse(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
            evaluations.append(state.global_step)
            metrics["eval_quality"] = -float(state.global_step)

    def keep(state: Any, control: Any, model: torch.nn.Module) -> None:
        at_step[state.global_step] = weights(model)

    def stop(state: Any, control: Any, model: torch.nn.Module) -> None:
        if state.global_step >= 6:
            control.should_training_stop = True

    callback = tiny_callback(every_n_steps=100)
    trainer = tiny_trainer(
        tmp_path,
        [callback, GrowsWorse(), Each("on_step_end", keep), Each(event, stop)],
        steps=64,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="quality",
        greater_is_better=True,
    )
    trainer.train()
    last = trainer.state.global_step
    assert callback.trajectory.steps == [0, last]
    assert trainer.state.best_global_step == evaluations[0] == 3
    assert last == (16 if event == "on_epoch_end" else 6)

    best = measured(trainer.model, last)
    trainer.model.load_state_dict(at_step[last])
    assert numbers(callback.trajectory[-1]) == measured(trainer.model, last) != best


def test_the_last_step_when_an_evaluation_after_the_epoch_ends_the_training(tmp_path: Path) -> None:
    def stop(state: Any, control: Any, model: torch.nn.Module) -> None:
        control.should_training_stop = True

    callback = tiny_callback(every_n_steps=100)
    trainer = tiny_trainer(tmp_path, [callback, Each("on_evaluate", stop)], steps=64, eval_strategy="epoch")
    trainer.train()
    assert callback.trajectory.steps == [0, 16]


@pytest.mark.parametrize(("load_best", "expected"), [(False, [0, 16]), (True, [0])])
def test_a_trainer_without_a_closing_log(load_best: bool, expected: list[int], tmp_path: Path) -> None:
    """The last point is still measured where that is possible; never with the best weights in place of the last."""

    class Silent(Trainer):
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "total_flos" not in logs:
                super().log(logs, *args, **kwargs)

    def stop(state: Any, control: Any, model: torch.nn.Module) -> None:
        control.should_training_stop = True

    callback = tiny_callback(every_n_steps=100)
    saving = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    trainer = tiny_trainer(
        tmp_path,
        # At the end of the epoch, after this callback was asked for the last time.
        [callback, Each("on_epoch_end", stop)],
        steps=64,
        kind=Silent,
        load_best_model_at_end=load_best,
        **(saving if load_best else {}),
    )
    warned = pytest.warns(RuntimeWarning, match="The last step, step 16, was not measured")
    with warned if load_best else nullcontext():
        trainer.train()
    assert trainer.state.global_step == 16
    assert callback.trajectory.steps == expected


def test_a_restart_with_a_smaller_batch_begins_anew(tmp_path: Path) -> None:
    callback = tiny_callback(every_n_steps=2)
    trainer = tiny_trainer(tmp_path, [callback], steps=5, per_device_train_batch_size=4, auto_find_batch_size=True)
    compute_loss = trainer.compute_loss

    def out_of_memory_above_two(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 3 and len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = out_of_memory_above_two
    trainer.train()
    assert callback.trajectory.steps == [0, 2, 4, 5]
    assert ib.Trajectory.load(tmp_path) == callback.trajectory
    assert ib.Trajectory.load(tmp_path / "ib_trajectory.1.jsonl").steps == [0, 2]


@pytest.mark.parametrize(
    ("disable_tqdm", "keyword", "shown"), [(True, None, False), (False, None, True), (True, True, True)]
)
def test_progress_follows_the_trainer_unless_asked_for(
    disable_tqdm: bool, keyword: bool | None, shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    measure = ib.Meter.measure

    def spy(meter: ib.Meter, *args: Any, **kwargs: Any) -> ib.Measurement:
        seen.append(meter.progress)
        return measure(meter, *args, **kwargs)

    monkeypatch.setattr(ib.Meter, "measure", spy)
    callback = tiny_callback(**({} if keyword is None else {"progress": keyword}))
    tiny_trainer(tmp_path, [callback], steps=1, disable_tqdm=disable_tqdm).train()
    assert seen == [shown, shown]
