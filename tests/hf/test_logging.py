"""What others get to see of a run: the Trainer's log, the targets of `report_to`, and what following it has cost."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripted import COURSE, follow
from synthetic_runs import COLLAPSE_AT_THE_END, C, E, run
from tiny_hf import LENGTH, Each, tiny_callback, tiny_trainer
from transformers import Trainer, TrainerCallback
from transformers.integrations import integration_utils

import ib_callback as ib
from ib_callback.results.metrics import PRIMARY_SCALARS
from ib_callback.run import run as run_module

SHOWN = ["ib/phase", *(f"ib/selectable/{name}" for name in PRIMARY_SCALARS)]


def rows_of(trainer: Trainer) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if any(key.startswith("ib/") for key in row)]


def test_log_history_has_every_point(tmp_path: Path) -> None:
    callback = tiny_callback(every_n_steps=5)
    trainer = tiny_trainer(
        tmp_path, [callback], steps=12, save_strategy="steps", save_steps=12, include_num_input_tokens_seen="all"
    )
    trainer.train()
    rows = rows_of(trainer)
    assert [row["step"] for row in rows] == [0, 5, 10, 12]
    assert [row["epoch"] for row in rows] == [0, 5 / 16, 10 / 16, 12 / 16]
    for row, point in zip(rows, callback.trajectory, strict=True):
        assert list(row) == [*point.metrics(), *SHOWN, "epoch", "step"]
        assert {name: row[name] for name in point.metrics()} == point.metrics()
        assert all(type(value) is float for key, value in row.items() if key.startswith("ib/"))
        assert row["ib/quadgram/complexity"] == point["quadgram"].complexity
    assert [point.tokens_seen for point in callback.trajectory] == [s * 4 * LENGTH for s in (0, 5, 10, 12)]

    state = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    assert [row["ib/complexity"] for row in state["log_history"] if "ib/complexity" in row] == [
        point.complexity for point in callback.trajectory
    ]


def test_tokens_seen_where_the_trainer_does_not_count_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    callback = tiny_callback(every_n_steps=4, orders="token", tokens_per_step=1000)
    trainer = tiny_trainer(tmp_path, [callback], steps=10)
    trainer.train()
    assert [row["ib/tokens_seen"] for row in rows_of(trainer)] == [0.0, 4000.0, 8000.0, 10_000.0]
    uncounted = tiny_callback(every_n_steps=4, orders="token")
    trainer = tiny_trainer(tmp_path, [uncounted], steps=4)
    trainer.train()
    assert [row["step"] for row in rows_of(trainer)] == [0, 4]
    assert all("ib/tokens_seen" not in row for row in rows_of(trainer))


@pytest.mark.filterwarnings("ignore:Nothing could be measured")
@pytest.mark.parametrize("select_from", ["compression", "fit", 7])
@pytest.mark.parametrize(
    "trajectory",
    [COURSE, run(C, E, steps=range(31), without=[2, 5, 12, 16, 21, 30])],
    ids=["all phases", "with gaps"],
)
def test_phase_and_selectable_numbers_are_those_known_by_then(
    trajectory: ib.Trajectory, select_from: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch, trajectory)
    callback = tiny_callback(every_n_steps=1, orders="token", select_from=select_from)
    trainer = tiny_trainer(tmp_path, [callback], steps=30)
    trainer.train()

    rows = {row["step"]: row for row in rows_of(trainer)}
    assert list(rows) == [point.step for point in trajectory if point.error is None]
    least = {"compression": 2, "fit": 1}.get(select_from)
    for point, phase in zip(trajectory, trajectory.phases().known, strict=True):
        if point.error is not None:
            continue
        row = rows[point.step]
        assert row["ib/phase"] == phase
        reached = point.step >= select_from if least is None else phase >= least
        for name in PRIMARY_SCALARS:
            value = row[f"ib/selectable/{name}"]
            assert value == getattr(point, name) if reached else math.isnan(value)
    assert {row["ib/phase"] for row in rows.values()} == {0.0, 1.0, 2.0}


def test_collapsed_points_are_not_selectable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With the lowest complexity and distance since the fit began, from 21 on.
    points = [replace(point, step=step) for step, point in enumerate(COLLAPSE_AT_THE_END)]
    follow(monkeypatch, ib.Trajectory(points))
    callback = tiny_callback(every_n_steps=1, orders="token")
    trainer = tiny_trainer(tmp_path, [callback], steps=30)
    trainer.train()
    values = {row["step"]: row["ib/selectable/distance_to_bound"] for row in rows_of(trainer)}
    assert [step for step, value in values.items() if not math.isnan(value)] == [15, 16, 17, 18, 19, 20]


# --- targets of report_to


class Writer:
    """As much of TensorBoard's SummaryWriter as the Trainer uses."""

    opened: list[Writer]

    def __init__(self, log_dir: str | None = None) -> None:
        self.scalars: dict[tuple[str, int], float] = {}
        self.closed = False
        self.opened.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert not self.closed
        assert (name, step) not in self.scalars or not name.startswith("ib/")
        self.scalars[name, step] = value

    def add_text(self, name: str, text: str, step: int | None = None) -> None:
        assert not self.closed

    def flush(self) -> None:
        assert not self.closed

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_every_number_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer, "opened", [], raising=False)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    callback = tiny_callback(every_n_steps=5, orders=("token", "bigram"))
    own: list[str] = []

    class OwnLogger(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            own.extend(logs)

    trainer = tiny_trainer(tmp_path, [callback, OwnLogger()], steps=12, report_to=["tensorboard"])
    trainer.train()
    assert "loss" in own
    assert not any(name.startswith("ib/") for name in own), "it finds them in state.log_history"
    (writer,) = Writer.opened
    assert writer.closed
    ours = {key: value for key, value in writer.scalars.items() if key[0].startswith("ib/")}
    assert [point.step for point in callback.trajectory] == [0, 5, 10, 12]
    for point in callback.trajectory:
        there = {name: value for (name, step), value in ours.items() if step == point.step}
        assert {name: there[name] for name in point.metrics()} == point.metrics()
        assert set(there) == {*point.metrics(), *SHOWN}
    assert {step for _, step in ours} == {0, 5, 10, 12}
    assert {step for name, step in writer.scalars if name == "train/loss"} == {3, 6, 9, 12}


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_another_integration_gets_every_point(first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)

    class Remembers(integration_utils.AzureMLCallback):
        def __init__(self) -> None:
            self.seen: list[tuple[int, dict[str, float]]] = []

        def on_init_end(self, *args: Any, **kwargs: Any) -> None:
            pass

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.seen.append((state.global_step, logs))

    target, callback = Remembers(), tiny_callback(every_n_steps=5, orders="token")
    tiny_trainer(tmp_path, [target, callback] if first else [callback, target], steps=12).train()
    ours = [(step, logs) for step, logs in target.seen if "ib/complexity" in logs]
    assert [step for step, _ in ours] == [0, 5, 10, 12]
    assert [logs["ib/complexity"] for _, logs in ours] == [COURSE[step].complexity for step in (0, 5, 10, 12)]
    assert [step for step, logs in target.seen if "loss" in logs] == [3, 6, 9, 12]


def test_a_target_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)

    class Fails(integration_utils.AzureMLCallback):
        def __init__(self) -> None:
            pass

        def on_init_end(self, *args: Any, **kwargs: Any) -> None:
            pass

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "ib/complexity" in logs:
                raise ConnectionError("the service has gone")

    trainer = tiny_trainer(tmp_path, [Fails(), tiny_callback(every_n_steps=5, orders="token")], steps=12)
    with pytest.warns(RuntimeWarning, match=r"could not be logged by Fails; .* ConnectionError: the service has gone"):
        trainer.train()
    assert [row["step"] for row in rows_of(trainer)] == [0, 5, 10, 12]


# --- what it costs


class Clock:
    """Time that passes only where the test says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A measurement takes three seconds, a step of the training one if `Takes one` is among the callbacks."""
    clock = Clock()
    monkeypatch.setattr(run_module, "time", clock)
    follow(monkeypatch)
    measure = ib.Meter.measure

    def slowly(*args: Any, **kwargs: Any) -> ib.Measurement:
        clock.now += 3.0
        return measure(*args, **kwargs)

    monkeypatch.setattr(ib.Meter, "measure", slowly)
    return clock


def second_by_second(clock: Clock) -> Each:
    def take_one(state: Any, control: Any, model: torch.nn.Module) -> None:
        clock.now += 1.0

    return Each("on_step_begin", take_one)


def test_points_are_skipped_while_the_share_is_above_the_budget(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = tiny_callback(every_n_steps=1, orders="token", overhead_budget=0.25)
    tiny_trainer(tmp_path, [callback, second_by_second(clock)], steps=30).train()
    # After k measurements, 3 k seconds of 3 k + n at step n are a quarter at n = 9 k. The last step is measured anyway.
    assert callback.trajectory.steps == [0, 9, 18, 27, 30]
    assert [point.overhead for point in callback.trajectory] == [1.0, 6 / 15, 9 / 27, 12 / 39, 15 / 45]
    cost = callback.cost
    assert (cost.points, cost.seconds, cost.share, cost.skipped) == (5, 15.0, 1 / 3, 26)
    said = "5 measurements took 15.0 s, 33.3% of the time; 26 more were skipped to save time"
    assert f"ib_callback: {said}\n" in capsys.readouterr().err


def test_without_a_budget_the_cost_is_said_all_the_same(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = tiny_callback(every_n_steps=10, orders="token")
    tiny_trainer(tmp_path, [callback, second_by_second(clock)], steps=28).train()
    assert callback.trajectory.steps == [0, 10, 20, 28]
    assert "ib_callback: 4 measurements took 12.0 s, 30.0% of the time\n" in capsys.readouterr().err


def test_checkpoints_and_evaluations_that_are_judged_are_measured_whatever_the_budget(
    clock: Clock, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 5}
    callback = tiny_callback(every_n_steps=1, orders="token", overhead_budget=0.01, select="optimality", select_from=0)
    tiny_trainer(tmp_path / "saved", [callback, second_by_second(clock)], steps=12, **saving).train()
    assert callback.trajectory.steps == [0, 5, 10, 12]
    assert callback.cost.skipped == 9

    judged = {"eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "ib_optimality"}
    callback = tiny_callback(every_n_steps=5, orders="token", overhead_budget=0.01)
    tiny_trainer(tmp_path / "judged", [callback, second_by_second(clock)], steps=12, **judged).train()
    assert callback.trajectory.steps == [0, 4, 8, 12]
    assert callback.cost.skipped == 2


@pytest.mark.parametrize("budget", [0, 1, -0.1, 1.5, math.nan])
def test_a_budget_out_of_range_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match=r"overhead_budget is a share .* expected a number between 0 and 1, .* got "):
        tiny_callback(overhead_budget=budget)


def test_tokens_per_step_must_be_a_number_of_tokens() -> None:
    with pytest.raises(ValueError, match="tokens_per_step: expected an integer of at least 1, got 0"):
        tiny_callback(tokens_per_step=0)
    with pytest.raises(TypeError, match=r"tokens_per_step: expected an integer of at least 1, got 2\.5"):
        tiny_callback(tokens_per_step=2.5)
