"""Processes that find each other, as a launcher starts them.

They are forked from a process that has imported the libraries already, for that takes longer than what most tests do
in them. Each has an environment, output and `__main__` of its own, as if it had been started anew.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import sys
import time
import traceback
import types
from pathlib import Path

# What nearly every script imports. transformers imports its models one by one, and SciPy its parts.
_IMPORTED = (
    "torch pytest ib_callback tiny_hf tiny_models torch.distributed.fsdp numpy.random scipy.interpolate scipy.optimize "
    "transformers.models.gpt2.modeling_gpt2 transformers.models.llama.modeling_llama"
).split()
_PATIENCE = 240.0


def on_two_ranks(script: str, directory: Path) -> list[str]:
    """Run a script, called with the directory and its rank, in two processes; what each of them printed."""
    return on_ranks(2, script, directory)


def on_ranks(number: int, script: str, directory: Path) -> list[str]:
    """The same in so many processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number), "NODE_RANK": "0"}
    printed = [directory / f"printed_{port}_{rank}.txt" for rank in range(number)]
    processes = [
        context.Process(
            target=_run,
            args=(script, str(directory), str(printed[rank]), {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}),
        )
        for rank in range(number)
    ]
    end = time.monotonic() + _PATIENCE
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    output = [path.read_text(errors="replace") if path.exists() else "" for path in printed]
    for path in printed:
        path.unlink(missing_ok=True)
    assert codes == [0] * number, f"{codes} (None: still running after {_PATIENCE:.0f} s)\n" + "\n".join(output)
    return output


def _run(script: str, directory: str, printed: str, environment: dict[str, str]) -> None:
    """In a process of its own: the script as its `__main__`."""
    with open(printed, "wb", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    random.seed()
    sys.argv = ["-c", directory, environment["RANK"]]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    try:
        exec(compile(script, "<string>", "exec"), main.__dict__)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # others may wait for this one, and its threads for them
    sys.stdout.flush()
