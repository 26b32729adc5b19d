"""How sure the numbers are: standard errors, differences between two measurements, and a correction for chance.

Standard errors come from leaving out one group of sequences at a time: the delete-a-group jackknife (E22 of
docs/mathematics.md).

Sequences are independent draws of text, positions within one are not, so groups of sequences are what is left out.
With θ the statistic, θ(g) its value without group g, θ(g, h) without two, G groups in all (Efron and Stein, "The
jackknife estimate of variance", 1981):

    V = (G − 1)/G Σ_g (θ(g) − mean of θ(g))²,      standard error² = V − B

V counts what pairs of groups contribute together twice: for an information near zero, or near its null, V is twice the
variance. That excess is B = ½ ((G − 2)/G)² var Q, Q(g, h) = G θ − (G − 1)(θ(g) + θ(h)) + (G − 2) θ(g, h), estimated
from the G − 1 pairs of neighbours; B is at most V/2.

The error covers how far the statistic would move with another probe of the same size from the same source: that of
its *expected value at this probe size*. What finite sampling adds to that expected value itself is the null's
business. There are about G − 1 degrees of freedom, so intervals take Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import stdtrit

from ib_callback.results.measurement import Measurement, same_layers, settings_differences
from ib_callback.results.metrics import PLANE, PLANE_BY_NAME, is_unresolved, spelled, without_prefix
from ib_callback.results.points import Array, PlanePoint, draws_error, replicates_of

# Groups where the user does not say how many: t is then 2.13 for 95 %, and half the groups would make it 2.36.
NUM_GROUPS = 16


def jackknife_error(value: float, omitted: Sequence[float] | Array) -> float:
    """Standard error of a statistic, in its unit. (E22 of docs/mathematics.md)

    Args:
        value: of the whole probe.
        omitted: [2 G - 1] values without each group, then without each two neighbouring groups. With fewer than 4
            groups the pairs are not used.

    >>> jackknife_error(2.0, [1.0, 2.0, 3.0, 2.0, 2.0])
    1.1547005383792515
    """
    values = np.asarray(omitted, dtype=np.float64)
    number = num_groups(values)
    one, two = values[:number], values[number:]
    variance = (number - 1) * one.var()
    if number >= 4:
        together = number * value - (number - 1) * (one[:-1] + one[1:]) + (number - 2) * two
        excess = 0.5 * ((number - 2) / number) ** 2 * together.var(ddof=1)
        variance = max(variance - excess, variance / 2)
    return float(np.sqrt(variance))


def num_groups(omitted: Sequence[float] | Array) -> int:
    """G, from the number of omissions."""
    return (len(omitted) + 1) // 2


def baseline_gradient(point: PlanePoint, metric: str) -> dict[str, float]:
    """How much a number of `point` changes with each baseline that it depends on, by the name of the baseline.

    Those are estimated, and their error is one of the number too. Empty where the number is undefined.
    """
    quantity = PLANE_BY_NAME[metric]
    if quantity.kind == "baseline":
        return {metric: 1.0}
    if quantity.formula is None or quantity.bound or getattr(point, metric) is None:
        return {}
    inputs = quantity.formula.inputs
    partials = quantity.formula.gradient(*(getattr(point, name) for name in inputs))
    total: dict[str, float] = {}
    for name, partial in zip(inputs, partials, strict=True):
        for baseline, change in baseline_gradient(point, name).items():
            total[baseline] = total.get(baseline, 0.0) + partial * change
    return total


def with_errors(
    point: PlanePoint,
    baseline_error: Callable[[Mapping[str, float]], float],
    bound: Callable[[float], float] | None = None,
) -> PlanePoint:
    """The point with the standard errors of its numbers, from its replicates.

    That of the choice of reference points, of which each draw is one, adds likewise where there are several.

    Args:
        point: with replicates.
        baseline_error: standard error of a linear combination of baselines, its weights by name. Baselines are
            estimated from random subsets, independently of the choice of sequences: their error adds in quadrature.
        bound: as for `replicates_of`. A curve is taken as given: that of the sample moves with the probe too, so that
            the error of a distance to it is one for comparing models on one probe.
    """
    for quantity in PLANE:
        metric = quantity.name
        known: dict[str, Any] = {}
        if quantity.formula is not None and {*quantity.formula.inputs} <= vars(point).keys():
            # Whether a divisor is resolved may depend on an error that is known only now.
            known[metric] = quantity.formula(vars(point))
            point = replace(point, **known)
        if quantity.has_error:
            values = replicates_of(point, metric, bound)
            error = None if values is None else jackknife_error(getattr(point, metric), values)
            if error is not None and (gradient := baseline_gradient(point, metric)):
                error = math.hypot(error, baseline_error(gradient))
            if error is not None and (draws := replicates_of(point, metric, bound, "draws")) is not None:
                error = math.hypot(error, draws_error(draws))
            known[f"{metric}_se"] = error
            point = replace(point, **known)
    return point


# Settings that change what a number means, so that a difference would be one of definitions, …
_DEFINITIONS = ("num_bins", "temperature", "seed", "weighting")
# … and those that change what the document baseline is.
_BASELINES = ("baseline", "baseline_offset")


@dataclass(frozen=True)
class Difference:
    """Difference of a number between two measurements.

    metric: its name, `order/name`.
    value: first minus second, in the unit of the number.
    standard_error: of the expected difference at this probe size.
    interval: 95 % confidence interval.
    significant: whether the interval leaves out zero, and nothing above chance contradicts it.
    paired: whether the two were compared group by group, on the same text. If not, the errors of both add up.
    degrees_of_freedom: of the interval's Student t.
    note: what to beware of, else empty.
    contradicted_by: if the interval of a plain number leaves out zero, those of its forms above chance (above null,
        local) that do not point the same way, or that are undefined on one side or both because too little is above
        chance there; of one above null, its local form. What differs is then how much chance, or the document alone,
        adds to the number.
    """

    metric: str
    value: float
    standard_error: float
    interval: tuple[float, float]
    significant: bool
    paired: bool
    degrees_of_freedom: float
    note: str = ""
    contradicted_by: tuple[str, ...] = ()

    def __str__(self) -> str:
        verdict = "real" if self.significant else "within the error"
        if self.contradicted_by:
            verdict = "real as a number, but not above chance"
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
        metric: any number of an order that has a standard error (docs/quantities.md): complexity, expressivity,
            optimality, distance_to_bound, one of these above the null (`complexity_above_null`, …,
            `distance_above_null`) or local (`complexity_local`, …, `distance_local`, `score_local`);
            `"bigram/optimality"` names the order too, and a logger's prefix may stand in front. Or `"loss"` or
            `"bits_per_byte"`, which are of no order.
        order: n-gram order, by default the primary one of `a`; of a view, `"centred/late/token"`, or `"centred/late"`
            for that of the primary order.

    Raises:
        ValueError: no such number, no errors, or the two were measured by different definitions.

    Returns:
        The difference. It says that two models differ on text like this probe; where many checkpoints are compared,
        one in twenty differs by chance. That of a plain number, or of one above null, is held against its forms above
        chance where both measurements have them, for those of an untrained model are often the higher ones: see
        `Difference.contradicted_by`.
    """
    for name, measurement in (("a", a), ("b", b)):
        if measurement.error is not None:
            raise ValueError(f"{name}: expected a measured point, got one that is missing: {measurement.error}")
    names = dict.fromkeys((*a.scalars(), *b.scalars()))
    # Not every number of a view is logged.
    metric = spelled(metric, names) or without_prefix(metric)
    if metric in OF_LOSS:
        return _difference_of_loss(a, b, metric)
    if "/" in metric:
        order, _, metric = metric.rpartition("/")
    order = order or a.primary or ""
    if order in {*a.views, *b.views}:
        order = f"{order}/{a.primary}"
    points = []
    for name, measurement in (("a", a), ("b", b)):
        if order not in measurement:
            views = f", and of each view: {', '.join(measurement.views)}" if measurement.views else ""
            measured = f"{', '.join(measurement.orders)}{views}"
            raise ValueError(f"{name}: order {order!r} was not measured; measured: {measured}")
        points.append(measurement[order])
    of_bound = metric in PLANE_BY_NAME and PLANE_BY_NAME[metric].bound
    definitions = [*_DEFINITIONS, *(["bound"] if of_bound else []), *(_BASELINES if _of_documents(metric) else [])]
    differences = settings_differences(a, b)
    if differing := [text for text in differences if text.partition(":")[0] in definitions]:
        raise ValueError(
            f"a and b were measured by different definitions ({'; '.join(differing)}): their difference means nothing. "
            "Measure both with the same settings."
        )
    first, second = (_replicates(name, point, metric) for name, point in zip("ab", points, strict=True))
    # The error of the baselines themselves, taken as independent: an upper estimate where the probe is the same.
    parts = [_baseline_part(point, metric, *each) for point, each in zip(points, (first, second), strict=True)]
    of_first, of_second = (replicates_of(point, metric, of="draws") for point in points)
    if of_first is not None and of_second is not None:
        # The same reference points for both, where as many: `seed` is among the definitions.
        alike = len(of_first) == len(of_second)
        parts += [draws_error(of_first - of_second)] if alike else [draws_error(of_first), draws_error(of_second)]
    found = _compared(a, b, f"{order}/{metric}", first, second, parts=parts)
    contradictions = {}
    if found.significant:
        same_baseline = not any(text.partition(":")[0] in _BASELINES for text in differences)
        contradictions = _contradictions(metric, found.value, *points, same_baseline=same_baseline)
    return replace(
        found,
        significant=found.significant and not contradictions,
        note="; ".join(filter(None, [*contradictions.values(), _note(a, b, found.paired)])),
        contradicted_by=tuple(contradictions),
    )


# Numbers of a measurement as a whole that can be compared, which have the replicates of the loss.
OF_LOSS = ("loss", "bits_per_byte")


def _difference_of_loss(a: Measurement, b: Measurement, metric: str) -> Difference:
    replicates = []
    for name, measurement in (("a", a), ("b", b)):
        value, loss, omitted = getattr(measurement, metric), measurement.loss, measurement.loss_jackknife
        if value is None or not loss or not omitted:
            why = "it is undefined" if value is None or not loss else "it was measured without errors"
            raise ValueError(
                f"{name}: no standard error of {metric} can be had; {why}. Use Meter(standard_errors=True), and "
                f'settings["loss"] says how the loss was had: {measurement.settings.get("loss")}.'
            )
        # Bytes a token are those of the probe.
        replicates.append((value, np.asarray(omitted) * (value / loss)))
    positions = [(x.settings.get("loss") or {}).get("positions") for x in (a, b)]
    found = _compared(a, b, metric, *replicates, same_positions=positions[0] == positions[1])
    if found.paired:
        return found
    if a.settings.get("probe") == b.settings.get("probe"):
        return replace(found, note="other pairs of tokens or groups: taken as independent, an upper estimate")
    of_tokens = ", and a token may be another unit of text: bits_per_byte can be compared" if metric == "loss" else ""
    return replace(found, note=f"different probes{of_tokens}")


def _compared(
    a: Measurement,
    b: Measurement,
    metric: str,
    first: tuple[float, Array],
    second: tuple[float, Array],
    *,
    parts: Sequence[float] = (),
    same_positions: bool = True,
) -> Difference:
    """The difference of two numbers, from each with its replicates; `parts` are errors that add to theirs."""
    # Groups of the probe decide which sequences are left out together.
    same_text = same_positions and all(a.settings.get(k) == b.settings.get(k) for k in ("probe", "K", "groups"))
    paired = same_text and a.settings.get("probe") is not None and len(first[1]) == len(second[1])
    value = first[0] - second[0]
    if paired:
        error = jackknife_error(value, first[1] - second[1])
        freedom = float(num_groups(first[1]) - 1)
    else:
        variances = [jackknife_error(*each) ** 2 for each in (first, second)]
        error = math.sqrt(sum(variances))
        shares = [v**2 / (num_groups(each[1]) - 1) for v, each in zip(variances, (first, second), strict=True)]
        # Welch and Satterthwaite.
        freedom = sum(variances) ** 2 / sum(shares) if error > 0 else float(num_groups(first[1]) - 1)
    error = math.hypot(error, *parts)
    reach = float(stdtrit(freedom, 0.975)) * error
    return Difference(
        metric=metric,
        value=value,
        standard_error=error,
        interval=(value - reach, value + reach),
        significant=abs(value) > reach,
        paired=paired,
        degrees_of_freedom=freedom,
    )


def _of_documents(metric: str) -> bool:
    """Whether a number depends on the document baseline."""
    quantity = PLANE_BY_NAME.get(metric)
    inputs = () if quantity is None or quantity.formula is None else quantity.formula.inputs
    return metric.endswith(("_baseline", "_local")) or any(map(_of_documents, inputs))


def _contradictions(
    metric: str, value: float, first: PlanePoint, second: PlanePoint, *, same_baseline: bool
) -> dict[str, str]:
    """Why each form above chance of a plain number does not bear out its difference, by its name.

    Its sign alone is asked for: one that is within its own error, but points the same way, is no contradiction.
    """
    found = {}
    for form in PLANE_BY_NAME[metric].above_chance:
        if _of_documents(form) and not same_baseline:
            continue
        values = [getattr(point, form) for point in (first, second)]
        if None not in values:
            if (values[0] - values[1]) * value <= 0:
                found[form] = f"{form} {values[0] - values[1]:+.4g}"
            continue
        unresolved = [
            name for name, point in zip("ab", (first, second), strict=True) if is_unresolved(form, vars(point))
        ]
        measured = [each is not None or name in unresolved for name, each in zip("ab", values, strict=True)]
        if all(measured):
            found[form] = f"{form} undefined in {' and '.join(unresolved)}: too little is above chance there"
    return found


def _replicates(name: str, point: PlanePoint, metric: str) -> tuple[float, Array]:
    omitted = replicates_of(point, metric)
    if omitted is None:
        value = getattr(point, metric)
        why = 'it was measured without errors: use Meter(standard_errors=True), which takes weighting="empirical"'
        if value is None:
            defined = [q.name for q in PLANE if q.has_error and getattr(point, q.name) is not None]
            why = "it is undefined"
            if is_unresolved(metric, vars(point)):
                why += ", because too little is above chance there"
            why += f"; those defined: {', '.join(defined) or 'none'}"
        elif point.complexity_jackknife:
            why = "it would need the bound's curve: compare complexity and expressivity"
        raise ValueError(f"{name}: no standard error of {metric} can be had; {why}.")
    return float(getattr(point, metric)), np.asarray(omitted)


def _baseline_part(point: PlanePoint, metric: str, value: float, omitted: Array) -> float:
    """What estimated baselines add to the standard error of a number."""
    whole = getattr(point, f"{metric}_se")
    if whole is None or not baseline_gradient(point, metric):
        return 0.0
    draws = replicates_of(point, metric, of="draws")
    of_draws = 0.0 if draws is None else draws_error(draws)
    return math.sqrt(max(whole**2 - jackknife_error(value, omitted) ** 2 - of_draws**2, 0.0))


def _note(a: Measurement, b: Measurement, paired: bool) -> str:
    notes = []
    if not paired and a.settings.get("probe") == b.settings.get("probe"):
        notes.append("same probe but other positions or groups: taken as independent, the error is an upper estimate")
    elif not paired:
        note = "different probes"
        if a.num_positions != b.num_positions:
            note += f" of {a.num_positions} and {b.num_positions} positions, which alone moves the number"
        notes.append(note)
    if not same_layers(a.layers, b.layers):
        notes.append("means over different layers")
    return "; ".join(notes)


# Room between null and ceiling, as a share of the ceiling, below which the correction blows up errors tenfold.
MIN_ROOM = 0.1


def adjusted_information(information: float, null: float, ceiling: float) -> float | None:
    """Information corrected for chance: (I - null) / (1 - null / ceiling). (E16 of docs/mathematics.md)

    A label that occurs c times inflates I by how far the entropy of the mean of its c assignments falls short of that
    of its distribution. For labels without meaning that is the null. For labels with meaning it is less, as their
    assignments differ less among themselves: with I the truth, what can differ is ceiling - I instead of ceiling. If
    it falls with c in the same way, then plain = I + null (1 - I / ceiling), which is solved for I. Up to the scale
    it is the adjusted mutual information of Vinh, Epps and Bailey (2010), with the ceiling as the maximum.

    It assumes that positions with the same label are no more alike than the label makes them. Those of one sequence
    are, and what a label seems to say is then partly said by the sequence.

    Args:
        information: plain I(X;Z), in any unit.
        null: in the same unit.
        ceiling: likewise.

    Returns:
        In the same unit; None where null and ceiling are within 10 % of each other: nearly every label occurs once,
        and the sample says nothing about it.

    >>> adjusted_information(0.75, null=0.5, ceiling=1.0)
    0.5
    """
    if ceiling <= 0 or 1 - null / ceiling < MIN_ROOM:
        return None
    return (information - null) / (1 - null / ceiling)


@dataclass(frozen=True)
class Adjusted:
    """One order, corrected for chance; fractions of log(num_bins), None where undefined."""

    complexity: float | None
    expressivity: float | None
    optimality: float | None
    distance: float | None


def adjusted(measurement: Measurement, order: str | None = None) -> Adjusted:
    """Return `adjusted_information` of complexity and expressivity, their ratio and their difference.

    Args:
        measurement: with nulls.
        order: n-gram order, by default the primary one.

    Raises:
        ValueError: the measurement has no null.
        KeyError: the order was not measured.
    """
    if "/" in (order or ""):
        raise ValueError(f"adjusted: expected an n-gram order, got {order!r}: the ceilings of views are not known.")
    point = measurement[order or measurement.primary or ""]
    if point.complexity_null is None or point.expressivity_null is None or measurement.ceiling is None:
        raise ValueError('adjusted: expected a measurement with nulls; use null=True and weighting="empirical".')
    assert point.complexity is not None
    assert point.expressivity is not None
    complexity = adjusted_information(point.complexity, point.complexity_null, measurement.ceiling)
    expressivity = adjusted_information(point.expressivity, point.expressivity_null, measurement.ceiling)
    if complexity is None or expressivity is None:
        return Adjusted(complexity, expressivity, None, None)
    # Like above null: no ratio to what cannot be told from nothing.
    ratio = None if point.optimality_above_null is None else expressivity / complexity
    return Adjusted(complexity, expressivity, ratio, complexity - expressivity)
