"""Trials of a hyperparameter search, each a run in its own folder; and checkpoints that are kept aside."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from scripted import follow
from tiny_hf import Each, tiny_callback, tiny_model, tiny_trainer
from transformers.trainer import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import HPSearchBackend

import ib_callback as ib
from ib_callback.hf._keeping import copy_aside, remove_partial_copies, unlink_copies

SAVES = {"steps": 30, "save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}


class Trial(dict[str, Any]):
    """As much of a trial of Optuna as the Trainer looks at."""

    number: int
    params: dict[str, Any]


class Backend:
    """Trains one trial after the other."""

    @staticmethod
    def ensure_available() -> None:
        pass

    @staticmethod
    def default_hp_space(trial: Trial) -> dict[str, Any]:
        return dict(trial)

    @staticmethod
    def run(trainer: Any, n_trials: int, direction: str) -> list[Any]:
        selected = []
        for number in range(n_trials):
            trial = Trial(learning_rate=0.01 / (1 + number))
            trial.number, trial.params = number, dict(trial)
            trainer.train(trial=trial)
            callback = next(c for c in trainer.callback_handler.callbacks if hasattr(c, "selected"))
            selected.append((callback.selected, trainer.state.best_model_checkpoint))
        return selected


@pytest.mark.parametrize(
    ("name", "elsewhere"), [(None, False), (None, True), (lambda trial: f"lr/{trial.number}", False)]
)
def test_each_trial_of_a_search_is_a_run_in_its_own_folder(
    name: Any, elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Backend)
    keywords = {"output_dir": tmp_path / "ib"} if elsewhere else {}
    callback = tiny_callback(every_n_steps=2, orders="token", select="optimality", **keywords)
    trainer = tiny_trainer(tmp_path / "out", [callback], **SAVES)
    trainer.model_init = lambda: tiny_model()
    found = trainer.hyperparameter_search(n_trials=2, backend="optuna", hp_name=name)
    for number, (selected, protected) in enumerate(found):
        run = Path("lr") / str(number) if name else Path(f"run-{number}")
        checkpoint = tmp_path / "out" / run / "checkpoint-20"
        assert (selected.step, selected.path, protected) == (20, checkpoint, str(checkpoint))
        assert {path.name for path in checkpoint.parent.glob("checkpoint-*")} == {"checkpoint-20", "checkpoint-30"}
        files = tmp_path / ("ib" if elsewhere else "out") / run
        assert ib.Trajectory.load(files).steps == list(range(0, 31, 2))
        assert not list(files.glob("ib_*.1.jsonl")), "trials rotate nothing of each other"
        paths = [files / json.loads(line)["path"] for line in (files / "ib_checkpoints.jsonl").read_text().splitlines()]
        assert paths == [checkpoint.parent / f"checkpoint-{step}" for step in (*range(4, 29, 4), 30)]
    assert not list((tmp_path / "out").glob("ib_*"))


# --- kept aside


def checkpoint(directory: Path, step: int, content: bytes) -> Path:
    folder = directory / f"checkpoint-{step}"
    (folder / "part").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "part" / "0").write_bytes(content)
    return folder


@pytest.mark.parametrize("links", [True, False])
def test_a_copy_aside_outlives_the_original_and_what_is_written_over_it(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:

        def link(*args: Any) -> None:
            raise PermissionError("a file system without links")

        monkeypatch.setattr(os, "link", link)
    original = checkpoint(tmp_path, 20, b"best")
    kept = copy_aside(original, 20)
    assert kept == tmp_path / "kept-checkpoint-20"
    assert os.path.samefile(kept / "model.safetensors", original / "model.safetensors") is links
    unlink_copies(tmp_path, 12)  # a run that goes back to step 12 will write that of step 20 again, in place
    for file in ("model.safetensors", "part/0"):
        (original / file).write_bytes(b"another one")
        assert (kept / file).read_bytes() == b"best"
    assert copy_aside(original, 20) == tmp_path / "kept-checkpoint-20-v1", "never over another one"
    shutil.rmtree(original)
    assert (tmp_path / "kept-checkpoint-20-v1" / "part" / "0").read_bytes() == b"another one"


def test_a_copy_that_fails_leaves_nothing_and_one_that_was_killed_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, before = checkpoint(tmp_path, 20, b"best"), set(os.listdir(tmp_path)) | {"checkpoint-20"}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy2", None)
        patch.setattr(os, "link", None)
        with pytest.raises(TypeError, match="not callable"):
            copy_aside(original, 20)
    assert set(os.listdir(tmp_path)) == before
    checkpoint(tmp_path / ".kept-checkpoint-20.partial", 20, b"be")
    elsewhere = checkpoint(tmp_path / "of the user", 20, b"mine")
    (tmp_path / ".kept-checkpoint-21.partial").symlink_to(elsewhere)
    (tmp_path / ".kept-checkpoint-x.partial").mkdir()
    remove_partial_copies(tmp_path)
    left = {"of the user", ".kept-checkpoint-21.partial", ".kept-checkpoint-x.partial"}
    assert set(os.listdir(tmp_path)) == before | left
    assert (elsewhere / "model.safetensors").read_bytes() == b"mine"


def test_resumed_again_with_other_settings_nothing_is_copied_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)

    def interrupt(state: Any, control: Any, model: Any) -> None:
        if state.global_step == 25:
            raise KeyboardInterrupt("at step 25")

    def train(resume: bool, num_bins: int) -> None:
        callback = tiny_callback(every_n_steps=2, orders="token", select="optimality", num_bins=num_bins)
        trainer = tiny_trainer(tmp_path, [callback, Each("on_step_end", interrupt)], **SAVES)
        with pytest.raises(KeyboardInterrupt, match="at step 25"):
            trainer.train(resume_from_checkpoint=resume)

    train(False, 12)
    for num_bins in (13, 14):
        with pytest.warns(RuntimeWarning, match="a new trajectory begins here"):
            train(True, num_bins)
    assert [path.name for path in tmp_path.glob("kept-*")] == ["kept-checkpoint-20"]
