"""From the sums of a pass to the quantities of a measurement (design: Conklin et al., ICLR 2026; Conklin 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ib_callback.bound.curve import IBCurve
from ib_callback.measuring.accumulate import Sums
from ib_callback.measuring.jackknife_sums import JackknifeSums
from ib_callback.measuring.plan.null import SubsetCurve
from ib_callback.measuring.plan.plan import FeaturePlan, NullPlan, Plan
from ib_callback.results.jackknife import Array, jackknife_error, with_bound_error, with_errors
from ib_callback.results.measurement import Measurement
from ib_callback.results.points import FeaturePoint, PlanePoint

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
        self._left_out = None if sums.jackknife is None else _LeftOut(plan, sums, sums.jackknife)
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
            return with_errors(point, lambda _, __: 0.0)
        single = float((self.entropy - self.single).mean())
        point = replace(
            point,
            complexity_null_jackknife=tuple(self._left_out.null(a, curve, single)),
            expressivity_null_jackknife=tuple(self._left_out.null(b, curve, single)),
        )
        counts = self._plan.counts
        return with_errors(point, lambda u, v: curve.combined_error(counts[a], counts[b], u, v))

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


class _LeftOut:
    """Means over layers, as fractions of log(num_bins), [2 G - 1]: one value for each omission (plan/jackknife.py)."""

    def __init__(self, plan: Plan, sums: Sums, jackknife: JackknifeSums) -> None:
        assert plan.jackknife is not None
        self._plan, self._jackknife = plan, plan.jackknife
        self._conditional = sums.conditional.mean(1).numpy()
        self._removed = jackknife.removed.mean(2).numpy()
        self._totals = jackknife.totals.mean(2).numpy()
        self._entropy = self._totals[0]
        single = sums.single.mean().item() - self._jackknife.taken @ jackknife.single.mean(1).numpy()
        self._single = single / self._jackknife.rest

    def information(self, label_set: int, total: int = 0) -> Array:
        """I(X;Z) for the labels of a set, over the positions of the plan's kept `total`."""
        rest = self._jackknife.rest_of_set[label_set]
        return self._totals[total] - (self._conditional[label_set] - self._removed[label_set]) / rest

    def null(self, label_set: int, curve: SubsetCurve, single: float) -> Array:
        """Null information of a set's label counts without each omission.

        The curve d(c) of a smaller probe is taken to be that of the whole in another scale, the ratio of the two
        d(1), which are exact: benchmarks/coverage.py compares this with what it stands for.

        Args:
            label_set: its number.
            curve: of the whole probe.
            single: d(1) of the whole, H(Z) minus the mean entropy of one assignment.
        """
        scale = (self._entropy - self._single) / single if single > 0 else np.ones_like(self._entropy)
        return scale * [curve.null(counts)[0] for counts in self._jackknife.counts[label_set]]

    def feature_error(self, feature: FeaturePlan, information: float) -> float | None:
        """Standard error of the information about a feature; None if an omission takes all of its labels."""
        label_set = next(i for i, s in enumerate(self._plan.label_sets) if s.name == feature.label_set.name)
        if (self._jackknife.rest_of_set[label_set] == 0).any():
            return None
        return jackknife_error(information, self.information(label_set, self._jackknife.totals.index(feature.total)))
