"""Hard codes: each label belongs to one codeword. They are the end of the curve at β → ∞.

They are found by sequential clustering (Slonim, Friedman & Tishby, "Unsupervised document classification using
sequential information maximization", 2002): one label at a time is taken out of its codeword and put where I(T;Y) is
highest. k-means with divergences cannot move a label to a codeword that has never seen one of the label's y. On the
sparse joints of text nearly every pair of label and codeword is like that. Sequential clustering does not get stuck
there.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import xlogy

from ib_callback.bound._joint import Joint


def cluster(
    joint: Joint, num_codewords: int, *, sweeps: int, tolerance: float, seed: int, beta: float = math.inf
) -> tuple[np.ndarray, float]:
    """Codeword [R] of each row and I(T;Y) in nats, from a random start: at a local maximum, or near it.

    Args:
        joint: joint distribution with R rows, more than codewords.
        num_codewords: number of codewords.
        sweeps: largest number of sweeps over all rows.
        tolerance: stop after a sweep that gains less, in nats.
        seed: seed of the start and of the order of rows.
        beta: maximise I(T;Y) - I(T;X)/beta. The second term is H(T)/beta, because codes are hard.
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
            # For each codeword: the change of sum p(y,t) log p(y,t) - (1 - 1/beta) sum p(t) log p(t) when the row joins
            # it. Apart from a constant, this sum is the objective.
            together = without + values[entries, None]
            gain = (xlogy(together, together) - xlogy(without, without)).sum(0)
            gain -= (1 - 1 / beta) * (xlogy(rest + p, rest + p) - xlogy(rest, rest))
            best = int(gain.argmax())
            # Ignore gains within rounding error, or rows would move back and forth.
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
