from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ib_callback.common.files import expanded, remove_partial_files, size_of, write_atomically


def fail(*args: object, **kwargs: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_cannot_be_written_leaves_the_old_file_and_nothing_beside_it(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match=r"Input/output error: '.*/a'$"):
            write_atomically(tmp_path / "a", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_an_error_names_the_path_that_was_given(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '~nobody/a\.csv'$"):
        write_atomically("~nobody/a.csv", b"")
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError, match=r": '.*/a'$"):
        write_atomically(tmp_path / "a", b"")


def test_a_home_in_a_path_is_that_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_atomically("~/a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert expanded(Path("~/a")) == tmp_path / "a"
    assert expanded("a~") == Path("a~")


def test_what_is_written_does_not_fail_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "unlink", fail)
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_an_error_while_looking_is_not_absence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"123")
    assert [size_of(tmp_path / name) for name in ("a", "b", "a/b")] == [3, None, None]
    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(OSError, match="Input/output error"):
        size_of(tmp_path / "a")


def test_only_files_that_a_killed_writer_left_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        patch.setattr(Path, "unlink", fail)  # as if it had been killed there
        for name in ("ib_a.json", "of the user"):
            with pytest.raises(OSError, match="Input/output error"):
                write_atomically(tmp_path / name, b"new")
    left = {path.name.split(".")[1]: path for path in tmp_path.iterdir()}
    (tmp_path / "ib_a.json").write_bytes(b"old")
    (tmp_path / f".ib_a.json.{'0' * 32}.partial").symlink_to(tmp_path / "ib_a.json")
    (tmp_path / f".ib_a.json.{'1' * 32}.partial").mkdir()
    (tmp_path / ".ib_a.json.partial").touch()
    before = set(tmp_path.iterdir())
    remove_partial_files(tmp_path, r"ib_\w+\.json")
    assert before - set(tmp_path.iterdir()) == {left["ib_a"]}
