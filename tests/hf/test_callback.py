from __future__ import annotations

import os
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hf import (
    VOCABULARY,
    Each,
    random_states,
    same_weights,
    tiny_callback,
    tiny_model,
    tiny_probe,
    tiny_trainer,
    weights,
)
from transformers import Trainer, TrainerCallback

import ib_callback as ib
from ib_callback.common.errors import ModelError, TrajectoryError
from ib_callback.hf import IBCallback
from ib_callback.results.trajectory import FILENAME


def numbers(point: ib.Measurement) -> dict[str, float]:
    """All that is measured, without how long it took."""
    return {name: value for name, value in point.metrics().items() if name not in ("ib/seconds", "ib/overhead")}


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


def test_measures_at_the_start_by_schedule_and_at_the_end(tmp_path: Path) -> None:
    callback = tiny_callback(every_n_steps=5, log_plane=True)
    trainer = tiny_trainer(tmp_path, [callback], steps=12)
    untrained = weights(trainer.model)
    trainer.train()
    assert callback.trajectory.steps == [0, 5, 10, 12]
    assert ib.Trajectory.load(tmp_path) == callback.trajectory
    assert (tmp_path / "information_plane.png").read_bytes().startswith(b"\x89PNG")

    meter = ib.Meter(tiny_probe(), num_bins=12, batch_size=3)
    assert numbers(callback.trajectory[-1]) == numbers(meter.measure(trainer.model, step=12))
    trainer.model.load_state_dict(untrained)
    assert numbers(callback.trajectory[0]) == numbers(meter.measure(trainer.model, step=0))


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
def test_schedules(schedule: Any, expected: list[int], tmp_path: Path) -> None:
    callback = tiny_callback(every_n_steps=schedule, orders="token", null=False)
    tiny_trainer(tmp_path, [callback], steps=12).train()
    assert callback.trajectory.steps == expected


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

    meter = ib.Meter(tiny_probe(), num_bins=12, batch_size=3)
    best = meter.measure(trainer.model, step=last)
    trainer.model.load_state_dict(at_step[last])
    assert numbers(callback.trajectory[-1]) == numbers(meter.measure(trainer.model, step=last)) != numbers(best)


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


# --- what it writes ---


def test_overhead_is_a_share_of_the_time_since_training_began(tmp_path: Path) -> None:
    callback = tiny_callback(every_n_steps=2)
    tiny_trainer(tmp_path, [callback], steps=8).train()
    shares = [point.overhead for point in callback.trajectory]
    assert all(share is not None and 0 < share <= 1 for share in shares)
    assert shares[-1] < shares[0]


def test_output_dir_of_its_own(tmp_path: Path) -> None:
    callback = tiny_callback(output_dir=tmp_path / "elsewhere")
    tiny_trainer(tmp_path / "run", [callback], steps=2).train()
    assert (tmp_path / "elsewhere" / FILENAME).is_file()
    assert not (tmp_path / "run" / FILENAME).exists()


def test_a_second_training_begins_anew_and_keeps_the_old_file(tmp_path: Path) -> None:
    callback = tiny_callback(every_n_steps=2)
    trainer = tiny_trainer(tmp_path, [callback], steps=4)
    trainer.train()
    first = callback.trajectory
    trainer.train()
    assert callback.trajectory.steps == first.steps == [0, 2, 4]
    assert numbers(callback.trajectory[0]) == numbers(first[-1])
    assert ib.Trajectory.load(tmp_path) == callback.trajectory
    assert ib.Trajectory.load(tmp_path / "ib_trajectory.1.jsonl") == first


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


# --- mistakes, before training time is spent ---


def test_an_unknown_keyword() -> None:
    with pytest.raises(
        TypeError,
        match=r"IBCallback got the unknown keyword num_bin; it takes every_n_steps, .* those of Meter: .*num_bins",
    ):
        IBCallback(tiny_probe(), num_bin=12)


def test_settings_are_checked_when_the_callback_is_made() -> None:
    with pytest.raises(ValueError, match="every_n_steps: expected an integer of at least 1, got 0; or pass"):
        tiny_callback(every_n_steps=0)
    with pytest.raises(ValueError, match="num_bins"):
        tiny_callback(num_bins=1)


def test_a_probe_of_another_tokenizer(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [IBCallback(tiny_probe(vocabulary=4 * VOCABULARY))])
    with pytest.raises(ModelError, match=f"outside the model's vocabulary of {VOCABULARY}"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    trainer = tiny_trainer(tmp_path / "run", [tiny_callback(output_dir=tmp_path / "file" / "below")])
    with pytest.raises(TrajectoryError, match="cannot write to the output directory"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_mistake_found_by_the_first_measurement(tmp_path: Path) -> None:
    calls = []

    def forward(model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        calls.append(input_ids.shape)
        if len(calls) > 1:  # the preflight's pass was well
            raise TypeError("a mistake of the user")
        return model(input_ids=input_ids, attention_mask=attention_mask)

    trainer = tiny_trainer(tmp_path, [tiny_callback(forward=forward)])
    with pytest.raises(TypeError, match="a mistake of the user"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_two_callbacks_in_one_directory_are_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [tiny_callback(), tiny_callback()])
    with pytest.raises(TrajectoryError, match=r"another callback of this training.*Give each its own output_dir="):
        trainer.train()
    assert trainer.state.global_step == 0
    callbacks = [tiny_callback(output_dir=tmp_path / name, every_n_steps=4) for name in "ab"]
    tiny_trainer(tmp_path, callbacks, steps=4).train()
    assert [ib.Trajectory.load(tmp_path / name).steps for name in "ab"] == [[0, 4], [0, 4]]


def test_a_relative_directory_survives_a_change_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def go(state: Any, control: Any, model: Any) -> None:
        os.chdir(tmp_path / "elsewhere")

    callback = tiny_callback(every_n_steps=2, output_dir="run")
    tiny_trainer(tmp_path / "trainer", [callback, Each("on_step_begin", go)], steps=4).train()
    assert ib.Trajectory.load(tmp_path / "run").steps == [0, 2, 4]


def test_a_schedule_that_fails_costs_points_and_not_the_run(tmp_path: Path) -> None:
    callback = tiny_callback(every_n_steps=lambda step: 1 // (4 - step) > 0)
    trainer = tiny_trainer(tmp_path, [callback], steps=6)
    with pytest.warns(RuntimeWarning, match="The schedule failed.*ZeroDivisionError"):
        trainer.train()
    assert trainer.state.global_step == 6
    assert callback.trajectory.steps == [0, 3, 6]


# --- failures while training runs ---


def test_a_model_that_goes_bad_costs_one_point(tmp_path: Path) -> None:
    kept: dict[str, torch.Tensor] = {}

    def poison(state: Any, control: Any, model: torch.nn.Module) -> None:
        if state.global_step == 5:
            kept.update(weights(model))
            with torch.no_grad():
                model.transformer.wte.weight.fill_(torch.nan)

    def heal(state: Any, control: Any, model: torch.nn.Module) -> None:
        if state.global_step == 5:
            model.load_state_dict(kept)

    callback = tiny_callback(every_n_steps=5)
    trainer = tiny_trainer(tmp_path, [Each("on_step_end", poison), callback, Each("on_step_end", heal)], steps=15)
    with pytest.warns(RuntimeWarning, match="Nothing could be measured at step 5.*RepresentationError") as caught:
        trainer.train()
    assert len([w for w in caught if "Nothing could be measured" in str(w.message)]) == 1
    assert trainer.state.global_step == 15
    assert [point.error is None for point in callback.trajectory] == [True, False, True, True]
    missing = callback.trajectory[1]
    assert missing.step == 5
    assert "NaN" in (missing.error or "")
    assert missing.complexity is None
    assert ib.Trajectory.load(tmp_path) == callback.trajectory
    assert 5 not in [row["step"] for row in trainer.state.log_history if any(key.startswith("ib/") for key in row)]


def test_running_out_of_memory_costs_one_point(tmp_path: Path) -> None:
    armed = []

    def forward(model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        if armed == [5]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return model(input_ids=input_ids, attention_mask=attention_mask)

    def arm(state: Any, control: Any, model: torch.nn.Module) -> None:
        armed[:] = [state.global_step]

    callback = tiny_callback(every_n_steps=5, batch_size=1, forward=forward)
    trainer = tiny_trainer(tmp_path, [Each("on_step_end", arm), callback], steps=12)
    untouched = weights(trainer.model)
    with pytest.warns(
        RuntimeWarning, match="Nothing could be measured at step 5.*OutOfMemoryError: CUDA out of memory"
    ):
        trainer.train()
    assert [point.error is None for point in callback.trajectory] == [True, False, True, True]
    assert not any(len(module._forward_hooks) for module in trainer.model.modules())
    assert not same_weights(untouched, weights(trainer.model))


def test_an_interrupt_is_not_swallowed(tmp_path: Path) -> None:
    def forward(model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        if model.training_has_begun:
            raise KeyboardInterrupt
        return model(input_ids=input_ids, attention_mask=attention_mask)

    model = tiny_model()
    model.training_has_begun = False

    def begin(state: Any, control: Any, model: Any) -> None:
        model.training_has_begun = True

    trainer = tiny_trainer(tmp_path, [tiny_callback(forward=forward), Each("on_step_begin", begin)], model=model)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        trainer.train()


# --- a good run ---


def test_no_warnings_of_our_own_in_a_good_run(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny_trainer(tmp_path, [tiny_callback(every_n_steps=2, log_plane=True)], steps=4).train()
    assert [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)] == []


def test_standard_errors_reach_the_log_and_the_file(tmp_path: Path) -> None:
    callback = tiny_callback(standard_errors=3)
    trainer = tiny_trainer(tmp_path, [callback])
    trainer.train()
    logged = [row for row in trainer.state.log_history if "ib/token/optimality_se" in row]
    assert [row["ib/token/optimality_se"] for row in logged] == [p["token"].optimality_se for p in callback.trajectory]
    stored = ib.Trajectory.load(tmp_path / FILENAME)
    assert ib.difference(stored[-1], stored[0]) == ib.difference(callback.trajectory[-1], callback.trajectory[0])
