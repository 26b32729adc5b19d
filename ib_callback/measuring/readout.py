"""Turn the sums of a pass into the quantities of a measurement (Conklin et al., ICLR 2026; Conklin 2025)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy as np

from ib_callback.bound.curve import IBCurve
from ib_callback.measuring.accumulate import JackknifeSums, Sums
from ib_callback.measuring.plan.batches import PIECE
from ib_callback.measuring.plan.null import SubsetCurve
from ib_callback.measuring.plan.plan import NullPlan, Plan
from ib_callback.measuring.views import Views
from ib_callback.results.measurement import Measurement
from ib_callback.results.points import FeaturePoint, PlanePoint
from ib_callback.results.uncertainty import Array, jackknife_error, with_errors

# A number counts as real if it exceeds this multiple of the estimated rounding error. In trials at both temperatures,
# with 2 to 1000 bins and up to 256,000 positions in a batch, the error was at most 1.6 times the estimate.
_ROUNDINGS = 3.0
# Rounding error of float64 entropies; it is all that remains if all states lie in one bin.
_FLOAT64 = 1e-14


def read_out(
    plan: Plan,
    sums: Sums,
    *,
    step: int | None,
    layers: Sequence[str],
    weighting: str,
    primary: str,
    settings: dict[str, Any],
    seconds: float,
    others: Iterable[tuple[Mapping[str, str], Plan, Sums]] = (),
    curve: IBCurve | None = None,
    views: Views | None = None,
    dispersion: Sequence[float] = (),
    companions: Mapping[str, Mapping[str, float]] | None = None,
    aimed: Mapping[str, tuple[Plan, Sums, IBCurve | None]] | None = None,
) -> Measurement:
    """Make the measurement from the sums of a whole pass.

    `others` are passes over the feature probes: the feature name of each label, plan and sums. `curve` is the bound in
    efficiencies, or None for the diagonal. `views` says what the columns of the sums are; None: one column for each
    layer. `dispersion` [L] and `companions` are copied into the measurement. `aimed` are the views of the output, with
    other codebooks (model/codebook.py), by name: plan, sums, and the curve if it bounds them.
    """
    views = views or Views(len(layers))
    readings = Readings(plan, sums.of(range(views.num_layers)), weighting)
    found = Found(primary)
    found.add(readings)
    for public, other_plan, other_sums in others:
        other = Found(primary, found.drafts)
        other.add(Readings(other_plan, other_sums, weighting))
        found.features.update((public[label], point) for label, point in other.features.items())
    is_empirical, is_diagonal = weighting == "empirical", curve is None
    ceiling = readings.ceiling if is_empirical else None

    def points(drafts: Mapping[str, Draft], ceiling: float | None, curve: IBCurve | None) -> dict[str, PlanePoint]:
        bounds = {primary: None if curve is None else curve.bound}
        return {
            name: draft.point(bounds.get(name), ceiling=ceiling, is_diagonal=is_diagonal)
            for name, draft in drafts.items()
        }

    def view(plan: Plan, draws: Sequence[Sums], curve: IBCurve | None) -> dict[str, PlanePoint]:
        of_draw = [Readings(plan, each, weighting) for each in draws]
        drafts = []
        for each in of_draw:
            part = Found(primary)
            part.add(each, features=False)
            drafts.append(part.drafts)
        ceiling = fmean(each.ceiling for each in of_draw) if is_empirical else None
        return points({name: Draft.averaged([part[name] for part in drafts]) for name in drafts[0]}, ceiling, curve)

    orders = points(found.drafts, ceiling, curve)
    shown = {
        name: view(plan, [sums.of(each) for each in columns], curve)
        for name, columns in (views.others if orders else {}).items()
    }
    shown |= {name: view(of, [part], bound) for name, (of, part, bound) in (aimed or {}).items()}
    return Measurement(
        step=step,
        entropy=float(readings.entropy.mean()),
        ceiling=ceiling,
        orders=orders,
        features=found.features,
        layers=tuple(layers),
        entropy_by_layer=tuple(readings.entropy.tolist()),
        ceiling_by_layer=tuple(readings.ceiling_by_layer.tolist()) if is_empirical else (),
        num_positions=plan.num_positions,
        seconds=seconds,
        settings=settings,
        views=shown,
        dispersion=fmean(dispersion) if dispersion else None,
        dispersion_by_layer=tuple(dispersion),
        companions={name: dict(values) for name, values in (companions or {}).items()},
    )


@dataclass
class Draft:
    """The unfinished point of an order. Each quantity adds its numbers to it, by name (results/metrics.py).

    layers: [L] complexity and expressivity of each layer: plain, document baseline, local and null.
    measured: nulls and their standard errors.
    num_positions_local: number of positions behind the document baseline.
    noise: an upper estimate of the standard deviation of the local complexity, for labels that say nothing.
    replicates: [2 G - 1] values of each of these numbers without each omission, if standard errors are planned.
    draws: [D] values of each of these numbers without each of several draws of reference points.
    baseline_errors: functions that give the standard error of a linear combination of baselines from its weights.
        Baselines of different entries are estimated independently.
    """

    layers: dict[str, list[float]] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    num_positions_local: int | None = None
    noise: float | None = None
    replicates: dict[str, Array] = field(default_factory=dict)
    draws: dict[str, Array] = field(default_factory=dict)
    baseline_errors: list[Callable[[Mapping[str, float]], float]] = field(default_factory=list)

    @classmethod
    def averaged(cls, drafts: Sequence[Draft]) -> Draft:
        """The mean over draws of reference points."""
        first, number = drafts[0], len(drafts)
        if number == 1:
            return first
        values = {name: np.array([fmean(draft.layers[name]) for draft in drafts]) for name in first.layers}
        # Each draw has its own null. The error of the null does not average out, because all draws use the same random
        # subsets.
        values |= {name: np.array([draft.measured[name] for draft in drafts]) for name in first.measured}
        noises = [draft.noise for draft in drafts if draft.noise is not None]
        return cls(
            layers={name: np.mean([draft.layers[name] for draft in drafts], axis=0).tolist() for name in first.layers},
            measured={name: float(values[name].mean()) for name in first.measured},
            num_positions_local=first.num_positions_local,
            noise=fmean(noises) if noises else None,
            replicates={
                name: np.mean([draft.replicates[name] for draft in drafts], axis=0) for name in first.replicates
            },
            draws={
                name: (value.sum() - value) / (number - 1) for name, value in values.items() if not name.endswith("_se")
            },
            baseline_errors=[lambda weights: fmean(draft.baseline_error(weights) for draft in drafts)],
        )

    def baseline_error(self, weights: Mapping[str, float]) -> float:
        """Standard error of a linear combination of baselines."""
        return math.hypot(*(error(weights) for error in self.baseline_errors))

    def point(
        self, curve: Callable[[float], float] | None = None, *, ceiling: float | None = None, is_diagonal: bool = True
    ) -> PlanePoint:
        """The finished point, with everything that follows from its numbers; `curve` None means the diagonal."""
        given: dict[str, Any] = {f"{name}_by_layer": values for name, values in self.layers.items()} | self.measured
        point = PlanePoint.from_layers(
            **given, ceiling=ceiling, noise=self.noise, num_positions_local=self.num_positions_local
        )
        if not is_diagonal:
            point = point.against(curve)
        draws: dict[str, Any] = {f"{name}_draws": tuple(values.tolist()) for name, values in self.draws.items()}
        if not self.replicates:
            return replace(point, **draws) if draws else point
        replicates: dict[str, Any] = {f"{name}_jackknife": tuple(values) for name, values in self.replicates.items()}
        return with_errors(replace(point, **replicates, **draws), self.baseline_error, curve)


@dataclass
class Found:
    """Collects what the quantities of a plan read from a pass, one after the other.

    primary: the order that features are compared with.
    drafts: drafts of the points, by order.
    """

    primary: str
    drafts: dict[str, Draft] = field(default_factory=lambda: defaultdict(Draft))
    features: dict[str, FeaturePoint] = field(default_factory=dict)

    @property
    def complexities(self) -> dict[str, float]:
        """Complexity of the primary order; also its part above the null and the error of that part, if known."""
        draft = self.drafts[self.primary]
        found = {"complexity": fmean(draft.layers["complexity"])}
        if "complexity_null" in draft.measured:
            found["complexity_above_null"] = found["complexity"] - draft.measured["complexity_null"]
            found["complexity_null_se"] = draft.measured["complexity_null_se"]
        return found

    def add(self, readings: Readings, *, features: bool = True) -> None:
        """Read all quantities of the plan, or only those of orders."""
        for quantity in readings.plan.quantities:
            if features or quantity.of_orders:
                quantity.read(readings, self)


class Readings:
    """The sums of a pass as information and entropies, in fractions of log(num_bins).

    plan: the plan of the pass.
    kept: [num_kept, L] entropies of the kept histograms.
    entropy: [L] H(Z) over all valid positions.
    ceiling_by_layer: [L] H(Z) minus the mean entropy of a single assignment; 0 if below its rounding error.
    ceiling: its mean over layers.
    left_out: the same sums without groups of sequences; None unless standard errors are planned.
    """

    def __init__(self, plan: Plan, sums: Sums, weighting: str) -> None:
        self.plan = plan
        self.kept = sums.kept.numpy()
        self.entropy = self.kept[plan.total]
        self._sensitivity = sums.sensitivity.numpy()
        ceiling = self.entropy - sums.single.numpy() / plan.num_positions
        self.ceiling_by_layer = _resolved(ceiling, self._rounding(np.ones(1), np.ones(1)))
        self.ceiling = float(self.ceiling_by_layer.mean())
        self.left_out = None if sums.jackknife is None else LeftOut(plan, sums, sums.jackknife)
        self._conditional = sums.conditional.numpy()
        self._empirical = weighting == "empirical"
        self._nulls = sums.nulls

    def given(self, number: int) -> np.ndarray:
        """[L] H(Z given the labels of a set)."""
        label_set = self.plan.label_sets[number]
        return self._conditional[number] / (label_set.num_positions if self._empirical else label_set.num_labels)

    def information(self, number: int, total: int | None = None) -> np.ndarray:
        """[L] information about the labels of a set; 0 where it is below the rounding error of the sums.

        `total` is the number of the kept histogram over the set's positions; None for all positions.
        """
        entropy = self.entropy if total is None else self.kept[total]
        counts = self.plan.counts[number]
        weights = counts.share if self._empirical else _normalised(counts.share / counts.count)
        return _resolved(entropy - self.given(number), self._rounding(counts.count, weights))

    def _rounding(self, count: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """[L] rounding error of the information about labels that occur `count` times, if all states are the same.

        The rounding error matters in that case, because the histograms of all labels then have the shape of the whole.
        Suppose that c numbers were added up in float32 for a bin, with c at most the depth of the plan. The relative
        error of the bin is about 2^-24 sqrt(c), or 2^-24 c/8 if that is larger, because equal numbers are rounded to
        the same side until the sum doubles. The error of H(Z given label) is that times its sensitivity. Labels with
        the same count have the same error, so nothing averages out. H(Z) adds the error of its pieces.
        """
        added = np.minimum(count - 1, self.plan.depth)
        terms = float(weights @ np.maximum(np.sqrt(added), added / 8)) + math.sqrt(PIECE)
        return _ROUNDINGS * 2.0**-24 * terms * self._sensitivity + _FLOAT64

    def curve(self, null: NullPlan, single: float, *, layer: int | None = None) -> SubsetCurve:
        """The null of labels as a function of their counts, in a layer or as a mean over all layers.

        `single` is the null of labels that occur once, which is exact.
        """
        divergences = self._nulls[null.number]
        of = divergences.mean(1) if layer is None else divergences[:, layer]
        subsets, unions = np.split(of.numpy(), [len(null.design.subset_size)])
        return SubsetCurve.estimate(null.design, subsets, unions, single)


def _resolved(information: np.ndarray, rounding: np.ndarray) -> np.ndarray:
    """The information where it is above the rounding error, else 0."""
    return np.where(np.abs(information) > rounding, information, 0.0)


def _normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


class LeftOut:
    """Means over layers, in fractions of log(num_bins), with one value for each omission: [2 G - 1].

    plan/jackknife.py defines the omissions.
    """

    def __init__(self, plan: Plan, sums: Sums, jackknife: JackknifeSums) -> None:
        assert plan.jackknife is not None
        self._jackknife = plan.jackknife
        self._conditional = sums.conditional.mean(1).numpy()
        self._removed = jackknife.removed.mean(2).numpy()
        self._totals = jackknife.totals.mean(2).numpy()
        self._entropy = self._totals[0]
        single = sums.single.mean().item() - self._jackknife.taken @ jackknife.single.mean(1).numpy()
        self._single = single / self._jackknife.rest

    def information(self, number: int, total: int | None = None) -> Array:
        """I(X;Z) for the labels of a set, over the positions of the kept histogram `total`; None: all positions."""
        rest = self._jackknife.rest_of_set[number]
        entropy = self._totals[0 if total is None else self._jackknife.totals.index(total)]
        return entropy - (self._conditional[number] - self._removed[number]) / rest

    def null(self, number: int, curve: SubsetCurve, single: float) -> Array:
        """Null information of a set's label counts without each omission.

        The curve d(c) of the smaller probe is approximated by that of the whole probe times the ratio of the two
        values d(1), which are exact. benchmarks/coverage.py compares this approximation with the truth.

        Args:
            number: number of the label set.
            curve: curve of the whole probe.
            single: d(1) of the whole probe: H(Z) minus the mean entropy of a single assignment.
        """
        scale = (self._entropy - self._single) / single if single > 0 else np.ones_like(self._entropy)
        return scale * [curve.null_alone(counts) for counts in self._jackknife.counts[number]]

    def error(self, number: int, total: int, information: float) -> float | None:
        """Standard error of the information about a set's labels; None if an omission takes all of them."""
        if (self._jackknife.rest_of_set[number] == 0).any():
            return None
        return jackknife_error(information, self.information(number, total))
