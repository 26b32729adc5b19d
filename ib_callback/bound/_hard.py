"""Hard codes: each label belongs to one codeword. They are the end of the curve at β → ∞.

Sequential clustering (Slonim, Friedman & Tishby, "Unsupervised document classification using sequential information
maximization", 2002): one label at a time is taken out of its codeword and put where I(T;Y) is highest. Unlike
k-means with divergences it cannot get stuck because a codeword has never seen one of the label's y, which on the
sparse joints of text nearly every pair of label and codeword is.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import xlogy

from ib_callback.bound._joint import Joint


def cluster(
    joint: Joint, num_codewords: int, *, sweeps: int, tolerance: float, seed: int, beta: float = math.inf
) -> tuple[np.ndarray, float]:
    """Codeword [R] of each row and I(T;Y) in nats, from a random start: a local maximum, or near it.

    Args:
        joint: of R rows, more than there are codewords.
        num_codewords: how many there are.
        sweeps: at most so often each row is looked at.
        tolerance: stop after a sweep that gains less, in nats.
        seed: of the start and of the order of rows.
        beta: what is maximised is I(T;Y) - I(T;X)/beta, of which the last is H(T)/beta, as codes are hard.
    """
    random = np.random.RandomState(seed)
    num_rows = len(joint.rows)
    code = random.permutation(np.arange(num_rows) % num_codewords)
    table = np.zeros((len(joint.columns), num_codewords))  # p(y, t)
    starts, columns, values = joint.probability.indptr, joint.probability.indices, joint.probability.data
    np.add.at(table, (columns, np.repeat(code, np.diff(starts))), values)
    weight = np.bincount(code, joint.rows, num_codewords)
    for _ in range(sweeps):
        gained = 0.0
        for row in random.permutation(num_rows):
            entries = slice(starts[row], starts[row + 1])
            own = code[row]
            at, p = columns[entries], joint.rows[row]
            without = table[at]
            without[:, own] = np.maximum(without[:, own] - values[entries], 0.0)
            rest = weight.copy()
            rest[own] = max(rest[own] - p, 0.0)
            # Change of sum p(y,t) log p(y,t) - (1 - 1/beta) sum p(t) log p(t), the objective but for a constant, when
            # the row joins each codeword.
            together = without + values[entries, None]
            gain = (xlogy(together, together) - xlogy(without, without)).sum(0)
            gain -= (1 - 1 / beta) * (xlogy(rest + p, rest + p) - xlogy(rest, rest))
            best = int(gain.argmax())
            # Not for rounding error: rows would move to and fro.
            if gain[best] > gain[own] + 1e-14:
                gained += gain[best] - gain[own]
                table[at, own] = without[:, own]
                table[at, best] = together[:, best]
                weight[own], weight[best] = rest[own], rest[best] + p
                code[row] = best
        if gained < tolerance:
            break
    parts = (table, weight, joint.columns)
    both, over_t, over_y = (float(xlogy(p, p).sum()) for p in parts)
    return np.unique(code, return_inverse=True)[1], both - over_t - over_y
