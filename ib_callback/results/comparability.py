"""Measurements that look alike and cannot be compared: the same documents under different tokenizers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from ib_callback.results.measurement import Measurement

ADVICE = (
    "A token is not the same unit of text under both: labels, their counts and so complexity, expressivity and their "
    "nulls differ for the same text and the same knowledge of it. Compare what each model does with itself (its "
    "phases, the order of its checkpoints, values above its own null); see docs/comparability.md"
)


def warn_of_other_tokenizers(measurements: Iterable[Measurement], *, stacklevel: int = 3) -> None:
    """One warning if measurements are of the same documents under different tokenizers.

    Warns:
        RuntimeWarning: what can be compared, and what cannot.
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
