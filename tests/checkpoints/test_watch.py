"""A sidecar beside a real Trainer, whose callback writes elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import wandb
from filelock import FileLock, Timeout
from tiny_hf import Each, tiny_callback, tiny_model, tiny_probe, tiny_trainer
from wandb import teardown
from wandb_offline import read_offline_runs

from ib_callback import Trajectory
from ib_callback.checkpoints.load import Loading
from ib_callback.checkpoints.material import Material
from ib_callback.checkpoints.sweep import Sweep
from ib_callback.checkpoints.watch import Watch, watch
from ib_callback.cli.main import main
from ib_callback.common.errors import TrajectoryError
from ib_callback.run.lock import FILENAME

METER = {"num_bins": 12, "batch_size": 3}


def sweep(run: Path, **meter: Any) -> Sweep:
    return Sweep(material={run.name: Material(tiny_probe(), ())}, meter={**METER, **meter}, loading=Loading())


def checkpoint(run: Path, step: int) -> None:
    """As the Trainer leaves it, its last file last."""
    folder = run / f"checkpoint-{step}"
    tiny_model(step).save_pretrained(folder)
    (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')


def test_a_sidecar_measures_what_the_callback_does_at_the_saved_steps(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    more: dict[str, Any] = {"center": True, "companions": ("rankme", "alpha_req"), "standard_errors": True}
    watching = Watch(run, sweep(run, **more))
    seen: list[int] = []
    callback = tiny_callback(every_n_steps=2, output_dir=tmp_path / "callback", **more)
    look = Each("on_save", lambda *_: seen.append(watching.poll()))
    tiny_trainer(run, [callback, look], steps=6, save_strategy="steps", save_steps=2).train()
    watching.close()
    assert seen == [1, 1, 1]
    trajectory, followed = Trajectory.load(run), Trajectory.load(tmp_path / "callback")
    assert trajectory.steps == [2, 4, 6]
    for point, other in zip(trajectory, followed[-3:], strict=True):
        own, theirs = point.to_dict(), other.to_dict()
        assert {name for name in own if own[name] != theirs[name]} <= {"seconds", "overhead", "tokens_seen"}
        assert own.keys() == theirs.keys() - {"train_loss"}


def test_the_trajectory_is_written_by_one_alone(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lock = FileLock(run / FILENAME, blocking=False, thread_local=False)  # as another process holds it
    with lock, pytest.raises(TrajectoryError, match=r"another live run, in another process, writes its trajectory"):
        Watch(run, sweep(run))
    watching = Watch(run, sweep(run))
    with pytest.raises(Timeout):
        lock.acquire()
    watching.close()
    lock.acquire()
    lock.release()


def test_what_was_measured_before_is_kept_and_half_a_checkpoint_is_waited_for(tmp_path):
    run = tmp_path / "run"
    checkpoint(run, 5)
    assert watch(run, sweep(run), every=1.0, until=5) == []
    checkpoint(run, 10)
    (run / "checkpoint-10" / "trainer_state.json").rename(run / "later")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            (run / "later").rename(run / "checkpoint-10" / "trainer_state.json")

    assert watch(run, sweep(run), every=1.0, idle=3.0, sleep=sleep) == []
    assert waits == [1.0] * 5  # two until it is whole, three in vain
    assert Trajectory.load(run).steps == [5, 10]


def test_other_settings_begin_a_new_trajectory(tmp_path):
    run = tmp_path / "run"
    checkpoint(run, 5)
    watch(run, sweep(run), every=1.0, until=5)
    checkpoint(run, 10)
    watch(run, sweep(run, seed=1), every=1.0, until=10)
    assert Trajectory.load(run).steps == [10]
    assert Trajectory.load(run / "ib_trajectory.1.jsonl").steps == [5]


def test_a_broken_checkpoint_is_tried_again_and_then_a_missing_point(tmp_path):
    run = tmp_path / "run"
    checkpoint(run, 5)
    checkpoint(run, 10)
    (run / "checkpoint-5" / "model.safetensors").write_bytes(b"torn")
    looks: list[float] = []
    (failed,) = watch(run, sweep(run), every=1.0, until=10, sleep=looks.append)
    assert failed[0] == "run checkpoint-5"
    assert len(looks) == 2
    assert [point.error is None for point in Trajectory.load(run)] == [False, True]


def test_it_is_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "run", 5)
    tiny_probe().save("probe.safetensors")
    on = ["--probe", "probe.safetensors", "--num-bins", "12"]
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb"))
    (tmp_path / "wandb").mkdir()
    teardown()  # it reads its settings, the directory among them, once a process
    wandb = ["--wandb-project", "tests", "--wandb-group", "live"]
    assert main(["measure", "--watch", "run", "--until", "5", *on, *wandb]) == 0
    assert Trajectory.load("run").steps == [5]
    assert "step 5: loss" in capsys.readouterr().err
    (logged,) = read_offline_runs(tmp_path / "wandb")
    (row,) = logged.rows
    assert row["ib/step"] == 5
    assert {name: row[name] for name in Trajectory.load("run")[0].metrics()} == Trajectory.load("run")[0].metrics()
    assert logged.step_metrics == {"ib/*": "ib/step"}
    assert main(["measure", "--watch", "nowhere", *on]) == 2
    assert main(["measure", "--watch", "run", "run", *on]) == 2
    assert main(["measure", "--watch", "run", "--csv", "r.csv", *on]) == 2
    assert "--csv has no effect with --watch. Leave it out" in capsys.readouterr().err
    assert main(["measure", "run", "-o", "r.jsonl", "--idle", "5", *on]) == 2
    assert "--idle only works with --watch. Leave it out" in capsys.readouterr().err
    assert main(["measure", *on]) == 2
    assert "expected at least one MODEL and -o FILE, or --watch RUN_DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ("abc123", {"entity": None, "project": None}),
        ("p/abc123", {"entity": None, "project": "p"}),
        ("us/p/abc123", {"entity": "us", "project": "p"}),
    ],
)
def test_points_go_into_a_shared_live_run(tmp_path, monkeypatch, given, where):
    class Run:
        """Stands in for the run of a server that this machine has not."""

        def __init__(self) -> None:
            self.calls: list[tuple[Any, ...]] = []

        def define_metric(self, name: str, *, step_metric: str) -> None:
            self.calls.append(("axis", name, step_metric))

        def log(self, row: dict[str, Any]) -> None:
            self.calls.append(("log", row))

        def finish(self) -> None:
            self.calls.append(("finish",))

    run, opened = Run(), []
    monkeypatch.setattr(wandb, "init", lambda **settings: opened.append(settings) or run)
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "run", 5)
    tiny_probe().save("probe.safetensors")
    on = ["--probe", "probe.safetensors", "--num-bins", "12", "--until", "5", "--wandb-shared-run", given]
    assert main(["measure", "--watch", "run", *on]) == 0
    (settings,) = opened
    shared = wandb.Settings(**settings.pop("settings"))  # which knows all of these names
    assert (shared.mode, shared.x_primary, shared.x_update_finish_state) == ("shared", False, False)
    assert shared.x_label == "ib"
    assert settings == {"id": "abc123", **where}
    row = {**Trajectory.load("run")[0].metrics(), "ib/step": 5}
    assert run.calls == [("axis", "ib/*", "ib/step"), ("log", row), ("finish",)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--wandb-shared-run", "a", "--wandb-project", "p"],
            "because that run exists already. Name its project as PROJECT/a",
        ),
        (["--wandb-shared-run", "a//b"], "expected ID, PROJECT/ID or ENTITY/PROJECT/ID, got 'a//b'"),
    ],
)
def test_a_shared_run_that_cannot_be_meant(tmp_path, capsys, more, message):
    checkpoint(tmp_path / "run", 5)
    tiny_probe().save(tmp_path / "probe.safetensors")
    watch_it = ["measure", "--watch", str(tmp_path / "run"), "--probe", str(tmp_path / "probe.safetensors")]
    assert main([*watch_it, *more]) == 2
    assert message in capsys.readouterr().err
