from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from ib_callback.common.errors import TrajectoryError
from ib_callback.run.checkpoints import FILENAME, CheckpointFile, find_checkpoints, is_complete

# Beside the weights, as HuggingFace's Trainer leaves them; the state is written last.
REST = ("config.json", "optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin", "trainer_state.json")


def hf_checkpoint(directory: Path, step: int, weights: tuple[str, ...] = ("model.safetensors",)) -> Path:
    folder = directory / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in (*weights, *REST):
        (folder / name).write_bytes(b"{}")
    return folder


def lightning_checkpoint(path: Path, step: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step, "state_dict": {"weight": torch.zeros(2)}}, path)
    return path


def lines(directory: Path) -> list[str]:
    return (directory / FILENAME).read_text().splitlines()


# --- the record


def test_each_checkpoint_is_in_the_record_as_soon_as_it_is_added(tmp_path):
    record = CheckpointFile(tmp_path, start_step=0)
    paths = {step: hf_checkpoint(tmp_path, step) for step in (20, 10)}
    record.add(10, paths[10])
    assert lines(tmp_path) == ['{"step": 10, "path": "checkpoint-10"}']
    record.add(20, str(paths[20]))
    record.add(20, paths[20])  # resuming from it
    assert lines(tmp_path)[1:] == ['{"step": 20, "path": "checkpoint-20"}']
    assert record.existing() == CheckpointFile(tmp_path).existing() == paths
    assert list(record.existing()) == [10, 20]
    assert record.recorded() == CheckpointFile(tmp_path).recorded() == {10, 20}


def test_reading_a_run_without_a_record_makes_none(tmp_path):
    record = CheckpointFile(tmp_path)
    assert (record.existing(), record.recorded()) == ({}, set())
    assert os.listdir(tmp_path) == []


def test_a_fresh_run_moves_an_old_record_away(tmp_path):
    for step in (10, 20, 30):
        CheckpointFile(tmp_path, start_step=0).add(step, hf_checkpoint(tmp_path, step))
    assert lines(tmp_path) == ['{"step": 30, "path": "checkpoint-30"}']
    assert (tmp_path / "ib_checkpoints.1.jsonl").read_text() == '{"step": 10, "path": "checkpoint-10"}\n'
    assert (tmp_path / "ib_checkpoints.2.jsonl").read_text() == '{"step": 20, "path": "checkpoint-20"}\n'
    assert CheckpointFile(tmp_path).recorded() == {30}


def test_a_fresh_run_does_not_read_what_it_moves_away(tmp_path):
    (tmp_path / FILENAME).write_bytes(b"damaged\nbeyond\nrepair\n")
    assert CheckpointFile(tmp_path, start_step=0).existing() == {}
    assert (tmp_path / "ib_checkpoints.1.jsonl").read_bytes() == b"damaged\nbeyond\nrepair\n"


def test_a_resumed_run_drops_what_lies_past_its_step(tmp_path):
    record = CheckpointFile(tmp_path, start_step=0)
    for step in (10, 20, 30):
        record.add(step, hf_checkpoint(tmp_path, step))
    resumed = CheckpointFile(tmp_path, start_step=20)
    # That of step 30 is still on the disk, but no longer of this run.
    assert list(resumed.existing()) == [10, 20]
    assert CheckpointFile(tmp_path).recorded() == resumed.recorded() == {10, 20}
    resumed.add(25, hf_checkpoint(tmp_path, 25))
    assert list(CheckpointFile(tmp_path).existing()) == [10, 20, 25]
    assert sorted(path.name for path in tmp_path.glob("ib_*")) == [FILENAME]


def test_a_resumed_run_with_nothing_to_drop_leaves_the_file_as_it_is(tmp_path):
    before = b'{"path": "checkpoint-10", "step": 10, "written by": "a newer version"}\n'
    (tmp_path / FILENAME).write_bytes(before)
    assert CheckpointFile(tmp_path, start_step=10).recorded() == {10}
    assert (tmp_path / FILENAME).read_bytes() == before


def test_a_torn_last_line_is_dropped_and_mended(tmp_path):
    record = CheckpointFile(tmp_path, start_step=0)
    record.add(10, hf_checkpoint(tmp_path, 10))
    intact = (tmp_path / FILENAME).read_bytes()
    (tmp_path / FILENAME).write_bytes(intact + b'{"step": 20, "path": "checkp')
    with pytest.warns(RuntimeWarning, match=r"ib_checkpoints\.jsonl: the last line is incomplete"):
        resumed = CheckpointFile(tmp_path, start_step=20)
    assert list(resumed.existing()) == [10]
    with pytest.warns(RuntimeWarning, match=r"ib_checkpoints\.jsonl: the last line is incomplete"):
        resumed.add(20, hf_checkpoint(tmp_path, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(CheckpointFile(tmp_path).existing()) == [10, 20]


@pytest.mark.parametrize("start_step", [None, 20])
def test_a_damaged_line_before_the_end_is_named(tmp_path, start_step):
    damaged = b'{"step": 10, "path": "a"}\n{"step": 2\n{"step": 30, "path": "b"}\n'
    (tmp_path / FILENAME).write_bytes(damaged)
    with pytest.raises(TrajectoryError, match=r"ib_checkpoints\.jsonl:2: expected one JSON object.*remove that line"):
        CheckpointFile(tmp_path, start_step=start_step)
    assert (tmp_path / FILENAME).read_bytes() == damaged


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"path": "a"}', "'step'"),
        ('{"step": 5}', "'path'"),
        ('{"step": -5, "path": "a"}', "at least 0, got -5"),
        ('{"step": true, "path": "a"}', "got True"),
        ('{"step": 5.0, "path": "a"}', "got 5.0"),
        ('{"step": 5, "path": 6}', "int"),
        ("[5]", "indices"),
    ],
)
def test_a_line_that_is_no_checkpoint_is_named(tmp_path, line, reason):
    (tmp_path / FILENAME).write_text(f'{{"step": 1, "path": "a"}}\n{line}\n')
    with pytest.raises(TrajectoryError, match=rf'\.jsonl:2: expected {{"step": number, .*{reason}.*Correct or remove'):
        CheckpointFile(tmp_path)


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path):
    (tmp_path / FILENAME).mkdir()
    with pytest.raises(TrajectoryError, match=r"ib_checkpoints\.jsonl cannot be read \(Is a directory\)"):
        CheckpointFile(tmp_path)
    record = CheckpointFile(tmp_path / "missing", start_step=0)
    saved = hf_checkpoint(tmp_path, 10)
    with pytest.raises(TrajectoryError, match=r"ib_checkpoints\.jsonl cannot be written \(No such file"):
        record.add(10, saved)
    assert record.existing() == {10: saved}


# --- a disk that does not answer


@pytest.fixture
def disk(monkeypatch):
    """A function that lets every look at a path, or below it, fail from then on; called with None, none any more."""
    broken = []
    real = {(owner, name): getattr(owner, name) for owner, name in ((os, "stat"), (os, "listdir"), (builtins, "open"))}

    def guarded(function):
        def call(path=".", *args, **kwargs):
            if broken and not isinstance(path, int) and os.fspath(path).startswith(broken[0]):
                raise OSError(errno.EIO, "Input/output error")
            return function(path, *args, **kwargs)

        return call

    for (owner, name), function in real.items():
        monkeypatch.setattr(owner, name, guarded(function))
    monkeypatch.setattr(io, "open", builtins.open)
    return lambda path: broken.__setitem__(slice(None), [] if path is None else [str(path)])


@pytest.mark.parametrize("below", ["", "trainer_state.json", "model.safetensors"])
def test_what_cannot_be_looked_at_is_not_gone(tmp_path, disk, below):
    saved = {step: hf_checkpoint(tmp_path, step) for step in (10, 20)}
    record = CheckpointFile(tmp_path, start_step=0)
    for step, path in saved.items():
        record.add(step, path)
    disk(saved[10] / below)
    with pytest.raises(OSError, match="Input/output error"):
        is_complete(saved[10])
    assert record.existing() == saved, "it was there when that could be told"
    assert record.unknown == set()
    again = CheckpointFile(tmp_path)
    assert (list(again.existing()), again.unknown) == ([20], {10})
    disk(None)
    assert again.existing() == saved
    assert again.unknown == set()
    shutil.rmtree(saved[10])
    assert list(record.existing()) == list(again.existing()) == [20], "certainly gone"
    disk(saved[10])
    assert list(record.existing()) == [20]


def test_what_cannot_be_written_is_tried_again(tmp_path, disk):
    record = CheckpointFile(tmp_path, start_step=0)
    saved = [hf_checkpoint(tmp_path, step) for step in (10, 20, 30)]
    disk(tmp_path / FILENAME)
    for step, path in zip((10, 20), saved, strict=False):
        with pytest.raises(TrajectoryError, match="Input/output error"):
            record.add(step, path)
    with pytest.raises(TrajectoryError, match="Input/output error"):
        CheckpointFile(tmp_path)
    disk(None)
    record.add(30, saved[2])
    assert list(CheckpointFile(tmp_path).existing()) == [10, 20, 30]
    record.flush()
    assert len(lines(tmp_path)) == 3


# --- paths


def test_a_run_can_be_moved_with_its_checkpoints(tmp_path):
    run, elsewhere = tmp_path / "run", lightning_checkpoint(tmp_path / "elsewhere" / "a.ckpt", 20)
    inside = hf_checkpoint(run, 10)
    record = CheckpointFile(run, start_step=0)
    record.add(10, inside)
    record.add(20, elsewhere)
    record.add(30, lightning_checkpoint(run / "saved" / "b.ckpt", 30))
    assert lines(run)[2] == '{"step": 30, "path": "saved/b.ckpt"}'
    moved = run.rename(tmp_path / "moved")
    assert CheckpointFile(moved).existing() == {
        10: moved / "checkpoint-10",
        20: elsewhere,
        30: moved / "saved" / "b.ckpt",
    }


def test_what_a_run_wrote_is_told_from_what_its_record_merely_names(tmp_path):
    """By a record that was copied with the run, or that somebody made up, nothing elsewhere is proven."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    ours = lightning_checkpoint(elsewhere / "a.ckpt", 20)
    other = lightning_checkpoint(elsewhere / "b.ckpt", 30)
    inside = hf_checkpoint(run, 10)
    record = CheckpointFile(run, start_step=0)
    record.add(10, inside)
    record.add(20, ours)
    record.add(30, other, own=False)  # it was resumed from
    for again in (record, CheckpointFile(run)):
        assert [again.own_step(path) for path in (inside, ours, other)] == [10, 20, None]
    with open(run / FILENAME, "a") as file:
        file.write(f'{{"step": 40, "path": "../elsewhere/b.ckpt"}}\n{{"step": 50, "path": "{other}", "run": "/"}}\n')
    assert CheckpointFile(run).own_step(other) is None
    shutil.copytree(run, tmp_path / "copy")
    copy = CheckpointFile(tmp_path / "copy")
    assert [copy.own_step(path) for path in (inside, ours, other)] == [None, None, None]
    assert copy.own_step(tmp_path / "copy" / "checkpoint-10") == 10
    assert copy.existing() == {10: tmp_path / "copy" / "checkpoint-10", 20: ours, 50: other}


def test_relative_paths_are_those_of_the_working_directory(tmp_path, monkeypatch):
    saved = hf_checkpoint(tmp_path / "run", 10)
    monkeypatch.chdir(tmp_path)
    CheckpointFile("run", start_step=0).add(10, "run/checkpoint-10")
    assert lines(tmp_path / "run") == ['{"step": 10, "path": "checkpoint-10"}']
    monkeypatch.chdir(tmp_path / "run")
    assert CheckpointFile(".").existing() == {10: saved}


def test_a_path_that_was_written_again_holds_the_later_step_only(tmp_path):
    record, same = CheckpointFile(tmp_path, start_step=0), lightning_checkpoint(tmp_path / "newest.ckpt", 20)
    for step in (10, 20):
        record.add(step, same)
    assert record.existing() == CheckpointFile(tmp_path).existing() == {20: same}
    assert record.recorded() == {10, 20}


@pytest.mark.parametrize("holds", [True, False])
def test_a_link_holds_what_it_leads_to(tmp_path, holds):
    """As Lightning's `save_last="link"`, of which one may have resumed."""
    record = CheckpointFile(tmp_path, start_step=0)
    paths = [lightning_checkpoint(tmp_path / f"step={step}.ckpt", step) for step in (6, 9)]
    link = tmp_path / "last.ckpt"
    link.symlink_to("step=6.ckpt")
    record.add(6, paths[0], holds=holds)
    record.add(6, link, own=False)
    assert record.existing() == ({6: paths[0]} if holds else {})
    record.add(9, paths[1])
    link.unlink()
    link.symlink_to("step=9.ckpt")
    paths[0].unlink()
    assert record.existing() == CheckpointFile(tmp_path).existing() == {9: paths[1]}


def test_of_two_with_the_same_weights_it_is_not_the_one_to_be_overwritten(tmp_path):
    record = CheckpointFile(tmp_path, start_step=0)
    named, last = (lightning_checkpoint(tmp_path / name, 10) for name in ("epoch=0-step=10.ckpt", "last.ckpt"))
    record.add(10, named)
    record.add(10, last)
    assert record.existing() == {10: named}
    named.unlink()
    assert record.existing() == {10: last}


def test_a_deleted_checkpoint_is_recorded_but_does_not_exist(tmp_path):
    record = CheckpointFile(tmp_path, start_step=0)
    for step in (10, 20):
        record.add(step, lightning_checkpoint(tmp_path / f"{step}.ckpt", step))
    (tmp_path / "10.ckpt").unlink()
    assert list(record.existing()) == list(CheckpointFile(tmp_path).existing()) == [20]
    assert record.recorded() == {10, 20}


# --- whole and in part


PIECES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    "weights",
    [("model.safetensors",), ("pytorch_model.bin",), ("adapter_model.safetensors",), ("model.pt",), PIECES],
)
def test_a_folder_of_huggingface_lacks_nothing_that_matters(tmp_path, weights):
    folder = hf_checkpoint(tmp_path, 5, weights)
    assert is_complete(folder)
    assert find_checkpoints(tmp_path) == {5: folder}
    for needed in (weights[-1], "trainer_state.json"):
        content = (folder / needed).read_bytes()
        (folder / needed).unlink()
        assert not is_complete(folder)
        assert find_checkpoints(tmp_path) == {}
        (folder / needed).write_bytes(content)
    (folder / "trainer_state.json").write_bytes(b'{"best_global_step": 5, "epo')
    assert not is_complete(folder)
    (folder / "trainer_state.json").write_bytes(b"{}")
    # Those who want to go on training need them, but these are the weights all the same.
    for other in ("optimizer.pt", "rng_state.pth"):
        (folder / other).unlink()
    assert is_complete(folder)


@pytest.mark.parametrize("index", [".metadata", None])
def test_weights_in_a_folder_of_shards_need_their_index(tmp_path, index):
    folder = hf_checkpoint(tmp_path, 5, ())
    shards = folder / "pytorch_model_fsdp_0"
    shards.mkdir()
    assert not is_complete(folder)
    for name in ("__0_0.distcp", index):
        if name is not None:
            (shards / name).write_bytes(b"x")
    assert is_complete(folder) is (index is not None)


def test_a_folder_under_another_name_must_not_be_empty(tmp_path):
    folder = tmp_path / "step-5"
    assert not is_complete(folder)
    folder.mkdir()
    assert not is_complete(folder)
    (folder / "weights").touch()
    assert is_complete(folder)


def test_a_file_that_lacks_its_end_is_none(tmp_path):
    whole = lightning_checkpoint(tmp_path / "step=5.ckpt", 5)
    data = whole.read_bytes()
    for size in (0, 4, len(data) // 2, len(data) - 30):
        torn = tmp_path / f"step={size + 100}.ckpt"
        torn.write_bytes(data[:size])
        assert not is_complete(torn)
    assert not is_complete(tmp_path / "missing.ckpt")
    assert find_checkpoints(tmp_path) == {5: whole}


def test_a_sharded_checkpoint_of_lightning(tmp_path):
    folder = tmp_path / "checkpoints" / "epoch=0-step=7.ckpt"
    folder.mkdir(parents=True)
    for name in ("__0_0.distcp", ".metadata"):
        (folder / name).write_bytes(b"x")
    assert not is_complete(folder)
    torch.save({"global_step": 500}, folder / "meta.pt")
    assert is_complete(folder)
    assert find_checkpoints(tmp_path) == {500: folder}
    (folder / ".metadata").unlink()
    assert not is_complete(folder)


# --- what trainers leave behind


class OfTheUser:
    """What a checkpoint may hold and `weights_only` refuses to load."""


def test_the_step_of_a_file_of_lightning_is_what_the_file_says(tmp_path):
    saved = lightning_checkpoint(tmp_path / "checkpoints" / "epoch=3-step=7.ckpt", 500)
    assert find_checkpoints(tmp_path) == {500: saved}


@pytest.mark.parametrize(
    "name", ["epoch=0-step=500.ckpt", "epoch=0-step=500-v1.ckpt", "step500.ckpt", "a-step_500.ckpt"]
)
@pytest.mark.parametrize("content", [{"global_step": 7, "mine": OfTheUser()}, {"state_dict": {}}, torch.zeros(3), None])
def test_the_step_is_that_of_the_name_where_the_file_cannot_be_read(tmp_path, name, content):
    path = tmp_path / name
    if content is None:
        path.write_bytes(b"of some other format")
    else:
        torch.save(content, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_checkpoints(tmp_path) == {500: path}


def test_a_file_of_which_nobody_knows_the_step_is_left_out(tmp_path):
    (tmp_path / "best.ckpt").write_bytes(b"of some other format")
    torch.save([1, 2], tmp_path / "list.ckpt")
    assert find_checkpoints(tmp_path) == {}


def test_last_is_taken_only_where_there_is_no_other(tmp_path):
    folder = tmp_path / "checkpoints"
    named = lightning_checkpoint(folder / "step=10.ckpt", 10)
    last = lightning_checkpoint(folder / "last.ckpt", 10)
    assert find_checkpoints(tmp_path) == {10: named}
    last = lightning_checkpoint(folder / "last.ckpt", 12)
    assert find_checkpoints(tmp_path) == {10: named, 12: last}


def test_checkpoints_of_huggingface_in_the_order_of_their_steps(tmp_path):
    folders = {step: hf_checkpoint(tmp_path, step) for step in (1000, 900, 20)}
    for other in ("checkpoint-best", "checkpoint-5-old", "run-checkpoint-7"):
        (tmp_path / other).mkdir()
        for name in ("model.safetensors", "trainer_state.json"):
            (tmp_path / other / name).write_bytes(b"{}")
    found = find_checkpoints(tmp_path)
    assert found == folders
    assert list(found) == [20, 900, 1000]


def test_the_state_of_a_checkpoint_is_read_once_for_as_long_as_it_is_the_same(tmp_path, monkeypatch):
    read = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.parent.name) or read_bytes(path))
    record = CheckpointFile(tmp_path, start_step=0)
    for step in (10, 20, 30):
        record.add(step, hf_checkpoint(tmp_path, step))
        record.existing()
    assert read == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_bytes(b'{"torn')
    assert set(record.existing()) == set(record.existing()) == {10, 30}
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_bytes(b'{"whole": "again"}')
    assert set(record.existing()) == {10, 20, 30}
