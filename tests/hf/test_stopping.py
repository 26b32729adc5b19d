"""A run that the callback ends: `early_stopping=`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from scripted import COURSE, follow
from synthetic_runs import FIT_ONLY_C, STOPPING, C, E, run
from tiny_hf import Each, tiny_callback, tiny_trainer

import ib_callback as ib
from ib_callback.hf import IBCallback
from ib_callback.results.stopping import StopReason


def stopping(every: Any = 1, **settings: Any) -> IBCallback:
    rule = ib.PlateauStopping(**{**STOPPING, **settings})
    return tiny_callback(every_n_steps=every, orders="token", early_stopping=rule)


def checkpoints(directory: Path) -> set[int]:
    return {int(path.name.removeprefix("checkpoint-")) for path in directory.glob("checkpoint-*")}


# From the rule's own table of made-up runs: three points that are no better than .06 at 20.
ENDS = "distance_to_bound: no improvement on 0.06 at step 20 for 3 measurements: a plateau"


@pytest.mark.parametrize(
    ("saving", "saved"),
    [
        ({"save_strategy": "steps", "save_steps": 10}, {10, 20, 23}),
        ({"save_strategy": "epoch"}, {16, 23}),
        ({"save_strategy": "no"}, set()),
    ],
    ids=["steps", "epoch", "no"],
)
def test_a_plateau_ends_the_run_with_a_last_checkpoint(
    saving: dict[str, Any], saved: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    made = follow(monkeypatch)
    callback = stopping()
    trainer = tiny_trainer(tmp_path, [callback], steps=30, **saving)
    trainer.train()
    assert trainer.state.global_step == 23
    assert made == callback.trajectory.steps == list(range(24))
    assert callback.decision == ib.StopDecision(True, StopReason.PLATEAU, ENDS)
    assert checkpoints(tmp_path) == saved
    assert capsys.readouterr().err.count(f"ib_callback: training stops at step 23: {ENDS}\n") == 1


def test_it_is_said_in_the_log_if_anybody_reads_that(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    follow(monkeypatch)
    with caplog.at_level(logging.INFO, logger="ib_callback"):
        tiny_trainer(tmp_path, [stopping()], steps=30).train()
    assert [r.getMessage() for r in caplog.records].count(f"training stops at step 23: {ENDS}") == 1
    assert "training stops" not in capsys.readouterr().err


@pytest.mark.parametrize("every", [2, 3])
def test_it_stops_where_the_rule_does_by_the_same_points(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    callback = stopping(every, patience=1)
    trainer = tiny_trainer(tmp_path, [callback], steps=30)
    trainer.train()

    rule = ib.PlateauStopping(**{**STOPPING, "patience": 1})
    decisions = {point.step: rule.update(point) for point in COURSE[::every]}
    stop = next((step for step, decision in decisions.items() if decision.stop), None)
    assert stop is not None
    assert 20 < stop < 30
    assert trainer.state.global_step == callback.trajectory.steps[-1] == stop
    assert callback.decision == decisions[stop]


@pytest.mark.parametrize(
    ("settings", "stop", "reason"),
    [
        ({}, 30, StopReason.NOT_ARMED),
        ({"arm": "fit"}, 7, StopReason.DIVERGING),
        ({"arm": "immediately"}, 5, StopReason.DIVERGING),
    ],
)
def test_a_model_that_never_compresses(
    settings: dict[str, Any], stop: int, reason: StopReason, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch, run(FIT_ONLY_C, E, steps=range(31)))
    callback = stopping(**settings)
    trainer = tiny_trainer(tmp_path, [callback], steps=30)
    trainer.train()
    assert trainer.state.global_step == stop
    assert callback.decision is not None
    assert (callback.decision.stop, callback.decision.reason) == (stop < 30, reason)


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


def test_missing_points_neither_stop_nor_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch, run(C, E, steps=range(31), without=[21, 22]))
    callback = stopping()
    trainer = tiny_trainer(tmp_path, [callback], steps=30)
    with pytest.warns(RuntimeWarning, match="Nothing could be measured at step 2[12].*NaN in h.0") as caught:
        trainer.train()
    assert len([w for w in caught if "Nothing could be measured" in str(w.message)]) == 2
    # 23, 24 and 25 are the three.
    assert trainer.state.global_step == 25


def test_a_second_training_begins_with_a_new_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    callback = stopping()
    trainer = tiny_trainer(tmp_path, [callback], steps=30)
    for _ in range(2):
        trainer.train()
        assert trainer.state.global_step == 23
        assert callback.trajectory.steps == list(range(24))


# --- mistakes


@pytest.mark.parametrize("monitor", ["bigram/distance_to_bound", "distance", "preference"])
def test_a_rule_on_what_is_not_measured_is_refused_when_the_callback_is_made(monitor: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"PlateauStopping\('{monitor}'.* cannot work: no metric '{monitor}' .*token/distance_to_bound",
    ):
        stopping(monitor=monitor)


def test_what_is_no_rule_is_refused() -> None:
    with pytest.raises(TypeError, match=r"early_stopping: expected an ib\.PlateauStopping or None, got 'plateau'"):
        tiny_callback(early_stopping="plateau")


def test_a_rule_that_looks_the_wrong_way_is_a_warning() -> None:
    with pytest.warns(RuntimeWarning, match="takes a change for the worse as an improvement; did you mean mode='max'"):
        stopping(monitor="optimality")
