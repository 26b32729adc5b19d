"""What every tracker gets for a run: the numbers of a point, the settings, and captions of pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from ib_callback.common.version import __version__
from ib_callback.measuring.meter import Meter
from ib_callback.results.measurement import Measurement
from ib_callback.results.metrics import FIRST_SHOWN
from ib_callback.run.config import RunConfig
from ib_callback.run.names import DEFAULT_PREFIX
from ib_callback.run.schedule import in_words

# The number shown first (docs/evidence.md), under a name that sorts it with the other headline numbers.
FIRST_NUMBER = "prediction_score"
# The headline, in this order. None of them has a slash in its name, so that trackers show them in one section.
HEADLINE = (FIRST_NUMBER, "loss", "complexity", "expressivity", "distance_to_bound")
PLANE = "plane"
PICTURES = {
    PLANE: "the information plane: complexity across, expressivity up, a dot for each point so far",
    "over_steps": "the numbers of all points so far over the steps of the training",
    "layers": "the information plane of each layer at the last point",
}


def numbers(point: Measurement, prefix: str = DEFAULT_PREFIX) -> dict[str, float]:
    """Every number of a point by its logged name, headline numbers first. Undefined ones are left out."""
    found = point.metrics(prefix)
    score = point.shown_first()[FIRST_SHOWN[0]]
    first = {} if score is None else {f"{prefix}{FIRST_NUMBER}": float(score)}
    first |= {name: found[name] for name in (f"{prefix}{each}" for each in HEADLINE) if name in found}
    return first | found


def settings(meter: Meter, config: RunConfig, *, rules: str, num_layers: int, stem: str) -> dict[str, Any]:
    """The settings of a run, for the configuration that trackers keep. No value is nested.

    Args:
        meter: the meter that measures.
        config: the configuration of the run.
        rules: what the rules do, in words.
        num_layers: how many layers are measured.
        stem: what each name begins with, followed by an underscore.
    """
    probe = meter.probe
    found: dict[str, Any] = {
        "version": __version__,
        "probe": probe.name,
        "probe_fingerprint": probe.fingerprint,
        "probe_sequences": len(probe),
        "probe_tokens": int(probe.attention_mask.sum()),
        "orders": ", ".join(meter.orders),
        "primary": meter.primary,
        "num_bins": meter.num_bins,
        "temperature": meter.temperature,
        "seed": meter.seed,
        "weighting": meter.weighting,
        "bound": meter.bound,
        "num_layers": num_layers,
        "schedule": in_words(config.schedule),
        "select": "none" if config.select is None else config.selection.by,
        "select_from": str(config.selection.select_from),
        "stopping": "none" if config.stopping is None else repr(config.stopping),
        **{f"guard_{name}": str(guard) for name, guard in config.guards.items()},
        "rules": rules or "none",
    }
    if len(meter.probes) > 1:
        found["feature_probes"] = ", ".join(f"{each.name} {each.fingerprint}" for each in meter.probes[1:])
    return {f"{stem}_{name}": value for name, value in found.items()}


def caption(name: str, step: int | None, phase: str | None) -> str:
    """The caption of a picture: what it shows, at which step and in which phase."""
    when = "" if step is None else f"step {step:,}, "
    when += f"phase {'not known yet' if phase is None else phase}"
    return f"{when}: {PICTURES.get(name, name)}"


def opened(content: bytes) -> Any:
    """A Pillow image made from the content of a PNG file."""
    from PIL import Image  # installed with Matplotlib, which has drawn the picture

    return Image.open(io.BytesIO(content))


def to_tensorboard(
    writer: Any,
    step: int,
    *,
    numbers: Mapping[str, float] | None = None,
    pictures: Mapping[str, bytes] | None = None,
    settings: Mapping[str, Any] | None = None,
    prefix: str = DEFAULT_PREFIX,
) -> None:
    """Write numbers, pictures and settings into event files, under the same names as in other trackers.

    Args:
        writer: a `SummaryWriter`.
        step: the optimizer step.
        numbers: numbers by full name.
        pictures: content of PNG files by name without prefix.
        settings: settings by name, written as a table of text under `<prefix>settings`.
        prefix: prefix of pictures and settings.
    """
    import numpy as np

    if settings:
        rows = [f"| {name} | {value} |" for name, value in settings.items()]
        writer.add_text(f"{prefix}settings", "\n".join(["| setting | value |", "|---|---|", *rows]), step)
    for name, value in (numbers or {}).items():
        writer.add_scalar(name, value, step)
    for name, content in (pictures or {}).items():
        writer.add_image(f"{prefix}{name}", np.asarray(opened(content).convert("RGB")), step, dataformats="HWC")
    writer.flush()
