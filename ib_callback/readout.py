"""From the sums of a pass to the quantities of a measurement (design: Conklin et al., ICLR 2026; Conklin 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ib_callback.accumulate import Sums
from ib_callback.ib_curve import IBCurve
from ib_callback.measurement import Measurement
from ib_callback.null import SubsetCurve
from ib_callback.plan import FeaturePlan, NullPlan, Plan
from ib_callback.points import FeaturePoint, PlanePoint


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
    curve: IBCurve | None = None,
) -> Measurement:
    """The measurement that the sums of a whole pass amount to; `curve`, if it is the bound, in efficiencies."""
    reader = _Reader(plan, sums, weighting)
    names = [name for quantity, name in (s.name for s in plan.label_sets) if quantity == "complexity"]
    orders = {name: reader.plane_point(name) for name in names}
    if curve is not None:
        orders = {name: point.against(curve.bound if name == primary else None) for name, point in orders.items()}
    complexity = orders[primary].complexity
    return Measurement(
        step=step,
        entropy=float(reader.entropy.mean()),
        ceiling=float((reader.entropy - reader.single).mean()) if weighting == "empirical" else None,
        orders=orders,
        features={f.feature.name: reader.feature_point(f, complexity) for f in plan.features},
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
        self._curve = None
        if plan.null is not None:
            self._curve = self._estimate(plan.null, float((self.entropy - self.single).mean()))

    def plane_point(self, order: str) -> PlanePoint:
        complexity, complexity_null, complexity_error = self._side("complexity", order)
        expressivity, expressivity_null, expressivity_error = self._side("expressivity", order)
        return PlanePoint.from_layers(
            complexity.tolist(),
            expressivity.tolist(),
            complexity_null=complexity_null,
            complexity_null_se=complexity_error,
            expressivity_null=expressivity_null,
            expressivity_null_se=expressivity_error,
        )

    def feature_point(self, plan: FeaturePlan, complexity: float | None) -> FeaturePoint:
        entropy = self._kept[plan.total]
        information = entropy - self._given(plan.label_set.name)
        mean, spread = self._feature_null(plan, entropy)
        return FeaturePoint.from_layers(
            information.tolist(),
            num_positions=plan.label_set.num_positions,
            information_null=mean,
            information_null_std=spread,
            complexity=complexity,
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

    def _feature_null(self, plan: FeaturePlan, entropy: np.ndarray) -> tuple[float | None, float | None]:
        """Mean and standard deviation of the information when labels are permuted."""
        if plan.permuted is not None and plan.permuted_count is not None:
            weights = plan.permuted_count / plan.permuted_count.sum(1, keepdims=True)
            # A label with no positions under some permutation has an empty histogram and no weight.
            entropies = np.where(plan.permuted_count > 0, self._kept[plan.permuted].mean(-1), 0.0)
            values = entropy.mean() - (weights * entropies).sum(1)
            return float(values.mean()), float(values.std(ddof=1))
        if plan.null is None:
            return None, None
        single = float((entropy - self._given(("single", plan.feature.name))).mean())
        curve = self._estimate(plan.null, single)
        return curve.null(plan.counts)[0], curve.spread_of_null(plan.counts)

    def _estimate(self, null: NullPlan, single: float) -> SubsetCurve:
        subsets, unions = self._divergences[id(null)]
        return SubsetCurve.estimate(null.design, subsets.mean(1).numpy(), unions.mean(1).numpy(), single)
