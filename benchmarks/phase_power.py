"""Power and false alarms of the rule that recognises compression, by simulation: python benchmarks/phase_power.py

A run of so many points since its fit began: the complexity rises for a third of them, and then stays (false alarms) or
falls by 5 % in a line (power). Expressivity stays. Both have Gaussian noise, independent (AR 0) or with an
autocorrelation of .5 between neighbours, in per cent of the value. The rule asks after every point, so that a number
is the share of whole runs. Takes about a minute.
"""

from __future__ import annotations

import argparse

import numpy as np

from ib_callback.results.phases import DEFAULT_RULE, KEPT
from ib_callback.results.trend import MIN_VALUES, Array, lengths, lines, needed

POINTS = (15, 30, 60, 200)
NOISE = (0.002, 0.005, 0.01, 0.02)
FALL = 0.05


def noise(shape: tuple[int, int], correlation: float, random: np.random.RandomState) -> Array:
    """[runs, points], standard deviation 1."""
    values = random.standard_normal(shape)
    for point in range(1, shape[1]):
        values[:, point] *= np.sqrt(1 - correlation**2)
        values[:, point] += correlation * values[:, point - 1]
    return values


def course(points: int, fall: float) -> Array:
    """[points] the complexity without noise."""
    rising = points // 3
    rise = 1 - 0.5 * np.exp(-4 * np.arange(rising) / rising)
    return np.concatenate([rise / rise[-1], 1 - fall * np.arange(1, points - rising + 1) / (points - rising)])


def recognised(complexity: Array, expressivity: Array) -> Array:
    """Point at which compression is recognised in each run [runs], NaN where it is not; [runs, points] each."""
    runs, points = complexity.shape
    found = np.full(runs, np.nan)
    medians = np.median(np.lib.stride_tricks.sliding_window_view(complexity, 3, axis=1), axis=2)
    expressed = np.median(np.lib.stride_tricks.sliding_window_view(expressivity, 3, axis=1), axis=2)
    for seen in range(MIN_VALUES, points + 1):
        best, end, of_end = np.zeros((3, runs))
        for length in lengths(seen):
            part = slice(seen - length, seen)
            _, last, evidence = lines(complexity[:, part])
            better = evidence > best
            best = np.where(better, evidence, best)
            end = np.where(better, last, end)
            of_end = np.where(better, lines(expressivity[:, part])[1], of_end)
        top = medians[:, : seen - 2].argmax(axis=1)
        fallen = 1 - end / medians[np.arange(runs), top]
        lost = 1 - of_end / expressed[np.arange(runs), top]
        is_sure = (best > needed(seen)) & (fallen > DEFAULT_RULE.drop) & (lost < KEPT * fallen)
        found = np.where(np.isnan(found) & is_sure, seen, found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400, help="of each cell")
    options = parser.parse_args()
    random = np.random.RandomState(0)
    print(f"{options.runs} runs a cell; % of runs in which compression is recognised; delay: median share of the fall")
    print(f"{'':>14}" + "".join(f"{f'AR {ar}, sd {100 * sd:g} %':>18}" for ar in (0.0, 0.5) for sd in NOISE))
    for points in POINTS:
        for fall, title in ((0.0, "false alarms"), (FALL, "5 % falls")):
            cells = []
            for correlation in (0.0, 0.5):
                for size in NOISE:
                    shape = (options.runs, points)
                    complexity = course(points, fall) + size * noise(shape, correlation, random)
                    found = recognised(complexity, 1 + size * noise(shape, correlation, random))
                    is_found = ~np.isnan(found)
                    text = f"{100 * is_found.mean():.1f}"
                    if fall and is_found.any():
                        after = (np.median(found[is_found]) - points // 3) / (points - points // 3)
                        text += f" ({after:.2f})"
                    cells.append(text)
            print(f"{points:>4} {title:<13}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
