"""Summary of a plan before training time is spent, or without a model: labels, memory, passes, seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PlanSummary:
    """What a measurement will need; on each rank, if several ranks share it.

    num_sequences, num_positions: numbers of sequences and of valid positions in the probe.
    num_layers: number of layers of the model; `num_ranks`: number of ranks that share them.
    labels: number of labels in all label sets together; singletons: number of those that occur once.
    slots: number of label histograms held at a time, for each layer and draw.
    bytes_by_part: memory in addition to the model and its forward pass, at the peak: the parts of
        plan.Plan.memory_by_part; `plan`, the plan itself; and `views`, the histograms of readout and prediction and, if
        the model is known, states that wait.
    passes: number of forward passes over the probe.
    seconds_adding: time to add up all batches on this machine, on one rank, estimated from a few batches of this probe.
    seconds_forward: time of the forward passes on this machine, estimated from one batch; None without a model.
    """

    num_sequences: int
    num_positions: int
    num_layers: int
    num_ranks: int
    labels: int
    singletons: int
    slots: int
    bytes_by_part: Mapping[str, int]
    passes: int
    seconds_adding: float
    seconds_forward: float | None = None

    @property
    def memory(self) -> int:
        """Bytes of all parts."""
        return sum(self.bytes_by_part.values())

    @property
    def seconds(self) -> float:
        """Predicted seconds of one measurement; without a model, the forward passes are not included."""
        return self.seconds_adding + (self.seconds_forward or 0.0)

    def __str__(self) -> str:
        ranks = f" on each of {self.num_ranks} ranks" if self.num_ranks > 1 else ""
        parts = ", ".join(f"{name} {each / 1e9:.2f}" for name, each in self.bytes_by_part.items() if each)
        forward = "without the forward passes" if self.seconds_forward is None else "with the forward passes"
        return (
            f"{self.num_sequences:,} sequences, {self.num_positions:,} positions, {self.labels:,} labels "
            f"({self.singletons:,} of them occur once)\n"
            f"{self.num_layers} layers in {self.passes} pass{'es' * (self.passes > 1)}, {self.slots:,} slots (label "
            f"histograms) held at once\n"
            f"{self.memory / 1e9:.2f} GB in addition to the model and its forward pass{ranks} ({parts})\n"
            f"{self.seconds:,.0f} s predicted for a measurement{ranks} at the speed of this machine, {forward}"
        )


def layers_of_rank(num_layers: int, num_ranks: int) -> int:
    """The largest number of layers that one of several ranks adds up.

    >>> layers_of_rank(32, 8), layers_of_rank(3, 8)
    (4, 1)
    """
    return math.ceil(num_layers / num_ranks)
