"""A run that goes on from a checkpoint continues its trajectory, and stops and selects as one never interrupted."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import PLAIN, TRAINERS, Loop, Outcome, checkpoints, recorded, remove_checkpoint
from scripted import COURSE, follow
from synthetic_runs import STOPPING, failed
from tiny_hf import numbers, pairs, same_weights

import ib_callback as ib
from ib_callback.results.trajectory import FILENAME

OLD = "ib_trajectory.1.jsonl"
KEYWORDS = {"every_n_steps": 2, "save_every": 5, "orders": "token"}


class Interrupted(Exception):
    """What a cluster does."""


def train_until(loop: Loop, directory: Path, step: int, **keywords: Any) -> None:
    """A training that is interrupted after a step, before it is measured or saved, and whatever was resumed."""

    def on_step(model: torch.nn.Module, now: int) -> None:
        if now == step:
            raise Interrupted(f"at step {step}")

    with pytest.raises(Interrupted, match=f"at step {step}"):
        loop.train(directory, on_step=on_step, **{"resume": bool(checkpoints(directory)), **keywords})


def begun(loop: Loop, directory: Path, **keywords: Any) -> ib.Trajectory:
    """A run that was interrupted at step 9; its last checkpoint is that of step 5. Its trajectory."""
    train_until(loop, directory, 9, **{**KEYWORDS, **keywords})
    assert list(checkpoints(directory)) == [5]
    return ib.Trajectory.load(directory) if (directory / FILENAME).exists() else ib.Trajectory()


def assert_same_points(loop: Loop, resumed: Outcome, whole: Outcome) -> None:
    """The same weights in the end and, where both were measured after the resumption, the same numbers."""
    assert resumed.step == whole.step == 12
    if not loop.exact:
        return
    assert same_weights(resumed.weights, whole.weights)
    if resumed.followed is not None:
        points = {point.step: numbers(point) for point in whole.followed.trajectory}
        again = {point.step: numbers(point) for point in resumed.followed.trajectory if point.step in points}
        assert {6, 8, 10, 12} <= set(again)
        assert all(points[step] == found for step, found in again.items())


def test_a_resumed_run_continues_the_trajectory(loop: Loop, tmp_path: Path) -> None:
    whole = loop.train(tmp_path / "whole", **KEYWORDS)
    # The points at 6 and 8 are not of weights that it ever had.
    first = begun(loop, tmp_path / "run")
    resumed = loop.train(tmp_path / "run", resume=True, **KEYWORDS)
    trajectory = resumed.followed.trajectory
    assert first.steps == [0, 2, 4, 6, 8]
    assert trajectory.steps == whole.followed.trajectory.steps == [0, 2, 4, 6, 8, 10, 12]
    assert trajectory[:3] == first[:3]
    assert_same_points(loop, resumed, whole)
    assert ib.Trajectory.load(tmp_path / "run") == trajectory
    assert ib.Trajectory.load(tmp_path / "run" / OLD) == first, "nothing that was measured is lost"


def test_a_torn_last_line_is_dropped(loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    begun(loop, tmp_path)
    lines = (tmp_path / FILENAME).read_bytes().splitlines(keepends=True)
    (tmp_path / FILENAME).write_bytes(b"".join(lines[:2]) + lines[2][:50])
    with pytest.warns(RuntimeWarning, match="last line is incomplete"):
        resumed = loop.train(tmp_path, resume=True, **KEYWORDS).followed.trajectory
    assert resumed.steps == [0, 2, 6, 8, 10, 12]
    assert ib.Trajectory.load(tmp_path) == resumed


def test_a_point_that_is_due_where_the_run_resumes_is_not_lost(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = follow(monkeypatch)
    first = begun(loop, tmp_path, every_n_steps=5)
    assert first.steps == [0, 5]
    (tmp_path / FILENAME).write_bytes((tmp_path / FILENAME).read_bytes().splitlines(keepends=True)[0])
    made.clear()
    resumed = loop.train(tmp_path, resume=True, **{**KEYWORDS, "every_n_steps": 5}).followed.trajectory
    assert made == [5, 10, 12]
    assert resumed.steps == [0, 5, 10, 12]


def test_a_checkpoint_of_a_run_that_nothing_followed(loop: Loop, tmp_path: Path) -> None:
    whole = loop.train(tmp_path / "whole", **KEYWORDS)
    begun(loop, tmp_path, follows=False)
    resumed = loop.train(tmp_path, resume=True, **KEYWORDS)
    # Without any point yet, one where the run resumes.
    assert resumed.followed.trajectory.steps == [5, 6, 8, 10, 12]
    assert resumed.followed.trajectory[0].error is None
    assert_same_points(loop, resumed, whole)


def test_a_checkpoint_of_a_run_that_was_followed_is_resumed_without(loop: Loop, tmp_path: Path) -> None:
    whole = loop.train(tmp_path / "whole", follows=False)
    begun(loop, tmp_path)
    resumed = loop.train(tmp_path, resume=True, follows=False)
    assert_same_points(loop, resumed, whole)


def test_what_followed_another_training_forgets_it(loop: Loop, tmp_path: Path) -> None:
    begun(loop, tmp_path / "a", follows=False)
    other = loop.train(tmp_path / "b", steps=4, **KEYWORDS).followed
    shutil.rmtree(tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    resumed = loop.train(tmp_path / "b", resume=True, again=other)
    assert resumed.followed.trajectory.steps == [5, 6, 8, 10, 12]


def test_a_run_that_is_resumed_where_it_ends_is_whole(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = follow(monkeypatch)
    keywords = {**KEYWORDS, "steps": 30, "select": "optimality"}
    whole = loop.train(tmp_path, **keywords).followed
    made.clear()
    resumed = loop.train(tmp_path, resume=True, **keywords).followed
    assert made == []
    assert resumed.trajectory == whole.trajectory == ib.Trajectory.load(tmp_path)
    assert resumed.selected == whole.selected
    assert whole.selected.step == 20


def test_a_run_that_was_moved_as_a_whole(loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    keywords = {"every_n_steps": 1, "save_every": 2, "orders": "token", "select": "optimality", "steps": 30}
    train_until(loop, tmp_path / "here", 23, **keywords)
    shutil.move(tmp_path / "here", tmp_path / "there")
    resumed = loop.train(tmp_path / "there", resume=True, **keywords).followed
    assert resumed.trajectory.steps == list(range(31))
    assert resumed.selected.step == 20
    assert resumed.selected.path == checkpoints(tmp_path / "there")[20]


# --- other settings


@pytest.mark.parametrize("loop", TRAINERS, ids=lambda loop: loop.name)
def test_a_run_that_goes_on_in_another_directory_takes_its_points_along(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    whole = loop.train(tmp_path / "whole", select="optimality", **KEYWORDS)
    begun(loop, tmp_path / "run", select="optimality")
    # Only the checkpoint is moved, as from the disk of a node to that of another.
    saved = checkpoints(tmp_path / "run")[5]
    moved = tmp_path / "node" / saved.relative_to(tmp_path / "run")
    moved.parent.mkdir(parents=True)
    (shutil.copytree if saved.is_dir() else shutil.copyfile)(saved, moved)
    there = loop.train(tmp_path / "node", resume=True, select="optimality", **KEYWORDS)
    trajectory = there.followed.trajectory
    assert [(p.step, p.optimality, p.scheduled) for p in trajectory] == [
        (p.step, p.optimality, p.scheduled) for p in whole.followed.trajectory
    ]
    assert ib.Trajectory.load(tmp_path / "node") == trajectory


@pytest.mark.parametrize("loop", TRAINERS, ids=lambda loop: loop.name)
@pytest.mark.parametrize("goes_on_in", ["run", "node"], ids=["where they are", "elsewhere"])
def test_points_of_another_run_are_not_taken_for_those_of_the_checkpoint(
    goes_on_in: str, loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint was put aside, and another run begun in the directory of its run."""

    follow(monkeypatch)
    begun(loop, tmp_path / "run")
    saved = checkpoints(tmp_path / "run")[5]
    saved.rename(tmp_path / "aside")
    follow(monkeypatch, ib.Trajectory(replace(point, entropy=0.5) for point in COURSE))
    others = begun(loop, tmp_path / "run")
    remove_checkpoint(tmp_path / "run", 5)
    follow(monkeypatch)
    continued = tmp_path / goes_on_in
    back = continued / saved.relative_to(tmp_path / "run")
    back.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "aside").rename(back)
    with pytest.warns(RuntimeWarning, match=f"point of step 4 in {continued}.* belongs to another run"):
        outcome = loop.train(continued, resume=True, select="optimality", **KEYWORDS)
    assert outcome.followed.trajectory.steps == [5, 6, 8, 10, 12]
    moved = [ib.Trajectory.load(path) for path in continued.glob("ib_trajectory.*.jsonl")]
    assert ib.Trajectory(point for point in others if point.step <= 5) in moved
    noted = recorded(continued)
    assert list(noted)[:2] == [5, 10]
    assert all(path.resolve().is_relative_to(continued) for path in noted.values()), "none of the other run's"


@pytest.mark.parametrize("loop", TRAINERS, ids=lambda loop: loop.name)
@pytest.mark.parametrize("lost", ["all", "the last one"])
def test_points_that_a_resumed_run_lacks_are_told(
    lost: str, loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    begun(loop, tmp_path)
    lines = (tmp_path / FILENAME).read_bytes().splitlines(keepends=True)
    (tmp_path / FILENAME).write_bytes(b"".join([] if lost == "all" else lines[:2]))
    said = "has none of them" if lost == "all" else "ends at step 2"
    with pytest.warns(RuntimeWarning, match=f"measured up to step 4 before .*{FILENAME} {said}"):
        resumed = loop.train(tmp_path, resume=True, **KEYWORDS)
    assert resumed.followed.trajectory.steps == ([5, 6, 8, 10, 12] if lost == "all" else [0, 2, 6, 8, 10, 12])


@pytest.mark.parametrize("loses", ["its directory", "all of it", "a line", "its end"])
def test_a_file_that_loses_points_in_mid_run_gets_every_point(
    loses: str, loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    rule = ib.PhaseRule(drop=0.04)

    def on_step(model: torch.nn.Module, step: int) -> None:
        file = tmp_path / "run" / FILENAME
        if step == 7 and loses == "its directory":
            shutil.rmtree(file.parent)
        elif step == 7:
            lines = file.read_bytes().splitlines(keepends=True)
            file.write_bytes({"all of it": b"", "a line": b"".join(lines[1:]), "its end": lines[0] + b"{"}[loses])

    lost = "was gone" if loses == "its directory" else "had lost points"
    left = "" if loses in ("its directory", "all of it") else f" What was left is in {OLD}."
    said = f"{FILENAME} {lost} while the run went on.{left} It has been written again, with all 5 points."
    with pytest.warns(RuntimeWarning, match=said):
        outcome = loop.train(tmp_path / "run", on_step=on_step, phase_rule=rule, **{**KEYWORDS, "save_every": 0})
    assert outcome.followed.trajectory.steps == [0, 2, 4, 6, 8, 10, 12]
    read = ib.Trajectory.load(tmp_path / "run")
    assert read == outcome.followed.trajectory
    assert read.phase_rule == rule
    assert (tmp_path / "run" / OLD).exists() is bool(left)


def test_other_settings_begin_a_new_trajectory(loop: Loop, tmp_path: Path) -> None:
    first = begun(loop, tmp_path)
    with pytest.warns(
        RuntimeWarning,
        match=r"whose last point \(step 4\) was measured with other settings: num_bins: 12 vs 13 \(then vs now\)\. "
        r"They cannot be compared: a new trajectory begins here, and the old one is in .*ib_trajectory\.2\.jsonl",
    ):
        resumed = loop.train(tmp_path, resume=True, num_bins=13, **KEYWORDS).followed.trajectory
    # What lay past the checkpoint was dropped first.
    assert resumed.steps == [5, 6, 8, 10, 12]
    assert [point.settings["num_bins"] for point in ib.Trajectory.load(tmp_path)] == [13] * 5
    assert ib.Trajectory.load(tmp_path / OLD) == first
    assert ib.Trajectory.load(tmp_path / "ib_trajectory.2.jsonl") == first[:3]


def test_other_settings_are_mixed_if_that_is_wanted(loop: Loop, tmp_path: Path) -> None:
    first = begun(loop, tmp_path)
    with pytest.warns(RuntimeWarning, match=r"num_bins: 12 vs 13 .* cannot be compared; mix_settings=True mixes"):
        resumed = loop.train(tmp_path, resume=True, num_bins=13, mix_settings=True, **KEYWORDS).followed.trajectory
    assert resumed.steps == [0, 2, 4, 6, 8, 10, 12]
    assert [point.settings["num_bins"] for point in resumed] == [12] * 3 + [13] * 4
    assert resumed[:3] == first[:3]
    assert ib.Trajectory.load(tmp_path) == resumed


def test_other_feature_probes_begin_a_new_trajectory(loop: Loop, tmp_path: Path) -> None:
    begun(loop, tmp_path, feature_probes=[pairs()])
    with pytest.warns(RuntimeWarning, match=r"feature_probes: \{.*preference.* vs absent"):
        resumed = loop.train(tmp_path, resume=True, **{**KEYWORDS, "steps": 6}).followed.trajectory
    assert resumed.steps == [5, 6]


def test_what_was_best_by_other_settings_is_not_best_any_more(loop: Loop, tmp_path: Path) -> None:
    begun(loop, tmp_path, select="optimality", select_from=0)
    with pytest.warns(RuntimeWarning, match="a new trajectory begins here"):
        resumed = loop.train(tmp_path, resume=True, num_bins=13, select="optimality", **KEYWORDS)
    assert resumed.followed.selected.fallback
    assert resumed.followed.selected.step in resumed.followed.trajectory.steps
    with pytest.warns(RuntimeWarning, match="a new trajectory begins here|No checkpoint could be selected") as caught:
        resumed = loop.train(tmp_path, resume=True, num_bins=14, select="optimality", guard=None, **KEYWORDS)
    assert sum("No checkpoint could be selected" in str(w.message) for w in caught) == 1
    assert resumed.followed.selected is None


# --- stopping and selection

RULES = {"every_n_steps": 1, "save_every": 2, "orders": "token", "select": "optimality", "steps": 30}


def stopping(**settings: Any) -> ib.PlateauStopping:
    return ib.PlateauStopping(**{**STOPPING, **settings})


def ending(followed: Any) -> tuple[Any, ...]:
    """All in which an interrupted run must equal one that is not."""
    points = [(point.step, numbers(point)) for point in followed.trajectory]
    return points, followed.decision, followed.selected.step, followed.selected.value, followed.selected.path.name


def test_a_resumed_run_stops_and_selects_as_an_uninterrupted_one(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    whole = loop.train(tmp_path / "whole", early_stopping=stopping(), **RULES)
    assert (whole.step, whole.followed.selected.step) == (23, 20)
    for until in ((3,), (17, 19), (5, 9, 11, 21)):
        directory = tmp_path / str(until)
        for step in until:
            train_until(loop, directory, step, early_stopping=stopping(), **RULES)
        last = loop.train(directory, resume=True, early_stopping=stopping(), **RULES)
        assert ending(last.followed) == ending(whole.followed), until
        assert last.followed.selected.path == checkpoints(directory)[20]
        assert ib.Trajectory.load(directory) == last.followed.trajectory


def test_a_run_that_had_stopped_stays_stopped(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, steps = follow(monkeypatch), []
    keywords = {**RULES, "save_every": 1}
    first = loop.train(tmp_path, early_stopping=stopping(), **keywords).followed
    left = checkpoints(tmp_path)
    made.clear()
    capsys.readouterr()
    again = loop.train(
        tmp_path, early_stopping=stopping(), resume=True, on_step=lambda model, step: steps.append(step), **keywords
    ).followed
    assert made == []
    # HuggingFace's takes a step before it looks, which is no part of the run.
    assert steps == ([24] if loop.name == "hf" else [])
    assert checkpoints(tmp_path) == left
    assert again.trajectory == first.trajectory == ib.Trajectory.load(tmp_path)
    assert (again.decision, again.selected) == (first.decision, first.selected)
    assert "at step 23: distance_to_bound has not improved on 0.06" in capsys.readouterr().err


def test_more_patience_than_before_lets_it_go_on(loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    loop.train(tmp_path, early_stopping=stopping(), **RULES)
    again = loop.train(tmp_path, early_stopping=stopping(patience=8), resume=True, **RULES)
    assert again.step == 28
    assert again.followed.trajectory.steps == list(range(29))


def test_a_point_that_was_measured_for_a_checkpoint_is_not_measured_again(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = follow(monkeypatch)
    keywords = {**RULES, "every_n_steps": 5}
    train_until(loop, tmp_path, 15, **keywords)
    assert made == [0, 2, 4, 5, 6, 8, 10, 12, 14]
    made.clear()
    train_until(loop, tmp_path, 19, **keywords)
    assert made == [15, 16, 18]
    assert ib.Trajectory.load(tmp_path).steps == [0, 2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18]
    assert not (tmp_path / OLD).exists(), "no point had to be dropped"
    assert list(recorded(tmp_path)) == list(range(2, 19, 2))


def test_a_checkpoint_whose_measurement_failed_can_be_resumed_from(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch, ib.Trajectory(failed(14) if point.step == 14 else point for point in COURSE))
    keywords = {**RULES, "every_n_steps": 5}
    with pytest.warns(RuntimeWarning, match="Nothing could be measured at step 14"):
        train_until(loop, tmp_path, 15, **keywords)
    train_until(loop, tmp_path, 19, **keywords)
    points = ib.Trajectory.load(tmp_path)
    assert [point.step for point in points if point.error] == [14]
    assert points.steps[-3:] == [15, 16, 18]


# --- an earlier best, with which nothing can be compared any more

CHANGES = {
    "a setting": {"num_bins": 13},
    "the version": {},
    "the trajectory": {},
    "all the files": {},
    "the rule": {"select": "token/expressivity"},
    "no selection": {"select": None},
}
GONE = {"the trajectory": [FILENAME], "all the files": [FILENAME, "ib_checkpoints.jsonl", "ib_run.json"]}
# A loop of one's own asks `keeps`, which knows of an earlier part what its files say.
CHANGED = [
    *((trainer, changed, 25) for trainer in TRAINERS for changed in CHANGES),
    *((trainer, changed, 22) for trainer in TRAINERS for changed in ("a setting", "the trajectory", "the rule")),
    *((PLAIN, changed, 25) for changed in ("a setting", "the version", "the trajectory")),
]


@pytest.mark.parametrize(("loop", "changed", "until"), CHANGED, ids=[f"{c[0].name}-{c[1]}-{c[2]}" for c in CHANGED])
def test_the_earlier_best_is_kept_whatever_changes(
    loop: Loop, changed: str, until: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the checkpoint of step 20: the one resumed from or, if the run comes as far as 25, the one before."""
    follow(monkeypatch)
    keywords = {"every_n_steps": 2, "orders": "token", "select": "optimality", "steps": 30, "limited": True}
    train_until(loop, tmp_path, until, save_every=4 if until == 25 else 20, **keywords)
    before = digests(checkpoints(tmp_path)[20])
    if changed == "the version":
        monkeypatch.setattr("ib_callback.measuring.meter.__version__", "0.0.9")
    for name in GONE.get(changed, []):
        (tmp_path / name).unlink()
    again = {"resume": True, "save_every": 4, **keywords, **CHANGES[changed]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.train(tmp_path, **again)
        loop.train(tmp_path, **{**again, "steps": 40})  # it stays, whatever resumes later
    said = [str(warning.message) for warning in caught if "Remove it yourself when" in str(warning.message)]
    assert len(said) == (loop in TRAINERS), "where it is removed by others"
    left = [digests(path) for path in tmp_path.rglob("*") if path.is_dir() or path.suffix in (".ckpt", ".pt")]
    assert before in left


def digests(path: Path) -> dict[str, str]:
    """Of the files of a checkpoint."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {
        "" if file == path else file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file()
    }
