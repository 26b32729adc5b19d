from __future__ import annotations

import importlib.util
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_hf import random_states, tiny_model, tiny_probe

from ib_callback import Meter, Trajectory, every
from ib_callback import plot as plot_module
from ib_callback import recorder as module
from ib_callback.errors import TrajectoryError
from ib_callback.recorder import PLANE_FILENAME, Recorder
from ib_callback.trajectory_lines import FILENAME


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

    def draw(trajectory: Trajectory, path: Path) -> None:
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

    def draw(trajectory: Trajectory, path: Path) -> None:
        if len(trajectory) in failing:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(plot_module, "save_information_plane", draw)
    recorder = make_recorder(draw_plane=True)
    recorder.start(model, directory=tmp_path)
    with pytest.warns(RuntimeWarning, match=r"could not be drawn\. OSError: .*No space left") as caught:
        record_all(recorder, model, range(4))
    drawing = [w for w in caught if "could not be drawn" in str(w.message)]  # another one: there is no null
    assert len(drawing) == 2, "for points 1 and 2 together, and for 4"


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
