"""Further probes of which only the feature labels are measured, beside the main probe of a meter.

Information about a feature needs a probe that carries it, and that is usually another one than the text on which
complexity is measured: preference needs pairs of answers. Its valid positions are those of the main probe's orders (the
same K), so that the numbers are those that a measurement of the feature's probe with these orders would give, but no
n-gram of it is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ib_callback.common.errors import ProbeError
from ib_callback.probe.probe import Probe

FeatureProbes = Probe | Iterable[Probe] | Mapping[str, Probe]

# Names of more labels than this would make every line of a trajectory longer than its numbers.
MOST_NAMES = 100


def named_features(
    feature_probes: FeatureProbes, orders: Iterable[str], features: Iterable[str]
) -> list[tuple[Probe, dict[str, str]]]:
    """Each probe, and the name under which each of its labels is measured.

    Args:
        feature_probes: one probe or several; of a mapping each key goes before the names of its probe's labels.
        orders: names of the n-gram orders that are measured.
        features: labels of the main probe that are measured.

    Raises:
        TypeError: something that is no probe.
        ProbeError: a probe without labels.
        ValueError: two features of one name, or one with the name of an order.

    >>> pairs = Probe.from_tokens([[1, 2, 3]], labels={"preference": [[-1, 1, 1]]})
    >>> [names for _, names in named_features([pairs], ["token"], [])]
    [{'preference': 'preference'}]
    >>> [names for _, names in named_features({"tulu": pairs}, ["token"], ["preference"])]
    [{'preference': 'tulu_preference'}]
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
                f"feature_probes: expected probes with labels, got {probe!r}, which has none. Only features of these "
                "probes are measured; pass labels= to Probe.from_texts, or leave the probe out."
            )
        names = {label: f"{prefix}_{label}" if prefix else label for label in probe.labels}
        for name in names.values():
            if name in taken:
                raise ValueError(
                    f"feature_probes: the feature {name!r} of probe {probe.name!r} has the name of {taken[name]}. Give "
                    "the probes names that go before their labels', such as "
                    f'feature_probes={{"other": probe}} for "other_{name}".'
                )
            taken[name] = f"a label of probe {probe.name!r}"
        found.append((probe, names))
    return found


def label_names(probe: Probe, names: Mapping[str, str]) -> dict[str, list[str]]:
    """What the labels of each feature are called, by the name of the feature; only those that have names.

    Args:
        probe: with names for the numbers that its labels are.
        names: the name under which each of its labels is measured.
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
    if isinstance(feature_probes, Probe):
        return [("", feature_probes)]
    if isinstance(feature_probes, str) or not isinstance(feature_probes, Iterable):
        raise TypeError(
            f"feature_probes: expected probes in a list or as {{name: probe}}, got {type(feature_probes).__name__}."
        )
    return [("", probe) for probe in feature_probes]
