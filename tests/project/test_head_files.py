"""Files that an older version left behind: they load, runs go on from them, and the same is measured as then.

The files, and the script that wrote them, are in `fixtures/head`. Here numbers are compared within a tolerance, for
another processor rounds in another way; `fixtures/head/make.py --check FOLDER` compares the bits. Further entries,
which a later version writes in addition, are no difference.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

import ib_callback as ib

HEAD = Path(__file__).parent / "fixtures" / "head"
TRAJECTORIES = sorted(path for path in HEAD.glob("*/*.jsonl") if path.name != "ib_checkpoints.jsonl")
CLOSE = {"relative": 1e-5, "absolute": 1e-6}
# One rounding to bfloat16 is a share of 1/256, and how many there are is up to the matrix product.
ROUGHLY = {"relative": 1e-2, "absolute": 1e-3}


def script() -> Any:
    """The script that wrote the files, as a module."""
    spec = importlib.util.spec_from_file_location("head_files", HEAD / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


make = script()
PROBES = make.load_probes(HEAD)
MEASUREMENTS = make.read_json(HEAD / "measurements.json")
MEASURE = make.measurements(PROBES)


# --- files ---


def test_every_kind_of_file_is_there() -> None:
    """Else a comparison of nothing with nothing would pass."""
    assert set(PROBES) == {"padded", "labelled", "texts"}
    assert [path.relative_to(HEAD).as_posix() for path in TRAJECTORIES] == [
        f"{run}/{name}.jsonl" for run in ("hf_run", "lightning_run") for name in ("ib_trajectory", "uninterrupted")
    ]
    assert set(MEASUREMENTS) == set(MEASURE)


def test_probes_load_as_they_were() -> None:
    recorded = make.read_json(HEAD / "probes.json")
    assert make.differences(recorded, {name: make.describe(probe) for name, probe in PROBES.items()}) == []


@pytest.mark.parametrize("name", sorted(PROBES))
def test_the_same_probe_is_made_today(name: str) -> None:
    old, new = PROBES[name], make.make_probes()[name]
    assert new.fingerprint == old.fingerprint
    assert torch.equal(new.input_ids, old.input_ids)
    assert torch.equal(new.attention_mask, old.attention_mask)
    assert list(new.labels) == list(old.labels)
    assert all(torch.equal(new.labels[label], old.labels[label]) for label in old.labels)
    assert make.describe(new) == make.describe(old)


@pytest.mark.parametrize("path", TRAJECTORIES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_trajectories_load_and_are_written_as_they_were(path: Path, tmp_path: Path) -> None:
    trajectory = ib.Trajectory.load(path)
    recorded = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert trajectory.steps == ([0, 2, 4, 6, 8] if path.stem == "uninterrupted" else [0, 2, 4, 6])
    assert make.differences(recorded, [point.to_dict() for point in trajectory]) == []
    trajectory.save(tmp_path / "again.jsonl")
    assert ib.Trajectory.load(tmp_path / "again.jsonl") == trajectory


def test_the_curve_loads_as_it_was() -> None:
    recorded = make.read_json(HEAD / "ib_curve.json")
    curve = ib.IBCurve.load(HEAD / "ib_curve.json")
    assert curve.unit == "nats"
    assert curve.complexity.tolist() == recorded["complexity"]
    assert curve.expressivity.tolist() == recorded["expressivity"]
    assert curve.betas.tolist() == recorded["betas"]
    assert curve.mutual_information == recorded["mutual_information"]
    assert curve.num_codewords == recorded["num_codewords"]
    assert curve.info["probe"] == PROBES["padded"].fingerprint


# --- numbers ---


@pytest.mark.parametrize("name", sorted(MEASUREMENTS))
def test_the_same_is_measured(name: str) -> None:
    close = ROUGHLY if name == "bfloat16" else CLOSE
    assert make.differences(MEASUREMENTS[name], MEASURE[name](), **close) == []


def test_the_pure_functions_return_the_same() -> None:
    assert make.differences(make.read_json(HEAD / "functions.json"), make.functions(PROBES), **CLOSE) == []


def test_the_same_curve_is_computed() -> None:
    """Its corners may be others on another processor, as long as they lie on about the same curve."""
    old = ib.IBCurve.load(HEAD / "ib_curve.json")
    new = ib.probe_curve(PROBES["padded"], num_codewords=30)
    assert new.info == old.info
    assert new.num_codewords == old.num_codewords
    assert new.mutual_information == pytest.approx(old.mutual_information, rel=1e-9)
    assert np.allclose(new.bound(make.GRID), old.bound(make.GRID), rtol=0, atol=1e-3)


def test_a_checkpoint_of_the_run_is_measured_as_it_was_during_the_run() -> None:
    model = GPT2LMHeadModel.from_pretrained(HEAD / "hf_run" / "checkpoint-4")
    meter = ib.Meter(PROBES["padded"], feature_probes=[PROBES["labelled"]], num_bins=12, batch_size=3)
    # As the line has it: what later versions measure besides is not in it.
    recorded = json.loads((HEAD / "hf_run" / "ib_trajectory.jsonl").read_text().splitlines()[2])
    assert recorded["step"] == 4
    now = make.plain(meter.measure(model, step=4))
    assert make.differences(make.without_passing(recorded), now, **CLOSE) == []


# --- runs ---


@pytest.mark.parametrize("name", ["hf_run", "lightning_run"])
def test_a_run_goes_on_from_an_old_checkpoint(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "elsewhere"
    recorded = make.uninterrupted(HEAD, name)
    resumed = make.resume(HEAD, name, directory)
    points, now = make.without_passing(recorded.trajectory), make.without_passing(resumed.trajectory)
    assert [point["step"] for point in now] == [0, 2, 4, 6, 8]
    assert make.differences(points, now, **CLOSE) == []
    # How far the weights differ on another processor is seen in the points.
    recorded.ending.pop("weights")
    assert make.differences(recorded.ending, resumed.ending, **CLOSE) == []
    assert recorded.ending["decision"]["stop"] is False

    # The points up to the checkpoint are the old ones, to the byte; the abandoned end is kept beside them.
    old = (HEAD / name / "ib_trajectory.jsonl").read_bytes()
    new = (directory / "ib_trajectory.jsonl").read_bytes()
    assert new.splitlines()[:3] == old.splitlines()[:3]
    assert (directory / "ib_trajectory.1.jsonl").read_bytes() == old


# --- the comparison itself ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["gpt2"]["orders"]["token"].update(complexity=0.5), "/gpt2/orders/token/complexity: "),
        (lambda m: m["gpt2"]["orders"]["token"]["complexity_by_layer"].pop(), "/token/complexity_by_layer: "),
        (lambda m: m["uniform"].update(ceiling=0.0), "/uniform/ceiling: "),
        (lambda m: m["llama"]["settings"].update(K=4.0), "/llama/settings/K: "),
        (lambda m: m["llama"].pop("entropy"), "/llama/entropy: missing"),
    ],
    ids=["a number", "a layer", "nothing", "another type", "missing"],
)
def test_a_change_is_a_difference(change: Any, said: str) -> None:
    changed = copy.deepcopy(MEASUREMENTS)
    change(changed)
    (difference,) = make.differences(MEASUREMENTS, changed, **CLOSE)
    assert said in difference


def test_a_last_bit_is_a_difference_and_a_further_entry_is_none() -> None:
    changed = copy.deepcopy(MEASUREMENTS)
    changed["gpt2"]["a number of a later version"] = 1.0
    assert make.differences(MEASUREMENTS, changed) == []
    changed["gpt2"]["entropy"] = float(np.nextafter(changed["gpt2"]["entropy"], 1.0))
    assert len(make.differences(MEASUREMENTS, changed)) == 1
    assert make.differences(MEASUREMENTS, changed, **CLOSE) == []
