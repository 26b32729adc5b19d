"""The points of a measurement, for one order in the plane or one feature: plain numbers of the table in metrics.py."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ib_callback.results.metrics import (
    BOUND,
    CEILING,
    FEATURE,
    FEATURE_ERRORS,
    NEGLIGIBLE,
    NOISE,
    PLANE,
    PLANE_BY_NAME,
    Quantity,
    derived,
    did_you_mean,
)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PlanePoint:
    """One point of the information plane: one n-gram order at one training step.

    Values are Python floats, or None where undefined. A null is the information that finite sampling alone gives. The
    true value lies between `*_above_null` (measured minus null) and the measured value.

    `complexity_null_by_layer` is interpolated in each layer, so its mean may differ from the null in the last digits.

    `distance_to_bound` is bound(complexity) − expressivity, and `bound_ratio` is expressivity / bound(complexity). With
    the diagonal as bound, the ratio equals the optimality, so `bound_ratio` stays None. An IB curve belongs to one
    order; for all other orders both numbers are None. `distance_above_null` is always measured to the diagonal, because
    the null is the same on both axes, but not on both sides of a curve.

    `num_positions_local` is the number of positions behind the local numbers. These are positions with a label from far
    away, so their sequence must have 48 valid positions. If they are fewer than half of all positions, there is no
    document baseline, and there are no local numbers. The local optimality is None if the local complexity is under 3
    of its standard errors.

    With `Meter(standard_errors=...)`, `*_se` are standard errors of the expected value at this probe size, and
    `*_jackknife` hold the [2 G - 1] values without each of G groups of sequences and without each two neighbouring
    groups (uncertainty.py). With these, two points can be compared group by group (`ib.difference`). If a point is the
    mean over D draws of reference points, `*_draws` hold the [D] values without each draw.
    """

    complexity: float | None
    expressivity: float | None
    optimality: float | None
    distance_to_bound: float | None
    complexity_null: float | None
    expressivity_null: float | None
    complexity_null_se: float | None = None
    expressivity_null_se: float | None = None
    optimality_null: float | None = None
    distance_null: float | None = None
    complexity_above_null: float | None
    expressivity_above_null: float | None
    optimality_above_null: float | None
    distance_above_null: float | None
    complexity_baseline: float | None = None
    expressivity_baseline: float | None = None
    complexity_local: float | None = None
    expressivity_local: float | None = None
    optimality_local: float | None = None
    distance_local: float | None = None
    score_local: float | None = None
    complexity_scaled: float | None = None
    expressivity_scaled: float | None = None
    complexity_document: float | None = None
    expressivity_document: float | None = None
    bound_ratio: float | None = None
    complexity_by_layer: tuple[float, ...]
    expressivity_by_layer: tuple[float, ...]
    complexity_null_by_layer: tuple[float, ...] = ()
    expressivity_null_by_layer: tuple[float, ...] = ()
    complexity_baseline_by_layer: tuple[float, ...] = ()
    expressivity_baseline_by_layer: tuple[float, ...] = ()
    complexity_local_by_layer: tuple[float, ...] = ()
    expressivity_local_by_layer: tuple[float, ...] = ()
    num_positions_local: int | None = None
    complexity_se: float | None = None
    expressivity_se: float | None = None
    optimality_se: float | None = None
    distance_to_bound_se: float | None = None
    complexity_above_null_se: float | None = None
    expressivity_above_null_se: float | None = None
    optimality_above_null_se: float | None = None
    distance_above_null_se: float | None = None
    complexity_baseline_se: float | None = None
    expressivity_baseline_se: float | None = None
    complexity_local_se: float | None = None
    expressivity_local_se: float | None = None
    optimality_local_se: float | None = None
    distance_local_se: float | None = None
    score_local_se: float | None = None
    complexity_document_se: float | None = None
    expressivity_document_se: float | None = None
    complexity_jackknife: tuple[float, ...] = ()
    expressivity_jackknife: tuple[float, ...] = ()
    complexity_null_jackknife: tuple[float, ...] = ()
    expressivity_null_jackknife: tuple[float, ...] = ()
    complexity_baseline_jackknife: tuple[float, ...] = ()
    expressivity_baseline_jackknife: tuple[float, ...] = ()
    complexity_local_jackknife: tuple[float, ...] = ()
    expressivity_local_jackknife: tuple[float, ...] = ()
    complexity_draws: tuple[float, ...] = ()
    expressivity_draws: tuple[float, ...] = ()
    complexity_null_draws: tuple[float, ...] = ()
    expressivity_null_draws: tuple[float, ...] = ()
    complexity_baseline_draws: tuple[float, ...] = ()
    expressivity_baseline_draws: tuple[float, ...] = ()
    complexity_local_draws: tuple[float, ...] = ()
    expressivity_local_draws: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for ending, each in (("_by_layer", "layer"), ("_jackknife", "omission"), ("_draws", "draw")):
            lengths = [len(value) for name, value in vars(self).items() if name.endswith(ending) and value]
            if len({*lengths}) > 1:
                raise ValueError(f"the *{ending} must have one value for each {each}, got {lengths} values")

    @classmethod
    def from_layers(
        cls,
        complexity_by_layer: Sequence[float],
        expressivity_by_layer: Sequence[float],
        *,
        ceiling: float | None = None,
        noise: float | None = None,
        num_positions_local: int | None = None,
        **measured: Any,
    ) -> PlanePoint:
        """Derive every quantity from the values by layer, with the diagonal as the bound.

        Args:
            complexity_by_layer: I(X;Z) of each layer, [L], as fractions of log(num_bins).
            expressivity_by_layer: I(Y;Z) of each layer, [L], in the same unit.
            ceiling: ceiling of the measurement, in the same unit.
            noise: an upper estimate of the standard deviation of the local complexity, for labels that say nothing. If
                standard errors are unknown, it decides whether the local optimality is defined.
            num_positions_local: number of positions behind the document baseline.
            **measured: nulls and their standard errors by name, in the same unit: `complexity_null`,
                `complexity_null_se` and so on; the error of an exact null is 0.0. Also further values by layer, [L]:
                `complexity_baseline_by_layer`, `complexity_null_by_layer`, ….

        Raises:
            ValueError: there are no layers, or their numbers differ.
            TypeError: there is no measured number of that name.

        >>> point = PlanePoint.from_layers(
        ...     [0.5, 0.75], [0.25, 0.5], complexity_null=0.125, complexity_null_se=0.001,
        ...     expressivity_null=0.125, expressivity_null_se=0.001)
        >>> point.complexity, point.expressivity, point.optimality, point.distance_to_bound
        (0.625, 0.375, 0.6, 0.25)
        >>> point.complexity_above_null, point.expressivity_above_null, point.optimality_above_null
        (0.5, 0.25, 0.5)
        """
        by_layer = {"complexity": complexity_by_layer, "expressivity": expressivity_by_layer}
        for quantity in [each for each in PLANE if each.kind in ("layers", "baseline")]:
            if (given := measured.pop(f"{quantity.name}_by_layer", None)) is not None:
                by_layer[quantity.name] = given
        layers, values = _means(by_layer)
        # The null has a separate estimate for the mean over layers.
        values |= _named(measured, PLANE)
        values |= {BOUND: values["complexity"], CEILING: ceiling, NOISE: noise}
        return cls(**layers, **derived(PLANE, values), num_positions_local=num_positions_local)

    def against(self, bound: Callable[[float], float] | None) -> PlanePoint:
        """The same point with its distance to a bound other than the diagonal.

        A concave bound, like the IB curve, holds for the mean over layers if it holds for each layer.

        Args:
            bound: function that gives the highest expressivity at a complexity, in the unit of the point; None if no
                bound is known for this order. There is then neither a distance nor a ratio.
        """
        highest = None if bound is None or self.complexity is None else bound(self.complexity)
        values = {**vars(self), BOUND: highest}
        changed: dict[str, Any] = {q.name: q.formula(values) for q in PLANE if q.bound and q.formula is not None}
        return replace(self, **changed)

    def spread(self, metric: str) -> float | None:
        """Standard deviation of a number between draws of reference points; None with one draw, or without the number.

        Args:
            metric: a quantity that has standard errors.
        """
        draws = replicates_of(self, metric, of="draws")
        return None if draws is None else math.sqrt(len(draws)) * draws_error(draws)


def replicates_of(
    point: PlanePoint,
    metric: str,
    bound: Callable[[float], float] | None = None,
    of: Literal["jackknife", "draws"] = "jackknife",
) -> Array | None:
    """Values of a number of `point` without each omission [2 G - 1], or without each draw [D]; None if unknown.

    Args:
        point: measured with errors, or over several draws.
        metric: a quantity of the table (metrics.py) that has errors.
        bound: the highest expressivity at a complexity; None: that of the point if it is the diagonal, else unknown.
        of: what is left out: groups of sequences, or draws of reference points.

    Raises:
        ValueError: there are no replicates of such a number.
    """
    known = [quantity.name for quantity in PLANE if quantity.has_error]
    if metric not in known:
        raise ValueError(f"metric: expected one of {', '.join(known)}, got {metric!r}{did_you_mean(metric, known)}")
    complexities = getattr(point, f"complexity_{of}")
    if not complexities or getattr(point, metric) is None:
        return None
    # The ratio to the bound is known only for a curve, whose function is needed here.
    if PLANE_BY_NAME[metric].bound and bound is None and point.bound_ratio is not None:
        return None

    def replicates(name: str) -> Array | None:
        if name == BOUND:
            return np.array(
                complexities if bound is None else [float(bound(complexity)) for complexity in complexities]
            )
        formula = PLANE_BY_NAME[name].formula
        if formula is None:
            values = getattr(point, f"{name}_{of}")
            return np.array(values) if values else None
        inputs = {name: values for name in formula.inputs if (values := replicates(name)) is not None}
        if len(inputs) < len(formula.inputs):
            return None
        if formula.divisor is not None and (np.abs(inputs[formula.divisor]) < NEGLIGIBLE).any():
            return None
        return formula.value(*inputs.values())

    return replicates(metric)


def draws_error(without: Array) -> float:
    """Standard error of a mean over D draws that comes from the choice of reference points.

    `without`: [D] values of the mean without each draw.
    """
    return math.sqrt((len(without) - 1) * float(np.var(without)))


@dataclass(frozen=True, kw_only=True)
class FeaturePoint:
    """Information of representations about a feature label, I(F;Z), over the positions that have a label.

    `information_null` and `information_null_std` are mean and standard deviation over permutations of the labels. Whole
    sequences are permuted if the label is constant within them (preference: swapped within pairs), otherwise positions.
    For positions the standard deviation is an upper estimate (0.9 to 2 times the true one).
    `information_p_value` says how often labels that say nothing look at least as informative: (1 + permutations with at
    least the measured information) / (1 + permutations). It exists if whole sequences are permuted, and is at least
    1/101.
    `information_se`, with `Meter(standard_errors=...)`, is the standard error of the information's expected value.
    `ratio` is information / complexity of the primary order. `ratio_above_null` is the ratio of both above their nulls;
    the plain ratio of an untrained model is often higher than that of a trained one. None where undefined.
    `information_jackknife`, with `Meter(standard_errors=...)`, holds the [2 G - 1] values without groups of sequences
    of the feature's own probe, as for `PlanePoint`. With these, two models can be compared group by group.
    """

    information: float | None
    information_null: float | None
    information_null_std: float | None
    ratio: float | None
    information_by_layer: tuple[float, ...]
    num_positions: int
    information_se: float | None = None
    information_p_value: float | None = None
    ratio_above_null: float | None = None
    information_jackknife: tuple[float, ...] = ()

    @classmethod
    def from_layers(
        cls,
        information_by_layer: Sequence[float],
        *,
        num_positions: int,
        complexity: float | None = None,
        complexity_above_null: float | None = None,
        complexity_null_se: float | None = None,
        information_jackknife: Sequence[float] = (),
        **measured: float | None,
    ) -> FeaturePoint:
        """Derive the mean over layers and its ratios to `complexity`, that of the main probe's primary order.

        Args:
            information_by_layer: I(F;Z) of each layer, [L], as fractions of log(num_bins).
            num_positions: number of positions with a label.
            complexity: complexity of the main probe's primary order, in the same unit.
            complexity_above_null: its part above the null, in the same unit.
            complexity_null_se: standard error of that null; it decides whether a ratio to that part is defined.
            information_jackknife: the information without each omission, if standard errors were measured.
            **measured: other fields by name: `information_null`, `information_p_value` and so on.

        Raises:
            ValueError: there are no layers.
            TypeError: there is no measured number of that name.

        >>> FeaturePoint.from_layers([0.0, 0.25], num_positions=640, complexity=0.5).ratio
        0.25
        """
        layers, values = _means({"information": information_by_layer})
        values |= _named(measured, FEATURE, FEATURE_ERRORS)
        errors: dict[str, Any] = {name: values.get(name) for name in FEATURE_ERRORS}
        above = {"complexity_above_null": complexity_above_null, "complexity_null_se": complexity_null_se}
        quantities = derived(FEATURE, values | {"complexity": complexity} | above)
        return cls(
            **layers, **quantities, **errors, num_positions=operator.index(num_positions),
            information_jackknife=tuple(map(float, information_jackknife)),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OrderIncrement:
    """What an order adds to the next narrower order, as a mean over layers.

    It is tested by permuting the labels of the order within each label of the narrower order.

    Attributes:
        narrower: name of the narrower order.
        information: the plain information that the order adds, a fraction of log(num_bins).
        null: mean of that information over permutations.
        null_std: standard deviation over permutations.
        p_value: share of permutations that reach the measured information; the measured labels count as one. At least
            1 / (R + 1).
        num_permutations: number of permutations R.
        num_positions: number of positions whose label a permutation can change. Other positions say nothing about it.
    """

    narrower: str
    information: float
    null: float
    null_std: float
    p_value: float
    num_permutations: int
    num_positions: int


def _means(by_layer: Mapping[str, Sequence[float]]) -> tuple[dict[str, Any], dict[str, float | None]]:
    """The fields by layer, and the means over layers."""
    layers: dict[str, Any] = {}
    means: dict[str, float | None] = {}
    for name, given in by_layer.items():
        values = layers[f"{name}_by_layer"] = tuple(float(value) for value in given)
        if not values:
            raise ValueError(f"{name}_by_layer must have at least one layer, got none")
        means[name] = math.fsum(values) / len(values)
    return layers, means


def _named(
    measured: Mapping[str, float | None], table: Sequence[Quantity], further: Sequence[str] = ()
) -> dict[str, float | None]:
    known = [*(q.name for q in table if q.kind in ("baseline", "error", "measured")), *further]
    if unknown := [name for name in measured if name not in known]:
        raise TypeError(f"expected names of measured values, got {', '.join(unknown)}. Known are {', '.join(known)}")
    return {name: None if value is None else float(value) for name, value in measured.items()}
