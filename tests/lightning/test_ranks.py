"""Two processes that train together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripted import BEST
from synthetic_runs import STOPPING
from tiny_lightning import measured, numbers, tiny_module
from two_ranks import on_two_ranks

import ib_callback as ib
from ib_callback.results.trajectory import FILENAME

TWO_RANKS = """
import json
import sys
from datetime import timedelta
from pathlib import Path
import pytest
import torch
from torch.distributed.fsdp import fully_shard
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from scripted import follow
from synthetic_runs import STOPPING
from tiny_lightning import tiny_callback, tiny_module, tiny_trainer
import ib_callback as ib
from ib_callback.common.errors import TrajectoryError

directory, rank = Path(sys.argv[1]), int(sys.argv[2])
gloo = {"process_group_backend": "gloo", "timeout": timedelta(seconds=60)}


def train(name, callbacks, ckpt_path=None, module=None, steps=5, **arguments):
    settings = {"strategy": DDPStrategy(**gloo), "logger": CSVLogger(directory, name="log"), **arguments}
    trainer = tiny_trainer(directory, callbacks, steps=steps, devices=2, **settings)
    module = tiny_module() if module is None else module
    trainer.fit(module, ckpt_path=ckpt_path)
    assert trainer.world_size == 2
    assert trainer.global_rank == rank
    if callbacks:
        callbacks[0].trajectory.save(directory / f"{name}_{rank}.jsonl")
        point = callbacks[0].trajectory[-1].metrics()
        metrics = {k: trainer.callback_metrics[k].item() for k in point}
        assert metrics == point, metrics
    return module


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


best = ModelCheckpoint(directory / "saved", monitor="ib/optimality", mode="max", every_n_train_steps=2, save_top_k=-1,
                       filename="{step}")
trained = train("ddp", [tiny_callback(every_n_steps=2), best], enable_checkpointing=True)
assert same(trained, train("without", []))
train("resumed", [tiny_callback(every_n_steps=2)], ckpt_path=directory / "saved" / "step=2.ckpt")

try:
    train("unwritable", [tiny_callback(output_dir=directory / "file" / "below")])
except TrajectoryError as error:
    print(f"rank {rank}: {error}")


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


with pytest.MonkeyPatch.context() as patch:
    follow(patch)
    measure = ib.Meter.measure

    def fails_on_one_rank(meter, model, *, step=None):
        if step == 12 + rank:
            raise RuntimeError(f"rank {rank} had no luck")
        return measure(meter, model, step=step)

    patch.setattr(ib.Meter, "measure", fails_on_one_rank)
    rules = {"early_stopping": ib.PlateauStopping(**STOPPING), "select": "optimality"}
    callback = tiny_callback(every_n_steps=1, orders="token", output_dir=directory / "stopped", **rules)
    latest = ModelCheckpoint(directory / "stopped", every_n_train_steps=2, filename="{step}")
    module = train("stopped", [callback, latest], steps=30, enable_checkpointing=True)
    selected = callback.selected
    ending = [len(module.losses), callback.decision.message, selected.step, selected.value, str(selected.path)]
    (directory / f"ending_{rank}.json").write_text(json.dumps(ending))


for whole in (False, True):
    kept = []
    for callbacks in ([tiny_callback(every_n_steps=2)], []):
        module = train(f"sharded_{whole}", callbacks, module=Sharded(whole), strategy=ModelParallelStrategy(**gloo))
        kept.append([p.to_local().clone() if hasattr(p, "to_local") else p.clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True)), whole
print("done")
"""


def test_two_ranks_measure_the_same_and_one_writes(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    output = on_two_ranks(TWO_RANKS, tmp_path)
    for run in ("ddp", "resumed", "sharded_False", "sharded_True"):
        first, second = (ib.Trajectory.load(tmp_path / f"{run}_{rank}.jsonl") for rank in range(2))
        assert first.steps == second.steps == [0, 2, 4, 5], run
        assert list(map(numbers, first)) == list(map(numbers, second)), run
        assert all(point.error is None for point in first), run
        assert numbers(first[0]) == pytest.approx(measured(tiny_module().net, 0), abs=1e-6), run
    assert ib.Trajectory.load(tmp_path / "log" / "version_0") == ib.Trajectory.load(tmp_path / "ddp_0.jsonl")
    written = sorted(path.parent.name for path in tmp_path.glob(f"log/*/{FILENAME}"))
    assert "version_0" in written
    first, second = (ib.Trajectory.load(tmp_path / f"stopped_{rank}.jsonl") for rank in range(2))
    assert first.steps == list(range(24))
    assert list(map(numbers, first)) == list(map(numbers, second))
    assert {point.step: point.error for point in second if point.error} == {12: "RuntimeError: rank 0 had no luck"}
    reason = ib.PlateauStopping(**STOPPING).replay(first).message
    endings = [json.loads((tmp_path / f"ending_{rank}.json").read_text()) for rank in range(2)]
    path = str(tmp_path / "stopped" / "step=20.ckpt")
    assert endings[0] == endings[1] == [23, reason, 20, BEST.optimality, path]
    assert sorted(path.name for path in (tmp_path / "stopped").glob("*.ckpt")) == ["step=20.ckpt", "step=22.ckpt"]
    for rank, text in enumerate(output):
        assert f"rank {rank}: " in text
        assert "cannot write to the output directory" in text
