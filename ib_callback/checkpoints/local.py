"""Checkpoints on this machine: single models, and every checkpoint in the directory of a run."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ib_callback.checkpoints.names import said_by
from ib_callback.checkpoints.place import Checkpoint, Local
from ib_callback.common import json_lines
from ib_callback.common.errors import ModelError
from ib_callback.common.files import told_apart
from ib_callback.run import checkpoints
from ib_callback.run.names import Names

# Files that torch.save may have written. In a folder, only files with a step in their name count.
_TORCH_FILES = (".ckpt", ".pt", ".pth")
_FSDP = "pytorch_model_fsdp_0"


def find_runs(path: Path, model: str) -> list[Checkpoint]:
    """Like `find_local`, but each of several Lightning runs below a directory is a model with the name of its folder.

    Runs are folders `version_N` and folders that hold a folder `checkpoints`. If a callback has recorded a directory as
    one run, it counts as one run.
    """
    whole = find_local(path, model)
    if not path.is_dir() or _records(path):
        return whole
    files = sorted(file.resolve() for file in path.glob("**/*.ckpt"))
    roots = dict.fromkeys(root for file in files if (root := _lightning_root(file, path)) is not None)
    if len(roots) < 2:
        return whole
    found = [c for c in whole if _lightning_root(Path(c.place.source), path) is None]
    for root, name in zip(roots, told_apart([root.parts for root in roots]), strict=True):
        found += [replace(c, place=Local(Path(c.place.source), path)) for c in find_local(root, f"{model}/{name}")]
    return found


def _lightning_root(checkpoint: Path, path: Path) -> Path | None:
    """The folder of the Lightning run below a directory to which a checkpoint belongs; None if there is none."""
    inside = [folder for folder in checkpoint.parents if path.resolve() in folder.parents]
    versions = [folder for folder in inside if re.fullmatch(r"version_\d+", folder.name)]
    above = [folder.parent for folder in inside if folder.name == "checkpoints" and folder.parent in inside]
    return next(iter([*versions, *above]), None)


def find_local(path: Path, model: str) -> list[Checkpoint]:
    """The model at a path, or every checkpoint in the directory of a run, in the order of its steps.

    Args:
        path: a folder in HuggingFace's layout or with a GGUF file, a file of GGUF or of torch, or a folder with shards
            of torch.distributed; or a directory that contains several of these, in a Trainer's layout or another one.
        model: name for the model.

    Raises:
        ModelError: there is nothing to measure.
    """
    if path.is_file() or _is_checkpoint(path):
        return [_checkpoint(path, model, alone=True)]
    by_step, without = _in_run(path)
    if is_model(path):
        if not by_step:
            return [_checkpoint(path, model, alone=True)]
        # The final model of a run, which `save_model` puts beside the checkpoints: one more point if its step is known.
        step = _trainer_state(path).get("global_step")
        if type(step) is int:
            by_step.setdefault(step, path)
        without = []
    if not by_step and not without:
        raise ModelError(
            f"{path}: expected a model or a folder with checkpoints, got neither. A model is a file (.ckpt, .pt or "
            ".gguf), or a folder that contains config.json with weights, a .gguf file, or shards with a .metadata file"
        )
    found = [_checkpoint(child, model, run=path, step=step) for step, child in sorted(by_step.items())]
    return [*found, *(_checkpoint(child, model, run=path) for child in without)]


def _in_run(path: Path) -> tuple[dict[int, Path], list[Path]]:
    """The checkpoints in the directory of a run by step, and the models in it without a known step."""
    by_step: dict[int, Path] = {}
    without = []
    # Checkpoints that the callbacks have recorded, and Lightning's files, which contain their step.
    known = checkpoints.find_checkpoints(path)
    for record in _records(path):
        known |= checkpoints.CheckpointFile(path, name=record).existing()
    seen = {os.path.abspath(place) for place in known.values()}
    # Lightning's files in deeper folders that were not recognised are damaged. They must be named, not left out.
    for child in sorted({*path.iterdir(), *path.glob("**/*.ckpt")}):
        if os.path.abspath(child) in seen:
            continue
        if not (is_model(child) if child.is_dir() else child.suffix in _TORCH_FILES):
            continue
        step = step_of(child)
        if step is not None:
            by_step.setdefault(step, child)
        elif child.is_dir():
            without.append(child)
    return by_step | known, without


def _records(path: Path) -> list[str]:
    """The names of the records in the directory of a run: several callbacks with different prefixes write one each."""
    trajectories = [*sorted(path.glob("*_trajectory.jsonl"))]
    names = dict.fromkeys([*(Names.of(file).checkpoints for file in trajectories), checkpoints.FILENAME])
    return [name for name in names if (path / name).is_file()]


def is_model(path: Path) -> bool:
    """Whether a folder holds a model; the folder of a run may hold checkpoints too."""
    if not path.is_dir():
        return False
    if _is_checkpoint(path) or (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return True
    return any(path.glob("*.gguf"))


def _is_checkpoint(path: Path) -> bool:
    """Whether a folder is a single checkpoint, judged by its shards or by the name that its trainer gave it."""
    return shards_in(path) is not None or (checkpoints.is_checkpoint_folder(path) and path.name != "checkpoints")


def gguf_in(path: Path, glob: str | None) -> Path | None:
    """The GGUF file at or in a path; None if there is a configuration, or no GGUF file.

    Raises:
        ModelError: there are several GGUF files.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    found = sorted(path.glob(glob or "*.gguf"))
    if not found or (glob is None and (path / "config.json").is_file()):
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ModelError(f"{path}: expected one GGUF file, got {len(found)}: {names}. Choose one with --gguf")
    return found[0]


def shards_in(path: Path) -> Path | None:
    """The folder at or in a path with shards of torch.distributed; None if there is none."""
    return next((folder for folder in (path, path / _FSDP) if (folder / ".metadata").is_file()), None)


def step_of(path: Path) -> int | None:
    """Optimizer steps of a checkpoint, from the files of HuggingFace's Trainer or Lightning, or from its name."""
    step = checkpoints.lightning_step(path) if path.suffix == ".ckpt" else _trainer_state(path).get("global_step")
    return step if type(step) is int else said_by(path.stem if path.is_file() else path.name).step


def _checkpoint(
    path: Path, model: str, *, run: Path | None = None, step: int | None = None, alone: bool = False
) -> Checkpoint:
    said = said_by(path.stem if path.is_file() else path.name)
    seen = _trainer_state(path).get("num_input_tokens_seen")
    counted = type(seen) is int and seen > 0  # trainers that do not count tokens write 0
    return Checkpoint(
        model=model,
        revision=None if alone else path.name,
        step=step_of(path) if step is None else step,
        tokens=seen if counted else said.tokens,  # type: ignore[arg-type]
        rounded=not counted and said.tokens is not None,
        stage=said.stage,
        place=Local(path, run),
    )


def _trainer_state(path: Path) -> dict[str, object]:
    with suppress(OSError, ValueError):
        state = json_lines.parsed((path / "trainer_state.json").read_bytes())
        return state if isinstance(state, dict) else {}
    return {}
