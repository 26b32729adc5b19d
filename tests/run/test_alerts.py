from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripted import COURSE, follow
from synthetic_runs import STOPPING
from tiny_hf import tiny_model, tiny_probe

import ib_callback as ib


class Tracker:
    """As much of an open run of W&B as is used."""

    def __init__(self, fails: bool = False) -> None:
        self.alerts: list[tuple[str, str]] = []
        self.summary: dict[str, Any] = {}
        self._fails = fails

    def alert(self, title: str, text: str) -> None:
        if self._fails:
            raise ConnectionError("no network")
        self.alerts.append((title, text))

    def log(self, row: Any) -> None:
        pass

    def define_metric(self, *args: Any, **keywords: Any) -> None:
        pass


def along(directory: Path, tracker: Any, steps: range = range(28), **keywords: Any) -> None:
    meter = ib.Meter(tiny_probe(), orders="token")
    settings = {"every_n_steps": 1, "alert": True, "log_plane": False, "console": False, **keywords}
    model: torch.nn.Module = tiny_model()
    with ib.Run(meter, output_dir=directory, wandb=tracker, **settings) as run:
        for step in steps:
            run.step(model, step)


@pytest.fixture(autouse=True)
def no_other_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None, Table=lambda columns, data: None))


STOPS = {"early_stopping": ib.PlateauStopping(**STOPPING)}


def test_a_decision_to_stop_is_one_alert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    tracker = Tracker()
    along(tmp_path, tracker, **STOPS)
    ((title, text),) = tracker.alerts
    assert title == "ib: plateau at step 23"
    assert text.startswith("training stops: distance_to_bound has not improved")
    silent = Tracker()
    along(tmp_path / "silent", silent, **STOPS, alert=False)
    assert silent.alerts == []


def test_a_resumed_run_does_not_repeat_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    along(tmp_path, Tracker(), range(24), **STOPS)
    again = Tracker()
    along(tmp_path, again, range(23, 28), **STOPS)
    assert again.alerts == []


def test_a_collapse_is_told_without_a_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collapsed = replace(COURSE[2], step=12)
    follow(monkeypatch, ib.Trajectory(collapsed if m.step == 12 else m for m in COURSE))
    tracker = Tracker()
    along(tmp_path, tracker, range(16))
    assert [title for title, _ in tracker.alerts] == ["ib: collapsed at step 12"]


def test_trackio_gets_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    seen: list[str] = []
    variables = SimpleNamespace(current_run=SimpleNamespace(get=lambda: object()))
    trackio = SimpleNamespace(context_vars=variables, alert=lambda title, text: seen.append(title))
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    along(tmp_path, None, **STOPS)
    assert seen == ["ib: plateau at step 23"]


@pytest.mark.filterwarnings("ignore:The alert .* reached nobody")
def test_one_that_fails_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    with pytest.warns(
        RuntimeWarning, match=r"sent to Weights & Biases\. Training goes on\. ConnectionError: no network"
    ):
        along(tmp_path, Tracker(fails=True), **STOPS)


def test_one_that_reaches_nobody_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    with pytest.warns(
        RuntimeWarning, match=r"reached nobody: expected an open run of Weights & Biases or Trackio, got"
    ):
        along(tmp_path, None, **STOPS)
