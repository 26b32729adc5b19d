"""Explain in words why a download fails, and wait when a server asks for it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from ib_callback.common.messages import tell

Answer = TypeVar("Answer")

_TRIES = 4
_LONGEST_WAIT = 120.0  # seconds; a longer wait is an error, so the user can decide
_TOO_MANY = 429
# Names of errors, because httpx and huggingface_hub need not be installed. A connection broke off, or there was none.
_CUT = {"RemoteProtocolError", "ReadError", "IncompleteRead", "ChunkedEncodingError", "ProtocolError"}
_NO_ANSWER = {"ConnectError", "ConnectTimeout", "ReadTimeout", "PoolTimeout", "ProxyError", "LocalEntryNotFoundError"}


def trouble(error: BaseException) -> str | None:
    """The network problem behind an error or its causes; None if the cause is something else.

    The text is the beginning of a sentence that continues with remedies.
    """
    chain = list(_chain(error))
    if any(type(each).__name__ == "OfflineModeIsEnabled" for each in chain):
        return "There is no network (offline mode, HF_HUB_OFFLINE=1)"
    statuses = [status for each in chain if (status := _status(each)) is not None]
    if _TOO_MANY in statuses:
        seconds = next((s for each in chain if (s := _asked_to_wait(each)) is not None), None)
        wait = "" if seconds is None else f" for {seconds:.0f} s"
        cures = f"wait{wait} and try again, log in (HF_TOKEN), or do as without a network"
        return f"The hub limits the number of requests (429): {cures}"
    if any(status >= 500 for status in statuses):
        return f"The hub has an internal error ({statuses[0]}): try again later, or do as without a network"
    if any(type(each).__name__ in _CUT for each in chain):
        return "The download was cut off: try again; if the connection stays unstable"
    if any(
        isinstance(each, (ConnectionError, TimeoutError, socket.gaierror)) or type(each).__name__ in _NO_ANSWER
        for each in chain
    ):
        return "There is no network (or offline mode is on, HF_HUB_OFFLINE=1)"
    return None


def patiently(ask: Callable[[], Answer], what: str) -> Answer:
    """Ask a server, and ask again when it says to wait (429 with `Retry-After`). Each wait is reported.

    Args:
        ask: returns the answer, or raises.
        what: what is asked for, for the message.

    Raises:
        Exception: the error of the last try, or of a try after which the server asks for too long a wait.
    """
    for _ in range(_TRIES - 1):
        try:
            return ask()
        except Exception as error:
            seconds = next((s for each in _chain(error) if (s := _asked_to_wait(each)) is not None), None)
            if seconds is None or seconds > _LONGEST_WAIT:
                raise
            tell(f"{what}: the hub limits the number of requests (429); trying again in {seconds:.0f} s")
            time.sleep(seconds)
    return ask()


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _asked_to_wait(error: BaseException) -> float | None:
    """Seconds that the server asks to wait; None if it does not ask."""
    if _status(error) != _TOO_MANY:
        return None
    response: Any = getattr(error, "response", None)
    said = response.headers.get("Retry-After")
    try:
        return max(0.0, float(said))
    except (TypeError, ValueError):
        pass
    try:  # the header may hold a date
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
