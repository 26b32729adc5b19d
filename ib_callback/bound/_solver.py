"""The self-consistent iteration of the Information Bottleneck at one β (Tishby, Pereira & Bialek 1999, eqs. 16-18).

A code is an encoder p(t | x), [R, n]. One iteration first makes its decoder, p(t) and p(y | t). Then it makes the best
encoder for that decoder, p(t | x) ∝ p(t) exp(−β KL(p(y|x) ‖ p(y|t))). Neither half lowers the objective
I(Y;T) − I(X;T)/β.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ib_callback.bound._joint import Joint

# Above this share of non-zeros a dense product is faster.
_DENSE = 0.2
# The longest extrapolation, in steps.
_LONGEST = 64.0
# Codewords whose distributions over y have a squared Hellinger distance below this count as one codeword. The limit
# must not be much larger: while β falls towards the value at which two codewords merge, they are similar but differ.
_SAME = 1e-10


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Use one thread on a CPU.

    The products are short, so threads cost more than they save on a machine that does other work too. With one thread,
    the result is also bitwise the same for any setting of threads.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Solver:
    """Iterates codes of one joint distribution on one device.

    Tables have the dtype `dtype`; sums over them that become results are float64.
    """

    def __init__(self, joint: Joint, *, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._joint = joint
        self._rows = torch.from_numpy(joint.rows).to(device)
        self._weight = self._rows.to(dtype).unsqueeze(1)
        self._entropy_y = float(-(joint.columns * np.log(joint.columns)).sum())
        self._tiny = torch.finfo(dtype).tiny
        dense = joint.conditional.nnz > _DENSE * len(joint.rows) * len(joint.columns)
        make = self._dense if dense else self._sparse
        self._decode = make(joint.probability.T.tocsr())
        self._encode = make(joint.conditional)

    def _dense(self, matrix: csr_matrix) -> Tensor:
        return torch.from_numpy(matrix.toarray()).to(self.device, self.dtype)

    def _sparse(self, matrix: csr_matrix) -> tuple[Tensor, Tensor, Tensor]:
        matrix.sort_indices()
        members, offsets = (
            torch.from_numpy(part.astype(np.int64)).to(self.device) for part in (matrix.indices, matrix.indptr)
        )
        return members, offsets, torch.from_numpy(matrix.data).to(self.device, self.dtype)

    @staticmethod
    def _product(matrix: Tensor | tuple[Tensor, Tensor, Tensor], table: Tensor) -> Tensor:
        if isinstance(matrix, Tensor):
            return matrix @ table
        # Like histogram.segment_sum: without atomics, so the result is the same on every run.
        members, offsets, weights = matrix
        return F.embedding_bag(
            members, table, offsets, mode="sum", include_last_offset=True, per_sample_weights=weights
        )

    def hard(self, code: np.ndarray) -> Tensor:
        """The encoder [R, n] that gives each row its codeword."""
        codes = torch.from_numpy(code.astype(np.int64)).to(self.device)
        return F.one_hot(codes, int(code.max()) + 1).to(self.dtype)

    def information(self, encoder: Tensor) -> tuple[float, float]:
        """I(X;T) and I(Y;T) of a code in nats, for any code, optimal or not."""
        joint = self._product(self._decode, encoder).double()
        weight = joint.sum(0)
        over_t = torch.xlogy(weight, weight).sum()
        given_x = torch.xlogy(encoder, encoder).sum(1, dtype=torch.float64) @ self._rows
        expressivity = torch.xlogy(joint, joint).sum() - over_t + self._entropy_y
        return max(float(given_x - over_t), 0.0), max(float(expressivity), 0.0)

    def solve(self, encoder: Tensor, beta: float, *, max_iterations: int, tolerance: float) -> Tensor:
        """A code at which the objective has stopped growing, or near it.

        Each round makes two iterations and an extrapolation along their difference (SQUAREM: Varadhan & Roland 2008).
        The extrapolation is used only if the objective does not fall.

        Args:
            encoder: [R, n], the code to start from.
            beta: weight β in the objective I(Y;T) − I(X;T)/β.
            max_iterations: approximate upper limit of iterations.
            tolerance: stop when the objective grows by less, in nats, in a round of three iterations.
        """
        before = -float("inf")
        done = 0
        while done < max_iterations:
            first, _ = self._iterate(encoder, beta)
            second, middle = self._iterate(first, beta)
            encoder, after = self._iterate(self._extrapolate(encoder, first, second), beta)
            done += 3
            if after < middle:
                encoder, after = self._iterate(second, beta)
                done += 1
            if after - before < tolerance:
                break
            before = after
        return encoder

    def _iterate(self, encoder: Tensor, beta: float) -> tuple[Tensor, float]:
        """The next encoder, and its objective with the decoder from which it was made."""
        joint = self._product(self._decode, encoder)
        weight = joint.sum(0)
        log_weight = weight.clamp_min(self._tiny).log_()
        scores = self._product(self._encode, joint.clamp_min_(self._tiny).log_().sub_(log_weight))
        # Codewords with almost no weight are dropped, because their p(y | t) is lost to underflow.
        scores.mul_(beta).add_(log_weight.masked_fill_(weight < self._tiny**0.5, -torch.inf))
        highest = scores.amax(1, keepdim=True)
        scores.sub_(highest).exp_()
        total = scores.sum(1, keepdim=True)
        objective = float((highest + total.log()).squeeze(1).double() @ self._rows) / beta + self._entropy_y
        return scores.div_(total), objective

    def _extrapolate(self, start: Tensor, first: Tensor, second: Tensor) -> Tensor:
        step = first - start
        bend = second - first - step
        length, curvature = (float((v.square() * self._weight).sum()) ** 0.5 for v in (step, bend))
        reach = min(max(length / max(curvature, self._tiny), 1.0), _LONGEST)
        if reach == 1.0:
            return second
        guess = (start + 2 * reach * step + reach**2 * bend).clamp_min_(0.0)
        return guess.div_(guess.sum(1, keepdim=True).clamp_min_(self._tiny))

    def without_copies(self, encoder: Tensor) -> Tensor:
        """The same code, with codewords merged that say the same about y; this changes neither I(X;T) nor I(Y;T).

        Unused codewords are removed.
        """
        joint = self._product(self._decode, encoder)
        weight = joint.sum(0)
        used = weight > torch.finfo(self.dtype).eps * 1e-3
        encoder, joint, weight = encoder[:, used], joint[:, used], weight[used]
        root = (joint.double() / weight.double()).sqrt()
        affinity = root.T @ root
        same = (1.0 - affinity < _SAME).fill_diagonal_(False)
        if not same.any():
            return encoder / encoder.sum(1, keepdim=True)
        number, group = connected_components(csr_matrix(same.cpu().numpy()), directed=False)
        adds_up = F.one_hot(torch.from_numpy(group).long(), number).to(self.device, self.dtype)
        merged = encoder @ adds_up
        return merged / merged.sum(1, keepdim=True)
