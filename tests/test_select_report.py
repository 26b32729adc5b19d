from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_runs import C, E, run
from tiny_hf import tiny_callback, tiny_trainer

from ib_callback.checkpoints import FILENAME, CheckpointFile, find_checkpoints, is_complete
from ib_callback.cli import main
from ib_callback.errors import TrajectoryError
from ib_callback.select_report import select_report


def make_checkpoint(directory: Path, step: int) -> Path:
    folder = directory / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "trainer_state.json", "optimizer.pt"):
        (folder / name).write_bytes(b"{}")
    return folder


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The course of `synthetic_runs`: optimality is highest, .8, from 2000 on; compression begins at 1000."""
    run(C, E).save(tmp_path / "ib_trajectory.jsonl")
    return tmp_path


def test_the_best_of_those_that_exist(directory: Path) -> None:
    for step in (500, 1500, 1800, 2500):
        make_checkpoint(directory, step)
    (directory / "checkpoint-2500" / "trainer_state.json").unlink()  # half-deleted
    report = select_report(directory)
    assert report.path == directory / "checkpoint-1800"
    assert report.choice.runner_up is not None
    assert report.choice.runner_up.measurement.step == 1500
    lines = report.text.splitlines()
    assert any(line.split()[0] == "1,800" and line.endswith("best") for line in lines if line)
    assert any("not in the compression phase" in line and "checkpoint-500" in line for line in lines)
    assert "A better point, step 2,000 with 0.8, has no checkpoint." in report.text


def test_the_record_alone_tells_whose_checkpoints_they_are(directory: Path) -> None:
    record = CheckpointFile(directory, start_step=0)
    for step in (1500, 1800, 2500):
        record.add(step, make_checkpoint(directory, step))
    make_checkpoint(directory, 2600)
    (directory / "checkpoint-2500" / "model.safetensors").unlink()
    text = select_report(directory).text
    assert select_report(directory).path == directory / "checkpoint-1800"
    assert any(line.startswith("2,500") and "its checkpoint is gone" in line for line in text.splitlines())
    assert any(line.startswith("2,600") and f"not in {FILENAME}" in line for line in text.splitlines())


def test_the_command(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["select", str(directory)]) == 1
    assert "No point can be selected" in capsys.readouterr().err
    folder = make_checkpoint(directory, 2000)
    assert main(["select", str(directory.parent / directory.name), "--by", "optimality", "--path-only"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert main(["select", str(directory), "--by", "optimallity"]) == 1
    assert "no metric 'optimallity' is measured; those measured: complexity" in capsys.readouterr().err
    assert main(["select", str(directory / "checkpoint-2000")]) == 1
    assert "no ib_trajectory.jsonl in" in capsys.readouterr().err


def test_a_run_below_the_directory(directory: Path, tmp_path: Path) -> None:
    version = tmp_path / "lightning_logs" / "version_0"
    version.mkdir(parents=True)
    (directory / "ib_trajectory.jsonl").rename(version / "ib_trajectory.jsonl")
    (version / "checkpoints").mkdir()
    saved = version / "checkpoints" / "epoch=0-step=2000.ckpt"
    saved.write_bytes(b"not a checkpoint that could be read")
    assert select_report(tmp_path).path == saved
    other = tmp_path / "lightning_logs" / "version_1"
    other.mkdir()
    run(C, E).save(other / "ib_trajectory.jsonl")
    with pytest.raises(TrajectoryError, match=r"several runs: .*version_0.*version_1"):
        select_report(tmp_path)


def test_a_real_run(tmp_path: Path) -> None:
    callback = tiny_callback(every_n_steps=3, select="optimality", select_from=3)
    tiny_trainer(tmp_path, [callback], steps=12, save_strategy="steps", save_steps=3, save_total_limit=2).train()
    report = select_report(tmp_path, select_from=3)
    assert callback.selected is not None
    assert report.path is not None
    assert report.path.name == f"checkpoint-{callback.selected.step}"


def test_the_record_of_checkpoints(tmp_path: Path) -> None:
    record = CheckpointFile(tmp_path, start_step=0)
    record.add(10, make_checkpoint(tmp_path, 10))
    record.add(20, make_checkpoint(tmp_path, 20))
    with open(tmp_path / FILENAME, "ab") as file:
        file.write(b'{"step": 3')
    with pytest.warns(RuntimeWarning, match="last line is torn"):
        resumed = CheckpointFile(tmp_path, start_step=10)
    assert list(resumed.existing()) == [10]
    fresh = CheckpointFile(tmp_path, start_step=0)
    assert fresh.existing() == {}
    assert (tmp_path / "ib_checkpoints.1.jsonl").exists()


def test_a_path_written_again_holds_the_later_step(tmp_path: Path) -> None:
    record, last = CheckpointFile(tmp_path, start_step=0), tmp_path / "last.ckpt"
    last.write_bytes(b"weights")
    record.add(10, last)
    record.add(20, last)
    assert record.existing() == {20: last}
    assert record.recorded() == {10, 20}


def test_complete_checkpoints_only(tmp_path: Path) -> None:
    whole, half = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 6)
    (half / "trainer_state.json").unlink()
    assert is_complete(whole)
    assert not is_complete(half)
    assert find_checkpoints(tmp_path) == {5: whole}
