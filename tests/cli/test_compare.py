from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from synthetic_runs import model, run

from ib_callback.cli import main
from ib_callback.results.lines import Origin
from ib_callback.results.points import FeaturePoint
from ib_callback.results.results import Results
from ib_callback.results.trajectory import Trajectory

WITHOUT = ([0.5, 0.51, 0.49, 0.5, 0.5, 0.505, 0.495], [0.25, 0.26, 0.25, 0.24, 0.25, 0.25, 0.25])


def feature(information: float) -> FeaturePoint:
    without = [information * share for share in (1.1, 0.9, 1.0, 1.0, 1.0, 0.95, 1.0)]
    return FeaturePoint.from_layers(
        [information] * 2, num_positions=99, complexity=0.5, information_p_value=0.01, information_jackknife=without
    )


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of two families: one model before and after its post-training, and one with its untrained self."""
    path = tmp_path / "results.jsonl"
    measured = [
        ("olmo", "olmo2", model(0.5, 0.25, jackknife=WITHOUT, preference=feature(0.01))),
        ("olmo-dpo", "olmo2", model(0.5, 0.25, jackknife=WITHOUT, preference=feature(0.02))),
        ("smol", "llama", model(0.5, 0.5, step=0)),
        ("smol", "llama", model(0.4, 0.3, step=1000)),
    ]
    Results((Origin(model=name, family=family, num_parameters=1000), point) for name, family, point in measured).save(
        path
    )
    monkeypatch.chdir(tmp_path)
    return path


def test_models_are_ranked_and_drawn(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["compare", str(results), "-o", "models.svg", "--csv", "table.csv"]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[1].split()[:3] == ["1", "smol", "llama"]
    assert "smol ranks first of 3 models by token/distance_to_bound" in output.out
    assert output.out.splitlines()[-2:] == ["models.svg", "table.csv"]
    rows = list(csv.DictReader(io.StringIO(Path("table.csv").read_text())))
    assert [row["model"] for row in rows] == ["smol", "olmo", "olmo-dpo"]
    assert "olmo-dpo (olmo2)" in Path("models.svg").read_text()
    assert main.main(["compare", str(results), "--step", "0", "--step", "last", "--json", "-"]) == 0
    output = capsys.readouterr()
    names = [row["model"] for row in json.loads(output.out)]
    assert names == ["smol, untrained", "smol, step 1,000", "olmo", "olmo-dpo"]
    assert "olmo lacks the chosen point" in output.err


def test_a_pair_has_intervals(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main.main(["compare", str(results), "--pair", "olmo:olmo-dpo", "--pair", "smol@0:smol", "--json", "x.json"])
        == 0
    )
    told = capsys.readouterr().out
    assert "olmo -> olmo-dpo" in told
    assert "From olmo to olmo-dpo, these changes are resolved: preference/ratio, preference/information" in told
    assert "no interval: measured without standard errors" in told
    assert "From smol@0 to smol nothing can be concluded" in told
    rows = {(row["pair"], row["metric"]): row for row in json.loads(Path("x.json").read_text())}
    ratio = rows["olmo:olmo-dpo", "preference/ratio"]
    assert (ratio["change"], ratio["verdict"]) == (pytest.approx(0.02), "resolved")
    assert ratio["low"] < 0.02 < ratio["high"]
    assert rows["smol@0:smol", "optimality"]["verdict"].startswith("no interval")


def test_layers(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", str(results), "--model", "smol", "--step", "0", "--step", "last", "--profile"]
    assert main.main([*arguments, "-o", "layers.png", "--csv", "-"]) == 0
    output = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(output.out)))
    assert [(row["model"], row["number"]) for row in rows] == [
        ("smol, untrained", "1"), ("smol, untrained", "2"), ("smol, step 1,000", "1"), ("smol, step 1,000", "2")
    ]  # fmt: skip
    assert Path("layers.png").read_bytes().startswith(b"\x89PNG")


def test_runs_can_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, shift in (("a", 0.0), ("b", 0.05)):
        (tmp_path / name).mkdir()
        Trajectory(run([0.5, 0.4], [0.2, 0.25 + shift])).save(tmp_path / name / "ib_trajectory.jsonl")
    assert main.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["1", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pair", "olmo:gpt3"], "--pair: expected BASE:POST with two of the models olmo, olmo-dpo, smol"),
        (["--metric", "loss"], "--metric would have no effect without --pair"),
        (["--by", "optimallity"], "Did you mean optimality"),
        (["--step", "7"], "no point was measured at step 7"),
        (["--model", "gpt3"], "--model: expected names among"),
        (["-o", "no/where.png"], "there is no directory"),
        (["-o", "results.jsonl"], "-o results.jsonl: expected a file of its own, got a file that is read"),
    ],
)
def test_what_cannot_be_done(
    arguments: list[str], message: str, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["compare", str(results), *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err


def test_other_documents_are_refused(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = model(0.5, 0.4, settings={"probe": "b" * 64, "documents": "e" * 64})
    Results([(Origin(model="else"), other)]).save("else.jsonl")
    assert main.main(["compare", str(results), "else.jsonl"]) == 2
    assert "expected measurements of the same documents" in capsys.readouterr().err
    tokenizer = model(0.5, 0.4, settings={"probe": "b" * 64})
    Results([(Origin(model="else"), tokenizer)]).save("else.jsonl")
    assert main.main(["compare", str(results), "else.jsonl"]) == 0
    assert "read the same documents, but with different tokenizers" in capsys.readouterr().out
