"""Runs every example of a trainer as its user would, reads back what it wrote, and prints a table.

python .ci/clients.py [NAME …]    # in an environment that has the trainers; .ci/clients makes one
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
# The package whose version is shown, and the arguments of the script.
CLIENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "integrations/hf_trainer.py": ("transformers", ()),
    "integrations/trl_sft.py": ("trl", ()),
    "integrations/trl_dpo.py": ("trl", ()),
    "integrations/trl_grpo.py": ("trl", ()),
    "integrations/peft_lora.py": ("peft", ()),
    "integrations/accelerate_launch.py": ("accelerate", ()),
    "integrations/hyperparameter_search.py": ("optuna", ()),
    "integrations/lightning_plain.py": ("lightning", ()),
    "integrations/lightning_cli.py": ("jsonargparse", ()),
    "integrations/olmo_core_trainer.py": ("ai2-olmo-core", ()),
    "fabric_loop.py": ("lightning", ("41",)),
    "plain_loop.py": ("torch", ("41",)),
}
# These scripts run twice, with the callback and without, and the weights have to be the same bits. Left out are
# hf_trainer.py, because it lets the Trainer judge by a number of the callback, and loops, because they call the run.
COMPARED = set(CLIENTS) - {"integrations/hf_trainer.py", "fabric_loop.py", "plain_loop.py"}
MOST_SECONDS = 600


def run_and_hash(script: str, *, without: bool) -> None:
    """Run a script in this process, with or without measurements, and print a digest of all parameters at its end."""
    import gc

    import torch

    sys.path.insert(0, str(Path(script).parent))
    if without:
        import ib_callback.run.run
        from ib_callback.hf import IBCallback as OfTransformers
        from ib_callback.lightning import IBCallback as OfLightning

        for callback in (OfTransformers, OfLightning):
            for name in [n for n in vars(callback) if n.startswith("on_") or n in ("setup", "teardown", "state_dict")]:
                delattr(callback, name)  # the base class does nothing at that event
        ib_callback.run.run.Run.step = lambda *_, **__: None
    gc.disable()  # models that the script has let go of count as well
    sys.argv = [script]
    kept = runpy.run_path(script, run_name="__main__")  # its models live as long as this
    parameters = [p for p in gc.get_objects() if isinstance(p, torch.nn.Parameter)]
    if not kept or not parameters:
        raise RuntimeError("the script left no model behind")
    digests = {hashlib.sha256(p.detach().double().numpy().tobytes()).hexdigest() for p in parameters}
    print(f"parameters: {len(digests)} {hashlib.sha256(' '.join(sorted(digests)).encode()).hexdigest()}")


def call(arguments: tuple[str, ...], folder: Path) -> tuple[str, float]:
    """What a Python process in `folder` prints, and how many seconds it takes.

    Raises:
        RuntimeError: it fails or takes too long.
    """
    start = time.monotonic()
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    try:
        done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True,
                              timeout=MOST_SECONDS, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took more than {MOST_SECONDS} s") from None
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return done.stdout, time.monotonic() - start


def points(folder: Path) -> int:
    """The number of points below a folder, of which each trajectory has two or more, without error and with a loss.

    Raises:
        RuntimeError: there is no trajectory, or one that is not as it should be.
    """
    import ib_callback as ib

    files = sorted(folder.rglob("ib_trajectory.jsonl"))
    if not files:
        raise RuntimeError("no ib_trajectory.jsonl")
    found = 0
    for file in files:
        trajectory = ib.Trajectory.load(file)
        for point in trajectory:
            if point.error is not None or point.loss is None or not math.isfinite(point.loss):
                raise RuntimeError(f"step {point.step}: error {point.error}, loss {point.loss}")
        if len(trajectory) < 2:
            raise RuntimeError(f"{file}: expected 2 points or more, got {len(trajectory)}")
        found += len(trajectory)
    return found


def check(name: str, arguments: tuple[str, ...]) -> tuple[int, float, str]:
    """Points, seconds with the callback, and whether the weights are those of the script without it."""
    script = str(EXAMPLES / name)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        launch = LAUNCH if "launch" in name else ()
        if name not in COMPARED:
            _, seconds = call((*launch, script, *arguments), Path(first))
            return points(Path(first)), seconds, "-"
        printed, seconds = call((*launch, __file__, "--with", script), Path(first))
        found = points(Path(first))
        other, _ = call((*launch, __file__, "--without", script), Path(second))
        if list(Path(second).rglob("ib_trajectory.jsonl")):
            raise RuntimeError("the run without the callback has measured")
        # Two processes print two lines, in any order.
        hashes = [sorted(re.findall(r"parameters: .*", text)) for text in (printed, other)]
        if not hashes[0] or hashes[0] != hashes[1]:
            raise RuntimeError(f"the weights differ with and without the callback: {hashes}")
        return found, seconds, "equal"


def main(chosen: list[str]) -> int:
    """Run all, or those whose name contains one of `chosen`; 1 if any failed."""
    failures = []
    print(f"{'example':38} {'package':14} {'version':10} {'points':>6} {'seconds':>8}  {'weights':8} ok", flush=True)
    for name, (package, arguments) in CLIENTS.items():
        if chosen and not any(part in name for part in chosen):
            continue
        found, seconds, weights, ok = 0, 0.0, "-", "yes"
        try:
            found, seconds, weights = check(name, arguments)
        except RuntimeError as error:
            failures.append(f"{name}: {error}")
            ok = "NO"
        version = importlib.metadata.version(package)
        print(f"{name:38} {package:14} {version:10} {found:6} {seconds:8.1f}  {weights:8} {ok}", flush=True)
    for failure in failures:
        print(f"\n{failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    if sys.argv[1:2] in (["--with"], ["--without"]):
        run_and_hash(sys.argv[2], without=sys.argv[1] == "--without")
    else:
        sys.exit(main(sys.argv[1:]))
