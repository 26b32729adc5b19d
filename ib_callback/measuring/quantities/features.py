"""Information about features: labels of positions other than n-grams, such as a preference or a language.

(E18 of docs/mathematics.md)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ib_callback.common.errors import ProbeError
from ib_callback.measuring.plan.builder import Builder
from ib_callback.measuring.plan.plan import NullPlan, Wanted
from ib_callback.measuring.readout import Found, Readings
from ib_callback.probe.ngrams import Positions, value_segments
from ib_callback.results.points import FeaturePoint

# The definition asks for at least 50. With 100 the standard error of the mean is 1/10 of the spread.
NUM_PERMUTATIONS = 100
# With fewer preference pairs, the information of real models about preference hardly differs from chance
# (docs/features.md).
PAIRS_NEEDED = 256
# Rounding error of sums of a few float64 numbers of order 1.
_ROUNDING = 1e-14


@dataclass(frozen=True)
class Feature:
    """One feature.

    labels: the labels of the feature.
    number: number of its label set.
    total: number of the kept histogram over the positions with a label.
    permutations: if the null permutes sequences: kept histograms under permutation.
    null: if the null permutes positions: random subsets of the positions with a label.
    """

    labels: FeatureLabels
    number: int
    total: int
    permutations: _Permutations | None
    null: NullPlan | None
    turn: ClassVar[int] = 30
    of_orders: ClassVar[bool] = False

    @classmethod
    def plan(cls, builder: Builder, wanted: Wanted) -> list[Feature]:
        """Register the labels of each feature and its null.

        Raises:
            ProbeError: no valid position has a label of a feature.
        """
        return [cls._plan(builder, wanted, name) for name in wanted.features]

    @classmethod
    def _plan(cls, builder: Builder, wanted: Wanted, name: str) -> Feature:
        probe = wanted.probe
        labels = feature_labels(name, probe.labels[name].numpy(), builder.positions, wanted.seed, probe.groups)
        labelled = np.flatnonzero(labels.values >= 0)
        if not len(labelled):
            raise ProbeError(
                f"feature {name!r}: expected labels (>= 0) at some of the {len(builder.positions)} valid positions, "
                "got none. Label tokens with enough context on both sides, or leave the feature out."
            )
        number = len(builder.label_sets)
        builder.add_segments(value_segments(labels.values, number), [("feature", name)])
        total = builder.keep_total(labelled)
        permutations = subsets = None
        if wanted.null and labels.permuted is not None:
            permutations = _Permutations.plan(builder, labels.values, labels.permuted, labels.num_labels)
        elif wanted.null:
            subsets = builder.keep_subsets(total, labelled, builder.counts[number:], wanted.seed)
            # Each labelled position also gets a label of its own: their mean entropy is where the null's curve begins.
            each = np.where(labels.values >= 0, np.arange(len(builder.positions)), -1)
            builder.add_segments(value_segments(each, number + 1), [("single", name)])
        return cls(labels, number, total, permutations, subsets)

    def read(self, readings: Readings, found: Found) -> None:
        """Add the point of the feature."""
        entropy = readings.kept[self.total]
        information = readings.information(self.number, self.total)
        mean = spread = p_value = None
        if self.permutations is not None:
            mean, spread, p_value = self.permutations.null(readings, entropy)
            if not information.any():  # otherwise rounding would decide
                p_value = 1.0
        elif self.null is not None:
            curve = readings.curve(self.null, float(readings.information(self.number + 1, self.total).mean()))
            counts = readings.plan.counts[self.number]
            mean, spread = curve.null_alone(counts), curve.spread_of_null(counts)
        error = None
        omitted: tuple[float, ...] = ()
        if readings.left_out is not None:
            error = readings.left_out.error(self.number, self.total, float(information.mean()))
            if error is not None:
                omitted = tuple(readings.left_out.information(self.number, self.total).tolist())
        found.features[self.labels.name] = FeaturePoint.from_layers(
            information.tolist(),
            num_positions=readings.plan.label_sets[self.number].num_positions,
            information_null=mean,
            information_null_std=spread,
            information_p_value=p_value,
            information_se=error,
            information_jackknife=omitted,
            **found.complexities,
        )


@dataclass(frozen=True)
class _Permutations:
    """Kept histograms of V labels under R permutations of whole sequences; the last row holds the actual labels.

    The last row is summed like the permuted ones. So it is bitwise equal to permutations that change nothing, or only
    names, and can be compared with all of them.

    kept: [R + 1, V] numbers of the histograms; count: [R + 1, V] number of positions in each.
    """

    kept: np.ndarray
    count: np.ndarray

    @classmethod
    def plan(cls, builder: Builder, values: np.ndarray, permuted: np.ndarray, num_labels: int) -> _Permutations:
        shape = (len(permuted) + 1, num_labels)
        kept = builder.reserve(shape[0] * num_labels) + np.arange(shape[0] * num_labels).reshape(shape)
        count = np.zeros(shape)
        sequence = builder.positions.sequence
        labelled = np.flatnonzero(values >= 0)
        rows = np.arange(shape[0])
        for members in np.split(labelled, np.flatnonzero(np.diff(sequence[labelled])) + 1):
            labels = np.append(permuted[:, sequence[members[0]]], values[members[0]])
            builder.bundle(members, kept[rows, labels])
            count[rows, labels] += len(members)
        return cls(kept, count)

    def null(self, readings: Readings, entropy: np.ndarray) -> tuple[float, float, float]:
        """Mean and standard deviation of the information under permutation, and the p-value of the measured value."""
        weights = self.count / self.count.sum(1, keepdims=True)
        # A label without positions under a permutation has an empty histogram and no weight.
        entropies = np.where(self.count > 0, readings.kept[self.kept].mean(-1), 0.0)
        values = entropy.mean() - (weights * entropies).sum(1)
        permuted, measured = values[:-1], values[-1]
        # Permutations that change only names may differ in the order of the last sum.
        at_least = int((permuted >= measured - _ROUNDING).sum())
        return float(permuted.mean()), float(permuted.std(ddof=1)), (1 + at_least) / (1 + len(permuted))


@dataclass(frozen=True)
class FeatureLabels:
    """One feature over the T valid positions of a probe.

    name: the probe's name of the feature.
    values: [T] labels renumbered from 0; -1 where the position has no label.
    num_labels: number of distinct labels in the probe, V.
    permuted: [R, N] label of each sequence (renumbered, -1 for none) under R random permutations of whole
        sequences; None if the label varies within sequences, because then positions are permuted.
    paired: whether labels were swapped within pairs of sequences.
    by_source: what was permuted if sequences share sources: "over", the labels of whole sources, if each source has
        one label; "within", the labels of the sequences of each source. None if no sequences share a source.
    """

    name: str
    values: np.ndarray
    num_labels: int
    permuted: np.ndarray | None
    paired: bool = False
    by_source: Literal["over", "within"] | None = None


def feature_labels(
    name: str, table: np.ndarray, positions: Positions, seed: int, groups: Sequence[int] | None = None
) -> FeatureLabels:
    """Read a feature from the probe's label table [N, S] at the valid positions; `groups` are the sources [N]."""
    names, numbers = np.unique(table[table >= 0], return_inverse=True)
    renumbered = np.full(table.shape, -1, np.int64)
    renumbered[table >= 0] = numbers
    values = renumbered[positions.sequence, positions.offset]
    at_positions = np.full_like(renumbered, -1)
    at_positions[positions.sequence, positions.offset] = values
    by_sequence = _label_of_sequence(at_positions)
    if by_sequence is None:
        return FeatureLabels(name, values, len(names), None)
    # The other member of a pair may be too short to have a valid position, but its label is still known.
    whole = _label_of_sequence(renumbered)
    random = np.random.RandomState(seed)
    if name == "preference" and whole is not None and _are_pairs(whole):
        return FeatureLabels(name, values, len(names), _swapped_pairs(whole, random), paired=True)
    sources = np.arange(len(table)) if groups is None else np.array(groups)
    permuted, by_source = _permuted(by_sequence, sources, random)
    return FeatureLabels(name, values, len(names), permuted, by_source=by_source)


def too_few_pairs(labels: FeatureLabels) -> str:
    """A sentence that there are too few preference pairs; empty if there are enough, or if the labels are not pairs."""
    pairs = 0 if labels.permuted is None or not labels.paired else int((labels.permuted[0] >= 0).sum()) // 2
    if not 0 < pairs < PAIRS_NEEDED:
        return ""
    return (
        f"only {pairs:,} pairs. About {PAIRS_NEEDED} are needed to distinguish the preference information of trained "
        "models from chance, and more for models that hold less of it (docs/features.md)"
    )


def _label_of_sequence(table: np.ndarray) -> np.ndarray | None:
    """[N] the one label of each sequence, -1 for none; None if some sequence has several labels."""
    highest = table.max(1)
    return highest if ((table < 0) | (table == highest[:, None])).all() else None


def _permuted(
    labels: np.ndarray, sources: np.ndarray, random: np.random.RandomState
) -> tuple[np.ndarray, Literal["over", "within"] | None]:
    """[R, N] permuted labels of the sequences that have one, and what was permuted, "over" or "within" sources.

    Sequences of one source are similar for other reasons than their labels. If every source has one label, the labels
    of whole sources are permuted. If sources have several labels, the labels are permuted within each source.
    """
    carriers = np.flatnonzero(labels >= 0)
    _, source = np.unique(sources[carriers], return_inverse=True)
    size = np.bincount(source)
    permuted = np.repeat(labels[None], NUM_PERMUTATIONS, axis=0)
    if (size == 1).all():
        for row in permuted:
            row[carriers] = labels[random.permutation(carriers)]
        return permuted, None
    of_source = np.full(len(size), -1)
    of_source[source] = labels[carriers]
    if (of_source[source] == labels[carriers]).all():
        for row in permuted:
            row[carriers] = random.permutation(of_source)[source]
        return permuted, "over"
    by_source = np.argsort(source, kind="stable")
    for row in permuted:
        shuffled = np.lexsort((random.random_sample(len(source)), source))
        row[carriers[by_source]] = labels[carriers[shuffled]]
    return permuted, "within"


def _swapped_pairs(labels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """[R, N] labels swapped within a random half of the pairs.

    The members of a pair share their prompt. So a permutation may only exchange which of the two was preferred.
    """
    other = labels.reshape(-1, 2)[:, ::-1].reshape(-1)
    swapped = random.random_sample((NUM_PERMUTATIONS, len(labels) // 2)) < 0.5
    return np.where(np.repeat(swapped, 2, axis=1), other, labels)


def _are_pairs(labels: np.ndarray) -> bool:
    """Whether in each pair, sequences 2i and 2i + 1 have different labels, or neither has one."""
    if len(labels) % 2:
        return False
    first, second = labels.reshape(-1, 2).T
    return bool(((first != second) | ((first < 0) & (second < 0))).all() and ((first < 0) == (second < 0)).all())
