"""The search for codes, from the hard code at β → ∞ down to the code that says nothing: where to look, and how long.

A *code* T of X is an encoder p(t | x); its values t are *codewords*. A code is hard if each x has one codeword.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ib_callback.bound._hard import cluster
from ib_callback.bound._joint import Joint
from ib_callback.bound._solver import Solver, one_thread
from ib_callback.estimator.quantise import exact_float32

# Up to this number of rows, there are by default as many codewords as rows. Beyond it the encoder, which has that
# number squared of entries, would be too large.
MANY_ROWS = 4096
# Encoders of up to _FLOAT64_ENTRIES entries are float64; problems of up to _THOROUGH_ENTRIES are computed thoroughly.
# See `Effort`.
_FLOAT64_ENTRIES, _THOROUGH_ENTRIES = 1 << 12, 1 << 18
# Before β is lowered, this share of each row is spread evenly over all codewords. Otherwise codewords that have lost
# some y (p(y|t) underflows while β is high) could never take up rows with that y again.
_MIX = 0.001
# Steps are in log β.
_FIRST_BETA, _FIRST_STRIDE = 300.0, 0.5
_LEAST_STRIDE = {True: 0.001, False: 0.02}
_GREATEST_STRIDE = 1.0
_MOST_STEPS = 400
# New starts, for thorough computations and others: number along the curve, and largest number in gaps. _FRESH is the
# share of random assignment in a new start.
_NEW_STARTS = {True: (8, 40), False: (4, 4)}
_FRESH = 0.3
# Number of best hard codes from which β is lowered.
_DESCENTS = 2
# A code with less information than this, in nats, says nothing.
_NOTHING = 1e-9

Point = tuple[float, float, float]


@dataclass(frozen=True)
class Effort:
    """How exactly to compute, and for how long.

    dtype: dtype of encoders. float64 for small problems, where it costs nothing. Otherwise float32, which halves time
        and memory; it changes a code's complexity and expressivity by under 1e-5 nats, less than the steps in β do.
        Sums are always float64.
    thorough: whether the problem is small enough for an accuracy of 1e-4 nats.
    max_iterations, tolerance: as for `ib_curve`.
    starts: number of random starts of sequential clustering; the best two are used.
    partitions: number of such starts at each β with new starts; all of them are used. Only for small problems, where
        they cost little and a missed code is a large part of the curve.
    gap: largest gap between a chord and the tangents at its ends, in nats.
    """

    dtype: torch.dtype
    thorough: bool
    max_iterations: int
    tolerance: float
    starts: int
    partitions: int
    gap: float

    @classmethod
    def of(
        cls, joint: Joint, num_codewords: int, *, max_iterations: int | None = None, tolerance: float | None = None
    ) -> Effort:
        """The effort for a joint distribution and a number of codewords."""
        rows, columns = joint.probability.shape
        codewords = min(num_codewords, rows)
        entries = rows * codewords
        thorough = entries <= _THOROUGH_ENTRIES
        # The work of one iteration: two products, and exponentials and logarithms, which cost about 10 multiplications.
        work = codewords * (2 * min(joint.probability.nnz, rows * columns) + 10 * (rows + columns))
        return cls(
            dtype=torch.float64 if entries <= _FLOAT64_ENTRIES else torch.float32,
            thorough=thorough,
            max_iterations=int(np.clip(6e8 / work, 30, 1000)) if max_iterations is None else max_iterations,
            tolerance=(3e-6 if thorough else 1e-5) if tolerance is None else tolerance,
            starts=int(np.clip(2000 // rows, 1, 8)),
            partitions=min(200 // rows, 8),
            gap=8e-5 if thorough else 3e-4 * joint.mutual_information,
        )


def anneal(
    joint: Joint,
    num_codewords: int,
    effort: Effort,
    *,
    betas: list[float] | None,
    seed: int,
    device: torch.device,
    report: Callable[[float], None] = lambda share: None,
) -> list[Point]:
    """Complexity and expressivity, in nats, and β of the codes that are found; β is infinite for hard codes.

    Args:
        joint: reduced joint distribution.
        num_codewords: largest number of codewords.
        effort: how exactly and for how long to compute.
        betas: values of β, descending; None: chosen on the way.
        seed: seed of random starts.
        device: device of the iteration.
        report: called with the share that is done, a rough guess.
    """
    if min(joint.probability.shape) < 2:
        return []
    points: list[Point] = []
    with one_thread(device), exact_float32(device), torch.inference_mode():
        solver = Solver(joint, dtype=effort.dtype, device=device)
        codes = _hard_codes(joint, num_codewords, effort, seed)
        for number, code in enumerate(codes):
            encoder = solver.hard(code)
            top = (*solver.information(encoder), math.inf)
            points.append(top)
            if top[0] - top[1] < effort.gap / 8:
                return points  # on the diagonal, as is the chord to it, and nothing lies above the diagonal
            for point in _descend(solver, encoder, top, effort, betas):
                points.append(point)
                report((number + 1 - point[0] / max(top[0], _NOTHING)) / len(codes))
        if betas is None:
            _fill(solver, joint, codes[0], points, effort, seed, num_codewords)
    return points


def _fill(
    solver: Solver, joint: Joint, code: np.ndarray, points: list[Point], effort: Effort, seed: int, num_codewords: int
) -> None:
    """Look for better codes from new starts, at some β and where the curve has gaps, and add them to `points`.

    This is needed because on the way down, a code can persist below the β at which it is best, and then skip others.
    """
    random = torch.Generator().manual_seed(seed)
    hard = solver.hard(code)
    few = effort.partitions > 0 and num_codewords < len(joint.rows)

    def start_at(beta: float) -> None:
        noise = torch.rand(hard.shape, generator=random, dtype=torch.float64, device="cpu").to(hard)
        begin_at((1 - _FRESH) * hard + _FRESH * noise / noise.sum(1, keepdim=True), beta)
        # With enough codewords, the best code at any β can be reached from the code with one row for each codeword.
        # Otherwise the best partition depends on β: at a lower β some codewords are rarer, or unused.
        if few:
            for start in range(effort.partitions):
                begin_at(solver.hard(_partition(joint, num_codewords, effort, seed + start, beta)[0]), beta)

    def begin_at(start: Tensor, beta: float) -> None:
        found = solver.solve(start, beta, max_iterations=effort.max_iterations, tolerance=effort.tolerance)
        point = (*solver.information(found), beta)
        if _lead(point, points) > effort.gap / 4:
            for below in _descend(solver, solver.without_copies(found), point, effort, None):
                points.append(below)
                if _lead(below, points[:-1]) < effort.gap / 2:
                    break
        points.append(point)

    checks, fills = _NEW_STARTS[effort.thorough]
    if few:
        checks *= min(effort.partitions, 3)
    corners = envelope(points)
    if len(corners) == 1:
        return
    for complexity in np.linspace(corners[-1][0], 0.0, checks + 2)[1:-1]:
        pairs = list(pairwise(envelope(points)))
        # Codes that were found meanwhile may reach as high at less complexity; the curve then ends before this one.
        start_at(_between(*next((pair for pair in pairs if complexity <= pair[1][0]), pairs[-1])))
    tried: set[float] = set()
    for _ in range(fills):
        corners = envelope(points)
        # The slope of the curve is at most 1 at its beginning.
        corners[0] = (0.0, 0.0, 1.0)
        gaps = [(_gap(*pair), _between(*pair)) for pair in pairwise(corners)]
        gaps = [(gap, beta) for gap, beta in gaps if gap > 2 * effort.gap and beta not in tried]
        if not gaps:
            return
        beta = max(gaps)[1]
        tried.add(beta)
        start_at(beta)


def _between(lower: Point, upper: Point) -> float:
    """The β at which both codes are equally good."""
    return min((upper[0] - lower[0]) / max(upper[1] - lower[1], _NOTHING), _FIRST_BETA)


def _lead(point: Point, others: list[Point]) -> float:
    """How much better a code is at its own β than the best of the others, in nats."""
    return point[1] - point[0] / point[2] - max(max(e - c / point[2] for c, e, _ in others), 0.0)


def envelope(points: list[Point]) -> list[Point]:
    """Corners of the lowest concave and monotone curve from (0, 0) that no point exceeds; β is 0 at (0, 0)."""
    corners: list[Point] = [(0.0, 0.0, 0.0)]
    for c, e, negative in sorted((c, e, -beta) for c, e, beta in points):
        if e <= corners[-1][1] + 1e-12 or c <= 1e-12:
            continue
        while len(corners) > 1 and _turns_up(corners[-2], corners[-1], (c, e)):
            corners.pop()
        if c > corners[-1][0]:
            corners.append((c, e, -negative))
    return corners


def _turns_up(a: tuple[float, ...], b: tuple[float, ...], c: tuple[float, ...]) -> bool:
    """Whether b lies on or below the chord from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])


def _hard_codes(joint: Joint, num_codewords: int, effort: Effort, seed: int) -> list[np.ndarray]:
    rows = len(joint.rows)
    if num_codewords >= rows:
        return [np.arange(rows)]
    codes = [_partition(joint, num_codewords, effort, seed + start) for start in range(effort.starts)]
    return [code for code, _ in sorted(codes, key=lambda found: -found[1])[:_DESCENTS]]


def _partition(
    joint: Joint, num_codewords: int, effort: Effort, seed: int, beta: float = math.inf
) -> tuple[np.ndarray, float]:
    # A sweep costs at least as much as about a dozen iterations.
    sweeps, tolerance = math.ceil(effort.max_iterations / 3), 100 * effort.tolerance
    return cluster(joint, num_codewords, sweeps=sweeps, tolerance=tolerance, seed=seed % 2**32, beta=beta)


def _descend(solver: Solver, encoder: Tensor, top: Point, effort: Effort, betas: list[float] | None) -> Iterator[Point]:
    """Codes at lower and lower β; each starts from the one before."""

    def solve(beta: float) -> tuple[Tensor, Point]:
        for mix in (_MIX, 0.0):
            start = (1 - mix) * encoder + mix / encoder.shape[1]
            found = solver.solve(start, beta, max_iterations=effort.max_iterations, tolerance=effort.tolerance)
            point = (*solver.information(found), beta)
            # Mixing may have undone more than the limited iteration could restore; without mixing nothing is lost.
            if point[1] - point[0] / beta >= upper[1] - upper[0] / beta - effort.tolerance:
                break
        return found, point

    upper = top
    if betas is not None:
        for beta in betas:
            encoder, upper = solve(beta)
            yield upper
        return
    stride, least = _FIRST_STRIDE, _LEAST_STRIDE[effort.thorough]
    for _ in range(_MOST_STEPS):
        # Below β = 1 no code is worth its complexity, by the data processing inequality.
        beta = max(_FIRST_BETA if math.isinf(upper[2]) else upper[2] * math.exp(-stride), 1.0)
        found, point = solve(beta)
        yield point
        gap = _gap(point, upper)
        accepted = gap <= 1.5 * effort.gap or stride <= least or math.isinf(upper[2])
        # Along a smooth curve the gap grows with the square of the stride.
        factor = math.sqrt(0.8 * effort.gap / max(gap, effort.gap / 100))
        if not math.isinf(upper[2]):
            stride = float(np.clip(stride * np.clip(factor, 0.2, 2.0), least, _GREATEST_STRIDE))
        if accepted:
            encoder, upper = solver.without_copies(found), point
            if beta == 1.0 or point[0] < _NOTHING or encoder.shape[1] == 1:
                return


def _gap(lower: Point, upper: Point) -> float:
    """Height above the chord between two points at which their tangents, of slope 1/β, meet; 0 if they do not."""
    (c1, e1, beta1), (c2, e2, beta2) = lower, upper
    slope1, slope2 = 1 / beta1, 1 / beta2
    if c2 - c1 < _NOTHING or slope1 - slope2 < 1e-12:
        return 0.0
    meet = (e2 - e1 + slope1 * c1 - slope2 * c2) / (slope1 - slope2)
    if not c1 <= meet <= c2:
        return 0.0
    return max(e1 + slope1 * (meet - c1) - (e1 + (e2 - e1) * (meet - c1) / (c2 - c1)), 0.0)
