"""Faults injected one by one: each call of some kind that the package makes fails once, in a training of its own.

`python -m kills.faults` in `tests/support` lets every system call fail with an input/output error and prints a table,
of which `io_errors.md` beside this file is a copy. A fixed sample is in the suite.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import ib_callback as ib

# These pass on what a Trainer wants to be done: what fails in there would fail without the package.
_PASSED_ON = ("_save_and_tell", "_remove_unless_kept", "_tear_down")


# --- one fault


class Fault:
    """Fails once, at the n-th call that the package makes; without a number it only counts.

    Args:
        number: of the call, from 0.
        error: makes what is raised.

    Attributes:
        calls: names of those made, in order; the last one is that which failed, if one did.
    """

    def __init__(self, number: int | None, error: Callable[[], BaseException]) -> None:
        self._number, self._error = number, error
        self.calls: list[str] = []
        self.failed = False

    def before(self, name: str) -> None:
        """To be called before a call of that name; raises if its turn has come."""
        if self.failed or not _is_ours(sys._getframe(2)):
            return
        self.calls.append(name)
        if len(self.calls) - 1 == self._number:
            self.failed = True
            raise self._error()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that may fail instead of doing anything."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.before(name)
            return function(*args, **kwargs)

        return call


def _is_ours(frame: FrameType | None) -> bool:
    """Whether the package is calling, itself or through a library, and not through a Trainer that it called."""
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("ib_callback."):
            return frame.f_code.co_name not in _PASSED_ON
        frame = frame.f_back
    return False


# --- system calls

_CALLS = (
    "open stat lstat access fsync replace rename unlink remove rmdir mkdir listdir scandir truncate ftruncate link "
    "symlink readlink utime chmod sendfile copy_file_range read write"
)
_OF_FILES = ("read", "readline", "readinto", "write", "truncate", "flush", "close")


class _File:
    """A file whose methods may fail. `close` fails after it has closed, as it does."""

    def __init__(self, file: Any, fault: Fault) -> None:
        self._file, self._fault = file, fault

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._file, name)
        return self._fault.wrap(f"file.{name}", attribute) if name in _OF_FILES else attribute

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def close(self) -> None:
        closed = self._file.closed
        self._file.close()
        if not closed:
            self._fault.before("file.close")


@contextlib.contextmanager
def failing_system_calls(number: int | None) -> Iterator[Fault]:
    """Within the block, the system call of that number fails with an input/output error."""
    fault = Fault(number, lambda: OSError(errno.EIO, os.strerror(errno.EIO)))
    real_open = builtins.open

    def open_to_fail(*args: Any, **kwargs: Any) -> Any:
        fault.before("open")
        file = real_open(*args, **kwargs)
        return _File(file, fault) if _is_ours(sys._getframe(1)) else file

    with pytest.MonkeyPatch.context() as patch:
        for name in _CALLS.split():
            if hasattr(os, name):
                patch.setattr(os, name, fault.wrap(f"os.{name}", getattr(os, name)))
        for module in (builtins, io):
            patch.setattr(module, "open", open_to_fail)
        yield fault


# --- trainings

STEPS, SAVES, BEST, UNTIL = 30, 4, 20, 26


@dataclass(frozen=True)
class Training:
    """A training whose best checkpoint is that of step 20.

    Attributes:
        train: trains in a directory, from the last checkpoint in it if there is one; calls a function at every step.
        keywords: of `train`.
        resumed: whether something fails in the second part of two.
        other: keywords of the second part alone. With them, the best checkpoint of the first part must be kept.
    """

    train: Callable[..., Any]
    keywords: Mapping[str, Any]
    resumed: bool = False
    other: Mapping[str, Any] | None = None


class Interrupted(Exception):
    """What ends the first part."""


def _settings(keywords: Mapping[str, Any]) -> dict[str, Any]:
    return {"every_n_steps": 2, "orders": "token", "select": "optimality", **keywords}


def train_hf(directory: Path, on_step: Callable[[int], None], saves: Mapping[str, Any], **keywords: Any) -> Any:
    import tiny_hf

    def tell(state: Any, control: Any, model: Any) -> None:
        on_step(state.global_step)

    callback = tiny_hf.tiny_callback(**_settings(keywords))
    trainer = tiny_hf.tiny_trainer(
        directory, [tiny_hf.Each("on_step_begin", tell), callback], steps=STEPS, save_strategy="steps",
        save_steps=SAVES, save_total_limit=1, save_only_model=True, **saves,
    )  # fmt: skip
    found = [int(path.name.removeprefix("checkpoint-")) for path in directory.glob("checkpoint-*")]
    trainer.train(resume_from_checkpoint=str(directory / f"checkpoint-{max(found)}") if found else None)
    return callback


def train_lightning(directory: Path, on_step: Callable[[int], None], saves: Mapping[str, Any], **keywords: Any) -> Any:
    import tiny_lightning
    from lightning.pytorch.callbacks import LambdaCallback

    def tell(trainer: Any, *args: Any) -> None:
        on_step(trainer.global_step)

    callback = tiny_lightning.tiny_callback(**_settings(keywords))
    saving = tiny_lightning.saving(directory, SAVES, save_top_k=1, enable_version_counter=False, **saves)
    callbacks = [LambdaCallback(on_train_batch_start=tell), callback, saving]
    trainer = tiny_lightning.tiny_trainer(directory, callbacks, steps=STEPS, enable_checkpointing=True)
    steps = {step: path for path in directory.glob("saved/*.ckpt") if (step := _lightning_step(path)) is not None}
    torch.manual_seed(5)
    trainer.fit(tiny_lightning.tiny_module(), ckpt_path=steps[max(steps)] if steps else None, weights_only=False)
    return callback


def _lightning_step(path: Path) -> int | None:
    return torch.load(path, weights_only=True)["global_step"]


CHANGED = {"num_bins": 13}
TRAININGS = {
    "hf": Training(train_hf, {"saves": {}}),
    "hf, resumed": Training(train_hf, {"saves": {}}, resumed=True),
    "hf, resumed with other settings": Training(train_hf, {"saves": {}}, resumed=True, other=CHANGED),
    "lightning": Training(train_lightning, {"saves": {}}),
    "lightning, one file": Training(train_lightning, {"saves": {"filename": "model"}}),
    "lightning, resumed": Training(train_lightning, {"saves": {}}, resumed=True),
    "lightning, one file, resumed": Training(train_lightning, {"saves": {"filename": "model"}}, resumed=True),
    "lightning, resumed with other settings": Training(train_lightning, {"saves": {}}, resumed=True, other=CHANGED),
}


class Sweep:
    """One training, again and again, and what it ends with if nothing fails.

    Args:
        name: of the training.
        directory: of all runs, one after the other: the same for each, for paths are in what is saved.

    Attributes:
        calls: the system calls that it makes.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self._training, self._run = TRAININGS[name], directory / "run"
        self._first_part = directory / "first part"
        self._selected: Any = None
        self._begun = False
        self._run.mkdir(parents=True)
        if self._training.resumed:
            with contextlib.suppress(Interrupted), _course():
                self._training.train(self._run, self._interrupt, **self._training.keywords)
        self._run.rename(self._first_part)
        self.calls = self._train(None).calls
        self._expected, self._points = self._selected, len(ib.Trajectory.load(self._run))
        where = self._run if self._training.other is None else self._first_part
        before = weights_in(where)
        self._best = next(weights for path, weights in before.items() if f"{BEST}" in path)

    def outcome(self, number: int) -> str:
        """What becomes of the run whose call of that number fails: "right", "refused", or what is wrong."""
        try:
            assert self._train(number).failed
        except Exception as error:
            if self._begun:
                return f"ended: {type(error).__name__}: {error}"
            # Whoever starts it once more must have lost nothing.
            self._go_on(None)
            return self._wrong() or "refused"
        return self._wrong() or "right"

    def _train(self, number: int | None) -> Fault:
        shutil.rmtree(self._run, ignore_errors=True)
        shutil.copytree(self._first_part, self._run)
        return self._go_on(number)

    def _go_on(self, number: int | None) -> Fault:
        self._begun = False
        training = self._training
        with _course(), failing_system_calls(number) as fault:
            callback = training.train(self._run, self._begin, **{**training.keywords, **(training.other or {})})
        best = callback.selected
        self._selected = None if best is None else (best.step, best.value, str(best.path.relative_to(self._run)))
        return fault

    def _begin(self, step: int) -> None:
        self._begun = True

    def _interrupt(self, step: int) -> None:
        if step == UNTIL:
            raise Interrupted

    def _wrong(self) -> str:
        if self._selected != self._expected:
            return f"selected {self._selected}, not {self._expected}"
        if self._best not in weights_in(self._run).values():
            return "lost"
        try:
            points = len(ib.Trajectory.load(self._run))
        except ib.TrajectoryError as error:
            return str(error)
        if points != self._points:
            return f"{points} points"
        partial = [path.name for path in self._run.rglob("*.partial")]
        return f"left over: {partial}" if partial else ""


def weights_in(directory: Path) -> dict[str, tuple[float, ...]]:
    """By path of each checkpoint in a directory, what tells its weights from others."""
    from safetensors.torch import load_file

    found = {}
    for path in [*directory.rglob("model.safetensors"), *directory.rglob("*.ckpt")]:
        state = load_file(path) if path.suffix != ".ckpt" else torch.load(path, weights_only=True)["state_dict"]
        found[str(path.relative_to(directory))] = tuple(value.double().sum().item() for value in state.values())
    return found


@contextlib.contextmanager
def _course() -> Iterator[None]:
    from scripted import follow

    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        follow(patch)
        yield


def main() -> None:
    """Print a row for each training, and below it the calls without which it is not right."""
    for name in sys.argv[1:] or TRAININGS:
        with tempfile.TemporaryDirectory() as directory:
            sweep = Sweep(name, Path(directory))
            outcomes = [sweep.outcome(number) for number in range(len(sweep.calls))]
        counts = Counter(outcome if outcome in ("right", "refused") else "wrong" for outcome in outcomes)
        rows = [f"| {name} | {len(outcomes)} | {counts['right']} | {counts['refused']} | {counts['wrong']} |"]
        for number, (call, outcome) in enumerate(zip(sweep.calls, outcomes, strict=True)):
            if outcome != "right":
                rows.append(f"    {number} {call}: {outcome}")
        sys.stdout.write("\n".join(rows) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
