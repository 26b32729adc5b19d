"""The result of one measurement: plain numbers without tensors, the same in memory, in a log and in a file."""

from __future__ import annotations

import json
import math
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeVar

from ib_callback.results.metrics import (
    BOOKKEEPING,
    FEATURE_ERRORS,
    FEATURE_SCALARS,
    FIRST_SHOWN,
    FIRST_VIEW,
    PLANE_ERRORS,
    PRIMARY_SCALARS,
    TRAINING,
    WHOLE,
    plane_scalars,
    view_scalars,
)
from ib_callback.results.points import FeaturePoint, OrderIncrement, PlanePoint

# Level for p-values: labels that say nothing fall below it with this probability.
CHANCE = 0.05

_Point = TypeVar("_Point", "PlanePoint", "FeaturePoint", "OrderIncrement", "Measurement")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Everything that was measured on one model at one training step.

    `complexity`, `expressivity`, `optimality` and `distance_to_bound` are those of the primary order. `m["bigram"]` is
    the `PlanePoint` of another order. If `error` is set, the point is missing: its numbers are None and `orders` is
    empty.

    Attributes:
        step: number of optimizer steps taken; None outside training.
        entropy: H(Z), mean over layers, in [0, 1].
        ceiling: the most information that any labelling could reach, mean over layers.
        orders: {name of the order: `PlanePoint`}.
        features: {name of the feature label: `FeaturePoint`}.
        layers: names of the L measured layers.
        entropy_by_layer: H(Z) of each layer, [L].
        ceiling_by_layer: the ceiling of each layer, [L]; empty with `weighting="uniform"` and from earlier versions.
        views: {name of the view: {name of the order: `PlanePoint`}}. "late" is the last quarter of the layers, "last"
            the last layer. On request there are also "averaged", over draws of reference points; "centred", with mean
            states removed; and combinations such as "averaged/late". `m["late/token"]` is a point.
        dispersion: mean cosine distance of states at two different positions, mean over layers, in [0, 2].
        dispersion_by_layer: the dispersion of each layer, [L].
        companions: comparison measures, on request: {name of the measure: {layer: value}}.
        loss: mean next-token loss on the probe, in nats a token, over the pairs of neighbouring real tokens that
            `settings["loss"]` counts. None if there is no loss; `settings["loss"]["path"]` says why.
        loss_se: standard error of the loss for a random draw of sequences (or of their `Probe.groups`); with
            `loss=True` also for the choice of positions.
        bits_per_byte: loss × all predicted tokens / (`Probe.num_bytes` × ln 2). In this unit, models with different
            tokenizers can be compared. None if the probe does not know its bytes.
        predictive_information: plug-in entropy of the next token, over all pairs, minus the loss; nats a token. On a
            small probe many tokens occur once, so its entropy is too low, and so is this number. Compare it only on
            the same probe.
        loss_jackknife: [2 G - 1] the loss without groups of sequences, as for `PlanePoint`; empty without standard
            errors.
        num_positions: number of valid positions T of the probe.
        seconds: wall-clock time of this measurement.
        settings: everything that decides whether two measurements can be compared, as JSON values, also `"primary"`.
        error: why the point is missing, else None.
        tokens_seen: number of training tokens so far, if the trainer knows it.
        overhead: share of the run's wall-clock time spent measuring so far, in [0, 1].
        train_loss: training loss at this step, if known; usually in nats a token.
        scheduled: whether the schedule asked for this point. Other points are measured for a checkpoint, or because
            training ended there. They can be selected, but do not count for phases and patience, because an
            interruption or other checkpoints would change both.
        increments: what each order adds to the next narrower order, tested by permutation: {"complexity" or
            "expressivity": {name of the wider order: increment}}. None unless `ib-callback measure --increments` asked
            for it.
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
    train_loss: float | None = None
    scheduled: bool = True
    ceiling_by_layer: tuple[float, ...] = ()
    views: dict[str, dict[str, PlanePoint]] = field(default_factory=dict, hash=False)
    dispersion: float | None = None
    dispersion_by_layer: tuple[float, ...] = ()
    companions: dict[str, dict[str, float]] = field(default_factory=dict, hash=False)
    loss: float | None = None
    loss_se: float | None = None
    bits_per_byte: float | None = None
    predictive_information: float | None = None
    loss_jackknife: tuple[float, ...] = ()
    increments: dict[str, dict[str, OrderIncrement]] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        # Lists instead of tuples, so settings equal what a file gives back.
        object.__setattr__(self, "settings", json_values(self.settings))
        if self.error is None:
            self._check_measured()
        elif self.orders or self.features or self.entropy is not None or self.loss is not None:
            raise ValueError(f"a measurement with an error must have no numbers, got numbers and {self.error!r}")

    def _check_measured(self) -> None:
        if self.orders and self.primary not in self.orders:
            raise ValueError(
                f'settings["primary"] must name one of the measured orders ({", ".join(self.orders)}), '
                f"got {self.primary!r}"
            )
        lengths = {"entropy_by_layer": len(self.entropy_by_layer)}
        lengths |= {"ceiling_by_layer": len(self.ceiling_by_layer)} if self.ceiling_by_layer else {}
        lengths |= {"dispersion_by_layer": len(self.dispersion_by_layer)} if self.dispersion_by_layer else {}
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
        """Make a missing point, with the reason in `error` and None for every number.

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
        """Distance to the bound, bound(complexity) − expressivity, of the primary order."""
        return self._of_primary("distance_to_bound")

    @property
    def late(self) -> dict[str, PlanePoint]:
        """The points of the last quarter of the layers, by order."""
        return self.views.get("late", {})

    @property
    def last(self) -> dict[str, PlanePoint]:
        """The points of the last layer, by order."""
        return self.views.get("last", {})

    @property
    def averaged(self) -> dict[str, PlanePoint]:
        """The points averaged over all draws of reference points, by order; with one draw, the plain points."""
        return self.views.get("averaged", self.orders)

    @property
    def centred(self) -> dict[str, PlanePoint]:
        """The points with mean unit states removed, by order; empty unless `Meter(center=True)`."""
        return self.views.get("centred", {})

    @property
    def readout(self) -> dict[str, PlanePoint]:
        """The points of the last layer with the model's output embeddings as reference points, by order.

        Empty if there is no readout; `settings["readout"]["why"]` says why.
        """
        return self.views.get("readout", {})

    @property
    def prediction(self) -> dict[str, PlanePoint]:
        """The points of the model's next-token distributions, grouped by frequent tokens, by order.

        Empty if there is no prediction; `settings["prediction"]["why"]` says why.
        """
        return self.views.get("prediction", {})

    @property
    def _without(self) -> list[str]:
        """Views that were requested but are missing for a reason that depends on the model."""
        told = {view: self.settings.get(view) for view in ("readout", "prediction")}
        return [view for view, each in told.items() if isinstance(each, Mapping) and "why" in each]

    def _of_primary(self, name: str) -> float | None:
        return getattr(self.orders[self.primary], name) if self.primary in self.orders else None

    def __getitem__(self, order: str) -> PlanePoint:
        view, _, name = order.rpartition("/")
        points = self.views.get(view, {}) if view else self.orders
        if name in points:
            return points[name]
        if self.error is not None:
            raise KeyError(f"there is no order {order!r} because this point was not measured ({self.error})")
        if order in self.features:
            raise KeyError(f"{order!r} is a feature, not an order: use .features[{order!r}]")
        told = self.settings.get(view)
        if isinstance(told, Mapping) and "why" in told:
            raise KeyError(f"{order!r} was not measured: {told['why']}")
        views = f", also in each of the views {', '.join(self.views)}" if self.views else ""
        raise KeyError(f"order {order!r} was not measured. Measured orders: {', '.join(self.orders) or 'none'}{views}")

    def __contains__(self, order: object) -> bool:
        view, _, name = str(order).rpartition("/")
        return name in (self.views.get(view, {}) if view else self.orders)

    def __iter__(self) -> Iterator[str]:
        return iter(self.orders)

    def scalars(self) -> dict[str, float | int | None]:
        """Every logged number by its name without prefix, including known standard errors; None where undefined."""
        named: dict[str, float | int | None] = {
            name: getattr(self, name) for name in (*PRIMARY_SCALARS, *(quantity.name for quantity in WHOLE))
        }
        bound = self.settings.get("bound", "diagonal")
        for order, point in self.orders.items():
            names = plane_scalars(order, primary=self.primary, bound=bound)
            named |= _numbers_of(point, f"{order}/", names, PLANE_ERRORS)
        for view, points in self.views.items():
            if self.primary in points:
                named |= {f"{view}/{name}": getattr(points[self.primary], name) for name in PRIMARY_SCALARS}
        for view, points in self.views.items():
            for order, point in points.items():
                names = view_scalars(order, primary=self.primary, bound=bound)
                named |= _numbers_of(point, f"{view}/{order}/", names, [f"{name}_se" for name in names])
                for name in names if point.complexity_draws else ():
                    named[f"{view}/{order}/{name}_spread"] = point.spread(name)
        for view in self._without:
            named |= dict.fromkeys(f"{view}/{name}" for name in PRIMARY_SCALARS)
            for order in self.orders:
                names = view_scalars(order, primary=self.primary, bound=bound)
                named |= dict.fromkeys(f"{view}/{order}/{name}" for name in names)
        for feature, value in self.features.items():
            named |= _numbers_of(value, f"{feature}/", FEATURE_SCALARS, FEATURE_ERRORS)
        for name, values in self.companions.items():
            named[name] = math.fsum(values.values()) / len(values)
        named |= {name: getattr(self, name) for name in BOOKKEEPING}
        told = {quantity.name: getattr(self, quantity.name) for quantity in TRAINING}
        return named | {name: value for name, value in told.items() if value is not None}

    def metrics(self, prefix: str = "ib/") -> dict[str, float]:
        """Scalars for a logger: finite floats by prefixed name; undefined numbers are left out."""
        return {prefix + name: float(value) for name, value in self.scalars().items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """The attributes as JSON values, without NaN, so the result is strict JSON. `from_dict` inverts this.

        Raises:
            ValueError: a number is not finite.
        """
        rest = json_values(asdict(self), "a measurement")
        if self.train_loss is None:
            del rest["train_loss"]  # left out if unknown, as in most runs
        if self.scheduled:
            del rest["scheduled"]
        if not self.companions:
            del rest["companions"]
        if not self.loss_jackknife:
            del rest["loss_jackknife"]
        if self.increments is None:
            del rest["increments"]
        first = {name: rest.pop(name) for name in ("step", "entropy")}
        return {**first, **{name: getattr(self, name) for name in PRIMARY_SCALARS}, **rest}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """Make the measurement from the result of `to_dict`. Unknown keys are ignored, so newer files load.

        Raises:
            ValueError: a required key is missing, or a value is invalid; the message names it.
        """
        return _read(cls, data, "measurement")

    def shown_first(self, order: str | None = None) -> dict[str, float | None]:
        """The number that the validation study chose to show first, and its plane, by name; None where undefined.

        Args:
            order: an n-gram order, by default the primary one.
        """
        point = self.views.get(FIRST_VIEW, {}).get(order or self.primary or "")
        return {name: getattr(point, name, None) for name in FIRST_SHOWN}

    def summary(self) -> str:
        """One line for a console."""
        start = "no step" if self.step is None else f"step {self.step:,}"
        if self.error is not None:
            return f"{start}: not measured: {' '.join(self.error.split())}"
        parts = []
        shown = [f"{n.removesuffix('_local')} {_short(v)}" for n, v in self.shown_first().items() if v is not None]
        if shown:
            parts.append(f"{FIRST_VIEW} {', '.join(shown)}")
        if self.loss is not None:
            of_bytes = "" if self.bits_per_byte is None else f" ({self.bits_per_byte:.4g} bits per byte)"
            parts.append(f"loss {_short(self.loss)}{of_bytes}")
        if self.primary in self.orders:
            point = self.orders[self.primary]
            # Above-null numbers refer to the diagonal, not to a curve.
            is_diagonal = self.settings.get("bound", "diagonal") == "diagonal"
            parts += [
                f"{self.primary} complexity {_short(point.complexity, point.complexity_null)}",
                f"expressivity {_short(point.expressivity, point.expressivity_null)}",
                f"optimality {_short(point.optimality, point.optimality_null)}",
                f"distance to bound {_short(point.distance_to_bound, point.distance_null if is_diagonal else None)}",
            ]
            if point.complexity_local is not None:
                # Local numbers leave out what chance and the document alone would give.
                parts += [f"local {name} {_short(getattr(point, f'{name}_local'))}" for name in PRIMARY_SCALARS[:3]]
                parts[-1] += " (too little local complexity)" if point.optimality_local is None else ""
            elif point.num_positions_local is not None:
                few = f"{point.num_positions_local:,} of {self.num_positions:,}"
                parts.append(f"no local information ({few} positions have a label from far away)")
        for name, value in self.features.items():
            by_chance = value.information_p_value is not None and value.information_p_value > CHANCE
            told = f", which may be chance (p {value.information_p_value:.2g})" if by_chance else ""
            parts.append(f"{name} {_short(value.information, value.information_null)}{told}")
        if self.seconds is not None:
            parts.append(f"{self.seconds:.1f} s")
        return f"{start}: {', '.join(parts) or 'nothing measured'}"

    def __str__(self) -> str:
        return self.summary()


def metrics_of(measurement: Measurement) -> list[str]:
    """Every metric that a measurement has, including undefined ones."""
    return [name for name in measurement.scalars() if name not in BOOKKEEPING]


def _numbers_of(
    point: PlanePoint | FeaturePoint, prefix: str, names: Iterable[str], errors: Iterable[str]
) -> dict[str, float | None]:
    known = [name for name in errors if getattr(point, name) is not None]
    return {f"{prefix}{name}": getattr(point, name) for name in (*names, *known)}


def settings_differences(a: Measurement | Mapping[str, Any], b: Measurement | Mapping[str, Any]) -> list[str]:
    """List the settings in which two measurements, or settings dicts, differ; empty if they can be compared.

    >>> settings_differences({"num_bins": 100, "seed": 0}, {"num_bins": 64, "seed": 0})
    ['num_bins: 100 vs 64']
    """
    settings = [json_values(x.settings if isinstance(x, Measurement) else x) for x in (a, b)]
    if same_layers(*(x.get("layers") for x in settings)):
        for x in settings:
            x.pop("layers", None)
    # It does not matter whether the loss was measured, or how; on one probe, the pairs of tokens do matter.
    positions = [(x.pop("loss", None) or {}).get("positions") for x in settings]
    if None not in positions and settings[0].get("probe") == settings[1].get("probe"):
        for x, number in zip(settings, positions, strict=True):
            x["loss"] = {"positions": number}
    # Numbers of views have names of their own, so these settings do not matter. But means over different numbers of
    # draws have the same name.
    means_of_draws = all(x.get("draws", 1) > 1 or x.get("center") for x in settings)
    beside = {"center", "last_block", "readout", "prediction", *(() if means_of_draws else ("draws",))}
    for x in settings:
        for name in [name for name in x if name in beside or name.startswith("companions/")]:
            del x[name]
    differences = list(_differences(settings[0], settings[1], ""))
    if settings[0].get("documents") is not None and settings[0]["documents"] == settings[1].get("documents"):
        differences = [
            f"{d} (the same documents, another tokenizer)" if d.startswith("probe: ") else d for d in differences
        ]
    return differences


# Settings that do not change what a number means: which numbers exist and their names; the version of the package,
# which changes some numbers; additional views and comparison measures; and groups of sequences, which change only nulls
# of features and standard errors. Feature probes matter only if the same feature is measured on two different ones.
_HARMLESS = (
    "version", "orders", "features", "label_names", "draws", "center", "last_block", "companions", "groups",
    "readout", "prediction",
)  # fmt: skip


def incomparable_settings(a: Measurement, b: Measurement) -> dict[str, str]:
    """{setting: difference} for settings that make the numbers of two measurements incomparable.

    >>> old, new = (Measurement.failed(0, "", settings={"seed": n, "version": str(n)}) for n in (0, 1))
    >>> incomparable_settings(old, new)
    {'seed': 'seed: 0 vs 1'}
    """
    if a.settings == b.settings:
        return {}
    settings = [dict(m.settings) for m in (a, b)]
    probes = [s.pop("feature_probes", None) or {} for s in settings]
    for s, own, other in zip(settings, probes, reversed(probes), strict=True):
        s |= {f"feature_probes.{name}": probe for name, probe in own.items() if name in other}
    found = {re.split(r":|\[", text)[0]: text for text in settings_differences(*settings)}
    return {name: text for name, text in found.items() if re.split(r"[./]", name)[0] not in _HARMLESS}


# Parts of layer names that earlier versions recorded for wrapped models: of Fabric (around DistributedDataParallel),
# FSDP, activation checkpointing, torch.compile and PEFT.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_forward_module\.(?:module\.)?|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.)"
)
_PEFT = "base_model.model."


def same_layers(a: Any, b: Any) -> bool:
    """Whether two lists of names mean the same layers; the names of one list may be those inside a wrapper."""
    if a == b:
        return True
    lists = isinstance(a, (list, tuple)) and isinstance(b, (list, tuple))
    return lists and list(map(_bare_name, a)) == list(map(_bare_name, b))


def _bare_name(name: Any) -> str:
    return _WRAPPERS.sub("", str(name)).removeprefix(_PEFT)


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


def json_values(values: Mapping[str, Any], what: str = "settings") -> dict[str, Any]:
    """A deep copy in the form in which a file would return it; raises a ValueError if a file cannot hold it."""
    try:
        return json.loads(json.dumps(dict(values), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{what} must hold JSON values only (numbers, texts, lists, dicts, None; not NaN): {error}"
        ) from error


def _read(cls: type[_Point], data: Any, where: str) -> _Point:
    """Make an object from the data of a file; each field is checked against its annotation."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must be an object, got {data!r}")
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in data]:
        raise ValueError(
            f"{where} lacks the required key{'s' if len(missing) > 1 else ''} {', '.join(missing)}. "
            "Either Measurement.to_dict() did not write it, or it is damaged"
        )
    path = "" if cls is Measurement else f"{where}."
    known = {f.name: _value(data[f.name], str(f.type), f"{path}{f.name}") for f in fields(cls) if f.name in data}
    try:
        return cls(**known)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


# {annotation of a field: what a file may hold for it}.
_EXPECTED = {
    "float": "a finite number",
    "int": "an integer >= 0",
    "str": "a text",
    "bool": "true or false",
    "tuple[float, ...]": "a list of finite numbers",
    "tuple[str, ...]": "a list of names",
    "dict[str, Any]": "an object",
    "dict[str, PlanePoint]": "an object with one entry per name",
    "dict[str, dict[str, PlanePoint]]": "an object of objects, each with one entry per name",
    "dict[str, dict[str, float]]": "an object of objects, each with one number per name",
    "dict[str, FeaturePoint]": "an object with one entry per name",
    "dict[str, dict[str, OrderIncrement]]": "an object of objects, each with one entry per name",
    "dict[str, OrderIncrement]": "an object with one entry per name",
}


def _value(value: Any, annotation: str, name: str) -> Any:
    kind, _, none = annotation.partition(" | ")
    if none and value is None:
        return None
    if kind == "float" and _is_number(value):
        return float(value)
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "str" and isinstance(value, str) and value:
        return value
    if kind == "tuple[float, ...]" and isinstance(value, list) and all(map(_is_number, value)):
        return tuple(map(float, value))
    if kind == "tuple[str, ...]" and isinstance(value, list) and all(isinstance(text, str) for text in value):
        return tuple(value)
    if kind == "dict[str, PlanePoint]" and isinstance(value, Mapping):
        return {key: _read(PlanePoint, point, f"{name}.{key}") for key, point in value.items()}
    if kind.startswith("dict[str, dict[str, ") and isinstance(value, Mapping):
        inner = kind.removeprefix("dict[str, ").removesuffix("]")
        return {key: _value(each, inner, f"{name}.{key}") for key, each in value.items()}
    if kind == "dict[str, float]" and isinstance(value, Mapping):
        return {key: _value(each, "float", f"{name}.{key}") for key, each in value.items()}
    if kind == "dict[str, FeaturePoint]" and isinstance(value, Mapping):
        return {key: _read(FeaturePoint, point, f"{name}.{key}") for key, point in value.items()}
    if kind == "dict[str, OrderIncrement]" and isinstance(value, Mapping):
        return {key: _read(OrderIncrement, point, f"{name}.{key}") for key, point in value.items()}
    if kind == "dict[str, Any]" and isinstance(value, Mapping):
        return value
    raise ValueError(f"{name} must be {_EXPECTED[kind]}{' or None' if none else ''}, got {value!r}")


def _is_number(value: Any) -> bool:
    # Compared, not converted, because an integer may be too large for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


ADVICE = (
    "A token is a different piece of text under each tokenizer. So labels and their counts differ, and with them "
    "complexity, expressivity and their nulls, even if two models know the same about the text. Compare each model "
    "only with itself: its phases, the order of its checkpoints, and its values above its own null. See "
    "docs/comparability.md"
)


def warn_of_other_tokenizers(measurements: Iterable[Measurement], *, stacklevel: int = 3) -> None:
    """Warn once if measurements are of the same documents under different tokenizers.

    Warns:
        RuntimeWarning: says what can be compared, and what cannot.
    """
    probes: dict[str, set[str]] = {}
    for measurement in measurements:
        documents, probe = measurement.settings.get("documents"), measurement.settings.get("probe")
        if documents is not None and probe is not None:
            probes.setdefault(documents, set()).add(probe)
    several = max((len(fingerprints) for fingerprints in probes.values()), default=1)
    if several > 1:
        warnings.warn(
            f"these measurements are of the same documents under {several} tokenizers. {ADVICE}.",
            RuntimeWarning,
            stacklevel=stacklevel,
        )
