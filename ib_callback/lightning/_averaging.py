"""The weights that are trained, and the averages of them that callbacks of Lightning save in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ib_callback.measuring.model.bits import checksums, is_plain

_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


class Averaging:
    """The callbacks of a Trainer that average weights.

    `WeightAveraging`, which `EMAWeightAveraging` is one of, saves the average as the model, and makes it the model when
    the training ends. `StochasticWeightAveraging` does the latter only.

    Args:
        callbacks: of a Trainer, of either package.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self._all = [callback for callback in callbacks if _is_named(callback, *_AVERAGING)]
        # Of several the last has its average saved.
        self._saves = [callback for callback in self._all if _is_named(callback, "WeightAveraging")][-1:]

    def __bool__(self) -> bool:
        return bool(self._all)

    @property
    def saves_averages(self) -> bool:
        """Whether checkpoints hold an average instead of the weights that are being trained."""
        return bool(self._saves)

    def changes_at_epoch_end(self, epoch: int) -> bool:
        """Whether the average that is saved changes once more after the last step of an epoch."""
        return any(callback.should_update(epoch_idx=epoch) for callback in self._saves)

    @contextmanager
    def as_saved(self, module: nn.Module) -> Iterator[None]:
        """The module has the weights that a checkpoint would hold now; its own are put back at the end, to the bit."""
        averages = [callback._average_model for callback in self._saves]
        pairs = [pair for average in averages if average is not None for pair in _pairs(average.module, module)]
        done: list[tuple[Tensor, Tensor]] = []
        try:
            for average, current in pairs:
                _exchange(average, current)
                done.append((average, current))
            yield
        finally:
            for average, current in done:
                _exchange(average, current)

    def go_last(self, trainer: Any, callback: Any) -> None:
        """Let a callback come after those that average, to see the average of the step, and before those that save."""
        order = trainer.callbacks
        if not self._all or order.index(callback) > max(map(order.index, self._all)):
            return
        others = [other for other in order if other is not callback]
        saving = [other for other in others if other in trainer.checkpoint_callbacks]
        trainer.callbacks = [other for other in others if other not in saving] + [callback, *saving]


def fingerprints(weights: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Of every tensor that is whole: shape, type and checksum of its bits."""
    whole = {name: w for name, w in weights.items() if type(w) in (Tensor, nn.Parameter) and is_plain(w)}
    sums = checksums(list(whole.values()))
    return {name: (w.shape, w.dtype, total) for (name, w), total in zip(whole.items(), sums, strict=True)}


def same_weights(a: Mapping[str, tuple[Any, ...]], b: Mapping[str, tuple[Any, ...]]) -> bool:
    """Whether tensors that both have are the same, by their fingerprints; true if they share none."""
    return all(a[name] == b[name] for name in a.keys() & b.keys())


def _pairs(average: nn.Module, current: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    for kind in ("parameters", "buffers"):
        yield from zip(getattr(average, kind)(), getattr(current, kind)(), strict=True)


def _exchange(a: Tensor, b: Tensor) -> None:
    # As Lightning does it at every validation: through `.data`, which no record of gradients sees.
    kept = a.data.clone()
    a.data.copy_(b.data)
    b.data.copy_(kept)


def _is_named(callback: Any, *names: str) -> bool:
    return any(base.__name__ in names for base in type(callback).__mro__)
