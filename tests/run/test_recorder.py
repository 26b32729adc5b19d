from __future__ import annotations

import importlib.util
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripted import BEST, COURSE, follow
from synthetic_runs import STOPPING
from tiny_hf import random_states, tiny_model, tiny_probe

from ib_callback import Meter, Trajectory, every
from ib_callback import plot as plot_module
from ib_callback.common.errors import TrajectoryError
from ib_callback.results.stopping import PlateauStopping
from ib_callback.results.trajectory import FILENAME
from ib_callback.run import recorder as module
from ib_callback.run.recorder import PLANE_FILENAME, Recorder, Selected


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny_model()


def make_recorder(*, draw_plane: bool = False) -> Recorder:
    meter = Meter(tiny_probe(), orders=("token", "bigram"), num_bins=12, null=False)
    return Recorder(meter, every(2), draw_plane=draw_plane)


def record_all(recorder: Recorder, model: torch.nn.Module, steps: range) -> None:
    for step in steps:
        with recorder.at_work():
            recorder.record(model, step)
            recorder.draw()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many points each picture had; instead of drawing any."""
    points: list[int] = []

    def draw(trajectory: Trajectory, path: Path, *, curve: None) -> None:
        points.append(len(trajectory))
        path.write_bytes(b"a picture")

    monkeypatch.setattr(plot_module, "save_information_plane", draw)
    return points


def test_due_and_recorded(model: torch.nn.Module, tmp_path: Path) -> None:
    recorder = make_recorder()
    recorder.start(model, directory=tmp_path)
    assert recorder.due(0)
    assert not recorder.recorded(0)
    recorder.record(model, 0)
    recorder.record(model, 4)
    assert [recorder.due(step) for step in (0, 2, 4, 5, 6)] == [False, False, False, False, True]
    assert [recorder.recorded(step) for step in (0, 3, 4, 5)] == [True, True, True, False]


def test_random_states_are_put_back(model: torch.nn.Module, tmp_path: Path) -> None:
    recorder = make_recorder()
    before = random_states()

    def draw_numbers_and_fail() -> None:
        random.random(), np.random.rand(), torch.rand(1)
        assert random_states() != before
        raise RuntimeError("even then")

    with pytest.raises(RuntimeError, match="even then"), recorder.at_work():
        draw_numbers_and_fail()
    assert random_states() == before


def test_a_process_that_does_not_write_leaves_no_file(model: torch.nn.Module, tmp_path: Path) -> None:
    recorder = make_recorder(draw_plane=True)
    recorder.start(model, directory=tmp_path, writes=False)
    record_all(recorder, model, range(2))
    assert recorder.finish() is None
    assert recorder.trajectory.steps == [0, 1]
    assert list(tmp_path.iterdir()) == []


def test_pictures_become_rarer_and_the_last_is_up_to_date(
    model: torch.nn.Module, drawn: list[int], tmp_path: Path
) -> None:
    recorder = make_recorder(draw_plane=True)
    recorder.start(model, directory=tmp_path)
    record_all(recorder, model, range(45))
    assert drawn == [*range(1, 21), 25, 32, 40]
    assert recorder.finish() == tmp_path / PLANE_FILENAME
    assert drawn[-1] == 45
    assert recorder.finish() is None, "it was up to date"


def test_nothing_is_drawn_where_nothing_was_measured(
    model: torch.nn.Module, drawn: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = make_recorder(draw_plane=True)
    recorder.start(model, directory=tmp_path)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(recorder.meter, "measure", fail)
    with pytest.warns(
        RuntimeWarning, match=r"at step 0; training goes on without this point\. RuntimeError: out of luck"
    ):
        record_all(recorder, model, range(1))
    assert recorder.finish() is None
    assert drawn == []
    assert recorder.trajectory[0].error == "RuntimeError: out of luck"
    assert recorder.trajectory[0].settings == recorder.meter.settings(model)


def test_a_picture_that_fails_is_one_warning_until_it_succeeds(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = {1, 2, 4}

    def draw(trajectory: Trajectory, path: Path, *, curve: None) -> None:
        if len(trajectory) in failing:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(plot_module, "save_information_plane", draw)
    recorder = make_recorder(draw_plane=True)
    recorder.start(model, directory=tmp_path)
    with pytest.warns(RuntimeWarning, match=r"could not be drawn\. OSError: .*No space left") as caught:
        record_all(recorder, model, range(4))
    drawing = [w for w in caught if "could not be drawn" in str(w.message)]  # another one: there is no null
    assert len(drawing) == 2, "for points 1 and 2 together, and for 4"


def test_further_pictures_are_drawn_at_twice_the_points_and_at_the_end(
    model: torch.nn.Module, drawn: list[int], tmp_path: Path
) -> None:
    recorder = make_recorder(draw_plane=True)
    recorder.start(model, directory=tmp_path)
    at: dict[int, dict[str, bytes]] = {}
    for step in range(7):
        recorder.record(model, step)
        at[step + 1] = recorder.pictures()
    assert [points for points, pictures in at.items() if pictures] == [2, 4]
    assert all(set(at[points]) == {"over_steps", "layers"} for points in (2, 4))
    final = recorder.pictures(final=True)
    assert all(content.startswith(b"\x89PNG") for content in (*at[2].values(), *final.values()))
    assert recorder.pictures(final=True) == {}, "they are up to date"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".png"] == [], "a logger alone gets them"


def test_further_pictures_belong_to_the_plane(model: torch.nn.Module, tmp_path: Path) -> None:
    for draw_plane, writes in ((False, True), (True, False)):
        recorder = make_recorder(draw_plane=draw_plane)
        recorder.start(model, directory=tmp_path, writes=writes)
        record_all(recorder, model, range(2))
        assert recorder.pictures(final=True) == {}
        recorder.finish()


def test_a_further_picture_that_fails_is_a_warning(
    model: torch.nn.Module, drawn: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(plot_module, "plane_by_layer", fail)
    recorder = make_recorder(draw_plane=True)
    recorder.start(model, directory=tmp_path)
    record_all(recorder, model, range(2))
    with pytest.warns(RuntimeWarning, match=r"by layer could not be drawn\. RuntimeError: no fonts"):
        assert set(recorder.pictures()) == {"over_steps"}


def test_without_matplotlib(model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest)
    )
    recorder = make_recorder(draw_plane=True)
    with pytest.warns(RuntimeWarning, match=r'pip install "ib-callback\[plot\]", or pass log_plane=False') as caught:
        recorder.start(model, directory=tmp_path)
    assert len(caught) == 1
    record_all(recorder, model, range(3))
    assert recorder.finish() is None
    assert [path.name for path in tmp_path.iterdir()] == [FILENAME]


def test_points_that_could_not_be_written_are_kept_and_written_later(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_line = module.append_line
    full = True

    def append_unless_full(path: Path, point: Any) -> None:
        if full:
            raise TrajectoryError("No space left on device")
        append_line(path, point)

    monkeypatch.setattr(module, "append_line", append_unless_full)
    recorder = make_recorder()
    recorder.start(model, directory=tmp_path)
    with pytest.warns(RuntimeWarning, match="could not be written, and will be tried again") as caught:
        record_all(recorder, model, range(3))
    assert len([w for w in caught if "could not be written" in str(w.message)]) == 1
    assert recorder.trajectory.steps == [0, 1, 2]
    full = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorder.finish()
    assert Trajectory.load(tmp_path) == recorder.trajectory


# --- along a made-up run


def along(directory: Path, *steps: int, **settings: Any) -> Recorder:
    """A recorder that has been along `COURSE`; `follow` must have been called."""
    recorder = Recorder(Meter(tiny_probe(), orders="token", num_bins=12), every(1), draw_plane=False, **settings)
    recorder.start(tiny_model(), directory=directory)
    for step in steps:
        with recorder.at_work():
            recorder.record(tiny_model(), step)
    return recorder


def saved(recorder: Recorder, directory: Path, *steps: int) -> None:
    for step in steps:
        path = directory / f"weights-{step}.ckpt"
        path.write_bytes(b"weights")
        recorder.saved(step, path)


@pytest.mark.parametrize(
    ("schedule", "step", "warns"),
    [(every(50), 0, True), (every(50), 49, False), (every(5), 0, False), (lambda step: False, 3, True)],
)
def test_a_schedule_that_never_fires_is_a_warning_of_the_process_that_writes(
    schedule: Any, step: int, warns: bool, model: torch.nn.Module, tmp_path: Path
) -> None:
    last = 50 if step == 49 else 40
    recorder = Recorder(Meter(tiny_probe(), orders="token", num_bins=12), schedule, draw_plane=False)
    if warns:
        with pytest.warns(RuntimeWarning, match=f"never fires between step {step} and the last one, {last}: only"):
            recorder.start(model, directory=tmp_path, step=step, max_steps=last)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if not warns:
            recorder.start(model, directory=tmp_path, step=step, max_steps=last)
        recorder.start(model, directory=tmp_path, step=step, max_steps=last, writes=False)
        recorder.start(model, directory=tmp_path, step=step)


def test_of_several_steps_at_once_any_may_be_due(model: torch.nn.Module, tmp_path: Path) -> None:
    recorder = Recorder(Meter(tiny_probe(), orders="token", num_bins=12), every(10), draw_plane=False)
    recorder.start(model, directory=tmp_path)
    assert [recorder.due(step) for step in (10, 12)] == [True, False]
    assert [recorder.due(step, since=since) for step, since in ((12, 8), (12, 9), (12, 10), (10, 8))] == [
        True, True, False, True,
    ]  # fmt: skip


def test_errors_at_the_start_are_raised_unless_memory_ran_out(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = make_recorder()
    recorder.start(model, directory=tmp_path)
    failure: list[Exception] = [TypeError("a mistake of the user")]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise failure[0]

    monkeypatch.setattr(recorder.meter, "measure", fail)
    with pytest.raises(TypeError, match="a mistake of the user"):
        recorder.record(model, 0, at_start=True)
    assert len(recorder.trajectory) == 0
    failure[0] = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.warns(RuntimeWarning, match=r"at step 0; .* OutOfMemoryError: CUDA out of memory"):
        recorder.record(model, 0, at_start=True)
    assert recorder.trajectory.steps == [0]
    assert not recorder.has_values


def test_tokens_seen_are_those_that_are_counted_or_else_reckoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    recorder = along(tmp_path, 0, 3, tokens_per_step=100)
    recorder.record(tiny_model(), 4, tokens_seen=123)
    assert [point.tokens_seen for point in recorder.trajectory] == [0, 300, 123]


def test_the_best_of_the_checkpoints_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    recorder = along(tmp_path, *range(24), select="optimality")
    assert recorder.selected() is None
    assert recorder.why_none_selected().startswith("No point can be selected: not in the compression phase; no check")
    # Also with one that is about to be saved, which is not there yet.
    assert recorder.selected(also=18) == Selected(step=18, value=COURSE[18].optimality, path=None)
    saved(recorder, tmp_path, 8, 17, 19)
    there = Selected(step=19, value=COURSE[19].optimality, path=tmp_path / "weights-19.ckpt")
    assert recorder.selected() == recorder.selected(also=18) == there
    assert recorder.selected(also=20) == Selected(step=20, value=BEST.optimality, path=None)
    (tmp_path / "weights-19.ckpt").unlink()
    assert recorder.selected() == Selected(step=17, value=COURSE[17].optimality, path=tmp_path / "weights-17.ckpt")
    without = along(tmp_path, 0)
    saved(without, tmp_path, 0)
    assert without.selected() is None


def test_a_summary_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    recorder = along(tmp_path, *range(24), early_stopping=PlateauStopping(**STOPPING), select="complexity")
    saved(recorder, tmp_path, 20)
    summary = recorder.summary(recorder.selected())
    assert {
        "ib/best_step": 20, "ib/best_by": "complexity", "ib/best_value": BEST.complexity, "ib/fit_start": 4,
        "ib/compression_start": 10, "ib/final_optimality": COURSE[23].optimality, "ib/selected_step": 20,
        "ib/selected_checkpoint": str(tmp_path / "weights-20.ckpt"), "ib/stop_reason": "plateau",
        "ib/skipped_points": 0,
    }.items() <= summary.items()  # fmt: skip
    assert summary["ib/stop_message"].endswith("a plateau")
    assert summary["ib/cost_seconds"] == pytest.approx(recorder.cost.seconds)

    short = along(tmp_path / "short", 0, 1).summary()
    assert not {"ib/best_step", "ib/fit_start", "ib/selected_step", "ib/stop_reason"} & set(short)
    assert along(tmp_path / "empty").summary()["ib/best_by"] == "optimality"


def test_what_is_said_is_said_by_the_process_that_writes(
    model: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = make_recorder()
    recorder.start(model, directory=tmp_path)
    recorder.announce("to whom it may concern")
    assert capsys.readouterr().err == "ib_callback: to whom it may concern\n"
    recorder.start(model, directory=tmp_path, writes=False)
    recorder.announce("to nobody")
    assert capsys.readouterr().err == ""


def test_a_rule_that_fails_costs_a_warning_and_no_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    rule = PlateauStopping()

    def fail(point: Any) -> None:
        raise ArithmeticError("out of luck")

    monkeypatch.setattr(rule, "update", fail)
    with pytest.warns(RuntimeWarning, match="rules for stopping and selection failed. ArithmeticError: out") as caught:
        recorder = along(tmp_path, 0, 1, early_stopping=rule)
    assert len(caught) == 1
    assert recorder.trajectory.steps == Trajectory.load(tmp_path).steps == [0, 1]
    assert recorder.decision is None


@pytest.mark.parametrize("mix", [False, True])
def test_a_trajectory_of_other_settings(
    mix: bool, model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    along(tmp_path, *range(16))
    resumed = Recorder(Meter(tiny_probe(), orders="token", num_bins=13), every(1), draw_plane=False, mix_settings=mix)
    with pytest.warns(RuntimeWarning, match="num_bins: 12 vs 13"):
        resumed.start(model, directory=tmp_path, step=12)
    # The rules have taken what is kept.
    assert (resumed.trajectory.steps, resumed.has_values) == ((list(range(13)), True) if mix else ([], False))
    assert resumed.numbers()["ib/phase"] == (1 if mix else None)


def test_a_training_in_between_keeps_the_directory(model: torch.nn.Module, tmp_path: Path) -> None:
    """A training that another one of this process has interrupted writes nothing more among its points."""
    outer, inner = make_recorder(), make_recorder()
    outer.start(model, directory=tmp_path)
    record_all(outer, model, range(2))
    inner.start(model, directory=tmp_path)
    record_all(inner, model, range(3))
    inner.finish()
    with pytest.warns(RuntimeWarning, match=r"another training in this process.*give each its own output_dir="):
        record_all(outer, model, range(5, 6))
    with pytest.warns(RuntimeWarning, match=r"could not be written to .*: steps 5\. \.trajectory has them"):
        outer.finish()
    assert Trajectory.load(tmp_path) == inner.trajectory
    assert outer.trajectory.steps == [0, 1, 5]
