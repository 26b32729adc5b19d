"""Compare several models: choose a point of each, check that they can be compared, and rank the models."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ib_callback.analysis.courses import Course, point_at
from ib_callback.common.messages import warn
from ib_callback.results.measurement import ADVICE, Measurement, incomparable_settings, metrics_of
from ib_callback.results.metrics import better_direction, resolve_metric
from ib_callback.results.trajectory import aligned, cell
from ib_callback.results.uncertainty import difference

# Settings in which different models naturally differ.
_OF_THE_MODEL = ("layers", "dtype", "loss")
_COLUMNS = ("loss", "bits_per_byte")
_OF_ORDER = ("complexity", "expressivity", "optimality", "distance_to_bound", "optimality_null", "optimality_local")


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One point of one model.

    Attributes:
        name: name for display; it includes the step if a model has several points in the comparison.
        course: the course to which the point belongs.
        point: the measurement.
        head: the columns before its numbers in a table: model, revision, family, num_parameters, tokens, step.
    """

    name: str
    course: Course
    point: Measurement
    head: dict[str, Any]

    @property
    def family(self) -> str:
        """The family of the model, or the model's own name if no family is known."""
        return self.head.get("family") or self.course.name


def entries_of(courses: Sequence[Course], steps: Sequence[str] = ("last",)) -> list[Entry]:
    """The points to compare: for each course, the points at the given steps that it has.

    Args:
        courses: runs and models.
        steps: steps in the form that `point_at` takes.

    Raises:
        ValueError: no course has any of these steps.

    Warns:
        RuntimeWarning: a course has none of the steps; the message says why.
    """
    found: list[Entry] = []
    reasons = []
    for course in courses:
        points: list[Measurement] = []
        for step in dict.fromkeys(steps):
            try:
                points.append(point_at(course, step))
            except ValueError as error:
                reasons.append(f"{course.name} lacks the chosen point: {error}")
        points = list({id(point): point for point in points}.values())
        for point in points:
            head = next(head for head, other in course.points if other is point)
            found.append(Entry(name=_name(course, point, len(points)), course=course, point=point, head=head))
    if not found:
        raise ValueError(reasons[0])
    for reason in reasons:
        warn(reason)
    return found


def _name(course: Course, point: Measurement, number: int) -> str:
    if number == 1:
        return course.name
    if point.step == 0:
        return f"{course.name}, untrained"
    return course.name if point.step is None else f"{course.name}, step {point.step:,}"


def check_comparable(entries: Sequence[Entry]) -> list[str]:
    """Check that all points were measured on the same documents with the same settings.

    Args:
        entries: the points to compare.

    Returns:
        Cautions about different tokenizers, numbers of layers or precisions.

    Raises:
        ValueError: documents or settings differ; the message names the first two points that differ, and the cure.
    """
    first = entries[0]
    cautions: dict[str, None] = {}
    retokenised: dict[str, None] = {}
    for other in entries[1:]:
        differing = incomparable_settings(first.point, other.point)
        documents = [entry.point.settings.get("documents") for entry in (first, other)]
        if "probe" in differing and (None in documents or documents[0] != documents[1]):
            raise ValueError(
                f"expected measurements of the same documents, got {first.name} on {_probe_of(first)} and "
                f"{other.name} on {_probe_of(other)}. Measure both with one command (ib-callback measure MODEL MODEL "
                "--documents FILE), or leave one out with --model"
            )
        if differing.pop("probe", None):
            retokenised[other.course.name] = None
            # Texts of a feature are tokenised differently too; the same caution covers this.
            differing = {name: text for name, text in differing.items() if not name.startswith("feature_probes")}
        of_model = [name for name in differing if re.split(r"[.\[]", name)[0] in _OF_THE_MODEL]
        of_feature = [name for name in differing if name.startswith("feature_probes")]
        hard = [text for name, text in differing.items() if name not in (*of_model, *of_feature)]
        if _behind_norm(first) != _behind_norm(other):
            hard.append(f"layers: {_kind(first)} vs {_kind(other)}")
        if hard:
            raise ValueError(
                f"expected measurements with the same settings, got {first.name} and {other.name} with different ones: "
                f"{'; '.join(hard)}. Measure both with one command (ib-callback measure MODEL MODEL), or leave one out "
                "with --model"
            )
        numbers = [len(entry.point.layers) for entry in (first, other)]
        if numbers[0] != numbers[1]:
            cautions["The models have different numbers of layers. Each number is a mean over all layers."] = None
        if any(name.startswith("dtype") for name in of_model):
            cautions["The models were measured in different precisions (dtype)."] = None
        for name in of_feature:
            feature = name.partition(".")[2]
            cautions[f"Information about {feature} was measured on different texts, so it cannot be compared."] = None
    if not retokenised:
        return list(cautions)
    others = [*retokenised]
    names = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
    told = (
        f"{first.course.name} and {names} read the same documents, but with different tokenizers or cut at different "
        "lengths. "
    )
    told += f"{ADVICE}."
    return [told, *cautions]


def _probe_of(entry: Entry) -> str:
    settings = entry.point.settings
    documents = settings.get("documents")
    probe = f"probe {str(settings.get('probe'))[:8]}…"
    return probe if documents is None else f"{probe} (documents {str(documents)[:8]}…)"


def _behind_norm(entry: Entry) -> bool:
    """Whether the last layer is after the final norm, as with `layers="hidden_states"`."""
    return bool(entry.point.layers) and entry.point.layers[-1].endswith(":final")


def _kind(entry: Entry) -> str:
    return "hidden_states" if _behind_norm(entry) else f"{', '.join(entry.point.layers[-2:])}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Models ranked by a number.

    Attributes:
        by: name of the number by which the models are ranked.
        rows: one row for each model, best first; models without the number come last.
        cautions: warnings for the reader.
        conclusion: what can be concluded.
    """

    by: str
    rows: list[dict[str, Any]]
    cautions: list[str]
    conclusion: str

    def table(self) -> str:
        """The ranking as an aligned table."""
        names = [name for name in self.rows[0] if any(row[name] is not None for row in self.rows)]
        texts = ("model", "family", "stage", "differs from the next")
        lines = [[name.rpartition("/")[2].replace("_", " ") for name in names]]
        lines += [[_text(row[name]) for name in names] for row in self.rows]
        return "\n".join(aligned(lines, [str.ljust if name in texts else str.rjust for name in names]))


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else cell(value)


def compared(entries: Sequence[Entry], *, order: str | None = None, by: str | None = None) -> Comparison:
    """Rank models by their distance to the bound, or by another number.

    Args:
        entries: points that can be compared (`check_comparable`).
        order: n-gram order of the columns, by default the primary one of the first point.
        by: logged name of the number to rank by; by default the distance to the bound at that order.

    Raises:
        ValueError: settings or documents do not allow a comparison, or there is no such number.
    """
    cautions = check_comparable(entries)
    first = entries[0].point
    primary = order or first.primary or ""
    if not any(primary in entry.point for entry in entries):
        raise ValueError(f"--order: expected one of {', '.join(first.orders)}, got {primary!r}")
    known = list(dict.fromkeys(name for entry in entries for name in metrics_of(entry.point)))
    by = resolve_metric(by or f"{primary}/distance_to_bound", known)
    values = [entry.point.scalars().get(by) for entry in entries]
    sign = -1.0 if better_direction(by) == "max" else 1.0
    places = sorted(range(len(entries)), key=lambda i: (values[i] is None, sign * (values[i] or 0.0)))
    ranked = [entries[place] for place in places]
    rows = []
    for rank, (entry, below) in enumerate(itertools.zip_longest(ranked, ranked[1:]), 1):
        scalars = entry.point.scalars()
        head = {name: entry.head.get(name) for name in ("family", "stage", "num_parameters", "tokens", "step")}
        numbers = {}
        for name in (*_COLUMNS, *(f"{primary}/{each}" for each in _OF_ORDER), by):
            numbers[name] = scalars.get(name)
            if name == by:
                numbers.setdefault(f"{by}_se", scalars.get(f"{by}_se"))
        apart = None if below is None else _apart(entry, below, by)
        rank_or_none = None if scalars.get(by) is None else rank
        rows.append({"rank": rank_or_none, "model": entry.name, **head, **numbers, "differs from the next": apart})
    return Comparison(by=by, rows=rows, cautions=cautions, conclusion=_conclusion(ranked, rows, by, primary))


def _apart(entry: Entry, below: Entry, by: str) -> str | None:
    """Whether two neighbours in the ranking differ by more than their errors; None if errors are unknown."""
    try:
        found = difference(entry.point, below.point, by)
    except ValueError:
        return None
    if found.contradicted_by:
        return "not above chance"
    return "yes" if found.significant else "not resolved"


def _conclusion(ranked: Sequence[Entry], rows: Sequence[dict[str, Any]], by: str, order: str) -> str:
    placed = [row for row in rows if row["rank"] is not None]
    if len(placed) < 2:
        return "Fewer than two models have this number, so there is nothing to compare."
    first = placed[0]
    told = [f"{first['model']} ranks first of {len(placed)} models by {by} ({cell(first[by])})."]
    apart = [row["differs from the next"] for row in placed[:-1]]
    if all(each is None for each in apart):
        told.append("No standard errors were measured (--standard-errors), so the order may be chance.")
    elif unresolved := sum(each not in (None, "yes") for each in apart):
        told.append(
            f"{unresolved} of {len(apart)} pairs of neighbours do not differ clearly: their difference is within the "
            "error, or not confirmed above chance."
        )
    untrained = [entry.name for entry in ranked if entry.point.step == 0]
    local = {row["model"]: row[f"{order}/optimality_local"] for row in placed}
    trained_best = max((row["rank"] for row in placed if row["model"] not in untrained), default=0)
    if any(row["model"] in untrained and row["rank"] < trained_best for row in placed):
        told.append(
            "An untrained model ranks above a trained one, so this number alone does not say which model is good. "
            "Local numbers, above the document baseline, tell the two apart (docs/reading-the-numbers.md)."
        )
    elif all(value is not None for value in local.values()):
        best = max(local, key=lambda name: local[name] or 0.0)
        if best != first["model"]:
            told.append(
                f"By local optimality {best} ranks first. So the order depends on what chance and the document add."
            )
    return " ".join(told)
