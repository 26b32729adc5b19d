from __future__ import annotations

import copy
import pickle
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from scripted import COURSE, follow
from synthetic_runs import failed
from tiny_hf import measured, numbers, random_states, same_weights, weights
from tiny_lightning import (
    BATCH,
    ROWS,
    csv_rows,
    environment,
    published,
    saving,
    tiny_callback,
    tiny_module,
    tiny_trainer,
)
from two_ranks import on_ranks

import ib_callback as ib

# --- training is not disturbed ---


@pytest.mark.parametrize(
    "arguments",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"accumulate_grad_batches": 2, "limit_val_batches": 1, "val_check_interval": 4},
        {"compile": "whole", "accumulate_grad_batches": 2},
        {"compile": "inner", "precision": "bf16-mixed"},
    ],
    ids=lambda arguments: ",".join(f"{name}={value}" for name, value in arguments.items()),
)
def test_training_is_bitwise_the_same_with_and_without(arguments: dict[str, Any], tmp_path: Path) -> None:
    arguments = dict(arguments)
    compiled = arguments.pop("compile", None)
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

    callback = tiny_callback(every_n_steps=5)
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


def test_steps_are_those_of_the_optimizer_and_points_are_published(tmp_path: Path) -> None:
    callback, module = tiny_callback(every_n_steps=5), tiny_module()
    trainer = tiny_trainer(tmp_path, [callback], steps=12, accumulate_grad_batches=2)
    trainer.fit(module)
    assert len(module.losses) == 24
    assert callback.trajectory.steps == [0, 5, 10, 12]
    assert published(trainer) == callback.trajectory[-1].metrics()
    assert numbers(callback.trajectory[-1]) == measured(module.net, 12)
    # Two batches a step; the mean since the point before.
    means = [statistics.fmean(module.losses[first:last]) for first, last in ((0, 10), (10, 20), (20, 24))]
    assert callback.trajectory[0].train_loss is None
    assert [point.train_loss for point in callback.trajectory[1:]] == pytest.approx(means, rel=1e-6)


def test_a_point_is_that_of_its_step_and_not_of_a_later_micro_batch(tmp_path: Path) -> None:
    module = tiny_module()
    asked: list[tuple[int, int]] = []

    def schedule(step: int) -> bool:
        asked.append((step, len(module.losses)))
        return step == 2

    callback = tiny_callback(every_n_steps=schedule)
    tiny_trainer(tmp_path, [callback], steps=4, accumulate_grad_batches=3).fit(module)
    assert callback.trajectory.steps == [0, 2, 4]
    assert asked[0] == (0, 0), "where a mistake in it would show"
    in_training = [(step, batches) for step, batches in asked if batches]
    assert in_training == [(1, 3), (2, 6), (3, 9), (4, 12)], "once for every step"


def test_a_trial_run_writes_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    rules = {"early_stopping": ib.PlateauStopping(), "select": "optimality", "log_plane": True}
    callback, module = tiny_callback(**rules), tiny_module()
    loggers = CSVLogger(tmp_path)
    callbacks = [callback, saving(tmp_path, 1)]
    tiny_trainer(tmp_path, callbacks, logger=loggers, enable_checkpointing=True, fast_dev_run=2).fit(module)
    assert len(module.losses) == 2
    assert callback.trajectory.steps == [0, 2]
    assert list(tmp_path.rglob("*")) == []
    assert [str(w.message) for w in recwarn if "ib_callback" in w.filename] == []


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


# --- failures while training runs ---


def test_where_nothing_could_be_measured_the_last_point_stays_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch, ib.Trajectory(failed(5) if point.step == 5 else point for point in COURSE))
    seen: list[dict[str, float]] = []
    spy = LambdaCallback(on_train_batch_end=lambda trainer, *args: seen.append(published(trainer)))
    callback, logger = tiny_callback(orders="token"), CSVLogger(tmp_path)
    with pytest.warns(RuntimeWarning, match="Nothing could be measured at step 5"):
        tiny_trainer(tmp_path, [callback, spy], steps=15, logger=logger).fit(tiny_module())
    points = callback.trajectory
    assert [point.error is None for point in points] == [True, False, True, True]
    assert [seen[step - 1] for step in (5, 10, 15)] == [points[index].metrics() for index in (0, 2, 3)]
    assert [int(row["step"]) for row in csv_rows(Path(logger.log_dir)) if row["ib/complexity"]] == [0, 10, 15]


def test_an_interrupted_run_has_its_last_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ib_callback import plot
    from ib_callback.run import run as run_module

    monkeypatch.setattr(run_module, "_DRAWN_SINGLY", 1)
    monkeypatch.setattr(run_module, "_DRAWN_AGAIN", 100.0)
    drawn: list[list[int | None]] = []
    monkeypatch.setattr(plot, "save_information_plane", lambda trajectory, path, **_: drawn.append(trajectory.steps))

    def interrupt(trainer: Any, *args: Any) -> None:
        if trainer.global_step == 5:
            raise ZeroDivisionError("a bug of the user")

    callbacks = [tiny_callback(every_n_steps=2, log_plane=True), LambdaCallback(on_train_batch_end=interrupt)]
    with pytest.raises(ZeroDivisionError, match="a bug of the user"):
        tiny_trainer(tmp_path, callbacks, steps=9).fit(tiny_module())
    assert drawn == [[0], [0, 2, 4]]
    assert ib.Trajectory.load(tmp_path).steps == [0, 2, 4]


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


ONE_PACKAGE = """
import copy, pickle, sys
import {first}
from ib_callback.lightning import IBCallback
from ib_callback import Probe
import torch
print([name in sys.modules for name in ("lightning.pytorch", "pytorch_lightning")])
probe = Probe.from_tokens(torch.zeros(1, 20, dtype=torch.long))
import {first} as one, {then} as other
callback = IBCallback(probe)
copies = [copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))]
print([isinstance(each, kind) for each in (callback, *copies) for kind in (IBCallback, other.Callback)])
print({{type(each) for each in copies}} == {{type(callback)}}, callback.state_key == copies[0].state_key)
"""


@pytest.mark.parametrize(
    ("first", "then", "imported"),
    [
        ("pytorch_lightning", "lightning.pytorch", [False, True]),
        ("torch", "pytorch_lightning", [True, False]),
    ],
)
def test_only_the_package_in_use_is_imported(first: str, then: str, imported: list[bool], tmp_path: Path) -> None:
    # Of a process that has imported torch, and neither of the two.
    (said,) = on_ranks(1, ONE_PACKAGE.format(first=first, then=then), tmp_path)
    lines = [line for line in said.splitlines() if line.startswith(("[True", "[False", "True", "False"))]
    assert lines == [str(imported), str([True] * 6), "True True"]


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
