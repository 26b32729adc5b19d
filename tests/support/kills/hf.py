"""Parts of a run of HuggingFace's Trainer, and places to die at."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
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
from safetensors.torch import load_file
from tiny_hf import Each, tiny_callback, tiny_model, tiny_probe, tiny_trainer
from transformers import GPT2LMHeadModel, Trainer, TrainerState
from transformers.utils.logging import disable_progress_bar

import ib_callback as ib
from ib_callback.hf import IBCallback

SAVE_STEPS = 3
ORDERS = ("token", "bigram")


# --- in the processes that are killed


def prepare() -> None:
    disable_progress_bar()  # it starts a thread
    # Makes a table of all architectures.
    with tempfile.TemporaryDirectory() as directory:
        tiny_model().save_pretrained(directory)


def part(
    directory: str, resume: str | None, death: Sequence[Any] | None = None, leash: int | None = None, steps: int = 30
) -> dict[str, Any]:
    """Train until the rule stops the run or, before that, to a death: its place and number (see `arm`).

    `leash` is the step at which to wait for the death that comes from outside.
    """
    with_made_up_entropy()
    callback = tiny_callback(
        every_n_steps=2,
        orders=ORDERS,
        # Measured at every second step and with every checkpoint: 7 points after the best one it stops, at 20.
        early_stopping=ib.PlateauStopping("entropy", mode="max", arm="immediately", patience=6, guard=None),
        select=ib.Selection("entropy", mode="max", select_from=SAVE_STEPS, guard=None),
    )

    def tell(state: TrainerState, control: Any, model: torch.nn.Module) -> None:
        progress(f"step {state.global_step}")

    def wait(state: TrainerState, control: Any, model: torch.nn.Module) -> None:
        if leash is not None and state.global_step >= leash:
            wait_to_be_killed()

    trainer = tiny_trainer(
        Path(directory),
        [callback, Each("on_step_end", tell), Each("on_step_begin", wait)],
        # What a resumed run has learned must come from its checkpoint.
        model=tiny_model() if resume is None else tiny_model(seed=99),
        steps=steps,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=2,
    )
    assert trainer.model.config.resid_pdrop > 0
    if death is not None:
        arm(trainer, callback, *death)
    trainer.train(resume_from_checkpoint=resume)
    return {**ending(callback), "steps": trainer.state.global_step}


def arm(trainer: Trainer, callback: IBCallback, place: str, number: int) -> None:
    """Have the process die at a place: at that optimizer step, or the time that it gets there."""

    def now(*args: Any, **kwargs: Any) -> bool:
        return trainer.state.global_step == number

    what, _, where = place.partition(" of the ")
    if where == "rotation":
        die_deleting(what, now)
    elif place == "measurement":
        die_measuring(trainer.model.transformer.h[1], now)
    elif place == "weights saved":
        die_in(torch, "save", lambda *args, **kwargs: now() and str(args[1]).endswith("optimizer.pt"))
    elif place == "state not saved":
        die_in(TrainerState, "save_to_json", now)
    elif place == "state half saved":
        die_in_half_a_state(now)
    elif place == "state saved":
        die_in(TrainerState, "save_to_json", now, after=True)
    else:
        die_recording(place, number, callback, now)


def die_in_half_a_state(now: Any) -> None:
    save = TrainerState.save_to_json

    def save_half(state: TrainerState, path: str) -> None:
        save(state, path)
        if now():
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    TrainerState.save_to_json = save_half


def die_deleting(first: str, now: Any) -> None:
    rmtree = shutil.rmtree

    def delete(path: Any, *args: Any, **kwargs: Any) -> None:
        if now() and os.path.basename(path).startswith("checkpoint-"):
            os.remove(os.path.join(path, first))
            die()
        rmtree(path, *args, **kwargs)

    shutil.rmtree = delete


def measure(path: str, step: int) -> dict[str, Any]:
    """A checkpoint on the disk, measured again."""
    with_made_up_entropy()
    meter = ib.Meter(tiny_probe(), orders=ORDERS, num_bins=12, batch_size=3)
    return without_timings(meter.measure(GPT2LMHeadModel.from_pretrained(path), step=step).to_dict())


# --- in the process of the test


def loads(*files: Callable[[], Any]) -> bool:
    try:
        return all(load() is not None for load in files)
    except Exception:  # whatever it is that a torn file does
        return False


def has_model(path: Path) -> bool:
    return loads(
        lambda: load_file(path / "model.safetensors"), lambda: json.loads((path / "trainer_state.json").read_text())
    )


def can_be_resumed(path: Path) -> bool:
    files = [path / name for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")]
    # Of the random states only that they are there: they are written before the trainer's state.
    return (
        has_model(path) and files[2].exists() and loads(*(partial(torch.load, f, weights_only=True) for f in files[:2]))
    )


def last_checkpoint(directory: Path) -> tuple[int, Path] | None:
    checkpoints = [(int(path.name.rpartition("-")[2]), path) for path in directory.glob("checkpoint-*")]
    return max(((step, path) for step, path in checkpoints if can_be_resumed(path)), default=None)


def check_uninterrupted(directory: Path, selected: int, stopped: int) -> None:
    """Else nothing would be tested."""
    assert stopped % SAVE_STEPS == SAVE_STEPS - 1, "one step later is a checkpoint of the schedule, which deletes one"


PLACES = [
    # place, at which step, whether the checkpoint of that step can be resumed from
    ("measurement", "start", False),
    ("measurement", "best", False),
    ("measurement", "stop", False),
    ("weights saved", "best", False),
    ("state not saved", "best", False),
    ("state half saved", "best", False),
    ("state saved", "best", True),
    ("model.safetensors of the rotation", "best", True),
    ("trainer_state.json of the rotation", "best", True),
    ("before on_save", "best", True),
    ("half of the line", "stop", False),
    ("all but its end of the line", "best", False),
    ("all of the line", "best", False),
    ("half of the checkpoint line", "best", True),
    ("all but its end of the checkpoint line", "best", True),
]

# One after the other: resumed from, place, step; None is the last step of the run.
DEATHS = [
    (0, "measurement", 2),
    (0, "state not saved", 3),
    (0, "half of the line", 4),
    (3, "weights saved", 6),
    (3, "measurement", 6),
    (3, "half of the checkpoint line", 6),
    (6, "all of the line", 8),
    (6, "state half saved", 9),
    (6, "model.safetensors of the rotation", 9),
    (9, "before on_save", 12),
    (12, "all but its end of the line", 15),
    (12, "trainer_state.json of the rotation", 18),
    (18, "all of the line", None),
    (18, "state saved", None),
]

# Of a run that no rule stops: its steps, where it dies, and from where it resumes.
AT_THE_LAST_STEP = {
    "before it is saved": (14, [("measurement", 14)], [0, 12]),
    "after it is saved": (14, [("after on_save", 14)], [0, 14]),
    "and once more": (14, [("after on_save", 14), ("before on_train_end", 15)], [0, 14, 14]),
}
