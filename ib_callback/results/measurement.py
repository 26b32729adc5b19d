"""What one measurement yields: plain numbers, no tensors, the same in memory, in a log and in a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeVar

from ib_callback.results.plain import json_values, plain_integer, plain_number, plain_numbers
from ib_callback.results.points import (
    FEATURE_SCALARS,
    PLANE_ERRORS,
    PRIMARY_SCALARS,
    FeaturePoint,
    PlanePoint,
    plane_scalars,
)

_Point = TypeVar("_Point", "PlanePoint", "FeaturePoint")


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
            object.__setattr__(self, name, plain_number(getattr(self, name), name))
        for name in ("step", "num_positions", "tokens_seen"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else plain_integer(value, name))
        object.__setattr__(self, "entropy_by_layer", plain_numbers(self.entropy_by_layer, "entropy_by_layer"))
        object.__setattr__(self, "layers", tuple(str(name) for name in self.layers))
        object.__setattr__(self, "orders", dict(self.orders))
        object.__setattr__(self, "features", dict(self.features))
        object.__setattr__(self, "settings", json_values(self.settings))
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
        """Every number that is logged, under its name without prefix; None where undefined.

        Standard errors are among them where they are known.
        """
        named: dict[str, float | int | None] = {
            name: getattr(self, name) for name in (*PRIMARY_SCALARS, "entropy", "ceiling")
        }
        bound = self.settings.get("bound", "diagonal")
        for order, point in self.orders.items():
            names = plane_scalars(order, primary=self.primary, bound=bound)
            named.update((f"{order}/{name}", getattr(point, name)) for name in names)
            errors = {name: getattr(point, name) for name in PLANE_ERRORS}
            named.update((f"{order}/{name}", error) for name, error in errors.items() if error is not None)
        for feature, value in self.features.items():
            for name in FEATURE_SCALARS:
                named[f"{feature}/{name}"] = getattr(value, name)
            if value.information_se is not None:
                named[f"{feature}/information_se"] = value.information_se
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
        data["settings"] = json_values(self.settings)
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
    settings = [json_values(x.settings if isinstance(x, Measurement) else x) for x in (a, b)]
    differences = list(_differences(settings[0], settings[1], ""))
    if settings[0].get("documents") is not None and settings[0]["documents"] == settings[1].get("documents"):
        differences = [
            f"{d} (the same documents, another tokenizer)" if d.startswith("probe: ") else d for d in differences
        ]
    return differences


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
