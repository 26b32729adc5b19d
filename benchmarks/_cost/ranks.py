"""Processes that share measurements, as data-parallel ranks do: each has the model, and runs some of the batches."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ib_callback as ib
from _common import ModelFolder, Times, keep_freed_memory
from _cost.models import RandomModel, load

# Seconds without an answer after which a process is taken to hang. A measurement of 128 x 512 takes a minute or two.
PATIENCE = 3600.0


@dataclass(frozen=True)
class Work:
    """What every process does; plain values, for it is sent to them."""

    model: ModelFolder | RandomModel
    tokenizer: str | None
    input_ids: torch.Tensor
    batch_size: int
    settings: Mapping[str, Any]
    device: str
    dtype: str
    threads: int
    backend: str


class Crew:
    """So many processes that wait for the word to measure, each with a model of its own.

    Those of several make a process group; on a GPU all of them use the same device. One by itself has no group.
    """

    def __init__(self, size: int, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()  # where they find each other
        self.size, self._processes, self._pipes = size, [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, str(Path(self._folder.name) / "meeting"), work, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def ready(self) -> None:
        """Wait until each has its model and plan. Raises RuntimeError with what went wrong in one."""
        self._answers()

    def measure(self) -> tuple[list[dict[str, float]], dict[str, float]]:
        """Wall clock and processor time of each in one shared measurement, and the numbers measured."""
        for pipe in self._pipes:
            pipe.send("measure")
        answers = self._answers()
        return [times for times, _ in answers], answers[0][1]

    def _answers(self) -> list[Any]:
        """One of each rank; the first failure ends it, for the others may wait for that rank."""
        found: dict[int, Any] = {}
        while len(found) < self.size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in found]
            answered = multiprocessing.connection.wait(waiting, PATIENCE)
            if not answered:
                raise RuntimeError(f"{len(waiting)} of {self.size} processes have not answered for {PATIENCE:.0f} s")
            for pipe in answered:
                rank = self._pipes.index(pipe)
                try:
                    failure, found[rank] = pipe.recv()
                except EOFError:
                    failure = "it has ended without a word"
                if failure:
                    raise RuntimeError(f"rank {rank} of {self.size}: {failure}")
        return [found[rank] for rank in range(self.size)]

    def close(self) -> None:
        """End them."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                try:
                    pipe.send("end")
                except OSError:
                    process.kill()
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def differences(one: Mapping[str, float], several: Mapping[str, float]) -> tuple[float, int]:
    """The greatest difference of two measurements' numbers, and how many were compared.

    Raises:
        ValueError: one has numbers that the other has not.
    """
    if one.keys() != several.keys():
        raise ValueError(f"only one of the two has {', '.join(sorted(one.keys() ^ several.keys()))}")
    return max(abs(one[name] - several[name]) for name in one), len(one)


def _serve(rank: int, size: int, meeting: str, work: Work, pipe: Any) -> None:
    """In a process of its own: make everything ready, then measure whenever told to."""
    try:
        torch.set_num_threads(work.threads)
        keep_freed_memory()
        if size > 1:
            torch.distributed.init_process_group(
                work.backend, init_method=f"file://{meeting}", rank=rank, world_size=size
            )
        length = work.input_ids.shape[1]
        _, model = load(work.model, work.tokenizer, device=work.device, dtype=work.dtype, length=length)
        probe = ib.Probe.from_tokens(work.input_ids)
        meter = ib.Meter(probe, batch_size=work.batch_size, **work.settings)
        meter.preflight(model)
        if work.device.startswith("cuda"):
            meter.measure(model)
        pipe.send(("", None))
        while pipe.recv() == "measure":
            spent = Times()
            measured = spent.add(lambda: meter.measure(model), work.device)
            numbers = {
                name: value for name, value in measured.metrics("").items() if name not in ("seconds", "overhead")
            }
            pipe.send(("", ({"wall": spent.wall[0], "cpu": spent.cpu[0]}, numbers)))
        if size > 1:
            torch.distributed.destroy_process_group()
    except BaseException:
        pipe.send((traceback.format_exc(), None))
        raise SystemExit(1) from None
