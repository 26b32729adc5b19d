"""Measurements that are made up beforehand, so that some thirty steps of a tiny model go through all phases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from synthetic_runs import C, E, run

import ib_callback as ib

# One point a step: collapse until 2, fitting from 4, the maximum of the complexity at 10, compression recognised at 15
# and ending at 20, which is the best point, plateau until 30. `PlateauStopping(**STOPPING)` stops it at 23.
COURSE = run(C, E, steps=range(31))
BEST = COURSE[20]


def follow(monkeypatch: pytest.MonkeyPatch, trajectory: ib.Trajectory = COURSE) -> list[int]:
    """Let every measurement be the point of `trajectory` at its step; the steps at which one was made, as they come.

    Where the point is missing, the measurement fails. The points know the order `token` alone, and carry the
    settings of the meter that is asked for them.
    """
    points = {point.step: point for point in trajectory}
    made: list[int] = []

    def measure(meter: ib.Meter, model: torch.nn.Module, *, step: Any = None) -> ib.Measurement:
        made.append(step)
        point = points[step]
        if point.error is not None:
            raise RuntimeError(point.error)
        return replace(point, settings=meter.settings(model))

    monkeypatch.setattr(ib.Meter, "measure", measure)
    return made
