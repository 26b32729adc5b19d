"""All commands on a run that two callbacks followed, each with its own prefix."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from plot_runs import SETTINGS, measurement
from synthetic_runs import C, E, run
from wandb_offline import read_offline_runs

from ib_callback.bound.curve import IBCurve
from ib_callback.checkpoints.local import find_local
from ib_callback.cli import main
from ib_callback.results.lines import Origin
from ib_callback.results.phases import PhaseRule
from ib_callback.results.results import Results, append_result
from ib_callback.results.trajectory import Trajectory, write_run_file
from ib_callback.run.checkpoints import CheckpointFile
from ib_callback.run.names import Names

# In the second run, complexity and expressivity are half as high.
RUNS = {"ib": run(C, E), "code": run([c / 2 for c in C], [e / 2 for e in E])}
CHECKPOINTS = {"ib": 1800, "code": 1500}
COMMANDS = {
    "select": ["--from", "fit"],
    "plot": ["--kind", "plane", "-o", "plane.svg"],
    "report": [],
    "phases": [],
    "context": [],
    "stop": [],
    "compare": [],
    "correlate": ["scores.csv", "--score", "score"],
    "log": ["--tensorboard", "board", "--no-plane"],
}
BOUND = "IB curve: the bound for codes of the probe's tokens"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    directory = folder / "run"
    for stem, step in CHECKPOINTS.items():
        checkpoint = directory / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        for name in ("model.safetensors", "trainer_state.json"):
            (checkpoint / name).write_text("{}")
        names = Names(f"{stem}/")
        Trajectory(replace(point, loss=4.0) for point in RUNS[stem]).save(directory / names.trajectory)
        CheckpointFile(directory, name=names.checkpoints).add(step, checkpoint)
        write_run_file(directory, phase_rule=PhaseRule(), name=names.run)
    (folder / "scores.csv").write_text("model,score\nrun,1\n")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def ran(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """What is printed."""
    assert main.main(list(arguments)) == status
    output = capsys.readouterr()
    return output.out if status == 0 else output.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_with_two_prefixes(command, work, capsys):
    more = COMMANDS[command]
    assert ran(capsys, command, "run", *more, status=2) == (
        "ib-callback: run has 2 trajectories. Give --prefix code or --prefix ib, or one of the files: "
        "run/code_trajectory.jsonl run/ib_trajectory.jsonl\n"
    )
    told = {}
    for stem in RUNS:
        by_prefix = ran(capsys, command, "run", "--prefix", stem, *more)
        # TensorBoard's folder has the points of this prefix already, and none of the other one.
        assert command != "log" or by_prefix == "run: 31 points logged: board\n"
        told[stem] = by_prefix
        if command == "log":
            assert "31 were there already" in ran(capsys, command, f"run/{stem}_trajectory.jsonl", *more)
        else:
            assert ran(capsys, command, f"run/{stem}_trajectory.jsonl", *more) == by_prefix
            assert ran(capsys, command, "run", "--prefix", f"{stem}/", *more) == by_prefix
    if command in ("select", "report", "context", "compare"):
        assert told["ib"] != told["code"]


def test_only_one_prefix_needs_no_option(work, capsys):
    chosen = ran(capsys, "report", "run", "--prefix", "code")
    for path in Path("run").glob("ib_*"):
        path.unlink()
    assert ran(capsys, "report", "run") == ran(capsys, "report", ".") == chosen
    assert "no ib_trajectory.jsonl. Give the prefix of one of these" in " ".join(
        ran(capsys, "report", "run", "--prefix", "ib", status=2).split()
    )


def test_checkpoints_are_those_of_the_prefix(work, capsys):
    for stem, step in CHECKPOINTS.items():
        found = ran(capsys, "select", "run", "--prefix", stem, "--path-only")
        assert Path(found.strip()).resolve() == (work / f"run/checkpoint-{step}").resolve()
    assert "not in code_checkpoints.jsonl" in ran(capsys, "select", "run", "--prefix", "code")


def test_metrics_may_have_the_prefix(work, capsys):
    folder = ["run", "--prefix", "code"]
    for command, option, more in (
        ("select", "--by", ["--from", "fit"]),
        ("stop", "--monitor", []),
        ("compare", "--by", []),
        ("correlate", "--metric", COMMANDS["correlate"]),
    ):
        arguments = [command, *folder[:1], *more, *folder[1:], "--json", "-"]
        assert ran(capsys, *arguments, option, "code/optimality") == ran(capsys, *arguments, option, "optimality")


def test_the_curve_and_the_rule_are_those_of_the_prefix(work, capsys):
    curve = IBCurve([0, 2], [0, 1], [0, 2], mutual_information=1.0, num_codewords=100)
    curve.with_info(order="token", probe=SETTINGS["probe"]).save("run/code_curve.json")
    for stem in RUNS:
        Trajectory([measurement(0), measurement(10)]).save(f"run/{stem}_trajectory.jsonl")
        ran(capsys, "plot", "run", "--prefix", stem, "--kind", "plane", "-o", f"{stem}.svg")
        assert (BOUND in Path(f"{stem}.svg").read_text()) == (stem == "code")


def test_results_of_a_run_have_the_rule_of_their_prefix(work):
    write_run_file(Path("run"), phase_rule=PhaseRule(drop=0.25), name="code_run.json")
    results = Results.load("run/code_trajectory.jsonl", "run/ib_trajectory.jsonl")
    assert [course.phase_rule.drop for course in results.values()] == [0.25, PhaseRule().drop]


def test_both_in_one_picture_are_called_by_their_prefixes(work, capsys):
    files = [f"run/{stem}_trajectory.jsonl" for stem in RUNS]
    rows = json.loads(ran(capsys, "compare", *files, "--json", "-"))
    assert {row["model"] for row in rows} == {"ib", "code"}
    shutil.copytree("run", "other")
    rows = json.loads(ran(capsys, "phases", *files, "other/code_trajectory.jsonl", "--json", "-"))
    assert {row["model"] for row in rows} == {"ib", "code", "other"}


def test_wandb_gets_the_keys_of_the_live_run(work, capsys, monkeypatch):
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_DIR", str(work))
    try:
        for stem in ("ib", "code"):
            out = ran(capsys, "log", "run", "--prefix", stem, "--wandb", "one", "--no-plane")
            assert out.startswith("run: 31 points logged: ")
        out = ran(capsys, "log", "run", "--prefix", "code", "--wandb", "one", "--no-plane")
        assert out.startswith("run: 0 points logged; 31 were there already: ")
    finally:
        wandb.finish()
        wandb.teardown()
    by_prefix = {}
    for logged in read_offline_runs(work)[:2]:
        (glob,) = logged.step_metrics
        assert logged.step_metrics[glob] == "ib/step"
        names = {name for row in logged.rows for name in row} | set(logged.summary)
        names -= {name for name in names if name.startswith("_")}
        prefix = glob.removesuffix("*")
        assert {name for name in names if not name.startswith(prefix)} <= {"ib/step"}
        by_prefix[prefix] = [row[f"{prefix}complexity"] for row in logged.rows if f"{prefix}complexity" in row]
        assert logged.summary[f"{prefix}lowest_loss"] == 4.0
        assert logged.config[f"{prefix[:-1]}_model"] == "run"
    assert by_prefix["ib/"] == [point.complexity for point in RUNS["ib"]]
    assert by_prefix["code/"] == [point.complexity for point in RUNS["code"]]


def test_mistakes(work, capsys):
    with pytest.raises(SystemExit, match="2"):
        main.main(["report", "run", "--prefix", "a b"])
    assert "expected one word and a slash at its end, such as" in capsys.readouterr().err
    error = ran(capsys, "report", "run", "--prefix", "chat", status=2)
    assert "run has no chat_trajectory.jsonl. Give the prefix of one of these" in error
    assert "run/code_trajectory.jsonl run/ib_trajectory.jsonl" in error
    error = ran(capsys, "report", "run/ib_trajectory.jsonl", "--prefix", "code", status=2)
    assert "run/ib_trajectory.jsonl does not belong to the prefix 'code/'" in error
    # A file of another program is no trajectory.
    Path("run/code_trajectory.jsonl").write_text("[1, 2]\n")
    assert ran(capsys, "report", "run")
    assert "-o run/ib_trajectory.jsonl: expected a file of its own" in ran(
        capsys, "plot", "run", "--kind", "plane", "-o", "run/ib_trajectory.jsonl", status=2
    )


@pytest.mark.parametrize("command", ["select", "report", "plot"])
def test_a_folder_without_a_trajectory_but_with_results(command, work, capsys):
    Path("results").mkdir()
    for step in (0, 10, 100):
        append_result(Path("results/r.jsonl"), Origin(model="small"), replace(measurement(step), loss=4.0))
    Path("results/other.jsonl").write_text('{"text": "of the user"}\n')
    more = [*COMMANDS[command], *(["--by", "loss", "--from", "0"] if command == "select" else [])]
    assert main.main([command, "results", *more]) == main.main([command, "results/r.jsonl", *more])
    error = capsys.readouterr().err
    assert "results has no trajectory. The results in r.jsonl are used instead." in error
    append_result(Path("results/s.jsonl"), Origin(model="large"), measurement(0))
    error = ran(capsys, command, "results", *more, status=2)
    assert "results has no trajectory, but files of results. Give one of them: results/r.jsonl results/s.jsonl" in error


def test_measure_finds_what_any_callback_recorded(work):
    Path("elsewhere/best").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        Path("elsewhere/best", name).write_text("{}")
    CheckpointFile("run", name="code_checkpoints.jsonl").add(2_000, "elsewhere/best")
    assert [checkpoint.step for checkpoint in find_local(Path("run"), "run")] == [1_500, 1_800, 2_000]


def test_all_commands_are_here():
    parser = main.parser()
    commands = next(action.choices for action in parser._actions if action.choices is not None)
    with_prefix = {name for name, each in commands.items() if "--prefix" in each.format_help()}
    assert with_prefix == set(COMMANDS)
