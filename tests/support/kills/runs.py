"""Runs that are killed and resumed: processes to kill, places to die at, and what no kill may change.

A module for each trainer has a function that trains one `part` of a run. A fork server, which has imported that module
once, runs it in a process of its own for each part: importing the frameworks takes longer than all the training. What
else is worth doing once and starts no thread, the module does in its function `prepare`.
"""

from __future__ import annotations

import builtins
import gc
import importlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import ib_callback as ib
from ib_callback.run.checkpoints import CheckpointFile, find_checkpoints

TRAJECTORY = "ib_trajectory.jsonl"
CHECKPOINTS = "ib_checkpoints.jsonl"
BEST = 9
_TIMINGS = ("seconds", "overhead", "crc32")  # and what depends on them


# --- processes


@dataclass(frozen=True)
class Ended:
    """How a part of a run ended: killed, or with what its function returned; and all that it printed."""

    killed: bool
    result: Any
    log: str


class ForkServer:
    """A process that has imported a module, and forks a child for each part of a run.

    Not the process of pytest: forking needs one without other threads, and of those no one knows there.
    """

    def __init__(self, module: str) -> None:
        self._process = _python("serve", module, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        """At the end of its input it ends by itself."""
        self._process.communicate()

    def run(self, function: str, *, kill_after: str | None = None, delay: float = 0.0, **arguments: Any) -> Ended:
        """Call a function of the module in a child; it returns something of which JSON can be made.

        Args:
            function: its name.
            kill_after: kill the child after it has told this `progress`.
            delay: seconds between the two.
            arguments: of the function.
        """
        request = {"function": function, "arguments": arguments, "kill_after": kill_after, "delay": delay}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the fork server is gone; its error is above"
        return _ended(**json.loads(answer))


def run_in_new_process(module: str, function: str, **arguments: Any) -> Ended:
    """The same in a process that has nothing in common with any other."""
    with tempfile.TemporaryFile() as log:
        request = json.dumps({"function": function, "arguments": arguments})
        process = _python("work", module, request, stdout=subprocess.PIPE, stderr=log, text=True)
        told = [json.loads(line) for line in process.communicate()[0].splitlines()]
        return _ended(process.returncode, told, _text(log))


def serve(module: str) -> None:
    """The fork server: requests and answers are lines of JSON."""
    answers = _own_stdout()
    functions = importlib.import_module(module)
    functions.prepare()
    # Children need not look for garbage among all that was imported.
    gc.freeze()
    tasks = Path("/proc/self/task")
    threads = len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()
    assert threads == 1, f"a process must have one thread to be forked, not {threads}"
    with open(answers, "w") as pipe:
        for line in sys.stdin:
            pipe.write(json.dumps(_fork(functions, **json.loads(line))) + "\n")
            pipe.flush()


def work(module: str, request: str) -> None:
    """A process for one part."""
    report = _own_stdout()
    _work(importlib.import_module(module), report, **json.loads(request))


def _own_stdout() -> int:
    """Standard output for ourselves alone: what else is printed goes to standard error."""
    own = os.dup(1)
    os.dup2(2, 1)
    return own


def _python(function: str, *arguments: str, **streams: Any) -> subprocess.Popen[Any]:
    code = f"import sys; from kills import runs; runs.{function}(*sys.argv[1:])"
    own = {
        # What is imported must be what the test imports.
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)]),
        # Threads do not survive a fork: neither a pool for numbers nor the one that Arrow's memory allocator starts.
        "OMP_NUM_THREADS": "1",
        "JE_ARROW_MALLOC_CONF": "background_thread:false",
    }
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env={**os.environ, **own}, **streams)


def _fork(
    functions: Any, function: str, arguments: Mapping[str, Any], kill_after: str | None, delay: float
) -> dict[str, Any]:
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as log:
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            _work(functions, writing, function, arguments)
        os.close(writing)
        told = []
        with open(reading) as lines:
            for line in lines:
                told.append(json.loads(line))
                if kill_after is not None and told[-1] == {"progress": kill_after}:
                    time.sleep(delay)
                    os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        return {"returncode": os.waitstatus_to_exitcode(status), "told": told, "log": _text(log)}


_report = -1


def _work(functions: Any, report: int, function: str, arguments: Mapping[str, Any]) -> NoReturn:
    global _report
    _report = report
    code = 1
    try:
        _tell("result", getattr(functions, function)(**arguments))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Without what Python does at its end, which belongs to the parent.
        os._exit(code)


def _tell(kind: str, value: Any) -> None:
    with open(_report, "w", closefd=False) as pipe:
        pipe.write(json.dumps({kind: value}) + "\n")


def _text(log: BinaryIO | Any) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")


def _ended(returncode: int, told: Sequence[Mapping[str, Any]], log: str) -> Ended:
    assert returncode in (0, -signal.SIGKILL), f"a part of a run failed (status {returncode}):\n{log}"
    results = [entry["result"] for entry in told if "result" in entry]
    return Ended(killed=returncode != 0, result=results[-1] if returncode == 0 else None, log=log)


# --- in the process that dies


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL cannot be survived")


def progress(what: str) -> None:
    """Tell the parent, which may have been waiting for it to kill this process."""
    _tell("progress", what)


def wait_to_be_killed() -> NoReturn:
    signal.alarm(60)  # by default it ends the process: one whose parent is gone must not wait for ever
    signal.pause()
    raise AssertionError("there is no handler after which pause() returns")


def die_in(owner: Any, name: str, doomed: Callable[..., bool], *, after: bool = False) -> None:
    """Die when a function is called with doomed arguments, before it does anything or after it has done all."""
    function = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        dies = doomed(*args, **kwargs)
        if dies and not after:
            die()
        result = function(*args, **kwargs)
        if dies:
            die()
        return result

    setattr(owner, name, call)


def die_appending(filename: str, doomed: Callable[[Any], bool], written: Callable[[int], int]) -> None:
    """Die when a doomed object is appended to a file of JSON lines, of whose n bytes `written(n)` get there."""
    real_open = builtins.open

    class Dies(io.FileIO):
        def write(self, data: Any) -> int:
            line = bytes(data)
            if not doomed(json.loads(line)):
                return super().write(line)
            super().write(line[: written(len(line))])
            die()

    def open_to_die(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "a" in mode and not isinstance(file, int) and os.path.basename(file) == filename:
            return Dies(file, mode.replace("b", ""))
        return real_open(file, mode, *args, **kwargs)

    builtins.open = open_to_die


def die_recording(place: str, number: int, callback: Any, now: Callable[..., bool]) -> None:
    """Die at a place that callbacks of both Trainers come to.

    Args:
        place: "half of the line" (of the trajectory), "all but its end of the checkpoint line", "all of …"; "before
            replacing", "after replacing" one of the callback's files; "before …", "after …" an event of the callback.
        number: the step of the line, or how often a file has been replaced.
        callback: whose event it is.
        now: whether the training is at the step to die at, for events.
    """
    replaced = 0

    def is_replaced(*args: Any) -> bool:
        nonlocal replaced
        replaced += os.path.basename(args[-1]).startswith("ib_")
        return replaced == number

    how_much = {"half": lambda n: n // 2, "all but its end": lambda n: n - 1, "all": lambda n: n}
    what, _, where = place.partition(" of the ")
    if where:
        filename = {"line": TRAJECTORY, "checkpoint line": CHECKPOINTS}[where]
        die_appending(filename, lambda entry: entry["step"] == number, how_much[what])
        return
    when, _, event = place.partition(" ")
    assert when in ("before", "after"), place
    if event == "replacing":
        die_in(os, "replace", is_replaced, after=when == "after")
    else:
        die_in(callback, event, now, after=when == "after")


def die_measuring(block: Any, now: Callable[..., bool]) -> None:
    """Die in a forward pass of the probe, the second of a measurement, when it comes to this block."""
    forwards = 0

    def forward(block: Any, inputs: Any) -> None:
        nonlocal forwards
        if not block.training and now():
            forwards += 1
            if forwards == 2:
                die()

    block.register_forward_pre_hook(forward)


def with_made_up_entropy() -> None:
    """All is measured but the entropy: it rises until step 9 and falls from there, whatever the version of torch.

    Rules that watch it, and no loss, select and stop at known steps; that a checkpoint holds what it says is seen from
    all the rest.
    """
    measure = ib.Meter.measure

    def measure_all_but_one(meter: ib.Meter, model: Any, *, step: Any = None) -> ib.Measurement:
        return replace(measure(meter, model, step=step), entropy=0.5 - abs(step - BEST) / 100)

    ib.Meter.measure = measure_all_but_one  # type: ignore[method-assign]


def ending(callback: Any) -> dict[str, Any]:
    """What a callback knows of its run at the end."""
    decision, selected = callback.decision, callback.selected
    return {
        "points": [without_timings(point.to_dict()) for point in callback.trajectory],
        "decision": [decision.stop, decision.reason.value, decision.message] if decision is not None else None,
        "selected": [selected.step, selected.value, str(selected.path)] if selected is not None else None,
    }


# --- what is left behind


def without_timings(point: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in point.items() if name not in _TIMINGS}


def points_in(directory: Path) -> list[dict[str, Any]]:
    """The trajectory as it is on the disk, every line of which must be whole."""
    return [without_timings(json.loads(line)) for line in (directory / TRAJECTORY).read_bytes().splitlines()]


def complete_lines(path: Path) -> set[bytes]:
    """Lines of a file of JSON lines, a torn one left out. Times make every line another one."""
    return {line for line in path.read_bytes().split(b"\n") if _is_json(line)} if path.exists() else set()


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


@dataclass
class KilledRun:
    """One run in one directory, part by part; each part resumes from the last whole checkpoint, if there is one.

    Attributes:
        start: starts a part: called with `directory=`, `resume=` (the checkpoint, or None) and more for the part.
        last_checkpoint: the step and the path of the one that a user would take; None if there is none.
        has_model: whether a checkpoint is one of its model: asked of its files, whatever the callback says of them.
        measure: measures a checkpoint, which was saved at a step, again.
        kills: number of parts that were killed.
        resumed: the step that each part resumed from, 0 for one that began anew.
        log: all that was printed.
    """

    directory: Path
    start: Callable[..., Ended]
    last_checkpoint: Callable[[Path], tuple[int, Path] | None]
    has_model: Callable[[Path], bool]
    measure: Callable[[str, int], Mapping[str, Any]]
    kills: int = 0
    resumed: list[int] = field(default_factory=list)
    log: str = ""
    _seen: set[bytes] = field(default_factory=set)

    def part(self, **arguments: Any) -> Ended:
        """Run the next part.

        No line of the trajectory that was there before it may be lost. What it leaves behind may be torn, but neither
        the record nor the search for files may take something torn for a checkpoint because it has its name.
        """
        last = self.last_checkpoint(self.directory)
        self.resumed.append(0 if last is None else last[0])
        resume = None if last is None else str(last[1])
        ended = self.start(directory=str(self.directory), resume=resume, **arguments)
        self.kills += ended.killed
        self.log += ended.log
        kept = set().union(*map(complete_lines, self.directory.glob("ib_trajectory*.jsonl")))
        assert not self._seen - kept, f"lost: {sorted(line[:20] for line in self._seen - kept)}"
        self._seen |= complete_lines(self.directory / TRAJECTORY)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recorded = CheckpointFile(self.directory).existing()
        for path in {*recorded.values(), *find_checkpoints(self.directory).values()}:
            assert self.has_model(path), path.name
        return ended

    def killed(self, **arguments: Any) -> None:
        """Run a part that must be killed."""
        ended = self.part(**arguments)
        assert ended.killed, f"it was not killed by {arguments}, but ended:\n{ended.log}"

    def killed_at_random(self, chance: random.Random, *, last: int) -> None:
        """Kill a part from outside, at any time from a step until three steps later, but before the last step.

        The part takes `leash=`: a step after which it waits for its death, so that a late one finds it still there.
        """
        checkpoint = self.last_checkpoint(self.directory)
        resumed = 0 if checkpoint is None else checkpoint[0]
        step = min(resumed + chance.randint(1, 4), last - 1)
        self.killed(kill_after=f"step {step}", delay=chance.uniform(0, 0.06), leash=min(step + 3, last - 1))

    def finish_like(self, uninterrupted: Mapping[str, Any], **arguments: Any) -> None:
        """Run the last part: its `ending` must be that of the uninterrupted run, on the disk as well."""
        ended = self.part(**arguments)
        assert not ended.killed, f"killed by {arguments}:\n{ended.log}"
        assert_same_ending(ended.result, uninterrupted)
        assert_same_points(points_in(self.directory), uninterrupted["points"])
        step, _, path = ended.result["selected"]
        named = CheckpointFile(self.directory).existing()
        assert named.get(step) == Path(path), f"{CHECKPOINTS} names {named}, not {path} of step {step}"
        # Measured on its own, it is not known to be off the schedule, nor what the training loss was.
        of_run = ("scheduled", "train_loss")
        selected = [
            {k: v for k, v in p.items() if k not in of_run} for p in uninterrupted["points"] if p["step"] == step
        ]
        assert_same_points([self.measure(path, step)], selected)


def assert_same_ending(run: Mapping[str, Any], uninterrupted: Mapping[str, Any]) -> None:
    """The same trajectory, timings aside, the same decision and the same selection by the same value."""
    assert_same_points(run["points"], uninterrupted["points"])
    _assert_same("decision", run["decision"], uninterrupted["decision"])
    (*found, path), (*expected, expected_path) = run["selected"], uninterrupted["selected"]
    _assert_same("selection", [*found, _name(path)], [*expected, _name(expected_path)])


def _name(path: str) -> str:
    """Of a checkpoint, without what tells it from one of the same name that a killed part left behind."""
    return re.sub(r"-v\d+(?=\.ckpt$)", "", Path(path).name)


def assert_same_points(points: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]) -> None:
    """The same steps, and at each of them the same numbers."""
    _assert_same("steps", [point["step"] for point in points], [point["step"] for point in expected])
    for found, point in zip(points, expected, strict=True):
        _assert_same(f"point at step {point['step']}", found, point)


def _assert_same(what: str, found: Any, expected: Any) -> None:
    if isinstance(found, Mapping) and isinstance(expected, Mapping):  # else hundreds of equal numbers are printed
        names = {name for name in {*found, *expected} if found.get(name) != expected.get(name)}
        found, expected = ({name: each.get(name) for name in names} for each in (found, expected))
    assert found == expected, f"another {what}: expected {expected}, got {found}"
