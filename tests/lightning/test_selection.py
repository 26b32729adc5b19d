"""The best checkpoint: by `select`, and by Lightning's own `ModelCheckpoint` on the numbers that are published."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LambdaCallback, ModelCheckpoint
from scripted import COURSE, follow
from synthetic_runs import FIT_ONLY_C, STOPPING, E, measured, run
from tiny_hf import numbers, tiny_probe
from tiny_lightning import saved_steps, saving, tiny_callback, tiny_module, tiny_trainer

import ib_callback as ib
from ib_callback.lightning import IBCallback
from ib_callback.run.checkpoints import FILENAME

NEVER = run(FIT_ONLY_C, E, steps=range(31))


def selecting(by: Any = "optimality", *, every: int = 1, **keywords: Any) -> IBCallback:
    return tiny_callback(every_n_steps=every, select=by, **{"orders": "token", **keywords})


def train(directory: Path, callbacks: list[Callback], *, steps: int = 30, **arguments: Any) -> Any:
    trainer = tiny_trainer(directory, callbacks, steps=steps, enable_checkpointing=True, **arguments)
    trainer.fit(tiny_module(arguments.get("package", lightning.pytorch)))
    return trainer


# --- select= ---


@pytest.mark.parametrize(
    "arguments",
    [
        {"save_top_k": 2, "monitor": "loss"},
        {"save_last": True},
        {"save_weights_only": True},
        {"filename": "the same for all"},
        {"save_top_k": 0, "save_last": True},
    ],
    ids=str,
)
def test_the_checkpoint_that_is_kept_has_the_weights_that_were_the_best(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Really measured, and not by phase: the tiny model goes through a collapse and out of it."""
    # By the metric alone: the loss would leave few of them.
    callback = selecting(select_from=1, guard=None)
    train(tmp_path, [callback, saving(tmp_path, 2, **{"save_top_k": 1, **arguments})], steps=26)
    recorded = {json.loads(line)["step"] for line in (tmp_path / FILENAME).read_text().splitlines()}
    best = max((point for point in callback.trajectory if point.step in recorded), key=lambda point: point.optimality)
    assert best.step < max(recorded)
    assert (callback.selected.step, callback.selected.value) == (best.step, best.optimality)
    module = tiny_module()
    module.load_state_dict(torch.load(callback.selected.path, weights_only=True)["state_dict"])
    meter = ib.Meter(tiny_probe(), orders="token", num_bins=12, batch_size=3)
    assert numbers(meter.measure(module.net, step=best.step)) == numbers(best)


def test_nothing_but_the_best_is_kept_beside_what_model_checkpoint_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    on_disk: list[set[int]] = []

    def look(*args: Any) -> None:
        if (tmp_path / "saved").exists():
            on_disk.append({int(name.removeprefix("step=")) for name in saved_steps(tmp_path)})

    # After the checkpoint of the step before.
    spy = LambdaCallback(on_train_batch_start=look, on_train_end=look)
    train(tmp_path, [selecting(), spy, saving(tmp_path, 2, save_top_k=1)])
    latest = [max(steps) for steps in on_disk]
    assert latest == [step for step in range(2, 30, 2) for _ in "12"] + [30]
    beside = [steps - {max(steps)} for steps in on_disk]
    # From 15 on, when compression is recognised, every one is better than those before, until 20.
    assert beside == [set() if step <= 20 else {20} for step in latest]


def test_the_best_by_another_metric_outlives_its_place_among_the_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`save_top_k=2` by another metric; at every step the disk has these two and the best one by optimality."""
    follow(monkeypatch)
    callback, checkpoint = selecting(), saving(tmp_path, 2, save_top_k=2, monitor="made_up", filename="{step}")
    selected: list[int | None] = []

    def make_up(trainer: Any, *args: Any) -> None:
        trainer.callback_metrics["made_up"] = torch.tensor(-float(trainer.global_step))  # ever better

    def look(trainer: Any, *args: Any) -> None:
        expected = {Path(path).stem for path in checkpoint.best_k_models}
        chosen = callback.selected
        selected.append(None if chosen is None else chosen.step)
        if expected:
            assert saved_steps(tmp_path) == expected | ({chosen.path.stem} if chosen is not None else set())

    beside = LambdaCallback(on_train_batch_start=look, on_train_batch_end=make_up)
    train(tmp_path, [callback, beside, checkpoint])
    look(None)
    assert selected[0] is None
    steps = [step for step in selected if step is not None]
    assert len(set(steps)) > 2, "it has changed, so that there was something to remove"
    assert steps == sorted(steps)


def test_a_file_that_is_overwritten_is_copied_while_it_is_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    callback = selecting()
    train(tmp_path, [callback, saving(tmp_path, 5, save_top_k=1, filename="model")])
    assert saved_steps(tmp_path) == {"model", "step=20-model"}
    assert callback.selected.path == tmp_path / "saved" / "step=20-model.ckpt"
    content = [
        torch.load(tmp_path / "saved" / f"{name}.ckpt", weights_only=True) for name in sorted(saved_steps(tmp_path))
    ]
    assert [state["global_step"] for state in content] == [30, 20]


@pytest.mark.parametrize(
    ("checkpoint", "arguments", "saved"),
    [
        ({}, {"limit_val_batches": 1, "val_check_interval": 3}, [*range(3, 31, 3)]),
        ({"save_on_train_epoch_end": True}, {"limit_train_batches": 7}, [7, 14, 21, 28, 30]),
        ({"every_n_train_steps": 8, "save_on_train_epoch_end": True}, {"limit_train_batches": 7}, [8, 16, 24]),
    ],
    ids=["at the end of validation", "at the end of an epoch", "in the middle of an epoch"],
)
def test_whenever_a_checkpoint_is_saved(
    checkpoint: Any, arguments: Any, saved: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    callback = selecting(every=10)
    stock = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, **checkpoint)
    train(tmp_path, [callback, stock], max_epochs=-1, **arguments)
    assert saved_steps(tmp_path) == {f"step={step}" for step in saved}
    assert callback.trajectory.steps == sorted({0, 10, 20, 30, *saved})
    assert {json.loads(line)["step"] for line in (tmp_path / FILENAME).read_text().splitlines()} == set(saved)


def test_a_checkpoint_that_the_user_saves_counts_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)

    def save(trainer: Any, *args: Any) -> None:
        if trainer.global_step in (19, 22):
            trainer.save_checkpoint(tmp_path / "mine" / f"{trainer.global_step}.ckpt")

    # So few points show no compression.
    callback = selecting(every=3, select_from="fit")
    spy = LambdaCallback(on_train_batch_end=save)
    train(tmp_path, [callback, spy, saving(tmp_path, 9, save_top_k=1)])
    assert callback.trajectory.steps == sorted({*range(0, 31, 3), 19, 22})
    assert callback.selected.path == tmp_path / "mine" / "22.ckpt"
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["19.ckpt", "22.ckpt"]
    assert saved_steps(tmp_path) == {"step=27"}


def test_stopping_and_selection_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in (lightning.pytorch, pytorch_lightning):
        directory = tmp_path / package.__name__
        follow(monkeypatch)
        callback = selecting(every=1, early_stopping=ib.PlateauStopping(**STOPPING))
        stock = package.callbacks.ModelCheckpoint(directory / "saved", every_n_train_steps=1, filename="{step}")
        trainer = train(directory, [callback, stock], package=package)
        assert trainer.global_step == 23
        assert callback.selected.step == 20
        assert saved_steps(directory) == {"step=20", "step=23"}


def test_selecting_in_vain_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    with pytest.warns(
        RuntimeWarning, match='select="optimality" chooses among checkpoints, but nothing saves any: add'
    ):
        tiny_trainer(tmp_path / "without", [callback := selecting()], steps=30).fit(tiny_module())
    assert callback.selected is None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=RuntimeWarning)
        train(tmp_path / "good", [selecting(), saving(tmp_path / "good", 10)])


def test_the_best_is_removed_when_a_better_one_comes_and_a_failure_to_do_so_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch, ib.Trajectory(measured(26, 0.25, 0.24) if point.step == 26 else point for point in COURSE))
    train(tmp_path, [selecting(), saving(tmp_path, 2, save_top_k=1)])
    assert saved_steps(tmp_path) == {"step=26", "step=30"}

    def fail_at_20(trainer: Any, *args: Any) -> None:
        remove = trainer.strategy.checkpoint_io.remove_checkpoint

        def remove_others(path: Any) -> None:
            if Path(path).stem == "step=20":
                raise PermissionError("read-only")
            remove(path)

        trainer.strategy.checkpoint_io.remove_checkpoint = remove_others

    again = tmp_path / "again"
    callbacks = [selecting(), LambdaCallback(on_train_start=fail_at_20), saving(again, 2, save_top_k=1)]
    with pytest.warns(RuntimeWarning, match="no longer the best could not be removed.*PermissionError: read-only"):
        train(again, callbacks)
    assert saved_steps(again) == {"step=20", "step=26", "step=30"}


# --- stock ModelCheckpoint on what is published ---


@pytest.mark.parametrize(
    ("monitor", "mode"), [("ib/selectable/optimality", "max"), ("ib/selectable/distance_to_bound", "min")]
)
def test_stock_model_checkpoint_ends_with_the_best_that_can_be_selected(
    monitor: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    stock = saving(tmp_path, 2, save_top_k=1, monitor=monitor, mode=mode)
    train(tmp_path, [tiny_callback(every_n_steps=2, orders="token"), stock])
    assert saved_steps(tmp_path) == {"step=20"}
    assert stock.best_model_score.item() == COURSE.values(monitor.removeprefix("ib/selectable/"))[20]


def test_stock_model_checkpoint_on_the_plain_distance_ends_in_the_collapse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    stock = saving(tmp_path, 2, save_top_k=1, monitor="ib/distance_to_bound")
    train(tmp_path, [tiny_callback(every_n_steps=2, orders="token"), stock])
    assert saved_steps(tmp_path) == {"step=2"}


@pytest.mark.parametrize("monitor", ["ib/selectable/optimality", "ib/selectable/distance_to_bound"])
@pytest.mark.parametrize(("every", "last"), [(2, 28), (3, 27), (7, 28)])
def test_stock_model_checkpoint_ends_with_the_latest_where_nothing_can_be_selected(
    every: int, last: int, monitor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it saves more often than is measured."""
    follow(monkeypatch, NEVER)
    mode = "min" if monitor.endswith("bound") else "max"
    stock = saving(tmp_path, every, save_top_k=1, monitor=monitor, mode=mode)
    train(tmp_path, [tiny_callback(every_n_steps=5, orders="token"), stock], steps=29)
    assert saved_steps(tmp_path) == {f"step={last}"}


def test_stock_model_checkpoint_lists_what_could_be_monitored(tmp_path: Path) -> None:
    stock = saving(tmp_path, 2, save_top_k=1, monitor="ib/selectable/optimallity", mode="max")
    with pytest.raises(MisconfigurationException, match=r"'ib/selectable/optimallity'.*'ib/selectable/optimality'"):
        train(tmp_path, [tiny_callback(), stock], limit_val_batches=1, val_check_interval=3)
