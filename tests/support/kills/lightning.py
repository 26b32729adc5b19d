"""Parts of a run of Lightning's Trainer, and places to die at.

Lightning puts neither random states nor the place in the data into its checkpoints: the module here seeds its dropout
by the step, and its loader says where it is, as one of torchdata does.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from fsspec.implementations.local import LocalFileOpener
from kills.runs import (
    die,
    die_in,
    die_measuring,
    die_recording,
    ending,
    progress,
    wait_to_be_killed,
    with_made_up_entropy,
    without_timings,
)
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from tiny_hf import random_ids, tiny_model, tiny_probe
from tiny_lightning import BATCH, ROWS, tiny_callback, tiny_module, tiny_trainer

import ib_callback as ib
from ib_callback.lightning import IBCallback

SAVE_STEPS = 3
ORDERS = ("token", "bigram")
OVERWRITTEN = "latest"  # a checkpoint whose name does not say which


# --- in the processes that are killed


def prepare() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # What a first training imports and sets up.
    with tempfile.TemporaryDirectory() as directory:
        trainer = tiny_trainer(Path(directory), [tiny_callback()], steps=1)
        trainer.fit(Resumable())
        trainer.save_checkpoint(Path(directory) / "first.ckpt")


class Loader:
    """Each epoch in the same order; a resumed one goes on where it was."""

    def __init__(self) -> None:
        self.position = 0

    def __len__(self) -> int:
        return ROWS // BATCH

    def __iter__(self) -> Iterator[torch.Tensor]:
        batches = random_ids(ROWS, seed=11).split(BATCH)
        while self.position < len(batches):
            self.position += 1
            yield batches[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Resumable(type(tiny_module())):  # type: ignore[misc]
    def train_dataloader(self) -> Loader:
        return Loader()

    def on_train_batch_start(self, batch: torch.Tensor, batch_idx: int) -> None:
        torch.manual_seed(self.global_step)


def part(
    directory: str,
    resume: str | None,
    death: Sequence[Any] | None = None,
    leash: int | None = None,
    steps: int = 30,
    filename: str = "{step}",
) -> dict[str, Any]:
    """Train until the rule stops the run or, before that, to a death: its place and number (see `arm`).

    `leash` is the step at which to wait for the death that comes from outside.
    """
    # Lightning writes a checkpoint to a temporary file first; those of the dead must not be left to others.
    Path(directory).mkdir(exist_ok=True)
    tempfile.tempdir = directory
    with_made_up_entropy()
    callback = tiny_callback(
        every_n_steps=2,
        orders=ORDERS,
        # Measured at every second step and with every checkpoint: 12 points after the best one it stops, at 27.
        early_stopping=ib.PlateauStopping("entropy", mode="max", arm="immediately", patience=8, guard=None),
        select=ib.Selection("entropy", mode="max", select_from=SAVE_STEPS, guard=None),
    )

    def tell(trainer: Any, *args: Any) -> None:
        progress(f"step {trainer.global_step}")

    def wait(trainer: Any, *args: Any) -> None:
        if leash is not None and trainer.global_step >= leash:
            wait_to_be_killed()

    stock = ModelCheckpoint(
        Path(directory) / "checkpoints",
        every_n_train_steps=SAVE_STEPS,
        save_top_k=1,
        filename=filename,
        enable_version_counter=False,
    )
    around = LambdaCallback(on_train_batch_end=tell, on_train_batch_start=wait)
    trainer = tiny_trainer(Path(directory), [callback, around, stock], steps=steps, enable_checkpointing=True)
    module = Resumable()
    if resume is not None:
        # What a resumed run has learned must come from its checkpoint.
        module.net = tiny_model(seed=99)
    assert module.net.config.resid_pdrop > 0
    if death is not None:
        arm(trainer, module, callback, *death)
    trainer.fit(module, ckpt_path=resume)
    return {**ending(callback), "steps": trainer.global_step}


def arm(trainer: Any, module: Any, callback: IBCallback, place: str, number: int) -> None:
    """Have the process die at a place: at that optimizer step, or the time that it gets there."""

    def now(*args: Any, **kwargs: Any) -> bool:
        return trainer.global_step == number

    def writes_now(file: LocalFileOpener, *args: Any) -> bool:
        return now() and "w" in file.mode and file.path.endswith(".ckpt")

    def replaces_now(*args: Any) -> bool:
        return now() and os.fspath(args[-1]).endswith(".ckpt")

    when, _, what = place.partition(" ")
    if place == "measurement":
        die_measuring(module.net.transformer.h[1], now)
    elif place == "half of the checkpoint written":
        die_writing(writes_now)
    elif place == "checkpoint written":
        die_in(LocalFileOpener, "commit", writes_now)
    elif place == "half of the checkpoint moved":
        die_moving(writes_now)
    elif place == "checkpoint moved":
        die_in(LocalFileOpener, "commit", writes_now, after=True)
    elif what == "removing":
        die_in(TorchCheckpointIO, "remove_checkpoint", now, after=when == "after")
    elif place == "half of the copy":
        die_copying(now)
    elif what == "naming the copy":
        die_in(os, "replace", replaces_now, after=when == "after")
    else:
        die_recording(place, number, callback, now)


def die_writing(doomed: Callable[..., bool]) -> None:
    write = LocalFileOpener.write

    def write_half(file: LocalFileOpener, data: bytes) -> int:
        if doomed(file):
            write(file, data[: len(data) // 2])
            file.f.flush()
            die()
        return write(file, data)

    LocalFileOpener.write = write_half


def die_moving(doomed: Callable[..., bool]) -> None:
    """As where temporary files are on another disk, so that a file cannot be moved but is copied and removed."""
    commit = LocalFileOpener.commit

    def commit_half(file: LocalFileOpener) -> None:
        if doomed(file):
            file.f.close()
            data = Path(file.temp).read_bytes()
            Path(file.path).write_bytes(data[: len(data) // 2])
            die()
        commit(file)

    LocalFileOpener.commit = commit_half


def die_copying(now: Callable[..., bool]) -> None:
    copyfile = shutil.copyfile

    def copy_half(source: Any, destination: Any, **kwargs: Any) -> Any:
        if now():
            data = Path(source).read_bytes()
            Path(destination).write_bytes(data[: len(data) // 2])
            die()
        return copyfile(source, destination, **kwargs)

    shutil.copyfile = copy_half


def measure(path: str, step: int) -> dict[str, Any]:
    """A checkpoint on the disk, measured again."""
    with_made_up_entropy()
    module = Resumable()
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    meter = ib.Meter(tiny_probe(), orders=ORDERS, num_bins=12, batch_size=3)
    return without_timings(meter.measure(module.net, step=step).to_dict())


# --- in the process of the test


def step_of(path: Path) -> int | None:
    """Of a checkpoint that is whole."""
    try:
        content = torch.load(path, weights_only=True)
    except Exception:  # whatever it is that a torn file does
        return None
    return content["global_step"] if content["state_dict"] and content["optimizer_states"] else None


def has_model(path: Path) -> bool:
    return step_of(path) is not None


def last_checkpoint(directory: Path) -> tuple[int, Path] | None:
    steps = ((step_of(path), path) for path in directory.glob("checkpoints/*.ckpt"))
    return max(((step, path) for step, path in steps if step is not None), default=None)


def check_uninterrupted(directory: Path, selected: int, stopped: int) -> None:
    """Else nothing would be tested."""
    names = {path.name for path in (directory / "checkpoints").iterdir()}
    assert names == {f"step={step}.ckpt" for step in (selected, stopped // SAVE_STEPS * SAVE_STEPS)}


PLACES = [
    # place, at which step, whether the checkpoint of that step can be resumed from
    ("measurement", "start", False),
    ("measurement", "best", False),
    ("half of the checkpoint written", "best", False),
    ("half of the checkpoint moved", "best", False),
    ("checkpoint moved", "best", True),
    ("before removing", "best", True),
    ("after removing", "best", True),
    ("half of the line", "stop", False),
    ("half of the checkpoint line", "best", True),
]

# One after the other: resumed from, place, step; None is the last step of the run.
DEATHS = [
    (0, "measurement", 2),
    (0, "checkpoint written", 3),
    (0, "half of the line", 4),
    (3, "half of the checkpoint moved", 6),
    (3, "measurement", 6),
    (3, "half of the checkpoint line", 6),
    (6, "all of the line", 8),
    (6, "half of the checkpoint written", 9),
    (6, "checkpoint moved", 9),
    (9, "checkpoint moved", 12),
    (12, "all but its end of the line", 15),
    (12, "checkpoint written", 15),
    (12, "all but its end of the checkpoint line", 18),
    (18, "measurement", 22),
    (21, "all of the line", None),
    (21, "all of the checkpoint line", None),
    (None, "before on_train_end", None),
    (None, "before on_train_end", None),
]

# Of a run that no rule stops: its steps, where it dies, and from where it resumes.
AT_THE_LAST_STEP = {
    "before it is measured": (14, [("measurement", 14)], [0, 12]),
    "after it is saved": (15, [("before on_train_end", 15)], [0, 15]),
}
