"""When the difference between two measurements is real."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from ib_callback.results.jackknife import ABOVE_NULL, Array, jackknife_error, num_groups, replicates_of
from ib_callback.results.measurement import Measurement, settings_differences
from ib_callback.results.points import PlanePoint

# Settings that change what a number means, so that a difference would be one of definitions.
_DEFINITIONS = ("num_bins", "temperature", "seed", "weighting")


@dataclass(frozen=True)
class Difference:
    """Difference of a number between two measurements.

    metric: its name, `order/name`.
    value: first minus second, in the unit of the number.
    standard_error: of the expected difference at this probe size.
    interval: 95 % confidence interval.
    significant: whether the interval leaves out zero.
    paired: whether the two were compared group by group, on the same text. If not, the errors of both add up.
    degrees_of_freedom: of the interval's Student t.
    note: what to beware of, else empty.
    """

    metric: str
    value: float
    standard_error: float
    interval: tuple[float, float]
    significant: bool
    paired: bool
    degrees_of_freedom: float
    note: str = ""

    def __str__(self) -> str:
        verdict = "real" if self.significant else "within the error"
        how = "paired" if self.paired else "unpaired"
        low, high = self.interval
        note = f" ({self.note})" if self.note else ""
        return (
            f"{self.metric}: {self.value:+.4g} ± {self.standard_error:.2g} "
            f"(95 %: {low:.4g} to {high:.4g}, {how}): {verdict}{note}"
        )


def difference(a: Measurement, b: Measurement, metric: str = "optimality", *, order: str | None = None) -> Difference:
    """Difference of a number between two measurements, `a` minus `b`, with its error.

    Two checkpoints measured on the same probe see the same text, so most of the error that each has is common to
    both and leaves the difference: groups of sequences are left out of both at once. On different probes, or with
    different numbers of groups, the errors are taken to be independent.

    Args:
        a: measured with `Meter(standard_errors=...)`.
        b: likewise; its value is taken from that of `a`.
        metric: complexity, expressivity, optimality, distance_to_bound, or one of these above the null
            (`complexity_above_null`, …, `distance_above_null`); `"bigram/optimality"` names the order too.
        order: n-gram order, by default the primary one of `a`.

    Raises:
        ValueError: no such number, no errors, or the two were measured by different definitions.

    Returns:
        The difference. It says that two models differ on text like this probe; where many checkpoints are compared,
        one in twenty differs by chance.
    """
    if "/" in metric:
        order, _, metric = metric.rpartition("/")
    order = order or a.primary or ""
    points = []
    for name, measurement in (("a", a), ("b", b)):
        if measurement.error is not None:
            raise ValueError(f"{name}: expected a measured point, got one that is missing: {measurement.error}")
        if order not in measurement:
            raise ValueError(f"{name}: order {order!r} was not measured; measured: {', '.join(measurement.orders)}")
        points.append(measurement[order])
    definitions = [*_DEFINITIONS, *(["bound"] if metric == "distance_to_bound" else [])]
    differing = settings_differences(
        {name: a.settings.get(name) for name in definitions}, {name: b.settings.get(name) for name in definitions}
    )
    if differing:
        raise ValueError(
            f"a and b were measured by different definitions ({'; '.join(differing)}): their difference means nothing. "
            "Measure both with the same settings."
        )
    first, second = (_replicates(name, point, metric) for name, point in zip("ab", points, strict=True))
    same_text = [a.settings.get(k) == b.settings.get(k) for k in ("probe", "K")]
    paired = all(same_text) and a.settings.get("probe") is not None and len(first[1]) == len(second[1])
    value = first[0] - second[0]
    if paired:
        error = jackknife_error(value, first[1] - second[1])
        freedom = float(num_groups(first[1]) - 1)
    else:
        variances = [jackknife_error(*each) ** 2 for each in (first, second)]
        error = math.sqrt(sum(variances))
        parts = [v**2 / (num_groups(each[1]) - 1) for v, each in zip(variances, (first, second), strict=True)]
        # Welch and Satterthwaite.
        freedom = sum(variances) ** 2 / sum(parts) if error > 0 else float(num_groups(first[1]) - 1)
    if metric in ABOVE_NULL:
        # The error of the nulls themselves, taken as independent: an upper estimate where the probe is the same.
        of_nulls = [_null_part(point, metric, *each) for point, each in zip(points, (first, second), strict=True)]
        error = math.hypot(error, *of_nulls)
    reach = float(stdtrit(freedom, 0.975)) * error
    return Difference(
        metric=f"{order}/{metric}",
        value=value,
        standard_error=error,
        interval=(value - reach, value + reach),
        significant=abs(value) > reach,
        paired=paired,
        degrees_of_freedom=freedom,
        note=_note(a, b, paired),
    )


def _replicates(name: str, point: PlanePoint, metric: str) -> tuple[float, Array]:
    omitted = replicates_of(point, metric)
    if omitted is None:
        value = getattr(point, metric)
        why = "it was measured without errors: use Meter(standard_errors=True)"
        if value is None:
            why = "it is undefined"
        elif point.complexity_jackknife:
            why = "it would need the bound's curve: compare complexity and expressivity"
        raise ValueError(f"{name}: no standard error of {metric} can be had; {why}.")
    return float(getattr(point, metric)), np.asarray(omitted)


def _null_part(point: PlanePoint, metric: str, value: float, omitted: Array) -> float:
    """What the estimated null adds to the standard error of a number above it."""
    whole = getattr(point, f"{metric}_se")
    return 0.0 if whole is None else math.sqrt(max(whole**2 - jackknife_error(value, omitted) ** 2, 0.0))


def _note(a: Measurement, b: Measurement, paired: bool) -> str:
    notes = []
    if not paired and a.settings.get("probe") == b.settings.get("probe"):
        notes.append("same probe but other positions or groups: taken as independent, the error is an upper estimate")
    elif not paired:
        note = "different probes"
        if a.num_positions != b.num_positions:
            note += f" of {a.num_positions} and {b.num_positions} positions, which alone moves the number"
        notes.append(note)
    if a.layers != b.layers:
        notes.append("means over different layers")
    return "; ".join(notes)
