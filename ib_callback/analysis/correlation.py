"""Correlate metrics of models with scores from elsewhere, and say what can be concluded from so few models.

These correlations are over models; `ib_callback.results.correlation` correlates the points of one run. Models from
different trainings are independent, although models of one family are less so. The published experiment is "Relating
Representation Structure to Performance" in Conklin et al., ICLR 2026. It used models of three families and MMLU-Pro.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ib_callback.analysis.comparison import Entry
from ib_callback.results.measurement import metrics_of
from ib_callback.results.metrics import Mode, better_direction, resolve_metric

Array = np.ndarray
# The published correlation of optimality with MMLU-Pro. Conclusions give the probability of finding such a true r.
PUBLISHED_R = 0.64
ALPHA = 0.05
_RESAMPLES = 2000
_BATCH = 2_000_000  # number of pairs that are processed at once
_MIN_MODELS = 3
# Up to this number of models, all permutations are used.
_EXACT = 7
# Endings of logged numbers that are not properties of a model.
_NOT_METRICS = ("_se", "_std", "_spread", "_p_value")
_NEGLIGIBLE = 1e-9


@dataclass(frozen=True)
class Coefficient:
    """A coefficient with its 95 % interval and its two-sided p-value; None where undefined."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None


UNDEFINED = Coefficient()


@dataclass(frozen=True, kw_only=True)
class MetricCorrelation:
    """One metric and the scores.

    Attributes:
        metric: logged name of the metric.
        num_models: number of models that have both the metric and a score.
        pearson: Pearson's r; interval by Fisher's z.
        spearman: Spearman's ρ; interval by percentiles of a bootstrap over models; p is exact for up to 7 models.
        accuracy: pairwise decision accuracy, in [0, 1]: the share of pairs of models with different scores that the
            metric orders correctly, in its better direction; ties count half. The interval is as for `spearman`.
        p_holm, p_fdr: p of Pearson's r, corrected for all tested metrics. Holm's method limits the probability of any
            false finding. Benjamini and Hochberg's method limits the share of false findings.
        given_loss, given_size, given_both: partial correlations.
        within: correlation pooled within families, after removing the means of families; interval by Fisher's z.
        across: correlation of the means of families.
        families: number of families in `across`.
    """

    metric: str
    num_models: int
    pearson: Coefficient
    spearman: Coefficient
    accuracy: Coefficient
    p_holm: float | None = None
    p_fdr: float | None = None
    given_loss: Coefficient = UNDEFINED
    given_size: Coefficient = UNDEFINED
    given_both: Coefficient = UNDEFINED
    within: Coefficient = UNDEFINED
    across: Coefficient = UNDEFINED
    families: int = 0

    def row(self) -> dict[str, Any]:
        """All numbers by name, for a table."""
        found: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if not isinstance(value, dict):
                found[name] = value
                continue
            for part, number in value.items():
                found[name if part == "value" else f"{name}_{part}"] = number
        return found


def pearson(x: Array, y: Array) -> Coefficient:
    """Pearson's r, with Fisher's interval (needs at least 4 points) and p by Student's t.

    >>> round(pearson(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 1.0, 4.0, 3.0])).value, 9)
    0.6
    """
    return _from_residuals(x - x.mean(), y - y.mean(), 0) if len(x) else UNDEFINED


def partial(x: Array, y: Array, controls: Array) -> Coefficient:
    """Partial correlation: Pearson's r of the residuals of both after regression on the controls.

    Args:
        x: [n] values.
        y: [n] values.
        controls: [n, k] control variables, without a constant.

    Returns:
        The coefficient, with k degrees of freedom fewer. It is undefined if the controls determine x or y exactly, or
        do not vary.
    """
    if not len(x):
        return UNDEFINED
    centred = controls - controls.mean(0)
    scale = np.linalg.norm(centred, axis=0)
    if (scale <= _NEGLIGIBLE * np.linalg.norm(controls, axis=0)).any():
        return UNDEFINED
    design = np.column_stack([np.ones(len(x)), centred / scale])
    rank = int(np.linalg.matrix_rank(design)) - 1
    left = [each - design @ np.linalg.lstsq(design, each, rcond=None)[0] for each in (x, y)]
    spread = [np.linalg.norm(each - each.mean()) for each in (x, y)]
    if any(np.linalg.norm(rest) <= _NEGLIGIBLE * whole for rest, whole in zip(left, spread, strict=True)):
        return UNDEFINED
    return _from_residuals(left[0], left[1], rank)


def _from_residuals(a: Array, b: Array, lost: int) -> Coefficient:
    """The correlation of residuals; `lost` is the number of degrees of freedom that the regression took."""
    from scipy import stats

    freedom = len(a) - 2 - lost
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    varies = all(np.ptp(each) > 0 for each in (a, b)) and size > 0
    if freedom < 1 or not varies:
        return UNDEFINED
    r = float(np.clip(a @ b / size, -1.0, 1.0))
    p = 0.0 if abs(r) == 1 else float(2 * stats.t.sf(abs(r) * math.sqrt(freedom / (1 - r * r)), freedom))
    if freedom < 2 or abs(r) == 1:
        return Coefficient(r, p=p)
    reach = float(stats.norm.ppf(1 - ALPHA / 2)) / math.sqrt(freedom - 1)
    return Coefficient(r, math.tanh(math.atanh(r) - reach), math.tanh(math.atanh(r) + reach), p)


def spearman(x: Array, y: Array) -> Coefficient:
    """Spearman's rank correlation."""
    from scipy import stats

    if len(x) < _MIN_MODELS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return UNDEFINED
    found = stats.spearmanr(x, y)
    p = float(found.pvalue)
    if len(x) <= _EXACT:
        exact = stats.permutation_test(
            (x,), lambda a, axis=-1: _rank_correlation(a, np.broadcast_to(y, a.shape)), permutation_type="pairings",
            n_resamples=np.inf, vectorized=True,
        )  # fmt: skip
        p = float(exact.pvalue)
    return Coefficient(float(found.statistic), *_bootstrap(_rank_correlation, x, y), p)


def _rank_correlation(x: Array, y: Array, axis: int = -1) -> Array:
    from scipy import stats

    ranks = [stats.rankdata(each, axis=axis) for each in (x, y)]
    a, b = (each - each.mean(axis, keepdims=True) for each in ranks)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(axis) / np.sqrt((a * a).sum(axis) * (b * b).sum(axis))


def decision_accuracy(x: Array, y: Array, mode: Mode = "max") -> Coefficient:
    """Share of pairs of models that the metric orders in the same way as the scores: in [0, 1], .5 by chance.

    Args:
        x: the metric.
        y: the scores.
        mode: whether high or low values of the metric are better.

    >>> decision_accuracy(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])).value
    0.6666666666666666
    """
    x = x if mode == "max" else -x
    value = float(_ordered(x, y)) if len(x) > 1 else math.nan
    if not math.isfinite(value):
        return UNDEFINED
    return Coefficient(value, *(_bootstrap(_ordered, x, y) if len(x) >= _MIN_MODELS else (None, None)))


def _ordered(x: Array, y: Array, axis: int = -1) -> Array:
    x, y = np.moveaxis(x, axis, -1), np.moveaxis(y, axis, -1)
    of_metric = np.sign(x[..., :, None] - x[..., None, :])
    of_score = np.sign(y[..., :, None] - y[..., None, :])
    differ = (of_score != 0).sum((-1, -2))
    right = ((1 + of_metric * of_score) / 2 * (of_score != 0)).sum((-1, -2))
    with np.errstate(invalid="ignore", divide="ignore"):
        return right / differ


def _bootstrap(statistic: Callable[..., Array], x: Array, y: Array) -> tuple[float | None, float | None]:
    """Percentiles over resampled models. Draws in which the statistic is undefined are left out."""
    random = np.random.default_rng(0)
    size = max(1, _BATCH // len(x) ** 2)
    drawn = np.concatenate(
        [
            statistic(x[chosen], y[chosen])
            for chosen in np.split(random.integers(len(x), size=(_RESAMPLES, len(x))), range(size, _RESAMPLES, size))
        ]
    )
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < _RESAMPLES / 2:
        return None, None
    low, high = np.quantile(drawn, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected for their number. The probability of any false finding stays below the level (Holm, 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    stepped = np.asarray(p, dtype=float)[order] * (len(p) - np.arange(len(p)))
    found = np.empty(len(p))
    found[order] = np.minimum(np.maximum.accumulate(stepped), 1.0) if len(p) else []
    return found.tolist()


def smallest_significant(number: int, alpha: float = ALPHA) -> float | None:
    """The smallest |r| over `number` models that has p < alpha, two-sided; None for fewer than 3 models.

    >>> round(smallest_significant(12), 3)
    0.576
    """
    from scipy import stats

    if number < _MIN_MODELS:
        return None
    t = float(stats.t.ppf(1 - alpha / 2, number - 2))
    return t / math.sqrt(number - 2 + t * t)


def power_of(r: float, number: int, alpha: float = ALPHA) -> float | None:
    """Probability of finding a true correlation with this number of models, by Fisher's z; None for fewer than 4.

    Args:
        r: the true correlation; both numbers are normally distributed.
        number: number of models.
        alpha: level of the two-sided test.
    """
    from scipy import stats

    limit = smallest_significant(number, alpha)
    if number < 4 or limit is None:
        return None
    # The second term is the bias of z.
    shift, scale = math.atanh(r) + r / (2 * (number - 1)), math.sqrt(number - 3)
    bound = math.atanh(limit)
    return float(stats.norm.cdf((shift - bound) * scale) + stats.norm.cdf((-shift - bound) * scale))


def metrics_to_test(entries: Sequence[Entry], asked: Sequence[str] | None = None) -> list[str]:
    """The names of all logged metrics. Errors are left out, and so are second names of the same metric.

    Args:
        entries: the points.
        asked: names of metrics or features; None means all.

    Raises:
        ValueError: no point has such a metric.
    """
    known = list(dict.fromkeys(name for entry in entries for name in metrics_of(entry.point)))
    if asked:
        return list(dict.fromkeys(resolve_metric(name, known) for name in asked))
    found: dict[tuple[float | None, ...], str] = {}
    scalars = [entry.point.scalars() for entry in entries]
    for name in known:
        column = tuple(each.get(name) for each in scalars)
        if not name.endswith(_NOT_METRICS) and len({value for value in column if value is not None}) > 1:
            found.setdefault(column, name)
    return list(found.values())


def correlate(
    entries: Sequence[Entry], scores: Sequence[float], metrics: Sequence[str] | None = None
) -> list[MetricCorrelation]:
    """Correlate metrics of models with scores.

    Args:
        entries: one point of each model.
        scores: [n] score of each model.
        metrics: logged names of metrics, by default all (`metrics_to_test`).

    Raises:
        ValueError: no point has such a metric.
    """
    from scipy import stats

    names = metrics_to_test(entries, metrics)
    table = [entry.point.scalars() for entry in entries]
    y = np.array(scores, dtype=float)
    loss = np.array([row.get(loss_control(entries)) for row in table], dtype=float)
    size = np.array([_size(entry) for entry in entries])
    families = np.array([entry.head.get("family") or "" for entry in entries])
    found = []
    for name in names:
        x = np.array([row.get(name) for row in table], dtype=float)
        there = np.isfinite(x)
        xs, ys = x[there], y[there]
        kin = there & (families != "")
        means = _family_means(x[kin], y[kin], families[kin])
        found.append(
            MetricCorrelation(
                metric=name,
                num_models=len(xs),
                pearson=pearson(xs, ys),
                spearman=spearman(xs, ys),
                accuracy=decision_accuracy(xs, ys, better_direction(name) or "max"),
                given_loss=_given(xs, ys, loss[there, None]),
                given_size=_given(xs, ys, size[there, None]),
                given_both=_given(xs, ys, np.stack([loss, size], axis=1)[there]),
                within=_within(x[kin], y[kin], families[kin]),
                across=pearson(*means),
                families=len(means[0]),
            )
        )
    tested = [index for index, each in enumerate(found) if each.pearson.p is not None]
    p = [each.pearson.p for each in found if each.pearson.p is not None]
    corrected = zip(tested, holm(p), stats.false_discovery_control(p) if p else [], strict=True)
    for index, of_holm, of_fdr in corrected:
        found[index] = replace(found[index], p_holm=of_holm, p_fdr=float(of_fdr))
    return found


def loss_control(entries: Sequence[Entry]) -> str:
    """The name of the number used as the loss: bits per byte if probes differ and all points have it, else the loss."""
    probes = {entry.point.settings.get("probe") for entry in entries}
    known = all(entry.point.bits_per_byte is not None for entry in entries)
    return "bits_per_byte" if len(probes) > 1 and known else "loss"


def _size(entry: Entry) -> float:
    number = entry.head.get("num_parameters")
    return math.log(number) if number else math.nan


def _given(x: Array, y: Array, controls: Array) -> Coefficient:
    there = np.isfinite(controls).all(1)
    return partial(x[there], y[there], controls[there])


def _within(x: Array, y: Array, families: Array) -> Coefficient:
    """Correlation pooled over families of at least two models, after removing the means of families."""
    names, inverse, counts = np.unique(families, return_inverse=True, return_counts=True)
    keep = counts[inverse] > 1
    several = int((counts > 1).sum())
    if several == 0 or len(names) < 2:
        return UNDEFINED  # with one family, the plain correlation is the one within families
    dummies = np.unique(inverse[keep])[None] == inverse[keep][:, None]
    if several == 1:
        return pearson(x[keep], y[keep])
    return partial(x[keep], y[keep], dummies[:, 1:].astype(float))


def _family_means(x: Array, y: Array, families: Array) -> tuple[Array, Array]:
    names = np.unique(families)
    means = [(x[families == name].mean(), y[families == name].mean()) for name in names]
    first, second = np.array(means).reshape(-1, 2).T
    return first, second


def conclusion_of(found: Sequence[MetricCorrelation], entries: Sequence[Entry], score: str) -> str:
    """A few sentences that say what can be concluded from so few models."""
    number = len(entries)
    tests = sum(each.pearson.p is not None for each in found)
    least = smallest_significant(number)
    if number < 4 or least is None or not tests:
        return (
            f"There are {number} models and {tests} metric{'s' if tests != 1 else ''} on which they differ. "
            f"Nothing can be concluded about what correlates with {score}."
        )
    corrected = smallest_significant(number, ALPHA / tests)
    power = power_of(PUBLISHED_R, number)
    told = [f"With {number} models, |r| must be at least {least:.2f} to differ significantly from 0 (p < .05)."]
    if tests > 1:
        told.append(f"After Holm's correction for {tests} tests, the largest |r| must be at least {corrected:.2f}.")
    told.append(
        f"The published r of optimality and MMLU-Pro is {PUBLISHED_R:.2f}. If the true r were that large, a single "
        f"test would find it with a probability of {power:.2f}."
    )
    told += _of_tests(found, score, loss_control(entries).replace("_", " "))
    of_course = {entry.course.name for entry in entries}
    if len(of_course) < number:
        told.append(
            f"The {number} points belong to only {len(of_course)} models. Points of one training are not independent, "
            "so p-values and intervals are too small."
        )
    return " ".join(told)


def _of_tests(found: Sequence[MetricCorrelation], score: str, loss: str) -> list[str]:
    """Sentences: which metrics correlate with the score after correction, and which still do given the loss."""
    sure = [each for each in found if each.p_holm is not None and each.p_holm < ALPHA]
    if not sure:
        return [
            "After Holm's correction, no r differs significantly from 0: nothing can be concluded about what "
            f"correlates with {score}."
        ]
    names = _some(
        [f"{each.metric} (r {each.pearson.value:+.2f})" for each in sorted(sure, key=lambda each: each.p_holm or 0.0)]
    )
    told = [f"After Holm's correction, these correlations differ significantly from 0: {names}."]
    given = [(each.metric, each.given_loss.p) for each in found if each.given_loss.p is not None]
    corrected = holm([p for _, p in given])
    kept = [metric for (metric, _), p in zip(given, corrected, strict=True) if p < ALPHA]
    if kept:
        told.append(f"Given the {loss}, these still do (Holm's correction for {len(given)} tests): {_some(kept)}.")
    elif given:
        told.append(
            f"Given the {loss}, no correlation differs significantly from 0 (Holm's correction for {len(given)} tests)."
            f" So the {loss} alone may explain what the metrics tell about {score}."
        )
    return told


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
