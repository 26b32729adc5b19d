"""`ib-callback phases`, `context` and `stop` from files to tables and pictures."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from plot_runs import measurement, with_views
from synthetic_runs import C, E, curve, run

from ib_callback.cli import main
from ib_callback.results.lines import Origin
from ib_callback.results.results import append_result
from ib_callback.results.trajectory import Trajectory

# From step 1,000 on, where the complexity is highest, the first memorises; the second turns there.
LOSSES = {"one": curve((0, 8.0), (10, 4.0), (30, 6.0)), "two": curve((0, 8.0), (12, 4.0), (30, 4.0))}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, and results of two models; an empty directory to work in."""
    for name, losses in LOSSES.items():
        (tmp_path / name).mkdir()
        points = [replace(point, loss=loss) for point, loss in zip(run(C, E), losses, strict=True)]
        Trajectory(points).save(tmp_path / name / "ib_trajectory.jsonl")
    for name, size in (("large", 2_000), ("small", 1_000)):
        for step in (0, 10, 100):
            point = with_views(measurement(step, orders=4), "readout")
            append_result(tmp_path / "results.jsonl", Origin(model=name, num_parameters=size, tokens=7 * step), point)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def ran(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["phases", "context", "stop"])
def test_tables_pictures_and_what_may_be_concluded(command, files, capsys):
    out = ran(capsys, command, files / "one", files / "two", "-o", "a.svg", "--csv", "a.csv", "--json", "a.json")
    assert out.splitlines()[-3:] == ["a.svg", "a.csv", "a.json"]
    rows = json.loads(Path("a.json").read_text())
    table = list(csv.DictReader(io.StringIO(Path("a.csv").read_text())))
    assert [row["model"] for row in table] == [row["model"] for row in rows]
    assert {row["model"] for row in rows} == {"one", "two"}
    assert Path("a.svg").read_text().startswith("<?xml")
    both = ran(capsys, command, files / "one", files / "two")
    assert both == out.removesuffix("a.svg\na.csv\na.json\n")
    assert json.loads(ran(capsys, command, files / "one", "--json", "-", "-o", "a.svg"))


@pytest.mark.parametrize("command", ["phases", "context", "stop"])
def test_results_of_many_models(command, files, capsys):
    out = ran(capsys, command, files / "results.jsonl")
    assert "small" in out
    assert "large" in out
    assert "small" not in ran(capsys, command, files / "results.jsonl", "--model", "large")


@pytest.mark.parametrize("command", ["phases", "context", "stop"])
def test_no_other_file_is_touched(command, files, capsys):
    Path("a.png").write_text("not ours")
    assert main.main([command, str(files / "one"), "-o", "a.png"]) == 2
    assert "got something else" in capsys.readouterr().err
    assert Path("a.png").read_text() == "not ours"


@pytest.mark.parametrize("command", ["phases", "context", "stop"])
def test_help_has_examples_and_what_is_not_there_is_one_line(command, files, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main.main([command, "--help"])
    shown = capsys.readouterr().out
    assert f"ib-callback {command} " in shown
    assert "None" not in shown
    assert main.main([command, str(files / "nowhere")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_phases(files, capsys):
    out = ran(capsys, "phases", files / "one", files / "two", "-o", "turn.svg", "--json", "a.json")
    assert "1 of 2 models turns to compression: the order of turn and flat loss is not certain in 1." in out
    assert "turn to compression" in Path("turn.svg").read_text()
    one, two = json.loads(Path("a.json").read_text())
    assert (one["turn"], one["second_is"], one["memorising_is"]) == (None, None, "memorising")
    assert (two["turn"], two["second_is"], two["loss_flat"]) == (1000, "compression", 1200)


def test_phases_of_results(files, capsys):
    rows = json.loads(ran(capsys, "phases", files / "results.jsonl", "--x", "tokens", "--json", "-"))
    assert [(row["model"], row["num_parameters"]) for row in rows] == [("small", 1_000), ("large", 2_000)]
    assert {row["plane"] for row in rows} == {"readout"}
    assert "plain" in ran(capsys, "phases", files / "results.jsonl", "--plane", "plain", "--order", "bigram", "--log")
    assert main.main(["phases", str(files / "one"), "--x", "tokens"]) == 2
    assert "tokens are known" in capsys.readouterr().err
    assert main.main(["phases", str(files / "one"), "--plane", "above_null", "-o", "a.png"]) == 2
    assert "no picture of the plane above_null" in capsys.readouterr().err


def test_context(files, capsys):
    rows = json.loads(ran(capsys, "context", files / "results.jsonl", "--step", "10", "--json", "-"))
    assert [row["order"] for row in rows[:4]] == ["token", "bigram", "trigram", "quadgram"]
    assert {row["step"] for row in rows} == {10}
    ran(capsys, "context", files / "results.jsonl", "-o", "a.svg", "--plane", "plain", "--plane", "local")
    assert {f"{order}: {plane}" for order in ("token", "quadgram") for plane in ("plain", "local")} <= {
        line.strip() for line in Path("a.svg").read_text().replace(">", ">\n").replace("<", "\n<").splitlines()
    }
    assert main.main(["context", str(files / "one"), "--step", "7"]) == 2
    assert "no point was measured at step 7" in capsys.readouterr().err


def test_stop(files, capsys):
    rows = json.loads(ran(capsys, "stop", files / "one", "--patience", "3", "--json", "-"))
    assert [(row["rule"], row["step"]) for row in rows[1:]] == [
        ("loss alone", 1300), ("oracle", 1000), ("no stopping", None)
    ]  # fmt: skip
    # The mode follows from the metric.
    shown = ran(capsys, "stop", files / "one", "--monitor", "optimality", "--guard", "none", "--arm", "fit")
    assert shown.startswith("PlateauStopping('optimality', mode='max', patience=5, arm='fit', guard=None)")
    assert "guard=0.2" in ran(capsys, "stop", files / "one", "--guard", "0.2")
    with pytest.raises(SystemExit, match=r"^2$"):
        main.main(["stop", str(files / "one"), "--guard", "much"])
    assert "expected loss, none or a tolerance in nats" in capsys.readouterr().err
    assert main.main(["stop", str(files / "one"), "--monitor", "optimallity"]) == 2
    assert "Did you mean optimality" in capsys.readouterr().err
