"""The IB curve of the tokens of a whole probe, 100 codewords: time, memory, and what ten times the work adds."""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

import ib_callback as ib
from _common import add_text_arguments, describe_machine, load_probe
from ib_callback.bound._anneal import Effort
from ib_callback.bound._joint import Joint
from ib_callback.bound.probe_curve import probe_joint

# Share of I(X;Y) by which ten times the iterations may raise the curve, and the bars for time and memory.
MOST_RAISED, MOST_SECONDS, MOST_MIB = 0.01, 60.0, 1024.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_text_arguments(parser)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--codewords", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-convergence", action="store_true", help="leave out the run of ten times the iterations")
    arguments = parser.parse_args()

    probe = load_probe(
        arguments.text, arguments.tokenizer, num_sequences=arguments.sequences, max_length=arguments.length
    )
    counts = probe_joint(probe).counts
    reduced = Joint.of(counts)
    effort = Effort.of(reduced, arguments.codewords)
    rows, columns = reduced.probability.shape
    print(describe_machine(arguments.device))
    print(
        f"{probe.num_tokens:,} tokens, joint of {counts.shape[0]:,} x {counts.shape[1]:,} with {counts.nnz:,} "
        f"non-zeros; distinct {rows:,} x {columns:,} with {reduced.probability.nnz:,}"
    )
    before = peak_mib()
    curve, wall, cpu = timed(counts, arguments)
    print(f"{curve}\n{wall:.1f} s on the wall clock, {cpu:.1f} s of processor time (bar: {MOST_SECONDS:.0f} s)")
    peak = peak_mib()
    print(f"peak memory of the process {peak:,.0f} MiB, {before:,.0f} before the curve (bar: {MOST_MIB:,.0f})")
    if arguments.no_convergence:
        return
    longer, wall, cpu = timed(counts, arguments, max_iterations=10 * effort.max_iterations, tolerance=0.0)
    at = np.linspace(0, longer.complexity[-1], 1000)
    raised = float((longer.bound(at) - curve.bound(at)).max())
    print(
        f"ten times the iterations ({wall:.0f} s, {cpu:.0f} s of processor time) raise it by at most {raised:.4f} "
        f"nats, {raised / curve.mutual_information:.2%} of I(X;Y) (bar: {MOST_RAISED:.0%})"
    )
    if raised > MOST_RAISED * curve.mutual_information:
        raise SystemExit("not converged")


def timed(counts, arguments: argparse.Namespace, **effort) -> tuple[ib.IBCurve, float, float]:
    """The curve, seconds on the wall clock, seconds of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    curve = ib.ib_curve(counts, num_codewords=arguments.codewords, device=arguments.device, **effort)
    return curve, time.perf_counter() - wall, time.process_time() - cpu


def peak_mib() -> float:
    """Peak resident memory of this process so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
