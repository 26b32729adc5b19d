"""Memory and cache of a sweep over 50 revisions of a hub, on a local server that speaks the hub's protocol.

    pip install -c constraints.txt -e ".[hf]"
    python benchmarks/sweep_memory.py

`ib-callback measure made/model --revisions 'step*' --evict` runs in a process of its own. Printed are its resident
memory when the first, the fifth, and each tenth checkpoint is done, and the most revisions whose weights were in the
cache at once, looked at a hundred times a second. The exit status is 1 if memory after the last checkpoint is over 1.05
times that after the fifth, or more than two revisions were there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import save

import ib_callback as ib
from _common import describe_machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from hub_server import Hub

NAME = "made/model"
MOST_MEMORY, MOST_REVISIONS, EARLY = 1.05, 2, 5


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=50)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=32)
    options = parser.parse_args(arguments)
    probe = ib.Probe.builtin(num_sequences=options.sequences, max_length=128)
    config = tf.GPT2Config(
        vocab_size=int(probe.input_ids.max()) + 1, n_embd=options.width, n_layer=options.layers, n_head=4,
        n_positions=128, bos_token_id=0, eos_token_id=0, architectures=["GPT2LMHeadModel"],
    )  # fmt: skip
    branches = {f"step{step}": repository(config, step) for step in range(1, options.checkpoints + 1)}
    size = len(branches["step1"]["model.safetensors"])
    with Hub(models={NAME: {"main": {}, **branches}}) as hub, tempfile.TemporaryDirectory() as folder:
        probe.save(Path(folder) / "probe.safetensors")
        memory, most, points = sweep(hub, Path(folder), options.checkpoints)
    print(describe_machine())
    print(f"{options.checkpoints} revisions with {size / 2**20:.1f} MiB of weights each, {points} points in the file")
    shown = sorted({1, EARLY, options.checkpoints, *range(10, options.checkpoints, 10)} & memory.keys())
    print("MiB after checkpoint: " + ", ".join(f"{k}: {memory[k]:.0f}" for k in shown))
    growth = memory[options.checkpoints] / memory[EARLY]
    print(f"after the last / after the fifth: {growth:.3f}, allowed {MOST_MEMORY}")
    print(f"revisions in the cache at once: {most} at most, allowed {MOST_REVISIONS}")
    return 0 if growth <= MOST_MEMORY and most <= MOST_REVISIONS and points == options.checkpoints else 1


def repository(config: tf.PretrainedConfig, seed: int) -> dict[str, bytes]:
    """The files of one revision."""
    torch.manual_seed(seed)
    weights = tf.GPT2LMHeadModel(config).state_dict()
    del weights["lm_head.weight"]  # that of the embeddings
    return {
        "config.json": json.dumps(config.to_dict()).encode(),
        "model.safetensors": save({name: value.contiguous() for name, value in weights.items()}),
    }


def sweep(hub: Hub, folder: Path, number: int) -> tuple[dict[int, float], int, int]:
    """Memory in MiB after each checkpoint, the most revisions in the cache, and the points that were written."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    results = folder / "results.jsonl"
    command = [sys.executable, "-m", "ib_callback", "measure", NAME, "--revisions", "step*", "--evict"]
    command += ["--probe", str(folder / "probe.safetensors"), "-o", str(results)]
    memory: dict[int, float] = {}
    most = 0
    done = threading.Event()

    def look() -> None:
        nonlocal most
        while not done.wait(0.01):
            there = (folder / "home" / "hub").glob("models--*/snapshots/*/model.safetensors")
            most = max(most, len(list(there)))

    watcher = threading.Thread(target=look)
    watcher.start()
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if said := re.search(rf"\[(\d+)/{number}\]", line):
                memory[int(said[1])] = resident(run.pid)
            elif "ib-callback" not in line or "not measured" in line:
                print(line, end="", file=sys.stderr)
    done.set()
    watcher.join()
    return memory, most, sum(1 for _ in results.open()) if results.exists() else 0


def resident(pid: int) -> float:
    """MiB of a process; of one that has just ended, none."""
    status = Path(f"/proc/{pid}/status").read_text()
    said = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(said[1]) / 1024 if said else float("nan")


if __name__ == "__main__":
    sys.exit(main())
