"""What a measurement will do and need, found out beforehand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preflight:
    """What a measurement will do, found out before training time is spent.

    layers: names of the measured layers.
    num_sequences, num_positions: of the probe.
    memory: bytes that a measurement needs beside the forward pass.
    passes: forward passes over the probe in one measurement (more than one if `memory_budget` asks for groups).
    feature_probes: the same of each further probe, by its name.
    """

    layers: tuple[str, ...]
    num_sequences: int
    num_positions: int
    memory: int
    passes: int
    feature_probes: tuple[tuple[str, Preflight], ...] = ()

    def describe(self) -> str:
        """One line for a console."""
        further = [f"; features of {name}: {of_probe._size()}" for name, of_probe in self.feature_probes]
        return f"{len(self.layers)} layers ({self.layers[0]} … {self.layers[-1]}), {self._size()}{''.join(further)}"

    def _size(self) -> str:
        passes = "" if self.passes == 1 else f" in {self.passes} passes"
        return (
            f"{self.num_sequences:,} sequences, {self.num_positions:,} valid positions, "
            f"{self.memory / 2**20:,.0f} MiB beside the forward pass{passes}"
        )
