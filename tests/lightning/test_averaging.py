"""What is ranked is what a checkpoint's file holds: averages of weights, by Lightning's callbacks or one's own."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LambdaCallback,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from tiny_hf import numbers, same_weights, tiny_model, weights
from tiny_lightning import csv_rows, saving, tiny_callback, tiny_module, tiny_trainer

import ib_callback as ib
from ib_callback.lightning._averaging import fingerprints
from ib_callback.lightning._averaging import same_weights as same_bits
from ib_callback.results.measurement import settings_differences

# Always at a checkpoint; the entropy rises all along, so that the latest is the best one.
SELECT = ib.Selection("entropy", mode="max", select_from=0, guard=None)


class ByEpoch(WeightAveraging):
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None


class Counting(WeightAveraging):
    """At every third question."""

    asked = 0

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        self.asked += 1
        return self.asked % 3 == 0


AVERAGING = {
    "every step": lambda: EMAWeightAveraging(decay=0.7),
    "every second step, from the fourth on": lambda: EMAWeightAveraging(
        decay=0.5, update_every_n_steps=2, update_starting_at_step=4
    ),
    "every epoch": ByEpoch,
    "every third time that it is asked": Counting,
    "stochastic": lambda: StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1),
}


def train(directory: Path, callbacks: list[Callback], module: Any = None, **arguments: Any) -> Any:
    """Two epochs of six steps."""
    trainer = tiny_trainer(
        directory,
        callbacks,
        steps=arguments.pop("max_steps", -1),
        max_epochs=2,
        limit_train_batches=6,
        enable_checkpointing=True,
        **arguments,
    )
    torch.manual_seed(5)
    trainer.fit(module or tiny_module())
    return trainer


def held(path: Path) -> dict[str, float]:
    """What is measured of the weights in a checkpoint."""
    model = tiny_model(seed=99)
    state = torch.load(path, weights_only=False)["state_dict"]
    model.load_state_dict({name[4:]: value for name, value in state.items() if name.startswith("net.")})
    return numbers(tiny_callback()._run.meter.measure(model))


def recorded(directory: Path) -> dict[int, Path]:
    lines = map(json.loads, (directory / "ib_checkpoints.jsonl").read_text().splitlines())
    return {line["step"]: directory / line["path"] for line in lines}


@pytest.mark.parametrize("first", [True, False], ids=["before it in the list", "after it"])
@pytest.mark.parametrize("kind", AVERAGING)
def test_every_value_is_that_of_the_weights_in_the_file(kind: str, first: bool, tmp_path: Path) -> None:
    callback = tiny_callback(every_n_steps=2, select=SELECT)
    callbacks = [callback, AVERAGING[kind]()]
    trainer = train(tmp_path, [*(callbacks if first else callbacks[::-1]), saving(tmp_path, 3)])
    points = {point.step: numbers(point) for point in callback.trajectory}
    files = recorded(tmp_path)
    assert set(points) == {0, 2, 3, 4, 6, 8, 9, 10, 12}
    assert set(files) == {3, 6, 9, 12}
    assert all(points[step] == held(path) for step, path in files.items())
    assert callback.selected.path == files[callback.selected.step]
    # The model that is left is the average, of which there is no other point.
    left = numbers(callback._run.meter.measure(trainer.lightning_module.net))
    assert left == (points[12] if callback.final is None else numbers(callback.final))
    assert (callback.final is None) == (left == points[12])


def test_a_training_that_ends_early_ends_with_its_own_last_point(tmp_path: Path) -> None:
    stop = EarlyStopping("loss", patience=1, mode="max", check_on_train_epoch_end=True)
    callback = tiny_callback(every_n_steps=5)
    trainer = tiny_trainer(tmp_path, [callback, stop, EMAWeightAveraging(decay=0.7)], steps=-1, max_epochs=9)
    trainer.fit(tiny_module())
    assert trainer.global_step < 9 * 12
    assert callback.trajectory.steps[-1] == trainer.global_step
    assert numbers(callback.trajectory[-1]) == numbers(callback._run.meter.measure(trainer.lightning_module.net))


@pytest.mark.parametrize("ends_by", ["max_steps", "should_stop"])
def test_an_average_that_changes_when_an_epoch_ends_early_is_measured_then(ends_by: str, tmp_path: Path) -> None:
    def stop(trainer: Any, *_: Any) -> None:
        trainer.should_stop |= ends_by == "should_stop" and trainer.global_step == 8

    callback = tiny_callback(every_n_steps=2, select=SELECT)
    saves = saving(tmp_path, 0, every_n_epochs=1)
    steps = {"max_steps": 8} if ends_by == "max_steps" else {}
    trainer = train(tmp_path, [LambdaCallback(on_train_batch_end=stop), callback, ByEpoch(), saves], **steps)
    assert trainer.global_step == 8
    files, points = recorded(tmp_path), {point.step: numbers(point) for point in callback.trajectory}
    assert set(files) == set(callback._run._state.checkpoints.existing()) == {6, 8}
    assert all(points[step] == held(path) for step, path in files.items())
    assert callback.final is None


def test_the_average_in_the_end_is_no_point_of_the_training_though_steps_go_on(tmp_path: Path) -> None:
    """With batch norm, stochastic averaging takes one more epoch, of one step, for its statistics."""
    callback = tiny_callback(every_n_steps=5, select=SELECT)
    module = tiny_module(norm=torch.nn.BatchNorm1d(2))
    averaging = StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1)
    trainer = train(tmp_path, [callback, averaging, saving(tmp_path, 0, every_n_epochs=1)], module=module)
    assert trainer.global_step == 13
    assert callback.trajectory.steps == [0, 5, 6, 10, 12]
    assert numbers(callback.trajectory[-1]) == held(recorded(tmp_path)[12])
    assert numbers(callback.final) == numbers(callback._run.meter.measure(module.net)) == held(recorded(tmp_path)[13])
    assert callback.selected.step == 12


@pytest.mark.parametrize("kind", ["WeightAveraging", "StochasticWeightAveraging"])
def test_a_callback_of_ones_own_may_have_any_name(kind: str, tmp_path: Path) -> None:
    callback = tiny_callback(every_n_steps=6, select=SELECT)
    train(tmp_path, [type(kind, (Callback,), {})(), callback, saving(tmp_path, 6)])
    assert callback.selected.step == 12


def test_buffers_that_come_after_the_average_are_in_nobodys_way(tmp_path: Path) -> None:
    def add(trainer: Any, module: Any) -> None:
        module.register_buffer("extra", torch.zeros(3), persistent=False)

    callback = tiny_callback(every_n_steps=6, select=SELECT)
    train(tmp_path, [EMAWeightAveraging(decay=0.7), LambdaCallback(on_fit_start=add), callback, saving(tmp_path, 6)])
    points, files = {point.step: numbers(point) for point in callback.trajectory}, recorded(tmp_path)
    assert {step: points[step] for step in files} == {step: held(path) for step, path in files.items()}
    assert set(files) == {6, 12}


def test_a_signal_may_save_in_the_middle_of_a_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SLURM's before the time is over: the file is that of the same step without a measurement."""

    def last(directory: Path, callbacks: list[Callback]) -> Any:
        train(directory, [*callbacks, EMAWeightAveraging(decay=0.7), saving(directory, 6)], max_steps=6)
        return torch.load(directory / "saved" / "step=6.ckpt", weights_only=False)

    callback = tiny_callback(every_n_steps=6, select=SELECT)
    measure, path = callback._run.meter.measure, tmp_path / "hpc_ckpt_1.ckpt"

    def interrupted(model: torch.nn.Module, *, step: int) -> Any:
        def interrupt(*_: Any) -> None:
            if step == 6 and not path.exists():
                os.kill(os.getpid(), signal.SIGUSR1)

        with model.transformer.h[0].register_forward_hook(interrupt):
            return measure(model, step=step)

    def save(*_: Any) -> None:
        callback._saving._trainer.save_checkpoint(path)

    monkeypatch.setattr(callback._run.meter, "measure", interrupted)
    before = signal.signal(signal.SIGUSR1, save)
    try:
        last(tmp_path, [callback])
    finally:
        signal.signal(signal.SIGUSR1, before)
    alone, saved = last(tmp_path / "alone", []), torch.load(path, weights_only=False)
    for name in ("state_dict", "current_model_state"):
        assert same_weights(alone[name], saved[name])
    assert [point.error for point in callback.trajectory] == [None, None]
    assert numbers(callback.trajectory[-1]) == held(path)
    assert callback._run._state.checkpoints.holds(6, path)


@pytest.mark.parametrize("kind", AVERAGING)
def test_neither_the_training_nor_the_average_notices(kind: str, tmp_path: Path) -> None:
    def last(directory: Path, callbacks: list[Callback]) -> tuple[Any, Any]:
        trainer = train(directory, [*callbacks, AVERAGING[kind](), saving(directory, 12)])
        saved = torch.load(directory / "saved" / "step=12.ckpt", weights_only=False)
        return saved, weights(trainer.lightning_module)

    alone, followed = last(tmp_path / "alone", []), last(tmp_path / "followed", [tiny_callback(every_n_steps=1)])
    assert same_weights(alone[1], followed[1])
    for name in ("state_dict", "current_model_state", "averaging_state"):
        assert (name in alone[0]) == (name in followed[0])
        assert same_weights(alone[0].get(name, {}), followed[0].get(name, {}))


def test_the_current_weights_can_be_measured_instead(tmp_path: Path) -> None:
    plain = tiny_callback(every_n_steps=4)
    train(tmp_path / "plain", [plain])
    current, saved = (tiny_callback(every_n_steps=4, weights=which) for which in ("current", "saved"))
    for name, callback in (("current", current), ("saved", saved)):
        train(tmp_path / name, [callback, EMAWeightAveraging(decay=0.7)])
    assert list(map(numbers, current.trajectory)) == list(map(numbers, plain.trajectory))
    assert current.final is not None
    assert numbers(current.final) == numbers(saved.trajectory[-1])
    assert "weights" not in current.trajectory[-1].settings
    assert saved.trajectory[-1].settings["weights"] == "saved"
    # Nor are they mixed when such a run is resumed.
    differences = settings_differences(current.trajectory[0], saved.trajectory[0])
    assert differences == ['weights: absent vs "saved"']


def test_the_current_weights_select_no_file_that_holds_others(tmp_path: Path) -> None:
    callbacks = [tiny_callback(weights="current", select=SELECT), EMAWeightAveraging(), saving(tmp_path, 3)]
    with pytest.raises(ValueError, match=r'weights="current".*checkpoints hold the average.*weights="saved"'):
        train(tmp_path, callbacks)
    with pytest.raises(ValueError, match=r'weights: expected "saved" or "current", got \'last\''):
        tiny_callback(weights="last")


def test_a_shard_is_not_compared_with_the_whole_weight() -> None:
    shard = torch.nn.Parameter(torch.ones(2))
    shard._fsdp_flattened = True  # type: ignore[attr-defined]  # as FSDP marks what it has cut up
    module, whole = fingerprints({"a": shard, "b": torch.zeros(4)}), {"a": torch.ones(4), "b": torch.zeros(4)}
    assert same_bits(module, fingerprints(whole))
    assert not same_bits(module, fingerprints({**whole, "b": torch.ones(4)}))


@pytest.mark.parametrize("same_file", [False, True])
def test_a_file_with_weights_that_were_not_measured_is_not_selected(same_file: bool, tmp_path: Path) -> None:
    """Whoever puts them there; and what lay at that path before is not there any longer."""

    def halve(trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.global_step > 6:
            checkpoint["state_dict"] = {name: value / 2 for name, value in checkpoint["state_dict"].items()}

    callback = tiny_callback(every_n_steps=2, select=SELECT)
    name = {"filename": "one", "save_top_k": 1, "enable_version_counter": False} if same_file else {}
    with pytest.warns(RuntimeWarning, match="cannot be selected: it holds other weights than those measured at step 9"):
        train(tmp_path, [callback, LambdaCallback(on_save_checkpoint=halve), saving(tmp_path, 3, **name)])
    best = callback.selected
    assert best.step in (3, 6)
    point = next(point for point in callback.trajectory if point.step == best.step)
    assert numbers(point) == held(best.path)


@pytest.mark.parametrize("averaging", [[], [EMAWeightAveraging(decay=0.7)]], ids=["", "average"])
def test_nor_one_that_is_saved_on_an_error_between_two_steps(averaging: list[Callback], tmp_path: Path) -> None:
    def fail(trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step == 7:
            with torch.no_grad():  # the optimizer was half-way
                for model in (module, *(callback._average_model for callback in averaging)):
                    next(model.parameters()).add_(1.0)
            raise KeyError

    callback = tiny_callback(every_n_steps=1, select=SELECT)
    failing = LambdaCallback(on_before_optimizer_step=fail)
    callbacks = [callback, failing, *averaging, saving(tmp_path, 3, save_on_exception=True)]
    with pytest.warns(RuntimeWarning, match="other weights than those measured at step 7"), pytest.raises(KeyError):
        train(tmp_path, callbacks)
    existing = callback._run._state.checkpoints.existing()
    assert (set(existing), set(recorded(tmp_path))) == ({3, 6}, {3, 6, 7})
    assert callback.selected.step in existing


def test_nor_when_it_is_resumed_from(tmp_path: Path) -> None:
    def halve(trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: value / 2 for name, value in checkpoint["state_dict"].items()}

    first, second = (tiny_callback(every_n_steps=2, select=SELECT) for _ in range(2))
    with pytest.warns(RuntimeWarning, match="holds other weights"):
        train(tmp_path, [first, LambdaCallback(on_save_checkpoint=halve), saving(tmp_path, 6)], max_steps=6)
    trainer = tiny_trainer(tmp_path, [second, saving(tmp_path, 4)], steps=8, enable_checkpointing=True)
    trainer.fit(tiny_module(), ckpt_path=tmp_path / "saved" / "step=6.ckpt", weights_only=False)
    assert first.selected is None
    assert second.selected.step == 8


def test_the_model_that_training_leaves_is_measured_if_it_is_another_one(tmp_path: Path) -> None:
    callback, logger = tiny_callback(every_n_steps=4), CSVLogger(tmp_path, name="", version="")
    callbacks = [callback, StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1)]
    trainer = train(tmp_path, callbacks, logger=logger)
    left = numbers(callback._run.meter.measure(trainer.lightning_module.net))
    assert numbers(callback.final) == left != numbers(callback.trajectory[-1])
    (read,) = ib.Trajectory.load(tmp_path / "ib_final.jsonl")
    assert read == callback.final
    assert read.settings["weights"] == "final"
    rows = [row for row in csv_rows(tmp_path) if row.get("ib/final/optimality")]
    assert [float(row["ib/final/optimality"]) for row in rows] == [callback.final.optimality]
    # Of a run that comes after it in that directory there is none yet.
    tiny_trainer(tmp_path, [tiny_callback(output_dir=tmp_path)], steps=1).fit(tiny_module())
    assert not (tmp_path / "ib_final.jsonl").exists()
