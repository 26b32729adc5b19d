"""Which checkpoint holds the weights of which step: the record that callbacks keep, and what trainers leave behind."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import torch

from ib_callback.common import json_lines
from ib_callback.common.checks import check_integer
from ib_callback.common.errors import TrajectoryError
from ib_callback.common.files import write_atomically

FILENAME = "ib_checkpoints.jsonl"

_HF_FOLDER = re.compile(r"checkpoint-(\d+)")
_LIGHTNING_STEP = re.compile(r"step[=_-]?(\d+)")
# Whatever of these HuggingFace's Trainer leaves in a folder, beside what it needs to go on training, is weights.
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "pytorch_model_fsdp_*", "global_step*")
_NO_WEIGHTS = ("training_args.*", "optimizer*", "scheduler*", "scaler*", "rng_state*")
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\..*")
# What Lightning writes last into a checkpoint that is a folder: everything but the weights.
_LIGHTNING_REST = "meta.pt"


class CheckpointFile:
    """`ib_checkpoints.jsonl`: the step and the path of every checkpoint of a run, added once it is complete.

    A fresh run moves an old file to `ib_checkpoints.1.jsonl` (`.2`, …); a resumed one drops what lies past its
    step. Paths are relative to the file where they lie below its directory, so that a run can be moved as a whole.

    Args:
        directory: the run's output directory, which must exist.
        start_step: step from which the run continues; 0 for a fresh run; None to read a finished run.

    Raises:
        TrajectoryError: the file cannot be read or written, or is damaged elsewhere than in its last line.
    """

    def __init__(self, directory: str | os.PathLike[str], *, start_step: int | None = None) -> None:
        self.directory = Path(directory)
        self.path = self.directory / FILENAME
        self._entries: list[tuple[int, Path]] = []
        self._exchanged: set[tuple[int, Path]] = set()  # those that hold other weights than were measured
        if start_step == 0:
            with json_lines.explained(self.path, "moved"):
                json_lines.set_aside(self.path)
            return
        self._entries = self._read()
        if start_step is not None:
            kept = [(step, path) for step, path in self._entries if step <= start_step]
            if len(kept) < len(self._entries):
                with json_lines.explained(self.path, "written"):
                    write_atomically(self.path, b"".join(self._line(step, path) for step, path in kept))
                self._entries = kept

    def add(self, step: int, path: str | os.PathLike[str], *, holds: bool = True) -> None:
        """Record a checkpoint that is complete; on return it is on the disk.

        Args:
            step: at which it was saved.
            path: of the file or folder.
            holds: whether it holds the weights that were measured at that step.

        Raises:
            TrajectoryError: the file cannot be written; `existing` knows the checkpoint all the same.
        """
        checkpoint = Path(os.path.abspath(path))
        entry = (step, checkpoint)
        if self._entries and self._entries[-1] == entry and holds == (entry not in self._exchanged):
            return
        self._entries.append(entry)
        self._exchanged.discard(entry) if holds else self._exchanged.add(entry)
        json_lines.append(self.path, self._line(step, checkpoint))

    def existing(self) -> dict[int, Path]:
        """The checkpoints that are still there, by step.

        A path that was written again at a later step holds that step's weights only. Of several with the same
        weights it is one that is not going to be overwritten.
        """
        step_of = {path: step for step, path in self._entries}
        found: dict[int, Path] = {}
        for step, path in sorted(self._entries, key=lambda entry: _is_last(entry[1])):
            exchanged = (step, path) in self._exchanged
            if step not in found and step_of[path] == step and not exchanged and is_complete(path):
                found[step] = path
        return dict(sorted(found.items()))

    def recorded(self) -> set[int]:
        """The steps at which a checkpoint was saved, whether or not it is still there."""
        return {step for step, _ in self._entries}

    def _line(self, step: int, path: Path) -> bytes:
        base = Path(os.path.abspath(self.directory))
        name = path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)
        holds = {"holds": False} if (step, path) in self._exchanged else {}
        return json.dumps({"step": step, "path": name, **holds}).encode() + b"\n"

    def _read(self) -> list[tuple[int, Path]]:
        if not self.path.exists():
            return []
        with json_lines.explained(self.path, "read"):
            data = self.path.read_bytes()
        entries = []
        for number, line in json_lines.intact_lines(data, self.path):
            entry = json.loads(line)
            try:
                step = check_integer("step", entry["step"], minimum=0, cure="a step is a number of optimizer steps")
                path = Path(os.path.abspath(self.directory / entry["path"]))
            except (KeyError, TypeError, ValueError) as error:
                raise TrajectoryError(
                    f'{self.path}:{number}: expected {{"step": number, "path": text}}, got {line[:60]!r} ({error}). '
                    "Correct or remove that line"
                ) from error
            entries.append((step, path))
            self._exchanged.discard((step, path)) if entry.get("holds", True) else self._exchanged.add((step, path))
        return entries


def is_complete(path: Path) -> bool:
    """Whether a checkpoint is there and neither half-written nor half-deleted, as far as its files tell.

    HuggingFace's Trainer writes `trainer_state.json` last, and Lightning moves a file into place when it is whole.
    """
    if not path.is_dir():
        return path.is_file() and path.stat().st_size > 0 and not _is_torn(path)
    if _HF_FOLDER.fullmatch(path.name):
        return _is_json(path / "trainer_state.json") and _has_all_weights(path)
    return _is_whole_folder(path) and (path.suffix != ".ckpt" or _has_rest(path))


def is_checkpoint_folder(path: Path) -> bool:
    """Whether a directory is a checkpoint, or Lightning's folder of them, by its name."""
    return path.name == "checkpoints" or path.suffix == ".ckpt" or _HF_FOLDER.fullmatch(path.name) is not None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True


def find_checkpoints(directory: str | os.PathLike[str]) -> dict[int, Path]:
    """The complete checkpoints below a run's directory by step, in HuggingFace's layout and in Lightning's.

    For runs without a record of their own. Lightning's files are asked for their step, and where they cannot be
    read safely (`weights_only`), their name is (`step=500`).
    """
    root = Path(directory)
    found: dict[int, Path] = {}
    for path in sorted(root.glob("checkpoint-*")):
        match = _HF_FOLDER.fullmatch(path.name)
        if match and is_complete(path):
            found[int(match[1])] = path
    for path in sorted(root.glob("**/*.ckpt"), key=lambda path: (_is_last(path), path)):
        step = _step_of(path) if is_complete(path) else None
        if step is not None:
            found.setdefault(step, path)
    return dict(sorted(found.items()))


def _step_of(path: Path) -> int | None:
    """Optimizer steps behind a Lightning checkpoint; None if neither the file nor its name tells."""
    file = path / _LIGHTNING_REST if path.is_dir() else path
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if isinstance(content, dict):
            return int(content["global_step"])
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, ValueError, EOFError, OSError):
        pass
    match = _LIGHTNING_STEP.search(path.stem)
    return None if match is None else int(match[1])


def _is_last(path: Path) -> bool:
    """Whether it is Lightning's `last.ckpt`, which every later checkpoint overwrites."""
    return path.suffix == ".ckpt" and path.stem.startswith("last")


def _is_torn(path: Path) -> bool:
    """Whether a file that `torch.save` began, a zip archive, lacks its end."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04" and not zipfile.is_zipfile(path)


def _has_all_weights(path: Path) -> bool:
    """Whether a folder of HuggingFace's Trainer has weights and, if they are in several pieces, all of these."""
    weights = [
        file
        for file in path.iterdir()
        if any(fnmatch(file.name, p) for p in _WEIGHTS) and not any(fnmatch(file.name, p) for p in _NO_WEIGHTS)
    ]
    pieces = Counter((match[1], int(match[2])) for file in weights if (match := _SHARD.fullmatch(file.name)))
    whole = all(found == number for (_, number), found in pieces.items())
    return bool(weights) and whole and all(_is_whole_folder(file) for file in weights if file.is_dir())


def _is_whole_folder(path: Path) -> bool:
    """Whether there is something in it and, with the shards of torch.distributed, their index, written last."""
    names = os.listdir(path)
    return bool(names) and (".metadata" in names or not any(name.endswith(".distcp") for name in names))


def _has_rest(path: Path) -> bool:
    return (path / _LIGHTNING_REST).is_file() or next(path.glob("*.distcp"), None) is None
