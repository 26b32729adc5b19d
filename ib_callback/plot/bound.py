"""The Information Bottleneck curve of a probe in the units of the plane, and the panels that show it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ib_callback.bound.curve import IBCurve
from ib_callback.common.errors import TrajectoryError
from ib_callback.plot.sheet import Note
from ib_callback.results.measurement import Measurement

# Entries of a curve that must agree with the settings of a measurement.
_OF_THE_SAMPLE = {
    "probe": "it belongs to another probe",
    "K": "it belongs to other positions (the widest order differs)",
}


def curve_beside(path: Path) -> IBCurve | None:
    """The curve in a file beside a trajectory; None if there is no such file.

    Raises:
        TrajectoryError: the file cannot be read, or is not a curve.
    """
    try:
        return IBCurve.load(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrajectoryError(f"{error} Or move {path} away to draw without it") from error


def curve_in_plane(curve: IBCurve | None, order: str, measurement: Measurement) -> np.ndarray | None:
    """The curve as efficiencies, [corners, 2]; None if it belongs to another order or to another sample.

    The curve ends at the highest complexity for which it was computed. Panels continue it with its last value, because
    more complexity never costs expressivity.
    """
    if curve is None or order != curve.info.get("order", measurement.primary) or why_not_drawn(curve, measurement):
        return None
    curve = curve.to_efficiency(measurement.settings["num_bins"])
    return np.stack([curve.complexity, curve.expressivity], axis=1)


def why_not_drawn(curve: IBCurve | None, measurement: Measurement) -> list[Note]:
    """A note that says why no panel shows the curve, if the curve belongs to other measurements."""
    if curve is None:
        return []
    settings = measurement.settings
    for name, reason in _OF_THE_SAMPLE.items():
        if name in curve.info and curve.info[name] != settings.get(name, curve.info[name] if name == "K" else None):
            return [Note(f"The IB curve is not drawn: {reason}.")]
    if not isinstance(settings.get("num_bins"), int):
        return [
            Note("The IB curve is not drawn: its unit depends on the number of bins, which the settings do not say.")
        ]
    return []
