"""What `test_trajectory.py` does not say of these files already: torn ends and full disks are there."""

from __future__ import annotations

import errno
import io
import json
import os
import warnings
from pathlib import Path

import pytest

from ib_callback.common import json_lines
from ib_callback.common.errors import TrajectoryError


def intact(data: bytes) -> list[tuple[int, bytes]]:
    return list(json_lines.intact_lines(data, Path("t.jsonl")))


# --- reading


def test_lines_have_the_numbers_that_an_editor_shows():
    assert intact(b'{"a": 1}\n\n  \n{"b": 2}\n') == [(1, b'{"a": 1}'), (4, b'{"b": 2}')]
    assert intact(b"") == intact(b"\n \n") == []


def test_a_last_line_without_a_line_break_counts():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert intact(b'{"a": 1}\n{"b": 2}') == [(1, b'{"a": 1}'), (2, b'{"b": 2}')]


@pytest.mark.parametrize("end", [b'{"b": ', b'{"b": "\xff"}', b'{"b": 2}}', b"\0\0\0"])
def test_a_torn_end_is_left_out_with_a_warning(end):
    with pytest.warns(RuntimeWarning, match=r"t\.jsonl: the last line is incomplete"):
        assert intact(b'{"a": 1}\n' + end + b"\n\n") == [(1, b'{"a": 1}')]


@pytest.mark.parametrize("damaged", [b'{"b": ', b'{"b": "\xff"}', b"\0\0\0"])
def test_damage_before_the_end_is_named_and_has_a_cure(damaged):
    with pytest.raises(TrajectoryError, match=r"t\.jsonl:3: expected one JSON object, got .*remove that line, or move"):
        intact(b'{"a": 1}\n\n' + damaged + b'\n{"c": 3}\n')


# --- appending


def test_a_line_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    path, synced = tmp_path / "t.jsonl", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(path.read_bytes()))
    json_lines.append(path, b'{"a": 1}\n')
    json_lines.append(path, b'{"b": 2}\n')
    assert synced == [b'{"a": 1}\n', b'{"a": 1}\n{"b": 2}\n']


@pytest.mark.parametrize("before", [b"", b'{"a": 1}\n', b'{"a": 1}', b'{"a": 1}\n\n', b'{"a": 1}\n  '])
def test_what_is_intact_stays_and_each_line_is_one_of_its_own(tmp_path, before):
    path = tmp_path / "t.jsonl"
    path.write_bytes(before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        json_lines.append(path, b'{"b": 2}\n')
        json_lines.append(path, b'{"c": 3}\n')
    assert path.read_bytes().startswith(before)
    assert [line for _, line in intact(path.read_bytes())][-2:] == [b'{"b": 2}', b'{"c": 3}']
    assert len(intact(path.read_bytes())) == 2 + bool(before)


def test_a_line_that_does_not_reach_the_disk_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "t.jsonl"
    json_lines.append(path, b'{"a": 1}\n')

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fails)
        with pytest.raises(TrajectoryError, match=r"t\.jsonl cannot be written \(Input/output error\)\. Check"):
            json_lines.append(path, b'{"b": 2}\n')
    assert path.read_bytes() == b'{"a": 1}\n'


def test_a_line_is_there_once_however_an_earlier_try_failed(tmp_path, monkeypatch):
    """Written, flushed in vain and not to be taken back; and an error of closing, when it is long on the disk."""
    path = tmp_path / "a.jsonl"
    json_lines.append(path, b'{"a": 1}\n')

    class Failing(io.FileIO):
        def truncate(self, size=None):
            raise OSError(errno.EIO, "Input/output error")

        def close(self):
            super().close()
            raise OSError(errno.EIO, "Input/output error")

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda path, mode, buffering: Failing(path, "a+"))
        json_lines.append(path, b'{"b": 2}\n')
        patch.setattr(os, "fsync", fail)
        with pytest.raises(TrajectoryError, match="Input/output error"):
            json_lines.append(path, b'{"c": 3}\n')
    assert path.read_bytes() == b'{"a": 1}\n{"b": 2}\n{"c": 3}\n'
    json_lines.append(path, b'{"c": 3}\n')
    json_lines.append(path, b'{"d": 4}\n')
    assert path.read_bytes() == b'{"a": 1}\n{"b": 2}\n{"c": 3}\n{"d": 4}\n'


def test_what_cannot_be_set_aside_leaves_no_name_taken(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n")

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="Input/output error"):
            json_lines.set_aside(tmp_path / "a.jsonl")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_directory_in_the_way_is_named(tmp_path):
    (tmp_path / "t.jsonl").mkdir()
    with pytest.raises(TrajectoryError, match=r"t\.jsonl cannot be written \(Is a directory\)"):
        json_lines.append(tmp_path / "t.jsonl", b"{}\n")


# --- setting aside


def test_a_name_is_later_than_all_others_and_taken_at_once(tmp_path):
    # Of these only the first two are numbered names of this file.
    for name in ("a+b.2.jsonl", "a+b.11.jsonl", "aab.20.jsonl", "a+b.x.jsonl", "a+b.30.jsonl.bak", "x.a+b.40.jsonl"):
        (tmp_path / name).touch()
    assert json_lines.reserve_name(tmp_path / "a+b.jsonl") == tmp_path / "a+b.12.jsonl"
    assert (tmp_path / "a+b.12.jsonl").read_bytes() == b""
    assert json_lines.reserve_name(tmp_path / "a+b.jsonl") == tmp_path / "a+b.13.jsonl"


def test_a_name_that_another_process_takes_meanwhile_is_not_taken_again(tmp_path, monkeypatch):
    (tmp_path / "t.1.jsonl").write_bytes(b"of the other one")
    monkeypatch.setattr(os, "listdir", lambda directory: [])  # as before the other one made it
    assert json_lines.reserve_name(tmp_path / "t.jsonl") == tmp_path / "t.2.jsonl"
    assert (tmp_path / "t.1.jsonl").read_bytes() == b"of the other one"


def test_a_file_is_set_aside_unless_there_is_nothing_in_it(tmp_path):
    path = tmp_path / "t.jsonl"
    assert json_lines.set_aside(path) is None
    path.touch()
    assert json_lines.set_aside(path) is None
    path.write_bytes(b"something")
    assert json_lines.set_aside(path) == tmp_path / "t.1.jsonl"
    assert (tmp_path / "t.1.jsonl").read_bytes() == b"something"
    assert not path.exists()


# --- errors


def test_an_error_of_the_system_says_what_cannot_be_done():
    with (
        pytest.raises(TrajectoryError, match=r"the file t\.jsonl cannot be moved \(No space left\)\. Check") as caught,
        json_lines.explained(Path("t.jsonl"), "moved"),
    ):
        raise OSError(errno.ENOSPC, "No space left")
    assert isinstance(caught.value.__cause__, OSError)
    with (
        pytest.raises(TrajectoryError, match=r"cannot be read \(some reason without a number\)"),
        json_lines.explained(Path("t.jsonl"), "read"),
    ):
        raise OSError("some reason without a number")


def test_other_errors_are_passed_on_as_they_are():
    with pytest.raises(KeyError, match="mine"), json_lines.explained(Path("t.jsonl"), "read"):
        raise KeyError("mine")


@pytest.mark.parametrize(
    "text", ["[" * 100_000 + "]" * 100_000, b'{"a": ' * 100_000, "9" * 5000, "nothing", b"\xff", ""]
)
def test_what_is_no_json_is_a_value_error_whatever_it_is(text):
    with pytest.raises(ValueError, match=r"nested too deep|Exceeds the limit|Expecting value|can't decode"):
        json_lines.parsed(text)


def test_a_list_that_is_too_long_for_the_memory_is_a_value_error(monkeypatch):
    def too_long(_):
        raise MemoryError

    monkeypatch.setattr(json, "loads", too_long)
    with pytest.raises(ValueError, match="does not fit into memory"):
        json_lines.parsed("[]")
