from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_hf import tiny_callback, tiny_trainer
from wandb_offline import read_offline_runs

from ib_callback import Trajectory
from ib_callback.analysis.report import report
from ib_callback.cli.demo import _deadline
from ib_callback.cli.report import told
from ib_callback.results.trajectory import FILENAME


@dataclass
class Demo:
    directory: Path
    home: Path
    out: str
    err: str
    status: int


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """`ib-callback demo` in an empty directory that has one file of an earlier run, with an empty home."""
    directory, home = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("home")
    (directory / "ib_demo").mkdir()
    (directory / "ib_demo" / FILENAME).write_text("an earlier run\n")
    root = str(Path(__file__).parents[2])
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WANDB_", "HF_", "XDG_", "MPL")) and name != "NETRC"
    }
    environment |= {"HOME": str(home), "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "ib_callback.cli.main", "demo", "--steps", "12", "--every", "4", "--minutes", "60"],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    return Demo(directory / "ib_demo", home, done.stdout, done.stderr, done.returncode)


def test_it_succeeds_quietly(ran: Demo) -> None:
    assert ran.status == 0, ran.err
    assert "warning" not in (ran.out + ran.err).lower()
    assert "12/12" in ran.err, "the progress bar"


def test_its_files(ran: Demo) -> None:
    trajectory = Trajectory.load(ran.directory)
    assert trajectory.steps == [0, 4, 8, 12]
    assert all(point.error is None for point in trajectory)
    assert list(trajectory[0]) == ["token", "bigram", "trigram", "quadgram"]
    assert trajectory[-1].tokens_seen == 12 * 1024
    assert (ran.directory / "information_plane.png").read_bytes().startswith(b"\x89PNG")
    assert (ran.directory / "ib_trajectory.1.jsonl").read_text() == "an earlier run\n"
    (run,) = read_offline_runs(ran.directory)
    assert [row["train/global_step"] for row in run.rows if "ib/complexity" in row] == trajectory.steps


def test_it_writes_below_its_directory_only(ran: Demo) -> None:
    assert [path for path in ran.home.rglob("*") if path.is_file()] == []
    assert [path.name for path in ran.directory.parent.iterdir()] == ["ib_demo"]


def test_its_table_has_the_points_and_the_loss(ran: Demo) -> None:
    trajectory = Trajectory.load(ran.directory)
    rows = [line.split() for line in ran.out.splitlines() if re.match(r" *\d+  ", line)]
    assert [int(row[0]) for row in rows] == trajectory.steps
    expected = [[f"{point.loss:.4f}", f"{point.complexity:.4f}"] for point in trajectory]
    assert [[row[2], row[6]] for row in rows] == expected, "between them the plane of predictions"
    losses = [float(row[1]) for row in rows]
    assert 8.2 < losses[0] < 8.5, "an untrained model of 4,096 tokens"
    assert losses[-1] < losses[0] - 0.5


def test_it_says_where_everything_is(ran: Demo) -> None:
    for line in ran.out.splitlines():
        if line.startswith(("information plane", "trajectory", "W&B run")):
            assert (ran.directory.parent / line.split()[-1]).exists(), line
    assert "wandb sync ib_demo" in ran.out


def test_it_prints_the_report_of_its_run(ran: Demo) -> None:
    whole = report(Trajectory.load(ran.directory))
    assert " ".join(told([whole]).split()) in " ".join(ran.out.split())


def test_its_training_ends_in_time(tmp_path: Path) -> None:
    callback = tiny_callback(every_n_steps=100)
    tiny_trainer(tmp_path, [callback, _deadline(time.perf_counter() + 3600)], steps=3).train()
    assert callback.trajectory.steps == [0, 3]
    tiny_trainer(tmp_path, [callback, _deadline(time.perf_counter() - 1)], steps=3).train()
    assert callback.trajectory.steps == [0, 1]
