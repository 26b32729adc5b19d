"""What is known about a probe without a model: its labels, the expected null, and the memory needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ib_callback.estimator.quantise import assign, reference_points
from ib_callback.estimator.temperature import calibrated_temperature
from ib_callback.measuring.plan.null import LabelCounts
from ib_callback.measuring.planner import make_plan
from ib_callback.measuring.quantities.features import Feature, FeatureLabels, too_few_pairs
from ib_callback.probe.ngrams import ORDER_NAMES, valid_positions
from ib_callback.probe.probe import Probe

DIM = 768
_POOL = 8192
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)


@dataclass(frozen=True)
class SideStatistics:
    """Labels of one order on one side of the valid positions.

    labels: number of labels; singletons: number of labels that occur once.
    singleton_share: share of the positions whose label occurs once.
    expected_null: fraction of log(num_bins); see `isotropic_null`.
    """

    labels: int
    singletons: int
    singleton_share: float
    expected_null: float


@dataclass(frozen=True)
class FeatureStatistics:
    """Labels of one feature.

    counts: {name or number of the label: (sequences with it, valid positions with it)}.
    null: how the null is drawn, in words.
    """

    counts: dict[str, tuple[int, int]]
    null: str


@dataclass(frozen=True)
class ProbeStatistics:
    """Statistics of a probe.

    num_positions: valid positions at the widest order.
    orders: {order: (context before, context after)}.
    memory: bytes that a measurement needs in addition to the forward pass.
    """

    num_positions: int
    orders: dict[str, tuple[SideStatistics, SideStatistics]]
    features: dict[str, FeatureStatistics]
    memory: int


def probe_statistics(
    probe: Probe, *, num_layers: int = 32, num_bins: int = 100, batch_size: int = 8, dim: int = DIM
) -> ProbeStatistics:
    """Plan a measurement of the four orders and all features of `probe`, and return what the plan says about it.

    Args:
        probe: any probe.
        num_layers: number of layers that are measured at once.
        num_bins: number of reference points.
        batch_size: sequences in a forward pass.
        dim: dimension of the states, for the expected null.

    Raises:
        ProbeError: no position is valid.
    """
    positions = valid_positions(probe.attention_mask.numpy(), max(ORDER_NAMES.values()), probe=probe.name)
    measurable = [
        name for name, table in probe.labels.items() if (table.numpy()[positions.sequence, positions.offset] >= 0).any()
    ]
    plan = make_plan(probe, ORDER_NAMES, tuple(measurable), batch_size=batch_size, null=True, seed=0)
    total = plan.num_positions
    sides = {}
    for label_set, counts in zip(plan.label_sets, plan.counts, strict=True):
        singles = float(counts.share[counts.count == 1].sum())
        null = isotropic_null(counts, total, dim=dim, num_bins=num_bins)
        sides[label_set.name] = SideStatistics(label_set.num_labels, round(singles * total), singles, null)
    orders = {order: (sides["complexity", order], sides["expressivity", order]) for order in ORDER_NAMES}
    none = FeatureStatistics({}, "has no label at a valid position, so it cannot be measured")
    features = dict.fromkeys(probe.labels, none)
    for feature in (quantity.labels for quantity in plan.quantities if isinstance(quantity, Feature)):
        table = probe.labels[feature.name]
        numbers = table[table >= 0].unique().tolist()  # as in feature_labels, renumbered in this order
        names = probe.label_names.get(feature.name)
        counts_of = {}
        for place, number in enumerate(numbers):
            sequences = int((table == number).any(1).sum())
            counts_of[names[number] if names else str(number)] = (sequences, int((feature.values == place).sum()))
        features[feature.name] = FeatureStatistics(counts_of, _null_of(feature))
    return ProbeStatistics(total, orders, features, plan.memory(num_layers, num_bins))


def isotropic_null(counts: LabelCounts, num_positions: int, *, dim: int = DIM, num_bins: int = 100) -> float:
    """The null information of labels with these counts, if states were independent and in random directions.

    It is Σ_x (c(x)/T) d(c(x)), where d(c) is the expected divergence of the mean of c assignments from the mean of
    all, at the calibrated temperature. Real states share directions, so the null of a trained model is usually
    lower. For a collapsed model it is 0.

    Args:
        counts: counts of the labels.
        num_positions: number of positions T.
        dim: dimension of the states.
        num_bins: number of reference points.

    Returns:
        Fraction of log(num_bins).
    """
    from scipy.interpolate import PchipInterpolator  # imports scipy.optimize

    sizes, divergence = _isotropic_divergence(dim, num_bins)
    curve = PchipInterpolator(np.log(sizes), np.log(divergence))
    count = counts.count
    within = np.exp(curve(np.log(np.minimum(count, sizes[-1]))))
    beyond = within * np.minimum(1.0, sizes[-1] / count)  # small divergences fall like 1/c
    # Correction because positions are drawn from T without replacement.
    finite = (num_positions - count) / max(1, num_positions - 1)
    return float((counts.share * beyond * finite).sum())


@lru_cache(maxsize=8)
def _isotropic_divergence(dim: int, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Sizes c, and d(c) / log(num_bins) for states in random directions."""
    states = torch.from_numpy(np.random.RandomState(0).standard_normal((_POOL, dim)).astype(np.float32))
    assignments = assign(states, reference_points(dim, num_bins), calibrated_temperature(dim, num_bins))[0].numpy()
    assignments = assignments.astype(np.float64)
    whole = assignments.mean(0)
    divergence = []
    for size in _SIZES:
        histogram = assignments[: _POOL // size * size].reshape(-1, size, num_bins).mean(1)
        terms = histogram * np.log(np.maximum(histogram, 1e-300) / whole)
        found = terms.sum(1).mean() / np.log(num_bins)
        # The mean of the finite pool is nearer to its subsets than the mean of infinitely many states would be.
        divergence.append(found * (_POOL - 1) / (_POOL - size))
    return np.array(_SIZES, np.float64), np.array(divergence)


def _null_of(feature: FeatureLabels) -> str:
    if feature.permuted is None:
        return "labels vary within sequences: permuted over positions"
    if feature.paired:
        few = too_few_pairs(feature)
        return f"swapped within pairs: {few}" if few else "swapped within pairs"
    by_source = {"over": "permuted by whole sources", "within": "permuted by whole sequences within each source"}
    return by_source.get(feature.by_source or "", "permuted by whole sequences")
