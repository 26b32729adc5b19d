"""The IB curve of random joints, ours and embo's (PyPI, 1.1.0), side by side: never lower, and how much faster.

embo computes each point from three random starts at 30 equally spaced β up to 5; ours chooses its own. Times are of
processors, over all processes, as embo works in one of its own. Needs `pip install embo==1.1.0`.
"""

from __future__ import annotations

import argparse
import resource

import numpy as np

import ib_callback as ib
from _common import describe_machine

# No point of ours may be lower by more than this, in nats, at the same complexity.
TOLERANCE = 1e-4
LEAST_SPEEDUP = 20.0
SIZES = (10, 30, 100)
KINDS = {
    "uniform": lambda random, size: random.rand(size, size),
    "Dirichlet(0.2) rows": lambda random, size: random.dirichlet([0.2] * size, size) * random.rand(size, 1),
    "Dirichlet(0.05) rows": lambda random, size: random.dirichlet([0.05] * size, size) * random.rand(size, 1),
    "cubed exponentials": lambda random, size: random.exponential(size=(size, size)) ** 3,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="joints of each kind and size")
    parser.add_argument("--maxbeta", type=float, default=5.0, help="greatest β of embo")
    arguments = parser.parse_args()
    from embo import InformationBottleneck

    print(describe_machine())
    ib.ib_curve(np.eye(2) + 0.1)  # imports and first calls
    print(
        f"{'joint':24} {'size':>5} {'I(X;Y)':>7} {'lower by':>9} {'higher by':>9} {'ours':>7} {'embo':>7} {'ratio':>6}"
    )
    worst, ratios = 0.0, []
    for kind, make in KINDS.items():
        for size in SIZES:
            for seed in range(arguments.seeds):
                joint = make(np.random.RandomState(seed), size)
                started = processor_seconds()
                curve = ib.ib_curve(joint)
                ours = processor_seconds() - started
                # embo draws from NumPy's global generator, and its processes inherit it.
                np.random.seed(seed)  # noqa: NPY002
                started = processor_seconds()
                complexity, expressivity, *_ = InformationBottleneck(
                    pxy=joint.copy(), maxbeta=arguments.maxbeta
                ).get_bottleneck()
                theirs = processor_seconds() - started
                # embo's unit is the bit.
                gain = curve.bound(np.array(complexity) * np.log(2)) - np.array(expressivity) * np.log(2)
                worst = max(worst, -float(gain.min()))
                if size == max(SIZES):
                    ratios.append(theirs / ours)
                print(
                    f"{kind:24} {size:5} {curve.mutual_information:7.3f} {max(-gain.min(), 0):9.1e} "
                    f"{max(gain.max(), 0):9.1e} {ours:6.2f}s {theirs:6.2f}s {theirs / ours:6.1f}",
                    flush=True,
                )
    print(f"\nlower than embo by at most {worst:.1e} nats (allowed: {TOLERANCE:.0e})")
    median = float(np.median(ratios))
    print(f"at {max(SIZES)} x {max(SIZES)}: {median:.0f} times faster in the median, {min(ratios):.0f} at least")
    if worst > TOLERANCE or min(ratios) < LEAST_SPEEDUP:
        raise SystemExit(f"expected at most {TOLERANCE:.0e} lower and at least {LEAST_SPEEDUP:.0f} times faster")


def processor_seconds() -> float:
    """User and system time of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


if __name__ == "__main__":
    main()
