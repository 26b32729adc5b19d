"""What a wider label W adds to a narrower label N: I(W;Z given N), tested against permutations of W within N."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ib_callback.common.checks import check_integer
from ib_callback.estimator.functional import assigned, check_labels, histograms_by_label, in_float64
from ib_callback.estimator.histogram import entropy


@dataclass(frozen=True)
class Increment:
    """What a wider label W adds to a narrower label N. Information is in fractions of log(num_bins).

    information: the plain increment I(W;Z given N) = I(N,W;Z) - I(N;Z).
    null, null_std: mean and standard deviation of the increment when wide labels are permuted within each narrow label.
    above_null: information - null. Like every other number above null, it is a low estimate of the true value.
    z_score: above_null / null_std; None if permutations change nothing.
    p_value: share of permutations that reach the measured information. The measured labels count as one permutation.
    num_permutations: the number of permutations R; the smallest p value is 1 / (R + 1).
    num_positions: positions whose label a permutation can change. Other positions say nothing about the increment.
    """

    information: float
    null: float
    null_std: float
    above_null: float
    z_score: float | None
    p_value: float
    num_permutations: int
    num_positions: int

    def __str__(self) -> str:
        z = "undefined" if self.z_score is None else f"{self.z_score:.1f}"
        return (
            f"increment {self.information:.4g}, null {self.null:.4g} ± {self.null_std:.2g}, above null "
            f"{self.above_null:.4g} (z {z}, p {self.p_value:.2g}, {self.num_positions} positions count)"
        )


def information_increment(
    z: Tensor,
    narrow: Tensor,
    wide: Tensor,
    *,
    within: Tensor | None = None,
    num_permutations: int = 100,
    num_bins: int = 100,
    seed: int = 0,
    temperature: float | str = "calibrated",
) -> Increment:
    """Return what `wide` says about representations beyond `narrow`, and whether chance would say as much.

    Like every information from finite samples, the plain increment is too high, most of all where wide labels occur
    only once. The test permutes wide labels among the positions of the same narrow label. This breaks only their link
    with Z. It keeps the label counts, I(N;Z), and how similar the assignments of one narrow label are.

    (E23 of docs/mathematics.md)

    Args:
        z: representations [T, dim] of one layer.
        narrow: [T] integer labels, such as tokens (`ngram_labels`).
        wide: [T] integer labels. A wide label that occurs under several narrow labels counts as a different label under
            each.
        within: [T] integers. If given, labels are permuted only among positions that share this number too. Positions
            of one sequence are similar and share topics. So wide labels that cluster in sequences differ from permuted
            ones even if the model ignores them. Pass the sequence of each position to measure what lies beyond that
            effect. Far fewer positions count then.
        num_permutations: R; with 100 the smallest p value is 0.0099.
        num_bins: as in `soft_mutual_information`.
        seed: as in `soft_mutual_information`; also the seed of the permutations.
        temperature: as in `soft_mutual_information`.

    Raises:
        TypeError, ValueError: as for `soft_mutual_information`.
        RepresentationError: vectors of `z` are zero, NaN or infinite.

    >>> z = torch.nn.functional.one_hot(torch.tensor([0, 1] * 32), 64).double()  # depends on the wide label only
    >>> narrow, wide = torch.zeros(64, dtype=torch.long), torch.tensor([0, 1] * 32)
    >>> information_increment(z, narrow, wide, num_permutations=19).p_value
    0.05
    """
    check_integer("num_permutations", num_permutations, minimum=2, cure="100 is the default")
    with torch.no_grad():
        assignments = in_float64(assigned(z, num_bins, seed, temperature))
    for labels in (narrow, wide) if within is None else (narrow, wide, within):
        check_labels(labels, len(z))
    return increment_of(assignments, narrow, wide, within, num_permutations=num_permutations, seed=seed)


def increment_of(
    assignments: Tensor, narrow: Tensor, wide: Tensor, within: Tensor | None, *, num_permutations: int, seed: int
) -> Increment:
    """`information_increment` of float64 soft assignments [T, num_bins] and labels that have been checked."""
    return increment_from(*permuted_increments(assignments, narrow, wide, within, num_permutations, seed))


def permuted_increments(
    assignments: Tensor, narrow: Tensor, wide: Tensor, within: Tensor | None, num_permutations: int, seed: int
) -> tuple[npt.NDArray[np.float64], int]:
    """Plain increments [1 + R]: of the labels as they are, then of each permutation; and how many positions count.

    The permutations depend on the labels and the seed alone, so values of several layers can be averaged.
    """
    narrow, wide = narrow.to(assignments.device), wide.to(assignments.device)
    joint = _joint(narrow, wide)
    stratum = narrow if within is None else _joint(narrow, within.to(assignments.device))

    given_narrow, number = _entropies(assignments, narrow)
    base = float((number * given_narrow).sum()) / len(assignments)
    movable = _movable(stratum, joint)
    rows, labels = assignments[movable], joint[movable]
    # Usually a joint label is fixed as a whole. If strata are finer than narrow labels, it may have both fixed and
    # movable positions.
    fixed_rows, fixed_labels = assignments[~movable], joint[~movable]
    order = torch.argsort(stratum[movable], stable=True)
    random = np.random.RandomState(seed)
    values = []
    for number_of in range(num_permutations + 1):
        moved = rows
        if number_of:
            key = torch.from_numpy(random.random_sample(len(labels))).to(rows.device)
            shuffled = torch.argsort(key)
            # Sorted by stratum, in random order within it: where each position's assignment is taken from.
            source = shuffled[torch.argsort(stratum[movable][shuffled], stable=True)]
            moved = torch.empty_like(rows)
            moved[order] = rows[source]
        given, count = _entropies(torch.cat([moved, fixed_rows]), torch.cat([labels, fixed_labels]))
        values.append(base - float((count * given).sum()) / len(assignments))
    return np.array(values), len(labels)


def increment_from(values: npt.NDArray[np.float64], num_positions: int) -> Increment:
    """The result of the test for the values of `permuted_increments`, or for their mean over layers."""
    information, permuted = float(values[0]), values[1:]
    std = float(permuted.std(ddof=1))
    above = information - float(permuted.mean())
    if not num_positions:
        std, above = 0.0, 0.0
    return Increment(
        information=information,
        null=information - above,
        null_std=std,
        above_null=above,
        z_score=above / std if std > 1e-12 else None,
        # A permutation that changes nothing must count as equal to the measured labels in spite of rounding.
        p_value=(1 + int((permuted >= information - 1e-12).sum())) / len(values),
        num_permutations=len(permuted),
        num_positions=num_positions,
    )


def _joint(a: Tensor, b: Tensor) -> Tensor:
    """[T] one number for each different pair of labels."""
    first, second = (torch.unique(x, return_inverse=True)[1] for x in (a, b))
    return torch.unique(first * (second.max() + 1) + second, return_inverse=True)[1]


def _entropies(assignments: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    _, counts, histograms = histograms_by_label(assignments, labels)
    return entropy(histograms), counts


def _movable(stratum: Tensor, joint: Tensor) -> Tensor:
    """[T] bool, positions in strata that have several joint labels."""
    stratum = torch.unique(stratum, return_inverse=True)[1]
    pairs = torch.unique(torch.stack([stratum, joint]), dim=1)
    return torch.bincount(pairs[0], minlength=int(stratum.max()) + 1)[stratum] > 1
