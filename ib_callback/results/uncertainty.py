"""Uncertainty of the numbers: standard errors, differences between two measurements, and a correction for chance.

Standard errors come from leaving out one group of sequences at a time: the delete-a-group jackknife
(E22 of docs/mathematics.md). Whole sequences
are left out because sequences are independent draws of text, but positions within a sequence are not.

Let θ be the statistic, θ(g) its value without group g, θ(g, h) without two groups, with G groups in all (Efron and
Stein, "The jackknife estimate of variance", 1981):

    V = (G − 1)/G Σ_g (θ(g) − mean of θ(g))²,      standard error² = V − B

V counts joint contributions of pairs of groups twice. For information near zero, or near its null, V is twice the
variance. The excess is B = ½ ((G − 2)/G)² var Q with Q(g, h) = G θ − (G − 1)(θ(g) + θ(h)) + (G − 2) θ(g, h). It is
estimated from the G − 1 pairs of neighbouring groups; B is at most V/2.

The standard error says how far the statistic would move with another probe of the same size from the same source. It is
the error of the *expected value at this probe size*. The null describes what finite sampling adds to that expected
value. There are about G − 1 degrees of freedom, so intervals use Student's t.
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

# Default number of groups. With it, t is 2.13 for 95 %; with half as many groups it would be 2.36.
NUM_GROUPS = 16


def jackknife_error(value: float, omitted: Sequence[float] | Array) -> float:
    """Standard error of a statistic, in its unit. (E22 of docs/mathematics.md)

    Args:
        value: value of the statistic on the whole probe.
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
    """The number of groups G, from the number of omissions."""
    return (len(omitted) + 1) // 2


def baseline_gradient(point: PlanePoint, metric: str) -> dict[str, float]:
    """{baseline: derivative} of a number of `point` with respect to each baseline that it depends on.

    Baselines are estimated, and their errors add to that of the number. Empty if the number is undefined.
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
    """The point with the standard errors of its numbers, computed from its replicates.

    With several draws, the error from the choice of reference points is added too.

    Args:
        point: a point with replicates.
        baseline_error: function that gives the standard error of a linear combination of baselines from its weights by
            name. Baselines are estimated from random subsets, independently of the choice of sequences, so their error
            adds in quadrature.
        bound: as for `replicates_of`. A curve counts as exact, although the curve of a sample changes with the probe.
            So the error of a distance to it is valid for comparing models on one probe.
    """
    for quantity in PLANE:
        metric = quantity.name
        known: dict[str, Any] = {}
        if quantity.formula is not None and {*quantity.formula.inputs} <= vars(point).keys():
            # Whether a ratio is defined may depend on an error that is known only now.
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


# Settings that change what a number means; a difference between two values would be one of definitions.
_DEFINITIONS = ("num_bins", "temperature", "seed", "weighting")
# Settings that change the document baseline.
_BASELINES = ("baseline", "baseline_offset")


@dataclass(frozen=True)
class Difference:
    """Difference of a number between two measurements.

    metric: name of the number, `order/name`.
    value: first minus second, in the unit of the number.
    standard_error: standard error of the expected difference at this probe size.
    interval: 95 % confidence interval.
    significant: whether the interval excludes zero, and no form above chance contradicts it.
    paired: whether the two were compared group by group, on the same text. If not, the errors of both add up.
    degrees_of_freedom: degrees of freedom of the interval's Student t.
    note: a caution, else empty.
    contradicted_by: forms above chance that contradict a difference whose interval excludes zero. For a plain number
        these are its forms above null and local; for a number above null, its local form. A form contradicts if it has
        the other sign, or if it is undefined on one side or both because too little is above chance there. The two then
        differ in how much chance, or the document alone, adds to the number.
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
            verdict = "not confirmed above chance"
        how = "paired" if self.paired else "unpaired"
        low, high = self.interval
        note = f" ({self.note})" if self.note else ""
        return (
            f"{self.metric}: {self.value:+.4g} ± {self.standard_error:.2g} "
            f"(95 %: {low:.4g} to {high:.4g}, {how}): {verdict}{note}"
        )


def difference(a: Measurement, b: Measurement, metric: str = "optimality", *, order: str | None = None) -> Difference:
    """Difference of a number between two measurements, `a` minus `b`, with its error.

    Two checkpoints measured on the same probe see the same text. So most of the error is common to both, and cancels in
    the difference: each group of sequences is left out of both at the same time. On different probes, or with different
    numbers of groups, the errors count as independent.

    Args:
        a: a measurement with `Meter(standard_errors=...)`.
        b: another such measurement; its value is subtracted from that of `a`.
        metric: any number of an order that has a standard error (docs/quantities.md): complexity, expressivity,
            optimality, distance_to_bound, one of these above the null (`complexity_above_null`, …,
            `distance_above_null`) or local (`complexity_local`, …, `distance_local`, `score_local`). The name may
            include the order, `"bigram/optimality"`, and a logger's prefix. Also `"loss"` or `"bits_per_byte"`, which
            belong to no order.
        order: n-gram order, by default the primary one of `a`. For a view, `"centred/late/token"`, or `"centred/late"`
            for the primary order.

    Raises:
        ValueError: there is no such number, no standard errors, or the two have different definitions.

    Returns:
        The difference. If it is significant, the two models differ on text like this probe. If you compare many
        checkpoints, one pair in twenty differs by chance. A difference of a plain number, or of a number above null, is
        checked against its forms above chance if both measurements have them, because an untrained model often has
        higher plain numbers: see `Difference.contradicted_by`.
    """
    for name, measurement in (("a", a), ("b", b)):
        if measurement.error is not None:
            raise ValueError(
                f"{name}: expected a measured point, got one that could not be measured: {measurement.error}"
            )
    names = dict.fromkeys((*a.scalars(), *b.scalars()))
    # Some numbers of views are not logged, so `spelled` may not find them.
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
            views = f", also in each of the views {', '.join(measurement.views)}" if measurement.views else ""
            measured = f"{', '.join(measurement.orders)}{views}"
            raise ValueError(f"{name}: order {order!r} was not measured. Measured orders: {measured}")
        points.append(measurement[order])
    of_bound = metric in PLANE_BY_NAME and PLANE_BY_NAME[metric].bound
    definitions = [*_DEFINITIONS, *(["bound"] if of_bound else []), *(_BASELINES if _of_documents(metric) else [])]
    differences = settings_differences(a, b)
    if differing := [text for text in differences if text.partition(":")[0] in definitions]:
        raise ValueError(
            f"a and b were measured by different definitions ({'; '.join(differing)}), so their difference means "
            "nothing. Measure both with the same settings."
        )
    first, second = (_replicates(name, point, metric) for name, point in zip("ab", points, strict=True))
    # The errors of the baselines count as independent; on the same probe this is an upper estimate.
    parts = [_baseline_part(point, metric, *each) for point, each in zip(points, (first, second), strict=True)]
    of_first, of_second = (replicates_of(point, metric, of="draws") for point in points)
    if of_first is not None and of_second is not None:
        # With equally many draws, both have the same reference points, because `seed` is one of the definitions.
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


# The note on errors that may have a common part, which is unknown.
_INDEPENDENT = "their errors count as independent, so the error of the difference is an upper estimate"
# Numbers of a measurement as a whole that can be compared; their errors come from the replicates of the loss.
OF_LOSS = ("loss", "bits_per_byte")


def _difference_of_loss(a: Measurement, b: Measurement, metric: str) -> Difference:
    replicates = []
    for name, measurement in (("a", a), ("b", b)):
        value, loss, omitted = getattr(measurement, metric), measurement.loss, measurement.loss_jackknife
        if value is None or not loss or not omitted:
            why = "it is undefined" if value is None or not loss else "it was measured without errors"
            raise ValueError(
                f"{name}: there is no standard error of {metric} because {why}. Use Meter(standard_errors=True). "
                f'settings["loss"] says how the loss was computed: {measurement.settings.get("loss")}.'
            )
        # The number of bytes per token depends only on the probe.
        replicates.append((value, np.asarray(omitted) * (value / loss)))
    positions = [(x.settings.get("loss") or {}).get("positions") for x in (a, b)]
    found = _compared(a, b, metric, *replicates, same_positions=positions[0] == positions[1])
    if found.paired:
        return found
    if a.settings.get("probe") == b.settings.get("probe"):
        return replace(found, note=f"different pairs of tokens or groups; {_INDEPENDENT}")
    of_tokens = (
        "; a token may be a different piece of text in each, so compare bits_per_byte" if metric == "loss" else ""
    )
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
    """The difference of two numbers, given with their replicates; `parts` are further errors to add."""
    # The groups of the probe decide which sequences are left out together.
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
        # The formula of Welch and Satterthwaite.
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
    """{form above chance: why it contradicts} the difference of a number.

    Only the sign counts: a form that is within its own error, but has the same sign, does not contradict.
    """
    found = {}
    for form in PLANE_BY_NAME[metric].above_chance:
        if _of_documents(form) and not same_baseline:
            continue
        values = [getattr(point, form) for point in (first, second)]
        if None not in values:
            if (values[0] - values[1]) * value <= 0:
                found[form] = f"the difference in {form} is {values[0] - values[1]:+.4g}"
            continue
        unresolved = [
            name for name, point in zip("ab", (first, second), strict=True) if is_unresolved(form, vars(point))
        ]
        measured = [each is not None or name in unresolved for name, each in zip("ab", values, strict=True)]
        if all(measured):
            found[form] = f"{form} is undefined in {' and '.join(unresolved)} because too little is above chance there"
    return found


def _replicates(name: str, point: PlanePoint, metric: str) -> tuple[float, Array]:
    omitted = replicates_of(point, metric)
    if omitted is None:
        value = getattr(point, metric)
        why = 'it was measured without errors. Use Meter(standard_errors=True), which needs weighting="empirical"'
        if value is None:
            defined = [q.name for q in PLANE if q.has_error and getattr(point, q.name) is not None]
            why = "it is undefined"
            if is_unresolved(metric, vars(point)):
                why += ": too little is above chance there"
            why += f". Defined numbers: {', '.join(defined) or 'none'}"
        elif point.complexity_jackknife:
            why = "it would need the curve of the bound. Compare complexity and expressivity instead"
        raise ValueError(f"{name}: there is no standard error of {metric} because {why}.")
    return float(getattr(point, metric)), np.asarray(omitted)


def _baseline_part(point: PlanePoint, metric: str, value: float, omitted: Array) -> float:
    """The part of a number's standard error that comes from estimated baselines."""
    whole = getattr(point, f"{metric}_se")
    if whole is None or not baseline_gradient(point, metric):
        return 0.0
    draws = replicates_of(point, metric, of="draws")
    of_draws = 0.0 if draws is None else draws_error(draws)
    return math.sqrt(max(whole**2 - jackknife_error(value, omitted) ** 2 - of_draws**2, 0.0))


def _note(a: Measurement, b: Measurement, paired: bool) -> str:
    notes = []
    if not paired and a.settings.get("probe") == b.settings.get("probe"):
        notes.append(f"same probe, but different positions or groups; {_INDEPENDENT}")
    elif not paired:
        note = "different probes"
        if a.num_positions != b.num_positions:
            note += f" of {a.num_positions} and {b.num_positions} positions; the size alone changes the number"
        notes.append(note)
    if not same_layers(a.layers, b.layers):
        notes.append("means over different layers")
    return "; ".join(notes)


# Smallest room between null and ceiling, as a share of the ceiling. With less, the correction multiplies errors by more
# than ten.
MIN_ROOM = 0.1


def adjusted_information(information: float, null: float, ceiling: float) -> float | None:
    """Information corrected for chance: (I - null) / (1 - null / ceiling). (E16 of docs/mathematics.md)

    The entropy of the mean of c assignments is lower than that of their distribution. A label that occurs c times
    inflates I by this difference. For labels without meaning the inflation is the null. For labels with meaning it is
    smaller, because their assignments differ less among themselves: if I is the true value, the possible difference is
    ceiling - I instead of ceiling. If the inflation falls with c in the same way, then plain = I + null (1 - I /
    ceiling). This function solves that for I. Up to the scale, the result is the adjusted mutual information of Vinh,
    Epps and Bailey (2010), with the ceiling as the maximum.

    The correction assumes that positions with the same label are only as similar as the label makes them. Positions of
    one sequence are more similar. Then the sequence contributes to what a label seems to say.

    Args:
        information: plain I(X;Z), in any unit.
        null: the null, in the same unit.
        ceiling: the ceiling, in the same unit.

    Returns:
        The corrected information in the same unit; None if null and ceiling are within 10 % of each other. Nearly every
        label then occurs once, and the sample says nothing about the information.

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
        measurement: a measurement with nulls.
        order: n-gram order, by default the primary one.

    Raises:
        ValueError: the measurement has no null.
        KeyError: the order was not measured.
    """
    if "/" in (order or ""):
        raise ValueError(
            f"adjusted: expected an n-gram order, got {order!r}. It cannot be a view, because the ceilings of views "
            "are not known."
        )
    point = measurement[order or measurement.primary or ""]
    if point.complexity_null is None or point.expressivity_null is None or measurement.ceiling is None:
        raise ValueError('adjusted: expected a measurement with nulls. Use null=True and weighting="empirical".')
    assert point.complexity is not None
    assert point.expressivity is not None
    complexity = adjusted_information(point.complexity, point.complexity_null, measurement.ceiling)
    expressivity = adjusted_information(point.expressivity, point.expressivity_null, measurement.ceiling)
    if complexity is None or expressivity is None:
        return Adjusted(complexity, expressivity, None, None)
    # As for numbers above null: no ratio to a number that cannot be distinguished from zero.
    ratio = None if point.optimality_above_null is None else expressivity / complexity
    return Adjusted(complexity, expressivity, ratio, complexity - expressivity)
