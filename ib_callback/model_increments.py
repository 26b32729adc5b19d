"""What a wider order adds to a narrower one in each layer of a model."""

from __future__ import annotations

from torch import nn

from ib_callback.checks import check_integer
from ib_callback.increment import Increment, increment_of, ngram_labels
from ib_callback.labels import parse_orders
from ib_callback.meter import Meter


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

    The plain increment of a layer is its information at the wider order less that at the narrower, as
    `Meter.measure` gives them. Each permutation takes as long as the accumulation of one order.

    Args:
        meter: its probe, layers and settings of the quantisation; its widest order decides which positions are valid.
        model: as for `Meter.measure`.
        narrow: name of an order.
        wide: name of a wider one, at most as wide as the widest of the meter.
        side: `"preceding"`, of the complexity, or `"trailing"`, of the expressivity.
        within_sequences: permute only within a sequence; see `within` of `information_increment`.
        num_permutations: R; the least p value is 1 / (R + 1).

    Returns:
        By name of the layer.

    Raises:
        ValueError: an order that is unknown or too wide, `wide` not wider than `narrow`, or another side.
        ModelError, ProbeError, RepresentationError: as `Meter.measure`.
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
