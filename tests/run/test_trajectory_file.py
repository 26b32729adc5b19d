from __future__ import annotations

import errno
import json
import os
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from synthetic_runs import measured

from ib_callback.common.errors import TrajectoryError
from ib_callback.results.measurement import Measurement
from ib_callback.results.trajectory import FILENAME, Trajectory, append_line, check_writable
from ib_callback.run.trajectory_file import TrajectoryFile


def point(step: int) -> Measurement:
    return measured(step, 0.5, 0.25)


def add(file: TrajectoryFile, step: int) -> None:
    """As a run does: a point is in memory first."""
    file.trajectory.append(point(step))
    append_line(file.path, file.trajectory[-1])


def written(directory: Path, *steps: int) -> TrajectoryFile:
    file = TrajectoryFile(directory)
    for step in steps:
        add(file, step)
    return file


def test_each_point_is_in_the_file_as_soon_as_it_is_appended(tmp_path):
    file = TrajectoryFile(tmp_path / "new" / "run")
    for count, step in enumerate([0, 10, 20], 1):
        add(file, step)
        assert len(file.path.read_bytes().splitlines()) == count
        assert Trajectory.load(file.path) == file.trajectory
    assert file.path == tmp_path / "new" / "run" / "ib_trajectory.jsonl"
    assert file.rotated is None


def test_a_point_out_of_order_is_not_written(tmp_path):
    file = written(tmp_path, 10)
    before = file.path.read_bytes()
    with pytest.raises(ValueError, match="step 5 cannot follow step 10"):
        add(file, 5)
    assert file.path.read_bytes() == before
    assert file.trajectory.steps == [10]


@pytest.mark.parametrize("start_step", [0, None])
def test_a_fresh_run_moves_old_files_away_and_overwrites_none(tmp_path, start_step):
    (tmp_path / "ib_trajectory.7.jsonl").write_text("kept by a user")
    (tmp_path / "ib_trajectory.best.jsonl").write_text("another")
    names = []
    for last in (1, 2, 3):
        file = TrajectoryFile(tmp_path, start_step=start_step)
        assert len(file.trajectory) == 0
        add(file, last)
        names.append(file.rotated and file.rotated.name)
    assert names == [None, "ib_trajectory.8.jsonl", "ib_trajectory.9.jsonl"]
    assert [Trajectory.load(tmp_path / f"ib_trajectory.{n}.jsonl").steps for n in (8, 9)] == [[1], [2]]
    assert Trajectory.load(tmp_path).steps == [3]
    assert (tmp_path / "ib_trajectory.7.jsonl").read_text() == "kept by a user"


def test_a_fresh_run_moves_a_damaged_file_away_unread(tmp_path):
    (tmp_path / FILENAME).write_bytes(b"damaged\nbeyond\nrepair\n")
    file = TrajectoryFile(tmp_path)
    assert file.rotated is not None
    assert file.rotated.read_bytes() == b"damaged\nbeyond\nrepair\n"


def test_an_empty_file_is_not_rotated(tmp_path):
    (tmp_path / FILENAME).touch()
    assert TrajectoryFile(tmp_path).rotated is None
    assert os.listdir(tmp_path) == [FILENAME]


def test_a_resumed_run_drops_later_points_and_keeps_them_in_another_file(tmp_path):
    old = written(tmp_path, 0, 10, 20, 30)
    resumed = TrajectoryFile(tmp_path, start_step=20)
    assert resumed.trajectory.steps == [0, 10, 20]
    assert Trajectory.load(tmp_path) == resumed.trajectory
    assert resumed.rotated == tmp_path / "ib_trajectory.1.jsonl"
    assert Trajectory.load(resumed.rotated) == old.trajectory
    add(resumed, 25)
    assert Trajectory.load(tmp_path).steps == [0, 10, 20, 25]
    assert sorted(os.listdir(tmp_path)) == ["ib_trajectory.1.jsonl", "ib_trajectory.jsonl"]


def test_a_resumed_run_without_later_points_leaves_the_file_as_it_is(tmp_path):
    path = written(tmp_path, 0, 10).path
    # A newer version of this package may have written more than this one knows.
    lines = [json.dumps(json.loads(line) | {"novelty": 1}).encode() + b"\n" for line in path.read_bytes().splitlines()]
    path.write_bytes(b"".join(lines))
    resumed = TrajectoryFile(tmp_path, start_step=500)
    assert (resumed.trajectory.steps, resumed.rotated) == ([0, 10], None)
    assert path.read_bytes() == b"".join(lines)


def test_a_resumed_run_mends_a_torn_end_once(tmp_path):
    path = written(tmp_path, 0, 10, 20).path
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.warns(RuntimeWarning, match="incomplete"):
        resumed = TrajectoryFile(tmp_path, start_step=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add(resumed, 30)
        assert Trajectory.load(tmp_path).steps == [0, 10, 30]


def test_a_resumed_run_without_a_file_begins_one(tmp_path):
    resumed = TrajectoryFile(tmp_path, start_step=500)
    assert len(resumed.trajectory) == 0
    add(resumed, 600)
    assert Trajectory.load(tmp_path).steps == [600]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let writes beyond `size` bytes fail as on a full disk: in part, and with an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_takes_back_the_part_that_was_written(tmp_path):
    file = written(tmp_path, 0, 10)
    before = file.path.read_bytes()
    too_large = r"ib_trajectory\.jsonl cannot be written \(File too large"
    with largest_file(len(before) + 100), pytest.raises(TrajectoryError, match=too_large):
        add(file, 20)
    assert file.path.read_bytes() == before
    assert file.trajectory.steps == [0, 10, 20]
    add(file, 30)
    assert Trajectory.load(tmp_path).steps == [0, 10, 30]


def test_a_directory_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrajectoryError, match=r"output directory .*file .*pass output_dir="):
        check_writable(tmp_path / "file")
    with pytest.raises(TrajectoryError, match=r"output directory .*below .*pass output_dir="):
        TrajectoryFile(tmp_path / "file" / "below")


@pytest.fixture
def no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files without permission to write cannot be opened for it, as for a user who is not root."""
    real = os.open

    def open_as_user(path, flags, *mode, **keywords):
        writes = flags & (os.O_WRONLY | os.O_RDWR)
        if writes and os.path.exists(path) and not os.stat(path).st_mode & 0o222:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, flags, *mode, **keywords)

    monkeypatch.setattr(os, "open", open_as_user)


def read_only(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0o444)


def link_to_read_only(path: Path) -> None:
    read_only(path.parent / "elsewhere")
    path.symlink_to("elsewhere")


IN_THE_WAY = {
    "read-only": (read_only, "got Permission denied. Make it writable, move it away, or pass output_dir="),
    "link to a read-only one": (link_to_read_only, r"got Permission denied, where it leads to .*/elsewhere\. Make"),
    "link to nowhere": (lambda path: path.symlink_to("gone/a"), "No such file .*, where it leads to .*gone/a"),
    "link in a circle": (lambda path: path.symlink_to(path.name), "where it leads to"),
    "a folder": (lambda path: path.mkdir(), "got a folder"),
    "link to a folder": (lambda path: path.symlink_to("."), "got a folder, where it leads to"),
    "a pipe": (lambda path: os.mkfifo(path), "got something that is not a regular file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path, kind, no_root):
    make, message = IN_THE_WAY[kind]
    make(tmp_path / "ib_run.json")
    with pytest.raises(TrajectoryError, match=rf"ib_run\.json: expected a file that this run can write, .*{message}"):
        check_writable(tmp_path, ["ib_trajectory.jsonl", "ib_run.json"])


@pytest.mark.parametrize("linked", [False, True])
def test_what_can_be_written_is_left_as_it_is(tmp_path, linked):
    (tmp_path / "elsewhere").mkdir()
    if linked:
        (tmp_path / "a").symlink_to("elsewhere/a")
        (tmp_path / "b").symlink_to("elsewhere/b")  # is yet to be made
    (tmp_path / "a").write_text("kept")
    os.utime(tmp_path / "a", ns=(5, 5))
    check_writable(tmp_path, ["a", "b"])
    assert (tmp_path / "a").read_text() == "kept"
    assert (tmp_path / "a").stat().st_mtime_ns == 5
    assert sorted(os.listdir(tmp_path / "elsewhere")) == (["a"] if linked else [])
