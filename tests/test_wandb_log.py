from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tiny_hf import tiny_callback, tiny_trainer
from wandb_offline import read_offline_runs

from ib_callback.wandb_log import WandbLog, open_run


class FakeRun:
    """Remembers what it is given; `broken` methods raise."""

    def __init__(self, *broken: str) -> None:
        self.broken = broken
        self.rows: list[dict[str, Any]] = []
        self.defined: list[tuple[str, str]] = []

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.defined.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        if "log" in self.broken:
            raise ConnectionError("the service has gone")
        self.rows.append(row)


def test_rows_of_an_offline_run_of_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()  # W&B reads its environment once in a process, perhaps for an earlier test
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    callback = tiny_callback(every_n_steps=5, log_plane=True)
    try:
        tiny_trainer(tmp_path / "run", [callback], steps=12, report_to="wandb", run_name="tiny").train()
    finally:
        wandb.finish()

    (run,) = read_offline_runs(tmp_path)
    rows = [row for row in run.rows if any(key.startswith("ib/") for key in row)]
    assert [row["train/global_step"] for row in rows] == [0, 5, 10, 12]
    for row, point in zip(rows, callback.trajectory, strict=True):
        scalars = {key: value for key, value in row.items() if key in point.metrics()}
        assert scalars == pytest.approx(point.metrics(), rel=1e-12)
        assert row["ib/plane/_type"] == "image-file"
        with Image.open(run.files / row["ib/plane/path"]) as image:
            assert image.format == "PNG"
            assert image.size == (row["ib/plane/width"], row["ib/plane/height"])
            assert image.width > 500
    assert run.step_metrics["ib/*"] == "train/global_step"
    losses = [row["train/global_step"] for row in run.rows if "train/loss" in row]
    assert losses == [3, 6, 9, 12], "the trainer's own rows have suffered"


def test_an_open_run_is_found_and_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert open_run() is None
    assert "wandb" not in sys.modules
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None))
    assert open_run() is None
    run = object()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=run))
    assert open_run() is run


def test_the_step_is_a_column_and_described_once_a_run() -> None:
    log = WandbLog("trainer/global_step")
    first, second = FakeRun(), FakeRun()
    log.log(first, {"ib/complexity": 0.5}, step=3)
    log.log(first, {"ib/complexity": 0.6}, step=6)
    log.log(second, {"ib/complexity": 0.7}, step=9)
    log.log(second, {}, step=10)
    assert first.rows == [
        {"ib/complexity": 0.5, "trainer/global_step": 3},
        {"ib/complexity": 0.6, "trainer/global_step": 6},
    ]
    assert second.rows == [{"ib/complexity": 0.7, "trainer/global_step": 9}]
    assert first.defined == second.defined == [("ib/*", "trainer/global_step")]


def test_a_run_that_fails_is_one_warning() -> None:
    log = WandbLog("train/global_step")
    with pytest.warns(RuntimeWarning, match="could not be logged to Weights & Biases: ConnectionError: the service"):
        log.log(FakeRun("log"), {"ib/complexity": 0.5}, step=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.log(FakeRun("log"), {"ib/complexity": 0.5}, step=6)


def test_scalars_are_logged_without_a_picture_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def image(path: str) -> None:
        raise OSError("cannot identify image file")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=image))
    run = FakeRun()
    with pytest.warns(RuntimeWarning, match=r"plane\.png could not be logged to Weights & Biases: OSError"):
        WandbLog("train/global_step").log(run, {"ib/complexity": 0.5}, step=3, plane=tmp_path / "plane.png")
    assert run.rows == [{"ib/complexity": 0.5, "train/global_step": 3}]
