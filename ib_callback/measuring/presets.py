"""Settings of `Meter` that belong together, by name: the published definition, word for word.

"Conklin et al., ICLR 2026", by section:

- Entropy Estimation: one set of points uniform on the unit sphere; softmax of the plain cosines, which is a
  temperature of 1; H(Z), an efficiency, as a mean over layers; I(X;Z) = 1/|X| Σ over labels of H(Z) - H(Z given
  X = x), in which all labels have the same weight.
- Relating Representation Structure to Performance: the bound is where expressivity / complexity is 1, the diagonal.
- Data and Sampling: 10,000 samples of C4 of at most 512 tokens.

The paper measures nothing else, so the presets turn off everything else that `Meter` measures. The paper leaves the
number of points open as n; its figures use 100.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

import numpy as np
import torch.distributed as dist

from ib_callback.common.messages import tell
from ib_callback.probe.probe import Probe

_Init = ParamSpec("_Init")

_PAPER: dict[str, Any] = {
    "num_bins": 100,
    "temperature": 1.0,
    "weighting": "uniform",
    "bound": "diagonal",
    "draws": 1,
    "null": False,
    "baseline": False,
    "baseline_offset": None,
    "center": False,
    "standard_errors": False,
    "loss": False,
    "readout": False,
    "prediction": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    # In some thousand dimensions all cosines are small, so at a temperature of 1 all entropies are near 1.
    "paper-calibrated": _PAPER | {"temperature": "calibrated"},
}
SEQUENCES, TOKENS = 10_000, 512


def takes_presets(init: Callable[_Init, None]) -> Callable[_Init, None]:
    """Let the keyword `preset` of an `__init__` set other keywords; their written defaults and types stay."""
    defaults = {name: p.default for name, p in inspect.signature(init).parameters.items() if p.kind is p.KEYWORD_ONLY}

    @functools.wraps(init)
    def with_preset(*args: _Init.args, **keywords: _Init.kwargs) -> None:
        if (preset := keywords.get("preset")) is not None:
            keywords.update(settings_of(preset, keywords, defaults))
        init(*args, **keywords)

    return with_preset


def settings_of(preset: Any, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a preset that were not given.

    A keyword that equals its default counts as not given, because some programs pass every keyword: Lightning's command
    line, or a configuration in a dataclass.

    Args:
        preset: name of the preset.
        given: keywords by name.
        defaults: defaults of all keywords.

    Raises:
        ValueError: there is no such preset, or a keyword contradicts it; the message names both values.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(map(repr, PRESETS))}, or None, got {preset!r}.")
    fixed = PRESETS[preset]
    if defaults.keys() <= given.keys():
        given = {name: value for name, value in given.items() if name in fixed and not _same(value, defaults[name])}
    if wrong := _contradictions(preset, given):
        expected = ", ".join(f"{name}={fixed[name]!r}" for name in wrong)
        got = ", ".join(f"{name}={given[name]!r}" for name in wrong)
        other = next((name for name in PRESETS if not _contradictions(name, given)), None)
        cure = f"pass preset={other!r}" if other else "leave preset out and pass each setting that you want"
        raise ValueError(f"preset={preset!r}: expected {expected}, got {got}. Leave this out, or {cure}.")
    return {name: value for name, value in fixed.items() if name not in given}


def _contradictions(preset: str, given: Mapping[str, Any]) -> list[str]:
    return [name for name, value in PRESETS[preset].items() if name in given and not _same(given[name], value)]


def _same(value: Any, other: Any) -> bool:
    """Whether two settings mean the same; None turns a measurement off, as False does."""
    return np.ndim(value) == 0 and bool(value == other or (other is False and value is None))


def tell_of_size(preset: str, probe: Probe) -> None:
    """Say once, in one line, if the probe does not have the published size."""
    sequences, longest = len(probe), int(probe.attention_mask.sum(1).max())
    elsewhere = dist.is_available() and dist.is_initialized() and dist.get_rank() != 0
    if (sequences, longest) != (SEQUENCES, TOKENS) and not elsewhere:
        _tell_once(
            f"preset={preset!r}: probe {probe.name!r} has {sequences:,} sequences of up to {longest:,} tokens. The "
            f"paper's probe has {SEQUENCES:,} of up to {TOKENS:,}: Probe.from_c4(tokenizer, num_sequences=10_000, "
            "max_length=512). Numbers depend on the size, so they will differ from the published ones."
        )


@functools.cache
def _tell_once(message: str) -> None:
    tell(message)
