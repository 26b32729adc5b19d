from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import model

from ib_callback.cli import main
from ib_callback.results.lines import Origin
from ib_callback.results.results import Results

NUMBER = 12


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve models of three families, and scores that go with the complexity."""
    random = np.random.default_rng(0)
    complexity, expressivity = 0.5 + 0.05 * random.standard_normal(NUMBER), 0.3 + 0.01 * random.standard_normal(NUMBER)
    path = tmp_path / "results.jsonl"
    origins = [Origin(model=f"org/m{i}", family=f"f{i % 3}", num_parameters=1000 * (i + 1)) for i in range(NUMBER)]
    points = [model(*each) for each in zip(complexity, expressivity, strict=True)]
    Results(zip(origins, points, strict=True)).save(path)
    scores = [f"m{i},{10 * complexity[i] + 0.1 * random.standard_normal()}" for i in range(NUMBER - 1)]
    (tmp_path / "scores.csv").write_text("\n".join(["model,mmlu_pro", *scores, "gpt3,1.0"]))
    monkeypatch.chdir(tmp_path)
    return path


def test_a_table_a_picture_and_a_conclusion(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["correlate", str(results), "scores.csv", "--score", "mmlu_pro", "-o", "x.svg", "--csv", "x.csv"]
    assert main.main(arguments) == 0
    told = capsys.readouterr().out
    assert "11 models with mmlu_pro" in told
    assert "Measured but without a score: org/m11" in told
    assert "With a score but not measured: gpt3 (not measured)" in told
    assert "Some points have no loss" in told
    assert "With 11 models, |r| must be at least 0.60 to differ significantly from 0" in told
    assert "these correlations differ significantly from 0: complexity (r +0.9" in told
    rows = {row["metric"]: row for row in csv.DictReader(io.StringIO(Path("x.csv").read_text()))}
    assert float(rows["complexity"]["pearson"]) > 0.9
    assert rows["complexity"]["given_loss"] == ""
    assert float(rows["complexity"]["given_size"]) > 0.8
    assert (rows["complexity"]["families"], rows["complexity"]["num_models"]) == ("3", "11")
    picture = Path("x.svg").read_text()
    assert all(text in picture for text in ("complexity", "mmlu_pro", "f2"))


def test_metrics_of_choice_and_their_order(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["correlate", str(results), "scores.csv", "--score", "mmlu_pro"]
    arguments += ["--metric", "eval_ib_expressivity", "--metric", "complexity"]
    assert main.main([*arguments, "--json", "-", "--sort", "accuracy"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["metric"] for row in rows] == ["complexity", "expressivity"]
    # Low complexity counts as the better one, and here goes with low scores.
    assert rows[0]["accuracy"] < 0.2
    assert main.main([*arguments, "--top", "1", "--sort", "name"]) == 0
    told = capsys.readouterr().out
    assert "… and 1 more" in told
    assert "After Holm's correction for 2 tests, the largest |r| must be at least" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--score", "mmlu"], "Did you mean mmlu_pro"),
        (["--score", "mmlu_pro", "--metric", "optimalty"], "Did you mean optimality"),
        (["--score", "mmlu_pro", "--model", "org/m11"], "expected scores of the measured models org/m11, got none"),
    ],
)
def test_what_cannot_be_done(
    arguments: list[str], message: str, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["correlate", str(results), "scores.csv", *arguments]) == 2
    assert message in capsys.readouterr().err
