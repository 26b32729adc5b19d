from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import COURSE, follow
from synthetic_runs import STOPPING
from tiny_hf import tiny_callback, tiny_model, tiny_probe, tiny_trainer

import ib_callback as ib
from ib_callback.run.console import say
from ib_callback.run.schedule import count, logarithmic


@pytest.mark.parametrize("step", [0, 1, 37])
@pytest.mark.parametrize("schedule", [ib.logarithmic(3), ib.every(7), logarithmic(8)])
def test_a_schedule_is_counted_without_asking_it(schedule: Any, step: int) -> None:
    assert count(schedule, step, 1000) == sum(schedule(s) for s in range(step + 1, 1001))
    assert count(lambda s: True, 0, 10) is None


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO, logger="ib_callback")
    return lambda begin: [m for m in caplog.messages if m.startswith(begin)]


def test_a_loop_says_what_it_will_measure_and_a_line_a_point(lines: Any, tmp_path: Path) -> None:
    model, meter = tiny_model(), ib.Meter(tiny_probe(), num_bins=12)
    keywords = {"every_n_steps": 2, "early_stopping": ib.PlateauStopping(), "select": "optimality", "log_plane": False}
    with ib.Run(meter, output_dir=tmp_path, **keywords) as run:
        for step in range(4):
            run.step(model, step)
    (first,) = lines("measuring on probe")
    assert (
        "'tokens' at step 0, every 2 steps, at every checkpoint and at the last step; a point runs 96 tokens" in first
    )
    assert "MiB beside the forward pass; stops when held-out loss and distance_to_bound are both flat for 5" in first
    assert "once the model has begun to fit, at the 8th point of the run at the earliest; keeps the checkpoint" in first
    assert "from the compression phase on, which short runs may never reach, at the 7th point at the earliest" in first
    assert first.endswith("; until then the one with the lowest loss")
    points = lines("step ")
    assert len(points) == 3
    for point, line in zip(run.trajectory, points, strict=True):
        assert line.startswith(f"step {point.step}: loss {point.loss:.4g}, token complexity {point.complexity:.3g}")
        assert f"phase initial, stopping: cannot act yet, cannot be selected; {point.seconds:.1f} s" in line


@pytest.mark.parametrize("views", [{}, {"prediction": False}])
def test_a_model_without_a_plane_is_told_why(views: dict[str, bool], lines: Any, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(64, 16), torch.nn.ModuleList([torch.nn.Linear(16, 16)])[0])
    meter = ib.Meter(tiny_probe(), num_bins=12, layers=["1"], orders="token", **views)
    with ib.Run(meter, output_dir=tmp_path, log_plane=False) as run:
        run.step(model, 0)
    (first,) = lines("measuring on probe")
    assert "; no readout plane, because Sequential has no output embeddings" in first
    assert ("; no prediction plane, because " in first) is not views


def test_the_number_shown_first_is_in_the_line(lines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plane = replace(COURSE[0]["token"], complexity=0.5, complexity_local=0.4, expressivity_local=0.2, score_local=0.1)
    follow(monkeypatch, ib.Trajectory([replace(COURSE[0], views={"prediction": {"token": plane}})]))
    with ib.Run(ib.Meter(tiny_probe(), orders="token"), output_dir=tmp_path, log_plane=False) as run:
        run.step(tiny_model(), 0)
    (line,) = lines("step 0")
    assert "prediction score 0.1 (complexity 0.4, expressivity 0.2)" in line
    assert run.logged(run.trajectory[0])["ib/prediction_score"] == 0.1


@pytest.mark.parametrize(("bars", "console", "shown"), [(True, None, True), (False, None, False), (False, True, True)])
def test_the_trainers_switch_turns_the_lines_off(
    bars: bool, console: bool | None, shown: bool, lines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    callback = tiny_callback(every_n_steps=2, orders="token", console=console)
    tiny_trainer(tmp_path, [callback], steps=4, disable_tqdm=not bars).train()
    assert [line.split(":")[0] for line in lines("step ")] == (["step 0", "step 2", "step 4"] if shown else [])
    assert bool(lines("measuring on probe")) is shown
    assert lines("3 measurements took"), "the total cost is always told"
    if shown:
        assert "about 3 points up to step 4" in lines("measuring")[0]


def test_a_run_too_short_for_its_rules_is_told_so(lines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    rules = {"early_stopping": ib.PlateauStopping(**STOPPING), "select": "optimality", "orders": "token"}
    saving = {"save_strategy": "steps", "save_steps": 10}
    tiny_trainer(tmp_path / "a", [tiny_callback(every_n_steps=10, **rules)], steps=20, **saving).train()
    (stopping,), (selection,) = lines("stopping cannot act"), lines("selection cannot act")
    assert "expected at least 6 scheduled points, got 3 up to step 20. Measure more often (every_n_steps=3)" in stopping
    assert (
        "expected at least 7 scheduled points, got 3 up to step 20. Measure more often (every_n_steps=2)" in selection
    )


def test_a_step_to_select_from_that_never_comes_is_told(
    lines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    callback = tiny_callback(every_n_steps=2, orders="token", select="optimality", select_from=5000)
    tiny_trainer(tmp_path, [callback], steps=4, save_strategy="steps", save_steps=2).train()
    assert "expected select_from= of at most 4, the last step, got 5,000" in lines("selection cannot act")[0]


def test_lines_go_above_the_bars(capsys: pytest.CaptureFixture[str]) -> None:
    from tqdm import tqdm

    with tqdm(total=2, file=sys.stderr, mininterval=0) as bar:
        bar.update(1)
        say("hello")
    assert "\nib_callback: hello\n" in capsys.readouterr().err.replace("\r", "\n").replace(" " * 20, "\n").replace(
        " ", ""
    ).replace("ib_callback:hello", "ib_callback: hello")


def test_a_prefix_tells_lines_of_two_callbacks_apart(lines: Any, tmp_path: Path) -> None:
    with ib.Run(ib.Meter(tiny_probe(), num_bins=12), output_dir=tmp_path, prefix="code/", log_plane=False) as run:
        run.step(tiny_model(), 0)
    assert lines("code: measuring on probe") and lines("code: step 0: loss")
