"""Quantise representations inside the forward pass. One context manager owns every hook.

A *variant* is one way to quantise the states of all layers: with each draw of reference points and then, on request,
with each draw again after removing the layer's mean unit state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ib_callback.common.errors import ModelError, RepresentationError
from ib_callback.common.ranks import Kept, Ranks
from ib_callback.common.transfer import read
from ib_callback.estimator.quantise import (
    SHARP,
    assign,
    exact_float32,
    in_parts,
    reference_points,
    resolve_temperature,
    usable,
)
from ib_callback.estimator.rows import assign_rows
from ib_callback.measuring.model.access import Layer
from ib_callback.measuring.model.head import whole
from ib_callback.measuring.plan.memory import own_work

# If a smaller share of positions is wanted, gathering their states costs less than quantising the others too.
_SPARSE = 0.8
# A unit state nearer to the mean than this has no usable direction from it: rounding in float32 is a hundredth of that.
_AT_THE_MEAN = 1e-5


class Quantiser:
    """Reference points and temperatures, made on demand for every dimension and device.

    Args:
        num_bins, temperature, seed: as for `Meter`.
        draws: number of sets of reference points. Each has its own seed; that of the first is `seed`.
    """

    def __init__(self, num_bins: int, temperature: float | str, seed: int, draws: int = 1) -> None:
        self.num_bins = num_bins
        self._temperature = temperature
        self._seeds = [draw_seed(seed, draw) for draw in range(draws)]
        self._points: dict[tuple[int, int, torch.device, torch.dtype], tuple[Tensor, float]] = {}

    def __call__(self, z: Tensor, draw: int = 0) -> tuple[Tensor, Tensor]:
        """Assignments [T, num_bins] and norms [T] of z [T, dim], in float32."""
        points, _ = self._points_for(z.shape[-1], z.device, torch.float32, draw)
        return assign(z.float(), points[0], self._temperature_for(z.shape[-1]))

    def of_rows(
        self, rows: Tensor, positions: Tensor, out: Tensor, draw: int, *, sum_units: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Quantise some rows on a GPU into `out`, as in `assign_rows`."""
        dim = rows.shape[-1]
        parts, scale = self._points_for(dim, rows.device, rows.dtype, draw)
        return assign_rows(rows, positions, parts, self._temperature_for(dim) * scale, out, sum_units=sum_units)

    def takes_rows(self, rows: Tensor) -> bool:
        """Whether `of_rows` works: on a GPU, for states of 32 or 16 bits, at a temperature that these allow."""
        of_gpu = rows.device.type == "cuda" and rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return of_gpu and self._temperature_for(rows.shape[-1]) >= SHARP

    def _temperature_for(self, dim: int) -> float:
        return resolve_temperature(self._temperature, dim, self.num_bins)

    def _points_for(self, dim: int, device: torch.device, dtype: torch.dtype, draw: int) -> tuple[Tensor, float]:
        """Parts [P, num_bins, dim] of the reference points, and their scale, as from `in_parts`."""
        key = (draw, dim, device, dtype)
        if key not in self._points:
            parts, scale = in_parts(reference_points(dim, self.num_bins, seed=self._seeds[draw]), dtype)
            self._points[key] = parts.to(device), scale
        return self._points[key]

    @property
    def draws(self) -> int:
        """Number of sets of reference points."""
        return len(self._seeds)


def draw_seed(seed: int, draw: int) -> int:
    """The seed of a draw of reference points. Draws are 2^32 / golden ratio apart, so close seeds share no draw.

    >>> [draw_seed(7, draw) for draw in range(3)]
    [7, 2654435776, 1013904249]
    """
    return (seed + draw * 2654435769) % 2**32


class Moments:
    """Sums of the unit states of each layer over the valid positions, in float64; on the CPU after they are read.

    Args:
        num_layers: number of captured layers.
        second: numbers of the layers for which the second moments of the plain states are computed too.

    Attributes:
        unit: for each layer [dim], the sum of its unit states.
        first, second: for the layers in `second`, sums of the states [dim] and of their outer products [dim, dim].
        count: number of positions so far.
    """

    def __init__(self, num_layers: int, second: Sequence[int] = ()) -> None:
        self.unit: list[Tensor | None] = [None] * num_layers
        self.first: dict[int, Tensor] = {}
        self.second: dict[int, Tensor] = {}
        self.count = 0
        self._second = frozenset(second)
        self._pending: list[tuple[int, Tensor]] = []
        self._sums: dict[tuple[int, ...], Tensor] = {}  # {numbers of layers: [layers, dim]}

    def add(self, index: int, rows: Tensor, norms: Tensor, positions: Tensor) -> None:
        """Add the states of one layer, rows [R, dim] with their norms [R], at the [T] `positions` among them."""
        inverse = norms[positions].reciprocal()
        with exact_float32(rows.device):
            total = None
            if rows.device.type == "cpu":  # copying rows is slow on a CPU, but looking at values needs no waiting
                total = torch.zeros_like(norms).index_copy(0, positions, inverse) @ rows
            if total is None or not total.isfinite().all():  # zero times an infinite or NaN state at padding
                total = inverse @ rows[positions]
        self._pending.append((index, total[None]))
        self.add_second(index, rows, positions)

    def add_units(self, index: int, units: Tensor) -> None:
        """Add the sum of the unit states of one layer, in parts [P, dim] that add up to it."""
        self._pending.append((index, units))

    def add_second(self, index: int, rows: Tensor, positions: Tensor) -> None:
        """Add states [R, dim] of one layer, if its second moments are wanted."""
        if index not in self._second:
            return
        # In float64, because small eigenvalues would be lost in the rounding of float32 sums.
        exact = rows[positions].to("cpu" if rows.device.type == "mps" else rows.device, torch.float64)
        for table, value in ((self.first, exact.sum(0)), (self.second, exact.T @ exact)):
            table[index] = table[index].add_(value) if index in table else value

    def finish(self, count: int) -> None:
        """End a batch of `count` positions. This does not wait for a GPU: the sums stay there."""
        pending, self._pending = self._pending, []
        self.count += count
        alike: dict[tuple[torch.Size, torch.device], list[tuple[int, Tensor]]] = {}
        for index, units in pending:
            alike.setdefault((units.shape, units.device), []).append((index, units))
        for each in alike.values():  # all layers together, because each step costs a GPU a launch
            indices, of_layers = tuple(index for index, _ in each), torch.stack([units for _, units in each])
            exact = (of_layers.cpu() if of_layers.device.type == "mps" else of_layers).sum(1, dtype=torch.float64)
            before = self._sums.get(indices)
            self._sums[indices] = exact if before is None else before.add_(exact)

    def _read(self) -> None:
        for indices, sums in zip(self._sums, read([*self._sums.values()]), strict=True):
            for index, value in zip(indices, sums, strict=True):
                before = self.unit[index]
                self.unit[index] = value if before is None else before + value
        self._sums = {}
        for table in (self.first, self.second):
            table.update(zip(table, read([*table.values()]), strict=True))

    def share(self, ranks: Ranks) -> None:
        """Read the sums, and add those of the other ranks; every rank calls this after the last batch."""
        self._read()
        tables = [self.first, self.second]
        numbers = sorted(self._second)
        values = [*self.unit, *(table.get(index) for table in tables for index in numbers), torch.tensor(self.count)]
        *sums, count = ranks.sums(values)
        self.unit = sums[: len(self.unit)]
        further = iter(sums[len(self.unit) :])
        for table in tables:
            table.update({index: value for index in numbers if (value := next(further)) is not None})
        assert count is not None
        self.count = int(count)

    def mean(self, index: int) -> Tensor:
        """The mean unit state [dim] of a layer."""
        total = self.unit[index]
        assert total is not None
        return total / self.count

    def dispersion(self, index: int) -> float:
        """Mean cosine distance, 1 - cosine, of two different positions of a layer; exact to about 1e-7, at least 0."""
        count = self.count
        if count < 2:
            return 0.0
        squared = float(self.mean(index).square().sum())
        found = (1.0 - squared) * count / (count - 1)
        return 0.0 if found < 0.0 else found  # max() would turn NaN into 0


class Capture:
    """Hooks on some layers that write their soft assignments into one table; no activation is kept.

    Use it as a context manager around the forward passes of a measurement; `run` makes one of them.

    Args:
        layers: the L layers to capture.
        quantiser: makes assignments; None: only the moments are wanted.
        centers: [dim] for each layer, the vector that is subtracted from its unit states in further variants.
        moments: object to which the states are added.
        ahead: number of tokens that the model puts before every text; their states are left out.
    """

    # On these kinds of devices a check needs no waiting, so each pass is checked when it ends.
    CHECKED_AT_ONCE: ClassVar[frozenset[str]] = frozenset({"cpu"})

    def __init__(
        self,
        layers: Sequence[Layer],
        quantiser: Quantiser | None,
        *,
        centers: Sequence[Tensor] | None = None,
        moments: Moments | None = None,
        ahead: int = 0,
    ) -> None:
        self._layers = layers
        self._ahead = ahead
        self._quantiser = quantiser
        self._centers = None if centers is None else [*centers]
        self._moments = moments
        self._num_variants = 0 if quantiser is None else quantiser.draws * (1 if centers is None else 2)
        self._hooks = ExitStack()
        self._positions: Tensor = torch.empty(0)
        self._positions_by_device: dict[torch.device, Tensor] = {}
        self._shape: tuple[int, int] = (0, 0)
        self._table: Tensor | None = None
        self._is_running = False
        self._buffer = torch.empty(0)
        self._kept = Kept()  # keeps errors of hooks, because raising inside a shared forward would separate the ranks
        self.autocast = ""  # e.g. ", autocast bfloat16" after a layer has run under it
        self._fired: list[int] = []
        self._norms: list[Tensor] = []  # [positions] norms of each layer in this pass
        self._bad: Tensor | None = None  # [layers] number of states that cannot be quantised, in all passes
        self._seen = 0

    def __enter__(self) -> Capture:
        with ExitStack() as hooks:  # removes the hooks again if one cannot be registered
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
            forward: function that makes the pass.
            positions: [T] flat numbers of the positions to quantise in the [B, S] input table.
            shape: B and S.

        Returns:
            Assignments [T, variants * L, num_bins], float32, with the layers of one variant side by side. The next
            pass overwrites them.

        Raises:
            ModelError: a layer did not run, ran more than once, or did not return [B, S, dim].
            RepresentationError: zero vectors, NaN or inf at the positions, if the states are on the CPU. For other
                devices `check_usable` raises it, because that must wait for the device.
        """
        self._positions, self._shape = positions, shape
        self._positions_by_device = {positions.device: positions}
        self._fired = [0] * len(self._layers)
        self._norms = [torch.empty(0)] * len(self._layers)
        self._kept = Kept()
        self._table = self._kept(self._room)  # if this fails, the forward is still made, for the other ranks
        self._is_running = True
        try:
            forward()
        finally:
            self._is_running = False
            table, self._table = self._table, None
        with own_work():
            self._kept.release()
        assert table is not None
        self._check_fired()
        self._count_unusable()
        if positions.device.type in self.CHECKED_AT_ONCE:
            self.check_usable()
        if self._moments is not None:
            self._moments.finish(len(positions))
        return table

    def _room(self) -> Tensor:
        """The table for the assignments of a pass."""
        positions = self._positions
        if len(self._buffer) < len(positions) or self._buffer.device != positions.device:
            # Kept for the next pass, because touching fresh memory costs the CPU more than filling it.
            num_bins = 1 if self._quantiser is None else self._quantiser.num_bins
            sizes = (len(positions), self._num_variants * len(self._layers), num_bins)
            self._buffer = torch.empty(sizes, device=positions.device, dtype=torch.float32)
        return self._buffer[: len(positions)]

    def _hook(self, index: int) -> Callable[[nn.Module, Any, Any], None]:
        @own_work()
        def quantise(module: nn.Module, inputs: Any, output: Any) -> None:
            if not self._is_running:
                return  # this forward pass was not made by `run`
            self._fired[index] += 1
            if self._fired[index] == 1:
                self._kept(lambda: self._take(index, output))

        return quantise

    def _take(self, index: int, output: Any) -> None:
        """Quantise the output of a layer."""
        rows = self._states(index, output).flatten(0, 1)  # may gather parts from several ranks, so all must call it
        if self._kept.error is not None:
            return
        if torch.is_autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
            self.autocast = f", autocast {str(dtype).removeprefix('torch.')}"
        positions = self._positions_on(rows.device)
        if self._quantiser is not None and self._quantiser.takes_rows(rows):
            self._norms[index] = self._write_on_gpu(self._quantiser, index, rows, positions)
            return
        if len(positions) < _SPARSE * len(rows):
            rows, positions = rows.index_select(0, positions), torch.arange(len(positions), device=rows.device)
        # Otherwise quantise all and drop the few not wanted: rows of assignments are shorter than rows of states.
        rows = rows.float()
        norms = self._write(index, rows, positions)
        self._norms[index] = norms[positions]
        if self._moments is not None:
            self._moments.add(index, rows, norms, positions)

    def _positions_on(self, device: torch.device) -> Tensor:
        """The positions on a device; the layers of a model may be on several devices."""
        if device not in self._positions_by_device:
            self._positions_by_device[device] = self._positions.to(device)
        return self._positions_by_device[device]

    def _center(self, index: int, device: torch.device) -> Tensor:
        """[dim] the vector to subtract from the unit states of a layer; copied to their device once."""
        assert self._centers is not None
        if self._centers[index].device != device:
            self._centers[index] = self._centers[index].to(device)
        return self._centers[index]

    def _column(self, variant: int, index: int) -> Tensor:
        """The part [T, num_bins] of the table for a layer in a variant."""
        assert self._table is not None
        return self._table[:, variant * len(self._layers) + index]

    def _write(self, index: int, rows: Tensor, positions: Tensor) -> Tensor:
        """Quantise the states [R, dim] of a layer in every variant; return the norms of all states."""
        if self._quantiser is None:
            return torch.linalg.vector_norm(rows, dim=-1)
        draws = range(self._quantiser.draws)
        norms = torch.empty(0)
        for draw in draws:
            assignments, norms = self._quantiser(rows, draw)
            self._column(draw, index).copy_(_chosen(assignments, positions))
        if self._centers is not None:
            unit = rows / norms.unsqueeze(-1) - self._center(index, rows.device)
            for draw in draws:
                assignments, away = self._quantiser(unit, draw)
                assignments.masked_fill_((away < _AT_THE_MEAN).unsqueeze(-1), 1.0 / self._quantiser.num_bins)
                self._column(len(draws) + draw, index).copy_(_chosen(assignments, positions))
        return norms

    def _write_on_gpu(self, quantiser: Quantiser, index: int, rows: Tensor, positions: Tensor) -> Tensor:
        """Quantise only the states at the positions, without a cast; return their norms [T]."""
        draws, norms = range(quantiser.draws), torch.empty(0)

        def write(rows: Tensor, positions: Tensor, variant: int, draw: int, *, sum_units: bool) -> Tensor:
            column = self._column(variant, index)
            out = column if column.device == rows.device else torch.empty_like(column, device=rows.device)
            norms, units = quantiser.of_rows(rows, positions, out, draw, sum_units=sum_units)
            if self._moments is not None and units is not None:
                self._moments.add_units(index, units)
            if variant >= len(draws):
                out.masked_fill_((norms < _AT_THE_MEAN).unsqueeze(-1), 1.0 / quantiser.num_bins)
            if out is not column:
                column.copy_(out)
            return norms

        for draw in draws:
            norms = write(rows, positions, draw, draw, sum_units=draw == 0 and self._moments is not None)
        if self._moments is not None:
            self._moments.add_second(index, rows, positions)
        if self._centers is not None:
            unit = rows.index_select(0, positions).float() / norms.unsqueeze(-1) - self._center(index, rows.device)
            every = torch.arange(len(unit), device=unit.device)
            for draw in draws:
                write(unit, every, len(draws) + draw, draw, sum_units=False)
        return norms

    def _states(self, index: int, output: Any) -> Tensor:
        states = states_of(output, self._shape, self._ahead)
        if states is None:
            z = _main_part(output)
            got = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(output).__name__
            raise ModelError(
                f"layer {self._layers[index].name!r}: expected an output of floats "
                f"[{self._shape[0]}, {self._shape[1]}, dim] (sequences, tokens, dim), got {got}. "
                "With layers=, name modules that output one vector for each token."
            )
        return states

    def _check_fired(self) -> None:
        for layer, times in zip(self._layers, self._fired, strict=True):
            if times != 1:
                raise ModelError(
                    f"layer {layer.name!r}: expected it to run once in a forward pass, but it ran {times} times. "
                    "With layers=, name modules that run exactly once."
                )

    def _count_unusable(self) -> None:
        """Count unusable states of all layers together, because each step costs a GPU a launch."""
        if not self._norms:
            return
        device = self._positions.device
        norms = torch.stack([each.to(device) for each in self._norms])
        bad = (~usable(norms)).sum(1)
        self._bad = bad if self._bad is None else self._bad + bad
        self._seen += len(self._positions)

    def check_usable(self) -> None:
        """Raise a RepresentationError if states of any pass so far could not be quantised; waits for the device."""
        if self._bad is None:
            return
        (counts,) = read([self._bad])
        which = "in this batch" if self._bad.device.type in self.CHECKED_AT_ONCE else "of this pass"
        self._bad = None
        bad = {layer.name: count for layer, count in zip(self._layers, counts.tolist(), strict=True) if count}
        seen, self._seen = self._seen, 0
        if bad:
            where = ", ".join(f"{name!r} ({count})" for name, count in bad.items())
            raise RepresentationError(
                "representations that are zero, NaN or infinite (norms outside 1e-18 … 1e18), by layer and number of "
                f"the {seen} valid positions {which}: {where}. Such vectors have no direction to quantise. Perhaps the "
                "run has diverged. If a layer is not in use yet, leave it out with layers=."
            )


def states_of(output: Any, shape: tuple[int, int], ahead: int = 0) -> Tensor | None:
    """The states [B, S, dim] in a module's output for B, S tokens; None if the output is something else.

    The states of `ahead` tokens before the text are left out. If the states are split over several ranks, as with
    sequence parallelism, they are gathered, so all these ranks must call this.
    """
    z = _main_part(output)
    if not isinstance(z, Tensor) or z.ndim != 3 or not z.is_floating_point():
        return None
    z = whole(z)
    if z.shape[:2] == (shape[0], shape[1] + ahead):
        return z.detach()[:, ahead:]
    return z.detach() if z.shape[:2] == shape else None


def _main_part(output: Any) -> Any:
    z = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
    return output[0] if z is None and isinstance(output, (tuple, list)) and output else z


def _chosen(table: Tensor, positions: Tensor) -> Tensor:
    return table if len(positions) == len(table) else table.index_select(0, positions)
