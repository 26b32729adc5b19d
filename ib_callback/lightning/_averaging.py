"""The weights in training, and the averages of them that callbacks of Lightning save instead."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ib_callback.measuring.model.bits import checksums, is_plain
from ib_callback.measuring.model.parameters import is_managed


class Averaging:
    """The callbacks of a Trainer that average weights.

    `WeightAveraging` saves the average as the model. When training ends, the average becomes the model.
    `EMAWeightAveraging` is a `WeightAveraging`. `StochasticWeightAveraging` saves no average, but its average also
    becomes the model when training ends.

    Args:
        callbacks: the callbacks of a Trainer, of either package.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        saving = [callback for callback in callbacks if _is_lightnings(callback, "WeightAveraging")]
        self._stochastic = [callback for callback in callbacks if _is_lightnings(callback, "StochasticWeightAveraging")]
        self._all = [*saving, *self._stochastic]
        self._saves = saving[-1:]  # if there are several, the average of the last is saved
        self._exchanged: list[tuple[Tensor, Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self._all)

    @property
    def saves_averages(self) -> bool:
        """Whether checkpoints hold an average instead of the weights that are being trained."""
        return bool(self._saves)

    def changes_at_epoch_end(self, epoch: int) -> bool:
        """Whether the saved average changes once more after the last step of an epoch."""
        # Ask a copy, because the callback may count how often it is asked.
        return any(copy.copy(callback).should_update(epoch_idx=epoch) for callback in self._saves)

    def epochs(self, trainer: Any) -> int | None:
        """The number of epochs after which training ends; None or -1 without such a limit.

        `StochasticWeightAveraging` adds an epoch in which nothing is trained. In it, batch norms get new statistics.
        """
        ends = [callback.swa_end + 1 for callback in self._stochastic]
        return ends[-1] if ends and math.isfinite(ends[-1]) else trainer.max_epochs

    def is_over(self, trainer: Any) -> bool:
        """Whether the average has replaced the weights in training, although steps are still counted."""
        return any(trainer.current_epoch > callback.swa_end for callback in self._stochastic)

    @contextmanager
    def as_saved(self, module: nn.Module) -> Iterator[None]:
        """Give the module the weights that a checkpoint would hold now. At the end its own return, bit for bit."""
        averages = [callback._average_model for callback in self._saves]
        pairs = [pair for average in averages if average is not None for pair in _pairs(average.module, module)]
        done = self._exchanged = []
        try:
            for pair in pairs:
                _exchange(*pair)
                done.append(pair)
            yield
        finally:
            self._exchanged = []
            for pair in done:
                _exchange(*pair)

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """Within `as_saved`, put all weights back for a while, because a signal may save a checkpoint at any time."""
        pairs = list(self._exchanged)
        for pair in pairs:
            _exchange(*pair)
        try:
            yield
        finally:
            for pair in pairs:
                _exchange(*pair)

    def go_last(self, trainer: Any, callback: Any) -> None:
        """Move a callback behind those that average, so that it sees the new average, but before those that save."""
        order = trainer.callbacks
        if not self._all or order.index(callback) > max(map(order.index, self._all)):
            return
        others = [other for other in order if other is not callback]
        saving = [other for other in others if other in trainer.checkpoint_callbacks]
        trainer.callbacks = [other for other in others if other not in saving] + [callback, *saving]


def fingerprints(weights: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Shape, type and checksum of the bits of every tensor that is whole."""
    whole = {
        name: w
        for name, w in weights.items()
        if type(w) in (Tensor, nn.Parameter) and is_plain(w) and not is_managed(w)
    }
    sums = checksums(list(whole.values()))
    return {name: (w.shape, w.dtype, total) for (name, w), total in zip(whole.items(), sums, strict=True)}


def same_weights(a: Mapping[str, tuple[Any, ...]], b: Mapping[str, tuple[Any, ...]]) -> bool:
    """Whether the tensors that both have are the same, by their fingerprints. True if they have none in common."""
    return all(a[name] == b[name] for name in a.keys() & b.keys())


def _pairs(average: nn.Module, current: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    for kind in ("named_parameters", "named_buffers"):
        own = dict(getattr(current, kind)())  # the average may lack buffers that were added later
        yield from ((tensor, own[name]) for name, tensor in getattr(average, kind)() if name in own)


def _exchange(a: Tensor, b: Tensor) -> None:
    # Lightning does the same at every validation: it writes through `.data`, which autograd does not record.
    kept = a.data.clone()
    a.data.copy_(b.data)
    b.data.copy_(kept)


def _is_lightnings(callback: Any, name: str) -> bool:
    # Compare names, because there are two packages. A user's own class of that name does not count.
    bases = {(base.__module__.split(".")[0], base.__name__) for base in type(callback).__mro__}
    return not bases.isdisjoint({("lightning", name), ("pytorch_lightning", name)})
