"""The best checkpoint is found and kept: `select=` and `select_from=`."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Loop, checkpoints, recorded, remove_checkpoint
from scripted import BEST, COURSE, follow
from synthetic_runs import failed, measured, run
from tiny_hf import numbers, pairs, tiny_probe, weights

import ib_callback as ib
from ib_callback.run.summary import Selected

KEYWORDS = {"steps": 30, "every_n_steps": 1, "orders": "token", "save_every": 5, "select": "optimality"}


def test_the_best_checkpoint_outlives_the_limit_and_so_does_the_last(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = follow(monkeypatch)
    outcome = loop.train(tmp_path, limited=True, **KEYWORDS)
    assert made == list(range(31)), "no step is measured twice"
    assert set(checkpoints(tmp_path)) == {20, 30}
    assert outcome.followed.selected == Selected(step=20, value=BEST.optimality, path=checkpoints(tmp_path)[20])
    assert list(recorded(tmp_path)) == [5, 10, 15, 20, 25, 30]
    assert recorded(tmp_path)[30] == checkpoints(tmp_path)[30], "relative to the directory of the run"


def test_the_weights_that_are_kept_are_those_that_were_best(loop: Loop, tmp_path: Path) -> None:
    """Really measured, and not by phase: the tiny model goes through a collapse and out of it, its loss up and down."""
    by_step: dict[int, dict[str, torch.Tensor]] = {}
    outcome = loop.train(
        tmp_path, steps=26, every_n_steps=100, orders="token", save_every=2, limited=True, select="complexity",
        select_from=1, on_step=lambda model, step: by_step.update({step: weights(model)}),
    )  # fmt: skip
    followed = outcome.followed
    assert followed.trajectory.steps == list(range(0, 27, 2)), "every checkpoint, whatever the schedule"
    lowest = min(point.loss for point in followed.trajectory[1:])
    guarded = [point for point in followed.trajectory[1:] if point.loss <= lowest + 0.03]
    assert len(guarded) < len(followed.trajectory[1:])
    best = min(guarded, key=lambda point: point.complexity)
    assert best.step < 26
    assert (followed.selected.step, followed.selected.value) == (best.step, best.complexity)
    outcome.model.load_state_dict(by_step[best.step])
    meter = ib.Meter(tiny_probe(), orders="token", num_bins=12, batch_size=3)
    assert numbers(meter.measure(outcome.model, step=best.step)) == numbers(best)
    assert best.step in checkpoints(tmp_path)


def test_checkpoints_that_are_not_selected_from_are_not_measured_but_recorded(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = follow(monkeypatch)
    outcome = loop.train(tmp_path, **{**KEYWORDS, "every_n_steps": 10, "select": None})
    assert made == [0, 10, 20, 30]
    assert list(recorded(tmp_path)) == [5, 10, 15, 20, 25, 30]
    assert outcome.followed.selected is None


@pytest.mark.parametrize(
    ("select", "step"),
    [("preference", 8), (ib.Selection("preference", "min", 10), 16)],
    ids=["a name", "a Selection"],
)
def test_by_a_feature(select: Any, step: int, loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The highest of those that were saved; by the other one the lowest from step 10 on."""
    information = {0: 0.09, 4: 0.01, 8: 0.04, 12: 0.03, 16: 0.02}
    follow(monkeypatch, ib.Trajectory(measured(step, 0.5, 0.2, preference=i) for step, i in information.items()))
    keywords = {**KEYWORDS, "every_n_steps": 4, "save_every": 4, "select": select, "select_from": 0}
    outcome = loop.train(tmp_path, probe=pairs(), limited=True, **{**keywords, "steps": 16})
    path = checkpoints(tmp_path)[step]
    assert outcome.followed.selected == Selected(step=step, value=information[step], path=path)
    assert set(checkpoints(tmp_path)) == {step, 16}


def test_a_selection_of_ones_own(loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the fit on, which begins at 4, the complexity is highest at 10; its own `select_from` counts."""
    follow(monkeypatch)
    select = ib.Selection("complexity", mode="max", select_from="fit")
    outcome = loop.train(tmp_path, limited=True, select_from=29, **{**KEYWORDS, "select": select})
    assert outcome.followed.selected.step == 10
    assert set(checkpoints(tmp_path)) == {10, 30}


@pytest.mark.parametrize(
    ("trajectory", "reasons"),
    [
        (run([0.5] * 9, [0.1, 0.05, *[0.2] * 7], steps=range(9)), r"not in the compression phase\."),
        (run([0.5] * 9, [0.2] * 9, steps=range(9), without=range(3, 9)), "not measured: RuntimeError: NaN in h.0"),
    ],
    ids=["no compression", "nothing measured"],
)
def test_a_run_in_which_nothing_could_be_selected_says_why_and_keeps_its_latest(
    trajectory: ib.Trajectory, reasons: str, loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    follow(monkeypatch, trajectory)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Nothing could be measured", RuntimeWarning)
        outcome = loop.train(tmp_path, **{**KEYWORDS, "steps": 8, "save_every": 4})
    path = checkpoints(tmp_path)[8]
    assert outcome.followed.selected == Selected(step=8, value=None, path=path, fallback=True)
    said = capsys.readouterr().err
    assert re.search(f"No point can be selected: .*{reasons}", said)
    assert "Kept instead, as a fallback: the latest checkpoint, of step 8" in said
    assert list(recorded(tmp_path)) == [4, 8]


def test_with_the_published_rule_nothing_is_kept_where_nothing_can_be_selected(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch, run([0.5] * 9, [0.1, 0.05, *[0.2] * 7], steps=range(9)))
    with pytest.warns(RuntimeWarning, match=r"No checkpoint could be selected\. No point can be selected: "):
        outcome = loop.train(tmp_path, **{**KEYWORDS, "steps": 8, "save_every": 4, "guard": None})
    assert outcome.followed.selected is None


def test_the_checkpoint_of_the_lowest_loss_is_kept_until_one_can_be_selected(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing compresses here; the loss is lowest at 6, of checkpoints at 4."""
    losses = [5.0, 4.8, 4.5, 4.3, 4.2, 4.3, 4.1, 4.4, 4.6]
    course = run([0.5] * 9, [0.1, 0.05, *[0.2] * 7], steps=range(9))
    follow(monkeypatch, ib.Trajectory(replace(p, loss=x) for p, x in zip(course, losses, strict=True)))
    outcome = loop.train(tmp_path, limited=True, **{**KEYWORDS, "steps": 8, "save_every": 4})
    path = checkpoints(tmp_path)[4]
    assert outcome.followed.selected == Selected(step=4, value=4.2, path=path, fallback=True)
    assert set(checkpoints(tmp_path)) == {4, 8}
    assert outcome.followed.trajectory.best() is None


def test_a_checkpoint_that_has_gone_is_none(loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)

    def on_step(model: torch.nn.Module, step: int) -> None:
        if step == 27:
            remove_checkpoint(tmp_path, 20)

    outcome = loop.train(tmp_path, on_step=on_step, **KEYWORDS)
    # .24 / .30 from 20 on, at 25 as well.
    assert outcome.followed.selected == Selected(step=25, value=BEST.optimality, path=checkpoints(tmp_path)[25])


def test_a_checkpoint_whose_measurement_failed_is_none(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch, ib.Trajectory(failed(20) if point.step == 20 else point for point in COURSE))
    with pytest.warns(RuntimeWarning, match="Nothing could be measured at step 20"):
        outcome = loop.train(tmp_path, **KEYWORDS)
    assert outcome.followed.selected.step == 25
