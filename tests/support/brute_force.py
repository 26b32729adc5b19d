"""The slow twin: every quantity of the information plane in float64, by its definition, position by position.

It shares no code with `ib_callback` and takes no short cut of it: labels are Python tuples in dicts,
histograms are added up position by position, and the permutation nulls permute real labels.
`test_brute_force.py` checks it against values worked out by hand; `test_brute_force_agreement.py` checks the
package against it.

Throughout, `hidden` is a list with one float64 array [N, S, dim] per layer, `ids` an int array [N, S], `mask`
a bool array [N, S] (True: a real token), and entropies are divided by log(num_bins) unless said otherwise.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import mpmath
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Position = tuple[int, int]
ORDERS = ("token", "bigram", "trigram", "quadgram")


# --- positions and labels


def order_width(name: str) -> int:
    """Number of tokens in an order's labels: 1 for "token" … 4 for "quadgram", then "5-gram" and so on."""
    return ORDERS.index(name) + 1 if name in ORDERS else int(name.removesuffix("-gram"))


def valid_positions(mask: npt.NDArray[np.bool_], widest: int) -> list[Position]:
    """Positions (b, s) with `widest` real tokens ending at s and `widest` real tokens starting at s + 1."""
    positions = []
    for b in range(mask.shape[0]):
        for s in range(mask.shape[1]):
            needed = range(s - widest + 1, s + widest + 1)
            if all(0 <= i < mask.shape[1] and mask[b, i] for i in needed):
                positions.append((b, s))
    return positions


def input_label(ids: npt.NDArray[np.int64], position: Position, width: int) -> tuple[int, ...]:
    """The `width` tokens that end at the position: its preceding context, itself included."""
    b, s = position
    return tuple(int(ids[b, i]) for i in range(s - width + 1, s + 1))


def output_label(ids: npt.NDArray[np.int64], position: Position, width: int) -> tuple[int, ...]:
    """The `width` tokens that follow the position."""
    b, s = position
    return tuple(int(ids[b, i]) for i in range(s + 1, s + width + 1))


# --- quantisation


def reference_points(dim: int, num_bins: int, seed: int) -> Array:
    """Points uniform on the unit sphere, [num_bins, dim]."""
    points = np.random.RandomState(seed).standard_normal((num_bins, dim))
    for j in range(num_bins):
        points[j] /= math.sqrt(math.fsum(points[j] ** 2))
    return points


def vmf_divergence(kappa: mpmath.mpf, dim: int) -> mpmath.mpf:
    """KL(vMF(kappa) ‖ uniform on S^(dim-1)) in nats, from the density's normaliser (Bessel functions)."""
    half = mpmath.mpf(dim) / 2
    bessel = mpmath.besseli(half - 1, kappa)
    mean_cosine = mpmath.besseli(half, kappa) / bessel
    log_density = (half - 1) * mpmath.log(kappa) - half * mpmath.log(2 * mpmath.pi) - mpmath.log(bessel)
    log_area = mpmath.log(2) + half * mpmath.log(mpmath.pi) - mpmath.loggamma(half)
    return kappa * mean_cosine + log_density + log_area


@functools.cache
def calibrated_temperature(dim: int, num_bins: int) -> float:
    """The temperature 1/kappa at which `vmf_divergence` is log(num_bins), by bisection with 40 digits."""
    with mpmath.workdps(40):
        low, high = mpmath.mpf("1e-6"), mpmath.mpf("1e-6")
        while vmf_divergence(high, dim) < mpmath.log(num_bins):
            high *= 16
        while high / low > 1 + mpmath.mpf("1e-14"):
            middle = mpmath.sqrt(low * high)
            if vmf_divergence(middle, dim) < mpmath.log(num_bins):
                low = middle
            else:
                high = middle
        return float(1 / mpmath.sqrt(low * high))


def soft_assignment(z: Array, points: Array, temperature: float) -> Array:
    """softmax(cos(z, w_j) / temperature) of one hidden state [dim], as [num_bins]."""
    length = math.sqrt(math.fsum(np.asarray(z, dtype=np.float64) ** 2))
    scores = (points @ np.asarray(z, dtype=np.float64)) / length / temperature
    weights = np.exp(scores - scores.max())
    return weights / math.fsum(weights)


# --- entropy, information


def efficiency(histogram: Array) -> float:
    """Entropy of a histogram, normalised or not, divided by the log of its number of bins."""
    shares = histogram[histogram > 0] / math.fsum(histogram)
    return -math.fsum(shares * np.log(shares)) / math.log(len(histogram))


def overall_entropy(assignments: Array) -> float:
    """H(Z): the entropy of the mean soft assignment. `assignments` is [T, num_bins]."""
    return efficiency(assignments.sum(axis=0))


def conditional_entropy(assignments: Array, labels: Sequence[Hashable], weighting: str = "empirical") -> float:
    """H(Z given X), with one label per row of `assignments`."""
    histograms: dict[Hashable, Array] = {}
    counts: dict[Hashable, int] = {}
    for row, label in zip(assignments, labels, strict=True):
        histograms[label] = histograms.get(label, np.zeros(len(row))) + row
        counts[label] = counts.get(label, 0) + 1
    weight: Callable[[Hashable], float]
    if weighting == "empirical":
        weight = lambda label: counts[label] / len(assignments)  # noqa: E731
    elif weighting == "uniform":
        weight = lambda label: 1 / len(counts)  # noqa: E731
    else:
        raise ValueError(f"unknown weighting {weighting!r}")
    return math.fsum(weight(label) * efficiency(histograms[label]) for label in histograms)


def mutual_information(assignments: Array, labels: Sequence[Hashable], weighting: str = "empirical") -> float:
    """I(X;Z) = H(Z) - H(Z given X)."""
    return overall_entropy(assignments) - conditional_entropy(assignments, labels, weighting)


def ceiling(assignments: Array) -> float:
    """H(Z) minus the mean entropy of one soft assignment: the information if all labels were distinct."""
    return overall_entropy(assignments) - math.fsum(efficiency(row) for row in assignments) / len(assignments)


# --- codebooks aimed at the output


def frequent_tokens(ids: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_], number: int) -> list[int]:
    """The most frequent real tokens; of equally frequent ones, the lower ids."""
    counts: dict[int, int] = {}
    for b, s in itertools.product(*map(range, ids.shape)):
        if mask[b, s]:
            counts[int(ids[b, s])] = counts.get(int(ids[b, s]), 0) + 1
    return sorted(counts, key=lambda token: (-counts[token], token))[:number]


def readout_assignments(
    states: Array, rows: Array, positions: Sequence[Position], of_mean: Sequence[Position] | None = None
) -> Array:
    """[T, n] of last states [N, S, dim] to output embeddings [n, dim], without the mean of either.

    `of_mean` are the positions of which the mean state is; None: all.
    """
    points = np.array([row - sum(rows) / len(rows) for row in rows])
    points = np.array([point / math.sqrt(math.fsum(point**2)) for point in points])
    used = positions if of_mean is None else of_mean
    mean = sum(states[position] for position in used) / len(used)
    temperature = calibrated_temperature(states.shape[-1], len(points))
    return np.array([soft_assignment(states[position] - mean, points, temperature) for position in positions])


def grouped_shares(logits: Array, tokens: Sequence[int], positions: Sequence[Position]) -> Array:
    """[T, n + 1] next-token distributions of logits [N, S, V]: of n tokens, and of all others together."""
    found = []
    for position in positions:
        weights = np.exp(logits[position] - logits[position].max())
        rest = math.fsum(weight for token, weight in enumerate(weights) if token not in tokens)
        found.append(np.array([*weights[tokens], rest]) / math.fsum(weights))
    return np.array(found)


# --- permutation nulls


@dataclass(frozen=True)
class Null:
    """Mean and standard deviation over permutations; `standard_error` of the mean, 0 if all were listed."""

    mean: float
    std: float
    standard_error: float

    @classmethod
    def of(cls, values: Sequence[float], *, exhaustive: bool) -> Null:
        std = float(np.std(values, ddof=0 if exhaustive else 1))
        return cls(float(np.mean(values)), std, 0.0 if exhaustive else std / math.sqrt(len(values)))


def _mean_information(layers: Sequence[Array], labels: Sequence[Hashable]) -> float:
    return math.fsum(mutual_information(layer, labels) for layer in layers) / len(layers)


def enumerated_null(layers: Sequence[Array], labels: Sequence[Hashable]) -> Null:
    """Information under every permutation of the labels over positions, averaged over layers; T <= 8."""
    values = [_mean_information(layers, permuted) for permuted in itertools.permutations(labels)]
    return Null.of(values, exhaustive=True)


def permutation_null(layers: Sequence[Array], labels: Sequence[Hashable], *, repeats: int = 300, seed: int = 0) -> Null:
    """The same from `repeats` random permutations; `layers` holds one [T, num_bins] array each.

    Positions are grouped by label once and the positions are permuted, which permutes the labels: group i of
    every permutation is a random set of as many positions as label i has.
    """
    generator = np.random.default_rng(seed)
    labels = list(labels)
    sizes = [labels.count(label) for label in dict.fromkeys(labels)]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    values = []
    for _ in range(repeats):
        order = generator.permutation(len(labels))
        by_layer = []
        for layer in layers:
            groups = np.add.reduceat(layer[order], starts, axis=0) / np.array(sizes)[:, None]
            # Soft assignments have no zero, but hand-made ones do: 0 log 0 = 0.
            logs = np.log(groups, out=np.zeros_like(groups), where=groups > 0)
            entropies = -(groups * logs).sum(axis=1) / math.log(layer.shape[1])
            by_layer.append(overall_entropy(layer) - float(entropies @ np.array(sizes)) / len(labels))
        values.append(math.fsum(by_layer) / len(by_layer))
    return Null.of(values, exhaustive=False)


def sequence_null(
    layers: Sequence[Array],
    sequences: Sequence[int],
    labels: Sequence[int],
    *,
    paired: bool = False,
    repeats: int = 400,
    seed: int = 0,
) -> Null:
    """Null of labels that are constant within a sequence: whole sequences trade labels.

    Args:
        layers: one [T, num_bins] array per layer, over the positions that carry the label.
        sequences: the sequence each position belongs to, [T].
        labels: the label of each position, [T].
        paired: swap the labels 0 and 1 of sequences 2i and 2i + 1, every combination of swaps once; otherwise
            `repeats` random permutations of the labels among the sequences.
    """
    label_of = dict(zip(sequences, labels, strict=True))
    names = list(label_of)
    values = []
    if paired:
        pairs = sorted({b // 2 for b in names})
        for swaps in itertools.product((False, True), repeat=len(pairs)):
            swapped = dict(zip(pairs, swaps, strict=True))
            flipped = {b: 1 - label_of[b] if swapped[b // 2] else label_of[b] for b in names}
            values.append(_mean_information(layers, [flipped[b] for b in sequences]))
        return Null.of(values, exhaustive=True)
    generator = np.random.default_rng(seed)
    for _ in range(repeats):
        shuffled = dict(zip(names, generator.permutation([label_of[b] for b in names]).tolist(), strict=True))
        values.append(_mean_information(layers, [shuffled[b] for b in sequences]))
    return Null.of(values, exhaustive=False)


# --- the whole table


@dataclass(frozen=True)
class Plane:
    """One order. `inputs` and `outputs` are the labels of the valid positions."""

    complexity_by_layer: list[float]
    expressivity_by_layer: list[float]
    inputs: list[tuple[int, ...]]
    outputs: list[tuple[int, ...]]

    @property
    def complexity(self) -> float:
        return math.fsum(self.complexity_by_layer) / len(self.complexity_by_layer)

    @property
    def expressivity(self) -> float:
        return math.fsum(self.expressivity_by_layer) / len(self.expressivity_by_layer)


@dataclass(frozen=True)
class Feature:
    """One feature label; `layers`, `sequences` and `labels` are those of the positions that carry it."""

    information_by_layer: list[float]
    layers: list[Array]
    sequences: list[int]
    labels: list[int]

    @property
    def information(self) -> float:
        return math.fsum(self.information_by_layer) / len(self.information_by_layer)


@dataclass(frozen=True)
class Table:
    """All quantities of one probe and one model. `layers` holds the soft assignments, [T, num_bins] each."""

    positions: list[Position]
    layers: list[Array]
    entropy_by_layer: list[float]
    ceiling: float
    orders: dict[str, Plane]
    features: dict[str, Feature]

    @property
    def entropy(self) -> float:
        return math.fsum(self.entropy_by_layer) / len(self.entropy_by_layer)


def evaluate(
    hidden: Sequence[Array],
    ids: npt.NDArray[np.int64],
    mask: npt.NDArray[np.bool_],
    *,
    orders: Sequence[str] = ORDERS,
    features: Mapping[str, npt.NDArray[np.int64]] | None = None,
    num_bins: int = 100,
    seed: int = 0,
    temperature: float | str = "calibrated",
    weighting: str = "empirical",
) -> Table:
    """Evaluate everything but the nulls, which `permutation_null` and `sequence_null` give from the Table."""
    positions = valid_positions(mask, max(order_width(name) for name in orders))
    layers = []
    for states in hidden:
        dim = states.shape[-1]
        points = reference_points(dim, num_bins, seed)
        epsilon = calibrated_temperature(dim, num_bins) if isinstance(temperature, str) else temperature
        layers.append(np.array([soft_assignment(states[b, s], points, epsilon) for b, s in positions]))
    planes = {}
    for name in orders:
        inputs = [input_label(ids, position, order_width(name)) for position in positions]
        outputs = [output_label(ids, position, order_width(name)) for position in positions]
        planes[name] = Plane(
            complexity_by_layer=[mutual_information(layer, inputs, weighting) for layer in layers],
            expressivity_by_layer=[mutual_information(layer, outputs, weighting) for layer in layers],
            inputs=inputs,
            outputs=outputs,
        )
    measured = {}
    for name, values in (features or {}).items():
        carrying = [i for i, position in enumerate(positions) if values[position] != -1]
        labels = [int(values[positions[i]]) for i in carrying]
        chosen = [layer[carrying] for layer in layers]
        measured[name] = Feature(
            information_by_layer=[mutual_information(layer, labels, weighting) for layer in chosen],
            layers=chosen,
            sequences=[positions[i][0] for i in carrying],
            labels=labels,
        )
    return Table(
        positions=positions,
        layers=layers,
        entropy_by_layer=[overall_entropy(layer) for layer in layers],
        ceiling=math.fsum(ceiling(layer) for layer in layers) / len(layers),
        orders=planes,
        features=measured,
    )
