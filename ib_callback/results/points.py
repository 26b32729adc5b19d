"""The points of a measurement: one order in the information plane, one feature. Plain numbers, derived quantities.

All information quantities are efficiencies, i.e. fractions of log(num_bins). Complexity, expressivity,
optimality and distance to the bound are those of Conklin et al., ICLR 2026, and Conklin 2025.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ib_callback.results.plain import plain_integer, plain_number, plain_numbers

# Below this, a complexity is rounding error and a ratio to it means nothing.
NEGLIGIBLE = 1e-12
# A difference from the null below this many standard errors of the null is not told apart from it.
SIGNIFICANT_STANDARD_ERRORS = 3.0


@dataclass(frozen=True, kw_only=True)
class PlanePoint:
    """One point of the information plane: one n-gram order at one training step.

    Values are Python floats, or None where undefined. A null is what finite sampling alone yields: the truth
    lies between `*_above_null` (measured minus null) and the measured value.

    `distance_to_bound` is bound(complexity) − expressivity, and `bound_ratio` expressivity / bound(complexity). With
    the diagonal as bound the ratio is the optimality and stays None; with the IB curve, which is that of one order,
    both are None for all other orders. `distance_above_null` is measured to the diagonal always: the null is the same
    on both axes, not on both sides of a curve.

    With `Meter(standard_errors=...)`, `*_se` are standard errors of the expected value at this probe size, and
    `*_jackknife` hold the [2 G - 1] values without each of G groups of sequences and without each two neighbouring
    groups (jackknife.py), so that two points can be compared group by group (`ib_callback.results.difference`).
    """

    complexity: float | None
    expressivity: float | None
    optimality: float | None
    distance_to_bound: float | None
    complexity_null: float | None
    expressivity_null: float | None
    complexity_null_se: float | None = None
    expressivity_null_se: float | None = None
    complexity_above_null: float | None
    expressivity_above_null: float | None
    optimality_above_null: float | None
    distance_above_null: float | None
    bound_ratio: float | None = None
    complexity_by_layer: tuple[float, ...]
    expressivity_by_layer: tuple[float, ...]
    complexity_se: float | None = None
    expressivity_se: float | None = None
    optimality_se: float | None = None
    distance_to_bound_se: float | None = None
    complexity_above_null_se: float | None = None
    expressivity_above_null_se: float | None = None
    optimality_above_null_se: float | None = None
    distance_above_null_se: float | None = None
    complexity_jackknife: tuple[float, ...] = ()
    expressivity_jackknife: tuple[float, ...] = ()
    complexity_null_jackknife: tuple[float, ...] = ()
    expressivity_null_jackknife: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _make_plain(self)
        if len(self.complexity_by_layer) != len(self.expressivity_by_layer):
            raise ValueError(
                "complexity_by_layer and expressivity_by_layer must have one value per layer each, "
                f"got {len(self.complexity_by_layer)} and {len(self.expressivity_by_layer)} values"
            )
        lengths = [len(getattr(self, f.name)) for f in fields(self) if f.name.endswith("_jackknife")]
        if len({*lengths} - {0}) > 1:
            raise ValueError(f"the *_jackknife must have one value for each omission, got {lengths} values")

    @classmethod
    def from_layers(
        cls,
        complexity_by_layer: Sequence[float],
        expressivity_by_layer: Sequence[float],
        *,
        complexity_null: float | None = None,
        expressivity_null: float | None = None,
        complexity_null_se: float | None = None,
        expressivity_null_se: float | None = None,
    ) -> PlanePoint:
        """Derive every quantity from the values by layer, with the diagonal as the bound.

        Args:
            complexity_by_layer: I(X;Z) of each layer, [L], as fractions of log(num_bins).
            expressivity_by_layer: I(Y;Z) of each layer, [L], likewise.
            complexity_null: expected complexity (mean over layers) when labels are permuted over positions.
            expressivity_null: the same for the expressivity.
            complexity_null_se: standard error of `complexity_null`, in the same unit; 0.0 where it is exact.
            expressivity_null_se: standard error of `expressivity_null`.

        Raises:
            ValueError: no layers, unequal numbers of layers, a value that is not finite, or a null without
                its standard error.

        >>> point = PlanePoint.from_layers(
        ...     [0.5, 0.75], [0.25, 0.5], complexity_null=0.125, complexity_null_se=0.001,
        ...     expressivity_null=0.125, expressivity_null_se=0.001)
        >>> point.complexity, point.expressivity, point.optimality, point.distance_to_bound
        (0.625, 0.375, 0.6, 0.25)
        >>> point.complexity_above_null, point.expressivity_above_null, point.optimality_above_null
        (0.5, 0.25, 0.5)
        """
        for name, null, error in (
            ("complexity", complexity_null, complexity_null_se),
            ("expressivity", expressivity_null, expressivity_null_se),
        ):
            if (null is None) != (error is None):
                raise ValueError(
                    f"{name}_null and {name}_null_se must be given together or not at all, got {null} and "
                    f"{error}; the standard error of a null known exactly is 0.0"
                )
        by_layer: dict[str, Any] = {
            "complexity_by_layer": plain_numbers(complexity_by_layer, "complexity_by_layer"),
            "expressivity_by_layer": plain_numbers(expressivity_by_layer, "expressivity_by_layer"),
        }
        complexity = _mean(by_layer["complexity_by_layer"], "complexity_by_layer")
        expressivity = _mean(by_layer["expressivity_by_layer"], "expressivity_by_layer")
        complexity_above = None if complexity_null is None else complexity - complexity_null
        expressivity_above = None if expressivity_null is None else expressivity - expressivity_null

        optimality_above = None
        distance_above = None
        if complexity_above is not None and expressivity_above is not None and complexity_null_se is not None:
            distance_above = complexity_above - expressivity_above
            if complexity_above >= max(SIGNIFICANT_STANDARD_ERRORS * complexity_null_se, NEGLIGIBLE):
                optimality_above = expressivity_above / complexity_above
        return cls(
            complexity=complexity,
            expressivity=expressivity,
            optimality=_ratio(expressivity, complexity),
            distance_to_bound=complexity - expressivity,
            complexity_null=complexity_null,
            expressivity_null=expressivity_null,
            complexity_null_se=complexity_null_se,
            expressivity_null_se=expressivity_null_se,
            complexity_above_null=complexity_above,
            expressivity_above_null=expressivity_above,
            optimality_above_null=optimality_above,
            distance_above_null=distance_above,
            bound_ratio=None,
            **by_layer,
        )

    def against(self, bound: Callable[[float], float] | None) -> PlanePoint:
        """The same point with its distance to another bound than the diagonal.

        A bound that is concave, like the IB curve, holds for the mean over layers if it holds for each of them.

        Args:
            bound: the highest expressivity at a complexity, in the unit of the point; None: none is known for this
                order, and so there is neither a distance nor a ratio.
        """
        if bound is None or self.complexity is None or self.expressivity is None:
            return replace(self, distance_to_bound=None, bound_ratio=None)
        highest = bound(self.complexity)
        return replace(
            self,
            distance_to_bound=highest - self.expressivity,
            bound_ratio=_ratio(self.expressivity, highest),
        )


# The numbers of its primary order that a measurement shows as its own.
PRIMARY_SCALARS = ("complexity", "expressivity", "optimality", "distance_to_bound")
# All numbers of a plane point that are not by layer, in the order of logging.
_VECTORS = ("_by_layer", "_jackknife")
FEATURE_SCALARS = ("information", "information_null", "information_null_std", "information_p_value", "ratio")
# Standard errors, which are logged where they were asked for.
PLANE_ERRORS = (
    "complexity_se", "expressivity_se", "optimality_se", "distance_to_bound_se",
    "complexity_above_null_se", "expressivity_above_null_se", "optimality_above_null_se", "distance_above_null_se",
)  # fmt: skip
PLANE_SCALARS = tuple(
    f.name for f in fields(PlanePoint) if not f.name.endswith(_VECTORS) and f.name not in PLANE_ERRORS
)


def plane_scalars(order: str, *, primary: str | None, bound: str) -> tuple[str, ...]:
    """Those of `PLANE_SCALARS` that are defined for an order with such a bound.

    >>> "distance_to_bound" in plane_scalars("bigram", primary="token", bound="ib_curve")
    False
    """
    if bound == "diagonal":
        undefined = {"bound_ratio"}
    else:
        undefined = set() if order == primary else {"distance_to_bound", "bound_ratio"}
    return tuple(name for name in PLANE_SCALARS if name not in undefined)


@dataclass(frozen=True, kw_only=True)
class FeaturePoint:
    """Information that representations carry about a feature label, I(F;Z), over positions that carry one.

    `information_null` and `information_null_std` are mean and standard deviation over permutations of the
    labels: of whole sequences where the label is constant within them (preference: swapped within pairs), else
    of positions, in which case the standard deviation is an upper estimate (0.9 to 2 times the true one).
    `information_p_value` is (1 + permutations with at least the measured information) / (1 + permutations), where whole
    sequences are permuted: how often labels that say nothing look at least as informative. At least 1/101.
    `information_se`, with `Meter(standard_errors=...)`, is the standard error of the information's expected value.
    `ratio` is information / complexity of the primary order. None where undefined.
    """

    information: float | None
    information_null: float | None
    information_null_std: float | None
    ratio: float | None
    information_by_layer: tuple[float, ...]
    num_positions: int
    information_se: float | None = None
    information_p_value: float | None = None

    def __post_init__(self) -> None:
        _make_plain(self)
        object.__setattr__(self, "num_positions", plain_integer(self.num_positions, "num_positions"))

    @classmethod
    def from_layers(
        cls,
        information_by_layer: Sequence[float],
        *,
        num_positions: int,
        information_null: float | None = None,
        information_null_std: float | None = None,
        complexity: float | None = None,
        information_se: float | None = None,
        information_p_value: float | None = None,
    ) -> FeaturePoint:
        """Derive the mean over layers and its ratio to `complexity`, that of the main probe's primary order.

        Raises:
            ValueError: no layers, or a value that is not finite.

        >>> FeaturePoint.from_layers([0.0, 0.25], num_positions=640, complexity=0.5).ratio
        0.25
        """
        values = plain_numbers(information_by_layer, "information_by_layer")
        information = _mean(values, "information_by_layer")
        return cls(
            information=information,
            information_null=information_null,
            information_null_std=information_null_std,
            ratio=None if complexity is None else _ratio(information, complexity),
            information_by_layer=values,
            num_positions=num_positions,
            information_se=information_se,
            information_p_value=information_p_value,
        )


def _mean(values: tuple[float, ...], name: str) -> float:
    if not values:
        raise ValueError(f"{name} must have at least one layer, got none")
    return math.fsum(values) / len(values)


def _ratio(numerator: float, denominator: float) -> float | None:
    return None if abs(denominator) < NEGLIGIBLE else numerator / denominator


def _make_plain(point: PlanePoint | FeaturePoint) -> None:
    # Whatever numbers come as (NumPy scalars, 0-dim tensors), they are kept and written as Python floats.
    for f in fields(point):
        value = getattr(point, f.name)
        if f.name.endswith(_VECTORS):
            object.__setattr__(point, f.name, plain_numbers(value, f.name))
        elif f.name != "num_positions":
            object.__setattr__(point, f.name, plain_number(value, f.name))
