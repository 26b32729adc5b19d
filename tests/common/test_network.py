from __future__ import annotations

import socket
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import pytest

from ib_callback.common import network


class Refused(Exception):
    def __init__(self, status: int, **headers: str) -> None:
        super().__init__(f"{status}")
        self.response = SimpleNamespace(
            status_code=status, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )


def named(name: str) -> Exception:
    return type(name, (Exception,), {})("what it says")


def caused_by(error: BaseException, outer: Exception) -> Exception:
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (named("OfflineModeIsEnabled"), "There is no network (offline mode, HF_HUB_OFFLINE=1)"),
        (socket.gaierror(-2, "Name or service not known"), "There is no network (or offline mode is on"),
        (caused_by(ConnectionRefusedError(), ValueError("x")), "There is no network (or offline mode is on"),
        (named("ConnectTimeout"), "There is no network (or offline mode is on"),
        (named("IncompleteRead"), "The download was cut off"),
        (caused_by(named("RemoteProtocolError"), ConnectionError("Server Disconnected")), "The download was cut off"),
        (Refused(429, Retry_After="30"), "The hub limits the number of requests (429): wait for 30 s and try again"),
        (Refused(429), "The hub limits the number of requests (429): wait and try again"),
        (Refused(503), "The hub has an internal error (503)"),
    ],
)
def test_what_is_in_the_way(error: Exception, expected: str) -> None:
    assert (network.trouble(error) or "").startswith(expected)


@pytest.mark.parametrize("error", [ValueError("x"), Refused(404), EOFError("ended"), FileNotFoundError("x")])
def test_other_errors_are_none_of_the_network(error: Exception) -> None:
    assert network.trouble(error) is None


def test_a_circle_of_causes_has_an_end() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert network.trouble(first) is None


class Server:
    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def __call__(self) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr("time.sleep", found.append)
    return found


def test_a_server_is_asked_again_after_as_long_as_it_says(waits: list[float]) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100))
    server = Server(Refused(429, Retry_After="7"), Refused(429, Retry_After=date), "answer")
    assert network.patiently(server, "a model") == "answer"
    assert waits[0] == 7
    assert 0 <= waits[1] <= 100


@pytest.mark.parametrize("error", [Refused(429), Refused(429, Retry_After="3600"), Refused(404), ValueError("x")])
def test_whoever_would_have_to_wait_long_or_in_vain_is_told_at_once(error: Exception, waits: list[float]) -> None:
    with pytest.raises(type(error)):
        network.patiently(Server(error), "a model")
    assert waits == []


def test_a_server_is_not_asked_for_ever(waits: list[float]) -> None:
    with pytest.raises(Refused):
        network.patiently(Server(*[Refused(429, Retry_After="1")] * 9), "a model")
    assert waits == [1.0] * 3
