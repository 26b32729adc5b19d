"""From the hard code at β → ∞ down to the code that says nothing: where to look for codes, and for how long."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ib_callback._ib_hard import cluster
from ib_callback._ib_joint import Joint
from ib_callback._ib_solver import Solver, one_thread

# As many codewords as rows are not taken by default beyond this number of rows: the encoder is their square.
MANY_ROWS = 4096
# Encoders with more entries than this are float32, see `Effort`.
_FLOAT64_ENTRIES = 1 << 18
# Share of each row given to all codewords alike before β is lowered. Without it codewords that have lost some y for
# good (p(y|t) underflows while β is high) could never take up rows with that y again.
_MIX = 0.001
# Steps are in log β.
_FIRST_BETA, _FIRST_STRIDE = 300.0, 0.5
_LEAST_STRIDE = {torch.float64: 0.001, torch.float32: 0.02}
_GREATEST_STRIDE = 1.0
_MOST_STEPS = 400
# So many of the best hard codes are starts.
_DESCENTS = 2
# Below this a code says nothing, in nats.
_NOTHING = 1e-9

Point = tuple[float, float, float]


@dataclass(frozen=True)
class Effort:
    """How exactly to compute, and for how long.

    dtype: of encoders. float64 for small problems, where 1e-4 nats have to be right at any price; float32 for large
        ones, where it halves time and memory and costs under 1e-5 nats, far less than local maxima do.
    max_iterations, tolerance: as for `ib_curve`.
    starts: random starts of sequential clustering, of which the best two go on.
    gap: greatest gap between a chord and the tangents at its ends, in nats.
    """

    dtype: torch.dtype
    max_iterations: int
    tolerance: float
    starts: int
    gap: float

    @classmethod
    def of(
        cls, joint: Joint, num_codewords: int, *, max_iterations: int | None = None, tolerance: float | None = None
    ) -> Effort:
        """What suits a joint and a number of codewords."""
        rows, columns = joint.probability.shape
        codewords = min(num_codewords, rows)
        entries = rows * codewords
        dtype = torch.float64 if entries <= _FLOAT64_ENTRIES else torch.float32
        # Of one iteration: two products, and exponentials and logarithms, which cost about 10 multiplications.
        work = codewords * (2 * min(joint.probability.nnz, rows * columns) + 10 * (rows + columns))
        return cls(
            dtype=dtype,
            max_iterations=int(np.clip(6e8 / work, 30, 1000)) if max_iterations is None else max_iterations,
            tolerance=(1e-7 if dtype == torch.float64 else 1e-5) if tolerance is None else tolerance,
            starts=int(np.clip(2000 // rows, 1, 8)),
            gap=4e-5 if dtype == torch.float64 else 3e-4 * joint.mutual_information,
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
    """Complexity and expressivity in nats of the codes found, with β; infinite for hard codes.

    Args:
        joint: reduced.
        num_codewords: at most so many.
        effort: how exactly and for how long.
        betas: descending; None: chosen on the way.
        seed: of random starts.
        device: where to iterate.
        report: called with the share done, a rough guess.
    """
    if min(joint.probability.shape) < 2:
        return []
    points: list[Point] = []
    with one_thread(device):
        solver = Solver(joint, dtype=effort.dtype, device=device)
        codes = _hard_codes(joint, num_codewords, effort, seed)
        for number, code in enumerate(codes):
            encoder = solver.hard(code)
            top = (*solver.information(encoder), math.inf)
            points.append(top)
            for point in _descend(solver, encoder, top, effort, betas):
                points.append(point)
                report((number + 1 - point[0] / max(top[0], _NOTHING)) / len(codes))
    return points


def _hard_codes(joint: Joint, num_codewords: int, effort: Effort, seed: int) -> list[np.ndarray]:
    rows = len(joint.rows)
    if num_codewords >= rows:
        return [np.arange(rows)]
    # A sweep costs about as much as a dozen iterations at least, and is done once, not at each β.
    sweeps, tolerance = math.ceil(effort.max_iterations / 3), 100 * effort.tolerance
    codes = [
        cluster(joint, num_codewords, sweeps=sweeps, tolerance=tolerance, seed=seed + start)
        for start in range(effort.starts)
    ]
    return [code for code, _ in sorted(codes, key=lambda found: -found[1])[:_DESCENTS]]


def _descend(solver: Solver, encoder: Tensor, top: Point, effort: Effort, betas: list[float] | None) -> Iterator[Point]:
    """Codes at lower and lower β, each begun from the last."""

    def solve(beta: float) -> tuple[Tensor, Point]:
        for mix in (_MIX, 0.0):
            start = (1 - mix) * encoder + mix / encoder.shape[1]
            found = solver.solve(start, beta, max_iterations=effort.max_iterations, tolerance=effort.tolerance)
            point = (*solver.information(found), beta)
            # Mixing may have undone more than the iteration had the patience to restore; without it nothing is lost.
            if point[1] - point[0] / beta >= upper[1] - upper[0] / beta - effort.tolerance:
                break
        return found, point

    upper = top
    if betas is not None:
        for beta in betas:
            encoder, upper = solve(beta)
            yield upper
        return
    stride, least = _FIRST_STRIDE, _LEAST_STRIDE[effort.dtype]
    for _ in range(_MOST_STEPS):
        # Below 1 no code is worth its complexity, by the data processing inequality.
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
    """How far the tangents at two points, of slopes 1/β, meet above the chord between them; 0 if they do not."""
    (c1, e1, beta1), (c2, e2, beta2) = lower, upper
    slope1, slope2 = 1 / beta1, 1 / beta2
    if c2 - c1 < _NOTHING or slope1 - slope2 < 1e-12:
        return 0.0
    meet = (e2 - e1 + slope1 * c1 - slope2 * c2) / (slope1 - slope2)
    if not c1 <= meet <= c2:
        return 0.0
    return max(e1 + slope1 * (meet - c1) - (e1 + (e2 - e1) * (meet - c1) / (c2 - c1)), 0.0)
