"""What is asked of a meter, checked and completed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ib_callback.common.checks import check_integer
from ib_callback.common.errors import ModelError
from ib_callback.measuring.model.access import Layers
from ib_callback.measuring.plan.jackknife import MAX_GROUPS
from ib_callback.probe.probe import Probe
from ib_callback.results.uncertainty import NUM_GROUPS

BOUNDS = ("diagonal", "ib_curve")


def choose_layers(layers: Any) -> Layers:
    """Which modules to measure; names as a tuple. Raises a ModelError if it is none of what `Meter` takes."""
    if isinstance(layers, str) or callable(layers):
        return layers
    names = tuple(layers) if isinstance(layers, Iterable) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise ModelError(
            f'layers: expected "hidden_states", "blocks", at least one module name or glob, or a callable '
            f"model -> modules, got {layers!r}."
        )
    return names


def choose_primary(primary: str | None, orders: dict[str, int]) -> str:
    """The order that the headline numbers refer to."""
    if primary is None:
        return "token" if "token" in orders else next(iter(orders))
    if primary not in orders:
        raise ValueError(f"primary: expected one of the measured orders ({', '.join(orders)}), got {primary!r}.")
    return primary


def choose_features(features: str | Iterable[str] | None, probe: Probe, orders: dict[str, int]) -> tuple[str, ...]:
    """The labels of the probe to measure information about."""
    names = tuple(probe.labels) if features is None else (features,) if isinstance(features, str) else tuple(features)
    for name in names:
        if name not in probe.labels:
            known = ", ".join(map(repr, probe.labels)) or "none"
            raise ValueError(f"features: the probe has no label {name!r}; it has {known}.")
        if name in orders:
            raise ValueError(f"features: label {name!r} has the name of an n-gram order; rename it in the probe.")
    return names


def choose_bound(bound: str, weighting: str) -> str:
    """What distances are taken to."""
    if bound not in BOUNDS:
        raise ValueError(f"bound: expected one of {', '.join(map(repr, BOUNDS))}, got {bound!r}.")
    if bound == "ib_curve" and weighting != "empirical":
        raise ValueError(
            f'bound="ib_curve" bounds mutual information, which weighting={weighting!r} does not yield. Use '
            'weighting="empirical", or bound="diagonal".'
        )
    return bound


def choose_groups(standard_errors: Any, weighting: str) -> int:
    """Number of groups of sequences to leave out in turn, 0 for none."""
    if standard_errors is None or standard_errors is False:
        return 0
    if weighting != "empirical":
        raise ValueError(
            f"standard_errors: expected weighting='empirical', got {weighting!r}. Leave one of the two settings out."
        )
    if standard_errors is True:
        return NUM_GROUPS
    if check_integer("standard_errors", standard_errors, minimum=3, cure="True is for 16 groups") > MAX_GROUPS:
        raise ValueError(
            f"standard_errors: expected at most {MAX_GROUPS} groups, got {standard_errors}; True is for 16."
        )
    return int(standard_errors)
