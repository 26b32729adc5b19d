"""The Information Bottleneck curve of a probe in the units of the plane, and in which panels it belongs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ib_callback.bound.curve import FILENAME, IBCurve
from ib_callback.common.errors import TrajectoryError
from ib_callback.plot.sheet import Note
from ib_callback.results.measurement import Measurement

# What a curve may say of its sample, as settings of a measurement do.
_OF_THE_SAMPLE = {"probe": "it is that of another probe", "K": "it is that of other positions (another widest order)"}


def curve_beside(directory: Path) -> IBCurve | None:
    """The curve beside a trajectory; None if there is none.

    Raises:
        TrajectoryError: it cannot be read, or is not what such a file should be.
    """
    try:
        return IBCurve.load(directory / FILENAME)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrajectoryError(f"{error} Or move {directory / FILENAME} away, to draw without it") from error


def curve_in_plane(curve: IBCurve | None, order: str, measurement: Measurement) -> np.ndarray | None:
    """The curve as efficiencies, [corners, 2], if it is that of this order and of the sample that was measured.

    It ends where it has been computed; as more complexity never costs expressivity, the panels go on with its last
    value.
    """
    if curve is None or order != curve.info.get("order", measurement.primary) or why_not_drawn(curve, measurement):
        return None
    curve = curve.to_efficiency(measurement.settings["num_bins"])
    return np.stack([curve.complexity, curve.expressivity], axis=1)


def why_not_drawn(curve: IBCurve | None, measurement: Measurement) -> list[Note]:
    """Why a curve is in no panel, if that is because it belongs to other measurements."""
    if curve is None:
        return []
    settings = measurement.settings
    for name, reason in _OF_THE_SAMPLE.items():
        if name in curve.info and curve.info[name] != settings.get(name, curve.info[name] if name == "K" else None):
            return [Note(f"The IB curve given is not drawn: {reason}.")]
    if not isinstance(settings.get("num_bins"), int):
        return [
            Note("The IB curve given is not drawn: the settings do not say the number of bins, which gives its unit.")
        ]
    return []
