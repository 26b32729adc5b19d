"""Two processes that train together with DistributedDataParallel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripted import BEST
from two_ranks import on_two_ranks

import ib_callback as ib

TWO_RANKS = """
import sys
import torch
from pathlib import Path
import ib_callback as ib
from tiny_hf import random_ids, tiny_callback, tiny_trainer
from ib_callback.common.errors import TrajectoryError

directory = Path(sys.argv[1])
rows = random_ids(6, seed=21)
pairs = ib.Probe.from_tokens(rows, labels={"preference": torch.tensor([1, 0] * 3)[:, None].expand_as(rows)})
features = {"feature_probes": [pairs], "check_overlap": 8}
callback = tiny_callback(every_n_steps=2, **features)
trainer = tiny_trainer(directory, [callback], steps=5, save_strategy="steps", save_steps=2)
trainer.train()
assert trainer.accelerator.num_processes == 2
rank = trainer.args.process_index
callback.trajectory.save(directory / f"seen_by_{rank}.jsonl")

resumed = tiny_callback(every_n_steps=2, **features)
trainer = tiny_trainer(directory, [resumed], steps=5)
trainer.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
assert resumed.trajectory.steps == [0, 2, 4, 5], resumed.trajectory.steps
resumed.trajectory.save(directory / f"resumed_by_{rank}.jsonl")

(directory / "file").touch()
trainer = tiny_trainer(directory, [tiny_callback(output_dir=directory / "file" / "below")])
try:
    trainer.train()
except TrajectoryError as error:
    print(f"rank {rank}: {error}")
"""

# Here the ranks disagree on all that one of them alone can know: what was measured, what failed, and the time.
DISAGREEING = """
import json
import warnings
from types import SimpleNamespace
import pytest
from scripted import COURSE, follow
from synthetic_runs import FIT_ONLY_C, STOPPING, E, run
from transformers import EarlyStoppingCallback
import ib_callback as ib
from ib_callback.run import run as run_module

patch = pytest.MonkeyPatch()
warnings.filterwarnings("ignore", message="Nothing could be measured")


def train(name, fails_on, *others, clock=None, select=None, early_stopping=None, budget=None, **arguments):
    follow(patch, COURSE if rank == 0 else run(FIT_ONLY_C, E, steps=range(31)))
    measure = ib.Meter.measure

    def measure_or_fail(meter, model, *, step):
        if rank == fails_on and step in (7, 22):
            raise RuntimeError("out of luck")
        return measure(meter, model, step=step)

    patch.setattr(ib.Meter, "measure", measure_or_fail)
    callback = tiny_callback(
        every_n_steps=1, orders="token", select=select, early_stopping=early_stopping, overhead_budget=budget
    )
    trainer = tiny_trainer(directory / name, [callback, *others], steps=30, ddp_timeout=60, **arguments)
    trainer.train()
    callback.trajectory.save(directory / f"{name}_{rank}.jsonl")
    selected, state = callback.selected, trainer.state
    found = {
        "step": state.global_step,
        "best": [state.best_global_step, state.best_metric, state.best_model_checkpoint],
        "selected": selected and [selected.step, selected.value, str(selected.path)],
        "decision": None if callback.decision is None else callback.decision.message,
        "phases": [row["ib/phase"] for row in state.log_history if "ib/phase" in row],
        "weights": sum(p.double().sum().item() for p in trainer.model.parameters()),
    }
    (directory / f"{name}_{rank}.json").write_text(json.dumps(found))


for fails_on in (0, 1):
    train(
        f"own rules, {fails_on} fails", fails_on, select="optimality",
        early_stopping=ib.PlateauStopping(**STOPPING), save_strategy="best", load_best_model_at_end=True,
    )
    train(
        f"stock rules, {fails_on} fails", fails_on, EarlyStoppingCallback(early_stopping_patience=3),
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="ib_selectable_optimality",
    )


class FailsAtTheStart(ib.Meter):
    def measure(self, model, *, step=None):
        if rank == 1:
            raise RuntimeError("out of luck")
        return super().measure(model, step=step)


patch.undo()
callback = tiny_callback()
callback._run.meter.__class__ = FailsAtTheStart
trainer = tiny_trainer(directory / "start", [callback], steps=3, ddp_timeout=60)
try:
    trainer.train()
except RuntimeError as error:
    print(f"rank {rank} at step {trainer.state.global_step}: {error}")

callback = tiny_callback()
callback._run.meter.probe = ib.Probe.from_tokens(random_ids(6, seed=rank))
try:
    tiny_trainer(directory / "probes", [callback], steps=3, ddp_timeout=60).train()
except ib.ProbeError as error:
    print(f"rank {rank}: {error}")


class Clock:
    now = 0.0

    def perf_counter(self):
        # One has no time to lose; for the other one all of it passes here.
        self.now += rank
        return self.now


patch.setattr(run_module, "time", Clock())
train("budget", None, budget=0.01)
# gloo's threads abort the interpreter's exit if they are still there.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """All that is trained here, at once: it takes longer to start the processes."""
    directory = tmp_path_factory.mktemp("ranks")
    return directory, on_two_ranks(TWO_RANKS + DISAGREEING, directory)


def numbers(point: ib.Measurement) -> dict[str, float]:
    """All that is measured, without how long it took."""
    return {name: value for name, value in point.metrics().items() if name not in ("ib/seconds", "ib/overhead")}


def test_two_ranks_measure_the_same_and_one_writes(trained: tuple[Path, list[str]]) -> None:
    directory, output = trained
    for run in ("seen", "resumed"):
        first, second = (ib.Trajectory.load(directory / f"{run}_by_{rank}.jsonl") for rank in range(2))
        assert first.steps == second.steps == [0, 2, 4, 5]
        assert list(map(numbers, first)) == list(map(numbers, second))
        assert all(list(point.features) == ["preference"] for point in first)
    assert ib.Trajectory.load(directory) == ib.Trajectory.load(directory / "resumed_by_0.jsonl")
    for rank, text in enumerate(output):
        assert f"rank {rank}: " in text
        assert "cannot write to the output directory" in text
        # Each run looks at the training data once, for each of two probes.
        assert text.count("shares no run of 13 tokens with 8 examples") == (4 if rank == 0 else 0)


def test_a_failure_of_one_rank_at_the_start_is_raised_on_both(trained: tuple[Path, list[str]]) -> None:
    _, (first, second) = trained
    assert (
        "rank 0 at step 0: rank 1 could not measure the model as training finds it: RuntimeError: out of luck" in first
    )
    assert "rank 1 at step 0: out of luck" in second


def test_ranks_with_different_probes_are_refused_on_both(trained: tuple[Path, list[str]]) -> None:
    for rank, text in enumerate(trained[1]):
        assert f"rank {rank}: expected the same probes on every rank, got others on rank 1 than on rank 0." in text


def found(directory: Path, name: str) -> tuple[dict[str, Any], ib.Trajectory]:
    """What came out of a run, which must be the same on both ranks."""
    first, second = (json.loads((directory / f"{name}_{rank}.json").read_text()) for rank in range(2))
    assert first == second
    mine, other = (ib.Trajectory.load(directory / f"{name}_{rank}.jsonl") for rank in range(2))
    assert mine == other == ib.Trajectory.load(directory / name)
    return first, mine


# One of the three points without improvement is missing if it failed where it counts, on rank 0.
@pytest.mark.parametrize(("fails_on", "missing", "last"), [(0, [7, 22], 24), (1, [], 23)])
def test_ranks_that_disagree_stop_and_select_alike(
    fails_on: int, missing: list[int], last: int, trained: tuple[Path, list[str]]
) -> None:
    directory, _ = trained
    name = f"own rules, {fails_on} fails"
    run, trajectory = found(directory, name)
    assert trajectory.steps == list(range(last + 1))
    assert [point.step for point in trajectory if point.error is not None] == missing
    assert run["step"] == last
    assert run["decision"].endswith("no improvement on 0.06 at step 20 for 3 measurements: a plateau")
    best = str(directory / name / "checkpoint-20")
    assert run["best"] == run["selected"] == [20, BEST.optimality, best]
    assert set(run["phases"]) == {0.0, 1.0, 2.0}


@pytest.mark.parametrize("fails_on", [0, 1])
def test_ranks_that_disagree_are_judged_alike_by_the_trainer(fails_on: int, trained: tuple[Path, list[str]]) -> None:
    directory, _ = trained
    name = f"stock rules, {fails_on} fails"
    run, trajectory = found(directory, name)
    # For the Trainer's own callback a value that is missing is no improvement.
    assert run["step"] == 23
    assert run["best"] == [20, BEST.optimality, str(directory / name / "checkpoint-20")]
    assert [point.step for point in trajectory if point.error is not None] == ([7, 22] if fails_on == 0 else [])


def test_ranks_whose_clocks_disagree_skip_the_same_points(trained: tuple[Path, list[str]]) -> None:
    _, trajectory = found(trained[0], "budget")
    assert trajectory.steps == list(range(31))
