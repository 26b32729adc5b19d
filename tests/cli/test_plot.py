from __future__ import annotations

import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from plot_runs import SETTINGS, failed, measurement, run, with_views
from synthetic_runs import C, E
from synthetic_runs import run as synthetic_run

from ib_callback.bound.curve import IBCurve
from ib_callback.cli import main
from ib_callback.results.lines import Origin
from ib_callback.results.results import append_result
from ib_callback.results.trajectory import Trajectory


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, and an empty directory to work in."""
    for name, scale in (("small", 1.0), ("large", 1.1)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        trajectory = run([0, 10, 100], orders=2, scale=scale, layers=("h.0", "h.1"))
        trajectory.save(tmp_path / "runs" / name / "ib_trajectory.jsonl")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "runs"


def written() -> list[str]:
    return sorted(path.name for path in Path.cwd().iterdir())


def texts(path: str) -> set[str]:
    root = ElementTree.parse(path).getroot()
    return {"".join(e.itertext()).strip() for e in root.iter("{http://www.w3.org/2000/svg}text")}


def failing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error; nothing is written."""
    before = written()
    assert main.main(["plot", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert written() == before
    (line,) = output.err.splitlines()
    return line


def test_all_pictures_of_a_run_are_written_to_the_current_directory(runs, capsys):
    assert main.main(["plot", str(runs / "small")]) == 0
    assert capsys.readouterr().out.split() == ["plane.png", "layers.png", "steps.png"]
    assert written() == ["layers.png", "plane.png", "steps.png"]
    assert all(Path(name).read_bytes().startswith(b"\x89PNG") for name in written())


def test_one_picture_to_a_file_with_its_options(runs, capsys):
    file = str(runs / "small" / "ib_trajectory.jsonl")
    assert main.main(["plot", file, "--kind", "steps", "--log", "--theme=dark", "--order=bigram", "-o", "out.svg"]) == 0
    assert {"training step, logarithmic", "bigram: measured"} <= texts("out.svg")
    Trajectory(measurement(step) for step in (0, 1, 2, 4, 100)).save("early.jsonl")
    assert main.main(["plot", "early.jsonl", "--kind", "steps", "-o", "early.svg"]) == 0
    assert "training step, logarithmic" in texts("early.svg")
    assert "#16191d" in Path("out.svg").read_text()
    assert main.main(["plot", file, "--kind", "layers", "--step", "10", "-o", "out.svg"]) == 0
    assert {"small, step 10", "token", "bigram", "h.1"} <= texts("out.svg")
    assert main.main(["plot", file, "--kind", "plane", "--order", "bigram", "-o", "out.pdf"]) == 0
    assert Path("out.pdf").read_bytes().startswith(b"%PDF")
    assert capsys.readouterr().out.split() == ["out.svg", "early.svg", "out.svg", "out.pdf"]


def test_several_pictures_share_the_name_given(runs, capsys):
    assert main.main(["plot", str(runs / "small"), "-o", "run.svg", "--order", "token"]) == 0
    assert written() == ["run_layers.svg", "run_plane.svg", "run_steps.svg"]
    (Path.cwd() / "pictures").mkdir()
    assert main.main(["plot", str(runs / "small"), str(runs / "large"), "--kind", "steps", "-o", "pictures"]) == 0
    assert sorted(path.name for path in Path("pictures").iterdir()) == ["large_steps.png", "small_steps.png"]


def test_several_runs_are_compared(runs, capsys):
    assert main.main(["plot", str(runs / "small"), str(runs / "large"), "-o", "both.svg"]) == 0
    assert {"small", "large", "null of the last point"} <= texts("both.svg")
    other = run([0, 10], settings={**SETTINGS, "num_bins": 64})
    (runs / "other" / "small").mkdir(parents=True)
    other.save(runs / "other" / "small" / "ib_trajectory.jsonl")
    assert main.main(["plot", str(runs / "small"), str(runs / "other"), "-o", "both.svg"]) == 0
    assert {"runs/small", "other/small"} <= texts("both.svg")
    warning = "ib-callback: Not comparable: runs/small and other/small differ in num_bins: 100 vs 64"
    assert warning in capsys.readouterr().err


def test_all_orders_are_drawn_with_order_all(runs):
    for name in ("small", "large"):
        path = runs / name / "ib_trajectory.jsonl"
        Trajectory(with_views(point, "readout") for point in Trajectory.load(path)).save(path)
    both = [str(runs / "small"), str(runs / "large")]
    bigram = {"bigram: plain", "bigram: local", "bigram: readout"}
    for given, kind in ((both, "compare"), (both[:1], "plane")):
        plot = ["plot", *given, "--kind", kind, "-o"]
        assert main.main([*plot, "all.svg", "--order", "all"]) == main.main([*plot, "primary.svg"]) == 0
        assert bigram <= texts("all.svg")
        assert not bigram & texts("primary.svg")
    assert main.main(["plot", *both[:1], "--kind=steps", "--order=all", "-o", "all.svg"]) == 0
    assert {"token: measured", "bigram: measured"} <= texts("all.svg")


def test_the_learning_rate_beside_a_trajectory_is_drawn(runs):
    checkpoint = runs / "small" / "checkpoint-100"
    checkpoint.mkdir()
    history = [{"step": step, "learning_rate": 0.001} for step in (10, 100)]
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    for name in ("small", "large"):
        assert main.main(["plot", str(runs / name), "--kind=steps", "-o", "out.svg"]) == 0
        assert ({"learning", "1e-3"} <= texts("out.svg")) is (name == "small")


def test_the_planes_that_are_asked_for(runs):
    for name in ("small", "large"):
        path = runs / name / "ib_trajectory.jsonl"
        Trajectory(with_views(point, "readout") for point in Trajectory.load(path)).save(path)
    both = [str(runs / "small"), str(runs / "large")]
    for given, path in ((both[:1], "new_plane.svg"), (both, "new.svg")):
        assert main.main(["plot", *given, "--plane=readout", "--plane=local", "--order=token", "-o", "new.svg"]) == 0
        assert {"token: readout", "token: local"} <= texts(path)
        assert not {"token: plain", "token"} & texts(path)
    assert main.main(["plot", *both, "-o", "new.svg"]) == 0
    assert {"token: plain", "token: local", "token: readout"} <= texts("new.svg")


def test_the_curve_beside_a_trajectory_is_drawn(runs):
    curve = IBCurve([0, 2], [0, 1], [0, 2], mutual_information=1.0, num_codewords=100)
    curve.with_info(order="token", probe=SETTINGS["probe"]).save(runs / "small" / "ib_curve.json")
    assert main.main(["plot", str(runs / "small"), "--kind", "plane", "-o", "plane.svg"]) == 0
    assert "IB curve: the bound for codes of the probe's tokens" in texts("plane.svg")
    assert main.main(["plot", str(runs / "large"), "--kind", "plane", "-o", "plane.svg"]) == 0
    assert "IB curve: the bound for codes of the probe's tokens" not in texts("plane.svg")


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", "ps"])
def test_a_picture_of_ours_is_drawn_anew_and_no_other_file_is_touched(suffix, runs, capsys):
    plot = ["plot", str(runs / "small"), "--kind", "plane", "-o", f"a.{suffix}"]
    assert main.main(plot) == main.main(plot) == 0
    Path(f"a.{suffix}").write_bytes(b"of the user, about ib_callback")
    assert main.main(plot) == 2
    assert re.search(rf"a\.{suffix}: expected a new file, or a picture that ib-callback made", capsys.readouterr().err)
    assert Path(f"a.{suffix}").read_bytes() == b"of the user, about ib_callback"


def test_where_one_file_is_of_somebody_else_none_is_written(runs, capsys):
    Path("steps.png").write_bytes(b"of the user")
    assert main.main(["plot", str(runs / "small")]) == 2
    assert written() == ["steps.png"]


def test_the_best_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trajectory = synthetic_run([*C, *np.linspace(C[-1], 0.35, 8)], [*E, *[E[-1]] * 8])
    trajectory.save("ib_trajectory.jsonl")
    best = trajectory.best(by="optimality")
    assert main.main(["plot", ".", "--kind", "layers", "--step", "best", "-o", "best.svg"]) == 0
    assert f"{tmp_path.name}, step {best.step:,}" in texts("best.svg")


def test_a_run_of_one_point_has_no_picture_over_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Trajectory([measurement(5)]).save("mine.jsonl")
    assert main.main(["plot", "mine.jsonl"]) == 0
    assert written() == ["layers.png", "mine.jsonl", "plane.png"]


@pytest.fixture
def results(runs: Path) -> Path:
    """Two models, of one of which the tokens are known, and a third that could not be measured."""
    path = runs / "results.jsonl"
    for model, scale, each in (("a", 1.0, 2_000_000), ("b", 1.1, None)):
        for point in run([0, 10, 100], orders=2, scale=scale):
            tokens = None if each is None else point.step * each
            append_result(path, Origin(model=model, revision=f"step{point.step}", tokens=tokens), point)
    append_result(path, Origin(model="c", revision="step10"), failed(10))
    return path


def test_models_of_a_file_of_results_are_compared_and_written_as_a_table(results, runs, capsys):
    assert main.main(["plot", str(results), "-o", "both.svg", "--csv", "both.csv", "--json", "-"]) == 1  # c is left out
    assert {"a", "b"} <= texts("both.svg")
    output = capsys.readouterr()
    assert "ib-callback: c is left out: none of its 1 points could be measured" in output.err
    with open("both.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["step"]) for row in rows] == [(m, s) for m in "ab" for s in ("0", "10", "100")]
    assert float(rows[4]["bigram/complexity"]) == measurement(10, orders=2, scale=1.1)["bigram"].complexity
    assert output.err.split()[:2] == ["both.svg", "both.csv"]
    assert [row["revision"] for row in json.loads(output.out)] == [f"step{s}" for _ in "ab" for s in (0, 10, 100)]
    # Beside a run, and of one model alone.
    assert main.main(["plot", str(results), str(runs / "small"), "-o", "both.svg"]) == 1
    assert {"a", "b", "small"} <= texts("both.svg")
    capsys.readouterr()
    assert main.main(["plot", str(results), "--model", "b", "-o", "one.svg"]) == 0
    assert written() == ["both.csv", "both.svg", "one_layers.svg", "one_plane.svg", "one_steps.svg"]
    assert capsys.readouterr().err == ""


def test_training_can_be_counted_in_tokens(results):
    plot = ["plot", str(results), "--model", "a", "--x", "tokens"]
    assert main.main([*plot, "--kind", "steps", "-o", "steps.svg"]) == 0
    assert {"training tokens", "200M"} <= texts("steps.svg")
    assert main.main([*plot, "--kind", "plane", "-o", "plane.svg"]) == 0
    assert {"training tokens", "0", "200M"} <= texts("plane.svg")


def test_a_run_is_a_table_too(runs):
    assert main.main(["plot", str(runs / "small"), "--kind", "plane", "--csv", "small.csv"]) == 0
    with open("small.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]] == ["model", "step", *measurement(0, orders=2).scalars(), "error"]
    assert [(row["model"], row["step"]) for row in rows] == [("small", "0"), ("small", "10"), ("small", "100")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "d"], r"--model: expected names among a, b, c, got 'd'"),
        (["--model", "c"], r"c has no measured point: expected at least one, got none among 1"),
        (["--model", "b", "--x", "tokens"], r"expected points whose tokens are known, got 2 of 3 without"),
    ],
)
def test_mistakes_about_results(results, capsys, arguments, message):
    assert re.search(message, failing([str(results), *arguments], capsys))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/nowhere"], r"there is no file or directory .*nowhere\. Give the output directory of a run"),
        (["{}"], "has several runs. Give the directory of one of them: .*large .*small"),
        (["{}/small", "--kind=compare"], "compare needs two runs or more, got one"),
        (["{}/small", "{}/small"], "expected different runs, got .*small.* twice"),
        (["{}/small", "--order=trigram"], "expected orders among token, bigram, got trigram"),
        (["{}/small", "--plane=readout"], "expected planes among plain, got readout"),
        (
            ["{}/small", "--kind=layers", "--plane=plain"],
            "--plane only works with the kinds plane and compare, got --kind layers",
        ),
        (
            ["{}/small", "--kind=layers", "--step=7"],
            "--step 7: no point was measured at step 7. The nearest measured steps are 0, 10, 100",
        ),
        (["{}/small", "--kind=layers", "--step=first"], "--step: expected a number, last or best, got 'first'"),
        (["{}/small", "--kind=layers", "--step=best"], "--step best: no point can be selected"),
        (["{}/small", "-o", "no/such.png"], "-o no/such.png: there is no directory no"),
        (["{}/small", "-o", "new/"], "-o new/: there is no directory new"),
        (
            ["{}/small", "--kind=plane", "-o", "plane.doc"],
            r"expected a picture file in one of .*svg.*\.doc",
        ),
    ],
)
def test_mistakes_are_one_line_and_status_2(runs, capsys, arguments, message):
    line = failing([argument.format(runs) for argument in arguments], capsys)
    assert line.startswith("ib-callback: ")
    assert re.search(message, line), line


def test_files_that_cannot_be_drawn_or_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Trajectory([failed(0)]).save("ib_trajectory.jsonl")
    assert "has no measured point: expected at least one, got none among 1" in failing(["."], capsys)
    Path("ib_trajectory.jsonl").write_text("no json\n{}\n")
    assert "ib_trajectory.jsonl" in failing(["."], capsys)


@pytest.mark.parametrize("option", ["--kind=pie", "--theme=sepia"])
def test_choices_are_checked_by_the_parser(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main.main(["plot", ".", option])
    assert f"argument {option.split('=')[0]}: invalid choice" in capsys.readouterr().err
