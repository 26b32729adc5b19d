"""The Information Bottleneck curve of a probe in the units of the plane, and in which panels it belongs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ib_callback.errors import TrajectoryError
from ib_callback.json_lines import explained
from ib_callback.measurement import Measurement

FILENAME = "ib_curve.json"
_FORMAT = 1


class Curve(Protocol):
    """What is drawn of an IB curve, such as `ib_callback.ib_curve.IBCurve`.

    A curve may also say whose it is: `order`, by default the primary one, and `probe`, a fingerprint.
    """

    @property
    def complexity(self) -> Any:
        """I(X;Z) in nats, [points]."""

    @property
    def expressivity(self) -> Any:
        """I(Y;Z) in nats, [points]."""


@dataclass(frozen=True)
class StoredCurve:
    """The curve of a file, as it is drawn; nats."""

    complexity: tuple[float, ...]
    expressivity: tuple[float, ...]
    order: str | None = None
    probe: str | None = None


def load_curve(path: Path) -> StoredCurve:
    """Read an `ib_curve.json`.

    Raises:
        TrajectoryError: it cannot be read, or is not what such a file should be.
    """
    with explained(path, "read"):
        text = path.read_text(encoding="utf-8")
    try:
        data = json.loads(text)
        version, unit = data["format"], data["unit"]
        complexity, expressivity = (tuple(map(float, data[name])) for name in ("complexity", "expressivity"))
    except (ValueError, KeyError, TypeError) as error:
        raise TrajectoryError(
            f"{path} is no IB curve: expected a JSON object with format, unit, complexity and expressivity, got "
            f"{type(error).__name__}: {error}. Write it anew, or move it away to draw without it"
        ) from error
    if version != _FORMAT or unit != "nats" or len(complexity) != len(expressivity):
        raise TrajectoryError(
            f"{path}: expected format {_FORMAT} in nats with as many values of either kind, got format {version!r} in "
            f"{unit} with {len(complexity)} and {len(expressivity)}. Update ib-callback, or move the file away"
        )
    return StoredCurve(complexity, expressivity, order=data.get("order"), probe=data.get("probe"))


def curve_beside(directory: Path) -> StoredCurve | None:
    """The curve beside a trajectory; None if there is none."""
    return load_curve(directory / FILENAME) if (directory / FILENAME).exists() else None


def curve_in_plane(curve: Curve | None, order: str, measurement: Measurement) -> np.ndarray | None:
    """The curve as efficiencies, [points, 2], if it is that of this order and of the probe that was measured.

    The one place where a curve is matched with measurements. It ends where it has been computed; as more
    complexity never costs expressivity, the panels go on with its last value.
    """
    if curve is None or order != (getattr(curve, "order", None) or measurement.primary):
        return None
    probe = getattr(curve, "probe", None)
    bins = measurement.settings.get("num_bins")
    if (probe is not None and probe != measurement.settings.get("probe")) or not isinstance(bins, int) or bins < 2:
        return None
    points = np.stack([_array(curve.complexity), _array(curve.expressivity)], axis=1) / math.log(bins)
    return points[np.argsort(points[:, 0], kind="stable")]


def why_not_drawn(curve: Curve | None, measurement: Measurement) -> str | None:
    """Why a curve is in no panel, if that is because it belongs to other measurements."""
    if curve is None:
        return None
    probe = getattr(curve, "probe", None)
    if probe is not None and probe != measurement.settings.get("probe"):
        return "The IB curve given is not drawn: it is that of another probe."
    if not isinstance(measurement.settings.get("num_bins"), int):
        return "The IB curve given is not drawn: the settings do not say the number of bins, which gives its unit."
    return None


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=float).ravel()
