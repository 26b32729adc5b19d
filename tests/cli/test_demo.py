from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from synthetic_runs import run as synthetic_run
from tiny_hf import tiny_callback, tiny_trainer
from wandb_offline import read_offline_runs

from ib_callback import Trajectory
from ib_callback.cli.demo import Story, _deadline, schedule_of
from ib_callback.results.trajectory import FILENAME

# A probe that is smaller than the demonstration's own.
_RUN = """
from ib_callback.cli import demo, main
demo.PROBE_SEQUENCES, demo.TEXTS = 16, 100
raise SystemExit(main.main(["demo", "--steps", "12", "--every", "4", "--minutes", "60", "--quick"]))
"""
# A run that collapses at its third point, fits and compresses. The loss of the collapsed model is high.
COMPLEXITY = [0.5, 0.3, 0.05, 0.1, 0.25, 0.4, *[0.42 - 0.008 * k for k in range(14)]]
EXPRESSIVITY = [0.2, 0.1, 0.03, 0.08, 0.15, 0.22, *[0.23 + 0.001 * k for k in range(14)]]


@dataclass
class Demo:
    directory: Path
    home: Path
    out: str
    err: str
    status: int


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """`ib-callback demo` in a directory that has one file of an earlier run, with an empty home.

    The prepared text comes from the cache of the tests, because it takes long to prepare.
    """
    directory, home = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("home")
    (directory / "ib_demo").mkdir()
    (directory / "ib_demo" / FILENAME).write_text("an earlier run\n")
    root = str(Path(__file__).parents[2])
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WANDB_", "HF_", "XDG_CONFIG", "XDG_DATA", "MPL")) and name != "NETRC"
    }
    environment |= {"HOME": str(home), "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", _RUN],
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
    for name in ("information_plane.png", "annotated_plane.png"):
        assert (ran.directory / name).read_bytes().startswith(b"\x89PNG")
    assert (ran.directory / "ib_trajectory.1.jsonl").read_text() == "an earlier run\n"
    (run,) = read_offline_runs(ran.directory)
    assert [row["train/global_step"] for row in run.rows if "ib/complexity" in row] == trajectory.steps


def test_it_writes_below_its_directory_only(ran: Demo) -> None:
    assert [path for path in ran.home.rglob("*") if path.is_file()] == []
    assert [path.name for path in ran.directory.parent.iterdir()] == ["ib_demo"]


def test_its_table_has_the_points_and_the_loss(ran: Demo) -> None:
    trajectory = Trajectory.load(ran.directory)
    rows = [line.split() for line in ran.out.splitlines() if re.match(r" *\d+  +\d", line)]
    assert [int(row[0]) for row in rows] == trajectory.steps
    # In so short a run, the local information of a point may not be resolved, and then it has no score.
    scores = [p["prediction/token"].score_local for p in trajectory]
    expected = [
        [f"{p.loss:.3f}", "-" if score is None else f"{score:.4f}", f"{p.complexity:.3f}"]
        for p, score in zip(trajectory, scores, strict=True)
    ]
    assert [[row[1], row[2], row[5]] for row in rows] == expected
    assert trajectory[0].loss is not None and trajectory[-1].loss is not None
    assert 8.2 < trajectory[0].loss < 8.5, "an untrained model of 4,096 tokens"
    assert trajectory[-1].loss < trajectory[0].loss - 0.3


def test_it_says_where_everything_is_and_what_is_next(ran: Demo) -> None:
    files = ran.out.split("\nFiles\n")[1].split("\n\n")[0].splitlines()
    assert len(files) == 4
    for line in files:
        assert (ran.directory.parent / line.split()[0]).exists(), line
    assert "ib-callback report ib_demo" in ran.out
    assert "wandb sync ib_demo" in ran.out


def test_a_quick_run_says_that_it_is_too_short(ran: Demo) -> None:
    assert "too short for the phases" in ran.out
    assert "did not reach the" in words(ran.out)
    assert "step 0:" not in ran.err, "no line for each measurement"


def words(text: str) -> str:
    return " ".join(text.split())


def story(complexity: list[float], expressivity: list[float]) -> Story:
    points = synthetic_run(complexity, expressivity)
    return Story(Trajectory(replace(point, loss=8.0 - 0.2 * number) for number, point in enumerate(points)))


def test_the_story_tells_the_phases_and_what_each_rule_would_do() -> None:
    points = synthetic_run(COMPLEXITY, EXPRESSIVITY)
    phases = points.phases()
    assert phases.compression_start is not None
    told = story(COMPLEXITY, EXPRESSIVITY)
    text = " ".join(told.sentences())
    collapse = points[2].step
    assert f"Collapse: by step {collapse:,} complexity has fallen to 0.050." in text
    assert f"fitting begins at step {phases.fit_start:,}," in text
    assert f"Compression begins at step {phases.compression_start:,} " in text
    assert f"would keep step {collapse:,} (loss 7.60). This is the collapsed model." in text
    assert f"The lowest loss is at step {points[-1].step:,}" in text
    rows = {line.split()[0]: line for line in told.table().splitlines()[2:]}
    assert "collapse" in rows[f"{collapse:,}"]
    assert "compression begins" in rows[f"{phases.compression_start:,}"]
    assert "untrained" in rows[f"{points[0].step:,}"]
    assert "lowest loss, trained" in rows[f"{points[-1].step:,}"]


def test_the_story_of_a_run_without_them_says_so() -> None:
    text = " ".join(story([0.3] * 6, [0.1] * 6).sentences())
    assert "this run shows none" in text
    assert "This run did not reach" in text or "this run did not reach" in text
    assert story([0.3], [0.1]).sentences() == ["Fewer than two points could be measured, so nothing can be concluded."]


def test_it_measures_often_at_first_and_not_too_often_later() -> None:
    first, long = schedule_of(80), schedule_of(100_000)
    assert [step for step in range(40, 100) if first(step)] == [40, 48, 56, 64], "the last step is measured anyway"
    assert sum(map(long, range(100_000))) < 90


def test_its_training_ends_in_time(tmp_path: Path) -> None:
    callback = tiny_callback(every_n_steps=100)
    tiny_trainer(tmp_path, [callback, _deadline(time.perf_counter() + 3600)], steps=3).train()
    assert callback.trajectory.steps == [0, 3]
    tiny_trainer(tmp_path, [callback, _deadline(time.perf_counter() - 1)], steps=3).train()
    assert callback.trajectory.steps == [0, 1]
