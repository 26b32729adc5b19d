from __future__ import annotations

import dataclasses
import io
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_hf import tiny_callback
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import (
    AzureMLCallback,
    CometCallback,
    MLflowCallback,
    SwanLabCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)
from transformers.trainer_callback import CallbackHandler

from ib_callback.hf._report import Report, draws_for, report
from ib_callback.hf._trainer import check_order, evaluation_key, find_handler, for_evaluation, watched_metric

NAMES = ["optimality", "distance_to_bound", "bigram/optimality", "entropy", "selectable/bigram/distance_to_bound"]


def arguments(directory: Path, metric: str | None, **settings: Any) -> TrainingArguments:
    defaults = {"eval_strategy": "steps", "eval_steps": 5, "use_cpu": True, "report_to": "none"}
    return TrainingArguments(str(directory), metric_for_best_model=metric, **{**defaults, **settings})


@pytest.mark.parametrize(
    ("metric", "key"),
    [
        ("ib_optimality", "eval_ib_optimality"),
        ("eval_ib_bigram_optimality", "eval_ib_bigram_optimality"),
        ("ib_entropy", "eval_ib_entropy"),
        ("loss", None),
        ("eval_ibis", None),
        (None, None),
    ],
)
def test_the_metric_that_the_trainer_judges_by(metric: str | None, key: str | None, tmp_path: Path) -> None:
    assert watched_metric(arguments(tmp_path, metric, greater_is_better=True), NAMES) == key


def test_names_in_the_evaluation_metrics() -> None:
    assert evaluation_key("selectable/bigram/optimality") == "eval_ib_selectable_bigram_optimality"
    found = for_evaluation({"ib/phase": 2, "ib/optimality": 0.5, "ib/bound_ratio": None, "ib/fit": math.nan})
    assert found == {"eval_ib_phase": 2.0, "eval_ib_optimality": 0.5}
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize("metric", ["ib_optimalty", "ib/optimality", "eval_ib/optimality", "ib_trigram_optimality"])
def test_a_metric_that_does_not_exist_lists_those_that_do(metric: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=f'metric_for_best_model="{metric}" is not measured; those measured: ib_optimality, .*'
        "ib_bigram_optimality, .*ib_selectable_bigram_distance_to_bound",
    ):
        watched_metric(arguments(tmp_path, metric), NAMES)


@pytest.mark.parametrize("metric", ["ib_distance_to_bound", "ib_selectable_bigram_distance_to_bound"])
def test_a_distance_is_better_when_low(metric: str, tmp_path: Path) -> None:
    for told in ({}, {"greater_is_better": True}):
        with pytest.raises(ValueError, match=rf'"{metric}" is better when low, .* Set greater_is_better=False\.'):
            watched_metric(arguments(tmp_path, metric, **told), NAMES)
    assert watched_metric(arguments(tmp_path, metric, greater_is_better=False), NAMES) == f"eval_{metric}"


def test_an_optimality_that_is_to_be_low_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match='"ib_optimality" is better when high, but greater_is_better is False'):
        watched_metric(arguments(tmp_path, "ib_optimality", greater_is_better=False), NAMES)


def test_the_metric_of_one_of_several_datasets(tmp_path: Path) -> None:
    for metric in ("eval_novels_ib_bigram_optimality", "novels_ib_bigram_optimality"):
        with pytest.raises(ValueError, match=f'"{metric}" does not exist, because .* Use "ib_bigram_optimality"'):
            watched_metric(arguments(tmp_path, metric), NAMES)


def test_a_learning_rate_that_depends_on_the_metric(tmp_path: Path) -> None:
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau"}
    with pytest.warns(RuntimeWarning, match=r'"ib_optimality", which is better when high, .*\{"mode": "max"\}'):
        watched_metric(arguments(tmp_path, "ib_optimality", **plateau), NAMES)
    right = {**plateau, "lr_scheduler_kwargs": {"mode": "max"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        watched_metric(arguments(tmp_path, "ib_optimality", **right), NAMES)
        watched_metric(arguments(tmp_path, "ib_distance_to_bound", greater_is_better=False, **plateau), NAMES)
    metric = "ib_selectable_bigram_distance_to_bound"
    with pytest.warns(RuntimeWarning, match="NaN until it can be selected: that counts as no improvement"):
        watched_metric(arguments(tmp_path, metric, greater_is_better=False, **plateau), NAMES)


def test_without_evaluation_nothing_is_judged_by_a_metric(tmp_path: Path) -> None:
    without = arguments(tmp_path, "ib_distance_to_bound", eval_strategy="no")
    with pytest.raises(ValueError, match=r'eval_strategy is "no"\. Set eval_strategy, or .* select="optimality"'):
        watched_metric(without, NAMES)
    # save_strategy="best" demands a name, whoever says what is the best.
    assert watched_metric(without, NAMES, selects=True) is None
    with pytest.raises(ValueError, match="is not measured"):
        watched_metric(arguments(tmp_path, "ib_optimalty", eval_strategy="no"), NAMES, selects=True)


# --- the other callbacks of a Trainer


class Asks(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = find_handler(self)


def handler_of(*callbacks: TrainerCallback) -> CallbackHandler:
    return CallbackHandler(list(callbacks), torch.nn.Linear(1, 1), None, None, None)


def test_the_handler_that_calls_is_found() -> None:
    asks, other = Asks(), handler_of(TrainerCallback())
    handler = handler_of(TrainerCallback(), asks)
    handler.on_step_end(SimpleNamespace(), SimpleNamespace(), SimpleNamespace())
    assert asks.found is handler
    other.add_callback(asks)
    other.on_step_end(SimpleNamespace(), SimpleNamespace(), SimpleNamespace())
    assert asks.found is other
    asks.on_step_end(SimpleNamespace(), SimpleNamespace(), SimpleNamespace())
    assert asks.found is None


def test_early_stopping_before_the_callback_is_refused() -> None:
    ours, stock = tiny_callback(), EarlyStoppingCallback()
    with pytest.raises(ValueError, match=r"EarlyStoppingCallback comes before IBCallback .* Put IBCallback first"):
        check_order(handler_of(stock, ours), ours)
    for good in (handler_of(ours, stock), handler_of(ours), None):
        assert check_order(good, ours) is None


class Writer:
    """As much of a SummaryWriter as is used."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.flushed = 0

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        self.flushed += 1


def stand_in(kind: type[TrainerCallback], **attributes: Any) -> Any:
    """An integration without the package that it needs; remembers what it is given to log."""

    def on_log(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append((state.global_step, logs))

    target = type(f"StandIn{kind.__name__}", (kind,), {"__init__": lambda self: None, "on_log": on_log})()
    target.__dict__.update({"seen": [], **attributes})
    return target


METRICS = {"ib/complexity": 0.5, "ib/phase": 1.0}
STATE = SimpleNamespace(global_step=7)
TOLD = Report(step=7, numbers=METRICS, pictures={}, captions={}, settings={}, prefix="ib/")


def by_on_log(target: Any, logs: dict[str, float]) -> None:
    target.on_log(None, STATE, None, logs=logs)


def test_reports_to_every_integration_but_weights_and_biases() -> None:
    writer = Writer()
    board, azure = stand_in(TensorBoardCallback, tb_writer=writer), stand_in(AzureMLCallback)
    wandb, no_integration = stand_in(WandbCallback), stand_in(EarlyStoppingCallback)
    not_yet = stand_in(TensorBoardCallback, tb_writer=None)
    report(handler_of(board, azure, wandb, no_integration, not_yet), TOLD, by_on_log)
    assert writer.scalars == [("ib/complexity", 0.5, 7), ("ib/phase", 1.0, 7)]
    assert writer.flushed == 1
    assert azure.seen == [(7, METRICS)]
    assert board.seen == wandb.seen == no_integration.seen == not_yet.seen == []


def test_a_target_that_fails_is_a_warning_and_the_others_are_served() -> None:
    fails, serves = stand_in(AzureMLCallback, seen=None), stand_in(AzureMLCallback)
    with pytest.warns(
        RuntimeWarning,
        match=r"could not be logged by StandInAzureMLCallback\. Training goes on\. AttributeError: 'None",
    ) as caught:
        report(handler_of(fails, serves), TOLD, by_on_log)
    assert len(caught) == 1
    assert serves.seen == [(7, METRICS)]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, "PNG")
    return buffer.getvalue()


BESIDE = Report(
    step=7, numbers=METRICS, pictures={"plane": png()}, captions={"plane": "step 7"}, settings={"ib_seed": 0},
    prefix="ib/",
)  # fmt: skip


def test_trackio_gets_the_keys_as_they_are_with_pictures_and_settings() -> None:
    """Its integration would put `train/` before each of them."""
    rows: list[dict[str, Any]] = []
    trackio = SimpleNamespace(config={}, log=rows.append, Image=lambda image, caption: (image.size, caption))
    target = stand_in(TrackioCallback, _trackio=trackio)
    report(handler_of(target), BESIDE, by_on_log)
    assert rows == [{**METRICS, "ib/plane": ((4, 3), "step 7"), "train/global_step": 7}]
    assert trackio.config == {"ib_seed": 0}
    assert target.seen == []


def test_mlflow_gets_the_settings_as_parameters_and_pictures_as_artifacts() -> None:
    params: dict[str, str] = {}
    images: dict[str, Any] = {}
    mlflow = SimpleNamespace(
        log_params=params.update, log_image=lambda image, artifact_file: images.update({artifact_file: image.size})
    )
    target = stand_in(MLflowCallback, _ml_flow=mlflow, _MAX_PARAM_VAL_LENGTH=4, _auto_end_run=False)
    told = dataclasses.replace(BESIDE, settings={"ib_seed": 0, "ib_rules": "a long text"})
    report(handler_of(target), told, by_on_log)
    assert target.seen == [(7, METRICS)], "which keeps the names"
    assert params == {"ib_seed": "0", "ib_rules": "a lo"}
    assert images == {"ib/plane.png": (4, 3)}


def test_swanlab_and_comet_get_the_keys_as_they_are() -> None:
    seen: list[tuple[str, dict[str, float], int]] = []
    swan = SimpleNamespace(log=lambda numbers, step: seen.append(("swan", numbers, step)))
    comet = SimpleNamespace(log_metrics=lambda numbers, step: seen.append(("comet", numbers, step)))
    targets = [stand_in(SwanLabCallback, _swanlab=swan), stand_in(CometCallback, _experiment=comet)]
    report(handler_of(*targets), TOLD, by_on_log)
    assert seen == [("swan", METRICS, 7), ("comet", METRICS, 7)]


def test_pictures_are_drawn_for_those_that_take_them() -> None:
    assert not draws_for(None)
    assert not draws_for(handler_of(stand_in(AzureMLCallback), stand_in(WandbCallback)))
    assert draws_for(handler_of(stand_in(TensorBoardCallback)))


def test_nothing_to_report_to() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert report(None, TOLD, by_on_log) is None
        assert report(handler_of(TrainerCallback()), TOLD, by_on_log) is None
