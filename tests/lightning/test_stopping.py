"""Early stopping: by the callback itself, and by Lightning's own on the numbers that it publishes."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from scripted import COURSE, follow
from synthetic_runs import FIT_ONLY_C, STOPPING, C, E, run
from tiny_lightning import csv_rows, saved_steps, tiny_callback, tiny_module, tiny_trainer

import ib_callback as ib
from ib_callback.results.metrics import VIEWS, better_direction

NEVER = run(FIT_ONLY_C, E, steps=range(31))
# Each point of the course for two steps: step 46 is the 23rd point, at which the rule stops.
SLOW = run([c for c in C for _ in "12"], [e for e in E for _ in "12"], steps=range(62))
RULE = ib.PlateauStopping(**STOPPING)


def following(**keywords: Any) -> Any:
    return tiny_callback(every_n_steps=1, orders="token", **keywords)


def train(directory: Path, callbacks: list[Callback], *, steps: int = 30, **arguments: Any) -> Any:
    trainer = tiny_trainer(directory, callbacks, steps=steps, **arguments)
    trainer.fit(tiny_module())
    assert len(trainer.lightning_module.losses) == trainer.global_step * trainer.accumulate_grad_batches
    return trainer


# --- by the callback itself ---


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        ({"min_steps": 20}, 23),
        ({"min_steps": 26}, 26),
        ({"min_epochs": 1}, 23),
        ({"min_epochs": 2}, 24),
        ({"min_epochs": 2, "min_steps": 26}, 26),
    ],
    ids=str,
)
def test_not_before_the_least_number_of_steps_and_epochs_and_then_at_once(
    arguments: dict[str, int], last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch has 12 steps. Lightning validates and logs at every step once `should_stop` is set: not too early."""
    follow(monkeypatch)
    seen: list[bool] = []
    spy = LambdaCallback(on_train_batch_end=lambda trainer, *args: seen.append(trainer.should_stop))
    trainer = train(tmp_path, [following(early_stopping=RULE), spy], **arguments)
    assert trainer.global_step == last
    assert seen == [False] * (last - 1) + [True]


def test_stops_between_two_measurements_and_measures_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = follow(monkeypatch, SLOW)
    callback = tiny_callback(every_n_steps=2, orders="token", early_stopping=RULE)
    trainer = train(tmp_path, [callback], steps=60, min_steps=47)
    assert trainer.global_step == 47
    assert made == callback.trajectory.steps == [*range(0, 47, 2), 47]


@pytest.mark.parametrize(("arguments", "last"), [({}, 46), ({"min_steps": 48}, 48), ({"min_epochs": 4}, 48)], ids=str)
def test_a_stop_decided_by_the_measurement_of_a_checkpoint_takes_effect_at_its_step(
    arguments: dict[str, int], last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step later, it would be another step than where a run stops that is resumed from that checkpoint."""
    made = follow(monkeypatch, SLOW)

    def save(trainer: Any, *args: Any) -> None:
        if trainer.global_step % 2 == 0:
            trainer.save_checkpoint(tmp_path / "saved" / f"step={trainer.global_step}.ckpt")

    callback = tiny_callback(every_n_steps=2, orders="token", early_stopping=RULE, select="optimality")
    with pytest.warns(RuntimeWarning, match="nothing saves any"):
        trainer = train(tmp_path, [LambdaCallback(on_train_batch_end=save), callback], steps=60, **arguments)
    assert trainer.global_step == last
    assert made == callback.trajectory.steps == list(range(0, last + 1, 2))
    assert saved_steps(tmp_path) == {f"step={step}" for step in range(2, last + 1, 2)}


def test_goes_on_if_it_gets_better_before_it_may_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    better = ib.Trajectory(replace(COURSE[15], step=point.step) if point.step < 15 else point for point in COURSE)
    distances = {point.step: point.distance_to_bound for point in better}
    assert distances[5] > distances[16]
    follow(monkeypatch, better)
    callback = following(early_stopping=ib.PlateauStopping(**STOPPING, arm="immediately"))
    # It would have stopped at 3, 4, … 15, but improves from 16 to 20.
    assert train(tmp_path, [callback], min_steps=18).global_step == 23


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"min_steps": 30}, "min_steps=30 is not below max_steps=30. Lower min_steps"),
        ({"steps": -1, "max_epochs": 2, "min_epochs": 2}, "min_epochs=2 is not below max_epochs=2. Lower min_epochs"),
    ],
)
def test_a_least_number_that_leaves_no_room_is_a_warning(
    arguments: dict[str, int], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    with pytest.warns(RuntimeWarning, match=f"early_stopping can never act: {said}, or leave early_stopping out"):
        train(tmp_path, [following(early_stopping=RULE)], **arguments)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*early_stopping can never act")
        train(tmp_path, [following(early_stopping=RULE)], min_steps=5, min_epochs=1, max_epochs=3)
        train(tmp_path, [following()], **arguments)


# --- what stock callbacks see ---


def test_what_can_be_selected_is_published_and_until_then_something_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compression is recognised at step 15; point 18 is collapsed."""
    collapsed = {18: replace(COURSE[2], step=18)}
    follow(monkeypatch, ib.Trajectory(collapsed.get(point.step, point) for point in COURSE))
    seen: list[dict[str, float]] = []

    def look(trainer: Any, *args: Any) -> None:
        seen.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    callback, logger = following(), CSVLogger(tmp_path)
    train(tmp_path, [callback, LambdaCallback(on_train_batch_end=look)], logger=logger)
    assert [metrics["ib/phase"] for metrics in seen] == [0] * 3 + [1] * 11 + [2] * 16
    names = [name for name in seen[0] if name.startswith("ib/selectable/")]
    known = {name for name in callback.trajectory[1].scalars() if better_direction(name)}
    published = {name.removeprefix("ib/selectable/") for name in names}
    # Of the views, which these points lack.
    views = {name for name in published if name.partition("/")[0] in VIEWS}
    # The tiny documents have no baseline, and their bytes are not known.
    unmeasured = {name for name in known if name.endswith(("_local", "_scaled", "_per_byte"))}
    assert published - views == known - unmeasured - {"seconds", "overhead", "tokens_seen", "train_loss", "phase"}
    for name in [name for name in names if name.replace("selectable/", "") in callback.trajectory[1].metrics()]:
        sign = {"min": 1, "max": -1}[better_direction(name) or ""]
        for step, metrics in enumerate(seen, 1):
            if step < 15 or step == 18:
                assert sign * metrics[name] > 1e12, (name, step)
                better_by = sign * (seen[step - 2][name] - metrics[name])
                assert step in (1, 18) or better_by > 100, (name, step)
            else:
                assert metrics[name] == metrics[name.replace("selectable/", "")], (name, step)

    rows = [row for row in csv_rows(Path(logger.log_dir)) if row["ib/complexity"]]
    numbers = [row["ib/selectable/distance_to_bound"] for row in rows]
    assert [step for step, number in enumerate(numbers) if number] == [15, 16, 17, *range(19, 31)]
    assert float(numbers[20]) == COURSE[20].distance_to_bound


# EarlyStopping takes the interval of one batch for that of one epoch.
EACH_BATCH: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 1}
LOOKS_AT_EACH: dict[str, Any] = {"check_on_train_epoch_end": False}
SELECTABLE = [("ib/selectable/optimality", "max"), ("ib/selectable/distance_to_bound", "min")]


@pytest.mark.parametrize(("monitor", "mode"), SELECTABLE)
@pytest.mark.parametrize(
    ("stock", "arguments", "last"),
    [
        # Best at 20; then three checks without improvement, which is the default patience.
        (LOOKS_AT_EACH, EACH_BATCH, 23),
        ({}, {"limit_val_batches": 1, "val_check_interval": 2}, 26),
        ({}, {"limit_val_batches": 1, "limit_train_batches": 2}, 26),
        ({"check_on_train_epoch_end": True}, {"limit_train_batches": 2}, 26),
        ({"patience": 1, "min_delta": 0.01, **LOOKS_AT_EACH}, EACH_BATCH, 21),
    ],
)
def test_stock_early_stopping_waits_for_what_can_be_selected_and_stops_on_the_plateau(
    monitor: str, mode: str, stock: Any, arguments: Any, last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    early = EarlyStopping(monitor, mode=mode, **stock)
    trainer = train(tmp_path, [following(), early], max_epochs=-1, **arguments)
    assert trainer.global_step == last
    plain = monitor.removeprefix("ib/selectable/")
    assert early.best_score.item() == COURSE.values(plain)[20]


@pytest.mark.parametrize(("monitor", "mode"), SELECTABLE)
@pytest.mark.parametrize("arguments", [{}, {"val_check_interval": 3, "accumulate_grad_batches": 6}], ids=str)
def test_stock_early_stopping_never_stops_where_nothing_can_be_selected(
    monitor: str, mode: str, arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation at every batch or several times a step, measuring less often, and no patience."""
    follow(monkeypatch, NEVER)
    callback = tiny_callback(every_n_steps=4, orders="token")
    early = EarlyStopping(monitor, mode=mode, patience=1, min_delta=0.01, **LOOKS_AT_EACH)
    assert train(tmp_path, [callback, early], steps=18, **{**EACH_BATCH, **arguments}).global_step == 18
    assert early.wait_count == 0


def test_stock_early_stopping_takes_a_value_that_is_seen_again_for_no_improvement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured at every second step and validated at every one: from 30 on, the 15th point, values can be selected."""
    follow(monkeypatch, SLOW)
    callback = tiny_callback(every_n_steps=2, orders="token")
    early = EarlyStopping("ib/selectable/optimality", mode="max", patience=1, **LOOKS_AT_EACH)
    trainer = train(tmp_path, [callback, early], steps=60, **EACH_BATCH)
    assert trainer.global_step == 31


def test_stock_early_stopping_on_the_plain_distance_stops_in_the_collapse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the selectable numbers are for: .27, .09 and .018 at the steps 0 to 2, and then three that are larger."""
    follow(monkeypatch)
    early = EarlyStopping("ib/distance_to_bound", **LOOKS_AT_EACH)
    trainer = train(tmp_path, [following(), early], **EACH_BATCH)
    assert trainer.global_step == 5
    assert early.best_score.item() == COURSE[2].distance_to_bound


def test_stock_early_stopping_lists_what_could_be_monitored(tmp_path: Path) -> None:
    early = EarlyStopping("ib/selectable/optimallity", mode="max")
    with pytest.raises(RuntimeError, match=r"`ib/selectable/optimallity` which is not.*`ib/selectable/optimality`"):
        train(tmp_path, [tiny_callback(), early], limit_val_batches=1, val_check_interval=2)
