"""Agreement with the PyPI package soft-entropy 0.1.5, given the same points, temperature and labels.

    pip install -c constraints.txt -e ".[hf]" && pip install --no-deps soft-entropy==0.1.5
    python benchmarks/agreement_soft_entropy.py

Both packages draw their own reference points and solve the temperature in their own way (soft-entropy
bounds the divergence, this package computes it exactly), so its `w` and `temp` are set to ours; what is
compared is all the rest: quantisation, histograms per label, conditional entropies, mutual information. The
exit status is 1 on disagreement.
"""

from __future__ import annotations

import argparse
import sys

import ib_callback as ib
from _common import (
    REPLAY,
    Replay,
    add_text_arguments,
    cut_to_positions,
    describe_machine,
    load_probe,
    ngram_codes,
    valid_positions,
)

ORDERS = {"token": 1, "bigram": 2, "trigram": 3}
# soft-entropy sums and takes logarithms in float32, which is what limits the agreement.
TOLERANCE = 2e-6


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--num-bins", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args(arguments)
    from soft_entropy import SoftEntropyAccumulator

    width = max(ORDERS.values())
    sequences = -(-options.positions // 16)
    probe = load_probe(options.text, options.tokenizer, num_sequences=min(sequences, 128), max_length=128)
    probe = cut_to_positions(probe, options.positions, width)
    model = Replay(int(probe.input_ids.max()) + 1, options.dim, options.layers)
    meter = ib.Meter(
        probe,
        orders=tuple(ORDERS),
        null=False,
        num_bins=options.num_bins,
        batch_size=options.batch_size,
        **REPLAY,
    )
    measured = meter.measure(model)

    points = ib.reference_points(options.dim, options.num_bins)
    temperature = ib.calibrated_temperature(options.dim, options.num_bins)
    valid = valid_positions(probe.attention_mask.bool(), width)
    labels = {
        f"{side} {name}": ngram_codes(probe.input_ids, valid, order, side)
        for name, order in ORDERS.items()
        for side in ("input", "output")
    }
    states = [state[valid] for state in model.states(probe.input_ids)]

    worst = {"Meter": 0.0, "SoftHistogram": 0.0}
    for layer, z in enumerate(states):
        theirs = SoftEntropyAccumulator(d=options.dim, n_bins=options.num_bins, backend="torch")
        theirs.w = points.to(theirs.w)
        theirs.temp = temperature
        theirs.update(z, labels={name: codes.numpy() for name, codes in labels.items()})
        entropy, information = theirs.entropy(), theirs.mutual_information()
        compare(worst, "Meter", f"layer {layer} H(Z)", measured.entropy_by_layer[layer], entropy)
        for name, order_labels in labels.items():
            side, order = name.split()
            point = measured[order]
            by_layer = point.complexity_by_layer if side == "input" else point.expressivity_by_layer
            compare(worst, "Meter", f"layer {layer} {name}", by_layer[layer], information[name])
            distinct, compact = order_labels.unique(return_inverse=True)
            ours = ib.SoftHistogram(options.dim, len(distinct), num_bins=options.num_bins)
            ours.update(z, compact)
            compare(worst, "SoftHistogram", f"layer {layer} H(Z)", ours.entropy(), entropy)
            compare(worst, "SoftHistogram", f"layer {layer} {name}", ours.mutual_information(), information[name])

    print(describe_machine())
    print(f"{options.positions} positions, {options.layers} layers of {options.dim}, {options.num_bins} bins")
    for name, difference in worst.items():
        verdict = "agrees" if difference <= TOLERANCE else "DISAGREES"
        print(f"{name:14} {verdict}: greatest |difference| {difference:.2e}, allowed {TOLERANCE:.0e}")
    return 0 if all(difference <= TOLERANCE for difference in worst.values()) else 1


def compare(worst: dict[str, float], name: str, what: str, ours: float, theirs: float) -> None:
    difference = abs(float(ours) - theirs)
    if not difference <= TOLERANCE:
        print(f"{name}, {what}: {float(ours):.8f}, soft-entropy {theirs:.8f}")
    worst[name] = max(worst[name], difference) if difference == difference else float("inf")


if __name__ == "__main__":
    sys.exit(main())
