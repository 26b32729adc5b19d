"""The bar: it goes forward, and where none is shown nothing is left of it."""

import io
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


class Broken(io.StringIO):
    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("stream", [None, Broken()], ids=["none", "closed pipe"])
@pytest.mark.parametrize("shown", [True, None])
def test_where_it_cannot_be_shown_the_work_is_done_all_the_same(
    stream: io.StringIO | None, shown: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    reached = []
    with progress_bar("sequences", total=4, unit="seq", shown=shown) as done:
        for number in range(4):
            done(number)
            reached.append(number)
    assert reached == [0, 1, 2, 3]
