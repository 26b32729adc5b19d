from __future__ import annotations

import csv
import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from plot_runs import SETTINGS, failed, measurement, run

from ib_callback import Measurement, Results, Trajectory
from ib_callback.common.errors import TrajectoryError
from ib_callback.results.lines import Origin, to_line
from ib_callback.results.phases import PhaseRule
from ib_callback.results.results import append_result
from ib_callback.results.trajectory import append_line, write_run_file


def of(model: str, revision: str | None = None, **known: object) -> Origin:
    return Origin(model=model, revision=revision, **known)


def entries(model: str, *steps: int | None, **known: object) -> list[tuple[Origin, Measurement]]:
    return [(of(model, f"step{step}", **known), measurement(step)) for step in steps]


def written(path: Path, rows: list[tuple[Origin, Measurement]]) -> Path:
    for origin, point in rows:
        append_result(path, origin, point)
    return path


def test_a_line_is_that_of_a_trajectory_with_the_model_in_front(tmp_path):
    origin = of("small", "step10", family="gpt2", stage="stage1", num_parameters=7, tokens=10**9)
    path = written(tmp_path / "r.jsonl", [(origin, measurement(10))])
    (line,) = map(json.loads, path.read_text().splitlines())
    assert [*line][:6] == ["model", "revision", "family", "stage", "num_parameters", "tokens"]
    assert {name: line[name] for name in asdict(origin)} == asdict(origin)
    assert {name: line[name] for name in measurement(10).to_dict()} == measurement(10).to_dict()
    assert Measurement.from_dict(line) == measurement(10)


def test_models_are_told_apart_and_their_points_are_in_the_order_of_training(tmp_path):
    path = tmp_path / "r.jsonl"
    written(path, [*entries("a", 100, 0), *entries("b", 50, None, 0), *entries("a", 10)])
    results = Results.load(path)
    assert {name: trajectory.steps for name, trajectory in results.items()} == {"a": [0, 10, 100], "b": [0, 50, None]}
    assert results["a"] == run([0, 10, 100])
    assert [origin.revision for origin in results.origins("a")] == ["step0", "step10", "step100"]
    assert repr(results) == "Results(2 models, 6 points: a, b)"
    assert Trajectory.load(path, model="a") == results["a"]
    with pytest.raises(KeyError, match=r"no model 'c'\. Measured models: a, b"):
        results["c"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, r"one model of the file, got several models\. The file has a, b"),
        ("c", r"got model='c'\. The file has a, b"),
    ],
)
def test_of_several_models_a_trajectory_is_of_one(tmp_path, model, message):
    path = written(tmp_path / "r.jsonl", [*entries("a", 0), *entries("b", 0)])
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.load(path, model=model)


def test_of_one_model_no_name_is_needed_and_a_run_has_none(tmp_path):
    path = written(tmp_path / "r.jsonl", entries("a", 20, 0))
    assert Trajectory.load(path) == run([0, 20])
    run([0, 20]).save(tmp_path / "t.jsonl")
    with pytest.raises(TrajectoryError, match="expected a file of results, got the trajectory of one run"):
        Trajectory.load(tmp_path / "t.jsonl", model="a")


def test_files_of_shards_are_read_together_or_as_one(tmp_path):
    shards = [written(tmp_path / f"{n}.jsonl", [*entries("a", n, n + 2), *entries("b", n)]) for n in (0, 1)]
    whole = tmp_path / "whole.jsonl"
    whole.write_bytes(b"".join(shard.read_bytes() for shard in shards))
    assert Results.load(*shards) == Results.load(whole)
    assert Results.load(whole)["a"].steps == [0, 1, 2, 3]


def test_a_torn_last_line_is_dropped_and_can_be_appended_to(tmp_path):
    path = written(tmp_path / "r.jsonl", entries("a", 0, 10))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(RuntimeWarning, match="the last line is incomplete"):
        assert Results.load(path)["a"].steps == [0]
    with pytest.warns(RuntimeWarning, match="the last line is incomplete"):
        written(path, entries("a", 20))
    assert Results.load(path)["a"].steps == [0, 20]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 5}, r"r\.jsonl:1: model must be a text or None, got 5"),
        ({"tokens": "many"}, r"r\.jsonl:1: tokens must be an integer or None, got 'many'"),
        ({"entropy": "high"}, r"r\.jsonl:1: entropy must be a finite number or None, got 'high'"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, change, message):
    line = {**asdict(of("a")), **measurement(0).to_dict(), **change}
    (tmp_path / "r.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(TrajectoryError, match=message):
        Results.load(tmp_path / "r.jsonl")


def test_a_changed_line_is_refused(tmp_path):
    line = to_line(measurement(0), of("a"))
    (tmp_path / "r.jsonl").write_bytes(line.replace(b'"model": "a"', b'"model": "b"') + line)
    with pytest.raises(TrajectoryError, match=r"r\.jsonl:1: its checksum does not match its content"):
        Results.load(tmp_path / "r.jsonl")


def test_of_a_checkpoint_measured_again_the_last_success_counts():
    again = replace(measurement(10), seconds=9.0)
    origin = of("a", "step10")
    results = Results(
        [(origin, failed(10)), (origin, measurement(10)), (origin, again), (origin, failed(10)), *entries("a", 0)]
    )
    assert list(results["a"]) == [measurement(0), again]
    assert list(Results([(origin, failed(10)), *entries("a", 20)])["a"]) == [failed(10), measurement(20)]


def test_each_stage_has_a_course_where_there_are_several():
    rows = [*entries("a", 0, 10, stage="stage1"), *entries("a", 5, stage="stage2"), *entries("b", 3, stage="dpo")]
    assert {name: t.steps for name, t in Results(rows).items()} == {"a stage1": [0, 10], "a stage2": [5], "b": [3]}


def test_each_probe_has_a_course_of_its_own():
    other = [(of("a", f"step{step}"), measurement(step, settings={**SETTINGS, "probe": "b" * 64})) for step in (0, 10)]
    with pytest.warns(RuntimeWarning, match=r"trajectory, 'a \(2\)'\. They differ from the first points in probe: "):
        results = Results([*entries("a", 0, 10), *other])
    assert [trajectory.steps for trajectory in results.values()] == [[0, 10], [0, 10]]
    assert [*results] == ["a", "a (2)"]
    assert not results["a (2)"].mixture


def test_two_checkpoints_of_one_step_are_told():
    rows = [(of("a", "step10"), measurement(10)), (of("a", "step10-again"), measurement(10))]
    with pytest.warns(RuntimeWarning, match=r"two checkpoints of step 10, step10 and step10-again\. The second one"):
        assert Results(rows)["a"].steps == [10]


def test_checkpoints_of_another_precision_are_one_course():
    rows = [(of("a"), measurement(s, settings={**SETTINGS, "dtype": d})) for s, d in ((0, "float32"), (9, "bfloat16"))]
    with pytest.warns(RuntimeWarning, match="mixes points that cannot be compared: .* differ in dtype"):
        assert Results([(replace(o, revision=str(m.step)), m) for o, m in rows])["a"].steps == [0, 9]


@pytest.mark.parametrize("other", [{"dtype": "bfloat16"}, {"layers": ["h.1"]}])
def test_one_checkpoint_in_another_precision_or_at_other_layers_takes_no_place_of_the_first(other):
    rows = [(of("a", f"step{s}"), measurement(s, settings=SETTINGS)) for s in (0, 9)]
    more = [(of("a", f"step{s}"), measurement(s, settings=SETTINGS | other)) for s in (0, 9, 20)]
    with pytest.warns(
        RuntimeWarning, match=rf"trajectory, 'a \(2\)'\. They differ from the first points in {next(iter(other))}"
    ):
        results = Results([*rows, *more])
    assert {name: t.steps for name, t in results.items()} == {"a": [0, 9], "a (2)": [0, 9, 20]}
    assert not results["a"].mixture
    assert not results["a (2)"].mixture


def test_points_of_a_run_that_have_no_step_are_all_kept(tmp_path):
    points = [measurement(None), replace(measurement(None), seconds=9.0), failed(None)]
    Trajectory(points).save(tmp_path / "t.jsonl")
    assert list(Results.load(tmp_path / "t.jsonl")["t"]) == [points[0], points[1], points[2]]


def test_runs_and_trajectory_files_are_models_with_the_name_of_their_place(tmp_path):
    directory = tmp_path / "width 64"
    directory.mkdir()
    for point in run([0, 10]):
        append_line(directory / "ib_trajectory.jsonl", point)
    write_run_file(directory, phase_rule=PhaseRule(drop=0.2))
    run([5]).save(tmp_path / "other.jsonl")
    results = Results.load(directory, tmp_path / "other.jsonl", written(tmp_path / "r.jsonl", entries("a", 0)))
    assert {name: t.steps for name, t in results.items()} == {"width 64": [0, 10], "other": [5], "a": [0]}
    assert results["width 64"].phase_rule == PhaseRule(drop=0.2)


def test_runs_of_one_name_are_told_apart_by_more_of_their_path(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place / "out").mkdir(parents=True)
        run([0, 10]).save(tmp_path / place / "out" / "ib_trajectory.jsonl")
    assert [*Results.load(tmp_path / "a" / "out", tmp_path / "b" / "out")] == ["a/out", "b/out"]


def test_a_file_that_names_models_here_and_there_is_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(to_line(measurement(0), of("a")) + to_line(measurement(10)))
    with pytest.raises(TrajectoryError, match="expected every line to name a model"):
        Results.load(path)


def test_tokens_are_those_of_the_points(tmp_path):
    path = tmp_path / "r.jsonl"
    written(path, [(of("a", tokens=4_000), measurement(1)), (of("a", "b"), replace(measurement(2), tokens_seen=8_000))])
    assert [point.tokens_seen for point in Results.load(path)["a"]] == [4_000, 8_000]


def test_what_is_saved_is_read_again(tmp_path):
    results = Results([*entries("a", 0, 10, family="gpt2", tokens=5), *entries("b", None, num_parameters=9)])
    results.save(tmp_path / "r.jsonl")
    loaded = Results.load(tmp_path / "r.jsonl")
    assert [*loaded] == ["a", "b"]
    assert loaded.origins("b") == results.origins("b")
    assert loaded["b"] == results["b"]


def test_a_home_in_a_path_is_that_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    results = Results(entries("a", 0, 10))
    results.save("~/r.jsonl")
    results.to_csv("~/r.csv")
    assert Results.load("~/r.jsonl")["a"] == results["a"]
    results["a"].save("~/t.jsonl")
    results["a"].to_csv("~/t.csv")
    assert Trajectory.load("~/t.jsonl") == results["a"]
    assert {path.name for path in tmp_path.iterdir()} == {"r.jsonl", "r.csv", "t.jsonl", "t.csv"}


# --- as a table


def test_rows_have_the_numbers_as_they_are_logged(tmp_path):
    origin = of("a", "step10", family="gpt2", num_parameters=7, tokens=1_000)
    results = Results([(origin, measurement(10)), (of("b"), failed(20))])
    first, second = results.rows()
    heads = ["model", "revision", "family", "stage", "num_parameters", "tokens", "step"]
    assert [*first] == [*second] == [*heads, *measurement(10).scalars(), "error"]
    assert {name: first[name] for name in measurement(10).scalars()} == measurement(10).scalars() | {
        "tokens_seen": 1_000
    }
    assert (first["model"], first["tokens"], first["step"], first["error"]) == ("a", 1_000, 10, None)
    assert (second["error"], second["optimality"]) == ("NaN in h.0", None)
    results.to_csv(tmp_path / "r.csv")
    with open(tmp_path / "r.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["token/complexity"]) == measurement(10)["token"].complexity
    assert (rows[1]["optimality"], rows[1]["error"]) == ("", "NaN in h.0")


def test_pandas_has_numbers_and_not_a_number_for_what_is_missing(tmp_path):
    trajectory = Trajectory([measurement(0), failed(10)])
    frame = trajectory.to_pandas()
    assert frame["step"].tolist() == [0, 10]
    assert frame["optimality"].dtype == frame["tokens_seen"].dtype == np.float64
    assert np.isnan(frame["optimality"][1])
    assert frame["token/complexity_null"][0] == measurement(0)["token"].complexity_null
    assert frame["error"].tolist()[1] == "NaN in h.0"
    trajectory.to_csv(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().splitlines()[0].startswith("step,complexity,expressivity,optimality,")
    assert Results(entries("a", 0, 10)).to_pandas()["model"].tolist() == ["a", "a"]


def test_models_are_listed_by_size():
    results = Results(
        [*entries("large", 0, 9, num_parameters=2_000, tokens=30), *entries("small", None, family="gpt2")]
    )
    lines = [line.split() for line in results.table().splitlines()]
    assert lines[0] == ["model", "family", "parameters", "points", "missing", "steps", "tokens"]
    assert lines[1:] == [
        ["small", "gpt2", "-", "1", "0", "-", "-"],
        ["large", "-", "2,000", "2", "0", "0", "to", "9", "30"],
    ]


def test_nothing_is_an_empty_table():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (repr(Results()), Results().rows(), repr(Trajectory())) == ("Results(empty)", [], "Trajectory(empty)")
    assert repr(Trajectory([measurement(None)])) == "Trajectory(1 point)"
