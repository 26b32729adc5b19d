"""Every example runs, in fewer steps than it takes by itself.

Those of `examples/integrations` need trainers that are not installed here. `.ci/clients` runs them; here they are read.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import wandb
from two_ranks import on_two_ranks

import ib_callback as ib
from ib_callback.probe import builtin_text

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
INTEGRATIONS = sorted((EXAMPLES / "integrations").glob("[!_]*.py"))
PAGES = sorted((ROOT / "docs/integrations").glob("*.md"))
Run = Callable[..., str]
UnknownNames = Callable[..., list[str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example with arguments in a directory of its own, and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()  # it reads its settings once a process
    # Pictures take most of the time: one at the first point and one at the end are enough here.
    monkeypatch.setattr("ib_callback.run.run._DRAWN_SINGLY", 1)
    monkeypatch.setattr("ib_callback.run.run._DRAWN_AGAIN", 1000)

    def run_example(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        wandb.finish()  # as the end of the process would
        return capsys.readouterr().out

    return run_example


def test_there_is_no_other() -> None:
    named = {"hf_trainer.py", "lightning_trainer.py", "plain_loop.py", "fabric_loop.py", "fsdp2_loop.py"}
    named |= {"score_checkpoints.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == named


def test_huggingface_and_then_its_checkpoints(run: Run, tmp_path: Path) -> None:
    out = run("hf_trainer.py", "--steps", "21")
    steps = ib.Trajectory.load(tmp_path / "ib_example").steps
    assert steps[0] == 0
    assert {20, 21} <= set(steps), "the checkpoint and the last step"
    assert "The best checkpoint: " in out
    out = run("score_checkpoints.py", "ib_example", "--sequences", "8")
    scores = ib.Trajectory.load(tmp_path / "ib_example" / "ib_checkpoint_scores.jsonl")
    assert scores.steps == [20, 21]
    assert scores.table() in out


def test_lightning(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # set by the example; put back by this
    out = run("lightning_trainer.py", "--steps", "11")
    (directory,) = tmp_path.glob("ib_example/lightning_logs/*")
    assert ib.Trajectory.load(directory).steps == [0, 10, 11]
    assert f"{directory.relative_to(tmp_path)}/checkpoints/step=10.ckpt" in out


def own_lines(name: str) -> int:
    """Lines of code of an example, without imports, from where model, data and optimizer are made."""
    text = (EXAMPLES / name).read_text(encoding="utf-8").partition("optimizer = ")[2]
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in text.splitlines()[1:])


def test_a_plain_loop_that_is_resumed(run: Run, tmp_path: Path) -> None:
    assert own_lines("plain_loop.py") <= 25
    run("plain_loop.py", "22")
    first = ib.Trajectory.load(tmp_path / "ib_example")
    assert first.steps[0] == 0
    assert first.steps[-1] == 22
    out = run("plain_loop.py", "41")
    trajectory = ib.Trajectory.load(tmp_path / "ib_example")
    assert trajectory.steps[: trajectory.steps.index(20) + 1] == first.steps[: first.steps.index(20) + 1]
    assert {40, 41} <= set(trajectory.steps), "the checkpoint and the last step"
    assert trajectory.table() in out
    (best,) = re.findall(r"Selected\(step=(\d+)", out)
    kept = {int(path.stem.removeprefix("step-")) for path in (tmp_path / "ib_example").glob("step-*.pt")}
    assert kept == {int(best), 40}
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_a_fabric_loop_that_is_resumed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # set by the example; put back by this
    run("fabric_loop.py", "21")
    out = run("fabric_loop.py", "41")
    trajectory = ib.Trajectory.load(tmp_path / "ib_example")
    assert trajectory.steps == [0, 20, 40, 41]
    assert trajectory.table() in out
    assert "The best checkpoint: Selected(step=" in out


def test_a_loop_on_fsdp2_on_two_ranks_that_is_resumed(tmp_path: Path) -> None:
    # Its text is read from what is installed, which takes each process seconds: here it is the same for all four.
    (tmp_path / "documents.json").write_text(json.dumps(builtin_text._documents()))
    for steps in ("20", "41"):
        script = f"""
import json, os, runpy, sys
from ib_callback.probe import builtin_text
os.chdir(sys.argv[1])
documents = tuple(map(tuple, json.load(open("documents.json"))))
builtin_text._documents = lambda: documents
sys.argv = ["fsdp2_loop.py", "{steps}"]
runpy.run_path({str(EXAMPLES / "fsdp2_loop.py")!r}, run_name="__main__")
"""
        out, _ = on_two_ranks(script, tmp_path)
    trajectory = ib.Trajectory.load(tmp_path / "ib_example")
    assert trajectory.steps == [0, 20, 40, 41], "the second run went on from the checkpoint of step 20"
    assert trajectory.table() in out
    assert {point.settings["dtype"] for point in trajectory} == {"bfloat16"}, "the type of FSDP's policy"
    (best,) = re.findall(r"Selected\(step=(\d+)", out)
    kept = {int(path.name.removeprefix("step-")) for path in (tmp_path / "ib_example").glob("step-*")}
    assert kept == {int(best), 40}


@pytest.mark.parametrize("path", INTEGRATIONS, ids=lambda path: path.stem)
def test_a_script_for_a_trainer_is_short_and_right(path: Path, unknown_names: UnknownNames) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 30
    assert unknown_names(source) == []


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import ib_callback as ib\nib.Metre(1)", "ib.Metre does not exist"),
        ("import ib_callback as ib\nib.Meter(1, bins=3)", "ib.Meter takes no bins="),
        ("from ib_callback.hf import Callback", "ib_callback.hf has no Callback"),
        ('CONFIG = "{class_path: ib_callback.Probe.built_in}"', "ib_callback.Probe.built_in does not exist"),
        ('CONFIG = "{class_path: ib_callback.lightning.Callback_}"', "ib_callback.lightning.Callback_ does not exist"),
    ],
)
def test_what_does_not_exist_is_found(source: str, problem: str, unknown_names: UnknownNames) -> None:
    assert unknown_names(source) == [problem]


def test_every_script_for_a_trainer_is_run_by_ci_and_stands_in_the_table() -> None:
    clients = set(re.findall(r'"integrations/(\w+\.py)": \(', (ROOT / ".ci/clients.py").read_text(encoding="utf-8")))
    assert clients == {path.name for path in INTEGRATIONS}
    rows = [
        line for line in (ROOT / "docs/integrations.md").read_text(encoding="utf-8").splitlines() if line[:2] == "| "
    ]
    for name in clients:
        assert sum(f"`{name}`" in row for row in rows) == 1, f"{name} has one row in the table"


def test_pages_of_trainers_show_the_scripts_as_they_are() -> None:
    shown = [
        block for page in PAGES for block in re.findall(r"^```py\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    ]
    for path in INTEGRATIONS:
        assert path.read_text(encoding="utf-8") in shown, f"{path.name} is not shown, or was changed since"


def test_every_page_of_a_trainer_is_listed_and_its_links_lead_somewhere() -> None:
    index = ROOT / "docs/integrations.md"
    for page in (index, *PAGES):
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]
        assert page == index or f"integrations/{page.name}" in index.read_text(encoding="utf-8")
