"""Finished runs in W&B's offline files and TensorBoard's event files, read back: every number once, at its step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from synthetic_runs import C, E, measured, run
from wandb_offline import OfflineRun, read_offline_runs

from ib_callback.cli.main import main
from ib_callback.common.errors import TrajectoryError
from ib_callback.results.lines import Origin
from ib_callback.results.results import Results
from ib_callback.results.trajectory import FILENAME, Trajectory
from ib_callback.run.backfill import _on_server, numbers_of, to_tensorboard, to_wandb

COURSE = run(C[:12], E[:12], without=[3])


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    yield tmp_path
    wandb.finish()
    wandb.teardown()  # else it keeps what it has read of the environment


def points_of(logged: OfflineRun) -> list[dict[str, Any]]:
    return [row for row in logged.rows if "ib/complexity" in row]


def test_a_run_in_weights_and_biases(offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (offline / "run").mkdir()
    COURSE.save(offline / "run" / FILENAME)
    assert main(["log", str(offline / "run"), "--wandb", "project/a-run"]) == 0
    assert "run: 11 points logged; 1 could not be measured: " in capsys.readouterr().out
    (logged,) = read_offline_runs(offline)
    assert logged.step_metrics["ib/*"] == "ib/step"
    assert [row["ib/step"] for row in points_of(logged)] == [s for s in COURSE.steps if s != 300]
    known = COURSE.phases().known
    for row, (point, phase) in zip(
        points_of(logged), [(p, k) for p, k in zip(COURSE, known, strict=True) if p.error is None], strict=True
    ):
        assert {name: row[name] for name in point.metrics()} == point.metrics()
        assert row["ib/phase"] == phase
    (last,) = (row for row in logged.rows if "ib/trajectory/path" in row)
    assert [row["error"] for row in logged.table(last, "ib/trajectory")][3] == "NaN in h.0"
    assert last["ib/plane/_type"] == "image-file"
    assert logged.summary["ib/fit_start"] == 200


def test_no_point_is_twice_in_weights_and_biases(offline: Path) -> None:
    (first,) = to_wandb([("a", COURSE[:6])], "a-run", pictures=False)
    # Another run whose id ends alike.
    (other,) = to_wandb([("a", COURSE)], "not-a-run", pictures=False)
    (again,) = to_wandb([("a", COURSE)], "a-run", pictures=False)
    (once_more,) = to_wandb([("a", COURSE)], "a-run", pictures=False)
    assert [(r.logged, r.known) for r in (first, other, again, once_more)] == [(5, 0), (11, 0), (6, 5), (0, 11)]
    steps = sorted(
        row["ib/step"]
        for logged in read_offline_runs(offline)
        if "-not-a-run" not in logged.files.parent.name
        for row in points_of(logged)
    )
    assert steps == [s for s in COURSE.steps if s != 300]
    with pytest.raises(TrajectoryError, match=r"b: expected a place without step 0, or with the same numbers"):
        list(to_wandb([("b", run(E, C))], "a-run", pictures=False))


def test_several_models_have_a_run_each(offline: Path) -> None:
    courses = [("EleutherAI/pythia-14m", COURSE[:2]), ("b", COURSE[:1])]
    results = list(to_wandb(courses, "sweep", pictures=False))
    assert [Path(result.where).name.split("-", 3)[3] for result in results] == [
        "sweep-EleutherAI-pythia-14m",
        "sweep-b",
    ]
    assert sorted(len(points_of(logged)) for logged in read_offline_runs(offline)) == [1, 2]
    with pytest.raises(ValueError, match=r"got a-b twice"):
        list(to_wandb([("a/b", COURSE), ("a-b", COURSE)], "sweep"))


def test_a_single_point_without_a_step_is_at_0_and_others_have_no_place(offline: Path) -> None:
    alone = Trajectory([measured(None, 0.4, 0.3)])
    (result,) = to_wandb([("alone", alone)], "one", pictures=False)
    assert (result.logged, result.without_step) == (1, 0)
    (result,) = to_wandb([("two", Trajectory([*alone, *alone]))], "two", pictures=False)
    assert (result.logged, result.without_step) == (0, 2)
    assert "2 have no step, so they have no place on the axis" in str(result)


# --- what the server says of a run that exists


def server(monkeypatch: pytest.MonkeyPatch, history: Any) -> Any:
    fake = ModuleType("wandb")
    fake.Api = lambda: SimpleNamespace(run=lambda path: SimpleNamespace(scan_history=lambda: history(path)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return SimpleNamespace(offline=False, resumed=True, entity="e", project="p", id="x")


def test_the_server_is_asked_what_a_resumed_run_has(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"train/loss": 3.0},
        {"ib/step": 5, "ib/complexity": 0.5, "ib/trajectory": {}},
        {"ib/step": 5, "ib/plane": {}},
    ]
    live = server(monkeypatch, lambda path: rows if path == "e/p/x" else None)
    assert _on_server(live) == {5: {"ib/complexity": 0.5}}
    assert _on_server(SimpleNamespace(offline=True)) == {}

    def broken(path: str) -> None:
        raise ConnectionError("gone")

    with pytest.raises(TrajectoryError, match=r"the run x exists, but its points cannot be read"):
        _on_server(server(monkeypatch, broken))


def test_the_run_of_a_callback_is_refused() -> None:
    with pytest.raises(TrajectoryError, match=r"on the axis of its training, as a callback logs them"):
        numbers_of([{"ib/complexity": 0.5, "train/global_step": 5}], "live")


# --- TensorBoard


def events(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    read = {name: accumulator.Scalars(name) for name in accumulator.Tags()["scalars"]}
    assert all(len({event.step for event in each}) == len(each) for each in read.values()), "none twice"
    return {name: {event.step: event.value for event in each} for name, each in read.items()} | {
        name: {event.step: 0.0 for event in accumulator.Images(name)} for name in accumulator.Tags()["images"]
    }


def test_tensorboard_has_every_number_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs TensorBoard")
    folder = tmp_path / "logs"
    (first,) = to_tensorboard([("a", COURSE[:6])], folder)
    (again,) = to_tensorboard([("a", COURSE)], folder)
    (once_more,) = to_tensorboard([("a", COURSE)], folder)
    assert [(r.logged, r.known) for r in (first, again, once_more)] == [(5, 0), (6, 5), (0, 11)]
    found = events(folder)
    for point in COURSE:
        for name, value in point.metrics().items():
            assert found[name][point.step or 0] == pytest.approx(value, rel=1e-6)
    assert [*found["ib/complexity"]] == [s for s in COURSE.steps if s != 300]
    assert [*found["ib/plane"]] == [500, 1100]
    with pytest.raises(TrajectoryError, match=r"or with the same numbers"):
        list(to_tensorboard([("b", run(E, C))], folder))


def test_tensorboard_has_a_folder_for_each_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard", reason="needs TensorBoard")
    rows = [(Origin(model=name), replace(point, loss=4.0)) for name in ("o/small", "large") for point in COURSE[:2]]
    Results(rows).save(tmp_path / "results.jsonl")
    where = tmp_path / "logs"
    assert main(["log", str(tmp_path / "results.jsonl"), "--tensorboard", str(where), "--no-plane"]) == 0
    assert f"o/small: 2 points logged: {where / 'o-small'}" in capsys.readouterr().out
    assert events(where / "large")["ib/loss"] == {0: 4.0, 100: 4.0}


def test_without_tensorboard_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    COURSE.save(tmp_path / FILENAME)
    assert main(["log", str(tmp_path), "--tensorboard", str(tmp_path / "logs")]) == 2
    assert 'pip install "ib-callback[tensorboard]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--wandb", "a/b/c/d"], "expected ID, PROJECT/ID or ENTITY/PROJECT/ID"),
        (["--wandb", "a//d"], "expected ID, PROJECT/ID or ENTITY/PROJECT/ID"),
        (["--wandb", "a:d"], "expected the id of a run"),
        (["--tensorboard", "logs", "--group", "g"], "--group only works with --wandb"),
    ],
)
def test_mistakes(options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    COURSE.save(tmp_path / FILENAME)
    assert main(["log", str(tmp_path), *options]) == 2
    assert expected in capsys.readouterr().err
