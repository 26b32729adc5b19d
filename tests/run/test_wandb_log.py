from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from scripted import follow
from synthetic_runs import STOPPING, C, E, failed, measured
from synthetic_runs import run as made_up_run
from tiny_hf import LENGTH, Each, tiny_callback, tiny_model, tiny_probe, tiny_trainer
from wandb_offline import OfflineRun, read_offline_runs

import ib_callback as ib
from ib_callback.measuring.meter import Meter
from ib_callback.plot import encoded, plane_by_layer
from ib_callback.results.stopping import PlateauStopping
from ib_callback.results.trajectory import Trajectory
from ib_callback.run.run import Run
from ib_callback.run.wandb_log import WandbLog, open_run


class FakeRun:
    """Remembers what it is given; `broken` methods raise."""

    def __init__(self, *broken: str) -> None:
        self.broken = broken
        self.rows: list[dict[str, Any]] = []
        self.defined: list[tuple[str, str]] = []
        self._summary: dict[str, Any] = {}

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.defined.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        if "log" in self.broken:
            raise ConnectionError("the service has gone")
        self.rows.append(row)

    @property
    def summary(self) -> dict[str, Any]:
        if "summary" in self.broken:
            raise ConnectionError("the service has gone")
        return self._summary


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where W&B writes; it reads its environment once in a process, perhaps for an earlier test."""
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    yield tmp_path
    wandb.finish()
    wandb.teardown()  # for whoever comes next


def of_ours(run: OfflineRun) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of the points, and the one with the table, which comes last."""
    points = [row for row in run.rows if "ib/complexity" in row]
    (last,) = (row for row in run.rows if "ib/trajectory/path" in row)
    assert run.rows.index(last) > run.rows.index(points[-1])
    return points, last


def test_rows_of_an_offline_run_of_the_trainer(offline: Path) -> None:
    import wandb

    callback = tiny_callback(every_n_steps=5, log_plane=True)
    settings = {"report_to": "wandb", "run_name": "tiny", "include_num_input_tokens_seen": "all"}
    tiny_trainer(offline / "run", [callback], steps=12, **settings).train()
    for copied in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):  # W&B refuses to pickle a run
        assert copied.trajectory == callback.trajectory
    wandb.finish()
    assert pickle.loads(pickle.dumps(callback)).trajectory == callback.trajectory

    (run,) = read_offline_runs(offline)
    rows, last = of_ours(run)
    assert [row["train/global_step"] for row in rows] == [0, 5, 10, 12]
    assert last["train/global_step"] == 12
    for row, point in zip(rows, callback.trajectory, strict=True):
        scalars = {key: value for key, value in row.items() if key in point.metrics()}
        assert scalars == pytest.approx(point.metrics(), rel=1e-12)
        assert scalars["ib/tokens_seen"] == row["train/global_step"] * 4 * LENGTH
        assert row["ib/phase"] == callback.trajectory.phases().known[callback.trajectory.index(point)]
        # A run of twelve steps never compresses.
        assert not any(key.startswith("ib/selectable/") for key in row), "no panel without a number"
        assert row["ib/plane/_type"] == "image-file"
        phase = "initial" if row["ib/phase"] == 0 else "fitting"
        told = f"step {point.step}, phase {phase}: the information plane: complexity across, expressivity up"
        assert row["ib/plane/caption"].startswith(told)
        with Image.open(run.files / row["ib/plane/path"]) as image:
            assert image.format == "PNG"
            assert image.size == (row["ib/plane/width"], row["ib/plane/height"])
            assert image.width > 500
    for key in ("ib/over_steps", "ib/layers"):
        # At twice the points each time, so that they are up to date at the end.
        assert [f"{key}/path" in row for row in (*rows, last)] == [False, True, False, True, False]
        with Image.open(run.files / rows[3][f"{key}/path"]) as image:
            assert image.format == "PNG" and image.width > 500
    assert run.step_metrics["ib/*"] == "train/global_step"
    losses = [row["train/global_step"] for row in run.rows if "train/loss" in row]
    assert losses == [3, 6, 9, 12], "the trainer's own rows have suffered"
    assert not any("train/loss" in row for row in [*rows, last]), "and rows were merged"

    table = run.table(last, "ib/trajectory")
    assert [line["step"] for line in table] == [0, 5, 10, 12]
    for line, point in zip(table, callback.trajectory, strict=True):
        assert {name: line.get(name) for name in point.scalars()} == point.scalars()
    for column in table[0]:
        assert column == "error" or any(line[column] is not None for line in table), f"{column} is empty throughout"
    settings = {name.removeprefix("ib_"): value for name, value in run.config.items() if name.startswith("ib_")}
    assert {
        "probe": "tokens", "probe_fingerprint": tiny_probe().fingerprint, "probe_sequences": 6, "probe_tokens": 96,
        "orders": "token, bigram, trigram, quadgram", "num_bins": 12, "seed": 0, "version": ib.__version__,
        "schedule": "every 5 steps", "select": "none", "stopping": "none", "guard_selection": "loss",
    }.items() <= settings.items()  # fmt: skip
    assert run.summary["ib/final_optimality"] == pytest.approx(callback.trajectory[-1].optimality)
    assert 0 < run.summary["ib/cost_seconds"] <= callback.cost.seconds
    assert "ib/best_step" not in run.summary


def test_rows_of_a_run_that_the_user_has_opened(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    follow(monkeypatch, made_up_run(C, E, steps=range(31), without=[7]))
    opened = wandb.init(project="mine", dir=str(offline))
    callback = tiny_callback(
        every_n_steps=1, orders="token", tokens_per_step=64, select="optimality",
        early_stopping=PlateauStopping(**STOPPING),
    )  # fmt: skip
    own = Each("on_step_end", lambda state, control, model: opened.log({"mine": state.global_step}))
    saving = {"steps": 30, "save_strategy": "steps", "save_steps": 4}
    with pytest.warns(RuntimeWarning, match="Nothing could be measured at step 7"):
        tiny_trainer(offline / "run", [callback, own], **saving).train()
    assert wandb.run is opened, "the run is the user's to finish"
    wandb.finish()

    (run,) = read_offline_runs(offline)
    rows, last = of_ours(run)
    measured = [step for step in range(24) if step != 7]
    assert [row["train/global_step"] for row in rows] == measured
    assert [row["ib/tokens_seen"] for row in rows] == [64 * step for step in measured]
    assert [row["ib/complexity"] for row in rows] == pytest.approx([C[step] for step in measured])
    assert [row["mine"] for row in run.rows if "mine" in row] == list(range(1, 24))
    assert len(run.rows) == len(rows) + 1 + 23
    assert run.step_metrics["ib/*"] == "train/global_step"
    assert [row["train/global_step"] for row in rows if "ib/selectable/optimality" in row] == list(range(15, 24))

    table = run.table(last, "ib/trajectory")
    assert [line["step"] for line in table] == list(range(24))
    # In hindsight: the fit from 2 on, where the complexity is lowest, and the compression from 10 on.
    assert [line["phase"] for line in table] == [0] * 2 + [1] * 8 + [2] * 14
    assert [line["error"] for line in table if line["error"] is not None] == [table[7]["error"]]
    assert "NaN in h.0" in table[7]["error"]
    assert table[7]["complexity"] is None
    assert [line["token/complexity"] for line in table if line["step"] != 7] == pytest.approx(
        [C[step] for step in measured]
    )
    summary = {name.removeprefix("ib/"): value for name, value in run.summary.items() if name.startswith("ib/")}
    assert {
        "best_step": 20, "best_by": "optimality", "best_value": pytest.approx(0.8), "fit_start": 2,
        "compression_start": 10, "final_complexity": pytest.approx(0.3), "final_expressivity": pytest.approx(0.24),
        "final_optimality": pytest.approx(0.8), "final_distance_to_bound": pytest.approx(0.06), "selected_step": 20,
        "selected_checkpoint": str(offline / "run" / "checkpoint-20"), "stop_reason": "plateau", "skipped_points": 0,
    }.items() <= summary.items()  # fmt: skip
    assert "has not improved on 0.06 (step 20) for 3 measurements" in summary["stop_message"]
    assert 0 < summary["cost_share"] < 1


def test_an_open_run_is_found_and_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert open_run() is None
    assert "wandb" not in sys.modules
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None))
    assert open_run() is None
    run = object()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=run))
    assert open_run() is run


def test_the_step_is_a_column_and_described_once_a_run() -> None:
    log = WandbLog("trainer/global_step")
    first, second = FakeRun(), FakeRun()
    log.log(first, {"ib/complexity": 0.5}, step=3)
    log.log(first, {"ib/complexity": 0.6}, step=6)
    log.log(second, {"ib/complexity": 0.7}, step=9)
    log.log(second, {}, step=10)
    log.log(first, {"ib/complexity": 0.8}, step=12)  # two runs in turn
    assert first.rows == [
        {"ib/complexity": 0.5, "trainer/global_step": 3},
        {"ib/complexity": 0.6, "trainer/global_step": 6},
        {"ib/complexity": 0.8, "trainer/global_step": 12},
    ]
    assert second.rows == [{"ib/complexity": 0.7, "trainer/global_step": 9}]
    assert first.defined == second.defined == [("ib/*", "trainer/global_step")]


def test_a_run_that_fails_is_one_warning() -> None:
    log = WandbLog("train/global_step")
    with pytest.warns(RuntimeWarning, match="could not be logged to Weights & Biases: ConnectionError: the service"):
        log.log(FakeRun("log"), {"ib/complexity": 0.5}, step=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.log(FakeRun("log"), {"ib/complexity": 0.5}, step=6)


def test_scalars_are_logged_without_a_picture_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def image(path: str, caption: str) -> None:
        raise OSError("cannot identify image file")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=image))
    run = FakeRun()
    with pytest.warns(RuntimeWarning, match=r"plane\.png could not be logged to Weights & Biases: OSError"):
        WandbLog("train/global_step").log(run, {"ib/complexity": 0.5}, step=3, plane=tmp_path / "plane.png")
    assert run.rows == [{"ib/complexity": 0.5, "train/global_step": 3}]


def test_scalars_are_logged_without_a_further_picture_that_fails(fake_wandb: None) -> None:
    run = FakeRun()
    png = encoded(plane_by_layer(measured(0, 0.5, 0.25)))
    with pytest.warns(RuntimeWarning, match=r"layers could not be logged to Weights & Biases: UnidentifiedImageError"):
        WandbLog("step").log(run, {"ib/a": 0.5}, step=3, pictures={"layers": b"no picture", "over_steps": png})
    (row,) = run.rows
    assert set(row) == {"ib/a", "ib/over_steps", "step"}
    assert "PngImageFile" in row["ib/over_steps"]


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    def table(columns: list[str], data: list[list[Any]]) -> list[dict[str, Any]]:
        return [dict(zip(columns, row, strict=True)) for row in data]

    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(Table=table, Image=lambda path, caption: f"image of {path}, {caption}")
    )


def test_the_end_of_a_run(fake_wandb: None) -> None:
    points = [measured(0, 0.5, 0.25), failed(10), measured(20, 0.4, 0.3, preference=0.02)]
    fake = FakeRun()
    WandbLog("train/global_step").finish(
        fake, Trajectory(points), {"ib/best_step": 20}, step=25, plane=Path("plane.png")
    )
    (row,) = fake.rows
    table = row.pop("ib/trajectory")
    assert row.pop("ib/plane").startswith("image of plane.png, step 25, phase not known yet: the information plane")
    assert row == {"train/global_step": 25}
    assert fake.summary == {"ib/best_step": 20}
    # A number that only some points have, and a point that is missing.
    assert [line["step"] for line in table] == [0, 10, 20]
    assert [line["complexity"] for line in table] == [0.5, None, 0.4]
    assert [line["preference/information"] for line in table] == [None, None, 0.02]
    assert [line["error"] for line in table] == [None, "NaN in h.0", None]


def test_a_run_without_points_has_a_summary_and_no_table(fake_wandb: None) -> None:
    fake = FakeRun()
    WandbLog("train/global_step").finish(fake, Trajectory(), {"ib/cost_seconds": 1.5}, step=0)
    assert (fake.rows, fake.summary) == ([], {"ib/cost_seconds": 1.5})


@pytest.mark.parametrize("broken", ["log", "summary"])
def test_an_end_that_fails_is_a_warning(broken: str, fake_wandb: None) -> None:
    with pytest.warns(RuntimeWarning, match="The trajectory could not be logged to Weights & Biases: ConnectionError"):
        WandbLog("train/global_step").finish(FakeRun(broken), Trajectory([failed(0)]), {"ib/a": 1.0}, step=3)


def test_copies_of_a_run_that_was_given_one_of_wandb_have_none(offline: Path) -> None:
    import wandb

    with wandb.init() as given, Run(Meter(tiny_probe(), num_bins=12), output_dir=offline, wandb=given) as run:
        run.step(tiny_model(), 0)
        for copied in (pickle.loads(pickle.dumps(run)), copy.deepcopy(run)):
            assert copied.wandb_runs == []
            assert copied.trajectory == run.trajectory
        assert run.wandb_runs == [given]
