"""What every adapter must do is written once here, and run in each loop."""

from __future__ import annotations

import pytest
from loops import LOOPS, Loop


@pytest.fixture(params=LOOPS, ids=lambda loop: loop.name)
def loop(request: pytest.FixtureRequest) -> Loop:
    return request.param
