"""A fault at each call that the package makes into others while training runs, which must neither end nor change it.

Others are whatever is not the package, its own callers or arithmetic: files and streams, clocks, JSON, loggers,
Weights & Biases, progress bars, pictures, locks, imports, and what a Trainer is asked for. A first run, undisturbed,
says which calls there are after the first step of the optimizer; a further run for each raises an error in its place.

    python tests/support/kills/broken_calls.py > tests/support/kills/broken_calls.md   # all: half an hour
"""

from __future__ import annotations

import errno
import faulthandler
import hashlib
import io
import logging
import os
import sys
import tempfile
import threading
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import tqdm

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # in its own folder is a module called lightning

from kills.runs import ForkServer, points_in
from tiny_hf import Each, tiny_callback, tiny_probe, tiny_trainer

import ib_callback as ib

TRAINERS = ("hf", "lightning", "loop")
KINDS = ("EIO", "mute", "strict")
STEPS, EVERY, SAVED = 6, 2, 3
_PACKAGE = str(Path(ib.__file__).parent)
_SUPPORT = str(Path(__file__).parents[1])
# Arithmetic, what a language is made of, and random states, which are put back by assignments.
_NO_OTHERS = (
    "torch numpy scipy dataclasses contextlib functools typing abc enum re copy collections random operator types"
).split()
_BUILT_IN = ("io", "_io", "posix", "time", "_json", "zipfile")
# Where a checkpoint of the Trainer's is written, or removed, by the Trainer's own means: that is its error.
_ON_BEHALF = ("_save_and_tell", "_remove_unless_kept", "_tear_down")


# --- faults


class MuteError(RuntimeError):
    """Cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class ClosedStream(io.StringIO):
    """As `sys.stderr` whose reader is gone, for the package alone: the Trainers' own bars would end their training."""

    def write(self, text: str) -> int:
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename.startswith(_PACKAGE):
                raise BrokenPipeError(errno.EPIPE, "Broken pipe")
            frame = frame.f_back  # type: ignore[assignment]
        return len(text)

    def isatty(self) -> bool:
        return True


def _fault(kind: str) -> Exception:
    return {"EIO": OSError(errno.EIO, "injected"), "mute": MuteError(), "strict": RuntimeError("injected")}[kind]


@contextmanager
def strict() -> Iterator[None]:
    """No way out: every warning is an error, and standard error is a closed pipe."""
    stream, sys.stderr = sys.stderr, ClosedStream()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # The Trainers' own, of a machine without a GPU and of too few workers.
            for module in ("torch", "lightning", "transformers", "accelerate"):
                warnings.filterwarnings("ignore", module=module)
            yield
    finally:
        sys.stderr = stream


def call_into_others(frame: Any, event: str, argument: Any) -> str | None:
    """Which call the package is about to make, if it is one into others."""
    if event == "c_call":
        caller, owner = frame, getattr(argument, "__self__", None)
        of = getattr(argument, "__module__", None) or type(owner).__module__
        name, other = f"{of}.{argument.__name__}", of in _BUILT_IN
    elif event == "call" and frame.f_back is not None:
        caller, of = frame.f_back, frame.f_globals.get("__name__", "")
        name = f"{of}.{frame.f_code.co_name}"
        other = of.partition(".")[0] not in _NO_OTHERS and not frame.f_code.co_filename.startswith(
            (_PACKAGE, "<string")
        )
    else:
        return None
    code = caller.f_code
    if not other or not code.co_filename.startswith(_PACKAGE) or code.co_name in _ON_BEHALF:
        return None
    return f"{os.path.relpath(code.co_filename, _PACKAGE)}:{caller.f_lineno} {code.co_name} -> {name}"


class Injector:
    """Notes every call into others, and raises an error at one of them, which is a site and a number."""

    def __init__(self, fault: tuple[str, int, str] | None) -> None:
        self.calls: Counter[str] = Counter()
        self.raised = False
        self._fault = fault

    def start(self) -> None:
        sys.setprofile(self._profile)

    def stop(self) -> None:
        sys.setprofile(None)

    def _profile(self, frame: Any, event: str, argument: Any) -> None:
        site = call_into_others(frame, event, argument)
        if site is None:
            return
        self.calls[site] += 1
        if self._fault is not None and self._fault[:2] == (site, self.calls[site]):
            self.raised = True
            raise _fault(self._fault[2])  # which also ends the profiling


# --- in the processes with a fault


class Run:
    """As much of a run of Weights & Biases as is used."""

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}

    def define_metric(self, name: str, *, step_metric: str) -> None:
        pass

    def log(self, row: dict[str, Any]) -> None:
        pass


class WandbLogger:
    """As much of Lightning's as is used."""

    name, version, save_dir = "wandb", "0", None

    @property
    def experiment(self) -> Run:
        return sys.modules["wandb"].run


def prepare() -> None:
    import matplotlib.figure  # noqa: F401  # makes a table of fonts

    tqdm.tqdm.monitor_interval = 0  # else it starts a thread
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for name in ("hf", "lightning"):
        with tempfile.TemporaryDirectory() as directory:
            part(directory, name)


def part(
    directory: str, trainer: str, fault: tuple[str, int, str] | None = None, draws: bool = False
) -> dict[str, Any]:
    """Train for a few steps, with a fault or none; what has come of it, and of which calls the fault might be."""
    if fault is not None:
        faulthandler.dump_traceback_later(20, exit=True)  # a fault must not make it wait for ever either
    tqdm.tqdm.set_lock(threading.RLock())  # its own is one for all processes, and a stream that fails leaves it locked
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ib_callback").addHandler(handler)
    wandb = types.SimpleNamespace(run=Run(), Table=lambda columns, data: (columns, data), Image=lambda source: source)
    sys.modules["wandb"] = wandb  # type: ignore[assignment]
    injector = Injector(None if fault is None else tuple(fault))  # type: ignore[arg-type]
    result: dict[str, Any] = {"error": None, "model": None, "step": None}
    keywords = {
        "every_n_steps": EVERY,
        "orders": "token",
        "log_plane": draws,
        "progress": True,
        "early_stopping": ib.PlateauStopping(arm="immediately", patience=100),
        "select": ib.Selection("entropy", mode="max", select_from=1),
    }
    train: Callable[..., Any] = {"hf": _train_hf, "lightning": _train_lightning, "loop": _train_loop}[trainer]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with strict() if fault is not None and fault[2] == "strict" else warnings.catch_warnings():
                step, model, followed = train(Path(directory), keywords, injector.start)
            state = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
            result |= {"step": step, "weights": hashlib.sha256(state).hexdigest()}
            result |= {"selected": getattr(followed.selected, "step", None), "steps": followed.trajectory.steps}
            result["failed"] = [point.step for point in followed.trajectory if point.error is not None]
        except Exception as error:
            result["error"] = traceback.format_exc() if fault is None else type(error).__name__
        finally:
            injector.stop()
    logging.getLogger("ib_callback").removeHandler(handler)
    told += [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)]
    trajectory = Path(directory) / "ib_trajectory.jsonl"
    result["file"] = [point["step"] for point in points_in(Path(directory))] if trajectory.exists() else []
    return {**result, "told": len(told), "raised": injector.raised, "calls": injector.calls if fault is None else {}}


def _train_hf(directory: Path, keywords: dict[str, Any], start: Callable[[], None]) -> Any:
    from transformers.integrations import integration_utils

    class Target(integration_utils.AzureMLCallback):
        def __init__(self) -> None:
            pass

        def on_init_end(self, *args: Any, **kwargs: Any) -> None:
            pass

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            pass

    callback = tiny_callback(**keywords)
    started = Each("on_step_end", lambda state, control, model: start() if state.global_step == 1 else None)
    saving = {"save_strategy": "steps", "save_steps": SAVED, "save_total_limit": 1}
    evaluating = {"eval_strategy": "steps", "eval_steps": 4}
    trainer = tiny_trainer(directory, [started, callback, Target()], steps=STEPS, **saving, **evaluating)
    trainer.train()
    return trainer.state.global_step, trainer.model, callback


def _train_lightning(directory: Path, keywords: dict[str, Any], start: Callable[[], None]) -> Any:
    import tiny_lightning
    from lightning.pytorch.callbacks import LambdaCallback
    from lightning.pytorch.loggers import CSVLogger, Logger

    class Logging(WandbLogger, Logger):  # type: ignore[misc]
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            pass

        def log_hyperparams(self, *args: Any) -> None:
            pass

    Logging.__name__ = "WandbLogger"
    callback = tiny_lightning.tiny_callback(output_dir=directory, **keywords)
    started = LambdaCallback(on_train_batch_end=lambda trainer, *_: start() if trainer.global_step == 1 else None)
    loggers = [CSVLogger(directory / "csv"), Logging()]
    callbacks = [started, callback, tiny_lightning.saving(directory, SAVED, save_top_k=1)]
    trainer = tiny_lightning.tiny_trainer(directory, callbacks, steps=STEPS, enable_checkpointing=True, logger=loggers)
    module = tiny_lightning.tiny_module()
    torch.manual_seed(5)
    trainer.fit(module)
    return trainer.global_step, module.net, callback


def _train_loop(directory: Path, keywords: dict[str, Any], start: Callable[[], None]) -> Any:
    from loops import PLAIN

    def started(model: torch.nn.Module, step: int) -> None:
        if step == 1:
            start()

    outcome = PLAIN.train(directory, steps=STEPS, save_every=SAVED, on_step=started, probe=tiny_probe(), **keywords)
    return outcome.step, outcome.model, outcome.followed


# --- all of them


def sites(server: ForkServer, trainer: str, *, draws: bool = False) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """An undisturbed run, and its calls into others: each place in the code with the first and the last time."""
    whole = run(server, trainer, draws=draws)
    assert whole["error"] is None and whole["calls"], whole
    found = {(site, number) for site, count in whole["calls"].items() for number in (1, count)}
    return whole, sorted(found)


def verdict(whole: dict[str, Any], outcome: dict[str, Any]) -> str:
    """What a fault did."""
    if outcome["error"] is not None:
        return "ended"
    if any(outcome[name] != whole[name] for name in ("step", "weights")):
        return "changed"
    same = all(outcome[name] == whole[name] for name in ("steps", "failed", "file", "selected"))
    return "nothing lost" if same else "told" if outcome["told"] > whole["told"] else "silent"


def run(server: ForkServer, trainer: str, **arguments: Any) -> dict[str, Any]:
    """A training in a process and a directory of its own."""
    with tempfile.TemporaryDirectory() as directory:
        return server.run("part", directory=directory, trainer=trainer, **arguments).result


def main() -> None:
    server = ForkServer("kills.broken_calls")
    names = ("nothing lost", "told", "silent", "changed", "ended")
    rows = [["trainer", "pictures", "fault", "calls", *names], ["---"] * (4 + len(names))]
    worse: list[str] = []
    for trainer in sys.argv[1:] or TRAINERS:
        # Pictures are drawn by what all trainers share.
        for draws in (False, True) if trainer == "loop" else (False,):
            whole, places = sites(server, trainer, draws=draws)
            # All calls for pictures are made in a few places, and guarded there.
            places = [place for number, place in enumerate(places) if not draws or number % 12 == 0]
            for kind in KINDS:
                counts: Counter[str] = Counter()
                for site, number in places:
                    outcome = run(server, trainer, fault=(site, number, kind), draws=draws)
                    said = verdict(whole, outcome) if outcome["raised"] else "not reached"
                    counts[said] += 1
                    if said in names[2:]:
                        worse.append(f"- {trainer}, {kind}, {site}, time {number}: {said} ({outcome['error']})")
                numbers = [sum(counts.values()), *(counts[name] for name in names)]
                rows.append([trainer, "yes" if draws else "no", kind, *map(str, numbers)])
                sys.stderr.write(f"{rows[-1]} {counts}\n")
    server.close()
    sys.stdout.write("\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", *worse]) + "\n")


if __name__ == "__main__":
    main()
