"""What every adapter must do is written once here, and run in each loop."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from loops import LOOPS, TRAINERS, Loop


@pytest.fixture(params=LOOPS, ids=lambda loop: loop.name)
def loop(request: pytest.FixtureRequest) -> Loop:
    return request.param


@pytest.fixture(params=TRAINERS, ids=lambda loop: loop.name)
def trainer(request: pytest.FixtureRequest) -> Loop:
    """One that has callbacks, and knows of its data and of its last step."""
    return request.param


class FakeRun:
    """As much of a run of Weights & Biases as is used."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.defined: list[tuple[str, str]] = []

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.defined.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def points(self, loop: Loop) -> dict[int, dict[str, Any]]:
        """The rows that have a point, by step: one for each."""
        rows = [row for row in self.rows if "ib/complexity" in row]
        found = {row[loop.x_axis]: row for row in rows}
        assert len(found) == len(rows)
        return found


@pytest.fixture
def open_run(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    """The one that is open in this process."""
    run = FakeRun()
    table = lambda columns, data: (columns, data)  # noqa: E731
    module = types.SimpleNamespace(run=run, Table=table, Image=lambda source: source)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return run
