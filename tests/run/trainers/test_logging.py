"""What others get to see of a run: Weights & Biases, phases and what can be selected by then, tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loops import Loop
from scripted import COURSE, follow
from synthetic_runs import COLLAPSE_AT_THE_END, STOPPING, C, E, run

import ib_callback as ib
from ib_callback.results.metrics import PRIMARY_SCALARS

KEYWORDS = {"steps": 30, "every_n_steps": 1, "orders": "token"}


def test_an_open_run_of_weights_and_biases_gets_every_point(
    loop: Loop, tmp_path: Path, open_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    followed = loop.train(tmp_path, **KEYWORDS).followed
    rows = open_run.points(loop)
    assert list(rows) == list(range(31))
    assert [row["ib/complexity"] for row in rows.values()] == followed.trajectory.values("complexity")
    assert [row["ib/phase"] for row in rows.values()] == [0] * 4 + [1] * 11 + [2] * 16
    assert open_run.defined == [("ib/*", loop.x_axis)]
    assert open_run.summary["ib/compression_start"] == 10
    columns, data = open_run.rows[-1]["ib/trajectory"]
    assert [row[columns.index("phase")] for row in data] == [0] * 2 + [1] * 8 + [2] * 21


def test_the_rule_of_phases_is_one_for_all(
    loop: Loop, tmp_path: Path, open_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    never = ib.PhaseRule(drop=0.99)
    rule = ib.PlateauStopping(**{**STOPPING, "phase_rule": never})
    outcome = loop.train(tmp_path, early_stopping=rule, select="optimality", save_every=10, **KEYWORDS)
    assert outcome.step == 30
    assert outcome.followed.decision.reason is ib.StopReason.NOT_ARMED
    assert outcome.followed.selected.fallback
    assert "ib/compression_start" not in open_run.summary
    for trajectory in (outcome.followed.trajectory, ib.Trajectory.load(tmp_path)):
        assert trajectory.phase_rule == never
        assert trajectory.phases().compression_start is None
        assert trajectory.best() is None
    assert ib.Trajectory(COURSE).phases().compression_start == 10, "by the default rule there is one"


WITH_GAPS = run(C, E, steps=range(31), without=[2, 5, 12, 16, 21, 30])


@pytest.mark.filterwarnings("ignore:Nothing could be measured")
@pytest.mark.parametrize(
    ("trajectory", "select_from"),
    [(COURSE, "compression"), (WITH_GAPS, "compression"), (WITH_GAPS, "fit"), (WITH_GAPS, 7)],
    ids=["without gaps", "compression", "fit", "step 7"],
)
def test_phase_and_selectable_numbers_are_those_known_by_then(
    trajectory: ib.Trajectory, select_from: Any, loop: Loop, tmp_path: Path, open_run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    follow(monkeypatch, trajectory)
    loop.train(tmp_path, select_from=select_from, **KEYWORDS)
    rows = open_run.points(loop)
    assert list(rows) == [point.step for point in trajectory if point.error is None]
    least = {"compression": 2, "fit": 1}.get(select_from)
    for point, phase in zip(trajectory, trajectory.phases().known, strict=True):
        if point.error is not None:
            continue
        row = rows[point.step]
        assert row["ib/phase"] == phase
        reached = point.step >= select_from if least is None else phase >= least
        for name in PRIMARY_SCALARS:
            assert row.get(f"ib/selectable/{name}") == (getattr(point, name) if reached else None)
    assert {row["ib/phase"] for row in rows.values()} == {0.0, 1.0, 2.0}


def test_collapsed_points_are_not_selectable(
    loop: Loop, tmp_path: Path, open_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the lowest complexity and distance since the fit began, from 21 on.
    follow(monkeypatch, ib.Trajectory(replace(point, step=step) for step, point in enumerate(COLLAPSE_AT_THE_END)))
    loop.train(tmp_path, **KEYWORDS)
    rows = open_run.points(loop)
    assert [step for step, row in rows.items() if "ib/selectable/distance_to_bound" in row] == list(range(15, 21))


def test_tokens_seen_are_those_of_the_step(
    loop: Loop, tmp_path: Path, open_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    keywords = {"steps": 10, "every_n_steps": 4, "orders": "token"}
    followed = loop.train(tmp_path, tokens_per_step=1000, **keywords).followed
    assert [point.tokens_seen for point in followed.trajectory] == [0, 4000, 8000, 10_000]
    rows = open_run.points(loop)
    assert {step: row["ib/tokens_seen"] for step, row in rows.items()} == {0: 0, 4: 4000, 8: 8000, 10: 10_000}
    open_run.rows.clear()
    followed = loop.train(tmp_path / "uncounted", **keywords).followed
    assert [point.tokens_seen for point in followed.trajectory] == [None] * 4
    assert len(open_run.points(loop)) == 4
    assert not any("ib/tokens_seen" in row for row in open_run.rows)
