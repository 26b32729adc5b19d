from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic_runs import C, E, failed, run

from ib_callback.cli.main import main
from ib_callback.results.lines import Origin
from ib_callback.results.results import Results
from ib_callback.results.trajectory import FILENAME, Trajectory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    run(C, E).save(tmp_path / "run" / FILENAME)
    return tmp_path


def test_a_run_on_the_screen(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(directory / "run")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Compression begins at step 1,000 (recognised at step 1,500)" in out
    assert "[token/complexity_above_null, token/expressivity_above_null at steps 1,000 and 3,000]" in out


def test_several_models_and_tables(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = [(Origin(model=name), point) for name in ("small", "large") for point in run(C[:3], E[:3])]
    Results(points).save(directory / "results.jsonl")
    where = [str(directory / "results.jsonl"), "--json", str(directory / "a.json"), "--csv", str(directory / "a.csv")]
    assert main(["report", *where]) == 0
    out = capsys.readouterr().out
    assert out.startswith("small\n\n") and "\n\nlarge\n\n" in out
    sentences = json.loads((directory / "a.json").read_text())
    assert [each["model"] for each in sentences] == sorted(
        (s["model"] for s in sentences), key=["small", "large"].index
    )
    assert {"model", "topic", "text", "numbers"} == {*sentences[0]}
    assert sentences[0]["numbers"][0] == {"name": "step", "step": 0, "point": "step 0", "value": 0}
    header, *rows = (directory / "a.csv").read_text().splitlines()
    assert header == "model,topic,text,name,step,point,value"
    assert len(rows) >= sum(len(each["numbers"]) for each in sentences)
    assert main(["report", *where[:1], "--model", "large", "--json", "-"]) == 0
    assert {each["model"] for each in json.loads(capsys.readouterr().out)} == {"large"}


def test_a_run_of_which_nothing_was_measured_has_no_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Trajectory([failed(0), failed(10)]).save(tmp_path / FILENAME)
    assert main(["report", str(tmp_path)]) == 1
    assert "Nothing can be concluded: none of its 2 points could be measured." in capsys.readouterr().out


def test_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("ib-callback: ")
