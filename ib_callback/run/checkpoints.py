"""Which checkpoint holds the weights of which step: the record of the callbacks, and the folders of trainers."""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
from collections import Counter
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import torch

from ib_callback.common import json_lines
from ib_callback.common.checks import check_integer
from ib_callback.common.errors import TrajectoryError
from ib_callback.common.files import size_of, write_atomically

FILENAME = "ib_checkpoints.jsonl"

_HF_FOLDER = re.compile(r"checkpoint-(\d+)|kept-checkpoint-\d+(?:-v\d+)?")
_LIGHTNING_STEP = re.compile(r"step[=_-]?(\d+)")
# Files of HuggingFace's Trainer that match these names hold weights, unless they match those of _NO_WEIGHTS.
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "pytorch_model_fsdp_*", "global_step*")
_NO_WEIGHTS = ("training_args.*", "optimizer*", "scheduler*", "scaler*", "rng_state*")
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\..*")
# If a checkpoint is a folder, Lightning writes this file last. It holds everything but the weights.
_LIGHTNING_REST = "meta.pt"
_LONGEST_ZIP_END = 22 + 0xFFFF  # the end record of a zip archive with the longest possible comment


# Identifies the version of a file that was JSON when it was read: its inode, size and time of change.
Read = dict[Path, tuple[int, int, int]]


class CheckpointFile:
    """`ib_checkpoints.jsonl`: the step and the path of every checkpoint of a run, added once it is complete.

    A fresh run moves an old file to `ib_checkpoints.1.jsonl` (`.2`, …). A resumed run drops the checkpoints after its
    step. Paths below the directory of the file are relative to it, so that a run can be moved as a whole. If this run
    wrote a checkpoint elsewhere, its line also has the run's directory (`run`), because a copy of the file in another
    directory does not prove that the run there wrote the checkpoint.

    Args:
        directory: the run's output directory, which must exist.
        start_step: step from which the run continues; 0 for a fresh run; None to read a finished run.
        name: of the file; each prefix has its own file.

    Attributes:
        unknown: steps whose checkpoints could not be looked for at the last look.

    Raises:
        TrajectoryError: the file cannot be read or written, or a line other than its last is damaged.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, start_step: int | None = None, name: str = FILENAME
    ) -> None:
        self.directory = Path(directory)
        self.path = self.directory / name
        self.unknown: set[int] = set()
        self._base = Path(os.path.abspath(directory))
        self._entries: list[tuple[int, Path]] = []
        self._exchanged: set[tuple[int, Path]] = set()  # checkpoints with other weights than those measured
        self._own: set[Path] = set()
        self._there: dict[Path, bool] = {}  # whether it was there at the last successful look
        self._read_before: Read = {}
        self._unsaved: list[bytes] = []
        if start_step == 0:
            with json_lines.explained(self.path, "moved"):
                json_lines.set_aside(self.path)
            return
        self._entries = self._read()
        if start_step is not None:
            kept = [(step, path) for step, path in self._entries if step <= start_step]
            if len(kept) < len(self._entries):
                self._entries = kept
                self._write()

    def add(self, step: int, path: str | os.PathLike[str], *, own: bool = True, holds: bool = True) -> None:
        """Record a checkpoint that is complete. On return the record is on the disk.

        Args:
            step: at which it was saved.
            path: of the file or folder.
            own: whether this run wrote it.
            holds: whether it holds the weights that were measured at that step.

        Raises:
            TrajectoryError: the file cannot be written. `existing` knows the checkpoint nevertheless, and the next
                `add` or `flush` tries again.
        """
        checkpoint = Path(os.path.abspath(path))
        entry = (step, checkpoint)
        self._there[checkpoint] = True
        if own:
            self._own.add(checkpoint)
        if not self._entries or self._entries[-1] != entry or holds == (entry in self._exchanged):
            self._entries.append(entry)
            self._exchanged.discard(entry) if holds else self._exchanged.add(entry)
            self._unsaved.append(self._line(step, checkpoint))
        self.flush()

    def flush(self) -> None:
        """Write the lines that could not be written before.

        Raises:
            TrajectoryError: the file cannot be written.
        """
        while self._unsaved:
            json_lines.append(self.path, self._unsaved[0])
            del self._unsaved[0]

    def write_anew(self) -> None:
        """Write all lines again if the file has been removed.

        Raises:
            TrajectoryError: the file cannot be written.
        """
        if self._entries and size_of(self.path) is None:
            self._write()
            self._unsaved.clear()

    def take_over(self, other: CheckpointFile) -> None:
        """Put the record of an earlier part of the run, in another directory, in front of this one."""
        self._entries = [*other._entries, *self._entries]
        self._exchanged |= other._exchanged
        self._write()

    def existing(self) -> dict[int, Path]:
        """The checkpoints that are still there, by step.

        A path that was written again at a later step counts for that step only. A link counts as what it leads to. If
        several checkpoints have the same weights, one that will not be overwritten is preferred. A checkpoint that
        cannot be looked at now counts as it did at the last successful look. If there was none, its step is in
        `unknown`.
        """
        step_of = {path: step for step, path in self._entries}
        found: dict[int, Path] = {}
        unknown = set()
        for step, path in sorted(self._entries, key=lambda entry: _is_last(entry[1])):
            # Lightning's `last.ckpt` may be a link. After every checkpoint it leads to another file.
            places = {path, _led_to(path)}
            if step in found or any(step_of.get(p, step) != step or (step, p) in self._exchanged for p in places):
                continue
            with suppress(OSError):
                self._there[path] = is_complete(path, self._read_before)
            if path not in self._there:
                unknown.add(step)
            elif self._there[path]:
                found[step] = path
        self.unknown = unknown - set(found)
        return dict(sorted(found.items()))

    def recorded(self) -> set[int]:
        """The steps at which a checkpoint was saved, whether or not it is still there."""
        return {step for step, _ in self._entries}

    def holds(self, step: int, path: str | os.PathLike[str]) -> bool:
        """Whether a checkpoint has the weights measured at that step, as far as is known here."""
        return (step, Path(os.path.abspath(path))) not in self._exchanged

    def own_step(self, path: Path) -> int | None:
        """The step whose weights a file or folder holds if this very run wrote it; None otherwise."""
        if path not in self._own:
            return None
        return next((step for step, other in reversed(self._entries) if other == path), None)

    def _line(self, step: int, path: Path) -> bytes:
        entry: dict[str, int | str | bool] = {"step": step, "path": str(path)}
        if path.is_relative_to(self._base):
            entry["path"] = path.relative_to(self._base).as_posix()
        elif path in self._own:
            entry["run"] = str(self._base)
        if (step, path) in self._exchanged:
            entry["holds"] = False
        return json.dumps(entry).encode() + b"\n"

    def _write(self) -> None:
        with json_lines.explained(self.path, "written"):
            write_atomically(self.path, b"".join(self._line(step, path) for step, path in self._entries))

    def _read(self) -> list[tuple[int, Path]]:
        with json_lines.explained(self.path, "read"):
            try:
                data = self.path.read_bytes()
            except FileNotFoundError:
                return []
        entries = []
        for number, line in json_lines.intact_lines(data, self.path):
            entry = json_lines.parsed(line)
            try:
                step = check_integer("step", entry["step"], minimum=0, cure="a step is a number of optimizer steps")
                path = Path(os.path.abspath(self._base / entry["path"]))
                is_below = not os.path.isabs(entry["path"]) and path.is_relative_to(self._base)
            except (KeyError, TypeError, ValueError) as error:
                raise TrajectoryError(
                    f'{self.path}:{number}: expected {{"step": number, "path": text}}, got {line[:60]!r} ({error}). '
                    "Correct or remove that line"
                ) from error
            entries.append((step, path))
            self._exchanged.discard((step, path)) if entry.get("holds", True) else self._exchanged.add((step, path))
            if is_below or entry.get("run") == str(self._base):
                self._own.add(path)
        return entries


def is_complete(path: Path, read_before: Read | None = None) -> bool:
    """Whether a checkpoint is there and neither half-written nor half-deleted, as far as its files tell.

    HuggingFace's Trainer writes `trainer_state.json` last. Lightning moves a file into place when it is complete.

    Args:
        path: of the file or folder.
        read_before: the files that earlier calls have read; this call adds to them. It saves time: a state has the
            whole history of the run, so reading that of every checkpoint at every save would take longer and longer.

    Raises:
        OSError: the checkpoint cannot be looked at, so nobody knows.
    """
    try:
        if not _is_folder(path):
            return os.stat(path).st_size > 0 and not _is_torn(path)
        if _HF_FOLDER.fullmatch(path.name):
            return _is_json(path / "trainer_state.json", read_before) and _has_all_weights(path)
        return _is_whole_folder(path) and (path.suffix != ".ckpt" or _has_rest(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_checkpoint_folder(path: Path) -> bool:
    """Whether the name of a directory is that of a checkpoint, or of Lightning's folder of checkpoints."""
    return path.name == "checkpoints" or path.suffix == ".ckpt" or _HF_FOLDER.fullmatch(path.name) is not None


def _is_json(path: Path, read_before: Read | None) -> bool:
    """Whether a file is JSON. A file that has not changed since it was read is not read again."""
    found = os.stat(path)
    version = (found.st_ino, found.st_size, found.st_mtime_ns)
    if read_before is not None and read_before.get(path) == version:
        return True
    try:
        json_lines.parsed(path.read_bytes())
    except ValueError:
        return False
    if read_before is not None:
        read_before[path] = version
    return True


def _is_folder(path: Path) -> bool:
    # In some versions, Path.is_dir returns False for an error.
    return stat.S_ISDIR(os.stat(path).st_mode)


def _seems_complete(path: Path) -> bool:
    try:
        return is_complete(path)
    except OSError:
        return False


def find_checkpoints(directory: str | os.PathLike[str]) -> dict[int, Path]:
    """The complete checkpoints below a run's directory by step, in HuggingFace's and in Lightning's layout.

    This is for runs without a record of their own. The step of a Lightning checkpoint is read from the file. If the
    file cannot be read safely (`weights_only`), the step is taken from its name (`step=500`).
    """
    root = Path(directory)
    found: dict[int, Path] = {}
    for path in sorted(root.glob("checkpoint-*")):
        match = _HF_FOLDER.fullmatch(path.name)
        if match and _seems_complete(path):
            found[int(match[1])] = path
    for path in sorted(root.glob("**/*.ckpt"), key=lambda path: (_is_last(path), path)):
        step = lightning_step(path) if _seems_complete(path) else None
        if step is not None:
            found.setdefault(step, path)
    return dict(sorted(found.items()))


def lightning_step(path: Path) -> int | None:
    """Optimizer steps taken before a Lightning checkpoint; None if neither the file nor its name tells."""
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
    """Whether a path is Lightning's `last.ckpt`, which every later checkpoint overwrites."""
    return path.suffix == ".ckpt" and path.stem.startswith("last")


def _led_to(path: Path) -> Path:
    """The target of a link, which is not followed further; any other path as it is."""
    try:
        return Path(os.path.abspath(path.parent / os.readlink(path)))
    except OSError:
        return path


def _is_torn(path: Path) -> bool:
    """Whether a zip archive, as `torch.save` writes it, lacks its end."""
    # Do not use zipfile.is_zipfile, because it returns False for an error of the disk.
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
        file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_ZIP_END))
        return b"PK\x05\x06" not in file.read()


def _has_all_weights(path: Path) -> bool:
    """Whether a folder of HuggingFace's Trainer has weights and, if they are in pieces, all of the pieces."""
    weights = [
        name
        for name in os.listdir(path)
        if any(fnmatch(name, p) for p in _WEIGHTS) and not any(fnmatch(name, p) for p in _NO_WEIGHTS)
    ]
    pieces = Counter((match[1], int(match[2])) for name in weights if (match := _SHARD.fullmatch(name)))
    whole = all(found == number for (_, number), found in pieces.items())
    folders = [path / name for name in weights if _is_folder(path / name)]
    return bool(weights) and whole and all(map(_is_whole_folder, folders))


def _is_whole_folder(path: Path) -> bool:
    """Whether a folder is not empty. If it has shards of torch.distributed, it needs their index, written last."""
    names = os.listdir(path)
    return bool(names) and (".metadata" in names or not any(name.endswith(".distcp") for name in names))


def _has_rest(path: Path) -> bool:
    names = os.listdir(path)
    return _LIGHTNING_REST in names or not any(name.endswith(".distcp") for name in names)
