"""Cost of a whole measurement with each of its options, in units of a bare forward over the same batches.

    pip install -c constraints.txt -e ".[hf]"
    python benchmarks/speed_measurement.py --text c4.jsonl.gz --tokenizer gpt2
    python benchmarks/speed_measurement.py --text c4.jsonl.gz --model smollm2=FOLDER:FILE.gguf --sequences 128

The unit is the no-grad forward of the trunk (all that a measurement of information needs of the model); beside it
stands the forward with logits for every position (what an evaluation would run). Measurements are of four orders, both
sides, with the null. All sides take turns within a round; printed are the medians of the ratios of each round. Memory
is what `Meter.preflight` says beside the forward, and by how much the process (on a GPU: the allocated memory) grew at
most, the forward included. Where that is glibc, memory that was freed stays with the process: to fetch fresh pages for
each large tensor took up to a third of a forward's time on a virtual machine, of all sides alike, and varied by more
than what is measured here.

Without `--model` it is a GPT-2 small with random weights: values do not change the cost. Documents are joined and cut,
so that every sequence has the full length and padding does not flatter the ratio.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import math
import pstats
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ib_callback as ib
from _common import ModelFolder, Times, add_text_arguments, describe_machine, read_texts, spread

TRUNK, LOGITS = "forward of the trunk", "forward with logits"
# Settings of a Meter, and what the ratio is held to: of the forward of the trunk, or of that with logits.
SIDES: dict[str, tuple[dict[str, Any], str]] = {
    "without baseline, loss or readout": ({"baseline": False, "loss": False, "readout": False}, ""),
    "without loss": ({"loss": False}, "1.10 of the trunk"),
    "without readout or prediction": ({"readout": False, "prediction": False}, ""),
    "default": ({}, "1.20 of the trunk"),
    'loss="all"': ({"loss": "all"}, "1.10 of that with logits"),
    "without loss, draws=4": ({"loss": False, "draws": 4}, ""),
    "without loss, center=True": ({"loss": False, "center": True}, ""),
    "without loss, standard_errors=True": ({"loss": False, "standard_errors": True}, ""),
    "without loss, companions": ({"loss": False, "companions": ("rankme",)}, ""),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument("--model", type=ModelFolder.parse, metavar="NAME=FOLDER[:FILE]", help="default: a random GPT-2")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="regular expression: sides whose name it matches")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, help="threads of torch; default: torch's own choice")
    parser.add_argument("--profile", action="store_true", help="print where the time of one measurement goes, and stop")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    tokenizer, model = load(options)
    model = model.to(torch.device(options.device), getattr(torch, options.dtype))
    probe = joined(options.text, tokenizer, options.sequences, options.length)
    sides, memory, plan = {}, {}, Times()
    for name, (keywords, _) in SIDES.items():
        if re.search(options.only, name):
            meter = ib.Meter(probe, batch_size=options.batch_size, **keywords)
            if name == "default":
                plan.add(meter.plan)
            # Warms up: it makes the plan and the reference points.
            memory[name] = meter.preflight(model).memory
            sides[name] = lambda meter=meter: meter.measure(model)
    if options.profile:
        profile(sides["default"], options.device)
        return

    batches = [
        (ids.to(options.device), mask.to(options.device, torch.long))
        for ids, mask in zip(
            probe.input_ids.split(options.batch_size), probe.attention_mask.split(options.batch_size), strict=True
        )
    ]

    def forward(module: nn.Module) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            for ids, mask in batches:
                module(ids, attention_mask=mask, use_cache=False)

        return run

    sides = {TRUNK: forward(model.base_model), LOGITS: forward(model), **sides}
    times = {name: Times() for name in sides}
    peaks = dict.fromkeys(sides, 0.0)
    for _ in range(options.rounds):
        for name, run in sides.items():
            with Peak(options.device) as peak:
                times[name].add(run, options.device)
            peaks[name] = max(peaks[name], peak.bytes)

    layers = len(ib.Meter(probe).preflight(model).layers)
    print(describe_machine(options.device))
    print(
        f"{'random GPT-2' if options.model is None else options.model.name} ({layers} layers), {options.dtype}, "
        f"{len(probe)} x {probe.input_ids.shape[1]} tokens of {probe.name}, batches of {options.batch_size}, "
        f"{options.rounds} rounds: median (least to greatest)"
    )
    print(plan.row("plan, once in a run", " s") + "\n" if plan.wall else "")
    heads = ("s", "/ trunk, wall clock", "/ trunk, processor", "/ with logits, wall", "said MiB", "grew MiB")
    print(f"{'':36}" + "".join(f"{head:>{width}}" for head, width in zip(heads, WIDTHS, strict=True)) + "  held to")
    for name, spent in times.items():
        of_trunk, of_logits = spent / times[TRUNK], spent / times[LOGITS]
        said = f"{memory[name] / 2**20:,.0f}" if name in memory else ""
        cells = (
            f"{statistics.median(spent.wall):.2f}",
            spread(of_trunk.wall),
            spread(of_trunk.cpu),
            spread(of_logits.wall),
            said,
            f"{peaks[name] / 2**20:,.0f}",
        )
        held = SIDES[name][1] if name in SIDES else ""
        print(f"{name:36}" + "".join(f"{c:>{w}}" for c, w in zip(cells, WIDTHS, strict=True)) + f"  {held}")


WIDTHS = (9, 24, 24, 24, 10, 10)


def load(options: argparse.Namespace) -> tuple[Any, nn.Module]:
    """Tokenizer (None: that of the built-in text) and model."""
    if options.model is not None:
        return options.model.load()
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    tokenizer = None if options.tokenizer is None else AutoTokenizer.from_pretrained(options.tokenizer)
    return tokenizer, GPT2LMHeadModel(GPT2Config()).eval()


def joined(text: Path | None, tokenizer: Any, num_sequences: int, length: int) -> ib.Probe:
    """Documents one behind the other, cut into whole sequences. Raises SystemExit if they are too short."""
    if text is None:
        documents = ib.Probe.builtin(tokenizer)
    elif tokenizer is None:
        raise SystemExit("--text needs --tokenizer or --model: the built-in tokenizer knows the built-in text only")
    else:
        documents = ib.Probe.from_texts(read_texts(text), tokenizer, max_length=length, name=text.name)
    tokens = documents.input_ids[documents.attention_mask.bool()]
    if len(tokens) < num_sequences * length:
        raise SystemExit(f"the text has {len(tokens)} tokens, {num_sequences} x {length} are needed: give a longer one")
    return ib.Probe.from_tokens(tokens[: num_sequences * length].view(num_sequences, length), name=documents.name)


def keep_freed_memory() -> None:
    """Take all memory from the heap, and give none back, where the C library is glibc."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        trim_threshold, mmap_max = -1, -4  # malloc.h
        set_option(trim_threshold, 2**31 - 1)
        set_option(mmap_max, 0)


class Peak:
    """By how many bytes memory grew at most within a block: of the process (Linux), or what a GPU has allocated."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._known = Path("/proc/self/clear_refs").exists()
        self.bytes = math.nan

    def __enter__(self) -> Peak:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif self._known:
            ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would hide what is used again
            Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
            self._before = self._status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self._before
        elif self._known:
            self.bytes = self._status("VmHWM") - self._before

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def profile(measure: Callable[[], Any], device: str) -> None:
    """Print the operators and the Python functions in which one measurement spends its time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    order = "self_cpu_time_total"
    if device.startswith("cuda"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        order = "self_cuda_time_total"
    with torch.profiler.profile(activities=activities) as profiler:
        Times().add(measure, device)
    print(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=50))
    functions = cProfile.Profile()
    functions.runcall(Times().add, measure, device)
    pstats.Stats(functions).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    main()
