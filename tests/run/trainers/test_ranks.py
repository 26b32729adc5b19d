"""Two processes that train together: the same points and decisions on both, and files of one.

Starting the processes takes longer than training in them, so all that a trainer does there it does at once; what only
one of them does comes last.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from loops import checkpoints
from scripted import BEST
from tiny_hf import measured, numbers, tiny_model
from tiny_models import llama
from two_ranks import on_two_ranks

import ib_callback as ib
from ib_callback.results.trajectory import FILENAME

# `loop`, `directory` and `rank` are set before it.
EVERY_LOOP = """
import json
import time
import warnings
import pytest
import torch
from loops import checkpoints, remove_checkpoint
from scripted import COURSE, follow
from synthetic_runs import FIT_ONLY_C, STOPPING, E, run
from tiny_hf import pairs, random_ids, same_weights
import ib_callback as ib
from ib_callback.measuring.model import capture
from ib_callback.run import run as run_module

warnings.filterwarnings("ignore", message="Nothing could be measured")
patch = pytest.MonkeyPatch()
own = {"feature_probes": [pairs()], "check_overlap": 8, "every_n_steps": 2}



def unlucky(callback):
    # At the second measurement, on rank 1, amid the forward.
    take = capture.Capture._take

    def fails(*args):
        if rank == 1 and len(callback.trajectory) == 1:
            raise RuntimeError("out of luck")
        take(*args)

    patch.setattr(capture.Capture, "_take", fails)
    return callback


followed = loop.train(directory, steps=5, save_every=2, **own)
followed.followed.trajectory.save(directory / f"seen_by_{rank}.jsonl")
assert same_weights(followed.weights, loop.train(directory / "without", steps=5, follows=False).weights)
if rank == 0:
    for step in (4, 5):
        remove_checkpoint(directory, step)
while list(checkpoints(directory)) != [2]:
    time.sleep(0.01)
resumed = loop.train(directory, steps=5, resume=True, **own)
resumed.followed.trajectory.save(directory / f"resumed_by_{rank}.jsonl")


def fails(error, name, **keywords):
    at = []
    try:
        loop.train(directory / name, steps=3, on_step=lambda model, step: at.append(step), **keywords)
    except error as raised:
        print(f"rank {rank}, {name}: {raised}")
    assert at == []


fails(ib.TrajectoryError, "unwritable", output_dir=directory / "file" / "below")
fails(ib.ProbeError, "probes", probe=ib.Probe.from_tokens(random_ids(6, seed=rank)))

# Here the ranks disagree on all that one of them alone can know: what was measured, what failed, and the time.


def disagree(name, fails_on, at=(), **keywords):
    follow(patch, COURSE if rank == 0 else run(FIT_ONLY_C, E, steps=range(31)))
    measure = ib.Meter.measure

    def measure_or_fail(meter, model, *, step):
        if rank == fails_on and step in at:
            raise RuntimeError("out of luck")
        return measure(meter, model, step=step)

    patch.setattr(ib.Meter, "measure", measure_or_fail)
    keywords = {"every_n_steps": 1, "orders": "token", **keywords}
    outcome = loop.train(directory / name, steps=30, **keywords)
    followed = outcome.followed
    followed.trajectory.save(directory / f"{name}_{rank}.jsonl")
    selected = followed.selected
    ending = {
        "step": outcome.step,
        "selected": None if selected is None else [selected.step, selected.value, str(selected.path)],
        "decision": None if followed.decision is None else followed.decision.message,
        "weights": sum(p.double().sum().item() for p in outcome.weights.values()),
    }
    (directory / f"{name}_{rank}.json").write_text(json.dumps(ending))


def rules():
    return {"select": "optimality", "early_stopping": ib.PlateauStopping(**STOPPING), "save_every": 1, "limited": True}


for fails_on in (0, 1):
    disagree(f"rules, {fails_on} fails", fails_on, at=(7, 22), **rules())

follow(patch)
if rank == 1:
    patch.setattr(ib.Meter, "measure", lambda *args, **kwargs: 1 / 0)
fails((RuntimeError, ZeroDivisionError), "start", orders="token")


class Clock:
    now = 0.0

    def perf_counter(self):
        # One has no time to lose; for the other one all of it passes here.
        self.now += rank
        return self.now


patch.setattr(run_module, "time", Clock())
disagree("budget", None, overhead_budget=0.01)
patch.undo()
"""

HF_ALONE = """
from tiny_hf import tiny_callback, tiny_trainer
from transformers import EarlyStoppingCallback

# Judged by the Trainer, and saved where a point is the best so far.
stock = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
         "metric_for_best_model": "ib_selectable_optimality"}
for fails_on in (0, 1):
    for name, others, arguments in (
        ("stock rules", [EarlyStoppingCallback(early_stopping_patience=3)], stock),
        ("saves best", [], {"save_strategy": "best"}),
    ):
        name = f"{name}, {fails_on} fails"
        follow(patch, COURSE if rank == 0 else run(FIT_ONLY_C, E, steps=range(31)))
        measure = ib.Meter.measure

        def measure_or_fail(meter, model, *, step):
            if rank == fails_on and step in (7, 22):
                raise RuntimeError("out of luck")
            return measure(meter, model, step=step)

        patch.setattr(ib.Meter, "measure", measure_or_fail)
        select = None if others else "optimality"
        rule = None if others else ib.PlateauStopping(**STOPPING)
        callback = tiny_callback(every_n_steps=1, orders="token", select=select, early_stopping=rule)
        trainer = tiny_trainer(
            directory / name, [callback, *others], steps=30, ddp_timeout=60, load_best_model_at_end=True, **arguments
        )
        trainer.train()
        state = trainer.state
        callback.trajectory.save(directory / f"{name}_{rank}.jsonl")
        found = {
            "step": state.global_step,
            "best": [state.best_global_step, state.best_metric, state.best_model_checkpoint],
            "phases": [row["ib/phase"] for row in state.log_history if "ib/phase" in row],
            "weights": sum(p.double().sum().item() for p in trainer.model.parameters()),
        }
        (directory / f"{name}_{rank}.json").write_text(json.dumps(found))
patch.undo()

# Sharded when it is loaded, which is the only way to FSDP2 that the Trainer has on a CPU.
import torch.distributed as dist
from tiny_models import llama
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

if rank == 0:
    llama(vocab_size=60).save_pretrained(directory / "whole")
dist.barrier()


def sharded(callbacks):
    config = DistributedConfig(fsdp_size=2)
    model = AutoModelForCausalLM.from_pretrained(directory / "whole", distributed_config=config)
    trainer = tiny_trainer(directory / "sharded", callbacks, steps=4, model=model)
    trainer.train()
    for callback in callbacks:
        callback.trajectory.save(directory / f"sharded_{rank}.jsonl")
    parameters = list(trainer.model.parameters())
    assert all(isinstance(p, DTensor) for p in parameters)
    shards = [p.to_local().clone() for p in parameters]
    assert 2 * sum(p.numel() for p in shards) == sum(p.numel() for p in parameters)
    return shards


without = sharded([])
assert all(map(torch.equal, sharded([tiny_callback(every_n_steps=2)]), without))
(directory / f"sharded_{rank}.jsonl").rename(directory / f"sharded_fine_{rank}.jsonl")
assert all(map(torch.equal, sharded([unlucky(tiny_callback(every_n_steps=2))]), without))
patch.undo()
"""

LIGHTNING_ALONE = """
from datetime import timedelta
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny_lightning import tiny_callback, tiny_module, tiny_trainer, two_devices


class Sharded(type(tiny_module())):
    def __init__(self, whole):
        super().__init__()
        self.whole = whole

    def configure_model(self):
        for block in self.net.transformer.h:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self if self.whole else self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        # Whatever is sharded last has to be called as a whole.
        return self(batch) if self.whole else self.net(input_ids=batch, labels=batch).loss

    def forward(self, batch):
        return self.net(input_ids=batch, labels=batch).loss


def fit(name, module, callbacks, **arguments):
    trainer = tiny_trainer(directory / name, callbacks, steps=5, **{**two_devices(), **arguments})
    trainer.fit(module)
    for callback in callbacks:
        callback.trajectory.save(directory / f"{name}_{rank}.jsonl")
        point = callback.trajectory[-1].metrics()
        assert {k: trainer.callback_metrics[k].item() for k in point} == point
    return [p.to_local().clone() if hasattr(p, "to_local") else p.clone() for p in module.parameters()]


fit("logged", tiny_module(), [tiny_callback(every_n_steps=2)], logger=CSVLogger(directory, name="log"))


def fit_sharded(name, whole, callbacks):
    # Its defaults are a data-parallel size of 1 on one machine, which shards nothing.
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo", timeout=timedelta(seconds=60)
    )
    module = Sharded(whole)
    shards = fit(name, module, callbacks, strategy=strategy)
    parameters = list(module.parameters())
    assert all(isinstance(p, DTensor) for p in parameters), name
    assert 2 * sum(p.numel() for p in shards) == sum(p.numel() for p in parameters), name
    return shards


for whole in (False, True):
    name = f"sharded_{whole}"
    with_it = fit_sharded(name, whole, [tiny_callback(every_n_steps=2)])
    without = fit_sharded(name, whole, [])
    assert all(map(torch.equal, with_it, without)), name
assert all(map(torch.equal, fit_sharded("unlucky", True, [unlucky(tiny_callback(every_n_steps=2))]), without))
patch.undo()
"""

BEGIN = """
import sys
from pathlib import Path
import loops
import torch

directory, rank = Path(sys.argv[1]), int(sys.argv[2])
loop = next(loop for loop in loops.LOOPS if loop.name == {name!r})
if loop.name == "plain":
    torch.distributed.init_process_group("gloo")
"""

END = """
# gloo's threads abort the interpreter's exit if they are still there.
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""

ALONE = {"hf": HF_ALONE, "lightning": LIGHTNING_ALONE, "plain": ""}


class Trained:
    """What the two processes left in a directory, and printed."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory = name, directory
        (directory / "file").touch()
        self.output = on_two_ranks(BEGIN.format(name=name) + EVERY_LOOP + ALONE[name] + END, directory)

    def seen(self, run: str) -> ib.Trajectory:
        """The trajectory of both, which may differ only in the time that it took."""
        first, second = (ib.Trajectory.load(self.directory / f"{run}_{rank}.jsonl") for rank in range(2))
        assert list(map(numbers, first)) == list(map(numbers, second))
        assert [point.error for point in first] == [point.error for point in second]
        assert first.steps == second.steps
        return first

    def ending(self, run: str) -> tuple[dict[str, Any], ib.Trajectory]:
        """What came of a run along `COURSE`, which must be the same on both ranks and in the file."""
        first, second = (json.loads((self.directory / f"{run}_{rank}.json").read_text()) for rank in range(2))
        assert first == second
        trajectory = self.seen(run)
        assert ib.Trajectory.load(self.directory / run) == trajectory
        return first, trajectory


@pytest.fixture(scope="module")
def trained_by(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Trained] = {}

    def trained(name: str) -> Trained:
        if name not in made:
            made[name] = Trained(name, tmp_path_factory.mktemp(f"ranks_{name}"))
        return made[name]

    return trained


@pytest.fixture(params=list(ALONE))
def trained(request: pytest.FixtureRequest, trained_by: Any) -> Trained:
    return trained_by(request.param)


def test_two_ranks_measure_the_same_and_one_writes(trained: Trained) -> None:
    for run in ("seen_by", "resumed_by"):
        points = trained.seen(run)
        assert points.steps == [0, 2, 4, 5]
        assert all(point.error is None for point in points)
        assert all(list(point.features) == ["preference"] for point in points)
    written = ib.Trajectory.load(trained.directory)
    assert written == ib.Trajectory.load(trained.directory / "resumed_by_0.jsonl")
    old = ib.Trajectory.load(trained.directory / "ib_trajectory.1.jsonl")
    assert old == ib.Trajectory.load(trained.directory / "seen_by_0.jsonl")
    assert len(list(trained.directory.glob("ib_trajectory*"))) == 2
    assert not (trained.directory / "without" / FILENAME).exists()
    if trained.name != "plain":
        # Each run looks at the training data once, for each of two probes, on the rank that writes.
        looks = [text.count("shares no run of 13 tokens with 8 examples") for text in trained.output]
        assert looks == [4, 0]


def test_a_failure_of_one_rank_at_the_start_is_raised_on_both(trained: Trained) -> None:
    first, second = trained.output
    assert "rank 0, start: rank 1 could not measure the model as training finds it: ZeroDivisionError: div" in first
    assert "rank 1, start: division by zero" in second


def test_what_only_rank_zero_can_find_out_is_raised_on_both(trained: Trained) -> None:
    for rank, text in enumerate(trained.output):
        line = next(line for line in text.splitlines() if line.startswith(f"rank {rank}, unwritable: "))
        assert "cannot write to the output directory" in line


def test_ranks_with_different_probes_are_refused_on_both(trained: Trained) -> None:
    for rank, text in enumerate(trained.output):
        assert f"rank {rank}, probes: expected the same probes on every rank, got different ones on rank 1 and" in text


# One of the three points without improvement is missing if it failed where it counts, on rank 0.
@pytest.mark.parametrize(("fails_on", "missing", "last"), [(0, [7, 22], 24), (1, [], 23)])
def test_ranks_that_disagree_stop_and_select_alike(
    fails_on: int, missing: list[int], last: int, trained: Trained
) -> None:
    name = f"rules, {fails_on} fails"
    run, trajectory = trained.ending(name)
    assert trajectory.steps == list(range(last + 1))
    assert [point.step for point in trajectory if point.error is not None] == missing
    assert run["step"] == last
    assert run["decision"].endswith("0.06 (step 20) for 3 measurements, so the run has reached a plateau")
    left = checkpoints(trained.directory / name)
    assert run["selected"] == [20, BEST.optimality, str(left[20])]
    assert set(left) == {20, last}


def test_ranks_whose_clocks_disagree_skip_the_same_points(trained: Trained) -> None:
    _, trajectory = trained.ending("budget")
    assert trajectory.steps == list(range(31))


# --- what only one of them does


@pytest.mark.parametrize(("fails_on", "missing"), [(0, [7, 22]), (1, [])])
def test_hf_ranks_that_disagree_are_judged_alike_by_the_trainer(
    fails_on: int, missing: list[int], trained_by: Any
) -> None:
    trained = trained_by("hf")
    # For the Trainer's own callback a value that is missing is no improvement.
    for name, last in (("stock rules", 23), ("saves best", 24 if missing else 23)):
        run, trajectory = trained.ending(f"{name}, {fails_on} fails")
        assert run["step"] == last
        path = trained.directory / f"{name}, {fails_on} fails" / "checkpoint-20"
        assert run["best"] == [20, BEST.optimality, str(path)]
        assert [point.step for point in trajectory if point.error is not None] == missing
        assert set(run["phases"]) == {0.0, 1.0, 2.0}


def test_hf_sharded(trained_by: Any) -> None:
    points = trained_by("hf").seen("sharded_fine")
    assert points.steps == [0, 2, 4]
    assert all(point.error is None for point in points)
    assert numbers(points[0]) == pytest.approx(measured(llama(vocab_size=60), 0), abs=1e-9)


@pytest.mark.parametrize(
    ("name", "run", "fine"), [("hf", "sharded", "sharded_fine"), ("lightning", "unlucky", "sharded_True")]
)
def test_sharded_ranks_survive_what_fails_amid_a_forward_on_one(
    name: str, run: str, fine: str, trained_by: Any
) -> None:
    found, expected = (trained_by(name).seen(each) for each in (run, fine))
    assert [point.error for point in found].count("RuntimeError: rank 1: out of luck") == 1
    assert found[1].error is not None
    for number in (0, *range(2, len(expected))):
        assert numbers(found[number]) == numbers(expected[number])


def test_lightning_sharded_and_with_a_directory_of_its_logger(trained_by: Any) -> None:
    """Both ranks use the directory of rank 0's logger, whose version the other one does not know."""
    trained = trained_by("lightning")
    for run in ("logged", "sharded_False", "sharded_True"):
        points = trained.seen(run)
        assert points.steps == [0, 2, 4, 5], run
        assert all(point.error is None for point in points), run
        assert numbers(points[0]) == pytest.approx(measured(tiny_model(), 0), abs=1e-6), run
    logged = ib.Trajectory.load(trained.directory / "log" / "version_0")
    assert logged == ib.Trajectory.load(trained.directory / "logged_0.jsonl")
    assert [path.parent.name for path in trained.directory.glob(f"log/*/{FILENAME}")] == ["version_0"]
