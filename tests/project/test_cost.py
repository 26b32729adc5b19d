"""benchmarks/cost.py: rounds are kept and continued, a file is printed and drawn again, what is counted is right."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The command, without what it changes in the process."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("cost")
    monkeypatch.setattr(module, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    return module


@pytest.fixture
def run(cost: ModuleType, tmp_path: Path) -> Run:
    """The part sides of a tiny model; what its file holds."""

    def run_part(*arguments: str) -> dict[str, Any]:
        file = tmp_path / "cost.json"
        small = ("--model", "llama-tiny", "--sequences", "2", "--length", "48", "--batch-size", "1")
        assert cost.main([*small, "--parts", "sides", "--json", str(file), *arguments]) == 0
        (group,) = json.loads(file.read_text(encoding="utf-8"))["parts"]["sides"].values()
        return group["sides"]

    return run_part


def test_rounds_go_on_where_they_stopped(run: Run) -> None:
    once = run("--only", "loss=False", "--rounds", "1")
    assert once.keys() == {"forward of the trunk", "forward with logits", "loss=False"}
    twice = run("--only", "loss=False|default", "--rounds", "2")
    assert twice.keys() == once.keys() | {"default"}
    for name, record in twice.items():
        assert len(record["wall"]) == len(record["cpu"]) == 2
        for beside in record["against"].values():
            assert len(beside["wall"]) == len(beside["cpu"]) == 2
        if name in once:
            assert record["cpu"][:1] == once[name]["cpu"]
    anew = run("--only", "loss=False", "--rounds", "2")  # it was complete, and is asked for
    assert not set(anew["loss=False"]["wall"]) & set(twice["loss=False"]["wall"])
    assert anew["default"] == twice["default"]


def test_a_file_is_printed_and_drawn_without_running(
    run: Run, cost: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--rounds", "1", "--only", "^default$")
    cost.main(["--parts", "mmlu,share", "--json", str(tmp_path / "cost.json")])
    capsys.readouterr()
    monkeypatch.setattr(cost, "load", None)
    picture = tmp_path / "cost.png"
    assert cost.main(["--from", str(tmp_path / "cost.json"), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "1.20 x the forward of the trunk, at 128 x 512" in printed
    assert "NOT measured" in printed
    assert printed.count("default, llama-tiny, float32, 2 x 48, on cpu") == 2, "the ratio of both tables is this run's"
    assert picture.stat().st_size > 10_000


def test_a_part_that_fails_is_said_and_the_others_run(
    cost: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cost.json"
    assert cost.main(["--parts", "theirs,mmlu", "--json", str(file)]) == 1
    printed = capsys.readouterr().out
    assert "theirs failed: theirs needs --text" in printed
    assert "Not complete: theirs" in printed
    assert "mmlu" in json.loads(file.read_text(encoding="utf-8"))["parts"]


def test_what_is_counted(cost: ModuleType) -> None:
    rows = {(row["model"], row["gpus"]): row for row in cost.counts.share_rows(1.05)}
    # By hand. 64 batches of 4,096 tokens on 8 GPUs are 8 each; 6.7e9 parameters, 4e6 tokens a step.
    seven = rows["7B", 8]
    assert seven["rounds"] == 8
    assert seven["step"] == pytest.approx(6 * 6.7e9 * 4e6 / (8 * 0.4 * 989e12))
    assert seven["compute"] == pytest.approx(1.05 * 2 * 6.7e9 * 4096 / (0.3 * 989e12))
    sent = 4096 * 32 * 100 * 4 * 7 / 8 / 450e9
    assert seven["measurement"] == pytest.approx(8 * (seven["compute"] + sent))
    assert seven["share"] == pytest.approx(seven["measurement"] / (500 * seven["step"] + seven["measurement"]))
    assert seven["fits"]
    assert not rows["70B", 8]["fits"], "1.1 TB into 640 GB"
    # With 64 GPUs each has one batch, and with 1,024 most have none: it takes no less time.
    assert rows["7B", 64]["rounds"] == rows["7B", 1024]["rounds"] == 1
    # To gather 138 GB at 50 GB/s takes longer than to compute.
    assert rows["70B", 1024]["measurement"] == pytest.approx(2.76, rel=0.01)
    assert rows["1B", 1024]["gather"] == 0.0, "a copy on each"
    five = cost.counts.mmlu_rows(1.2, 1.0)[0]
    assert five["tokens"] == pytest.approx(14_042 * 3212.2 / 4)
    assert five["by_count"] == pytest.approx(262_144 / five["tokens"])
    assert five["by_time"] == pytest.approx(1.2 * five["by_count"])
