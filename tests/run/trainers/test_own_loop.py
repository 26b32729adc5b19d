"""`ib.Run` in a loop of one's own: what the trainers' adapters do not have, a block to enter and to leave."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripted import COURSE, follow
from synthetic_runs import STOPPING
from tiny_hf import measured, numbers, random_ids, tiny_model, tiny_probe

import ib_callback as ib
from ib_callback import plot
from ib_callback.run import run as run_module
from ib_callback.run.config import RunConfig


def run_in(directory: Path | None, **keywords: Any) -> ib.Run:
    """Along `COURSE`, if that is followed, or really measured."""
    meter = ib.Meter(tiny_probe(), orders="token", num_bins=12, batch_size=3)
    return ib.Run(meter, output_dir=directory, **{"every_n_steps": 5, "log_plane": False, **keywords})


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny_model()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are measured; the points are those of `COURSE`."""
    return follow(monkeypatch)


# --- the block


def test_outside_of_the_block_is_a_mistake(model: torch.nn.Module, made: list[int], tmp_path: Path) -> None:
    run = run_in(tmp_path)
    with pytest.raises(RuntimeError, match=r"expected to be called inside `with ib\.Run\(…\) as run:`"):
        run.step(model, 0)
    with run:
        run.step(model, 0)
    with pytest.raises(RuntimeError, match=r"Run\.step: expected to be called inside `with"):
        run.step(model, 1)
    assert made == [0]


def test_a_run_needs_a_directory_and_a_meter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="output_dir: expected the directory where the files of this run go"):
        run_in(None).__enter__()
    with pytest.raises(TypeError, match=r"meter: expected an ib\.Meter, got Probe; pass ib\.Meter\(probe\)"):
        ib.Run(tiny_probe(), output_dir=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Run got the unknown keyword every; it takes every_n_steps, .*of ib\.Meter"):
        run_in(tmp_path, every=5)
    with pytest.raises(TypeError, match="wandb: expected a run, such as"):
        run_in(tmp_path, wandb="project")
    with pytest.raises(TypeError, match="config: expected a RunConfig, and no keywords beside it"):
        run_in(tmp_path, config=RunConfig())
    with run_in(tmp_path) as run, pytest.raises(RuntimeError, match="one `with` block at a time"), run:
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("leaves", [True, False])
def test_no_point_is_of_other_weights_than_its_step_says(leaves: bool, tmp_path: Path) -> None:
    """The loop of README, and one that takes a further step of the optimizer after the last step it showed."""
    model, last, at = tiny_model(), 6, {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def train() -> ib.Run:
        with run_in(tmp_path, every_n_steps=4, select="complexity", select_from=1) as run:
            for step in range(last + 1):
                at[step] = {name: value.clone() for name, value in model.state_dict().items()}
                if run.step(model, step) or (leaves and step == last):
                    break
                batch = random_ids(4, seed=step)
                model(input_ids=batch, labels=batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if step + 1 in (2, 5):  # off the schedule
                    path = tmp_path / f"{step + 1}.pt"
                    torch.save(model.state_dict(), path)
                    run.saved(step + 1, path)
        return run

    if leaves:
        run = train()
    else:
        with pytest.warns(
            RuntimeWarning, match="Step 6, the last step that was reported, was not measured: the optimizer has made"
        ):
            run = train()
    assert run.trajectory.steps == [0, 2, 4, 5, 6][: 5 if leaves else 4]
    for point in run.trajectory:
        model.load_state_dict(at[point.step])
        meter = ib.Meter(tiny_probe(), orders="token", num_bins=12, batch_size=3)
        assert numbers(meter.measure(model, step=point.step)) == numbers(point)
    assert run.selected.step in (2, 5)


def test_steps_of_numpy_and_torch_are_steps(model: torch.nn.Module, made: list[int], tmp_path: Path) -> None:
    with run_in(tmp_path, every_n_steps=1, select="optimality", select_from=0) as run:
        for step in (*np.arange(3), torch.tensor(3)):
            run.step(model, step)
            save(run, step, tmp_path / f"{int(step)}.pt")
        for step, error in (("4", TypeError), (4.0, TypeError), (-1, ValueError)):
            with pytest.raises(error, match="step: expected an integer of at least 0"):
                run.step(model, step)
    assert ib.Trajectory.load(tmp_path).steps == [0, 1, 2, 3]
    assert run.selected is not None


def test_nothing_is_saved_before_the_first_step_or_after_the_block(made: list[int], tmp_path: Path) -> None:
    run = run_in(tmp_path)
    with run, pytest.raises(RuntimeError, match=r"Run\.saved: expected a first run\.step"):
        run.saved(0, tmp_path)
    with pytest.raises(RuntimeError, match=r"Run\.saved: expected to be called inside"):
        run.saved(0, tmp_path)


def test_left_normally_it_measures_the_last_step_seen(model: torch.nn.Module, made: list[int], tmp_path: Path) -> None:
    with run_in(tmp_path) as run:
        for step in range(30):
            run.step(model, step)
            if step == 7:
                break
    assert made == run.trajectory.steps == [0, 5, 7]
    assert ib.Trajectory.load(tmp_path) == run.trajectory
    with run_in(tmp_path) as run:
        for step in range(6):
            run.step(model, step)
    assert made == [0, 5, 7, 0, 5], "the last step was measured already"


def test_left_by_an_error_it_finishes_the_files_and_measures_nothing(
    model: torch.nn.Module, made: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(run_module, "_DRAWN_SINGLY", 1)
    monkeypatch.setattr(run_module, "_DRAWN_AGAIN", 100.0)
    drawn: list[list[int | None]] = []
    monkeypatch.setattr(plot, "save_information_plane", lambda trajectory, path, **_: drawn.append(trajectory.steps))

    def loop() -> None:
        with run_in(tmp_path, log_plane=True) as run:
            for step in range(30):
                run.step(model, step)
                if step == 13:
                    raise ZeroDivisionError("a bug of the user")

    with pytest.raises(ZeroDivisionError, match="a bug of the user"):
        loop()
    assert made == [0, 5, 10]
    assert drawn == [[0], [0, 5, 10]], "the picture is up to date"
    assert ib.Trajectory.load(tmp_path).steps == [0, 5, 10]
    assert "ib_callback: 3 measurements took" in capsys.readouterr().err


def test_left_before_the_first_step_it_leaves_nothing(tmp_path: Path) -> None:
    with run_in(tmp_path):
        pass
    with pytest.raises(ZeroDivisionError, match="before it began"), run_in(tmp_path):
        raise ZeroDivisionError("before it began")
    assert list(tmp_path.iterdir()) == []


def test_entered_twice_it_begins_anew(model: torch.nn.Module, made: list[int], tmp_path: Path) -> None:
    run = run_in(tmp_path)
    for steps in (7, 4):
        with run:
            for step in range(steps):
                run.step(model, step)
    assert made == [0, 5, 6, 0, 3]
    assert run.trajectory.steps == ib.Trajectory.load(tmp_path).steps == [0, 3]
    assert ib.Trajectory.load(tmp_path / "ib_trajectory.1.jsonl").steps == [0, 5, 6]
    # At a later step it resumes, and what lies past it is dropped.
    with run:
        run.step(model, 2)
    assert ib.Trajectory.load(tmp_path).steps == [0, 2]


# --- steps


def test_a_step_that_goes_back_is_a_mistake(model: torch.nn.Module, made: list[int], tmp_path: Path) -> None:
    back = r"step: expected 6 or more, got 4\. To go back to an earlier checkpoint, begin a new"
    with run_in(tmp_path) as run:
        for step in (0, 5, 6):
            run.step(model, step)
        with pytest.raises(ValueError, match=back):
            run.step(model, 4)
    assert made == [0, 5, 6]


def test_a_step_that_was_passed_over_counts_at_the_next_call(
    model: torch.nn.Module, made: list[int], tmp_path: Path
) -> None:
    with run_in(tmp_path) as run:
        for step in (0, 3, 6, 9, 12, 12, 14):
            run.step(model, step)
    assert made == run.trajectory.steps == [0, 6, 12, 14]


def test_the_loss_is_kept_with_the_point(model: torch.nn.Module, made: list[int], tmp_path: Path) -> None:
    with run_in(tmp_path) as run:
        for step in (0, 5, 6):
            run.step(model, step, loss=1.5 if step < 6 else None)
    assert [point.train_loss for point in run.trajectory] == [1.5, 1.5, None]


@pytest.mark.parametrize("loss", [torch.ones(2), "high", [1.0]], ids=["several numbers", "text", "list"])
def test_a_loss_that_is_no_number_ends_no_training(
    loss: Any, model: torch.nn.Module, made: list[int], tmp_path: Path
) -> None:
    told = pytest.warns(RuntimeWarning, match="The training loss is not kept with its point: expected a number")
    with told, run_in(tmp_path, every_n_steps=1) as run:
        for step in range(3):
            run.step(model, step, loss=loss if step == 1 else 1.0)
    assert [point.train_loss for point in run.trajectory] == [1.0, None, 1.0]
    assert ib.Trajectory.load(tmp_path) == run.trajectory


def test_no_hook_is_left_on_the_model_and_it_stays_in_training_mode(tmp_path: Path) -> None:
    model = tiny_model()
    with run_in(tmp_path) as run:
        for step in (0, 5, 6):
            run.step(model, step)
            assert not any(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
            assert model.training
    assert numbers(run.trajectory[-1]) == measured(model, 6, orders="token")


# --- stopping


def test_a_decision_to_stop_is_said_once_and_again_by_the_first_step_of_a_resumed_run(
    model: torch.nn.Module, made: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keywords = {"every_n_steps": 1, "early_stopping": ib.PlateauStopping(**STOPPING)}
    with run_in(tmp_path, **keywords) as run:
        stops = [run.step(model, step).stop for step in range(26)]
    assert stops == [False] * 23 + [True] * 3, "whoever does not listen is told at every step"
    assert capsys.readouterr().err.count("ib_callback: training should stop at step 23: distance_to_bound") == 1
    made.clear()
    with run_in(tmp_path, **keywords) as run:
        assert run.step(model, 23).stop
    assert made == []
    assert capsys.readouterr().err.count("training should stop at step 23") == 1


def test_without_a_rule_a_step_decides_nothing(model: torch.nn.Module, made: list[int], tmp_path: Path) -> None:
    with run_in(tmp_path) as run:
        assert [run.step(model, step) for step in range(3)] == [None] * 3
    assert run.decision is None


# --- checkpoints


def save(run: ib.Run, step: int, path: Path) -> None:
    path.write_text(str(step))
    run.saved(step, path)


def test_the_best_so_far_is_to_be_kept(
    model: torch.nn.Module, made: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = []
    with run_in(tmp_path, every_n_steps=1, select="optimality") as run:
        for step in range(26):
            run.step(model, step)
            if step in (14, 16, 20, 24):
                save(run, step, tmp_path / f"{step}.pt")
                kept.append([other for other in (14, 16, 20, 24) if run.keeps(tmp_path / f"{other}.pt")])
        assert run.keeps("20.pt"), "a relative path as well"
        (tmp_path / "20.pt").unlink()
        save(run, 25, tmp_path / "25.pt")
        assert not run.keeps("20.pt"), "it has gone"
    # Compression is recognised at 15; until then the latest is kept.
    assert kept == [[14], [16], [20], [20]]
    assert (run.selected.step, run.selected.path) == (24, tmp_path / "24.pt")


def test_a_checkpoint_is_measured_before_it_is_selected_from(
    model: torch.nn.Module, made: list[int], tmp_path: Path
) -> None:
    for select, expected in (("optimality", [0, 3, 5, 6]), (None, [0, 5, 6])):
        made.clear()
        with run_in(tmp_path, select=select, select_from=0) as run:
            for step in range(7):
                run.step(model, step)
                if step in (3, 5):
                    save(run, step, tmp_path / f"{step}.pt")
            assert not run.keeps(tmp_path / "7.pt")
        assert made == expected
        assert (run.selected is None) == (select is None)


def test_the_best_checkpoint_that_is_overwritten_is_a_warning(
    model: torch.nn.Module, made: list[int], tmp_path: Path
) -> None:
    with run_in(tmp_path, every_n_steps=1, select="optimality", select_from=0) as run:
        for step in range(4):
            run.step(model, step)
        save(run, 3, tmp_path / "last.pt")
        save(run, 3, tmp_path / "last.pt")  # the same weights once more
        run.step(model, 4)
        with pytest.warns(RuntimeWarning, match=r"last\.pt of step 3, was overwritten by that of step 4\. Save each"):
            save(run, 4, tmp_path / "last.pt")
    assert run.selected.step == 4


def test_a_checkpoint_of_later_weights_than_its_step_is_not_selected(tmp_path: Path) -> None:
    model = tiny_model()
    with run_in(tmp_path, every_n_steps=1, select="optimality", select_from=0) as run:
        run.step(model, 0)
        save(run, 0, tmp_path / "0.pt")
        run.step(model, 1)
        with torch.no_grad():
            next(model.parameters()).mul_(2)
        with pytest.warns(
            RuntimeWarning,
            match=r"1\.pt cannot be selected: it holds other weights than those measured at step 1\..*trained",
        ):
            save(run, 1, tmp_path / "1.pt")
        save(run, 2, tmp_path / "2.pt")  # as it should have been said
        assert set(run._state.checkpoints.existing()) == {0, 2}


# --- Weights & Biases


def test_a_run_that_is_given_gets_the_points_beside_the_open_one(
    model: torch.nn.Module, made: list[int], tmp_path: Path, open_run: Any
) -> None:
    given = type(open_run)()
    for wandb, takes in ((given, [given, open_run]), (open_run, [open_run]), (None, [open_run])):
        given.rows.clear(), open_run.rows.clear()
        with run_in(tmp_path, wandb=wandb, x_axis="iteration") as run:
            for step in range(7):
                run.step(model, step)
        for each in takes:
            rows = [row for row in each.rows if "ib/complexity" in row]
            assert [row["iteration"] for row in rows] == [0, 5, 6]
            assert [row["ib/complexity"] for row in rows] == [COURSE[step].complexity for step in (0, 5, 6)]
            assert each.defined == [("ib/*", "iteration")] * len(each.defined)
            assert each.summary["ib/final_optimality"] == COURSE[6].optimality
        assert wandb is not None or given.rows == []


# --- the training


def test_another_model_than_at_first_is_measured_as_it_is(tmp_path: Path) -> None:
    """A loop may wrap or replace its model: what is measured is what the step was called with."""
    first, second = tiny_model(), tiny_model(seed=8)
    with run_in(tmp_path) as run:
        run.step(first, 0)
        run.step(second, 5)
        run.step(first, 6)
    assert [numbers(point) for point in run.trajectory] == [
        measured(model, step, orders="token") for model, step in ((first, 0), (second, 5), (first, 6))
    ]


def test_data_that_is_drawn_at_random_is_the_same_with_and_without(tmp_path: Path) -> None:
    drawn = []
    for follows in (False, True):
        torch.manual_seed(1)
        model, data, batches = tiny_model(), random_ids(64, seed=11), []
        with run_in(tmp_path, every_n_steps=2) as run:
            for step in range(6):
                if follows:
                    run.step(model, step)
                batches.append(data[torch.randint(64, (4,))])
        drawn.append(torch.cat(batches))
    assert torch.equal(*drawn)


# --- codebooks aimed at the output


@pytest.mark.parametrize("metric", ["readout/token/expressivity", "prediction/expressivity"])
def test_to_stop_and_to_select_by_what_is_said_of_the_output(metric: str, tmp_path: Path) -> None:
    """From a head of zeros, which reads nothing out, on; and resumed half-way."""

    def train(directory: Path, first: int, last: int) -> ib.Run:
        model = tiny_model()
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        rule = ib.PlateauStopping(metric, mode="max", arm="immediately", patience=2)
        with run_in(directory, every_n_steps=2, select=metric, select_from=0, early_stopping=rule) as run:
            for step in range(last + 1):
                if step >= first:
                    run.step(model, step)
                    torch.save(model.state_dict(), path := directory / f"{step}.pt")
                    run.saved(step, path)
                if step < last:
                    batch = random_ids(4, seed=step)
                    model(input_ids=batch, labels=batch).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
        return run

    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    view = metric.partition("/")[0]
    told = f"{metric} is undefined until the model has a readout: its output embeddings are zero or all alike"
    with pytest.warns(RuntimeWarning, match=told) if view == "readout" else contextlib.nullcontext():
        whole = train(tmp_path / "whole", 0, 8)
        train(tmp_path / "parts", 0, 4)
    parts = train(tmp_path / "parts", 4, 8)
    assert [numbers(point) for point in parts.trajectory] == [numbers(point) for point in whole.trajectory]
    assert ib.Trajectory.load(tmp_path / "parts") == parts.trajectory
    assert [view in point.views for point in whole.trajectory] == [view != "readout", *[True] * 8]
    assert parts.decision == whole.decision
    values = [point.scalars()[metric] for point in whole.trajectory]
    best = max(value for value in values if value is not None)
    for run in (whole, parts):
        assert run.selected.step == run.trajectory.best(metric, select_from=0).step
        assert run.trajectory.best(metric, select_from=0).scalars()[metric] == best
        assert run.rules.numbers()[f"selectable/{metric}"] == values[-1]
    rule = ib.PlateauStopping(metric, mode="max", arm="immediately", patience=2)
    decisions = [rule.update(point) for point in whole.trajectory]
    assert decisions[-1] == whole.decision
    assert (values[0] is None) == (view == "readout")
