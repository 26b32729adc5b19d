"""What one measurement yields: plain numbers, no tensors, the same in memory, in a log and in a file.

All information quantities are efficiencies, i.e. fractions of log(num_bins). Complexity, expressivity,
optimality and distance to the bound are those of Conklin et al., ICLR 2026, and Conklin 2025.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeVar

# Below this, a complexity is rounding error and a ratio to it means nothing.
NEGLIGIBLE = 1e-12
# A difference from the null below this many standard errors of the null is not told apart from it.
SIGNIFICANT_STANDARD_ERRORS = 3.0

_Point = TypeVar("_Point", "PlanePoint", "FeaturePoint")


@dataclass(frozen=True, kw_only=True)
class PlanePoint:
    """One point of the information plane: one n-gram order at one training step.

    Values are Python floats, or None where undefined. A null is what finite sampling alone yields: the truth
    lies between `*_above_null` (measured minus null) and the measured value.
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
    complexity_by_layer: tuple[float, ...]
    expressivity_by_layer: tuple[float, ...]

    def __post_init__(self) -> None:
        _make_plain(self)
        if len(self.complexity_by_layer) != len(self.expressivity_by_layer):
            raise ValueError(
                "complexity_by_layer and expressivity_by_layer must have one value per layer each, "
                f"got {len(self.complexity_by_layer)} and {len(self.expressivity_by_layer)} values"
            )

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
        by_layer = {
            "complexity_by_layer": _numbers(complexity_by_layer, "complexity_by_layer"),
            "expressivity_by_layer": _numbers(expressivity_by_layer, "expressivity_by_layer"),
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
            **by_layer,
        )


# The numbers of its primary order that a measurement shows as its own.
PRIMARY_SCALARS = ("complexity", "expressivity", "optimality", "distance_to_bound")
# All numbers of a plane point that are not by layer, in the order of logging.
PLANE_SCALARS = tuple(f.name for f in fields(PlanePoint) if not f.name.endswith("_by_layer"))


@dataclass(frozen=True, kw_only=True)
class FeaturePoint:
    """Information that representations carry about a feature label, I(F;Z), over positions that carry one.

    `information_null` and `information_null_std` are mean and standard deviation over permutations of the
    labels: of whole sequences where the label is constant within them (preference: swapped within pairs), else
    of positions, in which case the standard deviation is an upper estimate (0.9 to 2 times the true one).
    `ratio` is information / complexity of the primary order. None where undefined.
    """

    information: float | None
    information_null: float | None
    information_null_std: float | None
    ratio: float | None
    information_by_layer: tuple[float, ...]
    num_positions: int

    def __post_init__(self) -> None:
        _make_plain(self)
        object.__setattr__(self, "num_positions", _integer(self.num_positions, "num_positions"))

    @classmethod
    def from_layers(
        cls,
        information_by_layer: Sequence[float],
        *,
        num_positions: int,
        information_null: float | None = None,
        information_null_std: float | None = None,
        complexity: float | None = None,
    ) -> FeaturePoint:
        """Derive the mean over layers and its ratio to `complexity`, that of the main probe's primary order.

        Raises:
            ValueError: no layers, or a value that is not finite.

        >>> FeaturePoint.from_layers([0.0, 0.25], num_positions=640, complexity=0.5).ratio
        0.25
        """
        values = _numbers(information_by_layer, "information_by_layer")
        information = _mean(values, "information_by_layer")
        return cls(
            information=information,
            information_null=information_null,
            information_null_std=information_null_std,
            ratio=None if complexity is None else _ratio(information, complexity),
            information_by_layer=values,
            num_positions=num_positions,
        )


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """All that was measured on one model at one training step.

    `complexity`, `expressivity`, `optimality` and `distance_to_bound` are those of the primary order;
    `m["bigram"]` is the `PlanePoint` of another one. If `error` is set the point is missing: its numbers are
    None and `orders` is empty.

    Attributes:
        step: optimizer steps taken, None outside training.
        entropy: H(Z), mean over layers, in [0, 1].
        ceiling: the most that any labelling could reach, mean over layers.
        orders: a `PlanePoint` by name of the order.
        features: a `FeaturePoint` by name of the feature label.
        layers: names of the measured layers, L of them.
        entropy_by_layer: H(Z) of each layer, [L].
        num_positions: valid positions T of the probe.
        seconds: wall-clock time of this measurement.
        settings: all that decides whether two measurements can be compared, as JSON values, `"primary"` too.
        error: why the point is missing, else None.
        tokens_seen: training tokens so far, where the trainer knows it.
        overhead: share of the run's wall-clock time spent measuring so far, in [0, 1].
    """

    step: int | None
    entropy: float | None
    ceiling: float | None
    orders: dict[str, PlanePoint] = field(hash=False)
    features: dict[str, FeaturePoint] = field(hash=False)
    layers: tuple[str, ...]
    entropy_by_layer: tuple[float, ...]
    num_positions: int | None
    seconds: float | None
    settings: dict[str, Any] = field(hash=False)
    error: str | None = None
    tokens_seen: int | None = None
    overhead: float | None = None

    def __post_init__(self) -> None:
        reason: Any = self.error
        if reason is not None and not (isinstance(reason, str) and reason):
            raise ValueError(f"error must be None or a text saying why the point is missing, got {reason!r}")
        for name in ("entropy", "ceiling", "seconds", "overhead"):
            object.__setattr__(self, name, _number(getattr(self, name), name))
        for name in ("step", "num_positions", "tokens_seen"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else _integer(value, name))
        object.__setattr__(self, "entropy_by_layer", _numbers(self.entropy_by_layer, "entropy_by_layer"))
        object.__setattr__(self, "layers", tuple(str(name) for name in self.layers))
        object.__setattr__(self, "orders", dict(self.orders))
        object.__setattr__(self, "features", dict(self.features))
        object.__setattr__(self, "settings", _json_values(self.settings))
        if self.error is None:
            self._check_measured()
        elif self.orders or self.features or self.entropy is not None:
            raise ValueError(f"a measurement with an error has no numbers, got some beside {self.error!r}")

    def _check_measured(self) -> None:
        if self.orders and self.primary not in self.orders:
            raise ValueError(
                f'settings["primary"] must name one of the measured orders ({", ".join(self.orders)}), '
                f"got {self.primary!r}"
            )
        lengths = {"entropy_by_layer": len(self.entropy_by_layer)}
        lengths |= {f"orders.{name}": len(p.complexity_by_layer) for name, p in self.orders.items()}
        lengths |= {f"features.{name}": len(p.information_by_layer) for name, p in self.features.items()}
        wrong = [f"{name} has {length}" for name, length in lengths.items() if length != len(self.layers)]
        if wrong:
            raise ValueError(f"expected one value per layer ({len(self.layers)}), but {', '.join(wrong)}")

    @classmethod
    def failed(
        cls,
        step: int | None,
        error: str,
        *,
        settings: Mapping[str, Any],
        layers: Sequence[str] = (),
        seconds: float | None = None,
    ) -> Measurement:
        """A missing point: the reason in `error`, None for every number.

        >>> print(Measurement.failed(32, "NaN at 7 positions of layer h.3", settings={}))
        step 32: not measured: NaN at 7 positions of layer h.3
        """
        return cls(
            step=step, entropy=None, ceiling=None, orders={}, features={}, layers=tuple(layers),
            entropy_by_layer=(), num_positions=None, seconds=seconds, settings=dict(settings), error=error,
        )  # fmt: skip

    @property
    def primary(self) -> str | None:
        """Name of the order that `complexity`, `expressivity`, … refer to."""
        return self.settings.get("primary")

    @property
    def complexity(self) -> float | None:
        """I(X;Z) of the primary order."""
        return self._of_primary("complexity")

    @property
    def expressivity(self) -> float | None:
        """I(Y;Z) of the primary order."""
        return self._of_primary("expressivity")

    @property
    def optimality(self) -> float | None:
        """Expressivity / complexity of the primary order."""
        return self._of_primary("optimality")

    @property
    def distance_to_bound(self) -> float | None:
        """Bound(complexity) minus expressivity of the primary order."""
        return self._of_primary("distance_to_bound")

    def _of_primary(self, name: str) -> float | None:
        return getattr(self.orders[self.primary], name) if self.primary in self.orders else None

    def __getitem__(self, order: str) -> PlanePoint:
        if order in self.orders:
            return self.orders[order]
        if self.error is not None:
            raise KeyError(f"no order {order!r}: this point was not measured ({self.error})")
        if order in self.features:
            raise KeyError(f"{order!r} is a feature, not an order: use .features[{order!r}]")
        raise KeyError(f"order {order!r} was not measured; measured: {', '.join(self.orders) or 'none'}")

    def __contains__(self, order: object) -> bool:
        return order in self.orders

    def __iter__(self) -> Iterator[str]:
        return iter(self.orders)

    def scalars(self) -> dict[str, float | int | None]:
        """Every number that is logged, under its name without prefix; None where undefined."""
        named: dict[str, float | int | None] = {
            name: getattr(self, name) for name in (*PRIMARY_SCALARS, "entropy", "ceiling")
        }
        for order, point in self.orders.items():
            named.update((f"{order}/{name}", getattr(point, name)) for name in PLANE_SCALARS)
        for feature, value in self.features.items():
            for name in ("information", "information_null", "ratio"):
                named[f"{feature}/{name}"] = getattr(value, name)
        named.update((name, getattr(self, name)) for name in ("seconds", "overhead", "tokens_seen"))
        return named

    def metrics(self, prefix: str = "ib/") -> dict[str, float]:
        """Scalars for a logger: finite floats by prefixed name; undefined ones are left out."""
        return {prefix + name: float(value) for name, value in self.scalars().items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """JSON values that mirror the attributes; never NaN, so strict JSON. `from_dict` inverts it."""
        data: dict[str, Any] = {"step": self.step, "entropy": self.entropy}
        for name in PRIMARY_SCALARS:
            data[name] = getattr(self, name)
        data["ceiling"] = self.ceiling
        data["orders"] = {name: _with_lists(asdict(point)) for name, point in self.orders.items()}
        data["features"] = {name: _with_lists(asdict(point)) for name, point in self.features.items()}
        for name in ("layers", "entropy_by_layer"):
            data[name] = list(getattr(self, name))
        for name in ("num_positions", "seconds", "settings", "error", "tokens_seen", "overhead"):
            data[name] = getattr(self, name)
        data["settings"] = _json_values(self.settings)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """The measurement that `to_dict` described. Unknown keys are ignored, so that newer files load.

        Raises:
            ValueError: a required key is missing, or a value is not what it should be; the message names it.
        """
        known = _known_fields(cls, data, "measurement")
        known["orders"] = _points_from(PlanePoint, known["orders"], "orders")
        known["features"] = _points_from(FeaturePoint, known["features"], "features")
        if not isinstance(known["layers"], Sequence) or isinstance(known["layers"], str):
            raise ValueError(f"layers must be a list of names, got {known['layers']!r}")
        return cls(**known)

    def summary(self) -> str:
        """One line for a console."""
        start = "no step" if self.step is None else f"step {self.step:,}"
        if self.error is not None:
            return f"{start}: not measured: {' '.join(self.error.split())}"
        parts = []
        if self.primary in self.orders:
            point = self.orders[self.primary]
            parts = [
                f"{self.primary} complexity {_short(point.complexity, point.complexity_null)}",
                f"expressivity {_short(point.expressivity, point.expressivity_null)}",
                f"optimality {_short(point.optimality)}",
                f"distance to bound {_short(point.distance_to_bound)}",
            ]
        parts += [f"{name} {_short(value.information)}" for name, value in self.features.items()]
        if self.seconds is not None:
            parts.append(f"{self.seconds:.1f} s")
        return f"{start}: {', '.join(parts) or 'nothing measured'}"

    def __str__(self) -> str:
        return self.summary()


def settings_differences(a: Measurement | Mapping[str, Any], b: Measurement | Mapping[str, Any]) -> list[str]:
    """Name the settings in which two measurements, or settings dicts, differ; empty if they can be compared.

    >>> settings_differences({"num_bins": 100, "seed": 0}, {"num_bins": 64, "seed": 0})
    ['num_bins: 100 vs 64']
    """
    settings = [_json_values(x.settings if isinstance(x, Measurement) else x) for x in (a, b)]
    return list(_differences(settings[0], settings[1], ""))


_ABSENT = object()


def _differences(a: Any, b: Any, where: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            name = f"{where}.{key}" if where else key
            yield from _differences(a.get(key, _ABSENT), b.get(key, _ABSENT), name)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from _differences(left, right, f"{where}[{index}]")
    elif a != b:
        yield f"{where}: {_describe(a)} vs {_describe(b)}"


def _describe(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 70 else f"{text[:69]}…"


def _short(value: float | None, null: float | None = None) -> str:
    text = "undefined" if value is None else f"{value:.4g}"
    return text if null is None else f"{text} (null {null:.4g})"


def _mean(values: tuple[float, ...], name: str) -> float:
    if not values:
        raise ValueError(f"{name} must have at least one layer, got none")
    return math.fsum(values) / len(values)


def _ratio(numerator: float, denominator: float) -> float | None:
    return None if abs(denominator) < NEGLIGIBLE else numerator / denominator


def _number(value: Any, name: str) -> float | None:
    if value is None:
        return None
    # float() would accept these; in a file they are damage.
    if isinstance(value, (bool, str, bytes)):
        raise ValueError(f"{name} must be a finite number or None, got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a finite number or None, got {value!r}") from error
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, or None where undefined, got {number}")
    return number


def _numbers(values: Any, name: str) -> tuple[float, ...]:
    try:
        plain = [_number(value, f"{name}[{index}]") for index, value in enumerate(values)]
    except TypeError as error:
        raise ValueError(f"{name} must be a sequence of finite numbers, got {values!r}") from error
    known = tuple(value for value in plain if value is not None)
    if len(known) != len(plain):
        raise ValueError(f"{name} must hold a finite number per layer, got None at layer {plain.index(None)}")
    return known


def _integer(value: Any, name: str) -> int:
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
    return number


def _make_plain(point: PlanePoint | FeaturePoint) -> None:
    # Whatever numbers come as (NumPy scalars, 0-dim tensors), they are kept and written as Python floats.
    for f in fields(point):
        value = getattr(point, f.name)
        if f.name.endswith("_by_layer"):
            object.__setattr__(point, f.name, _numbers(value, f.name))
        elif f.name != "num_positions":
            object.__setattr__(point, f.name, _number(value, f.name))


def _json_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    # The round trip is a deep copy with lists for tuples, so that settings equal what a file gives back.
    if not isinstance(settings, Mapping):
        raise ValueError(f"settings must be a mapping from names to JSON values, got {settings!r}")
    try:
        return json.loads(json.dumps(dict(settings), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"settings must hold JSON values only (numbers, texts, lists, dicts, None; not NaN): {error}"
        ) from error


def _with_lists(data: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}


def _known_fields(cls: type[Any], data: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must be an object, got {data!r}")
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in data]
    if missing:
        raise ValueError(
            f"{where} lacks the required key{'s' if len(missing) > 1 else ''} {', '.join(missing)}; "
            "it was not written by Measurement.to_dict() or is damaged"
        )
    return {f.name: data[f.name] for f in fields(cls) if f.name in data}


def _points_from(cls: type[_Point], data: Any, where: str) -> dict[str, _Point]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must be an object with one entry per name, got {data!r}")
    points = {}
    for name, value in data.items():
        known = _known_fields(cls, value, f"{where}.{name}")
        try:
            points[name] = cls(**known)
        except ValueError as error:
            raise ValueError(f"{where}.{name}: {error}") from error
    return points
