"""The same tiny training in four loops: HuggingFace's Trainer, Lightning's, a plain one, and Fabric's.

Each loop trains the tiny model of `tiny_hf` and is followed with the same keywords; `Outcome` is what is left. On two
ranks each of them trains as the environment of `two_ranks` says.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tiny_hf
import torch

import ib_callback as ib
from ib_callback.run.config import split_keywords

SETTINGS = {"num_bins": 12, "batch_size": 3, "log_plane": False, "console": False}
TWO_RANKS = os.environ.get("WORLD_SIZE") == "2"


class Outcome(NamedTuple):
    """What a training leaves behind.

    followed: the callback or the `Run`: trajectory, decision, selected, cost; None if nothing followed.
    step: at which it ended.
    model: as trained; `weights` are a copy of its own.
    optimizer: its state.
    left: what is put on a model by hand: the number of its forward hooks and of modules with a `forward` of their own.
    """

    followed: Any
    step: int
    model: torch.nn.Module
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    left: tuple[int, int]

    @property
    def modes(self) -> list[bool]:
        """Of each module, whether it is in training mode."""
        return [module.training for module in self.model.modules()]


def _nothing(model: torch.nn.Module, step: int) -> None:
    pass


@dataclass(frozen=True)
class _Training:
    directory: Path
    steps: int
    save_every: int
    limited: bool
    resume: bool
    followers: list[Any]
    on_step: Callable[[torch.nn.Module, int], None]
    data: Any


@dataclass(frozen=True)
class Loop:
    """A loop.

    follow: what follows it, of a probe, a directory and keywords.
    run: trains; the step at which it ended, the model and the optimizer.
    x_axis: under which the step goes to Weights & Biases.
    exact: whether a training that is resumed within an epoch ends with the weights of one that was not interrupted.
    """

    name: str
    follow: Callable[[ib.Probe, Path, dict[str, Any]], Any]
    run: Callable[[_Training], tuple[int, torch.nn.Module, torch.optim.Optimizer]]
    x_axis: str = "train/global_step"
    exact: bool = True

    def train(
        self, directory: Path, *, steps: int = 12, save_every: int = 0, limited: bool = False, resume: bool = False,
        follows: bool = True, again: Any = None, beside: Sequence[dict[str, Any]] = (),
        on_step: Callable[[torch.nn.Module, int], None] = _nothing, data: Any = None, probe: ib.Probe | None = None,
        **keywords: Any,
    ) -> Outcome:  # fmt: skip
        """Train the tiny model.

        Args:
            directory: of the run and its checkpoints.
            steps: of the optimizer.
            save_every: steps to a checkpoint; 0 for none.
            limited: remove all checkpoints but the last and the best.
            resume: go on from the last checkpoint.
            follows: whether anything follows it.
            again: what followed an earlier training, and is to follow this one as well.
            beside: further ones that follow, with other keywords.
            on_step: called with the model and the step after every step of the optimizer, before it is measured.
            data: a dataset of rows of ids, for the trainers.
            probe: by default that of `tiny_hf`.
            **keywords: of what follows.
        """
        probe = tiny_hf.tiny_probe() if probe is None else probe
        all_keywords = [keywords, *({**keywords, **other} for other in beside)] if follows and again is None else []
        followers = [self.follow(probe, directory, {**SETTINGS, **each}) for each in all_keywords]
        followers += [] if again is None else [again]
        step, model, optimizer = self.run(
            _Training(directory, steps, save_every, limited, resume, followers, on_step, data)
        )
        modules = list(model.modules())
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
        left = (hooks, sum("forward" in vars(module) for module in modules))
        followed = followers[0] if followers else None
        return Outcome(followed, step, model, tiny_hf.weights(model), optimizer.state_dict(), left)


# --- checkpoints of any loop


def checkpoints(directory: Path) -> dict[int, Path]:
    """Those that are there, by step."""
    names = [*directory.glob("checkpoint-*"), *directory.glob("saved/*.ckpt"), *directory.glob("step-*")]
    found = {int(re.findall(r"\d+", path.stem)[0]): path for path in names}
    return dict(sorted(found.items()))


def remove_checkpoint(directory: Path, step: int) -> None:
    """The checkpoint of a step, if there is one."""
    path = checkpoints(directory).get(step)
    if path is not None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def recorded(directory: Path) -> dict[int, Path]:
    """Those of which the run has taken note, in that order."""
    entries = [json.loads(line) for line in (directory / "ib_checkpoints.jsonl").read_text().splitlines()]
    return {entry["step"]: directory / entry["path"] for entry in entries}


# --- the loops


def _hf_callback(probe: ib.Probe, directory: Path, keywords: dict[str, Any]) -> Any:
    from ib_callback.hf import IBCallback

    return IBCallback(probe, **keywords)


def _run_hf(training: _Training) -> tuple[int, torch.nn.Module, torch.optim.Optimizer]:
    first = tiny_hf.Each("on_step_end", lambda state, control, model: training.on_step(model, state.global_step))
    limit = 1 if training.limited else None
    saving = {"save_strategy": "steps", "save_steps": training.save_every, "save_total_limit": limit}
    # Before 5.18 transformers cannot load the state of an optimizer on several ranks of a CPU.
    saving["save_only_model"] = TWO_RANKS
    trainer = tiny_hf.tiny_trainer(
        training.directory, [first, *training.followers], steps=training.steps, data=training.data, ddp_timeout=60,
        **(saving if training.save_every else {}),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=training.resume)
    assert trainer.args.world_size == (2 if TWO_RANKS else 1)
    return trainer.state.global_step, trainer.model, trainer.optimizer.optimizer


def _lightning_callback(probe: ib.Probe, directory: Path, keywords: dict[str, Any]) -> Any:
    from ib_callback.lightning import IBCallback

    return IBCallback(probe, **keywords)


def _run_lightning(training: _Training) -> tuple[int, torch.nn.Module, torch.optim.Optimizer]:
    import tiny_lightning
    from lightning.pytorch.callbacks import LambdaCallback
    from torch.utils.data import DataLoader

    def on_step(trainer: Any, module: Any, *args: Any) -> None:
        training.on_step(module.net, trainer.global_step)

    callbacks = [LambdaCallback(on_train_batch_end=on_step), *training.followers]
    if training.save_every:
        top = 1 if training.limited else -1
        callbacks.append(tiny_lightning.saving(training.directory, training.save_every, save_top_k=top))
    trainer = tiny_lightning.tiny_trainer(
        training.directory, callbacks, steps=training.steps, enable_checkpointing=bool(training.save_every),
        **(tiny_lightning.two_devices() if TWO_RANKS else {}),
    )  # fmt: skip
    module = tiny_lightning.tiny_module()
    torch.manual_seed(5)
    last = list(checkpoints(training.directory).values())[-1] if training.resume else None
    data = None if training.data is None else DataLoader(training.data, batch_size=4, shuffle=True)
    trainer.fit(module, data, ckpt_path=last, weights_only=False)
    assert trainer.world_size == (2 if TWO_RANKS else 1)
    return trainer.global_step, module.net, trainer.optimizers[0]


def _run_of_ones_own(probe: ib.Probe, directory: Path, keywords: dict[str, Any]) -> ib.Run:
    """Made of the keywords of the callbacks."""
    config, of_meter = split_keywords("Run", {"output_dir": directory, **keywords})
    return ib.Run(ib.Meter(probe, **of_meter), config=config)


def _run_plain(training: _Training, fabric: Any = None) -> tuple[int, torch.nn.Module, torch.optim.Optimizer]:
    """Nothing but what a loop of one's own would have."""
    model: Any = tiny_hf.tiny_model()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    if fabric is not None:
        model, optimizer = fabric.setup(model, optimizer)
    data, step = tiny_hf.random_ids(64, seed=11), 0
    if training.resume:
        saved = torch.load(list(checkpoints(training.directory).values())[-1], weights_only=True)
        step = saved["step"]
        model.load_state_dict(saved["model"]), optimizer.load_state_dict(saved["optimizer"])
    with ExitStack() as stack:
        runs = [stack.enter_context(run) for run in training.followers]
        while True:
            torch.manual_seed(step)  # for batch and dropout
            decisions = [run.step(model, step) for run in runs]
            if step >= training.steps or any(decision is not None and decision.stop for decision in decisions):
                break
            loss = model(input_ids=(batch := data[torch.randint(64, (4,))]), labels=batch).loss
            loss.backward() if fabric is None else fabric.backward(loss)
            optimizer.step(), optimizer.zero_grad()
            step += 1
            training.on_step(model, step)
            if training.save_every and step % training.save_every == 0:
                _save(training, runs, model, optimizer, step)
    return step, model, optimizer


def _save(training: _Training, runs: list[ib.Run], model: Any, optimizer: Any, step: int) -> None:
    path, writes = training.directory / f"step-{step:04}.pt", os.environ.get("RANK", "0") == "0"
    for run in runs:
        run.step(model, step)
    if writes:
        path.parent.mkdir(exist_ok=True)
        torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    for run in runs:
        run.saved(step, path)
    for old in checkpoints(training.directory).values() if writes and training.limited else ():
        if old != path and not any(run.keeps(old) for run in runs):
            old.unlink()


def _run_fabric(training: _Training) -> tuple[int, torch.nn.Module, torch.optim.Optimizer]:
    import lightning.fabric

    return _run_plain(training, lightning.fabric.Fabric(accelerator="cpu", devices=1))


HF = Loop("hf", _hf_callback, _run_hf)
LIGHTNING = Loop("lightning", _lightning_callback, _run_lightning, x_axis="trainer/global_step", exact=False)
PLAIN = Loop("plain", _run_of_ones_own, _run_plain)
FABRIC = Loop("fabric", _run_of_ones_own, _run_fabric)
TRAINERS = (HF, LIGHTNING)
LOOPS = (*TRAINERS, PLAIN, FABRIC)
