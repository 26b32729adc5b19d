from __future__ import annotations

import json
import os
import random
import shutil
import threading
import warnings
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from tiny_lightning import saved_steps, saving, tiny_callback, tiny_module, tiny_trainer

from ib_callback.lightning._saving import SavingWatch
from ib_callback.run.checkpoints import CheckpointFile

WATCHED = ("save_checkpoint", "remove_checkpoint", "teardown")


class Strategy:
    """Saves the step as text; all that it did is in `events`."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.removed: list[Path] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self.events.append(("save", Path(filepath).name, storage_options))
        Path(filepath).write_text(str(checkpoint["global_step"]))

    def remove_checkpoint(self, filepath: Any) -> None:
        self.events.append(("remove", filepath))
        self.removed.append(Path(filepath))
        assert "pytest" in os.path.abspath(filepath), "never anything else"
        shutil.rmtree(filepath) if Path(filepath).is_dir() else Path(filepath).unlink()

    def teardown(self) -> None:
        self.events.append(("teardown",))

    def broadcast(self, value: Any) -> Any:
        return value


class Checkpoints(SimpleNamespace):
    """Stands for a `ModelCheckpoint`: of its state, what tells which files it will remove one day."""

    def __init__(self, directory: Path, *, save_top_k: int = 1, extension: str = "") -> None:
        super().__init__(dirpath=directory, save_top_k=save_top_k, FILE_EXTENSION=extension)
        self.best_k_models: dict[str, float] = {}
        self.best_model_path = self.last_model_path = ""


class Watched:
    """A watch on a `Strategy`, and what it told."""

    def __init__(
        self,
        directory: Path,
        *callbacks: Any,
        state: Any = None,
        ckpt_path: Path | None = None,
        own: Mapping[Path, int] = MappingProxyType({}),  # what the record of the run says
        **arguments: Any,
    ) -> None:
        self.directory = directory
        self.arguments = {"own_step": own.get, **arguments}
        self.strategy, self.told = Strategy(), []
        self.trainer = SimpleNamespace(
            strategy=self.strategy, is_global_zero=True, checkpoint_callbacks=callbacks, ckpt_path=ckpt_path,
            interrupted=False, world_size=1,
        )  # fmt: skip
        self.watch = self.open(state or {})

    def open(self, state: dict[str, Any]) -> SavingWatch:
        return SavingWatch(
            self.trainer,
            before=lambda checkpoint, path: self.told.append(("before", checkpoint["global_step"], self.files())),
            after=lambda step, path: self.told.append(("after", step, path, self.files())),
            copied=lambda step, path: self.told.append(("copied", step, path)),
            directory=self.directory,
            state=state,
            **self.arguments,
        )

    def save(self, step: int, name: str) -> Path:
        self.strategy.save_checkpoint({"global_step": step}, self.directory / name)
        return self.directory / name

    def files(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in sorted(self.directory.iterdir())}


def test_what_is_saved_is_told_before_and_when_it_is_complete(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.strategy.save_checkpoint({"global_step": 5}, str(tmp_path / "a"), storage_options="x")
    assert watched.told == [("before", 5, {}), ("after", 5, tmp_path / "a", {"a": "5"})]
    assert watched.strategy.events == [("save", "a", "x")]


def test_a_path_that_is_relative_is_told_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    watched = Watched(tmp_path)
    watched.strategy.save_checkpoint({"global_step": 5}, "a")
    assert watched.told[-1][2] == tmp_path / "a"
    watched.watch.keep(tmp_path / "a", 5)
    watched.strategy.remove_checkpoint("a")
    assert watched.files() == {"a": "5"}
    watched.watch.keep(None)
    assert watched.strategy.events[-1] == ("remove", "a"), "as it was asked for"


def test_what_is_kept_is_removed_once_it_is_kept_no_longer(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    a, b = watched.save(5, "a"), watched.save(10, "b")
    watched.watch.keep(a, 5)
    watched.strategy.remove_checkpoint(a)
    assert watched.files() == {"a": "5", "b": "10"}
    assert watched.watch.state_dict() == {"withheld": ["a"]}
    watched.watch.keep(a, 5)
    assert watched.files() == {"a": "5", "b": "10"}
    watched.watch.keep(b, 10)
    assert watched.files() == {"b": "10"}
    assert watched.watch.state_dict() == {"withheld": []}
    watched.strategy.remove_checkpoint(b)
    watched.watch.keep(None)
    assert watched.files() == {}


def test_nothing_is_removed_while_it_is_not_certain_what_is_the_best(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    a, b, c = (watched.save(step, name) for step, name in ((5, "a"), (10, "b"), (15, "c")))
    watched.watch.keep(a, 5)
    watched.strategy.remove_checkpoint(a)
    watched.watch.keep(c, 15, certain=False)
    watched.strategy.remove_checkpoint(b)
    assert watched.files() == {"a": "5", "b": "10", "c": "15"}
    watched.watch.keep(None, certain=False)
    assert watched.watch.state_dict() == {"withheld": ["a", "b"]}
    watched.watch.keep(b, 10)
    assert watched.files() == {"b": "10", "c": "15"}


def test_a_removal_that_fails_is_tried_again(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    a, b = watched.save(5, "a"), watched.save(10, "b")
    watched.watch.keep(a, 5)
    watched.strategy.remove_checkpoint(a)
    a.unlink()
    a.mkdir()
    (tmp_path / "a" / "locked").mkdir()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("read-only")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        with pytest.raises(PermissionError, match="read-only"):
            watched.watch.keep(b, 10)
    watched.watch.keep(b, 10)
    assert watched.files() == {"b": "10"}


def test_what_lasts_is_never_removed_and_copied_before_it_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("5")
    (tmp_path / "b").write_text("6")
    watched = Watched(
        tmp_path, lasting={tmp_path / name: 5 for name in ("a", "gone")}, state={"withheld": ["b"]}, compares=False
    )
    for name in ("a", "b"):
        watched.strategy.remove_checkpoint(tmp_path / name)
    watched.watch.keep(None)
    assert watched.files() == {"a": "5", "b": "6"}
    watched.save(10, "a")
    watched.watch.keep(tmp_path / "a", 10)
    watched.save(15, "a")
    watched.watch.keep(tmp_path / "a", 15)
    assert watched.files() == {"a": "15", "b": "6", "step=5-a": "5"}
    lasting = sorted(entry["path"] for entry in watched.watch.state_dict()["lasting"])
    assert lasting == ["b", "step=5-a"]


def test_a_copy_that_fails_is_a_move_and_one_that_was_killed_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a full disk; and in the middle, of this run and of another one that saves in the same directory."""
    watched = Watched(tmp_path, Checkpoints(tmp_path))
    watched.watch.keep(watched.save(5, "last.ckpt"), 5)

    def fill(source: Path, destination: Path) -> None:
        Path(destination).write_text("ha")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", fill)
        watched.save(10, "last.ckpt")
    assert watched.files() == {"last.ckpt": "10", "step=5-last.ckpt": "5"}

    def die(source: Path, destination: Path) -> None:
        Path(destination).write_text("ha")
        raise KeyboardInterrupt("in mid-copy")

    watched.watch.keep(tmp_path / "last.ckpt", 10)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", die)
        patch.setattr("ib_callback.lightning._saving._remove_partial", lambda path: None)
        with pytest.raises(KeyboardInterrupt, match="in mid-copy"):
            watched.save(15, "last.ckpt")
    (tmp_path / ".step=9-last.ckpt.partial").write_text("of the user")
    (tmp_path / ".step=9-last.ckpt.12345678.partial").write_text("of another run")
    before = set(watched.files())
    left = before - set(Watched(tmp_path, Checkpoints(tmp_path)).files())
    assert [name.startswith(".step=10-last.ckpt.") for name in left] == [True]


def test_what_nobody_wants_to_remove_stays_when_it_is_no_longer_the_best(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    a, b = watched.save(5, "a"), watched.save(10, "b")
    watched.watch.keep(a, 5)
    watched.watch.keep(b, 10)
    assert watched.files() == {"a": "5", "b": "10"}
    watched.strategy.remove_checkpoint(a)
    assert watched.files() == {"b": "10"}


def test_what_is_gone_already_need_not_be_removed(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    a = watched.save(5, "a")
    watched.watch.keep(a, 5)
    watched.strategy.remove_checkpoint(a)
    a.unlink()
    watched.watch.keep(None)
    assert [event[0] for event in watched.strategy.events] == ["save"]


def test_what_is_written_again_is_not_removed_later(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    a = watched.save(5, "a")
    watched.watch.keep(a, 5)
    watched.strategy.remove_checkpoint(a)
    watched.save(5, "a")
    watched.watch.keep(None)
    assert watched.files() == {"a": "5"}


def test_what_is_kept_is_copied_before_it_is_overwritten(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    last = watched.save(5, "last.ckpt")
    watched.watch.keep(last, 5)
    watched.save(5, "last.ckpt")
    assert watched.files() == {"last.ckpt": "5"}, "the same weights"
    watched.save(10, "last.ckpt")
    copy = tmp_path / "step=5-last.ckpt"
    assert watched.files() == {"last.ckpt": "10", copy.name: "5"}
    assert ("copied", 5, copy) in watched.told
    assert watched.told.index(("copied", 5, copy)) < watched.told.index(
        ("before", 10, {"last.ckpt": "5", copy.name: "5"})
    )

    watched.watch.keep(copy, 5)
    watched.save(15, "last.ckpt")
    assert watched.files() == {"last.ckpt": "15", copy.name: "5"}, "no second copy"
    assert watched.watch.state_dict() == {"withheld": [copy.name]}
    watched.watch.keep(last, 15)
    assert watched.files() == {"last.ckpt": "15"}


def test_a_copy_takes_no_name_that_is_taken_and_copies_folders(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    (tmp_path / "step=5-a.ckpt").write_text("of another run")
    watched.watch.keep(watched.save(5, "a.ckpt"), 5)
    watched.save(10, "a.ckpt")
    assert watched.files() == {"a.ckpt": "10", "step=5-a.ckpt": "of another run", "step=5-a-v1.ckpt": "5"}

    sharded = tmp_path / "sharded"
    (sharded / "part").mkdir(parents=True)
    (sharded / "part" / "0").write_text("10")
    watched.watch.keep(sharded, 10)
    with pytest.raises(IsADirectoryError, match="sharded"):
        watched.save(15, "sharded")
    assert (tmp_path / "step=10-sharded" / "part" / "0").read_text() == "10"


def test_a_copy_that_fails_is_a_warning(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.watch.keep(tmp_path / "gone.ckpt", 5)
    with pytest.warns(RuntimeWarning, match=r"gone\.ckpt, is about to be overwritten, and could not be copied"):
        watched.save(10, "gone.ckpt")
    assert watched.files() == {"gone.ckpt": "10"}


@pytest.mark.parametrize("again", [False, True], ids=["resumed", "resumed once more"])
def test_what_was_withheld_is_removed_by_a_resumed_run(again: bool, tmp_path: Path) -> None:
    first = Watched(tmp_path)
    a, b = first.save(5, "a"), first.save(10, "b")
    first.watch.keep(a, 5)
    first.strategy.remove_checkpoint(a)
    of_this_run: dict[str, Any] = {"own": {a: 5, b: 10}}
    resumed = Watched(tmp_path, Checkpoints(tmp_path), state=first.watch.state_dict(), **of_this_run)
    if again:
        resumed = Watched(tmp_path, Checkpoints(tmp_path), state=resumed.watch.state_dict(), **of_this_run)
    resumed.watch.keep(a, 5)
    assert resumed.files() == {"a": "5", "b": "10"}
    resumed.watch.keep(b, 10)
    assert resumed.files() == {"b": "10"}


@pytest.mark.parametrize("listed_as", ["best_k_models", "best_model_path", "last_model_path"])
def test_what_is_about_to_be_withheld_is_in_the_state_of_the_next_checkpoint(listed_as: str, tmp_path: Path) -> None:
    """`ModelCheckpoint` takes a file off its list, saves the next one, and only then removes the former."""

    def list_in(callback: Checkpoints, path: Path) -> None:
        setattr(callback, listed_as, {str(path): 1.0} if listed_as == "best_k_models" else str(path))

    callback = Checkpoints(tmp_path)
    watched = Watched(tmp_path, callback)
    a = watched.save(5, "a")
    list_in(callback, a)
    watched.watch.keep(a, 5)
    assert watched.watch.state_dict() == {"withheld": []}, "the callback will remove it"
    list_in(callback, tmp_path / "b")
    assert watched.watch.state_dict() == {"withheld": ["a"]}


def test_what_no_callback_would_remove_is_never_withheld(tmp_path: Path) -> None:
    a = tmp_path / "a"
    everything = Checkpoints(tmp_path, save_top_k=-1)
    elsewhere = Checkpoints(tmp_path / "of this run")
    resumes = Checkpoints(tmp_path)
    cases = [((everything,), None), ((elsewhere,), None), ((resumes,), a), ((), None), ((object(),), None)]
    for callbacks, resumed_from in cases:
        watched = Watched(tmp_path, *callbacks, ckpt_path=resumed_from)
        watched.save(5, "a")
        for callback in callbacks:
            if isinstance(callback, Checkpoints):
                callback.best_model_path = str(a)
        watched.watch.keep(a, 5)
        for callback in callbacks:
            if isinstance(callback, Checkpoints):
                callback.best_model_path = str(tmp_path / "b")
        assert watched.watch.state_dict() == {"withheld": []}, callbacks


def test_the_strategy_has_its_own_methods_back_at_its_end(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.strategy.teardown()
    assert watched.strategy.events == [("teardown",)]
    assert not set(WATCHED) & set(vars(watched.strategy))
    watched.save(5, "a")
    watched.watch.close()
    assert watched.told == []


def test_of_two_callbacks_neither_removes_what_the_other_keeps(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    both = [watched.watch, watched.open({})]
    for one, other in (both, both[::-1]):
        path = watched.save(5, "a")
        one.keep(path, 5)
        watched.strategy.remove_checkpoint(path)
        other.keep(path, 5)  # as where a phase has been recognised
        one.keep(None)
        assert path.exists()
        other.keep(None)
        assert not path.exists()


def test_methods_that_somebody_else_has_put_in_front_are_called_and_put_back(tmp_path: Path) -> None:
    strategy = Strategy()
    seen: list[str] = []
    original = strategy.remove_checkpoint

    def remove(filepath: Any) -> None:
        seen.append(Path(filepath).name)
        original(filepath)

    strategy.remove_checkpoint = remove  # type: ignore[method-assign]
    first = Watched(tmp_path)
    first.strategy = first.trainer.strategy = strategy
    watches = [first.open({}), first.open({})]
    first.told.clear()
    a = first.save(5, "a")
    assert [told[0] for told in first.told] == ["before", "before", "after", "after"]
    watches[0].keep(a, 5)
    strategy.remove_checkpoint(a)
    assert first.files() == {"a": "5"}, "either of two callbacks can keep it"
    watches[0].keep(None)
    assert seen == ["a"]
    strategy.teardown()
    assert vars(strategy)["remove_checkpoint"] is remove
    assert not {"save_checkpoint", "teardown"} & set(vars(strategy))


# --- what may be removed


@pytest.mark.parametrize(
    ("name", "own", "removed"),
    [
        ("saved/a.ckpt", True, True),
        ("saved/folder.ckpt", True, True),
        ("saved/link.ckpt", True, False),
        ("saved/a.ckpt", False, False),
        ("saved/notes.txt", True, False),
        ("saved/a.ckpt/../../notes.txt", True, False),
        ("saved", True, False),
        (".", True, False),
        ("..", True, False),
        ("../original/saved/a.ckpt", True, False),
        ("{tmp}/original/saved/a.ckpt", True, False),
        ("{tmp}/run/saved/a.ckpt", True, True),
        ("saved/way/saved/a.ckpt", True, False),
    ],
)
def test_of_an_earlier_part_only_what_is_proven_to_be_of_this_run_is_removed(
    name: str, own: bool, removed: bool, tmp_path: Path
) -> None:
    """Earlier versions kept absolute paths in the state; and who knows what a downloaded checkpoint says."""
    run = make_runs(tmp_path)
    path = Path(os.path.abspath(run / name.format(tmp=tmp_path)))
    before, state = tree(tmp_path), {"withheld": [name.format(tmp=tmp_path)]}
    saved = Checkpoints(run / "saved", extension=".ckpt")
    watched = Watched(run, saved, state=state, own={path: 5} if own else {})
    with nullcontext() if removed else pytest.warns(RuntimeWarning, match="left alone, for no record shows that this"):
        watched.watch.keep(None)
    gone = {file for file in before - tree(tmp_path) if file != path}
    assert os.path.lexists(path) is not removed
    assert all(path in file.parents for file in gone)
    assert watched.watch.state_dict() == {"withheld": []}, "said once"


@pytest.mark.parametrize("seed", range(30))
def test_nothing_outside_the_folders_of_checkpoints_is_ever_removed(seed: int, tmp_path: Path) -> None:
    """Whatever state and record say, and whatever is kept, removed and saved afterwards."""
    chance, run = random.Random(seed), make_runs(tmp_path)
    everything = sorted(tree(tmp_path))
    folder = chance.choice([run / "saved", run / "saved", tmp_path / "elsewhere"])

    def name_of(path: Path) -> str:
        if chance.random() < 0.2:
            return chance.choice(["", ".", "..", "../..", "saved", "saved/..", "/", "~", str(tmp_path), str(folder)])
        return chance.choice([str(path), os.path.relpath(path, run), f"saved/way/{path.relative_to(tmp_path)}"])

    record = [
        {"step": chance.randrange(30), "path": name_of(path)} | chance.choice([{}, {}, {"run": str(run)}, {"run": "/"}])
        for path in chance.choices(everything, k=12)
    ]
    (run / "ib_checkpoints.jsonl").write_text("".join(json.dumps(line) + "\n" for line in record))
    entries = [{"step": chance.randrange(30), "path": name_of(path)} for path in chance.choices(everything, k=3)]
    lasting = {Path(os.path.abspath(run / entry["path"])): entry["step"] for entry in entries}
    state = {"withheld": [name_of(path) for path in chance.choices(everything, k=12)]}
    watched = Watched(
        run,
        Checkpoints(folder, extension=chance.choice(["", ".ckpt"])),
        state=state,
        own_step=CheckpointFile(run, start_step=30).own_step,
        lasting=chance.choice([{}, lasting]),
        compares=chance.random() < 0.8,
    )
    outside = {path for path in tree(tmp_path) if not in_folder(path, folder)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(31, 36):
            with suppress(OSError):
                watched.save(step, os.path.relpath(folder / chance.choice(["a.ckpt", "new.ckpt"]), run))
            kept = chance.choice([None, *everything])
            with suppress(OSError):
                watched.watch.keep(kept, step, certain=chance.random() < 0.5)
        with suppress(OSError):
            watched.watch.keep(None)
    assert outside <= tree(tmp_path)
    assert all(in_folder(path, folder) for path in watched.strategy.removed)


def test_the_folder_of_the_run_is_no_checkpoint_though_it_lies_among_them(tmp_path: Path) -> None:
    run = make_runs(tmp_path)
    watched = Watched(run, Checkpoints(tmp_path), state={"withheld": ["."]}, own={run: 5})
    with pytest.warns(RuntimeWarning, match="left alone"):
        watched.watch.keep(None)
    assert watched.strategy.removed == []


def make_runs(directory: Path) -> Path:
    """A run and the one that it is a copy of, each with files of its own and ways from the former to the latter."""
    for name in ("run", "original"):
        saved = directory / name / "saved"
        (saved / "folder.ckpt").mkdir(parents=True)
        for file in ("saved/a.ckpt", "saved/b.ckpt", "saved/folder.ckpt/meta.pt", "saved/notes.txt", "notes.txt"):
            (directory / name / file).write_text(file)
    (directory / "elsewhere").mkdir()
    (directory / "elsewhere" / "a.ckpt").write_text("of the user")
    (directory / "run" / "saved" / "link.ckpt").symlink_to(directory / "original" / "saved" / "a.ckpt")
    (directory / "run" / "saved" / "way").symlink_to(directory / "original")
    return directory / "run"


def tree(directory: Path) -> set[Path]:
    return set(directory.rglob("*"))


def in_folder(path: Path, folder: Path) -> bool:
    return folder.resolve() in Path(os.path.realpath(path.parent), path.name).parents


@pytest.mark.parametrize("fails_in", [None, "on_train_start", "on_train_batch_end"])
def test_a_trainer_has_its_strategy_back_and_callbacks_fit_again(fails_in: str | None, tmp_path: Path) -> None:
    def fail(trainer: Any, *args: Any) -> None:
        if fails_in == "on_train_start" or trainer.global_step == 5:
            raise ZeroDivisionError("a bug of the user")

    callback = tiny_callback(every_n_steps=2, select="optimality", select_from=1)
    callbacks = [callback, saving(tmp_path, 2)]
    failing = [] if fails_in is None else [LambdaCallback(**{fails_in: fail})]
    trainer = tiny_trainer(tmp_path, [*callbacks, *failing], steps=8, enable_checkpointing=True)
    before = set(vars(trainer.strategy))
    with nullcontext() if fails_in is None else pytest.raises(ZeroDivisionError, match="a bug of the user"):
        trainer.fit(tiny_module())
    assert not set(WATCHED) & (set(vars(trainer.strategy)) - before)

    trainer = tiny_trainer(tmp_path / "again", callbacks, steps=8, enable_checkpointing=True)
    trainer.fit(tiny_module())
    assert callback.trajectory.steps == [0, 2, 4, 6, 8]
    assert callback.selected is not None
    assert not set(WATCHED) & set(vars(trainer.strategy))


# --- in the background, and elsewhere


class Late(TorchCheckpointIO):
    """Writes nothing until `go`; or never, with an error."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.go, self.failure = threading.Event(), failure

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.failure is not None:
            raise self.failure
        assert self.go.wait(60)
        super().save_checkpoint(*args, **kwargs)


def test_a_checkpoint_written_in_the_background_counts_once_it_is_there(tmp_path: Path) -> None:
    late, seen = Late(), []
    callback = tiny_callback(select="optimality", select_from=0)

    def before_the_end(trainer: Any, _: Any) -> None:
        seen.append((CheckpointFile(tmp_path).recorded(), callback.selected))
        late.go.set()

    first, kept = LambdaCallback(on_train_end=before_the_end), saving(tmp_path, 3, save_top_k=1)
    plugins = [AsyncCheckpointIO(late)]
    trainer = tiny_trainer(tmp_path, [first, callback, kept], plugins=plugins, enable_checkpointing=True)
    trainer.fit(tiny_module())
    assert seen == [(set(), None)], "none was there until then"
    assert CheckpointFile(tmp_path).recorded() == {3, 6, 9, 12}
    best = max((point for point in callback.trajectory if point.step in (3, 6, 9, 12)), key=lambda p: p.optimality)
    assert callback.selected is not None
    assert callback.selected.step == best.step
    assert saved_steps(tmp_path) == {f"step={best.step}", "step=12"}, "as without a plugin"
    found = torch.load(callback.selected.path, weights_only=False)
    assert found["global_step"] == best.step


def test_without_a_selection_what_lightning_removes_while_it_is_written_is_removed_when_it_is(tmp_path: Path) -> None:
    late = Late()
    last = LambdaCallback(on_train_end=lambda *_: late.go.set())
    callbacks = [last, tiny_callback(), saving(tmp_path, 3, save_top_k=1)]
    trainer = tiny_trainer(tmp_path, callbacks, plugins=[AsyncCheckpointIO(late)], enable_checkpointing=True)
    trainer.fit(tiny_module())
    assert CheckpointFile(tmp_path).recorded() == {3, 6, 9, 12}
    assert saved_steps(tmp_path) == {"step=12"}


def test_after_an_error_no_rank_waits_for_the_others(tmp_path: Path) -> None:
    """One rank alone may have failed: the others have no part in a broadcast at the end."""
    watched = Watched(tmp_path, Checkpoints(tmp_path))
    watched.trainer.interrupted, watched.trainer.world_size = True, 2
    watched.watch._pending[tmp_path / "a.ckpt"] = (1, None)
    watched.strategy.broadcast = lambda _: pytest.fail("it waits")
    watched.strategy.teardown()
    assert [name for name, *_ in watched.told] == []


def test_a_home_in_the_path_of_a_checkpoint_is_that_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    last = LambdaCallback(on_train_end=lambda trainer, _: trainer.save_checkpoint("~/last.ckpt"))
    tiny_trainer(tmp_path, [last, tiny_callback()]).fit(tiny_module())
    assert CheckpointFile(tmp_path).existing() == {12: tmp_path / "last.ckpt"}


def test_a_checkpoint_that_could_not_be_written_in_the_background_is_not_recorded(tmp_path: Path) -> None:
    callback = tiny_callback()
    plugins = [AsyncCheckpointIO(Late(OSError("the disk is full")))]
    trainer = tiny_trainer(tmp_path, [callback, saving(tmp_path, 12)], plugins=plugins, enable_checkpointing=True)
    with pytest.raises(OSError, match="the disk is full"):
        trainer.fit(tiny_module())
    assert CheckpointFile(tmp_path).recorded() == set()


def test_one_file_that_is_written_in_the_background_again_and_again(tmp_path: Path) -> None:
    """What is there when the next one begins is that of an earlier step, and does not count for the next."""
    late = Late()
    late.go.set()
    callback = tiny_callback(select="optimality", select_from=0)
    always = saving(tmp_path, 3, save_top_k=1, filename="one", enable_version_counter=False)
    trainer = tiny_trainer(tmp_path, [callback, always], plugins=[AsyncCheckpointIO(late)], enable_checkpointing=True)
    trainer.fit(tiny_module())
    for step, path in CheckpointFile(tmp_path).existing().items():
        assert torch.load(path, weights_only=False)["global_step"] == step
    assert callback.selected is not None
    assert torch.load(callback.selected.path, weights_only=False)["global_step"] == callback.selected.step


def test_a_directory_on_another_file_system_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = tiny_module()
    with pytest.raises(ValueError, match=r"a folder on this machine, got memory://runs.*output_dir="):
        tiny_trainer("memory://runs", [tiny_callback()]).fit(module)
    assert module.losses == []
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_on_another_file_system_are_left_to_lightning(tmp_path: Path) -> None:
    remote = f"memory://{tmp_path.name}"
    keeping = ModelCheckpoint(remote, every_n_train_steps=3, save_top_k=1, filename="{step}")
    callback = tiny_callback(select="optimality", select_from=0, output_dir=tmp_path)
    with pytest.warns(RuntimeWarning, match=rf"those at {remote} are left to ModelCheckpoint.*dirpath="):
        tiny_trainer(remote, [callback, keeping], enable_checkpointing=True).fit(tiny_module())
    assert CheckpointFile(tmp_path).recorded() == set()
    names = fsspec.filesystem("memory").ls(f"/{tmp_path.name}", detail=False)
    assert [Path(name).name for name in names] == ["step=12.ckpt"]
