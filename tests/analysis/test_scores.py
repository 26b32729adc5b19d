"""Scores from tables and from lm-eval, and the measured points that they are of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import course, model

from ib_callback.analysis.courses import Course
from ib_callback.analysis.scores import Score, load_scores, match_scores

TABLE = """model, revision, mmlu_pro, gsm8k
EleutherAI/pythia-14m,, 0.1125, 0.01
EleutherAI/pythia-70m, step1000, 0.115, 0.02
EleutherAI/pythia-70m, main, -,
small, , 0.2, nan
"""


def lm_eval(folder: Path, name: str, results: dict[str, Any], **more: Any) -> Path:
    """As the harness writes it: results_<time>.json in a folder a model."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"results_{name}.json"
    path.write_text(json.dumps({"results": results, "model_source": "hf", **more}))
    return path


MMLU_PRO = {"alias": "mmlu_pro", "exact_match,custom-extract": 0.25, "exact_match_stderr,custom-extract": 0.01}
ARC = {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": "N/A", "acc_norm,none": 0.6, "acc_norm_stderr,none": 0.1}


def test_a_table(tmp_path: Path) -> None:
    (tmp_path / "scores.csv").write_text(TABLE)
    found = load_scores(tmp_path / "scores.csv", "mmlu_pro")
    assert [(score.name, score.value) for score in found] == [
        ("EleutherAI/pythia-14m", 0.1125), ("EleutherAI/pythia-70m@step1000", 0.115), ("small", 0.2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [("mmlu_pro", 0.25), ("mmlu_pro/exact_match", 0.25), ("mmlu_pro/exact_match,custom-extract", 0.25),
     ("arc", 0.5), ("arc/acc_norm", 0.6)],
)  # fmt: skip
def test_a_file_of_lm_eval(name: str, value: float, tmp_path: Path) -> None:
    path = lm_eval(
        tmp_path, "2025-06-01T10-00-00.000000", {"mmlu_pro": MMLU_PRO, "arc": ARC}, model_name="EleutherAI/pythia-70m",
        config={"model": "hf", "model_args": "pretrained=EleutherAI/pythia-70m,revision=step3000,dtype=float32"},
    )  # fmt: skip
    (score,) = load_scores(path, name)
    assert (score.name, score.value) == ("EleutherAI/pythia-70m@step3000", value)


def test_a_folder_of_both(tmp_path: Path) -> None:
    (tmp_path / "scores.csv").write_text(TABLE)
    arguments = {"pretrained": "org/new", "revision": "main"}
    for time, value in (("2025-06-02", 0.3), ("2025-06-01", 0.2)):
        result = {"mmlu_pro": {"exact_match,custom-extract": value}}
        lm_eval(tmp_path / "out" / "org__new", time, result, config={"model_args": arguments})
    lm_eval(tmp_path / "out" / "org__other", "2025-06-01", {"arc": ARC}, model_name="org/other")
    found = {score.name: score.value for score in load_scores(tmp_path, "mmlu_pro")}
    # Of a model that was evaluated again the last result counts.
    assert found["org/new"] == 0.3
    assert "org/other" not in found
    assert len(found) == 4


@pytest.mark.parametrize(
    ("name", "content", "score", "message"),
    [
        ("s.csv", TABLE, "mmlu", "expected one of mmlu_pro, gsm8k, got 'mmlu'. Did you mean mmlu_pro"),
        ("s.csv", "name,x\na,1\n", "x", "expected a column named model, got name, x"),
        ("s.csv", "model,x\na,good\n", "x", "s.csv:2: expected a number as x, got 'good'"),
        ("s.csv", "model,x\na,1\nb,inf\n", "x", "s.csv:3: expected a finite number as x, got 'inf'. Leave the cell"),
        ("s.csv", "model,x\na,-NaN\n", "x", "s.csv:2: expected a finite number as x, got '-NaN'"),
        ("results_1.json", "[]", "x", "expected results of lm-eval"),
        ("results_1.json", json.dumps({"results": {"t": {"f1,none": 1.0, "em,none": 2.0}}, "model_name": "a"}), "t",
         "expected --score TASK/METRIC with one of the metrics f1,none, em,none"),
        ("s.txt", "", "x", "expected a .csv table"),
    ],
)  # fmt: skip
def test_what_is_no_score(name: str, content: str, score: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_scores(tmp_path / name, score)


def score(name: str, value: float = 1.0) -> Score:
    of, _, revision = name.partition("@")
    return Score(model=of, revision=revision or None, value=value, source=Path("s.csv"))


def measured() -> list[Course]:
    pythia = course(
        "EleutherAI/pythia-70m", model(0.5, 0.4, step=0), model(0.4, 0.3, step=1000), model(0.3, 0.2, step=3000)
    )
    pythia.points[1][0]["revision"] = "step1000"
    return [
        pythia,
        course("small", model(0.2, 0.1)),
        course("org/twin", model(0.6, 0.1)),
        course("twin", model(0.7, 0.1)),
    ]


@pytest.mark.parametrize(
    ("name", "complexity"),
    [("EleutherAI/pythia-70m", 0.3), ("eleutherai__Pythia-70M", 0.3), ("pythia-70m", 0.3), ("me/small", 0.2),
     ("pythia-70m@step1000", 0.4), ("pythia-70m@checkpoint-3000", 0.3), ("pythia-70m@0", 0.5), ("org/twin", 0.6)],
)  # fmt: skip
def test_the_point_of_a_score(name: str, complexity: float) -> None:
    found = match_scores(measured(), [score(name, 0.25)])
    assert [each.point.complexity for each in found.entries] == [complexity]
    assert found.values == [0.25]
    assert found.without_point == []


def test_what_is_unmatched_is_listed() -> None:
    scores = [score(name) for name in ("gpt3", "pythia-70m@step7", "small", "SMALL", "twin")]
    found = match_scores([*measured(), course("a/thing", model(0.1, 0.1)), course("b/thing", model(0.1, 0.1))],
                         [*scores, score("thing")])  # fmt: skip
    assert [each.name for each in found.entries] == ["small", "twin"]
    assert found.without_point == [
        "gpt3 (not measured)", "pythia-70m@step7 (no point of this revision)", "SMALL (its point already has a score)",
        "thing (the name fits a/thing and b/thing)",
    ]  # fmt: skip
    assert found.without_score == ["EleutherAI/pythia-70m", "org/twin", "a/thing", "b/thing"]


def test_a_run_is_known_by_its_folder() -> None:
    runs = [replace(course(f"{name}/novels", model(0.5, 0.4)), path=Path(name)) for name in ("small", "large")]
    found = match_scores(runs, [score("large"), score("novels")])
    assert [each.name for each in found.entries] == ["large/novels"]
    assert found.without_point == ["novels (the name fits small/novels and large/novels)"]
