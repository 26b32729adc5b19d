"""Changes between two models, such as before and after post-training, with an interval for each number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from ib_callback.analysis.comparison import Entry, check_comparable
from ib_callback.results.measurement import CHANCE, Measurement, metrics_of
from ib_callback.results.metrics import resolve_metric
from ib_callback.results.points import FeaturePoint
from ib_callback.results.trajectory import aligned, cell
from ib_callback.results.uncertainty import difference, jackknife_error, num_groups

RESOLVED, UNRESOLVED = "resolved", "not resolved"
NOT_ABOVE_CHANCE = "not above chance"
NO_ERRORS = "no interval: measured without standard errors"
NO_ERROR = "no interval: this number has no standard error"
UNDEFINED = "undefined"
# Numbers of every feature, then of the primary order, in this order.
_OF_FEATURE = ("ratio", "information")
_MAIN = (
    "loss", "bits_per_byte", "complexity", "expressivity", "optimality", "distance_to_bound", "complexity_local",
    "expressivity_local", "optimality_local", "prediction/score_local",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Change:
    """How one number changed.

    Attributes:
        metric: logged name of the number.
        base, post: its values before and after; None where undefined.
        change: post minus base.
        standard_error: standard error of the change at this probe size.
        low, high: 95 % confidence interval of the change, by Student's t.
        paired: whether both were compared group by group, on the same text.
        verdict: "resolved" (the interval excludes 0), "not resolved", "not above chance" (the interval excludes 0, but
            the values above chance do not confirm the change), "no interval: …" or "undefined".
        note: a caution for the reader; empty if there is none.
    """

    metric: str
    base: float | None
    post: float | None
    change: float | None = None
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    paired: bool | None = None
    verdict: str
    note: str = ""


def main_metrics(base: Measurement, post: Measurement) -> list[str]:
    """Ratio and information of each feature that both models have, then the main numbers of the primary order."""
    known = {*metrics_of(base)} & {*metrics_of(post)}
    wanted = [f"{feature}/{name}" for name in _OF_FEATURE for feature in base.features]
    for name in _MAIN:
        if name.endswith("_local"):
            view, _, last = name.rpartition("/")
            name = "/".join(filter(None, (view, base.primary, last)))
        wanted.append(name)
    return [name for name in wanted if name in known]


def changes(base: Entry, post: Entry, metrics: Sequence[str] | None = None) -> tuple[list[Change], list[str]]:
    """The change of each number from one model to another.

    Args:
        base: the point before.
        post: the point after.
        metrics: logged names of metrics, or features; by default `main_metrics`.

    Returns:
        The changes, and cautions.

    Raises:
        ValueError: documents or settings differ, or there is no such number.
    """
    cautions = check_comparable([base, post])
    known = list(dict.fromkeys([*metrics_of(base.point), *metrics_of(post.point)]))
    names = main_metrics(base.point, post.point) if metrics is None else [resolve_metric(m, known) for m in metrics]
    return [change(base.point, post.point, name) for name in dict.fromkeys(names)], cautions


def change(base: Measurement, post: Measurement, metric: str) -> Change:
    """The change of one number, by its logged name. It has an interval if both were measured with standard errors."""
    before, after = base.scalars().get(metric), post.scalars().get(metric)
    values: dict[str, Any] = {"metric": metric, "base": before, "post": after}
    if before is None or after is None:
        return Change(**values, verdict=UNDEFINED)
    values["change"] = after - before
    feature, _, name = metric.rpartition("/")
    if feature in base.features and feature in post.features:
        return _of_feature(base, post, feature, name, values)
    try:
        found = difference(post, base, metric)
    except ValueError as error:
        no_errors = "without errors" in str(error)
        return Change(**values, verdict=NO_ERRORS if no_errors else NO_ERROR)
    low, high = found.interval
    verdict = RESOLVED if found.significant else NOT_ABOVE_CHANCE if found.contradicted_by else UNRESOLVED
    return Change(
        **values, standard_error=found.standard_error, low=low, high=high, paired=found.paired, verdict=verdict,
        note=found.note,
    )  # fmt: skip


def _of_feature(base: Measurement, post: Measurement, feature: str, name: str, values: dict[str, Any]) -> Change:
    """The change of the information about a feature, or of its ratio to the complexity.

    If a feature has its own probe, its groups of sequences come from that probe. The groups of the complexity come from
    the main probe. Then the two contributions to the error of the ratio are linearised and added in quadrature.
    """
    probes = [(m.settings.get("feature_probes") or {}).get(feature) for m in (base, post)]
    same_text = all(base.settings.get(key) == post.settings.get(key) for key in ("probe", "K", "groups"))
    if same_text and probes[0] != probes[1]:
        return Change(**values, verdict="no interval: measured on different texts")
    if name not in _OF_FEATURE:
        return Change(**values, verdict=NO_ERROR)
    informations = [_information(m.features[feature]) for m in (base, post)]
    complexities = [_complexity(m) for m in (base, post)] if name == "ratio" else informations
    if None in (*informations, *complexities):
        return Change(**values, verdict=NO_ERRORS)
    i, c = [each for each in informations if each], [each for each in complexities if each]
    freedom = min(num_groups(replicates) for _, replicates in (*i, *c)) - 1
    if name == "information":
        error = _error(*i, paired=same_text)
    elif None in probes:  # the feature is on the main probe, so the same groups are left out of both
        error = _error(*((x / y, x_without / y_without) for (x, x_without), (y, y_without) in zip(i, c, strict=True)),
                       paired=same_text)  # fmt: skip
    else:
        of_information = (_scaled(x, 1 / y) for x, (y, _) in zip(i, c, strict=True))
        of_complexity = (_scaled(y, -x / y[0] ** 2) for (x, _), y in zip(i, c, strict=True))
        error = math.hypot(_error(*of_information, paired=same_text), _error(*of_complexity, paired=same_text))
    reach, moved = float(stdtrit(freedom, 0.975)) * error, values["change"]
    notes = [] if same_text else ["different probes, treated as independent"]
    p = [m.features[feature].information_p_value for m in (base, post)]
    if any(each is not None and each > CHANCE for each in p):
        shown = ", ".join("-" if each is None else f"{each:.2g}" for each in p)
        notes.append(f"information may be chance (p {shown})")
    return Change(
        **values, standard_error=error, low=moved - reach, high=moved + reach, paired=same_text,
        verdict=RESOLVED if abs(moved) > reach else UNRESOLVED, note="; ".join(notes),
    )  # fmt: skip


_Replicated = tuple[float, np.ndarray]


def _information(point: FeaturePoint) -> _Replicated | None:
    if point.information is None or not point.information_jackknife:
        return None
    return point.information, np.asarray(point.information_jackknife)


def _complexity(measurement: Measurement) -> _Replicated | None:
    point = measurement.orders.get(measurement.primary or "")
    if point is None or point.complexity is None or not point.complexity_jackknife:
        return None
    return point.complexity, np.asarray(point.complexity_jackknife)


def _scaled(number: _Replicated, factor: float) -> _Replicated:
    return number[0] * factor, number[1] * factor


def _error(before: _Replicated, after: _Replicated, *, paired: bool) -> float:
    """Standard error of the difference: group by group if paired, otherwise as for independent numbers."""
    if paired and len(before[1]) == len(after[1]):
        return jackknife_error(after[0] - before[0], after[1] - before[1])
    return math.hypot(jackknife_error(*before), jackknife_error(*after))


def table_of_changes(found: Sequence[Change]) -> str:
    """The changes as an aligned table."""
    lines = [["", "base", "post", "change", "95 % interval", "", ""]]
    for each in found:
        interval = "-" if each.low is None or each.high is None else f"{each.low:+.4g} to {each.high:+.4g}"
        how = "" if each.paired is None else "paired" if each.paired else "unpaired"
        changed = "-" if each.change is None else f"{each.change:+.4g}"
        verdict = f"{each.verdict} ({each.note})" if each.note else each.verdict
        lines.append([each.metric, cell(each.base), cell(each.post), changed, interval, how, verdict])
    return "\n".join(aligned(lines, [str.ljust, *[str.rjust] * 4, str.ljust, str.ljust]))


def conclusion_of_changes(base: str, post: str, found: Sequence[Change]) -> str:
    """The conclusion in words."""
    tested = [each for each in found if each.low is not None]
    if not tested:
        return (
            f"From {base} to {post} nothing can be concluded, because no interval is known. Measure with "
            "--standard-errors."
        )
    resolved = [each.metric for each in tested if each.verdict == RESOLVED]
    if not resolved:
        return f"From {base} to {post} no change is resolved on this probe, so nothing can be concluded."
    about = f" By chance alone, about {0.05 * len(tested):.1g} of {len(tested)} would be." if len(tested) > 1 else ""
    beware = "The intervals cover a change of the text. They do not cover another training."
    return f"From {base} to {post}, these changes are resolved: {', '.join(resolved)}.{about} {beware}"
