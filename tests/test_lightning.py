from __future__ import annotations

import copy
import csv
import json
import math
import os
import pickle
import runpy
import socket
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from PIL import Image
from tiny_hf import LENGTH, VOCABULARY, random_ids, random_states, same_weights, tiny_model, tiny_probe, weights
from tiny_lightning import BATCH, ROWS, tiny_callback, tiny_module, tiny_trainer
from wandb_offline import OfflineRun, read_offline_runs

import ib_callback as ib
from ib_callback.errors import ModelError, TrajectoryError
from ib_callback.lightning import IBCallback
from ib_callback.trajectory_lines import FILENAME


def numbers(point: ib.Measurement) -> dict[str, float]:
    """All that is measured, without how long it took."""
    return {name: value for name, value in point.metrics().items() if name not in ("ib/seconds", "ib/overhead")}


def measured(model: torch.nn.Module, step: int) -> dict[str, float]:
    return numbers(ib.Meter(tiny_probe(), num_bins=12, batch_size=3).measure(model, step=step))


def published(trainer: Any) -> dict[str, float]:
    """What stock callbacks see; a number that is undefined at a point is NaN, and left out here."""
    values = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("ib/")}
    return {name: value for name, value in values.items() if not math.isnan(value)}


# --- training is not disturbed ---


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"accumulate_grad_batches": 2, "limit_val_batches": 1, "val_check_interval": 4},
        {"compile": "whole", "accumulate_grad_batches": 2},
        {"compile": "inner", "precision": "bf16-mixed"},
    ],
    ids=lambda arguments: ",".join(f"{name}={value}" for name, value in arguments.items()) or "float32",
)
def test_training_is_bitwise_the_same_with_and_without(arguments: dict[str, Any], tmp_path: Path) -> None:
    compiled = arguments.get("compile")
    arguments = {name: value for name, value in arguments.items() if name != "compile"}
    left: dict[str, Any] = {}

    def train(name: str, callbacks: list[Callback]) -> None:
        torch._dynamo.reset()
        module = tiny_module(logs=compiled != "whole")  # torch 2.13 cannot compile Lightning's own self.log
        torch.manual_seed(5)
        assert module.net.config.resid_pdrop > 0
        module.net.transformer.h[0].eval()  # a user's choice, to be kept
        if compiled == "inner":
            module.net.compile(backend="eager")
        trainer = tiny_trainer(tmp_path / name, callbacks, steps=30, **arguments)
        trainer.fit(torch.compile(module, backend="eager") if compiled == "whole" else module)
        flags = [part.training for part in module.modules()]
        left[name] = weights(module), trainer.optimizers[0].state_dict(), random_states(), module.losses, flags

    callback = tiny_callback(every_n_steps=5, log_plane=not arguments and not compiled)
    train("without", [])
    train("with", [callback])
    assert callback.trajectory.steps == list(range(0, 31, 5))
    assert all(point.error is None for point in callback.trajectory)

    (weights_a, optimizer_a, random_a, losses_a, flags_a), (weights_b, optimizer_b, random_b, losses_b, flags_b) = (
        left.values()
    )
    assert not same_weights(weights_a, weights(tiny_module())), "nothing was learned, so nothing was tested"
    assert same_weights(weights_a, weights_b)
    assert losses_a == losses_b
    assert random_a == random_b
    assert flags_a == flags_b
    assert set(flags_a) == {True, False}
    assert optimizer_a["param_groups"] == optimizer_b["param_groups"]
    for index, moments in optimizer_a["state"].items():
        assert same_weights(moments, optimizer_b["state"][index])


# --- when it measures ---


@pytest.mark.parametrize("accumulate", [1, 2])
def test_measures_at_the_start_by_schedule_and_at_the_end(accumulate: int, tmp_path: Path) -> None:
    callback, module = tiny_callback(every_n_steps=5, log_plane=True), tiny_module()
    untrained = weights(module.net)
    trainer = tiny_trainer(tmp_path, [callback], steps=12, accumulate_grad_batches=accumulate)
    trainer.fit(module)
    assert len(module.losses) == 12 * accumulate
    assert callback.trajectory.steps == [0, 5, 10, 12]
    assert ib.Trajectory.load(tmp_path) == callback.trajectory
    assert (tmp_path / "information_plane.png").read_bytes().startswith(b"\x89PNG")
    assert published(trainer) == callback.trajectory[-1].metrics()

    assert numbers(callback.trajectory[-1]) == measured(module.net, 12)
    module.net.load_state_dict(untrained)
    assert numbers(callback.trajectory[0]) == measured(module.net, 0)


def test_a_point_is_that_of_its_step_and_not_of_a_later_micro_batch(tmp_path: Path) -> None:
    asked: list[int] = []

    def schedule(step: int) -> bool:
        asked.append(step)
        return step == 2

    callback = tiny_callback(every_n_steps=schedule)
    tiny_trainer(tmp_path, [callback], steps=4, accumulate_grad_batches=3).fit(tiny_module())
    assert callback.trajectory.steps == [0, 2, 4]
    assert asked == [0, 1, 2, 3, 4], "once at the start, where a mistake in it would show, and once for every step"


def test_several_optimizer_steps_in_one_batch_miss_no_point(tmp_path: Path) -> None:
    class TwoSteps(type(tiny_module())):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            for _ in range(2):
                self.optimizers().zero_grad()
                self.manual_backward(self.net(input_ids=batch, labels=batch).loss)
                self.optimizers().step()

    callback = tiny_callback(every_n_steps=5)
    tiny_trainer(tmp_path, [callback], steps=16).fit(TwoSteps())
    assert callback.trajectory.steps == [0, 6, 10, 16]


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize("first", [False, True], ids=["stops after", "stops before"])
def test_the_last_step_when_another_callback_ends_the_training(hook: str, first: bool, tmp_path: Path) -> None:
    def stop(trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.should_stop or (trainer.global_step >= 4 and not trainer.sanity_checking)

    callback, stopper, module = tiny_callback(every_n_steps=100), LambdaCallback(**{hook: stop}), tiny_module()
    callbacks = [stopper, callback] if first else [callback, stopper]
    trainer = tiny_trainer(
        tmp_path, callbacks, steps=64, limit_val_batches=1, val_check_interval=3, min_steps=5, min_epochs=0
    )
    trainer.fit(module)
    last = {"on_train_batch_end": 5, "on_validation_end": 6, "on_train_epoch_end": 12}[hook]
    assert trainer.global_step == last
    assert callback.trajectory.steps == [0, last]
    assert numbers(callback.trajectory[-1]) == measured(module.net, last)


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        ({"max_epochs": 2}, 2 * ROWS // BATCH),
        ({"max_epochs": 2, "limit_train_batches": 3, "accumulate_grad_batches": 2}, 4),
    ],
)
def test_the_last_step_of_a_run_that_is_given_in_epochs(arguments: dict[str, Any], last: int, tmp_path: Path) -> None:
    """Known in time for the checkpoint that is saved after the last batch."""
    callback = tiny_callback(every_n_steps=100)
    at_batch_end: list[list[int | None]] = []
    spy = LambdaCallback(on_train_batch_end=lambda *args: at_batch_end.append(callback.trajectory.steps))
    tiny_trainer(tmp_path, [callback, spy], steps=-1, **arguments).fit(tiny_module())
    assert callback.trajectory.steps == [0, last]
    assert at_batch_end[-2:] == [[0], [0, last]]


# --- what it measures ---


def test_names_are_those_in_the_lightning_module_or_in_the_model(tmp_path: Path) -> None:
    found = []
    for layers in (["net.transformer.h.[01]"], ["transformer.h.[01]"], "net.transformer.h.?", "blocks"):
        callback = tiny_callback(layers=layers)
        tiny_trainer(tmp_path, [callback], steps=1).fit(tiny_module())
        found.append([(point.settings["layers"], point.complexity) for point in callback.trajectory])
    assert found[0][0][0] == ["transformer.h.0", "transformer.h.1"]
    assert found[0] == found[1] == found[2] == found[3]


def test_forward_is_called_with_the_lightning_module(tmp_path: Path) -> None:
    shapes = []

    def forward(module: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        shapes.append((type(module).__name__, tuple(input_ids.shape), tuple(attention_mask.shape), module.training))
        return module.net(input_ids=input_ids, attention_mask=attention_mask)

    callback, module = tiny_callback(forward=forward), tiny_module()
    tiny_trainer(tmp_path, [callback], steps=1).fit(module)
    assert ("TinyModule", (3, LENGTH), (3, LENGTH), False) in shapes
    assert numbers(callback.trajectory[-1]) == measured(module.net, 1)


class Recurrent(torch.nn.Module):
    """No transformers model: embeds, and runs two recurrent layers, each with a dropout behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, 16)
        self.layers = torch.nn.ModuleList(torch.nn.GRU(16, 16, batch_first=True) for _ in range(2))
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(16, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        z = self.embed(tokens)
        for layer in self.layers:
            z = self.drop(layer(z)[0])
        return self.head(z)


class RecurrentModule(lightning.pytorch.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.core = Recurrent()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.core(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(random_ids(16, seed=11), batch_size=4)


def test_a_module_without_a_transformers_model(tmp_path: Path) -> None:
    callback = tiny_callback(layers=["core.layers.*"], forward=lambda m, ids, mask: m.core(ids))
    module = RecurrentModule()
    tiny_trainer(tmp_path, [callback], steps=3).fit(module)
    assert callback.trajectory[-1].layers == ("core.layers.0", "core.layers.1")
    meter = ib.Meter(tiny_probe(), num_bins=12, layers=["layers.*"], forward=lambda m, ids, mask: m(ids))
    expected = meter.measure(module.core, step=3).complexity
    assert callback.trajectory[-1].complexity == pytest.approx(expected, abs=1e-6)

    with pytest.raises(ModelError, match=r"holds no transformers model and has no forward\(\) of its own.*forward="):
        tiny_trainer(tmp_path, [tiny_callback(layers=["core.layers.*"])]).fit(RecurrentModule())
    with pytest.raises(ModelError, match=r"layers: the blocks of RecurrentModule could not be found.*core\.layers\.\*"):
        tiny_trainer(tmp_path, [tiny_callback(forward=lambda m, ids, mask: m.core(ids))]).fit(RecurrentModule())


def test_several_transformers_models(tmp_path: Path) -> None:
    module = tiny_module(teacher=tiny_model(seed=8))
    with pytest.raises(
        ModelError,
        match=r"2 transformers models: net \(GPT2LMHeadModel\), teacher \(GPT2LMHeadModel\).*layers=.*forward=",
    ):
        tiny_trainer(tmp_path, [tiny_callback()]).fit(module)

    callback = tiny_callback(layers=["teacher.transformer.h.[01]"])
    tiny_trainer(tmp_path, [callback], steps=2).fit(module)
    point, meter = callback.trajectory[-1], ib.Meter(tiny_probe(), num_bins=12, batch_size=3, layers="blocks")
    assert numbers(point) == numbers(meter.measure(module.teacher, step=2))
    assert numbers(point) == {**numbers(callback.trajectory[0])}, "a teacher does not learn"

    both = ["net.transformer.h.1", "teacher.transformer.h.1"]

    def run_both(m: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        m.net(input_ids=input_ids, attention_mask=attention_mask)
        m.teacher(input_ids=input_ids, attention_mask=attention_mask)

    callback = tiny_callback(layers=both, forward=run_both)
    tiny_trainer(tmp_path, [callback], steps=2).fit(module)
    assert callback.trajectory[-1].layers == tuple(both)


# --- what others see ---


def csv_rows(directory: Path) -> list[dict[str, str]]:
    with open(directory / "metrics.csv", newline="") as handle:
        return list(csv.DictReader(handle))


def test_every_logger_gets_every_point_once_and_at_its_step(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name="a"), CSVLogger(tmp_path, name="b")]
    callback = tiny_callback(every_n_steps=5)
    tiny_trainer(tmp_path, [callback], steps=12, logger=loggers, log_every_n_steps=3).fit(tiny_module())
    for logger in loggers:
        rows = csv_rows(Path(logger.log_dir))
        logged = {int(row["step"]): row for row in rows if row["ib/complexity"]}
        assert list(logged) == [0, 5, 10, 12]
        assert len([row for row in rows if row["ib/complexity"]]) == 4
        for point in callback.trajectory:
            for name, value in point.metrics().items():
                assert float(logged[point.step][name]) == value
        assert [int(row["step"]) for row in rows if row["loss"]] == [2, 5, 8, 11], "the trainer's own have suffered"
    assert (Path(loggers[0].log_dir) / FILENAME).is_file()


def read_run(tmp_path: Path) -> OfflineRun:
    (run,) = read_offline_runs(tmp_path)
    return run


@pytest.mark.parametrize("opened_by", ["the logger", "the user", "the user, for the logger"])
def test_rows_of_an_offline_run(opened_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    callback = tiny_callback(every_n_steps=5, log_plane=True)
    try:
        wandb.teardown()  # it reads its settings, the directory among them, once a process
        monkeypatch.setenv("WANDB_DIR", str(tmp_path))
        if opened_by != "the logger":
            wandb.init(project="tiny")
        logger = False if opened_by == "the user" else WandbLogger(project="tiny", save_dir=tmp_path)
        tiny_trainer(tmp_path, [callback], steps=12, logger=logger, log_every_n_steps=3).fit(tiny_module())
    finally:
        wandb.finish()
        wandb.teardown()

    run = read_run(tmp_path)
    rows = [row for row in run.rows if any(key.startswith("ib/") for key in row)]
    assert [row["trainer/global_step"] for row in rows] == [0, 5, 10, 12]
    for row, point in zip(rows, callback.trajectory, strict=True):
        scalars = {key: value for key, value in row.items() if key in point.metrics()}
        assert scalars == pytest.approx(point.metrics(), rel=1e-12)
        assert row["ib/plane/_type"] == "image-file"
        with Image.open(run.files / row["ib/plane/path"]) as image:
            assert image.format == "PNG"
            assert image.size == (row["ib/plane/width"], row["ib/plane/height"])
    assert run.step_metrics["ib/*"] == "trainer/global_step"
    own = [row["trainer/global_step"] for row in run.rows if "loss" in row]
    assert own == ([] if opened_by == "the user" else [2, 5, 8, 11])


def test_an_undefined_number_is_nan_and_not_that_of_an_earlier_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = ib.Meter.measure

    def undefined_at_ten(meter: ib.Meter, *args: Any, step: int) -> ib.Measurement:
        point = measure(meter, *args, step=step)
        undefined = {"token": replace(point["token"], optimality=None)}
        return replace(point, orders=undefined) if step == 10 else point

    seen: list[float] = []
    spy = LambdaCallback(on_train_batch_end=lambda t, *args: seen.append(t.callback_metrics["ib/optimality"].item()))
    monkeypatch.setattr(ib.Meter, "measure", undefined_at_ten)
    callback, logger = tiny_callback(orders="token"), CSVLogger(tmp_path)
    trainer = tiny_trainer(tmp_path, [callback, spy], steps=12, logger=logger)
    trainer.fit(tiny_module())
    at = {point.step: point.optimality for point in callback.trajectory}
    assert seen == pytest.approx([at[0]] * 4 + [at[5]] * 5 + [math.nan] * 2 + [at[12]], rel=0, abs=0, nan_ok=True)
    assert "ib/tokens_seen" not in trainer.callback_metrics
    logged = {int(row["step"]): row["ib/optimality"] for row in csv_rows(Path(logger.log_dir)) if row["ib/complexity"]}
    assert [step for step, value in logged.items() if not value] == [10]


def test_a_logger_that_fails_is_a_warning(tmp_path: Path) -> None:
    class Fails(CSVLogger):
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            if "ib/complexity" in metrics and step == 5:
                raise ConnectionError("the service has gone")
            super().log_metrics(metrics, step)

    logger, callback = Fails(tmp_path), tiny_callback()
    trainer = tiny_trainer(tmp_path, [callback], steps=12, logger=logger)
    with pytest.warns(RuntimeWarning, match=r"step 5 could not be logged to Fails.*ConnectionError: the service"):
        trainer.fit(tiny_module())
    assert callback.trajectory.steps == [0, 5, 10, 12]
    assert [int(row["step"]) for row in csv_rows(Path(logger.log_dir)) if row["ib/complexity"]] == [0, 10, 12]


def test_stock_model_checkpoint_keeps_the_best_step(tmp_path: Path) -> None:
    callback = tiny_callback(every_n_steps=2)
    # Listed before: Lightning moves checkpoints to the end.
    checkpoint = ModelCheckpoint(
        tmp_path / "kept",
        monitor="ib/optimality",
        mode="max",
        save_top_k=2,
        every_n_train_steps=2,
        filename="{step}",
        save_on_train_epoch_end=False,
    )
    module = tiny_module()
    tiny_trainer(tmp_path, [checkpoint, callback], steps=12, enable_checkpointing=True).fit(module)
    points = [point for point in callback.trajectory if point.step]
    best = sorted(points, key=lambda point: -point.optimality)[:2]
    assert checkpoint.best_model_score.item() == best[0].optimality
    assert Path(checkpoint.best_model_path).stem == f"step={best[0].step}"
    assert {path.stem for path in (tmp_path / "kept").iterdir()} == {f"step={point.step}" for point in best}
    module.load_state_dict(torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"])
    assert measured(module.net, best[0].step) == numbers(best[0]), "the weights are not those of the point"


def test_stock_early_stopping(tmp_path: Path) -> None:
    """Stops at the second check without a value above the threshold, which no optimality can pass."""
    early = EarlyStopping("ib/optimality", mode="max", patience=2, min_delta=5.0)
    callback = tiny_callback(every_n_steps=2)
    trainer = tiny_trainer(tmp_path, [callback, early], steps=24, limit_val_batches=1, val_check_interval=2)
    trainer.fit(tiny_module())
    assert trainer.global_step == 6
    assert early.best_score.item() == callback.trajectory[1].optimality
    assert callback.trajectory.steps == [0, 2, 4, 6]


# --- resuming ---


def saving(directory: Path, every: int) -> ModelCheckpoint:
    return ModelCheckpoint(directory / "saved", every_n_train_steps=every, save_top_k=-1, filename="{step}")


@pytest.mark.parametrize("logs", [False, True], ids=["one directory", "a directory for each logger version"])
def test_a_resumed_run_continues_the_trajectory(logs: bool, tmp_path: Path) -> None:
    def train(callbacks: list[Callback], ckpt_path: Path | None = None) -> Any:
        logger = CSVLogger(tmp_path) if logs else False
        trainer = tiny_trainer(tmp_path, callbacks, steps=12, logger=logger, enable_checkpointing=True)
        trainer.fit(tiny_module(), ckpt_path=ckpt_path)
        return trainer

    whole, resumed = tiny_callback(every_n_steps=2), tiny_callback(every_n_steps=2)
    train([whole, saving(tmp_path, 5)])
    at_start: dict[str, float] = {}
    spy = LambdaCallback(on_train_start=lambda trainer, module: at_start.update(published(trainer)))
    trainer = train([resumed, spy, saving(tmp_path, 5)], tmp_path / "saved" / "step=5.ckpt")

    assert at_start == whole.trajectory[2].metrics(), "the last values before the checkpoint"
    assert resumed.trajectory.steps == whole.trajectory.steps == [0, 2, 4, 6, 8, 10, 12]
    assert resumed.trajectory[:3] == whole.trajectory[:3]
    assert len(resumed.trajectory.values("complexity")) == 7
    directory = Path(trainer.logger.log_dir) if logs else tmp_path
    assert ib.Trajectory.load(directory) == resumed.trajectory
    if logs:
        assert ib.Trajectory.load(tmp_path / "lightning_logs" / "version_0") == whole.trajectory


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    """At the end of an epoch, from where Lightning itself resumes exactly."""
    arguments = {"steps": -1, "max_epochs": 4, "limit_train_batches": 4, "enable_checkpointing": True}

    class Fixed(type(tiny_module())):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(random_ids(16, seed=11), batch_size=4)

        def on_train_batch_start(self, batch: torch.Tensor, batch_idx: int) -> None:
            torch.manual_seed(self.global_step)  # for the dropout

    whole, resumed = tiny_callback(every_n_steps=3), tiny_callback(every_n_steps=3)
    at_epochs = ModelCheckpoint(
        tmp_path / "saved", every_n_epochs=2, save_top_k=-1, save_on_train_epoch_end=True, filename="{step}"
    )
    tiny_trainer(tmp_path, [whole, at_epochs], **arguments).fit(Fixed())
    tiny_trainer(tmp_path, [resumed], **arguments).fit(Fixed(), ckpt_path=tmp_path / "saved" / "step=8.ckpt")
    assert resumed.trajectory.steps == [0, 3, 6, 9, 12, 15, 16]
    assert list(map(numbers, resumed.trajectory)) == list(map(numbers, whole.trajectory))


def test_values_are_there_on_resume_even_if_the_files_are_lost(tmp_path: Path) -> None:
    whole, resumed = tiny_callback(every_n_steps=2), tiny_callback(every_n_steps=3)
    tiny_trainer(tmp_path, [whole, saving(tmp_path, 4)], steps=4, enable_checkpointing=True).fit(tiny_module())
    (tmp_path / FILENAME).unlink()
    at_start: dict[str, float] = {}
    spy = LambdaCallback(on_train_start=lambda trainer, module: at_start.update(published(trainer)))
    trainer = tiny_trainer(tmp_path, [resumed, spy], steps=6)
    trainer.fit(tiny_module(), ckpt_path=tmp_path / "saved" / "step=4.ckpt")
    assert at_start == whole.trajectory[-1].metrics()
    assert resumed.trajectory.steps == [6]


def test_an_earlier_part_that_cannot_be_found_is_a_warning(tmp_path: Path) -> None:
    first = CSVLogger(tmp_path)
    callbacks = [tiny_callback(every_n_steps=2), saving(tmp_path, 3)]
    tiny_trainer(tmp_path, callbacks, steps=3, logger=first, enable_checkpointing=True).fit(tiny_module())
    (Path(first.log_dir) / FILENAME).unlink()
    resumed = tiny_callback(every_n_steps=2)
    trainer = tiny_trainer(tmp_path, [resumed], steps=6, logger=CSVLogger(tmp_path))
    with pytest.warns(RuntimeWarning, match="earlier part of the trajectory, .*could not be copied.*No such file"):
        trainer.fit(tiny_module(), ckpt_path=tmp_path / "saved" / "step=3.ckpt")
    assert resumed.trajectory.steps == [4, 6]


def test_state_is_progress_in_plain_python_under_a_key_of_its_own(tmp_path: Path) -> None:
    callbacks = [tiny_callback(every_n_steps=2), tiny_callback(output_dir=tmp_path / "other", num_bins=9)]
    assert callbacks[0].state_key != callbacks[1].state_key
    assert all(callback.state_key.startswith("IBCallback{") for callback in callbacks)
    assert callbacks[0].state_dict() == {}
    tiny_trainer(tmp_path, [*callbacks, saving(tmp_path, 3)], steps=4, enable_checkpointing=True).fit(tiny_module())

    states = torch.load(tmp_path / "saved" / "step=3.ckpt", weights_only=True)["callbacks"]
    state = states[callbacks[0].state_key]
    assert json.loads(json.dumps(state)) == state
    point = callbacks[0].trajectory[1]
    assert {name: value for name, value in state["metrics"].items() if value is not None} == point.metrics()
    assert state["directory"] == str(tmp_path)
    assert states[callbacks[1].state_key]["directory"] == str(tmp_path / "other")


def test_with_and_without_the_callback_at_either_end(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, [saving(tmp_path, 3)], steps=3, enable_checkpointing=True).fit(tiny_module())
    callback = tiny_callback(every_n_steps=2)
    trainer = tiny_trainer(tmp_path, [callback, saving(tmp_path, 6)], steps=6, enable_checkpointing=True)
    trainer.fit(tiny_module(), ckpt_path=tmp_path / "saved" / "step=3.ckpt")
    assert callback.trajectory.steps == [4, 6]
    trainer = tiny_trainer(tmp_path, [], steps=8)
    trainer.fit(tiny_module(), ckpt_path=tmp_path / "saved" / "step=6.ckpt")
    assert trainer.global_step == 8


def test_a_second_training_begins_anew_and_keeps_the_old_file(tmp_path: Path) -> None:
    callback = tiny_callback(every_n_steps=2)
    tiny_trainer(tmp_path, [callback], steps=4).fit(tiny_module())
    first = callback.trajectory
    tiny_trainer(tmp_path, [callback], steps=4).fit(tiny_module())
    assert callback.trajectory.steps == first.steps == [0, 2, 4]
    assert list(map(numbers, callback.trajectory)) == list(map(numbers, first))
    assert ib.Trajectory.load(tmp_path / "ib_trajectory.1.jsonl") == first


def test_training_on_with_the_same_trainer_continues(tmp_path: Path) -> None:
    callback, module = tiny_callback(every_n_steps=2), tiny_module()
    trainer = tiny_trainer(tmp_path, [callback], steps=3)
    trainer.fit(module)
    trainer.fit_loop.epoch_loop.max_steps = 6
    trainer.fit(module)
    assert callback.trajectory.steps == [0, 2, 3, 4, 6]
    assert ib.Trajectory.load(tmp_path) == callback.trajectory


# --- mistakes, before training time is spent ---


def test_an_unknown_keyword() -> None:
    with pytest.raises(TypeError, match=r"IBCallback got the unknown keyword num_bin; it takes every_n_steps, "):
        IBCallback(tiny_probe(), num_bin=12)


def test_mistakes_are_raised_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cases = [
        (IBCallback(tiny_probe(vocabulary=4 * VOCABULARY)), ModelError, f"the model's vocabulary of {VOCABULARY}"),
        (tiny_callback(output_dir=tmp_path / "file" / "x"), TrajectoryError, "cannot write to the output directory"),
        (tiny_callback(layers=["net.transformer.block.0"]), ModelError, "no module of TinyModule is called 'net.trans"),
    ]
    for callback, error, message in cases:
        module = tiny_module()
        with pytest.raises(error, match=message):
            tiny_trainer(tmp_path / "run", [callback]).fit(module)
        assert module.losses == []


# --- failures while training runs ---


def test_a_model_that_goes_bad_costs_one_point(tmp_path: Path) -> None:
    kept: dict[str, torch.Tensor] = {}

    def poison(trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == 5:
            kept.update(weights(module))
            with torch.no_grad():
                module.net.transformer.wte.weight.fill_(torch.nan)

    seen: list[dict[str, float]] = []

    def heal(trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == 5:
            seen.append(published(trainer))
            module.load_state_dict(kept)

    callback, logger = tiny_callback(), CSVLogger(tmp_path)
    callbacks = [LambdaCallback(on_train_batch_end=poison), callback, LambdaCallback(on_train_batch_end=heal)]
    trainer = tiny_trainer(tmp_path, callbacks, steps=15, logger=logger)
    with pytest.warns(RuntimeWarning, match="Nothing could be measured at step 5.*RepresentationError"):
        trainer.fit(tiny_module())
    assert trainer.global_step == 15
    assert [point.error is None for point in callback.trajectory] == [True, False, True, True]
    assert seen == [callback.trajectory[0].metrics()], "those of the last point"
    assert [int(row["step"]) for row in csv_rows(Path(logger.log_dir)) if row["ib/complexity"]] == [0, 10, 15]


def test_an_interrupted_run_has_its_last_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ib_callback import plot, recorder

    monkeypatch.setattr(recorder, "_DRAWN_SINGLY", 1)
    monkeypatch.setattr(recorder, "_DRAWN_AGAIN", 100.0)
    drawn: list[list[int | None]] = []
    monkeypatch.setattr(plot, "save_information_plane", lambda trajectory, path: drawn.append(trajectory.steps))

    def interrupt(trainer: Any, *args: Any) -> None:
        if trainer.global_step == 5:
            raise ZeroDivisionError("a bug of the user")

    callbacks = [tiny_callback(every_n_steps=2, log_plane=True), LambdaCallback(on_train_batch_end=interrupt)]
    with pytest.raises(ZeroDivisionError, match="a bug of the user"):
        tiny_trainer(tmp_path, callbacks, steps=9).fit(tiny_module())
    assert drawn == [[0], [0, 2, 4]]
    assert ib.Trajectory.load(tmp_path).steps == [0, 2, 4]


def test_no_warnings_of_our_own_in_a_good_run(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = tiny_callback(every_n_steps=2, log_plane=True)
        tiny_trainer(tmp_path, [callback], steps=4, logger=CSVLogger(tmp_path)).fit(tiny_module())
    assert [str(w.message) for w in caught if "ib_callback" in w.filename] == []


def test_nothing_is_left_on_the_model(tmp_path: Path) -> None:
    module, callback = tiny_module(), tiny_callback()
    before = set(vars(module))
    tiny_trainer(tmp_path, [callback], steps=6).fit(module)
    assert "forward" not in set(vars(module)) - before
    assert not any(len(part._forward_hooks) for part in module.modules())


@pytest.mark.parametrize(
    ("bar", "keyword", "shown"),
    [("TQDMProgressBar", None, True), (None, None, False), ("RichProgressBar", None, False), (None, True, True)],
)
def test_progress_follows_the_trainer_unless_asked_for(
    bar: str | None, keyword: bool | None, shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    measure = ib.Meter.measure

    def spy(meter: ib.Meter, *args: Any, **kwargs: Any) -> ib.Measurement:
        seen.append(meter.progress)
        return measure(meter, *args, **kwargs)

    monkeypatch.setattr(ib.Meter, "measure", spy)
    callbacks: list[Any] = [tiny_callback(**({} if keyword is None else {"progress": keyword}))]
    callbacks += [] if bar is None else [getattr(lightning.pytorch.callbacks, bar)()]
    tiny_trainer(tmp_path, callbacks, steps=1, enable_progress_bar=bar is not None).fit(tiny_module())
    assert seen == [shown, shown]


# --- both packages ---


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda package: package.__name__)
def test_trainers_of_both_packages(package: ModuleType, tmp_path: Path) -> None:
    callback, module = tiny_callback(), tiny_module(package)
    assert isinstance(callback, package.Callback)
    checkpoint = package.callbacks.ModelCheckpoint(tmp_path, monitor="ib/optimality", mode="max", every_n_train_steps=5)
    trainer = tiny_trainer(tmp_path, [callback, checkpoint], package=package, steps=12, enable_checkpointing=True)
    trainer.fit(module)
    assert callback.trajectory.steps == [0, 5, 10, 12]
    assert checkpoint.best_model_score.item() == max(point.optimality for point in callback.trajectory[1:3])
    assert callback.state_key in torch.load(checkpoint.best_model_path, weights_only=True)["callbacks"]

    alone = tiny_callback(output_dir=tmp_path / "alone")
    tiny_trainer(tmp_path, alone, package=package, steps=2).fit(tiny_module(package))
    assert alone.trajectory.steps == [0, 2]
    assert pickle.loads(pickle.dumps(tiny_callback())).state_key == copy.deepcopy(callback).state_key


def in_a_fresh_process(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False, env=environment()
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment(**variables: str) -> dict[str, str]:
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


ONE_PACKAGE = """
import sys
import {first}
from ib_callback.lightning import IBCallback
from ib_callback import Probe
import torch
print([name in sys.modules for name in ("lightning.pytorch", "pytorch_lightning")])
probe = Probe.from_tokens(torch.zeros(1, 20, dtype=torch.long))
early = IBCallback(probe)
import {then} as other
late = IBCallback(probe)
print([isinstance(callback, other.Callback) for callback in (early, late)])
"""


def test_only_the_package_in_use_is_imported() -> None:
    first, then = "pytorch_lightning", "lightning.pytorch"
    assert in_a_fresh_process(ONE_PACKAGE.format(first=first, then=then)).split("\n")[:2] == [
        "[False, True]",
        "[True, True]",
    ]
    assert in_a_fresh_process(ONE_PACKAGE.format(first="torch", then=first)).split("\n")[:2] == [
        "[True, False]",
        "[True, True]",
    ]


NO_PACKAGE = """
import sys
sys.modules.update({"lightning": None, "pytorch_lightning": None})
import importlib.util
importlib.util.find_spec = lambda name, *rest: None
import ib_callback
try:
    import ib_callback.lightning
except ImportError as error:
    print(error)
"""


def test_without_any_package() -> None:
    said = in_a_fresh_process(NO_PACKAGE)
    assert 'ib_callback.lightning needs the package "lightning' in said
    assert 'pip install "ib-callback[lightning]"' in said


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parent.parent / "examples" / "lightning_trainer.py"
    monkeypatch.setattr(sys, "argv", [str(example), "--steps", "11", "--output-dir", str(tmp_path)])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # set by the example; put back by this
    runpy.run_path(str(example), run_name="__main__")
    (directory,) = tmp_path.glob("lightning_logs/*")
    assert ib.Trajectory.load(directory).steps == [0, 10, 11]
    assert f"{directory}/checkpoints/step=10.ckpt" in capsys.readouterr().out


# --- several processes ---

TWO_RANKS = """
import sys
from datetime import timedelta
from pathlib import Path
import torch
from torch.distributed.fsdp import fully_shard
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from tiny_lightning import tiny_callback, tiny_module, tiny_trainer
from ib_callback.errors import TrajectoryError

directory, rank = Path(sys.argv[1]), int(sys.argv[2])
gloo = {"process_group_backend": "gloo", "timeout": timedelta(seconds=60)}


def train(name, callbacks, ckpt_path=None, module=None, **arguments):
    settings = {"strategy": DDPStrategy(**gloo), "logger": CSVLogger(directory, name="log"), **arguments}
    trainer = tiny_trainer(directory, callbacks, steps=5, devices=2, **settings)
    module = tiny_module() if module is None else module
    trainer.fit(module, ckpt_path=ckpt_path)
    assert trainer.world_size == 2
    assert trainer.global_rank == rank
    if callbacks:
        callbacks[0].trajectory.save(directory / f"{name}_{rank}.jsonl")
        metrics = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("ib/") and v == v}
        assert metrics == callbacks[0].trajectory[-1].metrics(), metrics
    return module


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


best = ModelCheckpoint(directory / "saved", monitor="ib/optimality", mode="max", every_n_train_steps=2, save_top_k=-1,
                       filename="{step}")
trained = train("ddp", [tiny_callback(every_n_steps=2), best], enable_checkpointing=True)
assert same(trained, train("without", []))
train("resumed", [tiny_callback(every_n_steps=2)], ckpt_path=directory / "saved" / "step=2.ckpt")

try:
    train("unwritable", [tiny_callback(output_dir=directory / "file" / "below")])
except TrajectoryError as error:
    print(f"rank {rank}: {error}")


class Sharded(type(tiny_module())):
    def __init__(self, whole):
        super().__init__()
        self.whole = whole

    def configure_model(self):
        for block in self.net.transformer.h:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self if self.whole else self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        # Whatever is sharded last has to be called as a whole.
        return self(batch) if self.whole else self.net(input_ids=batch, labels=batch).loss

    def forward(self, batch):
        return self.net(input_ids=batch, labels=batch).loss


for whole in (False, True):
    kept = []
    for callbacks in ([tiny_callback(every_n_steps=2)], []):
        module = train(f"sharded_{whole}", callbacks, module=Sharded(whole), strategy=ModelParallelStrategy(**gloo))
        kept.append([p.to_local().clone() if hasattr(p, "to_local") else p.clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True)), whole
print("done")
"""


def test_two_ranks_measure_the_same_and_one_writes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "file").touch()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(tmp_path), str(rank)],
            env=environment(
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                WORLD_SIZE="2",
                NODE_RANK="0",
                LOCAL_RANK=str(rank),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        output = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(output)

    for run in ("ddp", "resumed", "sharded_False", "sharded_True"):
        first, second = (ib.Trajectory.load(tmp_path / f"{run}_{rank}.jsonl") for rank in range(2))
        assert first.steps == second.steps == [0, 2, 4, 5], run
        assert list(map(numbers, first)) == list(map(numbers, second)), run
        assert all(point.error is None for point in first), run
        assert numbers(first[0]) == pytest.approx(measured(tiny_module().net, 0), abs=1e-6), run
    assert ib.Trajectory.load(tmp_path / "log" / "version_0") == ib.Trajectory.load(tmp_path / "ddp_0.jsonl")
    written = sorted(path.parent.name for path in tmp_path.glob(f"log/*/{FILENAME}"))
    assert "version_0" in written
    for rank, text in enumerate(output):
        assert f"rank {rank}: " in text
        assert "cannot write to the output directory" in text
