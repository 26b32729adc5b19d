"""One live run to a directory, within a process and across processes."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest

from ib_callback.common.errors import TrajectoryError
from ib_callback.run.lock import Claim

HOLD = """
import sys
from pathlib import Path
from ib_callback.run.lock import Claim
claim = Claim(Path(sys.argv[1]), object())
print("held", flush=True)
sys.stdin.read()
"""


def test_two_claims_of_one_training(tmp_path):
    training = object()
    claim = Claim(tmp_path, training)
    with pytest.raises(TrajectoryError, match="another callback of this training"):
        Claim(tmp_path, training)
    claim.release()
    Claim(tmp_path, training).release()


def test_a_training_that_ended_without_a_word_is_taken_over(tmp_path):
    interrupted = Claim(tmp_path, object())
    taken = Claim(tmp_path, object())
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
            Claim(tmp_path, object())
        process.kill()
    Claim(tmp_path, object()).release()


def test_copies_hold_no_claim(tmp_path):
    claim = Claim(tmp_path, "training")
    assert copy.deepcopy(claim) is None
    with pytest.raises(TrajectoryError, match="another callback"):
        Claim(Path(tmp_path), "training")
    claim.release()
