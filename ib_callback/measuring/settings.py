"""The settings of a meter, checked and completed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ib_callback.common.checks import check_integer
from ib_callback.common.errors import ModelError, ProbeError
from ib_callback.measuring.companions import COMPANION_LAYERS, COMPANIONS
from ib_callback.measuring.model.access import Layers
from ib_callback.measuring.plan.jackknife import MAX_GROUPS
from ib_callback.measuring.plan.plan import Baseline
from ib_callback.measuring.quantities.documents import NEAREST
from ib_callback.probe.probe import Probe
from ib_callback.results.uncertainty import NUM_GROUPS

BOUNDS = ("diagonal", "ib_curve")
SHIFTS = ("circular", "linear")


def choose_layers(layers: Any) -> Layers:
    """Which modules to measure; names as a tuple. Raises a ModelError for anything that `Meter` does not accept."""
    if isinstance(layers, str) or callable(layers):
        return layers
    names = tuple(layers) if isinstance(layers, Iterable) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise ModelError(
            f'layers: expected "hidden_states", "blocks", at least one module name or glob, or a callable '
            f"model -> modules, got {layers!r}."
        )
    return names


def choose_process_group(group: Any) -> Any:
    """The ranks that share a measurement. Raises a TypeError if `group` is not a process group."""
    if group is None or (isinstance(group, str) and group == "alone") or hasattr(group, "size"):
        return group
    raise TypeError(
        f'process_group: expected a group of torch.distributed, None for all ranks, or "alone", got {group!r}.'
    )


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
    """The line to which distances are measured."""
    if bound not in BOUNDS:
        raise ValueError(f"bound: expected one of {', '.join(map(repr, BOUNDS))}, got {bound!r}.")
    if bound == "ib_curve" and weighting != "empirical":
        raise ValueError(
            f'bound="ib_curve" bounds mutual information, but weighting={weighting!r} does not give mutual '
            'information. Use weighting="empirical", or bound="diagonal".'
        )
    return bound


def choose_companions(companions: str | Iterable[str], layers: str) -> tuple[tuple[str, ...], str]:
    """Names of comparison measures, and the layers for which they are computed."""
    if not isinstance(companions, Iterable):
        raise TypeError(f"companions: expected some of {', '.join(map(repr, COMPANIONS))}, or (), got {companions!r}.")
    names = (companions,) if isinstance(companions, str) else tuple(companions)
    if unknown := [name for name in names if name not in COMPANIONS]:
        raise ValueError(f"companions: expected some of {', '.join(map(repr, COMPANIONS))}, got {unknown[0]!r}.")
    if layers not in COMPANION_LAYERS:
        raise ValueError(f"companion_layers: expected one of {', '.join(map(repr, COMPANION_LAYERS))}, got {layers!r}.")
    return tuple(dict.fromkeys(names)), layers


def choose_loss(loss: Any) -> bool | str:
    """Whether to measure the loss; "all" for all pairs of tokens."""
    if loss is not True and loss is not False and loss != "all":
        raise ValueError(f'loss: expected True, "all" or False, got {loss!r}.')
    return loss


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
    if check_integer("standard_errors", standard_errors, minimum=3, cure="True means 16 groups") > MAX_GROUPS:
        raise ValueError(
            f"standard_errors: expected at most {MAX_GROUPS} groups, got {standard_errors}; True means 16."
        )
    return int(standard_errors)


def choose_baseline(baseline: Any, offset: Any, weighting: str) -> Baseline | None:
    """Which document baseline to measure; None for none, or if it is not defined for the weighting."""
    if baseline not in (True, False, None, *SHIFTS):
        raise ValueError(f"baseline: expected True, False, {' or '.join(map(repr, SHIFTS))}, got {baseline!r}.")
    if offset is not None and baseline != "linear":
        raise ValueError(
            f'baseline_offset: expected None unless baseline="linear", got {offset!r}. A circular shift draws a random '
            "offset for each sequence."
        )
    if offset not in (None, "half"):
        check_integer("baseline_offset", offset, minimum=NEAREST, cure='nearer contexts overlap; or pass "half"')
    if not baseline or weighting != "empirical":
        return None
    return Baseline("linear", NEAREST if offset is None else offset) if baseline == "linear" else Baseline()


# Feature probes: probes beside the main probe of a meter, on which only the feature labels are measured. Information
# about a feature needs a probe with its labels, usually not the text on which complexity is measured: preference needs
# pairs of answers. The orders of the main probe (the same K) decide which positions are valid. So the numbers equal
# those of a measurement of that probe with these orders, but no n-gram of it is counted.
FeatureProbes = Probe | Iterable[Probe] | Mapping[str, Probe]

# With more names than this, every line of a trajectory would hold more names than numbers.
MOST_NAMES = 100


def named_features(
    feature_probes: FeatureProbes, orders: Iterable[str], features: Iterable[str]
) -> list[tuple[Probe, dict[str, str]]]:
    """Each probe, and the name under which each of its labels is measured.

    Args:
        feature_probes: one probe or several; in a mapping, each key becomes a prefix of its probe's label names.
        orders: names of the n-gram orders that are measured.
        features: labels of the main probe that are measured.

    Raises:
        TypeError: something that is not a probe.
        ProbeError: a probe without labels.
        ValueError: two features with the same name, or a feature with the name of an order.

    >>> pairs = Probe.from_tokens([[1, 2, 3]], labels={"preference": [[-1, 1, 1]]})
    >>> [names for _, names in named_features([pairs], ["token"], [])]
    [{'preference': 'preference'}]
    >>> [names for _, names in named_features({"tulu": pairs}, ["token"], ["preference"])]
    [{'preference': 'tulu_preference'}]
    >>> [names for _, names in named_features({"preference": pairs}, ["token"], [])]
    [{'preference': 'preference'}]
    """
    taken = dict.fromkeys(orders, "an n-gram order") | dict.fromkeys(features, "a label of the main probe")
    found = []
    for prefix, probe in _with_prefix(feature_probes):
        if not isinstance(probe, Probe):
            raise TypeError(
                "feature_probes: expected ib_callback.Probe objects, in a list or as {name: probe}, got "
                f"{type(probe).__name__}."
            )
        if not probe.labels:
            raise ProbeError(
                f"feature_probes: expected probes with labels, got {probe!r}, which has no labels. Only features of "
                "these probes are measured. Pass labels= to Probe.from_texts, or leave the probe out."
            )
        names = {label: label if prefix in ("", label) else f"{prefix}_{label}" for label in probe.labels}
        for name in names.values():
            if name in taken:
                raise ValueError(
                    f"feature_probes: the feature {name!r} of probe {probe.name!r} has the name of {taken[name]}. Name "
                    "the probes; each name is put before the labels of its probe, such as "
                    f'feature_probes={{"other": probe}} for "other_{name}".'
                )
            taken[name] = f"a label of probe {probe.name!r}"
        found.append((probe, names))
    return found


def label_names(probe: Probe, names: Mapping[str, str]) -> dict[str, list[str]]:
    """{feature: names of its label's values}, for features whose values have names.

    Args:
        probe: the probe with the labels.
        names: for each label of the probe, the name of its feature.
    """
    known = probe.label_names
    texts = {public: list(known.get(label, ())) for label, public in names.items()}
    return {public: text for public, text in texts.items() if 0 < len(text) <= MOST_NAMES}


def _with_prefix(feature_probes: Any) -> list[tuple[str, Any]]:
    if isinstance(feature_probes, Mapping):
        bad = [name for name in feature_probes if not (isinstance(name, str) and name and "/" not in name)]
        if bad:
            raise ValueError(f'feature_probes: expected names, not empty and without "/", got {bad[0]!r}.')
        return list(feature_probes.items())
    several = feature_probes if isinstance(feature_probes, Iterable) else [feature_probes]
    return [("", probe) for probe in several]
