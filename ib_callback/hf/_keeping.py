"""Where a run of HuggingFace's Trainer saves, and how to keep a checkpoint that the Trainer would remove."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ib_callback.common import json_lines
from ib_callback.common.files import first_of
from ib_callback.hf._trainer import callers

_PARTIAL = ".kept-checkpoint-{step}.partial"


def run_folder(callback: TrainerCallback, args: TrainingArguments) -> Path:
    """Where the Trainer that is calling `callback` saves: `output_dir`, or the folder of a trial in it.

    `Trainer.hyperparameter_search` trains each trial in a separate folder. It does not tell its callbacks which one.
    """
    for owner in callers():
        if isinstance(owner, Trainer) and callback in owner.callback_handler.callbacks:
            return Path(str(owner._get_output_dir(getattr(owner, "_trial", None))))
    return Path(str(args.output_dir))


def of_trial(folder: Path, args: TrainingArguments) -> Path:
    """The folder of a trial, relative to `output_dir`; "." without a trial."""
    relative = Path(os.path.relpath(folder, str(args.output_dir)))
    return Path(folder.name) if ".." in relative.parts else relative


def is_resumed(checkpoint: Path, state: TrainerState, key: str) -> bool:
    """Whether a checkpoint can be the one that a state has just been read from.

    The name does not prove it, because a checkpoint of another run may have the same name.

    Args:
        checkpoint: a checkpoint in the run's folder.
        state: the state that was read. Callbacks may have added to its history since.
        key: key of the entry of `stateful_callbacks` that is compared.
    """
    try:
        saved = json_lines.parsed((checkpoint / TRAINER_STATE_NAME).read_bytes())
    except (OSError, ValueError):
        return True  # nothing is known against it
    then, callbacks = saved.get("log_history", []), cast(dict[str, Any], state.stateful_callbacks or {})
    now = [state.log_history[: len(then)], callbacks.get(key)]
    # Compare texts, because NaN is not equal to NaN.
    return json.dumps(now) == json.dumps([then, (saved.get("stateful_callbacks") or {}).get(key)])


def copy_aside(checkpoint: Path, step: int) -> Path:
    """Copy a checkpoint within its folder, under a name that the Trainer neither counts nor removes.

    The files of the copy are hard links if the file system has them. The Trainer later removes only its own names.

    Raises:
        OSError: it cannot be copied. Nothing of the copy is left.
    """
    partial = checkpoint.with_name(_PARTIAL.format(step=step))
    later = (checkpoint.with_name(f"kept-checkpoint-{step}-v{number}") for number in itertools.count(1))
    try:
        with suppress(FileNotFoundError):
            shutil.rmtree(partial)
        shutil.copytree(checkpoint, partial, copy_function=_link_or_copy)
        kept = first_of(itertools.chain([checkpoint.with_name(f"kept-checkpoint-{step}")], later))
        os.replace(partial, kept)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return kept


def remove_partial_copies(folder: Path) -> None:
    """Remove the incomplete copies that a killed run left behind.

    Raises:
        OSError: they cannot be removed.
    """
    ours = re.compile(re.escape(_PARTIAL).replace(r"\{step\}", r"\d+"))
    with suppress(FileNotFoundError):
        for path in [folder / name for name in os.listdir(folder) if ours.fullmatch(name)]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)


def unlink_copies(folder: Path, step: int) -> None:
    """Give copies of checkpoints after a step their own files, because a run that goes back overwrites the old.

    Raises:
        OSError: a file cannot be copied.
    """
    for kept in folder.glob("kept-checkpoint-*"):
        match = re.match(r"kept-checkpoint-(\d+)", kept.name)
        if match is None or int(match[1]) <= step:
            continue
        for file in [path for path in kept.rglob("*") if path.is_file() and path.stat().st_nlink > 1]:
            partial = file.with_name(f".{file.name}.partial")
            shutil.copy2(file, partial)
            os.replace(partial, file)


def _link_or_copy(source: Any, destination: Any) -> None:
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)
