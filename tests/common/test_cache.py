"""Built once, whatever happens: several processes, a death in the middle, damage, no place to write."""

import errno
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from ib_callback.common import cache
from ib_callback.common.cache import build_once, cache_file, user_cache_directory

# The module alone: importing the package with torch in every process would take most of the time.
BUILD = f"""
import os, runpy, sys, time
from pathlib import Path
build_once = runpy.run_path({cache.__file__!r})["build_once"]

path, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def build():
    with open(log, "a") as file:
        file.write(str(os.getpid()) + "\\n")
    if "forking" in sys.argv and not (child := os.fork()):
        time.sleep(600)
    print("building", *([child] if "forking" in sys.argv else []), flush=True)
    time.sleep(seconds)
    return str(os.getpid())

print(build_once(path, build, write=lambda p, text: p.write_text(text) and None, read=Path.read_text, what="a text"))
"""


def write_number(path: Path, number: int) -> None:
    path.write_text(str(number))


def read_number(path: Path) -> int:
    return int(path.read_text())


def once(path: Path, number: int = 7, built: list[int] | None = None) -> int:
    def build() -> int:
        if built is not None:
            built.append(number)
        return number

    return build_once(path, build, write=write_number, read=read_number, what="a number")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_directory() == tmp_path / "ib_callback"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert user_cache_directory() == tmp_path / ".cache" / "ib_callback"
    monkeypatch.setattr("sys.platform", "darwin")
    assert user_cache_directory() == tmp_path / "Library" / "Caches" / "ib_callback"


def test_without_a_home_there_is_no_cache_and_the_ways_out_are_named(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it gives where nobody knows the user
    assert user_cache_directory() is None
    with pytest.warns(RuntimeWarning, match="a thing: it cannot be cached .* no home directory.* HOME, .*cache_dir="):
        assert cache_file("things", "thing", what="a thing") is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file("things", "thing", what="a thing") == tmp_path / "ib_callback" / "things" / "thing"


def test_built_the_first_time_and_read_the_second(tmp_path):
    path, built = tmp_path / "new" / "folder" / "number.txt", []
    assert once(path, 7, built) == 7
    assert once(path, 8, built) == 7
    assert built == [7]
    assert names(path.parent) == {"number.txt"}


def test_one_process_builds_and_the_others_wait(tmp_path):
    processes = [start(tmp_path / "text", tmp_path / "log", 0.5) for _ in range(3)]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    builders = (tmp_path / "log").read_text().split()
    assert len(builders) == 1
    assert {out.split()[-1] for out, _ in said} == set(builders)
    assert names(tmp_path) == {"text", "log"}


def test_after_a_death_in_the_middle_the_next_builds(tmp_path):
    path, log = tmp_path / "text", tmp_path / "log"
    with start(path, log, 600) as first:
        assert first.stdout.readline() == "building\n"
        second = start(path, log, 0)
        first.kill()
    out, errors = second.communicate()
    assert second.returncode == 0, errors
    assert log.read_text().split() == [str(first.pid), str(second.pid)]
    assert path.read_text() == str(second.pid) == out.split()[-1]
    assert names(tmp_path) == {"text", "log"}


def test_a_worker_that_outlives_its_parent_does_not_keep_the_lock(tmp_path):
    path, log = tmp_path / "text", tmp_path / "log"
    with start(path, log, 600, "forking") as first:
        assert first.stdout is not None
        worker = int(first.stdout.readline().split()[1])
        first.kill()
        first.wait()
        try:
            second = start(path, log, 0)
            _, errors = second.communicate(timeout=60)
            os.kill(worker, 0)  # it is still there
        finally:
            os.kill(worker, signal.SIGKILL)
    assert second.returncode == 0, errors
    assert path.read_text() == str(second.pid)


def test_those_who_wait_say_for_what(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(cache, "SAY_WAITING_SECONDS", (0.1, 60.0))
    path = tmp_path / "text"
    with start(path, tmp_path / "log", 0.6) as first:
        assert first.stdout.readline() == "building\n"
        built = build_once(path, str, write=Path.write_text, read=Path.read_text, what="a text")
        assert built == str(first.pid)
    (said,) = caplog.messages
    assert "a text: another process is building it. Waiting for" in said


def test_a_damaged_file_is_set_aside_and_built_anew(tmp_path):
    path = tmp_path / "number.txt"
    path.write_text("seven")
    with pytest.warns(RuntimeWarning, match=r"a number: .*number.txt is damaged or .* moved to number.txt.damaged"):
        assert once(path) == 7
    assert (tmp_path / "number.txt.damaged").read_text() == "seven"
    assert path.read_text() == "7"


def test_errors_of_building_are_raised_and_leave_nothing(tmp_path):
    def no_network() -> int:
        raise ConnectionError("no network")

    path = tmp_path / "number.txt"
    with pytest.raises(ConnectionError, match="no network"):
        build_once(path, no_network, write=write_number, read=read_number, what="a number")
    assert names(tmp_path) == set()
    assert once(path) == 7


def test_a_full_disk_costs_the_file_but_not_the_content(tmp_path):
    def full(path: Path, number: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.warns(RuntimeWarning, match=r"a number: it cannot be cached in .*No space left.*cache_dir="):
        assert build_once(tmp_path / "n", lambda: 77, write=full, read=read_number, what="a number") == 77
    assert names(tmp_path) == set()


def test_a_directory_that_cannot_be_made_or_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="cannot be cached in .*file.*XDG_CACHE_HOME"):
        assert once(tmp_path / "file" / "n") == 7

    # Permissions do not bind the superuser, who may be running the tests.
    real = os.open

    def read_only(path, flags, *rest, **keywords):
        if str(path).endswith(".lock"):
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *rest, **keywords)

    def refuse(path: Path, number: int) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", read_only)
    with pytest.warns(RuntimeWarning, match="cannot be cached in .*Permission denied"):
        assert build_once(tmp_path / "n", lambda: 7, write=refuse, read=read_number, what="a number") == 7
    write_number(tmp_path / "n", 8)
    assert once(tmp_path / "n") == 8  # what is there can be read all the same


def test_a_file_that_cannot_be_read_is_set_aside_as_it_is(tmp_path):
    # Of another user, or on a disk that fails for a moment.
    write_number(tmp_path / "n", 8)

    def read(path: Path) -> int:
        raise PermissionError(13, "Permission denied")

    with pytest.warns(RuntimeWarning, match="n is damaged or cannot be read. It was moved to n.damaged"):
        assert build_once(tmp_path / "n", lambda: 7, write=write_number, read=read, what="a number") == 7
    assert read_number(tmp_path / "n.damaged") == 8
    assert read_number(tmp_path / "n") == 7


@pytest.mark.parametrize("code", ["ENOSYS", "ENOTSUP", "EOPNOTSUPP", "ENOLCK"])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    def no_locks(*_: object) -> None:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert once(tmp_path / "n") == 7
    assert once(tmp_path / "n", 8) == 7
    assert names(tmp_path) == {"n"}


def test_a_lock_that_is_never_free_is_waited_for_with_words(tmp_path, monkeypatch):
    def busy(*_: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    class Patience(Exception):
        pass

    def say(*arguments: object) -> None:
        said.append(arguments)
        if len(said) == 3:
            raise Patience("after three words")

    said: list[tuple[object, ...]] = []
    monkeypatch.setattr("fcntl.flock", busy)
    monkeypatch.setattr(cache, "SAY_WAITING_SECONDS", (0.05, 0.1))
    monkeypatch.setattr(cache._log, "warning", say)
    with pytest.raises(Patience, match="after three words"):
        once(tmp_path / "n")
    assert [round(arguments[-1], 2) for arguments in said] == [0.05, 0.15, 0.25]
    assert not (tmp_path / "n").exists()
