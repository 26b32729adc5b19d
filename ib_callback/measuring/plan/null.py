"""The permutation null: the information that labels without meaning reach on a finite sample.

E[I(π(X);Z)] over permutations π of the labels depends only on the label counts. It is H(Z) − Σ_x (c(x)/T) g(c(x)),
where g(c) is the expected entropy of the mean of c assignments drawn without replacement. The mean over subsets of
the cross-entropy to the whole sample's histogram is exactly H(Z). So H(Z) − g(c) = d(c), the expected divergence of
a subset's histogram from that of the whole sample. Divergences scatter far less than entropies. The pass itself gives
d(1) exactly, and d(T) = 0. In between, d is estimated from random subsets at a grid of sizes, and interpolated in
log c, where it is smooth. The same subsets serve every order and both sides.

(E12 of docs/mathematics.md)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Subsets of up to 1/NUM_PARTS of the positions are drawn directly. Larger ones are unions of the parts of one random
# partition: the pass then reads every position only once.
NUM_PARTS = 64
# Number of histograms for all sizes that are drawn directly; the standard error falls with the square root of it.
NUM_SUBSETS = 1536
MIN_SUBSETS = 8
# With fewer positions than this, subsets of any size are drawn directly.
SMALL_SAMPLE = 2048
# The subsets of one size may add up to READS_PER_POSITION × T positions, or to MIN_READS if that is more.
READS_PER_POSITION = 2
MIN_READS = 20_000
GRID_RATIO = 1.4
# From this many random orders of the positions on, the scatter between them gives the error of their mean.
MANY_ORDERS = 30


@dataclass(frozen=True)
class LabelCounts:
    """How often labels occur: `share[i]` is the share of all positions whose label occurs `count[i]` times."""

    count: np.ndarray
    share: np.ndarray

    @classmethod
    def of(cls, counts: np.ndarray) -> LabelCounts:
        """From the number of positions of each label."""
        return cls.of_numbers(np.bincount(counts))

    @classmethod
    def of_numbers(cls, number: np.ndarray) -> LabelCounts:
        """From an array whose entry c is the number of labels that occur c times."""
        count = np.flatnonzero(number)
        positions = count * number[count]
        return cls(count.astype(np.float64), positions / max(int(positions.sum()), 1))


@dataclass(frozen=True)
class SubsetDesign:
    """The random subsets of T positions that are summed to estimate d at the sizes that labels need.

    The subsets themselves are not stored, but drawn again on each request: at the paper's scale they take over 1 GiB,
    and after planning only their sizes are needed.

    drawn: (size, number of subsets), ascending in size.
    unions: [U, parts] 0/1, which parts of a random partition make up each union; empty if unions are not needed.
    union_size: [U] nominal sizes (parts differ by at most one position).
    num_positions: number of positions T.
    seed: seed of the draw.
    """

    drawn: tuple[tuple[int, int], ...]
    unions: np.ndarray
    union_size: np.ndarray
    num_positions: int
    seed: int

    @property
    def subset_size(self) -> np.ndarray:
        """[R] sizes of the directly drawn subsets."""
        sizes, numbers = np.array(self.drawn, np.int64).reshape(-1, 2).T
        return np.repeat(sizes.astype(np.float64), numbers)

    @property
    def subsets(self) -> list[np.ndarray]:
        """Position numbers of each directly drawn subset."""
        return list(_draw_subsets(np.random.RandomState(self.seed), self.drawn, self.num_positions))

    @property
    def parts(self) -> list[np.ndarray]:
        """Position numbers of each part of the random partition; empty if unions are not needed."""
        if not len(self.unions):
            return []
        random = np.random.RandomState(self.seed)
        for _ in _draw_subsets(random, self.drawn, self.num_positions):
            pass  # the generator draws the partition after the subsets
        return _draw_parts(random, self.num_positions)

    @cached_property
    def dependence(self) -> dict[float, dict[float, float]]:
        """For each two sizes, the mean correlation between the divergences of their subsets, with themselves included.

        For two equal sizes this is the variance of the mean divergence, as a share of the variance of one divergence.
        To leading order, a divergence is the squared distance of the mean of a subset from that of all T positions.
        Two such means, of s and s' positions with o positions in common, have the correlation

            r = (o / (s s') − 1 / T) / sqrt((1 / s − 1 / T) (1 / s' − 1 / T)),

        and their squares have r² (as for normal variables). So the two halves of T count as one subset, and unions of
        the same parts are correlated whatever their sizes.
        """
        found: dict[float, dict[float, float]] = {}
        for size, number in zip(*np.unique(self.subset_size, return_counts=True), strict=True):
            # Each random order gives as many disjoint subsets as fit.
            most = self.num_positions // int(size)
            of_one_order = np.array([most] * (number // most) + [number % most])
            pairs = float((of_one_order * (of_one_order - 1)).sum())
            found[float(size)] = {float(size): (number + pairs * (size / (self.num_positions - size)) ** 2) / number**2}
        if len(self.unions):
            num_parts = self.unions.shape[1]
            parts = self.unions.sum(1)
            free = np.sqrt(1 / parts - 1 / num_parts)
            common = self.unions @ self.unions.T
            squared = ((common / np.outer(parts, parts) - 1 / num_parts) / np.outer(free, free)) ** 2
            sizes = [size for size in np.unique(self.union_size).tolist() if size not in found]
            for a in sizes:
                with_a = squared[self.union_size == a].mean(0)
                found[a] = {b: float(with_a[self.union_size == b].mean()) for b in sizes}
        return found


def design_subsets(num_positions: int, label_counts: list[LabelCounts], seed: int) -> SubsetDesign:
    """Choose subsets for label sets with these counts; sizes that matter more get more subsets."""
    return draw_design(num_positions, label_counts, seed)[0]


def draw_design(
    num_positions: int, label_counts: list[LabelCounts], seed: int
) -> tuple[SubsetDesign, list[np.ndarray], list[np.ndarray]]:
    """`design_subsets`, together with the `subsets` and `parts`, which then need not be drawn again."""
    random = np.random.RandomState(seed)
    largest = int(max((counts.count.max() for counts in label_counts), default=1))
    direct_limit = num_positions if num_positions <= SMALL_SAMPLE else num_positions // NUM_PARTS
    grid = _grid(min(largest, num_positions))
    direct = [size for size in grid if size <= direct_limit and size < num_positions]
    # One size beyond the limit is needed, to interpolate between the last direct size and the first union.
    needs_unions = largest > max(direct, default=1) and num_positions > direct_limit

    drawn = tuple(zip(direct, _allocate(direct, num_positions, label_counts), strict=True))
    subsets = list(_draw_subsets(random, drawn, num_positions))
    parts: list[np.ndarray] = []
    unions = np.zeros((0, 0))
    union_size = np.zeros(0)
    if needs_unions:
        parts = _draw_parts(random, num_positions)
        part_counts = [k for k in (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45) if (k - 1) * direct_limit < 2 * largest]
        rows = []
        for k in part_counts:
            # Every part is used equally often: row u takes k parts from place u on in a random circle.
            circle = np.argsort(random.permutation(NUM_PARTS))
            rows.append((circle[None] - np.arange(NUM_PARTS)[:, None]) % NUM_PARTS < k)
        unions = np.concatenate(rows).astype(np.float64)
        union_size = np.repeat(np.array(part_counts) * num_positions / NUM_PARTS, NUM_PARTS)
    return SubsetDesign(drawn, unions, union_size, num_positions, seed), subsets, parts


def _draw_subsets(
    random: np.random.RandomState, drawn: Iterable[tuple[int, int]], num_positions: int
) -> Iterator[np.ndarray]:
    """Draw the given number of subsets of each size; those from one random order of the positions are disjoint."""
    for size, number in drawn:
        left = number
        while left:
            order = random.permutation(num_positions)
            take = min(left, num_positions // size)
            yield from order[: take * size].astype(np.int32).reshape(take, size)
            left -= take


def _draw_parts(random: np.random.RandomState, num_positions: int) -> list[np.ndarray]:
    return np.array_split(random.permutation(num_positions).astype(np.int32), NUM_PARTS)


def _grid(largest: int) -> list[int]:
    """Sizes from 2 to at least `largest`: every small size, because most labels are rare; then a geometric grid."""
    sizes = list(range(2, min(largest, 8) + 1))
    size = 8.0
    while sizes and sizes[-1] < largest:
        size *= GRID_RATIO
        sizes.append(min(math.ceil(size), largest))
    return sizes


def _allocate(sizes: list[int], num_positions: int, label_counts: list[LabelCounts]) -> list[int]:
    """Number of subsets of each size: proportional to the weight of the size times the spread of its divergences."""
    if not sizes:
        return []
    knots = np.array([1, *sizes], np.float64)
    weight = np.max([_weights_on(knots, counts) for counts in label_counts], axis=0)[1:]
    # The spread of divergences falls like 1/c for large c, and more slowly for small c.
    wanted = weight / knots[1:] ** 0.75
    most = np.maximum(MIN_SUBSETS, max(READS_PER_POSITION * num_positions, MIN_READS) / knots[1:])
    number = NUM_SUBSETS * wanted / max(wanted.sum(), 1e-300)
    return [int(n) for n in np.clip(np.ceil(number), MIN_SUBSETS, most)]


def _weights_on(knots: np.ndarray, counts: LabelCounts) -> np.ndarray:
    """Share of the positions that each knot represents when d is interpolated linearly in log c."""
    place = np.interp(np.log(counts.count), np.log(knots), np.arange(len(knots)))
    lower = np.minimum(place.astype(int), len(knots) - 1)
    upper = np.minimum(lower + 1, len(knots) - 1)
    weights = np.zeros(len(knots))
    np.add.at(weights, lower, counts.share * (1 - (place - lower)))
    np.add.at(weights, upper, counts.share * (place - lower))
    return weights


@dataclass(frozen=True)
class SubsetCurve:
    """d(c) = H(Z) − g(c), as a mean over layers, for c from 1 to T.

    size: [k] ascending, from 1 to T.
    value: [k] d, as a fraction of log(num_bins).
    error: [k] standard error of `value`; 0 at 1 and T, where d is exact.
    spread: [k] standard deviation over subsets.
    correlation: [k, k] correlation of these errors; None if they are uncorrelated.
    """

    size: np.ndarray
    value: np.ndarray
    error: np.ndarray
    spread: np.ndarray
    correlation: np.ndarray | None = None

    @classmethod
    def estimate(cls, design: SubsetDesign, subsets: np.ndarray, unions: np.ndarray, single: float) -> SubsetCurve:
        """Estimate the curve from the divergences of all subsets from the whole.

        Args:
            design: the design of the subsets.
            subsets: [R] divergences of the directly drawn subsets, means over layers.
            unions: [U] divergences of the unions, means over layers.
            single: d(1), H(Z) minus the mean entropy of a single assignment.
        """
        points = {1.0: (single, 0.0, 0.0), float(design.num_positions): (0.0, 0.0, 0.0)}
        dependence = design.dependence
        for is_direct, sizes, divergences in ((True, design.subset_size, subsets), (False, design.union_size, unions)):
            for drawn_size in np.unique(sizes).tolist():
                if drawn_size in points:
                    continue
                drawn = divergences[sizes == drawn_size]
                spread = float(drawn.std(ddof=1))
                # The mean of correlated subsets varies more than their scatter suggests.
                share = dependence[drawn_size][drawn_size]
                error = spread * math.sqrt((len(drawn) - 1) / len(drawn) * share / (1 - share))
                orders = np.arange(len(drawn)) // int(design.num_positions // drawn_size)
                if is_direct and orders[-1] >= MANY_ORDERS:
                    of_order = np.bincount(orders, drawn - drawn.mean())
                    error = math.sqrt(float((of_order**2).sum()) * len(of_order) / (len(of_order) - 1)) / len(drawn)
                points[drawn_size] = (float(drawn.mean()), error, spread)
        size = np.array(sorted(points))
        value, error, spread = np.array([points[s] for s in size]).T
        covariance = np.array([[dependence.get(a, {}).get(b, 0.0) for b in size] for a in size])
        np.fill_diagonal(covariance, np.maximum(covariance.diagonal(), np.finfo(float).tiny))
        scale = np.sqrt(covariance.diagonal())
        return cls(size, value, error, spread, covariance / np.outer(scale, scale))

    def null(self, counts: LabelCounts) -> tuple[float, float]:
        """Null information of labels with these counts, and the standard error of that estimate."""
        if len(self.size) == 1:  # with a single position there is nothing to permute
            return 0.0, 0.0
        return self.null_alone(counts), self.error_of({"null": counts})({"null": 1.0})

    def null_alone(self, counts: LabelCounts) -> float:
        """Null information without its standard error."""
        if len(self.size) == 1:
            return 0.0
        return float((counts.share * self._interpolated(np.log(counts.count))).sum())

    @cached_property
    def _interpolated(self) -> Callable[[np.ndarray], np.ndarray]:
        """D as a function of log c; made once, because making it takes longer than evaluating it."""
        from scipy.interpolate import PchipInterpolator  # imports scipy.optimize

        return PchipInterpolator(np.log(self.size), self.value)

    def error_of(self, counts: Mapping[str, LabelCounts]) -> Callable[[Mapping[str, float]], float]:
        """A function that gives the standard error of a linear combination of these nulls from its weights by name."""
        on_curve = {name: _weights_on(self.size, each) for name, each in counts.items()}

        def error(weights: Mapping[str, float]) -> float:
            combined = self.error * sum(weights.get(name, 0.0) * each for name, each in on_curve.items())
            correlated = combined if self.correlation is None else self.correlation @ combined
            return math.sqrt(max(float(combined @ correlated), 0.0))

        return error

    def spread_of_null(self, counts: LabelCounts) -> float:
        """An upper estimate of the standard deviation of the information over permutations.

        Labels with a large share of the sample diverge together, because what one has the others lack. For labels
        above 1/16 of the sample the spreads are added; for the others the squares of the spreads are added.
        """
        spread = np.interp(np.log(counts.count), np.log(self.size), self.spread)
        common = counts.count > self.size[-1] / 16
        number = counts.share * self.size[-1] / counts.count
        each = counts.count / self.size[-1] * spread
        return math.sqrt(float((number * each)[common].sum() ** 2 + (number * each**2)[~common].sum()))
