"""From the sums of a pass to the quantities of a measurement (design: Conklin et al., ICLR 2026; Conklin 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ib_callback.bound.curve import IBCurve
from ib_callback.measuring.accumulate import Sums
from ib_callback.measuring.left_out import LeftOut
from ib_callback.measuring.plan.null import SubsetCurve
from ib_callback.measuring.plan.plan import FeaturePlan, NullPlan, Plan
from ib_callback.results.measurement import Measurement
from ib_callback.results.points import FeaturePoint, PlanePoint
from ib_callback.results.uncertainty import with_bound_error, with_errors

# Of sums of a few float64 numbers of order 1.
_ROUNDING = 1e-14


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
) -> Measurement:
    """The measurement that the sums of a whole pass amount to.

    `others` are passes over further probes, of which the features are measured: the name that the measurement gives
    to each label, plan and sums. `curve`, if it is the bound, is in efficiencies.
    """
    reader = _Reader(plan, sums, weighting)
    names = [name for quantity, name in (s.name for s in plan.label_sets) if quantity == "complexity"]
    orders = {name: reader.plane_point(name) for name in names}
    if curve is not None:
        bounds = {name: curve.bound if name == primary else None for name in orders}
        orders = {n: with_bound_error(p.against(bounds[n]), bounds[n]) for n, p in orders.items()}
    complexity = orders[primary].complexity
    features = {f.feature.name: reader.feature_point(f, complexity) for f in plan.features}
    for public, other_plan, other_sums in others:
        other = _Reader(other_plan, other_sums, weighting)
        features.update((public[f.feature.name], other.feature_point(f, complexity)) for f in other_plan.features)
    return Measurement(
        step=step,
        entropy=float(reader.entropy.mean()),
        ceiling=float((reader.entropy - reader.single).mean()) if weighting == "empirical" else None,
        orders=orders,
        features=features,
        layers=tuple(layers),
        entropy_by_layer=tuple(reader.entropy.tolist()),
        num_positions=plan.num_positions,
        seconds=seconds,
        settings=settings,
    )


class _Reader:
    """entropy: [L] H(Z). single: [L] mean entropy of one assignment."""

    def __init__(self, plan: Plan, sums: Sums, weighting: str) -> None:
        self._plan = plan
        self._empirical = weighting == "empirical"
        self._kept = sums.kept.numpy()
        self._conditional = sums.conditional.numpy()
        self._sets = {label_set.name: i for i, label_set in enumerate(plan.label_sets)}
        self._divergences = {id(null): parts for null, parts in zip(plan.nulls(), sums.nulls, strict=True)}
        self.entropy = self._kept[plan.total]
        self.single = sums.single.numpy() / plan.num_positions
        self._left_out = None if sums.jackknife is None else LeftOut(plan, sums, sums.jackknife)
        self._curve = None
        if plan.null is not None:
            self._curve = self._estimate(plan.null, float((self.entropy - self.single).mean()))

    def plane_point(self, order: str) -> PlanePoint:
        complexity, complexity_null, complexity_error = self._side("complexity", order)
        expressivity, expressivity_null, expressivity_error = self._side("expressivity", order)
        point = PlanePoint.from_layers(
            complexity.tolist(),
            expressivity.tolist(),
            complexity_null=complexity_null,
            complexity_null_se=complexity_error,
            expressivity_null=expressivity_null,
            expressivity_null_se=expressivity_error,
        )
        return point if self._left_out is None else self._with_errors(point, order)

    def _with_errors(self, point: PlanePoint, order: str) -> PlanePoint:
        assert self._left_out is not None
        a, b = (self._sets[quantity, order] for quantity in ("complexity", "expressivity"))
        point = replace(
            point,
            complexity_jackknife=tuple(self._left_out.information(a)),
            expressivity_jackknife=tuple(self._left_out.information(b)),
        )
        curve = self._curve
        if curve is None:
            return with_errors(point, lambda _: 0.0)
        single = float((self.entropy - self.single).mean())
        point = replace(
            point,
            complexity_null_jackknife=tuple(self._left_out.null(a, curve, single)),
            expressivity_null_jackknife=tuple(self._left_out.null(b, curve, single)),
        )
        counts = self._plan.counts

        def of_nulls(weights: Mapping[str, float]) -> float:
            u, v = (weights.get(f"{quantity}_null", 0.0) for quantity in ("complexity", "expressivity"))
            return curve.combined_error(counts[a], counts[b], u, v)

        return with_errors(point, of_nulls)

    def feature_point(self, plan: FeaturePlan, complexity: float | None) -> FeaturePoint:
        entropy = self._kept[plan.total]
        information = entropy - self._given(plan.label_set.name)
        mean, spread, p_value = self._feature_null(plan, entropy)
        return FeaturePoint.from_layers(
            information.tolist(),
            num_positions=plan.label_set.num_positions,
            information_null=mean,
            information_null_std=spread,
            information_p_value=p_value,
            complexity=complexity,
            information_se=None
            if self._left_out is None
            else self._left_out.feature_error(plan, float(information.mean())),
        )

    def _side(self, quantity: str, order: str) -> tuple[np.ndarray, float | None, float | None]:
        """Information by layer, its null and the null's standard error."""
        name = (quantity, order)
        information = self.entropy - self._given(name)
        if self._curve is None:
            return information, None, None
        return information, *self._curve.null(self._plan.counts[self._sets[name]])

    def _given(self, name: tuple[str, str]) -> np.ndarray:
        """[L] H(Z given the labels of a set)."""
        index = self._sets[name]
        label_set = self._plan.label_sets[index]
        weight = label_set.num_positions if self._empirical else label_set.num_labels
        return self._conditional[index] / weight

    def _feature_null(self, plan: FeaturePlan, entropy: np.ndarray) -> tuple[float | None, float | None, float | None]:
        """Mean and standard deviation of the information when labels are permuted, and the p-value of the measured."""
        if plan.permuted is not None and plan.permuted_count is not None:
            weights = plan.permuted_count / plan.permuted_count.sum(1, keepdims=True)
            # A label with no positions under some permutation has an empty histogram and no weight.
            entropies = np.where(plan.permuted_count > 0, self._kept[plan.permuted].mean(-1), 0.0)
            values = entropy.mean() - (weights * entropies).sum(1)
            permuted, measured = values[:-1], values[-1]
            # Permutations that change names only may differ in the order of the last sum.
            at_least = int((permuted >= measured - _ROUNDING).sum())
            p_value = (1 + at_least) / (1 + len(permuted))
            return float(permuted.mean()), float(permuted.std(ddof=1)), p_value
        if plan.null is None:
            return None, None, None
        single = float((entropy - self._given(("single", plan.feature.name))).mean())
        curve = self._estimate(plan.null, single)
        return curve.null(plan.counts)[0], curve.spread_of_null(plan.counts), None

    def _estimate(self, null: NullPlan, single: float) -> SubsetCurve:
        subsets, unions = self._divergences[id(null)]
        return SubsetCurve.estimate(null.design, subsets.mean(1).numpy(), unions.mean(1).numpy(), single)
