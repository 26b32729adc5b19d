"""The same tiny training in four loops: HuggingFace's Trainer, Lightning's, a plain one, and Fabric's.

Each loop trains the tiny model of `tiny_hf` and is followed with the same keywords; `Outcome` is what is left.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.fabric
import tiny_hf
import tiny_lightning
import torch
from lightning.pytorch.callbacks import LambdaCallback

import ib_callback as ib
from ib_callback.run.config import split_keywords

SETTINGS = {"num_bins": 12, "batch_size": 3, "log_plane": False}


class Outcome(NamedTuple):
    """What a training leaves behind.

    followed: the callback or the `Run`: trajectory, decision, selected, cost; None if nothing followed.
    step: at which it ended.
    model: as trained; `weights` are a copy of its own.
    hooks: how many forward hooks are left on it.
    """

    followed: Any
    step: int
    model: torch.nn.Module
    weights: dict[str, torch.Tensor]
    hooks: int


class Loop(NamedTuple):
    """A loop.

    train: `train(directory, steps=12, save_every=0, limited=False, resume=False, follows=True, on_step=…, **keywords)`:
        with checkpoints every so many steps, of which the last and the best stay if they are limited; from the last
        checkpoint on; `on_step(model, step)` after every step of the optimizer, before it is measured.
    x_axis: under which the step goes to Weights & Biases.
    """

    name: str
    train: Callable[..., Outcome]
    x_axis: str


def checkpoints(directory: Path) -> dict[int, Path]:
    """Those of any loop that are there, by step."""
    names = [*directory.glob("checkpoint-*"), *directory.glob("saved/*.ckpt"), *directory.glob("step-*")]
    found = {int(re.findall(r"\d+", path.stem)[0]): path for path in names}
    return dict(sorted(found.items()))


def _outcome(followed: Any, step: int, model: torch.nn.Module) -> Outcome:
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return Outcome(followed, step, model, tiny_hf.weights(model), hooks)


def _nothing(model: torch.nn.Module, step: int) -> None:
    pass


def _train_hf(
    directory: Path, *, steps: int = 12, save_every: int = 0, limited: bool = False, resume: bool = False,
    follows: bool = True, on_step: Callable[..., None] = _nothing, probe: Any = None, **keywords: Any,
) -> Outcome:  # fmt: skip
    from ib_callback.hf import IBCallback

    callback = IBCallback(probe or tiny_hf.tiny_probe(), **{**SETTINGS, **keywords}) if follows else None
    first = tiny_hf.Each("on_step_end", lambda state, control, model: on_step(model, state.global_step))
    saving = {"save_strategy": "steps", "save_steps": save_every, "save_total_limit": 1 if limited else None}
    trainer = tiny_hf.tiny_trainer(
        directory, [first, *([callback] if callback else [])], steps=steps, **(saving if save_every else {})
    )
    trainer.train(resume_from_checkpoint=resume)
    return _outcome(callback, trainer.state.global_step, trainer.model)


def _train_lightning(
    directory: Path, *, steps: int = 12, save_every: int = 0, limited: bool = False, resume: bool = False,
    follows: bool = True, on_step: Callable[..., None] = _nothing, probe: Any = None, **keywords: Any,
) -> Outcome:  # fmt: skip
    from ib_callback.lightning import IBCallback

    callback = IBCallback(probe or tiny_hf.tiny_probe(), **{**SETTINGS, **keywords}) if follows else None
    first = LambdaCallback(on_train_batch_end=lambda trainer, module, *_: on_step(module.net, trainer.global_step))
    saving = [tiny_lightning.saving(directory, save_every, save_top_k=1 if limited else -1)] if save_every else []
    trainer = tiny_lightning.tiny_trainer(
        directory, [first, *([callback] if callback else []), *saving], steps=steps, enable_checkpointing=bool(saving)
    )
    module = tiny_lightning.tiny_module()
    torch.manual_seed(5)
    trainer.fit(module, ckpt_path=list(checkpoints(directory).values())[-1] if resume else None, weights_only=False)
    return _outcome(callback, trainer.global_step, module.net)


def _train_loop(
    fabric: lightning.fabric.Fabric | None, directory: Path, *, steps: int = 12, save_every: int = 0,
    limited: bool = False, resume: bool = False, follows: bool = True, on_step: Callable[..., None] = _nothing,
    probe: Any = None, **keywords: Any,
) -> Outcome:  # fmt: skip
    """Nothing but what a loop of one's own would have: the Run is made of the keywords of the callbacks."""
    model: Any = tiny_hf.tiny_model()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    if fabric is not None:
        model, optimizer = fabric.setup(model, optimizer)
    data, step, followed = tiny_hf.random_ids(64, seed=11), 0, None
    if resume:
        saved = torch.load(list(checkpoints(directory).values())[-1], weights_only=True)
        step = saved["step"]
        model.load_state_dict(saved["model"]), optimizer.load_state_dict(saved["optimizer"])
    if follows:
        config, meter_keywords = split_keywords("Run", {"output_dir": directory, **SETTINGS, **keywords})
        followed = ib.Run(ib.Meter(probe or tiny_hf.tiny_probe(), **meter_keywords), config=config).__enter__()
    try:
        while True:
            torch.manual_seed(step)  # for batch and dropout
            decision = followed.step(model, step) if followed else None
            if step >= steps or (decision is not None and decision.stop):
                break
            loss = model(input_ids=(batch := data[torch.randint(64, (4,))]), labels=batch).loss
            loss.backward() if fabric is None else fabric.backward(loss)
            optimizer.step(), optimizer.zero_grad()
            step += 1
            on_step(model, step)
            if save_every and step % save_every == 0:
                path = directory / f"step-{step:04}.pt"
                directory.mkdir(exist_ok=True)
                if followed:
                    followed.step(model, step)
                torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
                if followed:
                    followed.saved(step, path)
                for old in checkpoints(directory).values() if limited else ():
                    if old != path and not (followed and followed.keeps(old)):
                        old.unlink()
    except BaseException as error:
        if followed:
            followed.__exit__(type(error), error, error.__traceback__)
        raise
    if followed:
        followed.__exit__(None, None, None)
    return _outcome(followed, step, model)


def _train_plain(directory: Path, **settings: Any) -> Outcome:
    return _train_loop(None, directory, **settings)


def _train_fabric(directory: Path, **settings: Any) -> Outcome:
    return _train_loop(lightning.fabric.Fabric(accelerator="cpu", devices=1), directory, **settings)


LOOPS = (
    Loop("hf", _train_hf, "train/global_step"),
    Loop("lightning", _train_lightning, "trainer/global_step"),
    Loop("plain", _train_plain, "train/global_step"),
    Loop("fabric", _train_fabric, "train/global_step"),
)
