"""What a wider label adds to a narrower one, I(W;Z given N), tested against permutations within the narrower."""

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
    """What a wider label adds. Information in fractions of log(num_bins).

    information: I(W;Z given N) = I(N,W;Z) - I(N;Z), plain.
    null, null_std: its mean and standard deviation when wide labels are permuted within each narrow one.
    above_null: information - null, a lower baseline like every other above-null number.
    z_score: above_null / null_std; None where permutations change nothing.
    p_value: share of permutations, the measured labels counted as one, that reach the measured information.
    num_permutations: their number R; the smallest p value is 1 / (R + 1).
    num_positions: positions whose label a permutation can change; the others say nothing about the increment.
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

    (E23 of docs/mathematics.md)

    The plain increment is inflated like every information from finite samples, most of all where wide labels occur
    once. Permuting wide labels among the positions of the same narrow label keeps everything but their link with Z:
    label counts, I(N;Z), and how alike assignments of one narrow label are.

    Args:
        z: representations [T, dim] of one layer.
        narrow: [T] integer labels, such as tokens (`ngram_labels`).
        wide: [T] integer labels; those that cross narrow ones are taken together with them.
        within: [T] integers; labels are permuted only among positions that share this too. Positions of one sequence
            are alike and share topics, so wide labels that cluster in sequences differ from permuted ones even if the
            model ignores them: give the sequence of each position to ask for what lies beyond it. The positions that
            count are then far fewer.
        num_permutations: R; 100 make the smallest p value 0.0099.
        num_bins: as in `soft_mutual_information`.
        seed: likewise, and of the permutations.
        temperature: likewise.

    Raises:
        TypeError, ValueError: as `soft_mutual_information`.
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
    """`information_increment` of soft assignments [T, num_bins], in float64; the labels are checked already."""
    return increment_from(*permuted_increments(assignments, narrow, wide, within, num_permutations, seed))


def permuted_increments(
    assignments: Tensor, narrow: Tensor, wide: Tensor, within: Tensor | None, num_permutations: int, seed: int
) -> tuple[npt.NDArray[np.float64], int]:
    """Plain increments, [1 + R], of the labels as they are and of each permutation, and how many positions count.

    The permutations depend on the labels and the seed alone, so that values of several layers can be averaged.
    """
    narrow, wide = narrow.to(assignments.device), wide.to(assignments.device)
    joint = _joint(narrow, wide)
    stratum = narrow if within is None else _joint(narrow, within.to(assignments.device))

    given_narrow, number = _entropies(assignments, narrow)
    base = float((number * given_narrow).sum()) / len(assignments)
    movable = _movable(stratum, joint)
    rows, labels = assignments[movable], joint[movable]
    # A joint label is fixed as a whole or has positions on both sides when strata are finer than narrow labels.
    fixed_rows, fixed_labels = assignments[~movable], joint[~movable]
    order = torch.argsort(stratum[movable], stable=True)
    random = np.random.RandomState(seed)
    values = []
    for number_of in range(num_permutations + 1):
        moved = rows
        if number_of:
            key = torch.from_numpy(random.random_sample(len(labels))).to(rows.device)
            shuffled = torch.argsort(key)
            # Sorted by stratum, at random within: where each position's assignment is taken from.
            source = shuffled[torch.argsort(stratum[movable][shuffled], stable=True)]
            moved = torch.empty_like(rows)
            moved[order] = rows[source]
        given, count = _entropies(torch.cat([moved, fixed_rows]), torch.cat([labels, fixed_labels]))
        values.append(base - float((count * given).sum()) / len(assignments))
    return np.array(values), len(labels)


def increment_from(values: npt.NDArray[np.float64], num_positions: int) -> Increment:
    """The test that `permuted_increments`, or their mean over layers, come to."""
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
        # Rounding must not tell a permutation that changes nothing from the labels as they are.
        p_value=(1 + int((permuted >= information - 1e-12).sum())) / len(values),
        num_permutations=len(permuted),
        num_positions=num_positions,
    )


def _joint(a: Tensor, b: Tensor) -> Tensor:
    """[T] one number for each pair of labels."""
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
