"""N-gram labels of a probe, and what a wider order adds to a narrower one in each layer of a model."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ib_callback.common.checks import check_integer
from ib_callback.estimator.increment import Increment, increment_from, increment_of, permuted_increments
from ib_callback.measuring.meter import Meter
from ib_callback.measuring.plan.batches import ranges
from ib_callback.probe.ngrams import context_segments, parse_orders, valid_positions
from ib_callback.probe.probe import Probe
from ib_callback.results.points import OrderIncrement


def ngram_labels(
    probe: Probe, order: str, *, side: str = "preceding", widest: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return the n-gram labels of a probe and their positions, as `Meter` uses them, for the pure functions.

    Args:
        probe: frozen text.
        order: order of the labels, such as `"bigram"`.
        side: `"preceding"`, the tokens that end at a position (complexity), or `"trailing"`, the tokens just after it
            (expressivity).
        widest: the order that decides which positions are valid; by default `order`. To combine labels of several
            orders, pass the same one for all of them.

    Returns:
        Positions [T, 2], sequence and offset in the probe, and labels [T], numbered from 0. With hidden states
        [N, S, dim] the representations are `hidden[positions[:, 0], positions[:, 1]]`.

    Raises:
        ValueError: an unknown order or side, or `widest` narrower than `order`.
        ProbeError: no position is valid.
    """
    width = parse_orders(order)[order]
    limit = width if widest is None else parse_orders(widest)[widest]
    if side not in ("preceding", "trailing"):
        raise ValueError(f'side: expected "preceding" or "trailing", got {side!r}.')
    if limit < width:
        raise ValueError(f"widest: expected {order!r} or a wider order, got {widest!r}.")
    positions = valid_positions(probe.attention_mask.numpy(), limit, probe=probe.name)
    steps = np.arange(width)
    columns = -steps if side == "preceding" else 1 + steps
    contexts = probe.input_ids.numpy()[positions.sequence[:, None], positions.offset[:, None] + columns]
    segments = context_segments(contexts, [width], first_bit=0)
    # First labels with several positions, in the order of the sort; then positions whose label occurs once.
    labels = np.full(len(positions), -1, np.int64)
    size = segments.stop - segments.start
    labels[segments.order[ranges(segments.start, segments.stop)]] = np.repeat(np.arange(len(size)), size)
    single = np.flatnonzero(labels < 0)
    labels[single] = len(size) + np.arange(len(single))
    return torch.from_numpy(np.stack([positions.sequence, positions.offset], 1)), torch.from_numpy(labels)


def model_increments(
    meter: Meter,
    model: nn.Module,
    narrow: str = "token",
    wide: str = "bigram",
    *,
    side: str = "preceding",
    within_sequences: bool = False,
    num_permutations: int = 100,
) -> dict[str, Increment]:
    """Return what a wider order adds in each layer, tested against permutations within the narrower order.

    The plain increment of a layer is its information at the wider order minus that at the narrower order, as
    `Meter.measure` gives them. Each permutation takes as long as the accumulation of one order.

    Args:
        meter: gives the probe, the layers and the settings of the quantisation; its widest order decides which
            positions are valid.
        model: as for `Meter.measure`.
        narrow: name of an order.
        wide: name of a wider order, at most as wide as the widest of the meter.
        side: `"preceding"` for complexity, or `"trailing"` for expressivity.
        within_sequences: permute only within a sequence; see `within` of `information_increment`.
        num_permutations: number of permutations R; the smallest p value is 1 / (R + 1).

    Returns:
        {name of the layer: increment}.

    Raises:
        ValueError: an order is unknown or too wide, `wide` is not wider than `narrow`, or `side` is unknown.
        ModelError, ProbeError, RepresentationError: as for `Meter.measure`.
    """
    check_integer("num_permutations", num_permutations, minimum=2, cure="100 is the default")
    if parse_orders(narrow)[narrow] >= parse_orders(wide)[wide]:
        raise ValueError(f"wide: expected an order wider than narrow={narrow!r}, got {wide!r}.")
    widest = max(meter.orders, key=meter.orders.__getitem__)
    places, labels = ngram_labels(meter.probe, narrow, side=side, widest=widest)
    further = ngram_labels(meter.probe, wide, side=side, widest=widest)[1]
    within = places[:, 0] if within_sequences else None
    return {
        name: increment_of(table.double(), labels, further, within, num_permutations=num_permutations, seed=meter.seed)
        for name, table in meter.assignments(model)
    }


def mean_increments(
    meter: Meter, model: nn.Module, *, num_permutations: int = 100
) -> dict[str, dict[str, OrderIncrement]]:
    """What each order adds to the next narrower order, as a mean over layers, tested as in `model_increments`.

    Every layer has the same permutations. So increments of permutations can be averaged over layers like the measured
    ones, and the mean is tested as a whole.

    Memory: the soft assignments of as many layers as `memory_budget` (by default 1 GiB) holds, 4 bytes × positions ×
    bins each. They need twice that while they are put together, and permutations need up to twelve times the memory of
    one layer. Hidden states are not kept.

    Args:
        meter: its orders are compared with each other; the rest as for `model_increments`.
        model: as for `Meter.measure`.
        num_permutations: number of permutations R; the smallest p value is 1 / (R + 1).

    Returns:
        {"complexity" or "expressivity": {name of the wider order: increment}}; empty for a single order.

    Raises:
        ModelError, ProbeError, RepresentationError: as for `Meter.measure`.
    """
    check_integer("num_permutations", num_permutations, minimum=2, cure="100 is the default")
    orders = sorted(meter.orders, key=meter.orders.__getitem__)
    labels = {
        (quantity, order): ngram_labels(meter.probe, order, side=side, widest=orders[-1])[1]
        for quantity, side in (("complexity", "preceding"), ("expressivity", "trailing"))
        for order in orders
    }
    pairs = [(q, *pair) for q in ("complexity", "expressivity") for pair in itertools.pairwise(orders)]
    sums: dict[tuple[str, str, str], npt.NDArray[np.float64]] = dict.fromkeys(pairs, np.zeros(num_permutations + 1))
    counts: dict[tuple[str, str, str], int] = {}
    layers = 0
    for _, table in meter.assignments(model) if pairs else ():
        layers += 1
        assignments = table.double()
        for pair in pairs:
            narrow, wide = (labels[pair[0], order] for order in pair[1:])
            values, counts[pair] = permuted_increments(assignments, narrow, wide, None, num_permutations, meter.seed)
            sums[pair] = sums[pair] + values
    found: dict[str, dict[str, OrderIncrement]] = {"complexity": {}, "expressivity": {}}
    for pair in pairs:
        quantity, narrow_order, wide_order = pair
        tested = increment_from(sums[pair] / layers, counts[pair])
        found[quantity][wide_order] = OrderIncrement(
            narrower=narrow_order, information=tested.information, null=tested.null, null_std=tested.null_std,
            p_value=tested.p_value, num_permutations=tested.num_permutations, num_positions=tested.num_positions,
        )  # fmt: skip
    return found
