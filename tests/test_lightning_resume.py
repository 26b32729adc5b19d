from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny_hf import random_ids
from tiny_lightning import numbers, published, saving, tiny_callback, tiny_module, tiny_trainer

import ib_callback as ib
from ib_callback.trajectory_lines import FILENAME


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
    expected = whole.trajectory[-1].metrics()
    timings = ("ib/seconds", "ib/overhead")
    assert {name: at_start[name] for name in expected if name not in timings} == numbers(whole.trajectory[-1])
    assert resumed.trajectory.steps == [4, 6]


def test_an_earlier_part_that_cannot_be_found_is_a_warning(tmp_path: Path) -> None:
    first = CSVLogger(tmp_path)
    callbacks = [tiny_callback(every_n_steps=2), saving(tmp_path, 3)]
    tiny_trainer(tmp_path, callbacks, steps=3, logger=first, enable_checkpointing=True).fit(tiny_module())
    (Path(first.log_dir) / FILENAME).unlink()
    resumed = tiny_callback(every_n_steps=2)
    trainer = tiny_trainer(tmp_path, [resumed], steps=6, logger=CSVLogger(tmp_path))
    with pytest.warns(
        RuntimeWarning, match="earlier part of the trajectory, .*could not be taken over, and a new one begins"
    ):
        trainer.fit(tiny_module(), ckpt_path=tmp_path / "saved" / "step=3.ckpt")
    assert resumed.trajectory.steps == [3, 4, 6]


def test_state_is_progress_in_plain_python_under_a_key_of_its_own(tmp_path: Path) -> None:
    callbacks = [tiny_callback(every_n_steps=2), tiny_callback(output_dir=tmp_path / "other", num_bins=9)]
    assert callbacks[0].state_key != callbacks[1].state_key
    assert all(callback.state_key.startswith("IBCallback{") for callback in callbacks)
    assert callbacks[0].state_dict() == {}
    tiny_trainer(tmp_path, [*callbacks, saving(tmp_path, 3)], steps=4, enable_checkpointing=True).fit(tiny_module())

    states = torch.load(tmp_path / "saved" / "step=3.ckpt", weights_only=True)["callbacks"]
    state = states[callbacks[0].state_key]
    assert json.loads(json.dumps(state)) == state
    assert state["last_step"] == 2
    assert state["directory"] == str(tmp_path)
    assert states[callbacks[1].state_key]["directory"] == str(tmp_path / "other")


def test_with_and_without_the_callback_at_either_end(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, [saving(tmp_path, 3)], steps=3, enable_checkpointing=True).fit(tiny_module())
    callback = tiny_callback(every_n_steps=2)
    trainer = tiny_trainer(tmp_path, [callback, saving(tmp_path, 6)], steps=6, enable_checkpointing=True)
    trainer.fit(tiny_module(), ckpt_path=tmp_path / "saved" / "step=3.ckpt")
    assert callback.trajectory.steps == [3, 4, 6]
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
