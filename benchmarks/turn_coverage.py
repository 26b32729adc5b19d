"""How often the interval of a turn holds the true one, and how often p-values of no trend are small, by simulation.

`python benchmarks/turn_coverage.py`, about six minutes; `--only p`, the p-values alone, 45 seconds. Courses rise and
then fall by 15 % of their height: in two lines, in a steep bend and a line, or in two bends (flat about the maximum).
Their turn lies anywhere between a quarter
and three fifths of the points. Noise, in shares of the height, is independent (AR 0) or has an autocorrelation of .5.
A cell is the share of intervals that hold the turn, and their median width as a share of the course.
Of p-values a cell is the share of series without a trend with p < .05, for r and for ρ: .05 were exact.
"""

from __future__ import annotations

import argparse

import numpy as np

from ib_callback.analysis.peak import find_peak
from ib_callback.analysis.step_correlation import step_correlation
from ib_callback.results.trend import Array

POINTS = (12, 25, 60)
NOISE = (0.003, 0.01, 0.03)
CORRELATIONS = (0, 0.5, 0.8)
SHAPES = ("two lines", "bend and line", "two bends")


def noise(points: int, correlation: float, random: np.random.RandomState) -> Array:
    """[points], standard deviation 1."""
    values = random.standard_normal(points)
    for point in range(1, points):
        values[point] = correlation * values[point - 1] + np.sqrt(1 - correlation**2) * values[point]
    return values


def course(shape: str, at: Array, turn: float) -> Array:
    """[points] without noise, 1 at the turn."""
    rise = 0.6 * (turn - at) if shape == "two lines" else 0.8 * ((turn - at) / turn) ** 2
    fall = 0.15 * ((at - turn) / (1 - turn)) ** (2 if shape == "two bends" else 1)
    return 1 - np.where(at < turn, rise, fall)


def coverage(shape: str, points: int, size: float, correlation: float, runs: int, seed: int = 0) -> tuple[float, float]:
    """Share of intervals that hold the turn, and their median width."""
    random = np.random.RandomState(seed)
    at = np.linspace(0, 1, points)
    held, widths = 0, []
    for _ in range(runs):
        turn = random.uniform(0.25, 0.6)
        peak = find_peak(course(shape, at, turn) + size * noise(points, correlation, random), at.tolist())
        assert peak is not None
        low, high = at[max(peak.first - 1, 0)], at[min(peak.last + 1, points - 1)]
        held += low <= turn <= high
        widths.append(high - low)
    return held / runs, float(np.median(widths))


def false_alarms(points: int, correlation: float, runs: int, seed: int = 0) -> tuple[float, float]:
    """Shares of series without a trend whose r, and whose ρ, have p < .05."""
    random = np.random.RandomState(seed)
    found = [step_correlation(range(points), noise(points, correlation, random)) for _ in range(runs)]
    alarms = [[p is not None and p < 0.05 for p in (each.pearson_p, each.spearman_p)] for each in found]
    of_r, of_rho = np.mean(alarms, axis=0).tolist()
    return of_r, of_rho


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300, help="courses in a cell of the turns")
    parser.add_argument("--series", type=int, default=4000, help="series in a cell of the p-values")
    parser.add_argument("--only", choices=("turns", "p"), help="one of the tables")
    options = parser.parse_args()
    if options.only != "p":
        print_turns(options.runs)
    if options.only != "turns":
        print_false_alarms(options.series)


def print_turns(runs: int) -> None:
    """A table of how often the turn is held, and how wide the intervals are."""
    print("| course | points |" + "".join(f" AR {a}, noise {s} |" for a in (0, 0.5) for s in NOISE))
    print("|---" * (2 + 2 * len(NOISE)) + "|")
    for shape in SHAPES:
        for points in POINTS:
            cells = [coverage(shape, points, size, a, runs) for a in (0, 0.5) for size in NOISE]
            print(f"| {shape} | {points} |" + "".join(f" {held:.2f}, {wide:.2f} |" for held, wide in cells), flush=True)


def print_false_alarms(series: int) -> None:
    """A table of how often p < .05 comes without a trend."""
    print("\n| points |" + "".join(f" AR {a}: r, ρ |" for a in CORRELATIONS))
    print("|---" * (1 + len(CORRELATIONS)) + "|")
    for points in (8, 12, 20, 40, 100):
        cells = [false_alarms(points, a, series) for a in CORRELATIONS]
        print(f"| {points} |" + "".join(f" {r:.3f}, {rho:.3f} |" for r, rho in cells), flush=True)


if __name__ == "__main__":
    main()
