"""A run that a rule ends: `early_stopping=`."""

from __future__ import annotations

import logging
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loops import Loop
from scripted import COURSE, follow
from synthetic_runs import CASES, STOPPING, Case

import ib_callback as ib
from ib_callback.results.stopping import StopReason

# From the rule's own table of made-up runs: three points that are no better than .06 at 20.
ENDS = "distance_to_bound has not improved on 0.06 (step 20) for 3 measurements, so the run has reached a plateau"
KEYWORDS = {"steps": 30, "every_n_steps": 1, "orders": "token"}


def rule(**settings: Any) -> ib.PlateauStopping:
    return ib.PlateauStopping(**{**STOPPING, **settings})


def test_a_plateau_ends_the_run_and_it_is_said(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = follow(monkeypatch)
    outcome = loop.train(tmp_path, early_stopping=rule(), **KEYWORDS)
    assert outcome.step == 23
    assert made == outcome.followed.trajectory.steps == list(range(24))
    assert outcome.followed.decision == ib.StopDecision(True, StopReason.PLATEAU, ENDS)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ib_callback: ")]
    assert lines[0] == "ib_callback: step 0: points have no loss on held-out text, so rules act without the guard"
    assert re.fullmatch(f"ib_callback: training (stops|should stop) at step 23: {re.escape(ENDS)}", lines[1])
    assert lines[2].startswith("ib_callback: 24 measurements took ")
    assert len(lines) == 3


def test_it_is_said_in_the_log_if_anybody_reads_that(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    follow(monkeypatch)
    with caplog.at_level(logging.INFO, logger="ib_callback"):
        loop.train(tmp_path, early_stopping=rule(), **KEYWORDS)
    assert len([r for r in caplog.records if r.getMessage().endswith(f"at step 23: {ENDS}")]) == 1
    assert ENDS not in capsys.readouterr().err


def test_without_a_rule_there_is_no_decision(loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    outcome = loop.train(tmp_path, **KEYWORDS)
    assert outcome.step == 30
    assert outcome.followed.decision is None


NAMES = ("never compressing", "never compressing, armed from the fit", "never compressing, armed immediately",
         "a collapse at the end", "every third point failed", "failing on the plateau",
         "failing to the end")  # fmt: skip


@pytest.mark.parametrize("case", [case for case in CASES if case.name in NAMES], ids=str)
def test_stops_at_the_step_of_the_rule(case: Case, loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing points neither stop nor count; of each there is one warning."""
    follow(monkeypatch, ib.Trajectory(replace(point, step=point.step // 100) for point in case.trajectory))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = loop.train(tmp_path, early_stopping=rule(**case.settings), **KEYWORDS)
    last = 30 if case.stop is None else case.stop // 100
    assert outcome.step == last
    followed = outcome.followed
    assert (followed.decision.stop, followed.decision.reason) == (case.stop is not None, case.reason)
    assert followed.trajectory.steps == list(range(last + 1))
    assert ib.Trajectory.load(tmp_path) == followed.trajectory
    missing = [point for point in followed.trajectory if point.error is not None]
    said = [str(w.message) for w in caught if "Nothing could be measured" in str(w.message)]
    assert len(said) == len(missing)
    assert all("NaN in h.0" in message for message in said)


# Of every third point there are too few for a compression to be sure.
@pytest.mark.parametrize(("every", "settings"), [(2, {"patience": 1}), (3, {"patience": 3, "arm": "fit"})], ids=str)
def test_stops_where_the_rule_does_by_the_same_points(
    every: int, settings: dict[str, Any], loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    outcome = loop.train(tmp_path, early_stopping=rule(**settings), **{**KEYWORDS, "every_n_steps": every})
    replayed = rule(**settings)
    decisions = {point.step: replayed.update(point) for point in COURSE[::every]}
    stop = next((step for step, decision in decisions.items() if decision.stop), None)
    assert stop is not None
    assert 10 < stop < 30
    assert outcome.step == outcome.followed.trajectory.steps[-1] == stop
    assert outcome.followed.decision == decisions[stop]


@pytest.mark.parametrize("interrupted", [13, 21], ids="interrupted at {}".format)
def test_neither_checkpoints_nor_interruptions_count_as_patience(
    interrupted: int, loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a run is preempted: the checkpoint is off the schedule, measured, and can be selected."""
    follow(monkeypatch)
    keywords = {**KEYWORDS, "every_n_steps": 2}
    alone = loop.train(tmp_path / "alone", early_stopping=rule(), **keywords)
    keywords["select"] = "optimality"
    saved = loop.train(tmp_path / "saved", early_stopping=rule(), save_every=3, **keywords)
    parts = {"save_every": interrupted, "early_stopping": rule(), **keywords}
    loop.train(tmp_path / "parts", **{**parts, "steps": interrupted})
    resumed = loop.train(tmp_path / "parts", resume=True, **parts)
    phases = alone.followed.trajectory.phases()
    for outcome, off_schedule in ((saved, {*range(3, 30, 6)}), (resumed, {interrupted})):
        assert outcome.step == alone.step < 30
        assert outcome.followed.decision == alone.followed.decision
        others = {point.step for point in outcome.followed.trajectory if not point.scheduled}
        assert others == {step for step in off_schedule if step <= outcome.step}
        found = outcome.followed.trajectory.phases()
        assert (found.fit_start, found.compression_start) == (phases.fit_start, phases.compression_start)


def test_a_second_training_begins_with_a_new_rule(loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    followed = loop.train(tmp_path, early_stopping=rule(), **KEYWORDS).followed
    again = loop.train(tmp_path, steps=30, again=followed)
    assert again.step == 23
    assert followed.trajectory.steps == list(range(24))
