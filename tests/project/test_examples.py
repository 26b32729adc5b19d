"""Every example runs, in fewer steps than it takes by itself."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ib_callback as ib

EXAMPLES = Path(__file__).parents[2] / "examples"
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example with arguments in a directory of its own, and returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run_example(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_there_is_no_other() -> None:
    named = {"hf_trainer.py", "lightning_trainer.py", "plain_loop.py", "score_checkpoints.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == named


def test_huggingface_and_then_its_checkpoints(run: Run, tmp_path: Path) -> None:
    out = run("hf_trainer.py", "--steps", "21")
    steps = ib.Trajectory.load(tmp_path / "ib_example").steps
    assert steps[0] == 0
    assert {20, 21} <= set(steps), "the checkpoint and the last step"
    assert "The best checkpoint: " in out
    out = run("score_checkpoints.py", "ib_example", "--sequences", "8")
    scores = ib.Trajectory.load(tmp_path / "ib_example" / "ib_checkpoint_scores.jsonl")
    assert scores.steps == [20, 21]
    assert scores.table() in out


def test_lightning(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # set by the example; put back by this
    out = run("lightning_trainer.py", "--steps", "11")
    (directory,) = tmp_path.glob("ib_example/lightning_logs/*")
    assert ib.Trajectory.load(directory).steps == [0, 10, 11]
    assert f"{directory.relative_to(tmp_path)}/checkpoints/step=10.ckpt" in out


def test_a_plain_loop(run: Run, tmp_path: Path) -> None:
    assert len((EXAMPLES / "plain_loop.py").read_text().splitlines()) < 40
    out = run("plain_loop.py", "60")
    trajectory = ib.Trajectory.load(tmp_path / "ib_trajectory.jsonl")
    assert trajectory.steps[0] == 0
    assert trajectory.table() in out
    best = trajectory.best("optimality", select_from="fit")
    assert best is not None
    assert 0 < best.step <= 60
    assert torch.load(tmp_path / "best.pt", weights_only=True).keys()
