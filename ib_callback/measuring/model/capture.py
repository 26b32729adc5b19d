"""Quantising representations inside the forward pass: one context manager owns every hook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ib_callback.common.errors import ModelError, RepresentationError
from ib_callback.estimator.quantise import assign, reference_points, resolve_temperature, usable
from ib_callback.measuring.model.access import Layer

# Below this share of wanted positions, gathering their states costs less than quantising the others.
_SPARSE = 0.8


class Quantiser:
    """Reference points and temperature for every dimension met, on every device met."""

    def __init__(self, num_bins: int, temperature: float | str, seed: int) -> None:
        self.num_bins = num_bins
        self._temperature = temperature
        self._seed = seed
        self._points: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Assignments [T, num_bins] and norms [T] of z [T, dim], in float32."""
        dim = z.shape[-1]
        key = (dim, z.device)
        if key not in self._points:
            self._points[key] = reference_points(dim, self.num_bins, seed=self._seed).to(z.device)
        return assign(z.float(), self._points[key], resolve_temperature(self._temperature, dim, self.num_bins))


class Capture:
    """Hooks on some layers that write their soft assignments into one table; no activation is kept.

    Use as a context manager around the forward passes of a measurement; `run` makes one of them.
    """

    def __init__(self, layers: Sequence[Layer], quantiser: Quantiser) -> None:
        self._layers = layers
        self._quantiser = quantiser
        self._hooks = ExitStack()
        self._positions: Tensor = torch.empty(0)
        self._shape: tuple[int, int] = (0, 0)
        self._table: Tensor | None = None
        self._buffer = torch.empty(0)
        self.autocast = ""  # e.g. ", autocast bfloat16" once a layer has run under it
        self._fired: list[int] = []
        self._bad: dict[int, Tensor] = {}  # how many states of a layer cannot be quantised

    def __enter__(self) -> Capture:
        with ExitStack() as hooks:  # removed again if one cannot be registered
            for index, layer in enumerate(self._layers):
                hooks.callback(layer.module.register_forward_hook(self._hook(index)).remove)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        self._table = None
        self._buffer = torch.empty(0)

    def run(self, forward: Callable[[], Any], positions: Tensor, shape: tuple[int, int]) -> Tensor:
        """Run one forward pass.

        Args:
            forward: makes the pass.
            positions: [T] flat numbers of the positions to quantise in the [B, S] input table.
            shape: B and S.

        Returns:
            Assignments [T, L, num_bins], float32; the next pass overwrites them.

        Raises:
            ModelError: a layer did not run, ran more than once, or did not put out [B, S, dim].
            RepresentationError: zero vectors, NaN or inf at the positions.
        """
        self._positions, self._shape = positions, shape
        self._fired = [0] * len(self._layers)
        self._bad = {}
        if len(self._buffer) < len(positions) or self._buffer.device != positions.device:
            # Kept for the next pass: touching fresh memory costs the CPU more than filling it.
            sizes = (len(positions), len(self._layers), self._quantiser.num_bins)
            self._buffer = torch.empty(sizes, device=positions.device, dtype=torch.float32)
        self._table = self._buffer[: len(positions)]
        forward()
        self._check_fired()
        self._check_usable()
        table, self._table = self._table, None
        return table

    def _hook(self, index: int) -> Callable[[nn.Module, Any, Any], None]:
        def quantise(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._table is None:
                return  # a forward pass that `run` did not make
            self._fired[index] += 1
            if self._fired[index] > 1:
                return
            rows = self._states(index, output).flatten(0, 1)
            if torch.is_autocast_enabled(rows.device.type):
                dtype = torch.get_autocast_dtype(rows.device.type)
                self.autocast = f", autocast {str(dtype).removeprefix('torch.')}"
            positions = self._positions.to(rows.device)
            if len(positions) < _SPARSE * len(rows):
                assignments, norms = self._quantiser(rows.index_select(0, positions))
            else:
                # Rows of assignments are shorter than rows of states: quantise all, then drop the few not wanted.
                assignments, norms = (each.index_select(0, positions) for each in self._quantiser(rows))
            # Counted on the device and read after the pass, so that no hook waits for the device.
            self._bad[index] = (~usable(norms)).sum()
            self._table[:, index] = assignments

        return quantise

    def _states(self, index: int, output: Any) -> Tensor:
        z = output
        if not isinstance(z, Tensor):
            z = getattr(z, "last_hidden_state", None)
            if z is None and isinstance(output, (tuple, list)) and output:
                z = output[0]
        if not isinstance(z, Tensor) or z.ndim != 3 or z.shape[:2] != self._shape or not z.is_floating_point():
            got = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(output).__name__
            raise ModelError(
                f"layer {self._layers[index].name!r}: expected an output of floats "
                f"[{self._shape[0]}, {self._shape[1]}, dim] (sequences, tokens, dim), got {got}. "
                "Name modules that put out one vector for each token with layers=."
            )
        return z.detach()

    def _check_fired(self) -> None:
        for layer, times in zip(self._layers, self._fired, strict=True):
            if times != 1:
                raise ModelError(
                    f"layer {layer.name!r}: expected it to run once in a forward pass, but it ran {times} times. "
                    "Name modules that run exactly once with layers=."
                )

    def _check_usable(self) -> None:
        bad = {layer.name: int(self._bad[index]) for index, layer in enumerate(self._layers)}
        if any(bad.values()):
            where = ", ".join(f"{name!r} ({count})" for name, count in bad.items() if count)
            raise RepresentationError(
                f"representations that are zero, NaN or infinite (norms outside 1e-18 … 1e18), by layer and number of "
                f"the {len(self._positions)} valid positions in this batch: {where}. Such vectors have no direction to "
                "quantise; look for a diverged run, or a layer that is not in use yet and leave it out with layers=."
            )
