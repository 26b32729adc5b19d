from __future__ import annotations

import errno
import importlib.util
import json
import random
import re
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripted import BEST, COURSE, follow
from synthetic_runs import STOPPING
from tiny_hf import random_states, tiny_model, tiny_probe

from ib_callback import Meter, PhaseRule, Trajectory, every, ib_curve, logarithmic
from ib_callback import plot as plot_module
from ib_callback.bound.curve import FILENAME as CURVE
from ib_callback.common.errors import ModelError, TrajectoryError
from ib_callback.results.selection import Selection
from ib_callback.results.stopping import PlateauStopping
from ib_callback.results.trajectory import FILENAME, RUN_FILENAME
from ib_callback.run import run as module
from ib_callback.run.checkpoints import FILENAME as CHECKPOINTS
from ib_callback.run.config import split_keywords
from ib_callback.run.lock import FILENAME as LOCK
from ib_callback.run.run import FINAL_FILENAME, PLANE_FILENAME, Run
from ib_callback.run.summary import Selected


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny_model()


def make_run(*, log_plane: bool = False, bound: str = "diagonal") -> Run:
    meter = Meter(tiny_probe(), orders=("token", "bigram"), num_bins=12, null=False, bound=bound)
    return Run(meter, every_n_steps=2, log_plane=log_plane)


def record_all(followed: Run, model: torch.nn.Module, steps: range) -> None:
    for step in steps:
        followed.record(model, step)


def test_a_run_whose_file_has_names_with_the_wrapper_goes_on(model: torch.nn.Module, tmp_path: Path) -> None:
    first = make_run()
    first.begin(model, directory=tmp_path)
    record_all(first, model, range(0, 3, 2))
    first.end(2)
    file = tmp_path / FILENAME
    text = file.read_text().replace('"transformer.', '"_forward_module.transformer.')
    file.write_text(re.sub(', "crc32": "[0-9a-f]+"', "", text))
    resumed = make_run()
    resumed.begin(model, directory=tmp_path, step=2)
    assert resumed.trajectory.steps == [0, 2]
    assert resumed.trajectory[0].layers[0] == "_forward_module.transformer.h.0"
    resumed.end(2)


def test_a_model_that_begins_to_change_its_weights_is_not_measured_any_more(
    model: torch.nn.Module, tmp_path: Path
) -> None:
    runs = []
    followed = make_run()
    followed.begin(model, directory=tmp_path)
    record_all(followed, model, range(2))

    def rescale(layer: Any, *_: Any) -> None:
        runs.append(layer.weight.data.mul_(1.5))

    model.transformer.ln_f.register_forward_hook(rescale)
    with pytest.warns(
        RuntimeWarning, match=r"Training goes on.*'transformer\.ln_f\.weight'.*go on from the last checkpoint"
    ):
        followed.record(model, 2)
    weights, number = [p.clone() for p in model.parameters()], len(runs)
    with pytest.warns(RuntimeWarning, match="so it is not measured again"):
        followed.record(model, 3)
    assert len(runs) == number
    assert all(map(torch.equal, weights, model.parameters()))
    assert [point.error is None for point in followed.trajectory] == [True, True, False, False]
    followed.end(3)
    with pytest.raises(ModelError, match="put back bit for bit"):
        make_run().begin(model, directory=tmp_path / "again")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many points each picture had; instead of drawing any."""
    points: list[int] = []

    def draw(trajectory: Trajectory, path: Path, *, curve: None) -> None:
        points.append(len(trajectory))
        path.write_bytes(b"Creator\0ib_callback")

    monkeypatch.setattr(plot_module, "save_information_plane", draw)
    return points


def test_due_and_recorded(model: torch.nn.Module, tmp_path: Path) -> None:
    followed = make_run()
    followed.begin(model, directory=tmp_path)
    assert followed.due(0)
    assert not followed.recorded(0)
    followed.record(model, 0)
    followed.record(model, 4)
    assert [followed.due(step) for step in (0, 2, 4, 5, 6)] == [False, False, False, False, True]
    assert [followed.recorded(step) for step in (0, 3, 4, 5)] == [True, True, True, False]


def test_random_states_are_put_back(model: torch.nn.Module, tmp_path: Path) -> None:
    followed = make_run()
    before = random_states()

    def draw_numbers_and_fail() -> None:
        random.random(), np.random.rand(), torch.rand(1)
        assert random_states() != before
        raise RuntimeError("even then")

    with pytest.raises(RuntimeError, match="even then"), followed.at_work():
        draw_numbers_and_fail()
    assert random_states() == before


def test_a_process_that_does_not_write_leaves_no_file(model: torch.nn.Module, tmp_path: Path) -> None:
    followed = make_run(log_plane=True)
    followed.begin(model, directory=tmp_path, writes=False)
    record_all(followed, model, range(2))
    followed.end(1)
    assert followed.trajectory.steps == [0, 1]
    assert list(tmp_path.iterdir()) == []


def test_pictures_become_rarer_and_the_last_is_up_to_date(
    model: torch.nn.Module, drawn: list[int], tmp_path: Path
) -> None:
    followed = make_run(log_plane=True)
    followed.begin(model, directory=tmp_path)
    record_all(followed, model, range(45))
    assert drawn == [*range(1, 21), 25, 32, 40]
    followed.end(44)
    assert drawn[-1] == 45
    assert (tmp_path / PLANE_FILENAME).exists()
    followed.end(44)
    assert len(drawn) == 24, "it was up to date"


def test_nothing_is_drawn_where_nothing_was_measured(
    model: torch.nn.Module, drawn: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = make_run(log_plane=True)
    followed.begin(model, directory=tmp_path)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(followed.meter, "measure", fail)
    with pytest.warns(
        RuntimeWarning, match=r"at step 0\. Training goes on without this point\. RuntimeError: out of luck"
    ):
        record_all(followed, model, range(1))
    followed.end(0)
    assert drawn == []
    assert followed.trajectory[0].error == "RuntimeError: out of luck"
    assert followed.trajectory[0].settings == followed.meter.settings(model)


def test_a_picture_that_fails_is_one_warning_until_it_succeeds(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = {1, 2, 4}

    def draw(trajectory: Trajectory, path: Path, *, curve: None) -> None:
        if len(trajectory) in failing:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(plot_module, "save_information_plane", draw)
    followed = make_run(log_plane=True)
    followed.begin(model, directory=tmp_path)
    with pytest.warns(RuntimeWarning, match=r"could not be drawn\. OSError: .*No space left") as caught:
        record_all(followed, model, range(4))
    drawing = [w for w in caught if "could not be drawn" in str(w.message)]  # another one: there is no null
    assert len(drawing) == 2, "for points 1 and 2 together, and for 4"


def test_further_pictures_are_drawn_at_twice_the_points_and_at_the_end(
    model: torch.nn.Module, drawn: list[int], tmp_path: Path
) -> None:
    followed = make_run(log_plane=True)
    followed.begin(model, directory=tmp_path)
    at: dict[int, dict[str, bytes]] = {}
    for step in range(7):
        followed.record(model, step)
        at[step + 1] = followed.pictures()
    assert [points for points, pictures in at.items() if pictures] == [2, 4]
    assert all(set(at[points]) == {"over_steps", "layers"} for points in (2, 4))
    final = followed.pictures(final=True)
    assert all(content.startswith(b"\x89PNG") for content in (*at[2].values(), *final.values()))
    assert followed.pictures(final=True) == {}, "they are up to date"
    assert [path.name for path in tmp_path.glob("*.png")] == [PLANE_FILENAME], "a logger alone gets them"


def test_further_pictures_belong_to_the_plane(model: torch.nn.Module, tmp_path: Path) -> None:
    for log_plane, writes in ((False, True), (True, False)):
        followed = make_run(log_plane=log_plane)
        followed.begin(model, directory=tmp_path, writes=writes)
        record_all(followed, model, range(2))
        assert followed.pictures(final=True) == {}
        followed.end(0)


def test_a_further_picture_that_fails_is_a_warning(
    model: torch.nn.Module, drawn: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(plot_module, "plane_by_layer", fail)
    followed = make_run(log_plane=True)
    followed.begin(model, directory=tmp_path)
    record_all(followed, model, range(2))
    with pytest.warns(RuntimeWarning, match=r"pictures for a tracker could not be drawn\. RuntimeError: no fonts"):
        assert set(followed.pictures()) == {"over_steps"}


@pytest.mark.parametrize(
    ("content", "beside", "drawn"),
    [
        (b"Software\0Matplotlib version3.9", True, True),
        (b"Software\0Matplotlib version3.9", False, False),
        (b"edited by the user", True, False),
    ],
    ids=["an earlier version's", "nobody's", "edited"],
)
def test_a_picture_of_somebody_else_is_left_as_it_is(
    content: bytes, beside: bool, drawn: bool, model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions drew planes that are told from others by Matplotlib's mark and the trajectory beside them."""
    follow(monkeypatch)
    (tmp_path / PLANE_FILENAME).write_bytes(content)
    if beside:
        COURSE.save(tmp_path / FILENAME)
    followed = make_run(log_plane=True)
    says_so = pytest.warns(RuntimeWarning, match="was not drawn by this package. It is left as it is")
    with nullcontext() if drawn else says_so:
        followed.begin(model, directory=tmp_path)
    record_all(followed, model, range(2))
    followed.end(1)
    assert ((tmp_path / PLANE_FILENAME).read_bytes() != content) is drawn


def test_a_picture_that_is_put_there_in_mid_run_stays(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    followed = make_run(log_plane=True)
    followed.begin(model, directory=tmp_path)
    record_all(followed, model, range(2))
    (tmp_path / PLANE_FILENAME).write_bytes(b"edited by the user")
    with pytest.warns(RuntimeWarning, match="could not be drawn. FileExistsError: another file was put there"):
        record_all(followed, model, range(2, 4))
    assert (tmp_path / PLANE_FILENAME).read_bytes() == b"edited by the user"


@pytest.mark.parametrize("content", [b'{"fabric": "infiniband"}', b"no JSON"])
def test_a_run_file_of_somebody_else_is_moved(content: bytes, model: torch.nn.Module, tmp_path: Path) -> None:
    (tmp_path / RUN_FILENAME).write_bytes(content)
    with pytest.warns(
        RuntimeWarning,
        match=r"ib_run\.json was not written by a run of this package\. It was moved to .*ib_run\.1\.json",
    ):
        make_run().begin(model, directory=tmp_path)
    assert (tmp_path / "ib_run.1.json").read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_run().begin(model, directory=tmp_path)


def test_a_curve_of_somebody_else_is_left_as_it_is(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve = ib_curve(np.eye(3) / 3)
    monkeypatch.setattr(Meter, "curve", lambda meter: curve)
    path = tmp_path / "ib_curve.json"
    path.write_bytes(b'{"mine": 1}')
    with pytest.warns(
        RuntimeWarning, match=r"ib_curve\.json was not written by this package, and is left as it is\. Move it away"
    ):
        make_run().begin(model, directory=tmp_path)
    assert path.read_bytes() == b'{"mine": 1}'
    path.unlink()
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make_run().begin(model, directory=tmp_path)
        assert path.stat().st_size > 20


def test_what_is_selected_stays_while_the_disk_does_not_answer(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    keywords: dict[str, Any] = {"select": "optimality", "orders": "token", "log_plane": False}
    saved = [tmp_path / f"{step}.pt" for step in (18, 20, 22)]
    for path in saved:
        path.write_bytes(b"weights")

    def follow_on(first: int, last: int) -> Run:
        config, of_meter = split_keywords("Run", {"every_n_steps": 2, "output_dir": tmp_path, **keywords})
        run = Run(Meter(tiny_probe(), num_bins=12, **of_meter), config=config)
        run.begin(model, directory=tmp_path, step=first)
        for step in range(first, last + 1):
            if run.measures_at_start(step) or run.due(step):
                run.record(model, step)
        return run

    run = follow_on(0, 22)
    for step, path in zip((18, 20, 22), saved, strict=True):
        run.note_checkpoint(step, path)
    assert run.choose().path == saved[1]
    for choice in (module.Run.choose, module.Run.choose):
        with monkeypatch.context() as patch:
            patch.setattr("ib_callback.run.checkpoints.is_complete", fail_to_look)
            assert choice(run).path == saved[1], "it was there"
            run.end(22)
            run = follow_on(22, 22)
            assert run.choose() is None
            assert not run.certain
            assert run.keeps(saved[0]), "nobody knows"
        assert run.choose().path == saved[1]
        assert [run.keeps(path) for path in saved] == [False, True, False]
    saved[1].unlink()
    assert run.choose().path != saved[1]
    assert run.certain


def fail_to_look(path: Path, read_before: Any = None) -> bool:
    raise OSError(errno.EIO, "Input/output error")


def test_without_matplotlib(model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest)
    )
    followed = make_run(log_plane=True)
    with pytest.warns(RuntimeWarning, match=r'pip install "ib-callback\[plot\]"\. Or pass log_plane=False') as caught:
        followed.begin(model, directory=tmp_path)
    assert len(caught) == 1
    record_all(followed, model, range(3))
    followed.end(0)
    assert {path.name for path in tmp_path.iterdir()} == {FILENAME, LOCK, RUN_FILENAME}


FILES = [FILENAME, RUN_FILENAME, FINAL_FILENAME, LOCK, CHECKPOINTS, PLANE_FILENAME, CURVE]


@pytest.mark.parametrize("name", FILES)
def test_each_file_that_is_in_the_way_is_refused_before_the_first_step(
    name: str, model: torch.nn.Module, tmp_path: Path
) -> None:
    followed = make_run(log_plane=True, bound="ib_curve")
    (tmp_path / name).mkdir()
    with pytest.raises(
        TrajectoryError, match=f"{name}: expected a file that this run can write, or no file, got a fold"
    ):
        followed.begin(model, directory=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_files_that_will_not_be_written_may_be_anything(model: torch.nn.Module, tmp_path: Path) -> None:
    for name in (PLANE_FILENAME, CURVE):
        (tmp_path / name).mkdir()
    followed = make_run()
    followed.begin(model, directory=tmp_path)
    followed.end(0)


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
    followed = make_run()
    followed.begin(model, directory=tmp_path)
    with pytest.warns(RuntimeWarning, match="could not be written, and will be tried again") as caught:
        record_all(followed, model, range(3))
    assert len([w for w in caught if "could not be written" in str(w.message)]) == 1
    assert followed.trajectory.steps == [0, 1, 2]
    full = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        followed.end(0)
    assert Trajectory.load(tmp_path) == followed.trajectory


# --- along a made-up run


def along(directory: Path, *steps: int, **settings: Any) -> Run:
    """A followed that has been along `COURSE`; `follow` must have been called."""
    followed = Run(Meter(tiny_probe(), orders="token", num_bins=12), every_n_steps=1, log_plane=False, **settings)
    followed.begin(tiny_model(), directory=directory)
    for step in steps:
        with followed.at_work():
            followed.record(tiny_model(), step)
    return followed


def saved(followed: Run, directory: Path, *steps: int) -> None:
    for step in steps:
        path = directory / f"weights-{step}.ckpt"
        path.write_bytes(b"weights")
        followed.note_checkpoint(step, path)


@pytest.mark.parametrize(
    ("schedule", "step", "warns"),
    [(every(50), 0, True), (every(50), 49, False), (every(5), 0, False), (lambda step: False, 3, True)],
)
def test_a_schedule_that_never_fires_is_a_warning_of_the_process_that_writes(
    schedule: Any, step: int, warns: bool, model: torch.nn.Module, tmp_path: Path
) -> None:
    last = 50 if step == 49 else 40
    followed = Run(Meter(tiny_probe(), orders="token", num_bins=12), every_n_steps=schedule, log_plane=False)
    if warns:
        with pytest.warns(RuntimeWarning, match=f"never fires between step {step} and the last one, {last}: only"):
            followed.begin(model, directory=tmp_path, step=step, max_steps=last)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if not warns:
            followed.begin(model, directory=tmp_path, step=step, max_steps=last)
        followed.begin(model, directory=tmp_path, step=step, max_steps=last, writes=False)
        followed.begin(model, directory=tmp_path, step=step)


def test_of_several_steps_at_once_any_may_be_due(model: torch.nn.Module, tmp_path: Path) -> None:
    followed = Run(Meter(tiny_probe(), orders="token", num_bins=12), every_n_steps=10, log_plane=False)
    followed.begin(model, directory=tmp_path)
    assert [followed.due(step) for step in (10, 12)] == [True, False]
    assert [followed.due(step, since=since) for step, since in ((12, 8), (12, 9), (12, 10), (10, 8))] == [
        True, True, False, True,
    ]  # fmt: skip


def test_a_schedule_is_asked_once_of_a_step(model: torch.nn.Module, tmp_path: Path) -> None:
    """For it may count: also of one that is measured for its checkpoint after it was not due."""
    asked: list[int] = []
    meter = Meter(tiny_probe(), orders="token", num_bins=12)
    followed = Run(meter, every_n_steps=lambda step: asked.append(step) is None and step == 3, log_plane=False)
    followed.begin(model, directory=tmp_path)
    asked.clear()
    followed.record(model, 0)
    assert not followed.due(1, since=0)
    points = [followed.record(model, 1), followed.record(model, 3, since=1)]
    assert not followed.due(3, since=1)
    assert (asked, [point.scheduled for point in points]) == ([0, 1, 2, 3], [False, True])


def test_errors_at_the_start_are_raised_unless_memory_ran_out(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = make_run()
    followed.begin(model, directory=tmp_path)
    failure: list[Exception] = [TypeError("a mistake of the user")]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise failure[0]

    monkeypatch.setattr(followed.meter, "measure", fail)
    with pytest.raises(TypeError, match="a mistake of the user"):
        followed.record(model, 0, at_start=True)
    assert len(followed.trajectory) == 0
    failure[0] = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.warns(RuntimeWarning, match=r"at step 0\. .* OutOfMemoryError: CUDA out of memory"):
        followed.record(model, 0, at_start=True)
    assert followed.trajectory.steps == [0]
    assert followed.trajectory[0].error is not None


def test_tokens_seen_are_those_that_are_counted_or_else_reckoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    followed = along(tmp_path, 0, 3, tokens_per_step=100)
    followed.record(tiny_model(), 4, tokens_seen=123)
    assert [point.tokens_seen for point in followed.trajectory] == [0, 300, 123]


def test_the_best_of_the_checkpoints_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    followed = along(tmp_path, *range(24), select="optimality")
    assert followed.best_checkpoint() is None
    assert followed._choice().describe().startswith("No point can be selected: not in the compression phase; no check")
    # Also with one that is about to be saved, which is not there yet.
    assert followed.best_checkpoint(also=18) == Selected(step=18, value=COURSE[18].optimality, path=None)
    saved(followed, tmp_path, 8, 17, 19)
    there = Selected(step=19, value=COURSE[19].optimality, path=tmp_path / "weights-19.ckpt")
    assert followed.best_checkpoint() == followed.best_checkpoint(also=18) == there
    assert followed.best_checkpoint(also=20) == Selected(step=20, value=BEST.optimality, path=None)
    (tmp_path / "weights-19.ckpt").unlink()
    assert followed.best_checkpoint() == Selected(
        step=17, value=COURSE[17].optimality, path=tmp_path / "weights-17.ckpt"
    )
    without = along(tmp_path, 0)
    saved(without, tmp_path, 0)
    assert without.best_checkpoint() is None


def test_until_something_can_be_selected_the_lowest_loss_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {4: 3.0, 8: 2.0, 12: 2.5}
    follow(monkeypatch, Trajectory(replace(m, loss=losses.get(m.step, 4.0)) for m in COURSE))
    followed = along(tmp_path, *range(13), select="optimality")
    for step, best in ((4, 4), (8, 8), (12, 8)):
        saved(followed, tmp_path, step)
        expected = Selected(step=best, value=losses[best], path=tmp_path / f"weights-{best}.ckpt", fallback=True)
        assert followed.choose() == expected
    assert followed.keeps(tmp_path / "weights-8.ckpt")
    assert not followed.keeps(tmp_path / "weights-12.ckpt")
    assert followed.trajectory.best() is None
    followed.end(12)
    told = "Kept instead, as a fallback: the checkpoint of the lowest held-out loss (2.000), of step 8"
    assert told in capsys.readouterr().err


def test_without_a_loss_the_latest_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    followed = along(tmp_path, *range(13), select="optimality")
    saved(followed, tmp_path, 4, 8)
    assert followed.choose() == Selected(step=8, value=None, path=tmp_path / "weights-8.ckpt", fallback=True)
    # Nothing is saved for that.
    assert followed.best_checkpoint(also=10) is None
    without = along(tmp_path / "published", *range(13), select="optimality", guard=None)
    saved(without, tmp_path / "published", 4, 8)
    assert without.choose() is None


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [0, 2, 4, 5]),
        ({"at_start": False}, [2, 4, 5]),
        ({"at_finish": False}, [0, 2, 4]),
        ({"at_start": False, "every_n_steps": 2}, [2, 4, 5]),
        ({"at_start": False, "every_n_steps": logarithmic(2)}, [1, 3, 5]),
        # A step that is named is meant.
        ({"at_start": False, "every_n_steps": [0, 4]}, [0, 4, 5]),
        ({"at_start": False, "every_n_steps": lambda step: step in (0, 3)}, [0, 3, 5]),
        ({"at_start": False, "every_n_steps": lambda step: step == 3}, [3, 5]),
    ],
)
def test_the_first_and_the_last_step_can_be_left_out(
    settings: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    meter = Meter(tiny_probe(), orders="token", num_bins=12)
    keywords = {"every_n_steps": [2, 4], **settings}
    with Run(meter, output_dir=tmp_path, log_plane=False, **keywords) as followed:
        for step in range(6):
            followed.step(tiny_model(), step)
    assert followed.trajectory.steps == steps


def test_a_resumed_run_may_leave_out_its_first_step(tmp_path: Path) -> None:
    meter = Meter(tiny_probe(), orders="token", num_bins=12)
    for steps in (range(3), range(4, 9)):
        with Run(meter, output_dir=tmp_path, every_n_steps=4, at_start=False, log_plane=False) as followed:
            for step in steps:
                followed.step(tiny_model(), step)
    assert followed.trajectory.steps == [2, 8]


def test_selection_needs_the_first_point_and_says_so(tmp_path: Path) -> None:
    meter = Meter(tiny_probe(), orders="token", num_bins=12)
    with (
        pytest.warns(RuntimeWarning, match="at_start=False: the first point, at step 0, is measured all the same"),
        Run(meter, output_dir=tmp_path, select="loss", at_start=False, log_plane=False) as followed,
    ):
        followed.step(tiny_model(), 0)
    assert followed.trajectory.steps == [0]


def test_a_rule_that_does_not_act_says_so_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    follow(monkeypatch)
    followed = along(tmp_path, *range(28), early_stopping=PlateauStopping(**STOPPING, act=False))
    assert followed.decision is not None
    assert not followed.decision
    assert followed.logged(followed.trajectory[-1])["ib/would_stop"] == 1.0
    assert capsys.readouterr().err.count("step 23: training would stop: distance_to_bound has not improved") == 1
    assert followed._summary()["ib/would_stop"] == "yes"


def test_the_published_rule_is_warned_of_and_stands_beside_the_trajectory(tmp_path: Path, monkeypatch: Any) -> None:
    follow(monkeypatch)
    with pytest.warns(RuntimeWarning, match="guard=None applies the published rule"):
        along(tmp_path, 0, select="optimality", guard=None)
    read = Trajectory.load(tmp_path)
    assert (read.rule.plane, read.rule.tolerance) == ("plain", None)
    assert (read.guard, read.phase_rule) == (None, PhaseRule())


@pytest.mark.parametrize(
    ("settings", "guards"),
    [
        ({}, {"selection": "loss"}),
        ({"guard": 0.2, "early_stopping": PlateauStopping()}, {"stopping": 0.2, "selection": 0.2}),
        (
            {"early_stopping": PlateauStopping(guard=None), "select": Selection("loss", guard=0.5)},
            {"stopping": None, "selection": 0.5},
        ),
        (
            {"guard": None, "early_stopping": PlateauStopping(guard="loss"), "select": "loss"},
            {"stopping": "loss", "selection": None},
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:guard=None:RuntimeWarning")
def test_the_guard_of_each_rule_is_told(settings: Any, guards: Any, tmp_path: Path, monkeypatch: Any) -> None:
    follow(monkeypatch)
    followed = along(tmp_path, 0, **settings)
    assert json.loads((tmp_path / "ib_run.json").read_text())["guard"] == guards
    assert Trajectory.load(tmp_path).guard == guards["selection"]
    config, summary = followed._wandb.config, followed._summary()
    for name in ("stopping", "selection"):
        told = str(guards[name]) if name in guards else None
        assert config.get(f"ib_guard_{name}") == summary.get(f"ib/guard_{name}") == told


def test_a_summary_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    followed = along(tmp_path, *range(24), early_stopping=PlateauStopping(**STOPPING), select="complexity")
    saved(followed, tmp_path, 20)
    followed.choose()
    summary = followed._summary()
    assert {
        "ib/best_step": 20, "ib/best_by": "complexity", "ib/best_value": BEST.complexity, "ib/fit_start": 2,
        "ib/compression_start": 10, "ib/final_optimality": COURSE[23].optimality, "ib/selected_step": 20,
        "ib/selected_checkpoint": str(tmp_path / "weights-20.ckpt"), "ib/stop_reason": "plateau",
        "ib/skipped_points": 0,
    }.items() <= summary.items()  # fmt: skip
    assert summary["ib/stop_message"].endswith("a plateau")
    assert summary["ib/cost_seconds"] == pytest.approx(followed.cost.seconds)

    short = along(tmp_path / "short", 0, 1)._summary()
    assert not {"ib/best_step", "ib/fit_start", "ib/selected_step", "ib/stop_reason"} & set(short)
    assert along(tmp_path / "empty")._summary()["ib/best_by"] == "optimality"


def test_what_is_said_is_said_by_the_process_that_writes(
    model: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    followed = make_run()
    followed.shows_lines = False
    followed.begin(model, directory=tmp_path)
    followed.announce("to whom it may concern")
    assert capsys.readouterr().err == "ib_callback: to whom it may concern\n"
    followed.begin(model, directory=tmp_path, writes=False)
    followed.announce("to nobody")
    assert capsys.readouterr().err == ""


def test_a_rule_that_fails_costs_a_warning_and_no_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    rule = PlateauStopping()

    def fail(point: Any, phases: Any) -> None:
        raise ArithmeticError("out of luck")

    monkeypatch.setattr(rule, "update", fail)
    with pytest.warns(RuntimeWarning, match="rules for stopping and selection failed. ArithmeticError: out") as caught:
        followed = along(tmp_path, 0, 1, early_stopping=rule)
    assert len(caught) == 1
    assert followed.trajectory.steps == Trajectory.load(tmp_path).steps == [0, 1]
    assert followed.decision is None


@pytest.mark.parametrize("mix", [False, True])
def test_a_trajectory_of_other_settings(
    mix: bool, model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    along(tmp_path, *range(16))
    resumed = Run(Meter(tiny_probe(), orders="token", num_bins=13), every_n_steps=1, log_plane=False, mix_settings=mix)
    with pytest.warns(RuntimeWarning, match="num_bins: 12 vs 13"):
        resumed.begin(model, directory=tmp_path, step=12)
    # The rules have taken what is kept.
    assert (resumed.trajectory.steps, len(resumed.trajectory) > 0) == ((list(range(13)), True) if mix else ([], False))
    assert resumed.numbers()["ib/phase"] == (1 if mix else None)


def test_a_training_in_between_keeps_the_directory(model: torch.nn.Module, tmp_path: Path) -> None:
    """A training that another one of this process has interrupted writes nothing more among its points."""
    outer, inner = make_run(), make_run()
    outer.begin(model, directory=tmp_path)
    record_all(outer, model, range(2))
    inner.begin(model, directory=tmp_path)
    record_all(inner, model, range(3))
    inner.end(2)
    with pytest.warns(RuntimeWarning, match=r"another training in this process.*give each its own output_dir="):
        record_all(outer, model, range(5, 6))
    with pytest.warns(RuntimeWarning, match=r"points of steps 5 could not be written to .*\. They are in \.trajectory"):
        outer.end(5)
    assert Trajectory.load(tmp_path) == inner.trajectory
    assert outer.trajectory.steps == [0, 1, 5]


@pytest.mark.parametrize(("select", "number"), [("optimality", 4), (None, 2)])
@pytest.mark.parametrize(("budget", "exceeded"), [(1e-9, True), (1 - 1e-9, False)])
def test_what_no_budget_leaves_out_is_said_where_it_exceeds_the_budget(
    budget: float,
    exceeded: bool,
    select: str | None,
    number: int,
    model: torch.nn.Module,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    meter = Meter(tiny_probe(), num_bins=12)
    with Run(meter, output_dir=tmp_path, select=select, overhead_budget=budget, log_plane=False) as followed:
        for step in range(4):
            followed.step(model, step)
            torch.save(step, tmp_path / f"{step}.pt")
            followed.saved(step, tmp_path / f"{step}.pt")
    said = capsys.readouterr().err
    assert (f"overhead_budget=1e-09 was exceeded: {number} of the {number} measurements were" in said) is exceeded
    assert ("save or evaluate less often, or leave select= out\n" in said) is (exceeded and select is not None)
    assert ("save or evaluate less often\n" in said) is (exceeded and select is None)
