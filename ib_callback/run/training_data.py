"""A look at the training data before the first step: is the probe held out?

Examples are read by number from datasets that have numbers. One that can only be iterated is left alone: it may hold a
connection, a place in a file or a shuffled buffer that the training will go on from. Reading an example by number
changes nothing in most datasets; one that draws from a generator of its own, or opens at the first example a file that
worker processes would then share, is better left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ib_callback.common.messages import describe, warn
from ib_callback.probe.probe import Probe

_BY_HAND = "probe.overlap(texts, tokenizer) compares any texts with a probe."


def look_for_probes(probes: Iterable[Probe], loaders: Any, count: int, tokenizer: Any = None) -> str:
    """Look for probes in a sample of the training data, evenly spaced; never raises.

    Args:
        probes: that ought to be held out.
        loaders: what gives the training batches: a DataLoader, or several in lists and dicts.
        count: examples to look at in each dataset.
        tokenizer: for datasets of texts.

    Warns:
        RuntimeWarning: a probe was found, with numbers; or the data could not be looked at, and why.

    Returns:
        What was looked at and not found, in a sentence; empty if there is nothing to tell.
    """
    clean = []
    for loader in _each(loaders):
        try:
            dataset: Any = getattr(loader, "dataset", None)
            why_not = _why_not(dataset)
            if why_not:
                _warn(f"The training data was not searched for the probe: {why_not} {_BY_HAND}")
                continue
            numbers = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)).tolist()
            examples = [dataset[number] for number in numbers]
            for probe in probes:
                found = probe.overlap(examples, tokenizer)
                if found:
                    _warn(
                        f"Probe {probe.name!r} is not held out from the training data: {found}. A measurement on "
                        "text of the training says little about other text. Take the probe from another split."
                    )
                else:
                    clean.append(
                        f"probe {probe.name!r} shares no run of {found.n} tokens with {found.num_texts:,} examples of "
                        f"the training data ({found.num_tokens:,} tokens)"
                    )
        except Exception as error:  # whatever a user's dataset does, it will do when training needs it
            _warn(
                "The training data could not be searched for the probe. Training goes on. "
                f"{describe(error).rstrip('.')}. {_BY_HAND}"
            )
    return "; ".join(clean)


def _each(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        for loader in loaders:
            yield from _each(loader)
    else:
        yield loaders


def _why_not(dataset: Any) -> str:
    if dataset is None:
        return "what gives the training batches has no .dataset."
    has_numbers = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, torch.utils.data.IterableDataset) or not has_numbers:
        return f"{type(dataset).__name__} can only be iterated, and training is about to."
    return "it is empty." if len(dataset) == 0 else ""


def _warn(message: str) -> None:
    warn(message, stacklevel=4)
