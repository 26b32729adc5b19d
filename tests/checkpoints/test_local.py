from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ib_callback.checkpoints.find import Wanted, find_checkpoints, shard_of
from ib_callback.checkpoints.local import find_local
from ib_callback.common.errors import ModelError


def hf(path: Path, *, step: int | None = None, tokens: int = 0) -> Path:
    """A folder as HuggingFace's Trainer leaves it, without its weights' content."""
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"x")
    if step is not None:
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "num_input_tokens_seen": tokens}))
    return path


def lightning(path: Path, step: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, "global_step": step}, path)
    return path


def found(path: Path) -> list[tuple[str | None, int | None]]:
    return [(checkpoint.revision, checkpoint.step) for checkpoint in find_local(path, "m")]


def test_every_checkpoint_of_a_run_in_the_order_of_its_steps(tmp_path):
    for step in (1000, 50, 9):
        hf(tmp_path / f"checkpoint-{step}", step=step, tokens=step * 7)
    (tmp_path / "runs").mkdir()  # of TensorBoard
    (tmp_path / "training_args.bin").write_bytes(b"x")
    checkpoints = find_local(tmp_path, "m")
    assert [(c.revision, c.step, c.tokens) for c in checkpoints] == [
        ("checkpoint-9", 9, 63), ("checkpoint-50", 50, 350), ("checkpoint-1000", 1000, 7000)
    ]  # fmt: skip
    assert {c.model for c in checkpoints} == {"m"}
    assert checkpoints[0].place.source == str(tmp_path / "checkpoint-9")


def test_a_checkpoint_that_the_trainer_did_not_write_is_one_too(tmp_path):
    for name in ("step-10", "step-2"):
        hf(tmp_path / name)
    hf(tmp_path / "final")
    assert found(tmp_path) == [("step-2", 2), ("step-10", 10), ("final", None)]


def test_checkpoints_that_were_kept_have_the_step_of_the_record(tmp_path):
    hf(tmp_path / "kept-checkpoint-1", step=30)
    hf(tmp_path / "checkpoint-40", step=40)
    record = [{"step": 30, "path": "kept-checkpoint-1"}]
    (tmp_path / "ib_checkpoints.jsonl").write_text("".join(json.dumps(line) + "\n" for line in record))
    assert found(tmp_path) == [("kept-checkpoint-1", 30), ("checkpoint-40", 40)]


def test_lightnings_files_know_their_step(tmp_path):
    lightning(tmp_path / "checkpoints" / "best.ckpt", 20)
    lightning(tmp_path / "checkpoints" / "epoch=0-step=5.ckpt", 5)
    assert found(tmp_path) == [("epoch=0-step=5.ckpt", 5), ("best.ckpt", 20)]
    assert found(tmp_path / "checkpoints") == [("epoch=0-step=5.ckpt", 5), ("best.ckpt", 20)]


def test_several_runs_of_lightning_in_one_folder_are_not_merged(tmp_path, capsys):
    logs = tmp_path / "lightning_logs"
    for version, steps in (("version_0", (5, 10)), ("version_1", (5,))):
        for step in steps:
            lightning(logs / version / "checkpoints" / f"epoch=0-step={step}.ckpt", step)
    expected = [("version_0", 5), ("version_0", 10), ("version_1", 5)]
    for path, before in ((logs, "lightning_logs/"), (tmp_path, f"{tmp_path.name}/")):
        assert [(model, step) for model, _, step in wanted(path)] == [(before + name, step) for name, step in expected]
    assert "holds several runs. Each counts as a model: " in capsys.readouterr().out
    assert [(model, step) for model, _, step in wanted(logs / "version_0")] == [("version_0", 5), ("version_0", 10)]
    assert [model for model, _, _ in wanted(logs, name="one")] == ["one"] * 3
    # Of other loggers; and what a callback has recorded as one run is one.
    for run, step in (("abc", 5), ("xyz", 20)):
        lightning(tmp_path / "other" / run / "checkpoints" / f"step={step}.ckpt", step)
    assert [model for model, _, _ in wanted(tmp_path / "other")] == ["other/abc", "other/xyz"]
    record = [{"step": step, "path": f"{run}/checkpoints/step={step}.ckpt"} for run, step in (("abc", 5), ("xyz", 20))]
    (tmp_path / "other" / "ib_checkpoints.jsonl").write_text("".join(json.dumps(line) + "\n" for line in record))
    assert [(model, step) for model, _, step in wanted(tmp_path / "other")] == [("other", 5), ("other", 20)]


def test_several_callbacks_of_one_run_of_lightning_are_one_run(tmp_path):
    for folder, step in (("best", 5), ("all", 10)):
        lightning(tmp_path / "version_3" / "checkpoints" / folder / f"step={step}.ckpt", step)
    assert [(model, step) for model, _, step in wanted(tmp_path / "version_3")] == [("version_3", 5), ("version_3", 10)]


def test_files_of_own_loops_are_taken_by_the_step_in_their_name(tmp_path):
    for name in ("step_5.pt", "step_50.pt", "optimizer.pt", "log.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert found(tmp_path) == [("step_5.pt", 5), ("step_50.pt", 50)]


def test_a_final_model_beside_its_checkpoints_hides_none_of_them(tmp_path):
    for step in (5, 10):
        hf(tmp_path / "run" / f"checkpoint-{step}", step=step)
    hf_files = hf(tmp_path / "final")
    for file in hf_files.iterdir():
        file.rename(tmp_path / "run" / file.name)
    assert found(tmp_path / "run") == [("checkpoint-5", 5), ("checkpoint-10", 10)]
    (tmp_path / "run" / "trainer_state.json").write_text('{"global_step": 12}')
    assert found(tmp_path / "run") == [("checkpoint-5", 5), ("checkpoint-10", 10), ("run", 12)]


def test_a_torn_file_of_lightning_is_not_left_out(tmp_path):
    whole = lightning(tmp_path / "checkpoints" / "step=5.ckpt", 5).read_bytes()
    (tmp_path / "checkpoints" / "step=9.ckpt").write_bytes(whole[: len(whole) // 2])
    assert found(tmp_path) == [("step=5.ckpt", 5), ("step=9.ckpt", 9)]


@pytest.mark.parametrize("name", ["config.json", "weights.gguf", "adapter_config.json", ".metadata"])
def test_a_folder_that_is_a_model_is_one(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    assert found(tmp_path) == [(None, None)]


def test_a_single_checkpoint_has_its_step(tmp_path):
    assert found(hf(tmp_path / "checkpoint-7")) == [(None, 7)]
    assert found(lightning(tmp_path / "step=4.ckpt", 4)) == [(None, 4)]
    assert found(lightning(tmp_path / "best.ckpt", 6)) == [(None, 6)]


def test_a_folder_of_nothing_is_told(tmp_path):
    with pytest.raises(ModelError, match="expected a model or a folder with checkpoints, got neither"):
        find_local(tmp_path, "m")


# --- from what is asked for


def wanted(*models: Path, **options: object) -> list[tuple[str, str | None, int | None]]:
    checkpoints, equal = find_checkpoints(Wanted(models=list(map(str, models)), **options), print)
    assert equal == []
    return [(c.model, c.revision, c.step) for c in checkpoints]


def test_models_are_called_by_as_much_of_their_path_as_tells_them_apart(tmp_path):
    paths = [hf(tmp_path / "a" / "out"), hf(tmp_path / "b" / "out"), hf(tmp_path / "c" / "other")]
    assert [name for name, _, _ in wanted(*paths)] == ["a/out", "b/out", "other"]
    lightning(tmp_path / "d" / "checkpoints" / "step=1.ckpt", 1)
    assert wanted(tmp_path / "d" / "checkpoints") == [("d", "step=1.ckpt", 1)]


def test_one_name_makes_one_course(tmp_path):
    for run, step in (("a", 5), ("b", 2)):
        hf(tmp_path / run / f"checkpoint-{step}")
    together = [("whole", "checkpoint-2", 2), ("whole", "checkpoint-5", 5)]
    assert wanted(tmp_path / "a", tmp_path / "b", name="whole") == together


def test_the_same_revision_of_two_places_is_called_by_its_place(tmp_path):
    for run in "ab":
        hf(tmp_path / run / "checkpoint-5")
    names = [revision for _, revision, _ in wanted(tmp_path / "a", tmp_path / "b", name="whole")]
    assert names == [f"{tmp_path}/{run}/checkpoint-5@checkpoint-5" for run in "ab"]


def test_what_is_given_twice_is_measured_once(tmp_path):
    hf(tmp_path / "run" / "checkpoint-5")
    run, single = tmp_path / "run", tmp_path / "run" / "checkpoint-5"
    assert wanted(run, run) == [("run", "checkpoint-5", 5)]
    assert wanted(run, single, name="m") == [("m", "checkpoint-5", 5)]


def test_a_gguf_file_that_was_named_is_another_revision_than_those_beside_it(tmp_path):
    for name in ("small-Q4.gguf", "small-Q8.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    revisions = [wanted(tmp_path, gguf=glob)[0][1] for glob in (None, "*Q4*", "*Q8*", "*")]
    assert revisions == [None, "small-Q4.gguf", "small-Q8.gguf", None]


def test_untrained_models_stand_before_their_own(tmp_path):
    hf(tmp_path / "a" / "checkpoint-5")
    hf(tmp_path / "b" / "checkpoint-0")
    assert wanted(tmp_path / "a", tmp_path / "b", untrained=True, seed=3) == [
        ("a", "untrained, seed 3", 0), ("a", "checkpoint-5", 5), ("b", "checkpoint-0", 0)
    ]  # fmt: skip


def test_points_are_thinned_for_each_model(tmp_path):
    for run in "ab":
        for step in (1, 10, 90, 100, 1000):
            hf(tmp_path / run / f"checkpoint-{step}")
    steps = [step for _, _, step in wanted(tmp_path / "a", tmp_path / "b", max_points=4)]
    assert steps == [1, 10, 100, 1000] * 2


def test_shards_are_disjoint_and_whole(tmp_path):
    for step in range(7):
        hf(tmp_path / f"checkpoint-{step}")
    checkpoints, _ = find_checkpoints(Wanted(models=[str(tmp_path)]), print)
    parts = [shard_of(checkpoints, (number, 3)) for number in (1, 2, 3)]
    assert sorted((c.step for part in parts for c in part), key=int) == list(range(7))
    assert [len(part) for part in parts] == [3, 2, 2]
    # One process knows of equal weights, of which another one could not be told.
    fewer = [c for c in checkpoints if c.step != 2]
    assert [c.step for c in shard_of(fewer, (1, 3))] == [0, 3, 6]
    untrained, _ = find_checkpoints(Wanted(models=[str(tmp_path / "checkpoint-1")], untrained=True), print)
    assert [c.step for c in shard_of(untrained, (1, 2))] == [0, 1]
