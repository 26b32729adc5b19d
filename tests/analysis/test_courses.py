"""Courses of runs and of results, from whatever files."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_runs import run

from ib_callback.analysis.courses import load_courses
from ib_callback.common.errors import TrajectoryError
from ib_callback.results.lines import Origin
from ib_callback.results.results import Results
from ib_callback.results.trajectory import Trajectory


def test_runs_and_results_beside_each_other(tmp_path: Path) -> None:
    points = run([0.5, 0.4, 0.3], [0.1, 0.2, 0.25])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Trajectory(points).save(tmp_path / name / "ib_trajectory.jsonl")
    Results([(Origin(model="small", tokens=7), point) for point in points]).save(tmp_path / "results.jsonl")
    courses = load_courses([tmp_path / "a", tmp_path / "results.jsonl", tmp_path / "b"])
    assert [course.name for course in courses] == ["a", "b", "small"]
    assert [course.path is None for course in courses] == [False, False, True]
    assert {course.trajectory.steps[-1] for course in courses} == {points[-1].step}
    assert courses[2].points[0][0]["tokens"] == 7
    assert [course.name for course in load_courses([tmp_path / "results.jsonl"], ["small"])] == ["small"]


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match=r"ib_trajectory\.jsonl"):
        load_courses([tmp_path])
