from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_runs import C, E, measured, run

from ib_callback import __version__
from ib_callback.cli import demo, main
from ib_callback.results.lines import Origin
from ib_callback.results.results import append_result
from ib_callback.results.trajectory import Trajectory


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main.main(["--version"])
    assert capsys.readouterr().out == f"ib-callback {__version__}\n"


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.main([])
    assert "required: command" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "many"])
@pytest.mark.parametrize("option", ["--steps", "--every", "--threads"])
def test_counts_must_be_positive(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.main(["demo", f"{option}={value}"])
    assert f"argument {option}: " in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon"])
def test_minutes_must_be_positive(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.main(["demo", f"--minutes={value}"])
    assert "argument --minutes: " in capsys.readouterr().err


def test_options_reach_the_demonstration(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []
    monkeypatch.setattr(demo, "run_demo", lambda **options: given.append(options))
    assert main.main(["demo"]) == 0
    assert (
        main.main(
            ["demo", "--steps=7", "--minutes=0.5", "--every=2", "--output-dir=x", "--seed=3", "--threads=2", "--quick"]
        )
        == 0
    )
    assert given[0] == {
        "steps": None,
        "minutes": 3.0,
        "every": None,
        "output_dir": "ib_demo",
        "seed": 0,
        "threads": 1,
        "quick": False,
    }
    assert given[1] == {
        "steps": 7, "minutes": 0.5, "every": 2, "output_dir": "x", "seed": 3, "threads": 2, "quick": True,
    }  # fmt: skip


def test_a_mistake_is_a_line_and_not_a_traceback(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    file = f"{tmp_path}/file"
    open(file, "w").close()
    assert main.main(["demo", "--output-dir", f"{file}/below"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ib-callback: cannot write to the output directory")
    assert "Traceback" not in error


def test_a_full_disk_ends_the_demonstration_as_it_ends_any_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(**options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "run_demo", full)
    assert main.main(["demo"]) == 2
    assert capsys.readouterr().err == "ib-callback: [Errno 28] No space left on device\n"


def test_an_interrupt_is_a_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(**options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupted)
    assert main.main(["demo"]) == 130
    assert capsys.readouterr().err == "ib-callback: interrupted\n"


# --- select


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The course of `synthetic_runs`: the optimality is highest, .8, from 2000 on; compression begins at 1000."""
    run(C, E).save(tmp_path / "ib_trajectory.jsonl")
    for step in (500, 900, 1500, 2000):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("model.safetensors", "trainer_state.json"):
            (folder / name).write_bytes(b"{}")
    return tmp_path


def test_select_prints_the_candidates_and_the_best(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["select", str(finished)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == ["step", "optimality", "phase", "checkpoint"]
    assert lines[21].split() == ["2,000", "0.8000", "compression", "checkpoint-2000", "best"]
    assert lines[-1] == f"The best checkpoint: {finished / 'checkpoint-2000'}"
    assert captured.err == ""


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ([], 2000),
        (["--by", "token/expressivity", "--mode", "min"], 1500),
        # .265 at 900, before the compression, and .18 at 1500.
        (["--from", "fit", "--by=distance_to_bound", "--mode=max"], 900),
        (["--from", "500", "--by=distance_to_bound", "--mode=max"], 900),
        (["--from", "1,000", "--by=distance_to_bound", "--mode=max"], 1500),
    ],
)
def test_select_prints_the_path_alone(
    finished: Path, options: list[str], step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["select", str(finished), "--path-only", *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{finished / f'checkpoint-{step}'}\n"
    assert captured.err == ""


def test_select_writes_its_candidates_as_a_table(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = finished / "candidates.csv"
    assert main.main(["select", str(finished), "--csv", str(file), "--json", "-"]) == 0
    candidates = json.loads(capsys.readouterr().out)
    best = {"step": 2000, "optimality": 0.8, "phase": "compression", "remark": "best"}
    assert candidates[20] == best | {"checkpoint": str(finished / "checkpoint-2000")}
    assert len(file.read_text().splitlines()) == 1 + len(candidates) == 32


@pytest.mark.parametrize("given", [["report", "~"], ["phases", "~/ib_trajectory.jsonl"], ["select", "~"]], ids=str)
def test_a_home_in_what_is_given_is_that_of_the_user(
    given: list[str], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(finished))
    monkeypatch.chdir(finished / "checkpoint-500")
    assert main.main([*given, "--csv=~/t.csv"]) == 0
    assert (finished / "t.csv").is_file()
    assert not Path("~").exists()


def test_select_says_why_there_is_none(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["select", str(finished), "--from", "2001"]) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1 + 31
    assert captured.err.startswith("ib-callback: No point can be selected: before step 2,001; no checkpoint.\n")
    assert main.main(["select", str(finished), "--from", "2001", "--path-only"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "before step 2,001; no checkpoint" in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--by", "optimallity"], "no metric 'optimallity' is measured. Measured metrics: complexity, expressivity"),
        (["--by", "bigram/optimality"], "no metric 'bigram/optimality' is measured"),
        (["--by", "entropy"], "neither high nor low entropy is known to be better"),
        (["--from", "later"], "--from: expected compression, fit or a step (0 or more), got 'later'"),
        (["--from", "1.5"], "--from: expected compression, fit or a step (0 or more), got '1.5'"),
        (["--from=-3"], "--from: expected compression, fit or a step (0 or more), got '-3'"),
    ],
)
def test_a_mistake_in_an_option_of_select(
    finished: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["select", str(finished), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"ib-callback: {message}")
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "option", "value", "expected"),
    [
        *[("select", "--guard", value, "loss, none or a tolerance in nats") for value in
          ("abc", "-1", "0", "inf", "nan", "None")],
        ("demo", "--steps", "many", "1 or more"),
        ("demo", "--minutes", "soon", "a number of minutes above 0"),
        ("demo", "--minutes", "inf", "a number of minutes above 0"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_told_with_what_was_expected(
    command: str, option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.main([command, *(["."] if command == "select" else []), f"{option}={value}"])
    told = capsys.readouterr().err
    assert f"argument {option}: expected {expected}" in told
    assert value in told.splitlines()[-1].partition("got ")[2]


def test_select_without_a_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["select", str(finished / "checkpoint-500")]) == 2
    assert "no ib_trajectory.jsonl in" in capsys.readouterr().err
    assert main.main(["select", str(finished / "nowhere")]) == 2
    assert "there is no file or directory" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main.main(["select"])
    assert "RUN" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ib_trajectory.jsonl", "ib_checkpoints.jsonl"])
def test_a_damaged_file_is_named(finished: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / name).write_bytes(b'damage\n{"step": 5}\n')
    assert main.main(["select", str(finished)]) == 2
    error = capsys.readouterr().err
    assert f"{name}:1: expected one JSON object" in error
    assert "Traceback" not in error


def test_a_warning_is_a_line_said_once(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = finished / "ib_trajectory.jsonl"
    # Without a null both the choice and the column of phases warn.
    trajectory = Trajectory(measured(100 * i, c, e, null=None) for i, (c, e) in enumerate(zip(C, E, strict=True)))
    trajectory.save(path)
    path.write_bytes(path.read_bytes() + b'{"step": 31')
    assert main.main(["select", str(finished), "--path-only"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{finished / 'checkpoint-2000'}\n"
    assert len(captured.err.splitlines()) == 2
    assert f"ib-callback: {path}: the last line is incomplete" in captured.err
    assert "ib-callback: phases are found from the plain expressivity" in captured.err


def test_select_among_the_models_of_a_file_of_results(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.jsonl"
    for model in ("a", "b"):
        for point in run(C, E):
            there = finished / f"checkpoint-{point.step}"
            origin = Origin(model=model, revision=there.name, source=str(there) if model == "a" else None)
            append_result(file, origin, point)
    assert main.main(["select", str(file), "--model", "a", "--path-only", "--by", "eval_ib_optimality"]) == 0
    assert capsys.readouterr().out == f"{finished / 'checkpoint-2000'}\n"
    assert main.main(["select", str(file), "--model", "b"]) == 1
    assert "The best point has no checkpoint: step 2,000" in capsys.readouterr().err
    assert main.main(["select", str(file)]) == 2
    assert "one model of the file, got several models. The file has a, b" in capsys.readouterr().err


# --- help


def commands(parser: argparse.ArgumentParser, name: str = "") -> dict[str, argparse.ArgumentParser]:
    found = {name: parser}
    for action in parser._actions:
        for key, child in action.choices.items() if isinstance(action, argparse._SubParsersAction) else ():
            found |= commands(child, f"{name} {key}".strip())
    return found


COMMANDS = commands(main.parser())


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_has_examples_that_can_be_parsed_and_no_default_that_is_none(name: str) -> None:
    text = COMMANDS[name].format_help()
    assert not re.search(r"default:\s+(None|False|\[\])", text)
    assert max(map(len, text.splitlines())) <= 120
    lines = text[text.index("examples:") :].replace("\\\n", " ").splitlines()
    examples = [line.strip() for line in lines if line.startswith("  ")]
    assert examples
    for line in examples:
        if line.startswith("ib-callback") and "COMMAND" not in line:
            main.parser().parse_args(shlex.split(line)[1:])


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ib_callback", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"ib-callback {__version__}\n"
