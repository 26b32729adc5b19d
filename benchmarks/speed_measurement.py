"""Cost of a whole measurement of a GPT-2-small-sized model, in units of a bare forward over the same batches.

    pip install -c constraints.txt -e ".[hf]"
    python benchmarks/speed_measurement.py --text c4.jsonl.gz --tokenizer gpt2

A: `Meter.measure`, four orders, both sides, with the null; the loss with `--loss`. B: the no-grad forward of the
trunk (all that a measurement needs of the model). C: the no-grad forward with logits for every position (what an
evaluation would run). The three take turns, A B C A B C …; printed are the medians of the ratios of each round. The
model is random: values do not change the cost. Every sequence has the full length, so that padding does not
flatter the ratio.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from collections.abc import Callable
from typing import Any

import torch

import ib_callback as ib
from _common import HEADING, Times, add_text_arguments, describe_machine, load_probe, record_batches


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loss", choices=["no", "thinned", "all"], default="no", help="measure the loss too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, help="threads of torch; default: torch's own choice")
    parser.add_argument("--profile", action="store_true", help="print where the time of one measurement goes, and stop")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.text is None:
        # The built-in text comes in sequences of at most 128 tokens.
        options.length = min(options.length, 128)
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    device = torch.device(options.device)
    model = GPT2LMHeadModel(GPT2Config()).eval().to(device, getattr(torch, options.dtype))
    probe = load_probe(
        options.text,
        options.tokenizer,
        num_sequences=options.sequences,
        max_length=options.length,
        min_length=options.length,
    )
    loss = {"no": False, "thinned": True, "all": "all"}[options.loss]
    meter = ib.Meter(probe, batch_size=options.batch_size, loss=loss)

    def measure() -> ib.Measurement:
        return meter.measure(model)

    plan = Times()
    plan.add(meter.plan)
    # Warm up: the first measurement also makes the plan and the reference points.
    measurement = measure()
    if options.profile:
        profile(measure, options.device)
        return

    batches = record_batches(model, probe, batch_size=options.batch_size)

    @torch.no_grad()
    def trunk() -> None:
        for input_ids, mask in batches:
            model.transformer(input_ids, attention_mask=mask, use_cache=False)

    @torch.no_grad()
    def with_logits() -> None:
        for input_ids, mask in batches:
            model(input_ids, attention_mask=mask, use_cache=False)

    trunk()
    with_logits()
    a, b, c = Times(), Times(), Times()
    for _ in range(options.rounds):
        a.add(measure, options.device)
        b.add(trunk, options.device)
        c.add(with_logits, options.device)

    real = int(probe.attention_mask.sum()) / probe.attention_mask.numel()
    print(describe_machine(options.device))
    print(
        f"GPT2Config() (12 layers of 768), {options.dtype}, {len(probe)} x {probe.input_ids.shape[1]} tokens "
        f"of {probe.name} ({real:.0%} real), {measurement.num_positions} valid positions, "
        f"batches of {options.batch_size}, {options.rounds} rounds: median (min to max)"
    )
    print(HEADING)
    print(plan.row("plan, once in a run", " s"))
    print(a.row("A measure()", " s"))
    print(b.row("B forward of the trunk", " s"))
    print(c.row("C forward with logits", " s"))
    print((a / b).row("ratio A / B"))
    print((a / c).row("ratio A / C"))


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
