"""The numbers of a measurement as something to watch or to choose by: their names and which way is better."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from ib_callback.results.measurement import Measurement
from ib_callback.results.points import FEATURE_SCALARS, PRIMARY_SCALARS, plane_scalars

Mode = Literal["min", "max"]

# Logged as well, but of no use to a rule.
_BOOKKEEPING = ("seconds", "overhead", "tokens_seen")
_BETTER: dict[str, Mode] = {
    "optimality": "max",
    "optimality_above_null": "max",
    "expressivity": "max",
    "expressivity_above_null": "max",
    "information": "max",
    "ratio": "max",
    "complexity": "min",
    "complexity_above_null": "min",
    "distance_to_bound": "min",
    "distance_above_null": "min",
    "bound_ratio": "max",
}


def metric_names(
    orders: Iterable[str], features: Iterable[str] = (), *, primary: str | None = None, bound: str = "diagonal"
) -> list[str]:
    """Every metric of measurements with these orders and features, before one is made.

    Args:
        orders: that are measured.
        features: likewise.
        primary: the primary order; the IB curve is the bound of that one alone.
        bound: as for `Meter`.

    >>> names = metric_names(["token"], ["preference"])
    >>> names[:4], names[-2:]
    (['complexity', 'expressivity', 'optimality', 'distance_to_bound'],
     ['preference/information_p_value', 'preference/ratio'])
    """
    return [
        *PRIMARY_SCALARS, "entropy", "ceiling",
        *(f"{order}/{name}" for order in orders for name in plane_scalars(order, primary=primary, bound=bound)),
        *(f"{feature}/{name}" for feature in features for name in FEATURE_SCALARS),
    ]  # fmt: skip


def metrics_of(measurement: Measurement) -> list[str]:
    """Every metric that a measurement has, undefined ones included."""
    return [name for name in measurement.scalars() if name not in _BOOKKEEPING]


def resolve_metric(name: str, available: Measurement | Iterable[str]) -> str:
    """The full name of a metric: `"preference"`, a feature, stands for `"preference/information"`.

    Args:
        name: as logged, without prefix.
        available: a measured point, or the names that exist.

    Raises:
        ValueError: there is no such metric; the message lists those that exist.
    """
    names = metrics_of(available) if isinstance(available, Measurement) else list(available)
    for candidate in (name, f"{name}/information"):
        if candidate in names:
            return candidate
    hint = ""
    if name.rpartition("/")[2] in ("bound_ratio", "distance_to_bound"):
        hint = '; a bound_ratio takes bound="ib_curve", which is the bound of the primary order and of no other'
    raise ValueError(f"no metric {name!r} is measured{hint}; those measured: {', '.join(names) or 'none'}")


def better_direction(name: str) -> Mode | None:
    """Whether high or low values of a metric are the better ones; None where neither is.

    A name without any `/` that is no metric is taken for that of a feature.
    """
    metric = name.rpartition("/")[2]
    if metric in _BETTER:
        return _BETTER[metric]
    neither = metric == name and name not in ("entropy", "ceiling")
    return "max" if neither else None


def check_direction(mode: str) -> None:
    """Raise a ValueError unless mode is "min" or "max"."""
    if mode not in ("min", "max"):
        raise ValueError(f'mode must be "min" (low values are better) or "max", got {mode!r}')


def check_metric(argument: str, name: object) -> None:
    """Raise a TypeError unless the name of a metric is a text."""
    if not isinstance(name, str):
        raise TypeError(f'{argument}: expected the name of a metric, such as "optimality", got {name!r}')
