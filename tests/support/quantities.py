"""Every quantity of the table, worked out again in float64 by its definition; shares no formula with the package.

A new quantity has its naive formula in `PLANE` or `FEATURE` here; a newly measured one also what `sums_of` adds. All
tests that go through the table (results/test_metrics.py, measuring/test_quantities.py) then check it. Tests that run on
several ranks compare with one rank by `assert_same`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import brute_force as bf
import numpy as np
import pytest

from ib_callback.results.measurement import Measurement
from ib_callback.results.metrics import FEATURE_ERRORS, FEATURE_SCALARS, PLANE_ERRORS, PLANE_SCALARS

Values = Mapping[str, float]
NEGLIGIBLE = 1e-12
# Made up: of the world as a whole.
CEILING, NOISE = 0.9, 0.001


def optimality_above_null(v: Values) -> float | None:
    above = v["complexity"] - v["complexity_null"]
    if above < 3 * v["complexity_null_se"] or above < NEGLIGIBLE:
        return None
    return (v["expressivity"] - v["expressivity_null"]) / above


def optimality_local(v: Values) -> float | None:
    """Resolved by its own error, or by that of labels without meaning where there is none."""
    error = v["complexity_local_se"] if "complexity_local_se" in v else v["noise"]
    if v["complexity_local"] < 3 * error or v["complexity_local"] < NEGLIGIBLE:
        return None
    return v["expressivity_local"] / v["complexity_local"]


def distance_local(v: Values) -> float | None:
    ratio = optimality_local(v)
    return None if ratio is None else 1 - ratio


def score_local(v: Values) -> float | None:
    return None if optimality_local(v) is None else v["expressivity_local"] ** 2 / v["complexity_local"]


def scaled(v: Values, side: str) -> float | None:
    return (v[side] - v[f"{side}_baseline"]) / (1 - v[f"{side}_baseline"] / v["ceiling"])


# From what is measured; `bound` is that of the point, `ceiling` that of the measurement.
PLANE: dict[str, Callable[[Values], float | None]] = {
    "complexity": lambda v: v["complexity"],
    "expressivity": lambda v: v["expressivity"],
    "optimality": lambda v: None if abs(v["complexity"]) < NEGLIGIBLE else v["expressivity"] / v["complexity"],
    "distance_to_bound": lambda v: v["bound"] - v["expressivity"],
    "complexity_null": lambda v: v["complexity_null"],
    "expressivity_null": lambda v: v["expressivity_null"],
    "complexity_null_se": lambda v: v["complexity_null_se"],
    "expressivity_null_se": lambda v: v["expressivity_null_se"],
    "optimality_null": lambda v: (
        None if abs(v["complexity_null"]) < NEGLIGIBLE else v["expressivity_null"] / v["complexity_null"]
    ),
    "distance_null": lambda v: v["complexity_null"] - v["expressivity_null"],
    "complexity_above_null": lambda v: v["complexity"] - v["complexity_null"],
    "expressivity_above_null": lambda v: v["expressivity"] - v["expressivity_null"],
    "optimality_above_null": optimality_above_null,
    "distance_above_null": lambda v: (
        v["complexity"] - v["complexity_null"] - (v["expressivity"] - v["expressivity_null"])
    ),
    "complexity_baseline": lambda v: v["complexity_baseline"],
    "expressivity_baseline": lambda v: v["expressivity_baseline"],
    "complexity_local": lambda v: v["complexity_local"],
    "expressivity_local": lambda v: v["expressivity_local"],
    "optimality_local": optimality_local,
    "distance_local": distance_local,
    "score_local": score_local,
    "complexity_scaled": lambda v: scaled(v, "complexity"),
    "expressivity_scaled": lambda v: scaled(v, "expressivity"),
    "complexity_document": lambda v: v["complexity_baseline"] - v["complexity_null"],
    "expressivity_document": lambda v: v["expressivity_baseline"] - v["expressivity_null"],
    "bound_ratio": lambda v: None if v["bound"] == v["complexity"] else v["expressivity"] / v["bound"],
}
FEATURE: dict[str, Callable[[Values], float | None]] = {
    "information": lambda v: v["information"],
    "information_null": lambda v: v["information_null"],
    "information_null_std": lambda v: v["information_null_std"],
    "information_p_value": lambda v: v["information_p_value"],
    "ratio": lambda v: v["information"] / v["complexity"],
    "ratio_above_null": lambda v: (
        (v["information"] - v["information_null"]) / v["complexity_above_null"]
        if v["complexity_above_null"] >= 3 * v["complexity_null_se"]
        else None
    ),
}


def expected_of(name: str, sums: Mapping[str, float | None]) -> float | None:
    """By its naive formula; None where something that it takes was not measured."""
    try:
        return PLANE[name]({key: value for key, value in sums.items() if value is not None})
    except KeyError:
        return None


@dataclasses.dataclass
class World:
    """Soft assignments [positions, bins] of each layer, labels of both sides, and the sequence of each position."""

    layers: list[np.ndarray]
    inputs: list[int]
    outputs: list[int]
    sequences: list[int]

    def without(self, left_out: Sequence[int]) -> World:
        keep = [i for i, sequence in enumerate(self.sequences) if sequence not in left_out]
        chosen = [[values[i] for i in keep] for values in (self.inputs, self.outputs, self.sequences)]
        return World([layer[keep] for layer in self.layers], *chosen)


def world(num_sequences: int = 8, length: int = 12, bins: int = 6) -> World:
    """Assignments that depend on the label of their position, and on that of the next, less."""
    generator = np.random.default_rng(11)
    inputs = generator.integers(0, 4, num_sequences * length)
    outputs = np.roll(inputs, -1)
    layers = []
    for _ in range(3):
        logits = 2.0 * generator.normal(size=(4, bins))[inputs] + generator.normal(size=(4, bins))[outputs]
        exponentials = np.exp(logits + 0.5 * generator.normal(size=logits.shape))
        layers.append(exponentials / exponentials.sum(1, keepdims=True))
    sequences = np.repeat(np.arange(num_sequences), length)
    return World(layers, inputs.tolist(), outputs.tolist(), sequences.tolist())


def by_layer(world: World) -> dict[str, list[float]]:
    """What is measured in each layer; the document baseline is that of labels half-way along the sequence."""
    shifted = []
    for sequence in dict.fromkeys(world.sequences):
        own = [label for label, of in zip(world.inputs, world.sequences, strict=True) if of == sequence]
        shifted += own[len(own) // 2 :] + own[: len(own) // 2]
    layers = {
        name: [bf.mutual_information(layer, labels) for layer in world.layers]
        for name, labels in (("complexity", world.inputs), ("expressivity", world.outputs), ("baseline", shifted))
    }
    baseline = layers.pop("baseline")
    layers |= {f"{side}_baseline": baseline for side in ("complexity", "expressivity")}
    for side in ("complexity", "expressivity"):
        layers[f"{side}_local"] = [plain - far for plain, far in zip(layers[side], baseline, strict=True)]
    return layers


def sums_of(world: World) -> dict[str, float]:
    """What is measured, mean over layers. The null is that of few permutations, for its value does not matter."""
    sums = {name: math.fsum(values) / len(values) for name, values in by_layer(world).items()}
    for name, labels in (("complexity", world.inputs), ("expressivity", world.outputs)):
        null = bf.permutation_null(world.layers, labels, repeats=5)
        sums |= {f"{name}_null": null.mean, f"{name}_null_se": 0.001}
    return sums | {"bound": sums["complexity"], "ceiling": CEILING, "noise": NOISE}


def omissions(num_groups: int) -> list[list[int]]:
    """Each group left out, then each two neighbours; a group is a sequence here."""
    return [[g] for g in range(num_groups)] + [[g, g + 1] for g in range(num_groups - 1)]


def jackknife_error(value: float, omitted: Sequence[float], num_groups: int) -> float:
    """Efron and Stein (1981), term by term."""
    one, two = omitted[:num_groups], omitted[num_groups:]
    mean = math.fsum(one) / num_groups
    variance = (num_groups - 1) / num_groups * math.fsum((x - mean) ** 2 for x in one)
    q = [
        num_groups * value - (num_groups - 1) * (one[g] + one[g + 1]) + (num_groups - 2) * two[g]
        for g in range(num_groups - 1)
    ]
    mean_q = math.fsum(q) / len(q)
    excess = 0.5 * ((num_groups - 2) / num_groups) ** 2 * math.fsum((x - mean_q) ** 2 for x in q) / (len(q) - 1)
    return math.sqrt(max(variance - excess, variance / 2))


def baseline_error(name: str, sums: Values, baselines: Sequence[str], error: float) -> float:
    """What independent errors of the baselines add to a quantity, by differences of its naive formula."""
    parts = []
    for baseline in baselines:
        up, down = (PLANE[name]({**sums, baseline: sums[baseline] + h}) for h in (1e-6, -1e-6))
        assert up is not None and down is not None
        parts.append(error * (up - down) / 2e-6)
    return math.hypot(*parts)


def assert_same(a: Measurement, b: Measurement, *, tolerance: float = 1e-12, but: Sequence[str] = ()) -> None:
    """Every quantity of two measurements is the same, errors too, those named in `but` left aside."""
    assert list(a.orders) == list(b.orders) and list(a.features) == list(b.features)
    assert list(a.views) == list(b.views)
    orders = [*a.orders, *(f"{view}/{order}" for view in a.views for order in a.views[view])]
    pairs = [(a[order], b[order], (*PLANE_SCALARS, *PLANE_ERRORS), order) for order in orders]
    pairs += [(a.features[f], b.features[f], (*FEATURE_SCALARS, *FEATURE_ERRORS), f) for f in a.features]
    whole: Any = (a, b, ("entropy", "ceiling", "dispersion", "num_positions"), "whole")
    for first, second, names, where in (*pairs, whole):
        for name in (name for name in names if name not in but):
            expected = getattr(second, name)
            if expected is not None:
                expected = pytest.approx(expected, rel=0.0, abs=tolerance)
            assert getattr(first, name) == expected, f"{where}/{name}"
