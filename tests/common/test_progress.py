"""The bar: it goes forward, and where none is shown nothing is left of it."""

import subprocess
import sys

import pytest

from ib_callback.common.progress import progress_bar


def test_it_goes_forward_only(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("sequences", total=4, unit="seq", shown=True) as done:
        for number in (1, 3, 2, 4):
            done(number)
    assert "sequences: 100%" in capsys.readouterr().err


HIDDEN = """
import threading
from ib_callback.common.progress import progress_bar
for shown in (False, None):
    with progress_bar("sequences", total=4, unit="seq", shown=shown) as done:
        done(4)
print(threading.active_count())
"""


def test_a_hidden_one_starts_no_thread() -> None:
    """A process with a second thread cannot be forked safely, as data loaders do."""
    done = subprocess.run([sys.executable, "-c", HIDDEN], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("1\n", "")
