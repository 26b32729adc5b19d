"""What users read can be silenced, is seen once, and never raises."""

from __future__ import annotations

import io
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ib_callback.common.messages import describe, tell, warn
from ib_callback.common.optional import is_installed


class MuteError(RuntimeError):
    def __str__(self) -> str:
        raise ValueError("no words")

    __repr__ = __str__


class WrongError(RuntimeError):
    def __str__(self) -> Any:
        return 3


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("no space left"), "OSError: no space left"),
        (KeyError("a"), "KeyError: 'a'"),
        (ValueError(), "ValueError"),
        (MuteError(), "MuteError (it cannot be printed)"),
        (WrongError(), "WrongError (it cannot be printed)"),
    ],
)
def test_errors_are_described_whatever_they_do(error: Exception, said: str) -> None:
    assert describe(error) == said


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


BAD_STREAMS = {"none": None, "closed": closed(), "full": Full()}


@pytest.mark.parametrize("stream", BAD_STREAMS.values(), ids=BAD_STREAMS)
def test_no_stream_is_too_bad(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    tell("it goes on")


@pytest.mark.parametrize("hook", [False, True], ids=["an error", "a hook that raises"])
def test_a_warning_that_may_not_be_shown_goes_to_the_log(
    hook: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise AttributeError("a hook of the user's")

    with warnings.catch_warnings():
        warnings.simplefilter("always" if hook else "error")
        if hook:
            monkeypatch.setattr(warnings, "showwarning", fail)
        warn("a point is missing")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("WARNING", "a point is missing")]


@contextmanager
def logging_of(level: int, *, handled: bool) -> Iterator[list[str]]:
    """As a user sets it up: the level of our logger, and whether the root has a handler."""
    root, ours, seen = logging.getLogger(), logging.getLogger("ib_callback"), []
    handlers, before = root.handlers[:], ours.level
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    try:
        root.handlers[:] = [handler] if handled else []
        ours.setLevel(level)
        yield seen
    finally:
        root.handlers[:] = handlers
        ours.setLevel(before)


@pytest.mark.parametrize(
    ("level", "handled", "on_stderr", "logged"),
    [
        (logging.NOTSET, False, True, False),
        (logging.NOTSET, True, True, False),  # at the root's WARNING: of other packages, perhaps
        (logging.INFO, False, True, False),
        (logging.INFO, True, False, True),
        (logging.DEBUG, True, False, True),
        (logging.WARNING, False, False, False),
        (logging.ERROR, True, False, False),
    ],
)
def test_what_is_told_is_seen_once_unless_it_is_silenced(
    level: int, handled: bool, on_stderr: bool, logged: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_of(level, handled=handled) as seen:
        tell("training stops at step 3")
    assert capsys.readouterr().err == ("ib_callback: training stops at step 3\n" if on_stderr else "")
    assert seen == (["training stops at step 3"] if logged else [])


def test_a_handler_that_raises_ends_nothing() -> None:
    with logging_of(logging.INFO, handled=True):
        logging.getLogger().handlers[0].emit = lambda record: 1 / 0  # type: ignore[method-assign]
        tell("it goes on")


def test_a_stand_in_without_a_specification_counts_as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    assert is_installed("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not is_installed("matplotlib")
    assert not is_installed("no_such_package_at_all")
