"""The numbers of a model layer by layer, and what chance and the document alone give in each layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ib_callback.analysis.comparison import Entry
from ib_callback.results.measurement import Measurement
from ib_callback.results.trajectory import aligned, cell

# Names of modules with token embeddings: embed_tokens, wte, word_embeddings, embed_in, tok_embeddings.
_EMBEDDING = re.compile(r"(?:^|[._])(?:\w*embed\w*|wte)$")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One order in one layer. Information is in fractions of log(num_bins), and None where it was not measured.

    Attributes:
        order: order of the n-grams.
        number: number of the layer, from 1 on in the order of the forward pass; 0 is the embedding.
        layer: name of the module.
        entropy: H(Z).
        complexity, expressivity: input and output information, I(X;Z) and I(Y;Z).
        ratio: expressivity / complexity.
        complexity_null, expressivity_null: information by chance, with labels permuted over positions.
        ratio_null: expressivity_null / complexity_null.
        complexity_document, expressivity_document: what the document adds to chance: baseline minus null.
    """

    order: str
    number: int
    layer: str
    entropy: float | None
    complexity: float | None
    expressivity: float | None
    ratio: float | None
    complexity_null: float | None
    expressivity_null: float | None
    ratio_null: float | None
    complexity_document: float | None
    expressivity_document: float | None


def layers_of(point: Measurement, orders: Sequence[str] | None = None) -> list[Layer]:
    """Every layer of a measurement, order by order.

    Args:
        point: a measured point.
        orders: names of orders, by default all.

    Raises:
        ValueError: an order was not measured.
    """
    found = []
    first = 0 if point.layers and _EMBEDDING.search(point.layers[0]) else 1
    for order in orders or point.orders:
        if order not in point.orders:
            raise ValueError(f"--order: expected one of {', '.join(point.orders)}, got {order!r}")
        of_order = point.orders[order]
        for index, name in enumerate(point.layers):

            def at(values: Sequence[float], index: int = index) -> float | None:
                return values[index] if values else None

            complexity, expressivity = at(of_order.complexity_by_layer), at(of_order.expressivity_by_layer)
            nulls = at(of_order.complexity_null_by_layer), at(of_order.expressivity_null_by_layer)
            bases = at(of_order.complexity_baseline_by_layer), at(of_order.expressivity_baseline_by_layer)
            found.append(
                Layer(
                    order=order,
                    number=first + index,
                    layer=name,
                    entropy=at(point.entropy_by_layer),
                    complexity=complexity,
                    expressivity=expressivity,
                    ratio=_ratio(expressivity, complexity),
                    complexity_null=nulls[0],
                    expressivity_null=nulls[1],
                    ratio_null=_ratio(nulls[1], nulls[0]),
                    complexity_document=_less(bases[0], nulls[0]),
                    expressivity_document=_less(bases[1], nulls[1]),
                )
            )
    return found


def _ratio(numerator: float | None, divisor: float | None) -> float | None:
    return None if numerator is None or not divisor else numerator / divisor


def _less(value: float | None, chance: float | None) -> float | None:
    return None if value is None or chance is None else value - chance


def rows_of_profiles(entries: Sequence[Entry], orders: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """One row for each model, order and layer."""
    return [{"model": entry.name} | asdict(layer) for entry in entries for layer in layers_of(entry.point, orders)]


def table_of_profiles(entries: Sequence[Entry], orders: Sequence[str] | None = None) -> str:
    """An aligned table: input and output information, what chance and the document give, and the ratio."""
    heads = [
        ["", "", "", "", "input", "", "", "output", "", "", "ratio", ""],
        ["model", "order", "layer", "entropy", *["information", "chance", "document"] * 2, "", "chance"],
    ]
    lines = list(heads)
    for entry in entries:
        for each in layers_of(entry.point, orders):
            numbers = [
                each.entropy, each.complexity, each.complexity_null, each.complexity_document, each.expressivity,
                each.expressivity_null, each.expressivity_document, each.ratio, each.ratio_null,
            ]  # fmt: skip
            lines.append([entry.name, each.order, str(each.number), *map(cell, numbers)])
    return "\n".join(aligned(lines, [str.ljust, str.ljust, *[str.rjust] * 10]))


def conclusion_of_profiles(entries: Sequence[Entry], orders: Sequence[str] | None = None) -> str:
    """The conclusion: how the ratio changes with depth, and how much of this chance alone gives."""
    told = []
    for entry in entries:
        layers = layers_of(entry.point, orders)
        for order in dict.fromkeys(each.order for each in layers):
            known = [each for each in layers if each.order == order and each.ratio is not None]
            if len(known) < 2:
                told.append(f"{entry.name}, {order}: fewer than two layers have a ratio, so nothing can be concluded.")
                continue
            first, last = known[0], known[-1]
            chance = ""
            if first.ratio_null is not None and last.ratio_null is not None:
                chance = f" (chance alone: {first.ratio_null:.2f} to {last.ratio_null:.2f})"
            told.append(
                f"{entry.name}, {order}: the ratio goes from {first.ratio:.2f} in layer {first.number} to "
                f"{last.ratio:.2f} in layer {last.number}{chance}."
            )
    beware = "A ratio that chance alone reaches says nothing about the model. Errors of single layers are not known."
    return "\n".join([*told, beware])
