"""An input/output error at any system call of the package costs no run its best checkpoint."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from kills.faults import Sweep


@pytest.mark.parametrize("name", ["hf, resumed with other settings", "lightning, one file, resumed"])
def test_five_errors_of_the_sweep(name: str, tmp_path: Path) -> None:
    sweep = Sweep(name, tmp_path)
    numbers = random.Random(0).sample(range(len(sweep.calls)), 5)
    outcomes = {number: sweep.outcome(number) for number in numbers}
    assert set(outcomes.values()) <= {"right", "refused"}, outcomes
