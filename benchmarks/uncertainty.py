"""What standard errors cost: a measurement with them and without, taking turns.

    pip install -c constraints.txt -e ".[hf]"
    python benchmarks/uncertainty.py --text c4.jsonl.gz --tokenizer gpt2 --sequences 64

A: `Meter.measure` of a GPT-2-small-sized model (random: values do not change the cost), four orders, both sides, null.
B: the same with `standard_errors`. Printed are the ratio B / A of each round, the memory that both need beside the
forward pass, how long the plan takes, and that the numbers themselves are the same.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch

import ib_callback as ib
from _common import HEADING, Times, add_text_arguments, describe_machine, load_probe
from ib_callback.results.metrics import PLANE_SCALARS


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch; default: torch's own choice")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.text is None:
        # The built-in text comes in sequences of at most 128 tokens.
        options.length = min(options.length, 128)
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=options.layers, n_embd=options.width, n_head=options.width // 64)
    model = GPT2LMHeadModel(config).eval().to(options.device)
    probe = load_probe(options.text, options.tokenizer, num_sequences=options.sequences, max_length=options.length)
    meters = {
        name: ib.Meter(probe, batch_size=options.batch_size, standard_errors=groups)
        for name, groups in (("A", False), ("B", options.groups))
    }
    plans = {name: Times() for name in meters}
    for name, meter in meters.items():
        plans[name].add(meter.plan)
    # Warm up: the first measurement also makes the plan and the reference points.
    points = {name: meter.measure(model) for name, meter in meters.items()}
    times = {name: Times() for name in meters}
    for _ in range(options.rounds):
        for name, meter in meters.items():
            times[name].add(lambda meter=meter: meter.measure(model), options.device)

    print(describe_machine(options.device))
    print(
        f"{options.layers} layers of {options.width}, {len(probe)} x {probe.input_ids.shape[1]} tokens of "
        f"{probe.name}, {points['A'].num_positions} valid positions, batches of {options.batch_size}, "
        f"{options.groups} groups, {options.rounds} rounds: median (min to max)"
    )
    print(HEADING)
    for name, what in (("A", "without"), ("B", "with standard errors")):
        print(plans[name].row(f"plan {what}, once in a run", " s"))
    for name, what in (("A", "without"), ("B", "with standard errors")):
        print(times[name].row(f"{name} measure() {what}", " s"))
    print((times["B"] / times["A"]).row("ratio B / A"))
    memory = {name: meter.plan().memory(options.layers, 100) / 2**20 for name, meter in meters.items()}
    print(f"memory beside the forward pass: {memory['A']:,.0f} MiB without, {memory['B']:,.0f} MiB with")
    same = all(
        getattr(points["A"][order], name) == getattr(points["B"][order], name)
        for order in points["A"]
        for name in PLANE_SCALARS
    )
    print(f"the numbers themselves: {'bitwise the same' if same else 'NOT the same'}")
    errors = {k: round(v, 5) for k, v in dataclasses.asdict(points["B"]["token"]).items() if k.endswith("_se")}
    print(f"token order of this random model: {errors}")


if __name__ == "__main__":
    main()
