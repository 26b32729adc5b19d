"""What holds for every command alike: what may be written where, how they end, and terminals of any encoding."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from plot_runs import failed, measurement, with_views
from synthetic_runs import C, E, run
from word_tokenizer import word_tokenizer

from ib_callback import Probe
from ib_callback.cli import log, main
from ib_callback.common.version import __version__
from ib_callback.results.lines import Origin
from ib_callback.results.results import append_result
from ib_callback.results.trajectory import FILENAME, Trajectory

# Each command, by what is read, as it is given without anything to write.
TABLES = {
    "select": ["select", "run"],
    "plot": ["plot", "run", "-o", "picture.png", "--kind", "plane"],
    "report": ["report", "run"],
    "phases": ["phases", "run"],
    "context": ["context", "run"],
    "stop": ["stop", "run"],
    "compare": ["compare", "r.jsonl"],
    "pair": ["compare", "r.jsonl", "--pair", "a:b"],
    "profile": ["compare", "r.jsonl", "--profile"],
    "correlate": ["correlate", "r.jsonl", "scores.csv", "--score", "score"],
    "measure": ["measure", "model", "-o", "more.jsonl", "--documents", "texts.txt"],
}
PICTURES = ["report", "phases", "context", "stop", "compare", "pair", "profile", "correlate"]
READ = dict.fromkeys(("select", "plot", "report", "phases", "context", "stop"), "run/ib_trajectory.jsonl") | {
    "correlate": "scores.csv",
    "measure": "texts.txt",
}
ENCODINGS = ["ascii", "latin-1", "cp1252"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run, results of two models, their scores, and what is to be measured."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "run").mkdir()
    Trajectory(replace(point, loss=4.0) for point in run(C, E)).save(folder / "run" / FILENAME)
    for name, scale in (("a", 1.0), ("b", 1.1)):
        add(folder / "r.jsonl", name, steps=(0, 10, 100), scale=scale)
    (folder / "scores.csv").write_text("model,score\na,1\nb,2\n")
    (folder / "texts.txt").write_text("one, two\nthree\n")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, for one test, as the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def add(path: str | Path, name: str, *, steps: tuple[int | None, ...], scale: float = 1.0) -> None:
    for step in steps:
        point = replace(with_views(measurement(step, orders=2, scale=scale), "readout"), loss=4.0)
        append_result(Path(path), Origin(model=name), point)


def probe() -> Probe:
    return Probe.from_texts(["a b c d e f g h"], word_tokenizer(), min_length=4, name="ρ")


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of standard error; nothing is said beside it, written or changed."""
    before = contents()
    assert main.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert contents() == before
    (line,) = output.err.splitlines()
    return line


# --- what is written


@pytest.mark.parametrize("option", ["--csv", "--json"])
@pytest.mark.parametrize("command", TABLES)
def test_a_table_never_replaces_what_is_read(command, option, work, capsys):
    given = READ.get(command, "r.jsonl")
    Path("link.csv").symlink_to(given)
    for spelling in (given, f"../{work.name}/{given}", str(work / given), "link.csv"):
        line = refused([*TABLES[command], option, spelling], capsys)
        assert line.startswith(f"ib-callback: {option} {spelling}: expected a file of its own, got a file that is read")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("other.jsonl", "got measurements"),
        ("model/config.json", "got something else"),
        ("notes", "got something else"),
        ("binary", "got something else"),
        ("run", "expected a file, got a directory"),
        (".", "expected a file, got a directory"),
        ("", "expected a file, got a directory"),
        ("new/", "expected a file, got a directory"),
        ("nowhere/x", "there is no directory nowhere"),
        ("notes/x", "there is no directory notes"),
        ("/dev/null", "expected a file, got a device"),
        ("x" * 214, "expected a name of at most 213 bytes"),
    ],
)
@pytest.mark.parametrize("option", ["--csv", "--json"])
@pytest.mark.parametrize("command", TABLES)
def test_a_table_that_cannot_be_written_is_refused_before_any_work(command, option, path, reason, work, capsys):
    add("other.jsonl", "c", steps=(0,))
    Path("notes").write_text("to be kept\n")
    Path("binary").write_bytes(b"a,\0b\n")
    line = refused([*TABLES[command], option, path], capsys)
    assert line.startswith(f"ib-callback: {option} {path or repr(path)}: ")
    assert reason in line


@pytest.mark.parametrize("command", PICTURES)
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("r.jsonl", "got "),
        ("notes.png", "got something else"),
        ("run", "got a directory"),
        ("nowhere/x.png", "there is no directory nowhere"),
        ("a.foo", r"expected a picture file in one of the formats .*png.*, got \.foo"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_any_work(command, path, reason, work, capsys):
    Path("notes.png").write_text("to be kept")
    line = refused([*TABLES[command], "-o", path, "--csv", "t.csv"], capsys)
    assert re.match(f"ib-callback: -o {path}: .*{reason}", line)


@pytest.mark.parametrize("command", [*PICTURES, "plot"])
def test_no_two_outputs_are_one_file(command, work, capsys):
    picture = [] if command == "plot" else ["-o", "picture.png"]
    Path("table.csv").symlink_to("./picture.png")
    for path in ("picture.png", "./picture.png", "table.csv"):
        line = refused([*TABLES[command], *picture, "--csv", path], capsys)
        assert line.startswith(f"ib-callback: --csv {path}: expected a file of its own, got the file of -o")
    line = refused([*TABLES[command], "--csv", "t", "--json", "t"], capsys)
    assert line.startswith("ib-callback: --json t: expected a file of its own, got the file of --csv")


@pytest.mark.parametrize("command", [name for name in TABLES if name not in ("measure", "select")])
def test_a_table_and_a_picture_replace_those_of_before(command, work, capsys):
    picture = ["-o", "picture.png"] if command != "plot" else []
    arguments = [*TABLES[command], *picture, "--csv", "t.csv", "--json", "t.json"]
    assert main.main(arguments) == main.main(arguments) == 0
    first = contents()
    assert main.main(arguments) == 0
    assert contents() == first
    assert {"t.csv", "t.json", "picture.png"} <= {*first}


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (".", "-o .: expected a file, got a directory"),
        ("nowhere/r.jsonl", "-o nowhere/r.jsonl: there is no directory nowhere"),
        ("texts.txt", "-o texts.txt: expected a file of its own, got a file that is read"),
        ("run/ib_trajectory.jsonl", "-o run/ib_trajectory.jsonl: expected a file of its own, got a file that is read"),
        ("scores.csv", "-o scores.csv: expected a new file, or a file of results, got something else"),
    ],
)
def test_results_that_cannot_be_appended_to_are_refused_before_any_work(output, reason, work, capsys):
    line = refused(["measure", "run", "model", "-o", output, "--documents", "texts.txt"], capsys)
    assert line.startswith(f"ib-callback: {reason}")
    line = refused(["measure", "model", "-o", "r.jsonl", "--documents", "texts.txt", "--csv", "r.jsonl"], capsys)
    assert line.startswith("ib-callback: --csv r.jsonl: expected a file of its own, got a file that is read")


def test_the_tables_of_a_folder_of_scores_are_read(work, capsys):
    Path("scores").mkdir()
    Path("scores.csv").rename("scores/a.csv")
    arguments = ["correlate", "r.jsonl", "scores", "--score", "score"]
    assert "got a file that is read" in refused([*arguments, "--csv", "scores/a.csv"], capsys)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["build", "--dataset", "builtin", "--tokenizer", "-", "-o", "r.jsonl.safetensors"],
            "-o r.jsonl.safetensors: ",
        ),
        (["convert", "p.safetensors", "r.jsonl"], "OUT r.jsonl: expected a new file, or a probe, got measurements"),
        (["convert", "p.safetensors", "run"], "OUT run: expected a file, got a directory"),
    ],
)
def test_a_probe_never_replaces_measurements(arguments, reason, work, capsys):
    probe().save("p.safetensors")
    Path("r.jsonl.safetensors").write_bytes(Path("r.jsonl").read_bytes())
    assert reason in refused(["probe", *arguments], capsys)


# --- how they end


ALL = ["phases", "context", "stop", "compare", "correlate", "report", "plot", "log"]


def of_results(command: str, path: str = "r.jsonl") -> list[str]:
    more = {
        "correlate": ["scores.csv", "--score", "score"],
        "plot": ["-o", "picture.png"],
        "log": ["--tensorboard", "board"],
    }
    return [command, path, *more.get(command, [])]


@pytest.mark.parametrize("command", ALL)
def test_a_model_that_is_left_out_is_a_part_that_failed(command, work, capsys, monkeypatch):
    monkeypatch.setattr(log, "to_tensorboard", lambda *_, **__: [])  # which not every machine has
    assert main.main(of_results(command)) == 0
    append_result(Path("r.jsonl"), Origin(model="c"), failed(10))
    assert main.main(of_results(command)) == 1
    output = capsys.readouterr()
    assert re.search("c is left out|none of its 1 points could be measured", output.out + output.err)
    assert main.main([*of_results(command), "--model", "a", "--model", "b"]) == 0


@pytest.mark.parametrize(("command", "option"), [("context", "10"), ("compare", "10")])
def test_a_model_without_the_step_is_left_out(command, option, work):
    add("r.jsonl", "c", steps=(0, 20))
    assert main.main([command, "r.jsonl", "--step", option]) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["phases", "one.jsonl"],
        ["stop", "one.jsonl"],
        ["phases", "no_steps.jsonl"],
        ["stop", "no_steps.jsonl"],
        ["report", "no_steps.jsonl"],
        ["correlate", "one.jsonl", "scores.csv", "--score", "score"],
        ["compare", "r.jsonl", "--pair", "a:b"],
    ],
)
def test_that_nothing_can_be_concluded_is_an_answer(arguments, work, capsys):
    add("one.jsonl", "a", steps=(10,))
    add("no_steps.jsonl", "a", steps=(None,))
    assert main.main(arguments) == 0
    assert "nothing can be concluded" in " ".join(capsys.readouterr().out.lower().split())


# --- pictures that there cannot be


@pytest.mark.parametrize(
    "arguments",
    [
        ["stop", "one.jsonl"],
        ["stop", "no_steps.jsonl"],
        ["correlate", "one.jsonl", "scores.csv", "--score", "score"],
        ["compare", "one.jsonl", "--plane", "prediction"],
        ["context", "one.jsonl", "--plane", "prediction"],
        ["report", "empty.jsonl"],
    ],
)
def test_without_a_picture_there_is_an_answer_all_the_same(arguments, work, capsys):
    add("one.jsonl", "a", steps=(10,))
    add("no_steps.jsonl", "a", steps=(None,))
    append_result(Path("empty.jsonl"), Origin(model="a"), failed(10))
    plain = [each for each in arguments if each not in ("--plane", "prediction")]
    main.main(plain)
    text = capsys.readouterr().out
    assert main.main([*arguments, "-o", "t.png", "--csv", "t.csv"]) == 1
    output = capsys.readouterr()
    assert output.out == f"{text}t.csv\n"
    assert re.search("^ib-callback: no picture: ", output.err, re.MULTILINE)
    assert not Path("t.png").exists()


def test_of_many_runs_the_first_are_drawn(work, capsys):
    for number in range(18):
        add("many.jsonl", f"m{number}", steps=(0, 10, 100))
    assert main.main(["stop", "many.jsonl", "-o", "t.svg"]) == 0
    assert "the first 8 runs; 10 more are not drawn" in capsys.readouterr().err
    drawn = Path("t.svg").read_text()
    assert "10 more runs are not drawn" in drawn
    assert set(re.findall(r">(m\d+)<", drawn)) == {f"m{number}" for number in range(8)}


@pytest.mark.parametrize("given", [["run"], ["r.jsonl"], ["r.jsonl", "--model", "a"]])
def test_a_report_has_the_planes_as_its_picture(given, work, capsys):
    assert main.main(["report", *given, "-o", "t.svg", "--theme", "dark"]) == 0
    assert capsys.readouterr().out.endswith("t.svg\n")
    assert "<dc:title>ib_callback" in Path("t.svg").read_text()


# --- options and advice


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["context", "run", "--plane", "local"], "--plane would have no effect without -o. Give -o FILE"),
        (["stop", "run", "--x", "tokens"], "--x would have no effect without -o. Give -o FILE"),
        (["compare", "r.jsonl", "--plane", "local"], "--plane would have no effect without -o"),
        (["compare", "r.jsonl", "--pair", "a:b", "--order", "token"], "--order would have no effect without -o"),
        (
            ["compare", "r.jsonl", "--pair", "a:b", "--by", "loss"],
            "--by would have no effect with --pair",
        ),
        (
            ["compare", "r.jsonl", "--profile", "--by", "loss"],
            "--by would have no effect with --profile",
        ),
        (["compare", "r.jsonl", "--pair", "a:b", "--step", "10"], "--step would have no effect with --pair"),
        (
            ["compare", "r.jsonl", "--profile", "--plane", "local", "-o", "a.png"],
            "--plane would have no effect with --profile",
        ),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(arguments, reason, work, capsys):
    assert refused(arguments, capsys).startswith(f"ib-callback: {reason}")


@pytest.mark.parametrize("command", ["context", "compare"])
def test_a_plane_that_does_not_exist_is_refused(command, work, capsys):
    with pytest.raises(SystemExit, match="2"):
        main.main([command, "r.jsonl", "--plane", "foo"])
    assert "argument --plane: invalid choice: 'foo'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["select", *ALL])
def test_what_is_not_there_or_empty(command, work, capsys):
    assert "there is no file or directory nowhere.jsonl" in refused(of_results(command, "nowhere.jsonl"), capsys)
    if command not in ("select", "report"):  # which say what they can of it
        Path("empty.jsonl").touch()
        line = refused(of_results(command, "empty.jsonl"), capsys)
        assert "has no measured point: expected at least one, got none among 0" in line


def test_points_without_steps_were_measured_all_the_same(work, capsys):
    add("no_steps.jsonl", "a", steps=(None,))
    main.main(["phases", "no_steps.jsonl"])
    told = capsys.readouterr().out
    assert "No point has a step" in told
    assert "No point was measured" not in told


def test_select_advises_what_can_be_done(work, capsys):
    Path("unfit").mkdir()
    run([0.3, *[0.02] * 9], [0.03, *[0.002] * 9]).save(Path("unfit") / FILENAME)
    assert main.main(["select", "unfit"]) == 1
    assert "To choose among the points from a step on, give --from STEP." in capsys.readouterr().err


# --- help, and encodings


def parsers(of: argparse.ArgumentParser, *path: str) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    yield path, of
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, each in action.choices.items():
                yield from parsers(each, *path, name)


COMMANDS = dict(parsers(main.parser()))


@pytest.mark.parametrize("path", COMMANDS, ids="-".join)
def test_no_help_says_a_default_twice(path):
    text = " ".join(COMMANDS[path].format_help().split())
    for option in re.split(r" (?=--[a-z])", text):
        assert not ("by default" in option and "(default:" in option)
        assert option.count("(default:") < 2


def printed(encoding: str, code: str) -> str:
    """What a process prints on a terminal of an encoding, in which it ends as it should."""
    shell = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", code], env=shell, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    return done.stdout.decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_terminals_of_any_encoding_show_every_help_and_answer(encoding, work):
    probe().save("p.safetensors")
    os.mkdir("run/checkpoint-2000")
    for name in ("model.safetensors", "trainer_state.json"):
        Path("run/checkpoint-2000", name).write_bytes(b"{}")
    add("letters.jsonl", "модель-é", steps=(0, 10))
    answers = [*(of_results(name) for name in ("phases", "context", "correlate", "report", "compare", "stop"))]
    answers += [["phases", "run"], ["select", "run"], ["probe", "show", "p.safetensors"]]
    answers += [["phases", "letters.jsonl", "--json", "t.json"]]
    # All in one process, because each start costs seconds; the streams are those of a process of this encoding.
    shown = printed(
        encoding,
        "import sys\nfrom ib_callback.cli.main import command, main\n"
        f"for path in {[*COMMANDS]!r}:\n"
        "    try:\n        main([*path, '--help'])\n    except SystemExit as end:\n        assert not end.code\n"
        f"for arguments in {answers!r}:\n    assert main(arguments) == 0\n"
        "sys.argv = ['ib-callback', '--version']\ncommand()",
    )
    assert all(f"usage: ib-callback {' '.join(path)}".strip() in shown for path in COMMANDS)
    assert "r (Pearson) and ? (Spearman) correlate the training step" in shown
    assert ("± is a standard error" if encoding != "ascii" else "? is a standard error") in shown
    assert "The best checkpoint: " in shown
    assert "fingerprint" in shown
    assert json.loads(Path("t.json").read_text(encoding="utf-8"))[0]["model"] == "модель-é"
    assert shown.split()[-1] == __version__


def test_a_table_for_another_program_keeps_its_letters(work):
    add("letters.jsonl", "модель-é", steps=(0, 10))
    command = ["phases", "letters.jsonl", "--json", "-"]
    code = f"import sys\nfrom ib_callback.cli.main import main\nsys.exit(main({command!r}))"
    assert json.loads(printed("utf-8", code))[0]["model"] == "модель-é"
