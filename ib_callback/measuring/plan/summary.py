"""What a plan comes to, before there is a model or training time is spent: labels, memory, passes, seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PlanSummary:
    """What a measurement will take; for each rank, where several share it.

    num_sequences, num_positions: of the probe.
    num_layers: of the model, and `num_ranks` that share them.
    labels: of all label sets together; singletons: of these, how many occur once.
    slots: histograms of labels at a time, for each layer and draw.
    bytes_by_part: beside the model and its forward pass, at the peak: plan.Plan.memory_by_part, `plan` itself, and
        `views`: the histograms of readout and prediction and, where the model is known, states that wait.
    passes: forward passes over the probe.
    seconds_adding: that it takes to add up all batches here, from a few batches of this probe, on one rank.
    seconds_forward: that the forwards take here, from one batch; None where no model was given.
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
        """Predicted, of one measurement; without the forwards where no model was given."""
        return self.seconds_adding + (self.seconds_forward or 0.0)

    def __str__(self) -> str:
        ranks = f" on each of {self.num_ranks} ranks" if self.num_ranks > 1 else ""
        parts = ", ".join(f"{name} {each / 1e9:.2f}" for name, each in self.bytes_by_part.items() if each)
        forward = "without the forwards" if self.seconds_forward is None else "forwards included"
        return (
            f"{self.num_sequences:,} sequences, {self.num_positions:,} positions, {self.labels:,} labels "
            f"({self.singletons:,} of them once)\n"
            f"{self.num_layers} layers in {self.passes} pass{'es' * (self.passes > 1)}, {self.slots:,} slots at once\n"
            f"{self.memory / 1e9:.2f} GB beside the model and its forward{ranks} ({parts})\n"
            f"{self.seconds:,.0f} s predicted for a measurement{ranks} at the speed of this machine, {forward}"
        )


def layers_of_rank(num_layers: int, num_ranks: int) -> int:
    """The most layers that one of several ranks adds up.

    >>> layers_of_rank(32, 8), layers_of_rank(3, 8)
    (4, 1)
    """
    return math.ceil(num_layers / num_ranks)
