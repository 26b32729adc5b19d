"""A run that the callback ends: `early_stopping=`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scripted import follow
from synthetic_runs import STOPPING
from tiny_hf import Each, tiny_callback, tiny_trainer

import ib_callback as ib
from ib_callback.hf import IBCallback


def stopping(every: Any = 1, **settings: Any) -> IBCallback:
    rule = ib.PlateauStopping(**{**STOPPING, **settings})
    return tiny_callback(every_n_steps=every, orders="token", early_stopping=rule)


def checkpoints(directory: Path) -> set[int]:
    return {int(path.name.removeprefix("checkpoint-")) for path in directory.glob("checkpoint-*")}


# From the rule's own table of made-up runs: three points that are no better than .06 at 20.
ENDS = "distance_to_bound has not improved on 0.06 (step 20) for 3 measurements, so the run has reached a plateau"


@pytest.mark.parametrize(
    ("saving", "saved"),
    [
        ({"save_strategy": "steps", "save_steps": 10}, {10, 20, 23}),
        ({"save_strategy": "epoch"}, {16, 23}),
    ],
    ids=["steps", "epoch"],
)
def test_a_plateau_ends_the_run_with_a_last_checkpoint(
    saving: dict[str, Any], saved: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = follow(monkeypatch)
    callback = stopping()
    trainer = tiny_trainer(tmp_path, [callback], steps=30, **saving)
    trainer.train()
    assert trainer.state.global_step == 23
    assert made == callback.trajectory.steps == list(range(24))
    assert checkpoints(tmp_path) == saved


def test_at_the_last_step_there_is_nothing_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = follow(monkeypatch)
    callback = stopping()
    trainer = tiny_trainer(tmp_path, [callback], steps=23, save_strategy="steps", save_steps=23)
    saves: list[int] = []
    trainer.add_callback(Each("on_save", lambda state, control, model: saves.append(state.global_step)))
    trainer.train()
    assert callback.decision is not None
    assert callback.decision.stop
    assert "training stops" not in capsys.readouterr().err
    assert made == list(range(24))
    assert saves == [23]


def test_a_point_that_only_an_evaluation_asked_for_can_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = follow(monkeypatch)
    callback = stopping(every=100)
    saving = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 10}
    trainer = tiny_trainer(tmp_path, [callback], steps=30, metric_for_best_model="ib_optimality", **saving)
    trainer.train()
    assert trainer.state.global_step == made[-1] == 23
    assert checkpoints(tmp_path) == {10, 20, 23}
