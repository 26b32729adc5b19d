"""One live run to a directory, within a process and across processes."""

import copy
import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ib_callback.common.errors import TrajectoryError
from ib_callback.run.lock import RunLock

HOLD = """
import sys
from pathlib import Path
from ib_callback.run.lock import RunLock
claim = RunLock(Path(sys.argv[1]), object())
print("held", flush=True)
sys.stdin.read()
"""


def test_two_claims_of_one_training(tmp_path):
    training = object()
    claim = RunLock(tmp_path, training)
    with pytest.raises(TrajectoryError, match="another callback of this training"):
        RunLock(tmp_path, training)
    claim.release()
    RunLock(tmp_path, training).release()


def test_a_training_that_ended_without_a_word_is_taken_over(tmp_path):
    interrupted = RunLock(tmp_path, object())
    taken = RunLock(tmp_path, object())
    assert taken.holds and not interrupted.holds
    interrupted.release()  # late, and of no effect on the new claim
    process = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True, text=True, input="")
    assert "another live run, in another process" in process.stderr
    taken.release()


def test_another_process_holds_the_directory_until_it_ends(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(TrajectoryError, match=r"another live run.*pass another output_dir="):
            RunLock(tmp_path, object())
        process.kill()
    RunLock(tmp_path, object()).release()


def test_copies_hold_no_claim(tmp_path):
    claim = RunLock(tmp_path, "training")
    assert copy.deepcopy(claim) is None
    with pytest.raises(TrajectoryError, match="another callback"):
        RunLock(Path(tmp_path), "training")
    claim.release()


def answering(monkeypatch, code):
    def flock(descriptor, operation):
        if operation != fcntl.LOCK_UN:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_stops_nobody(tmp_path, monkeypatch, code):
    answering(monkeypatch, code)
    training = object()
    lock = RunLock(tmp_path, training)
    assert lock.holds
    with pytest.raises(TrajectoryError, match="another callback of this training"):  # within the process it holds
        RunLock(tmp_path, training)
    taken = RunLock(tmp_path, object())
    assert taken.holds and not lock.holds
    taken.release()


def test_locks_that_are_always_taken_are_an_error_that_names_the_way_out(tmp_path, monkeypatch):
    answering(monkeypatch, errno.EAGAIN)
    with pytest.raises(
        TrajectoryError, match=r"another live run.*refuses every lock: pass an output_dir= on another one"
    ):
        RunLock(tmp_path, object())


ORPHAN = """
import os, sys, time
from pathlib import Path
from ib_callback.run.lock import RunLock
lock = RunLock(Path(sys.argv[1]), object())
worker = os.fork()
if worker == 0:
    time.sleep(60)  # a data loader's worker that outlives its parent
    os._exit(0)
print(worker, flush=True)
sys.stdin.read()
"""


def test_a_worker_that_outlives_its_killed_parent_holds_nothing(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        worker = int(process.stdout.readline())
        process.kill()
        process.wait()
    try:
        os.kill(worker, 0)  # it is alive
        RunLock(tmp_path, object()).release()
    finally:
        os.kill(worker, signal.SIGKILL)
