"""Memory of measurements: what is predicted and what is taken, and what a probe of the paper's scale needs.

`peaks`: measurements of a model with random weights, each in a process of its own. Resident memory at its peak, above
what model, imports and a small measurement left before, and above what a forward takes, is compared with
`Preflight.memory`.
`paper`: the plan of 10,000 x 512 tokens with several settings: slots, bytes by part, passes, time, memory of planning.
`time`: processor time of a measurement of 333 and of 30 times as many sequences, narrow layers.
`file`: the paper's plan written to a file and read by another process.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ib_callback as ib
from _common import describe_machine, load_probe

GB = 1e9
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"baseline": False, "readout": False, "prediction": False, "loss": False},
    "default": {},
    "draws": {"draws": 4},
    "centred": {"center": True},
    "errors": {"standard_errors": True},
    "features": {"orders": "token", "features": ["part"]},
    "groups": {"memory_budget": "250 MB"},
}
PAPER: dict[str, dict[str, Any]] = {
    "plain": {"baseline": False},
    "+ baseline (the default)": {},
    "+ draws=5": {"draws": 5},
    "+ standard_errors": {"standard_errors": True},
    "+ memory_budget=8GiB": {"memory_budget": "8GiB"},
    "on each of 8 ranks": {"ranks": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("peaks", "paper", "time", "file"))
    parser.add_argument("--probe", type=Path, help="a probe file (ib-callback probe build); without, the built-in text")
    parser.add_argument("--sequences", type=int, help="of the probe; default 333, for `paper` and `file` all")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(CASES[options.what](options)))
        return
    print(describe_machine())
    REPORTS[options.what](options)


def alone(options: argparse.Namespace, case: str, **changes: Any) -> dict[str, Any]:
    """What a case comes to, in a process of its own."""
    given = vars(options) | changes | {"case": case}
    command = [sys.executable, __file__, given["what"]]
    for name in ("probe", "sequences", "layers", "width", "case"):
        command += [f"--{name}", str(given[name])] if given[name] is not None else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def probe_of(options: argparse.Namespace, number: int | None) -> ib.Probe:
    """The first sequences, with a label that is a function of the sequence."""
    if options.probe is None:
        whole = load_probe(None, None, num_sequences=number or 333, max_length=128)
    else:
        whole = ib.Probe.load(options.probe)
    number = len(whole) if number is None else min(number, len(whole))
    ids, mask = whole.input_ids[:number], whole.attention_mask[:number]
    import torch

    part = (torch.arange(number) % 8)[:, None].expand(ids.shape)
    return ib.Probe.from_tokens(ids, mask, labels={"part": part}, name="benchmark")


def model_of(options: argparse.Namespace, probe: ib.Probe) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=max(1000, int(probe.input_ids.max()) + 1),
        hidden_size=options.width,
        intermediate_size=2 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=probe.input_ids.shape[1],
    )
    return transformers.LlamaForCausalLM(config).eval()


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process now; "VmHWM" for the most since `forget_peak`. Linux."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key + ":"))
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# --- peaks


def peaks(options: argparse.Namespace) -> None:
    print(f"{'settings':<12}{'passes':>8}{'predicted MiB':>16}{'taken MiB':>12}{'ratio':>8}")
    for case in SETTINGS:
        found = alone(options, case)
        ratio = found["taken"] / found["predicted"]
        predicted, taken = (found[name] / 2**20 for name in ("predicted", "taken"))
        print(f"{case:<12}{found['passes']:>8}{predicted:>16,.0f}{taken:>12,.0f}{ratio:>8.2f}", flush=True)


def peak(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ib_callback.measuring.plan.memory import let_go

    settings = {"features": []} | SETTINGS[options.case]
    probe = probe_of(options, options.sequences or 333)
    model = model_of(options, probe)
    few = ib.Probe.from_tokens(
        probe.input_ids[:16], probe.attention_mask[:16], labels={"part": probe.labels["part"][:16]}
    )
    ib.Meter(few, **settings).measure(model)
    let_go()
    before = resident()
    forget_peak()
    with torch.no_grad():
        model(probe.input_ids[:8], logits_to_keep=1)
    forward = resident("VmHWM") - before
    meter = ib.Meter(probe, **settings)
    preflight = meter.preflight(model)
    forget_peak()
    meter.measure(model)
    taken = resident("VmHWM") - before - forward
    return {"passes": preflight.passes, "predicted": preflight.memory, "taken": taken, "forward": forward}


# --- paper


def paper(options: argparse.Namespace) -> None:
    options.layers = 32
    print(f"{'':<26}{'labels':>12}{'slots':>11}{'GB':>7}{'slots GB':>10}{'passes':>8}{'adding s':>10}", end="")
    print(f"{'plan MiB':>10}{'planning s':>12}{'peak MiB':>10}{'left MiB':>10}")
    for case in PAPER:
        found = alone(options, case)
        print(f"{case:<26}{found['labels']:>12,}{found['slots']:>11,}{found['memory'] / GB:>7.1f}", end="")
        print(f"{found['bytes']['slots'] / GB:>10.1f}{found['passes']:>8}{found['seconds']:>10,.0f}", end="")
        print(f"{found['bytes']['plan'] / 2**20:>10,.0f}{found['planning']:>12.0f}", end="")
        print(f"{found['peak'] / 2**20:>10,.0f}{found['left'] / 2**20:>10,.0f}", flush=True)
        print("   ", ", ".join(f"{name} {each / GB:.2f}" for name, each in found["bytes"].items()), flush=True)


def planned(options: argparse.Namespace) -> dict[str, Any]:
    settings = dict(PAPER[options.case])
    ranks = settings.pop("ranks", 1)
    probe = probe_of(options, options.sequences)
    meter = ib.Meter(probe, features=[], **settings)
    gc.collect()
    before, cpu = resident(), time.process_time()
    forget_peak()
    meter.plan()
    cpu = time.process_time() - cpu
    peak, left = resident("VmHWM") - before, resident() - before
    summary = meter.plan_summary(num_layers=options.layers, num_ranks=ranks)
    print(summary, file=sys.stderr)
    return {
        "labels": summary.labels,
        "slots": summary.slots,
        "memory": summary.memory,
        "bytes": dict(summary.bytes_by_part),
        "passes": summary.passes,
        "seconds": summary.seconds,
        "planning": cpu,
        "peak": peak,
        "left": left,
    }


# --- time


def times(options: argparse.Namespace) -> None:
    found = {number: alone(options, str(number)) for number in (333, 9990)}
    for number, each in found.items():
        print(
            f"{number:>6} sequences: {each['seconds']:,.1f} s of processor time, {each['tokens']:,} tokens", flush=True
        )
    few, many = found.values()
    tokens, seconds = many["tokens"] / few["tokens"], many["seconds"] / few["seconds"]
    print(f"{tokens:.1f} times the tokens: {seconds:.1f} times the time")


def timed(options: argparse.Namespace) -> dict[str, Any]:
    probe = probe_of(options, int(options.case))
    model = model_of(options, probe)
    meter = ib.Meter(probe, features=[])
    meter.preflight(model)
    started = time.process_time()
    meter.measure(model)
    return {"seconds": time.process_time() - started, "tokens": int(probe.attention_mask.sum())}


# --- file


def files(options: argparse.Namespace) -> None:
    from ib_callback.measuring.plan.file import shared_plan

    meter = ib.Meter(probe_of(options, options.sequences), features=[])
    plan = meter.plan()
    started = time.perf_counter()
    with shared_plan(plan) as path:
        written = time.perf_counter() - started
        print(f"written in {written:.1f} s, {path.stat().st_size / 2**20:,.0f} MiB")
        found = alone(options, str(path))
    own, used, shared = (f"{found[name] / 2**20:,.0f} MiB" for name in ("own", "used", "shared"))
    print(
        f"read by another process in {found['seconds']:.2f} s: {own} of its own memory; when all was looked at {used},"
    )
    print(f"and {shared} of pages that are the file's")


def read_by_another(options: argparse.Namespace) -> dict[str, Any]:
    from ib_callback.measuring.plan.file import read_plan

    gc.collect()
    before, shared = resident("RssAnon"), resident("RssFile")
    started = time.perf_counter()
    plan = read_plan(options.case)
    seconds, own = time.perf_counter() - started, resident("RssAnon") - before
    sum(int(batch.members.sum()) + int(batch.positions.sum()) + int(batch.kept_target.sum()) for batch in plan.batches)
    return {
        "seconds": seconds,
        "own": own,
        "used": resident("RssAnon") - before,
        "shared": resident("RssFile") - shared,
    }


REPORTS = {"peaks": peaks, "paper": paper, "time": times, "file": files}
CASES = {"peaks": peak, "paper": planned, "time": timed, "file": read_by_another}


if __name__ == "__main__":
    main()
