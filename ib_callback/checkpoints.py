"""Which checkpoint holds the weights of which step: the record that callbacks keep, and what trainers leave behind."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import torch

from ib_callback import json_lines
from ib_callback.checks import check_integer
from ib_callback.errors import TrajectoryError
from ib_callback.files import write_atomically

FILENAME = "ib_checkpoints.jsonl"

_HF_FOLDER = re.compile(r"checkpoint-(\d+)")
_LIGHTNING_STEP = re.compile(r"step[=_-]?(\d+)")
# Whatever of these a trainer's own folder has, the weights are there.
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "pytorch_model_fsdp_*", "global_step*")


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

    def add(self, step: int, path: str | os.PathLike[str]) -> None:
        """Record a checkpoint that is complete; on return it is on the disk.

        Raises:
            TrajectoryError: the file cannot be written; `existing` knows the checkpoint all the same.
        """
        checkpoint = Path(os.path.abspath(path))
        if self._entries and self._entries[-1] == (step, checkpoint):
            return
        self._entries.append((step, checkpoint))
        json_lines.append(self.path, self._line(step, checkpoint))

    def existing(self) -> dict[int, Path]:
        """The checkpoints that are still there, by step.

        A path that was written again at a later step holds that step's weights only.
        """
        step_of = {path: step for step, path in self._entries}
        found = {step: path for step, path in self._entries if step_of[path] == step and is_complete(path)}
        return dict(sorted(found.items()))

    def recorded(self) -> set[int]:
        """The steps at which a checkpoint was saved, whether or not it is still there."""
        return {step for step, _ in self._entries}

    def _line(self, step: int, path: Path) -> bytes:
        base = Path(os.path.abspath(self.directory))
        name = path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)
        return json.dumps({"step": step, "path": name}).encode() + b"\n"

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
        return entries


def is_complete(path: Path) -> bool:
    """Whether a checkpoint is there and neither half-written nor half-deleted, as far as its files tell.

    HuggingFace's Trainer writes `trainer_state.json` last, and Lightning moves a file into place when it is whole.
    """
    if not path.is_dir():
        return path.is_file() and path.stat().st_size > 0
    if _HF_FOLDER.fullmatch(path.name):
        return (path / "trainer_state.json").is_file() and any(next(path.glob(p), None) for p in _WEIGHTS)
    return next(path.iterdir(), None) is not None


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
    # Of several with the same weights one that is not going to be overwritten.
    for path in sorted(root.glob("**/*.ckpt"), key=lambda path: (path.stem.startswith("last"), path)):
        step = _step_of(path) if is_complete(path) else None
        if step is not None:
            found.setdefault(step, path)
    return dict(sorted(found.items()))


def _step_of(path: Path) -> int | None:
    """Optimizer steps behind a Lightning checkpoint; None if neither the file nor its name tells."""
    if path.is_file():
        try:
            return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
        except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, ValueError, EOFError, OSError):
            pass
    match = _LIGHTNING_STEP.search(path.stem)
    return None if match is None else int(match[1])
