"""A look at the training data before the first step: is the probe held out?

Examples are read by index. A dataset that can only be iterated is not searched, because it may hold a connection, a
position in a file or a shuffled buffer that training continues from. Reading an example by index changes nothing in
most datasets. Do not use this check with two kinds of datasets: those that draw from a random generator of their own,
and those that open a file at the first example that worker processes would then share.
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
    """Look for probes in an evenly spaced sample of the training data. This never raises.

    Args:
        probes: the probes that should be held out.
        loaders: what gives the training batches: a DataLoader, or several in lists and dicts.
        count: number of examples to look at in each dataset.
        tokenizer: for datasets of texts.

    Warns:
        RuntimeWarning: a probe was found, and how much of it; or the data could not be searched, and why.

    Returns:
        A sentence about what was searched without finding a probe; empty if there is nothing to tell.
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
        except Exception as error:  # if a user's dataset fails here, training will show it
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
        return "the loader of the training batches has no .dataset."
    has_numbers = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, torch.utils.data.IterableDataset) or not has_numbers:
        return f"{type(dataset).__name__} can only be iterated, and reading it here would use up its examples."
    return "it is empty." if len(dataset) == 0 else ""


def _warn(message: str) -> None:
    warn(message, stacklevel=4)
