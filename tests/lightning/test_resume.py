from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from scripted import COURSE, follow
from synthetic_runs import STOPPING, measured
from tiny_hf import numbers, random_ids
from tiny_lightning import published, saving, tiny_callback, tiny_module, tiny_trainer

import ib_callback as ib
from ib_callback.results.trajectory import FILENAME
from ib_callback.run.checkpoints import FILENAME as CHECKPOINTS
from ib_callback.run.checkpoints import CheckpointFile


def test_a_resumed_run_continues_the_trajectory_in_the_directory_of_a_new_version(tmp_path: Path) -> None:
    def train(callbacks: list[Callback], ckpt_path: Path | None = None) -> Any:
        trainer = tiny_trainer(tmp_path, callbacks, steps=12, logger=CSVLogger(tmp_path), enable_checkpointing=True)
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
    assert ib.Trajectory.load(Path(trainer.logger.log_dir)) == resumed.trajectory
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
    with pytest.warns(RuntimeWarning, match="measured up to step .* has none of them"):
        trainer.fit(tiny_module(), ckpt_path=tmp_path / "saved" / "step=4.ckpt")
    assert at_start == resumed.trajectory[0].metrics()
    assert numbers(resumed.trajectory[0]) == numbers(whole.trajectory[-1]), "measured where it resumes"
    assert resumed.trajectory.steps == [4, 6]


def test_an_earlier_part_that_cannot_be_found_is_a_warning(tmp_path: Path) -> None:
    first = CSVLogger(tmp_path)
    callbacks = [tiny_callback(every_n_steps=2), saving(tmp_path, 3)]
    tiny_trainer(tmp_path, callbacks, steps=3, logger=first, enable_checkpointing=True).fit(tiny_module())
    (Path(first.log_dir) / FILENAME).unlink()
    resumed = tiny_callback(every_n_steps=2)
    trainer = tiny_trainer(tmp_path, [resumed], steps=6, logger=CSVLogger(tmp_path))
    with pytest.warns(RuntimeWarning, match="measured up to step .* has none of them"):
        trainer.fit(tiny_module(), ckpt_path=tmp_path / "saved" / "step=3.ckpt")
    assert resumed.trajectory.steps == [3, 4, 6]


def test_state_is_progress_in_plain_python_under_a_key_of_its_own(tmp_path: Path) -> None:
    callbacks = [tiny_callback(every_n_steps=2), tiny_callback(prefix="b/", output_dir=tmp_path / "other", num_bins=9)]
    assert callbacks[0].state_key != callbacks[1].state_key
    assert all(callback.state_key.startswith("IBCallback{") for callback in callbacks)
    assert callbacks[0].state_dict() == {}
    tiny_trainer(tmp_path, [*callbacks, saving(tmp_path, 3)], steps=4, enable_checkpointing=True).fit(tiny_module())

    states = torch.load(tmp_path / "saved" / "step=3.ckpt", weights_only=True)["callbacks"]
    state = states[callbacks[0].state_key]
    assert json.loads(json.dumps(state)) == state
    assert state.pop("losses")[1] == 1, "of the training, since the point of step 2"
    last = callbacks[0].trajectory[1]
    identity = [last.entropy, last.complexity, last.expressivity]
    assert state == {"directory": str(tmp_path), "last_step": 2, "last_point": identity, "withheld": []}
    assert states[callbacks[1].state_key]["directory"] == str(tmp_path / "other")


def test_with_then_without_and_then_with_it_again(tmp_path: Path) -> None:
    """Nothing tells these points from another run's: they are kept, and it is said."""
    taken = pytest.warns(RuntimeWarning, match=r"knows nothing of this callback\. The points up to step 4 in ")
    for steps, callbacks in ((4, [tiny_callback(every_n_steps=2)]), (8, []), (12, [tiny_callback(every_n_steps=2)])):
        before = tmp_path / "saved" / f"step={steps - 4}.ckpt"
        trainer = tiny_trainer(tmp_path, [*callbacks, saving(tmp_path, 4)], steps=steps, enable_checkpointing=True)
        with taken if steps == 12 else nullcontext():
            trainer.fit(tiny_module(), ckpt_path=before if before.exists() else None)
    assert callbacks[0].trajectory.steps == [0, 2, 4, 8, 10, 12]
    assert ib.Trajectory.load(tmp_path) == callbacks[0].trajectory
    existing = CheckpointFile(tmp_path).existing()
    assert sorted(existing) == [4, 8, 12], "the one that it was resumed from is known"


def test_a_test_of_a_checkpoint_in_between_changes_nothing(tmp_path: Path) -> None:
    module, callback = tiny_module(), tiny_callback(every_n_steps=2)
    module.test_step = module.validation_step
    trainer = tiny_trainer(tmp_path, [callback, saving(tmp_path, 2)], steps=6, enable_checkpointing=True)
    trainer.fit(module)
    trainer.test(module, module.val_dataloader(), ckpt_path=tmp_path / "saved" / "step=2.ckpt", verbose=False)
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(module)
    assert callback.trajectory.steps == [0, 2, 4, 6, 8]


def test_training_on_with_the_same_trainer_continues(tmp_path: Path) -> None:
    callback, module = tiny_callback(every_n_steps=2), tiny_module()
    trainer = tiny_trainer(tmp_path, [callback], steps=3)
    trainer.fit(module)
    trainer.fit_loop.epoch_loop.max_steps = 6
    trainer.fit(module)
    assert callback.trajectory.steps == [0, 2, 3, 4, 6]
    assert ib.Trajectory.load(tmp_path) == callback.trajectory


# --- stopping and selection ---


class Interrupted(Exception):
    pass


@dataclass
class Part:
    """A part of a run that stops and selects, up to the step `until` if it is interrupted there."""

    directory: Path
    until: int | None = None
    resumed_from: Path | None = None
    logs: bool = False
    every: int = 1
    stops: bool = True
    saves: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def interrupt(trainer: Any, *args: Any) -> None:
            if trainer.global_step == self.until:
                raise Interrupted("at the step asked for")

        rule = ib.PlateauStopping(**STOPPING) if self.stops else None
        self.callback = tiny_callback(
            every_n_steps=self.every, orders="token", early_stopping=rule, select="optimality"
        )
        # Where Lightning itself puts them: in the directory of the logger's version, or in the one of the run.
        stock = ModelCheckpoint(**{"every_n_train_steps": 2, "filename": "{step}", **self.saves})
        callbacks = [self.callback, LambdaCallback(on_train_batch_start=interrupt), stock]
        logger = CSVLogger(self.directory) if self.logs else False
        self.trainer = tiny_trainer(self.directory, callbacks, steps=30, logger=logger, enable_checkpointing=True)
        self.module = tiny_module()
        with nullcontext() if self.until is None else pytest.raises(Interrupted, match="at the step"):
            self.trainer.fit(self.module, ckpt_path=self.resumed_from)

    @property
    def run_directory(self) -> Path:
        return Path(self.trainer.logger.log_dir) if self.logs else self.directory

    def checkpoints(self) -> list[str]:
        """Names of those on the disk, by step."""
        names = [path.name for path in (self.run_directory / "checkpoints").iterdir()]
        return sorted(names, key=lambda name: int(name.removeprefix("step=").removesuffix(".ckpt")))

    @property
    def last_checkpoint(self) -> Path:
        return self.run_directory / "checkpoints" / self.checkpoints()[-1]

    def ending(self) -> tuple[Any, ...]:
        """All in which an interrupted run must equal one that is not."""
        selected = self.callback.selected
        points = [(point.step, numbers(point)) for point in self.callback.trajectory]
        assert ib.Trajectory.load(self.run_directory) == self.callback.trajectory
        return points, self.callback.decision, selected.step, selected.value, selected.path.name


def test_a_run_resumed_in_directories_of_new_versions_stops_and_selects_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    whole = Part(tmp_path / "whole", logs=True)
    assert (whole.trainer.global_step, whole.callback.selected.step) == (23, 20)
    for until in ((3,), (13,), (17, 19), (22,), (5, 9, 11, 21)):
        directory, resumed_from = tmp_path / str(until), None
        for step in until:
            part = Part(directory, until=step, resumed_from=resumed_from, logs=True)
            resumed_from = part.last_checkpoint
        last = Part(directory, resumed_from=resumed_from, logs=True)
        assert last.ending() == whole.ending(), until
        assert last.callback.selected.path.is_file()


@pytest.mark.parametrize("until", [23, 25])
def test_what_was_withheld_by_an_interrupted_run_is_removed_by_the_resumed_one(
    until: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 20 is withheld just after the checkpoint of step 22 was written, and 26 is better."""
    follow(monkeypatch, ib.Trajectory(measured(26, 0.25, 0.24) if point.step == 26 else point for point in COURSE))
    first = Part(tmp_path, until=until, stops=False)
    names = [f"step={step}.ckpt" for step in (20, until - 1, 26, 30)]
    assert first.checkpoints() == names[:2]
    resumed = Part(tmp_path, resumed_from=first.last_checkpoint, stops=False)
    assert resumed.checkpoints() == names[1:], "Lightning removes none that it has resumed from"


@pytest.mark.parametrize("version", ["this version", "an earlier version"])
def test_a_copy_of_a_run_that_is_resumed_leaves_the_original_as_it_is(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier version kept absolute paths in the checkpoint, which name files of the original."""
    follow(monkeypatch, ib.Trajectory(measured(26, 0.25, 0.24) if point.step == 26 else point for point in COURSE))
    original = Part(tmp_path / "original", until=25, stops=False)
    assert original.checkpoints() == ["step=20.ckpt", "step=24.ckpt"]
    content = torch.load(original.last_checkpoint, weights_only=True)
    state = content["callbacks"][original.callback.state_key]
    assert state["withheld"] == ["checkpoints/step=20.ckpt"]
    if version == "an earlier version":
        state["withheld"] = [str(tmp_path / "original" / "checkpoints" / "step=20.ckpt")]
        del state["best"]
        torch.save(content, original.last_checkpoint)
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    before = {path: path.read_bytes() for path in (tmp_path / "original").rglob("*") if path.is_file()}
    says_so = pytest.warns(
        RuntimeWarning, match=r"original/checkpoints/step=20\.ckpt is no longer the best.*left alone"
    )
    with says_so if version == "an earlier version" else nullcontext():
        copy = Part(tmp_path / "copy", resumed_from=tmp_path / "copy" / "checkpoints" / "step=24.ckpt", stops=False)
    assert {path: path.read_bytes() for path in (tmp_path / "original").rglob("*") if path.is_file()} == before
    assert copy.callback.selected.path == tmp_path / "copy" / "checkpoints" / "step=26.ckpt"
    assert ("step=20.ckpt" in copy.checkpoints()) is (version == "an earlier version")


@pytest.mark.parametrize("inside", [True, False], ids=["in the directory of the run", "elsewhere"])
def test_a_resumed_run_removes_its_own_checkpoints_wherever_they_are(
    inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch, ib.Trajectory(measured(26, 0.25, 0.24) if point.step == 26 else point for point in COURSE))
    folder = tmp_path / "run" / "saved" if inside else tmp_path / "elsewhere"
    first = Part(tmp_path / "run", until=25, stops=False, saves={"dirpath": folder})
    assert {path.stem for path in folder.iterdir()} == {"step=20", "step=24"}
    Part(tmp_path / "run", resumed_from=folder / "step=24.ckpt", stops=False, saves={"dirpath": folder})
    assert {path.stem for path in folder.iterdir()} == {"step=24", "step=26", "step=30"}
    assert first.callback.selected.step == 20


def test_a_run_that_is_resumed_where_it_ends_takes_its_trajectory_to_the_directory_of_a_new_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning then does not even call `on_train_start`."""
    made = follow(monkeypatch)
    whole = Part(tmp_path, stops=False, logs=True)
    assert whole.last_checkpoint.stem == "step=30"
    made.clear()
    resumed = Part(tmp_path, resumed_from=whole.last_checkpoint, stops=False, logs=True)
    assert resumed.module.losses == []
    assert made == []
    assert resumed.ending() == whole.ending()
    assert "save_checkpoint" not in vars(resumed.trainer.strategy), "nothing of ours is left in the Trainer"


def test_a_run_that_is_resumed_where_it_ends_and_cannot_be_measured_ends_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    whole = Part(tmp_path, stops=False)
    (tmp_path / FILENAME).write_text("{}\n" + (tmp_path / FILENAME).read_text())
    with pytest.warns(RuntimeWarning, match="resumed where it ends, and its trajectory could not be taken up"):
        resumed = Part(tmp_path, resumed_from=whole.last_checkpoint, stops=False)
    assert resumed.trainer.global_step == 30


def test_a_new_logger_version_takes_over_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    first = Part(tmp_path, until=22, logs=True, stops=False)
    assert first.callback.selected.step == 20
    resumed = Part(tmp_path, resumed_from=first.last_checkpoint, logs=True, stops=False)
    versions = [tmp_path / "lightning_logs" / f"version_{number}" for number in (0, 1)]
    assert resumed.callback.selected.path == versions[0] / "checkpoints" / "step=20.ckpt"
    entries = [json.loads(line)["path"] for line in (versions[1] / CHECKPOINTS).read_text().splitlines()]
    assert str(versions[0] / "checkpoints" / "step=20.ckpt") in entries
    assert entries[-1] == "checkpoints/step=30.ckpt"


def test_a_checkpoint_that_is_saved_on_an_exception_is_known_and_can_be_resumed_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    saves = {"every_n_train_steps": 25, "save_on_exception": True}
    first = Part(tmp_path, until=20, saves=saves)
    assert CheckpointFile(tmp_path).existing() == {20: tmp_path / "checkpoints" / "step=20.ckpt"}
    resumed = Part(tmp_path, resumed_from=first.last_checkpoint, saves=saves)
    assert resumed.callback.trajectory.steps == list(range(24))
    assert resumed.callback.selected.path == first.last_checkpoint
