from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from PIL import Image
from scripted import follow
from tiny_lightning import csv_rows, saving, tiny_callback, tiny_module, tiny_trainer
from wandb_offline import OfflineRun, read_offline_runs

import ib_callback as ib
from ib_callback.lightning._loggers import beside_numbers
from ib_callback.results.trajectory import FILENAME


def test_every_logger_gets_every_point_once_and_at_its_step(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name="a"), CSVLogger(tmp_path, name="b")]
    callback = tiny_callback(every_n_steps=5, tokens_per_step=64)
    trainer = tiny_trainer(tmp_path, [callback], steps=12, logger=loggers, log_every_n_steps=3)
    trainer.fit(tiny_module())
    assert "ib/tokens_seen" not in trainer.callback_metrics, "nothing to monitor"
    for logger in loggers:
        rows = csv_rows(Path(logger.log_dir))
        logged = {int(row["step"]): row for row in rows if row["ib/complexity"]}
        assert list(logged) == [0, 5, 10, 12]
        assert len([row for row in rows if row["ib/complexity"]]) == 4
        for point in callback.trajectory:
            for name, value in point.metrics().items():
                assert float(logged[point.step][name]) == value
            assert float(logged[point.step]["ib/tokens_seen"]) == 64 * point.step
            assert not any("/selectable/" in name for name in logged[point.step]), "none can be selected so early"
            assert float(logged[point.step]["ib/phase"]) in (0, 1)
        assert [int(row["step"]) for row in rows if row["loss"]] == [2, 5, 8, 11], "the trainer's own have suffered"
    assert (Path(loggers[0].log_dir) / FILENAME).is_file()


def read_run(tmp_path: Path) -> OfflineRun:
    (run,) = read_offline_runs(tmp_path)
    return run


@pytest.mark.parametrize("opened_by", ["the logger", "the user", "the user, for the logger"])
def test_rows_of_an_offline_run(opened_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    # Points at 0, 5, 6, 10 and 12; by a step as `select_from`, what has not been reached is NaN.
    rules = {"early_stopping": ib.PlateauStopping(), "select": "optimality", "select_from": 10}
    callback = tiny_callback(every_n_steps=5, log_plane=True, orders="token", tokens_per_step=64, **rules)
    callbacks = [callback, saving(tmp_path, 6)]
    try:
        wandb.teardown()  # it reads its settings, the directory among them, once a process
        monkeypatch.setenv("WANDB_DIR", str(tmp_path))
        if opened_by != "the logger":
            wandb.init(project="tiny")
        logger = False if opened_by == "the user" else WandbLogger(project="tiny", save_dir=tmp_path)
        arguments = {"logger": logger, "log_every_n_steps": 3, "enable_checkpointing": True}
        tiny_trainer(tmp_path, callbacks, steps=12, **arguments).fit(tiny_module())
    finally:
        wandb.finish()
        wandb.teardown()

    run, points = read_run(tmp_path), callback.trajectory
    *rows, last = [row for row in run.rows if any(key.startswith("ib/") for key in row)]
    assert points.steps == [0, 5, 6, 10, 12]
    assert [row["trainer/global_step"] for row in rows] == points.steps
    for row, point in zip(rows, points, strict=True):
        scalars = {key: value for key, value in row.items() if key in point.metrics()}
        assert scalars == pytest.approx(point.metrics(), rel=1e-12)
        assert row["ib/tokens_seen"] == 64 * row["trainer/global_step"]
        assert row.get("ib/selectable/optimality") == (point.optimality if point.step >= 10 else None)
        assert row["ib/plane/_type"] == "image-file"
        with Image.open(run.files / row["ib/plane/path"]) as image:
            assert image.format == "PNG"
            assert image.size == (row["ib/plane/width"], row["ib/plane/height"])
    assert run.step_metrics["ib/*"] == "trainer/global_step"
    own = [row["trainer/global_step"] for row in run.rows if "loss" in row]
    assert own == ([] if opened_by == "the user" else [2, 5, 8, 11])

    assert last["trainer/global_step"] == 12
    logged = {key.split("/")[1] for key in last if key.startswith("ib/")}
    assert logged == {"trajectory", "over_steps", "layers"}, "no second point at step 12"
    for key in ("ib/over_steps", "ib/layers"):
        # At the second and the fourth point, and of all five at the end.
        assert [f"{key}/path" in row for row in (*rows, last)] == [False, True, False, True, False, True]
    for shown, point in zip(run.table(last, "ib/trajectory"), points, strict=True):
        assert (shown["step"], shown["error"]) == (point.step, None)
        assert shown["token/optimality_above_null"] == point["token"].optimality_above_null

    summary = run.summary
    assert summary["ib/selected_step"] == callback.selected.step == 12
    assert summary["ib/selected_checkpoint"] == str(tmp_path / "saved" / "step=12.ckpt")
    best = max(points[3:], key=lambda point: point.optimality)
    assert (summary["ib/best_step"], summary["ib/best_value"]) == (best.step, best.optimality)
    assert summary["ib/final_distance_to_bound"] == points[-1].distance_to_bound
    assert summary["ib/stop_reason"] == "cannot act yet"
    assert 0 < summary["ib/cost_share"] < 1
    assert summary["ib/skipped_points"] == 0


def test_an_undefined_number_is_nan_and_not_that_of_an_earlier_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = ib.Meter.measure

    def undefined_at_ten(meter: ib.Meter, *args: Any, step: int) -> ib.Measurement:
        point = measure(meter, *args, step=step)
        undefined = {"token": replace(point["token"], optimality=None)}
        return replace(point, orders=undefined) if step == 10 else point

    seen: list[float] = []
    spy = LambdaCallback(on_train_batch_end=lambda t, *args: seen.append(t.callback_metrics["ib/optimality"].item()))
    monkeypatch.setattr(ib.Meter, "measure", undefined_at_ten)
    callback, logger = tiny_callback(orders="token"), CSVLogger(tmp_path)
    trainer = tiny_trainer(tmp_path, [callback, spy], steps=12, logger=logger)
    trainer.fit(tiny_module())
    at = {point.step: point.optimality for point in callback.trajectory}
    assert seen == pytest.approx([at[0]] * 4 + [at[5]] * 5 + [math.nan] * 2 + [at[12]], rel=0, abs=0, nan_ok=True)
    assert "ib/tokens_seen" not in trainer.callback_metrics
    logged = {int(row["step"]): row["ib/optimality"] for row in csv_rows(Path(logger.log_dir)) if row["ib/complexity"]}
    assert [step for step, value in logged.items() if not value] == [10]


def test_a_logger_that_fails_is_a_warning(tmp_path: Path) -> None:
    class Fails(CSVLogger):
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            if "ib/complexity" in metrics and step == 5:
                raise ConnectionError("the service has gone")
            super().log_metrics(metrics, step)

    logger, callback = Fails(tmp_path), tiny_callback()
    trainer = tiny_trainer(tmp_path, [callback], steps=12, logger=logger)
    with pytest.warns(RuntimeWarning, match=r"step 5 could not be logged to Fails.*ConnectionError: the service"):
        trainer.fit(tiny_module())
    assert callback.trajectory.steps == [0, 5, 10, 12]
    assert [int(row["step"]) for row in csv_rows(Path(logger.log_dir)) if row["ib/complexity"]] == [0, 10, 12]


def test_tensorboards_files_have_keys_settings_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow(monkeypatch)
    callback = tiny_callback(every_n_steps=5, orders="token", log_plane=True)
    logger = TensorBoardLogger(tmp_path)
    tiny_trainer(tmp_path, [callback], steps=12, logger=logger).fit(tiny_module())
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("ib/complexity")] == [0, 5, 10, 12]
    assert set(events.Tags()["images"]) == {"ib/plane", "ib/over_steps", "ib/layers"}
    assert [event.step for event in events.Images("ib/plane")] == [5, 12]
    (text,) = events.Tensors("ib/settings/text_summary")
    assert b"| ib_num_bins | 12 |" in text.tensor_proto.string_val[0]


def test_mlflow_gets_settings_and_pictures() -> None:
    class MLFlowLogger:
        run_id = "r"

        def __init__(self) -> None:
            self.params: dict[str, object] = {}
            self.images: list[tuple[str, str, tuple[int, int]]] = []
            self.experiment = SimpleNamespace(
                log_image=lambda run, image, artifact_file: self.images.append((run, artifact_file, image.size))
            )

        def log_hyperparams(self, params: dict[str, object]) -> None:
            self.params.update(params)

    logger, buffer = MLFlowLogger(), io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, "PNG")
    log = beside_numbers(logger)
    assert log is not None
    log(5, {"plane": buffer.getvalue()}, {"code_seed": 0}, "code/")
    assert (logger.params, logger.images) == ({"code_seed": 0}, [("r", "code/plane.png", (4, 3))])
    assert beside_numbers(object()) is None
