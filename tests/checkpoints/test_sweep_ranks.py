"""Processes of a launcher share the measurements of `ib-callback measure`; the first one writes and speaks."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_hf import tiny_model, tiny_probe
from two_ranks import on_two_ranks

from ib_callback import Results
from ib_callback.cli.main import main

SCRIPT = """
import sys
from pathlib import Path
from ib_callback.cli.main import main
from ib_callback.checkpoints import sweep

directory, rank = Path(sys.argv[1]), int(sys.argv[2])
loaded = sweep.loaded


def unlucky(folder, *args, **kwargs):
    if rank == 1 and folder.name == "c":
        raise OSError("out of luck")
    return loaded(folder, *args, **kwargs)


sweep.loaded = unlucky
models = [str(directory / name) for name in "abc"]
options = ["--probe", str(directory / "probe.safetensors"), "--num-bins", "12", "--batch-size", "2"]
print("ended with", main(["measure", *models, "-o", str(directory / "shared.jsonl"), *options]))


def full(*_):
    raise OSError("no space left")


sweep.append_result = full
print("unwritten:", main(["measure", models[0], "-o", str(directory / "unwritten.jsonl"), *options]))
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for seed, name in enumerate("abc"):
        tiny_model(seed).save_pretrained(tmp_path / name)
    tiny_probe().save(tmp_path / "probe.safetensors")
    return tmp_path


def test_two_processes_write_what_one_writes(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, second = on_two_ranks(SCRIPT, directory)
    options = ["--probe", str(directory / "probe.safetensors"), "--num-bins", "12", "--batch-size", "2"]
    assert (
        main(["measure", *(str(directory / name) for name in "ab"), "-o", str(directory / "one.jsonl"), *options]) == 0
    )
    shared, one = (Results.load(directory / f"{name}.jsonl") for name in ("shared", "one"))
    for model in ("a", "b"):
        ours, theirs = (results[model][0].metrics() for results in (shared, one))
        assert ours | {"ib/seconds": 0} == pytest.approx(theirs | {"ib/seconds": 0}, abs=1e-9)
    assert shared["c"][0].error == "OSError: rank 1: out of luck"
    assert [line for line in first.splitlines() if line.startswith("ended")] == ["ended with 1"]
    assert "[3/3] c: not measured: OSError: rank 1: out of luck" in first
    assert "[1/3]" not in second and "ended with 1" in second
    assert all("unwritten: 2" in output and "no space left" in output for output in (first, second))
