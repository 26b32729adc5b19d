from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from synthetic_runs import C, E, run

from ib_callback.results.points import PlanePoint
from ib_callback.results.stopping import PlateauStopping
from ib_callback.results.trajectory import Trajectory
from ib_callback.run.config import RunConfig
from ib_callback.run.rules import LiveRules
from ib_callback.run.summary import Cost, Selected, summarise


def test_the_cost_in_words() -> None:
    assert str(Cost(points=4, seconds=12.34, share=0.0123, skipped=0)) == "4 measurements took 12.3 s, 1.2% of the time"
    assert str(Cost(points=1, seconds=1.0, share=0.5, skipped=7)).endswith("; 7 more were skipped to save time")


def test_a_summary_has_what_there_is() -> None:
    """The course of `synthetic_runs`: fit at 200, compression from 1000, optimality .8 from 2000 to the end at 3000."""
    trajectory = run(C, E)
    rules = LiveRules(["token"], config=RunConfig(early_stopping=PlateauStopping(), select="optimality"))
    rules.replay(trajectory)
    cost = Cost(points=31, seconds=62.0, share=0.25, skipped=2)
    selected = Selected(step=1900, value=0.74, path=Path("checkpoint-1900"))
    summary = summarise(trajectory, rules, cost, selected)
    numbers = {"best_step": 2000, "best_value": 0.8, "fit_start": 200, "compression_start": 1000, "selected_step": 1900}
    numbers |= {"final_complexity": 0.3, "final_optimality": 0.8, "cost_seconds": 62.0, "cost_share": 0.25}
    assert {name: round(summary[f"ib/{name}"], 9) for name in numbers} == numbers
    assert summary["ib/selected_checkpoint"] == "checkpoint-1900"
    assert summary["ib/stop_reason"] == "plateau"


def test_a_summary_of_nothing() -> None:
    cost = Cost(points=0, seconds=0.0, share=0.0, skipped=0)
    summary = summarise(Trajectory(), LiveRules(["token"]), cost, None)
    assert sorted(summary) == [
        "ib/best_by",
        "ib/cost_seconds",
        "ib/cost_share",
        "ib/guard_selection",
        "ib/skipped_points",
    ]


def test_a_summary_ends_with_the_plane_that_is_shown_first() -> None:
    local = {"complexity_local_by_layer": [0.1], "expressivity_local_by_layer": [0.05]}
    predicted = PlanePoint.from_layers([0.3], [0.2], **local, noise=0.01)
    points = [replace(point, views={"prediction": {"token": predicted}}) for point in run(C, E)]
    rules = LiveRules(["token"])
    rules.replay(points)
    cost = Cost(points=31, seconds=62.0, share=0.25, skipped=0)
    summary = summarise(Trajectory(points), rules, cost, None)
    assert summary["ib/final_prediction/token/expressivity_local"] == predicted.expressivity_local
    assert summary["ib/final_prediction/token/score_local"] == predicted.score_local
