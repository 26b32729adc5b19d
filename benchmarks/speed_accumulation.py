"""Speed of quantising and accumulating, side by side with the PyPI package soft-entropy 0.1.5.

    pip install -c constraints.txt -e ".[hf]" && pip install --no-deps soft-entropy==0.1.5
    python benchmarks/speed_accumulation.py

Both sides get the same hidden states at the same 16,384 positions of real text (12 layers of 768
dimensions, 100 bins) in the same batches, with token, bigram and trigram labels of the preceding and of the
trailing context. Ours is one whole `Meter.measure` of a stand-in model that only hands over the states,
conditional entropies and mutual information included. Theirs is
`SoftEntropyAccumulator(backend="torch").update`, timed without the making of its labels, and separately the
reading of its results. The sides take turns; printed are the times and the ratio of each round.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import ib_callback as ib
from _common import (
    HEADING,
    REPLAY,
    Replay,
    Times,
    add_text_arguments,
    cut_to_positions,
    describe_machine,
    load_probe,
    ngram_codes,
    record_batches,
    valid_positions,
)

ORDERS = {"token": 1, "bigram": 2, "trigram": 3}
WIDTH = max(ORDERS.values())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument("--positions", type=int, default=16_384)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--num-bins", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="longest sequence, in tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="threads of torch; default: torch's own choice")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    from soft_entropy import SoftEntropyAccumulator

    probe = make_probe(options)
    model = Replay(int(probe.input_ids.max()) + 1, options.dim, options.layers)
    keywords = {
        "orders": tuple(ORDERS),
        "num_bins": options.num_bins,
        "batch_size": options.batch_size,
        **REPLAY,
    }
    meter = ib.Meter(probe, null=False, **keywords)
    with_null = ib.Meter(probe, null=True, **keywords)
    plan = Times()
    plan.add(meter.plan)
    with_null.plan()
    # The stand-in makes its states when it first sees a batch.
    measured = meter.measure(model)
    batches = record_batches(model, probe, **keywords)

    # Everything soft-entropy is given is made here, outside its clock.
    theirs_input = []
    for input_ids, mask in batches:
        valid = valid_positions(mask.bool(), WIDTH)
        labels = {
            f"{side} {name}": ngram_codes(input_ids, valid, order, side).numpy()
            for name, order in ORDERS.items()
            for side in ("input", "output")
        }
        theirs_input.append(([state[valid] for state in model.states(input_ids)], labels))
    handed_over = sum(len(states[0]) for states, _ in theirs_input)
    assert handed_over == measured.num_positions == options.positions, (handed_over, measured.num_positions)

    ours, ours_with_null, update, reading = Times(), Times(), Times(), Times()
    for _ in range(options.rounds):
        ours.add(lambda: meter.measure(model))
        accumulators = [
            SoftEntropyAccumulator(d=options.dim, n_bins=options.num_bins, backend="torch")
            for _ in range(options.layers)
        ]
        update.add(lambda: accumulate(accumulators, theirs_input))  # noqa: B023
        reading.add(lambda: [accumulator.mutual_information() for accumulator in accumulators])  # noqa: B023
        ours_with_null.add(lambda: with_null.measure(model))

    print(describe_machine())
    print(
        f"{handed_over} positions of {probe.name}, {options.layers} layers of {options.dim}, "
        f"{options.num_bins} bins, token + bigram + trigram, both sides, {len(batches)} batches, "
        f"{options.rounds} rounds: median (min to max)"
    )
    print(HEADING)
    print(plan.row("plan, once in a run", " s"))
    print(ours.row("ours, all of measure()", " s"))
    print(ours_with_null.row("ours, with the null", " s"))
    print(update.row("soft-entropy, update()", " s"))
    print(reading.row("soft-entropy, mutual_information()", " s"))
    print((update / ours).row("ratio, update() / ours"))
    print(((update + reading) / ours).row("ratio, (update() + reading) / ours"))


def accumulate(accumulators: list[Any], batches: list[tuple[list[Tensor], dict[str, Any]]]) -> None:
    """soft-entropy's part: every batch, every layer."""
    for states, labels in batches:
        for accumulator, z in zip(accumulators, states, strict=True):
            accumulator.update(z, labels=labels)


def make_probe(options: argparse.Namespace) -> ib.Probe:
    """A probe with exactly `options.positions` valid positions."""
    if options.text is None:
        # Without a file: as much of the built-in text as is needed.
        per_sequence = 128 - 2 * WIDTH + 1
        sequences = options.positions // per_sequence + 1
        probe = load_probe(None, options.tokenizer, num_sequences=sequences, max_length=128)
    else:
        # A third more than would do if no document were short.
        sequences = -(-options.positions * 4 // (3 * 200))
        probe = load_probe(
            options.text, options.tokenizer, num_sequences=sequences, max_length=options.length, min_length=64
        )
    return cut_to_positions(probe, options.positions, WIDTH)


if __name__ == "__main__":
    main()
