"""Scores of models from elsewhere, such as benchmarks, and the measured point to which each belongs."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ib_callback.analysis.comparison import Entry
from ib_callback.analysis.courses import Course, point_at
from ib_callback.common import json_lines
from ib_callback.results.metrics import did_you_mean

# These revisions mean the main branch of the hub, as no revision does.
_MAIN = ("", "main", "None")
_STEP = re.compile(r"(?:^|step[-_]?|checkpoint-)(\d+)(?:$|[-_])")


@dataclass(frozen=True, kw_only=True)
class Score:
    """One score of one model.

    Attributes:
        model: name of the model in the evaluation.
        revision: the checkpoint; None for the published model, or the one at the end of training.
        value: the score, in the unit of the benchmark.
        source: the file with the score.
    """

    model: str
    revision: str | None
    value: float
    source: Path

    @property
    def name(self) -> str:
        """Model and revision."""
        return self.model if self.revision is None else f"{self.model}@{self.revision}"


def load_scores(path: Path, name: str) -> list[Score]:
    """Load the scores of models on a benchmark.

    Args:
        path: a .csv table, a file `results_*.json` of lm-eval (the LM Evaluation Harness), or a folder. A table has a
            column `model`, optionally a column `revision`, and one column for each score. All such files in a folder
            are read, at any depth.
        name: name of the column. For lm-eval it is the task, or `task/metric` if the task has several metrics, or
            `task/metric,filter`.

    Raises:
        ValueError: there is no score of that name, or the file is of another kind.
        OSError: a file cannot be read.
    """
    files = files_of_scores(path)
    if not files:
        raise ValueError(f"{path}: expected .csv tables or results_*.json files of lm-eval in this folder, got none")
    if not path.is_dir() and path.suffix not in (".csv", ".json"):
        raise ValueError(f"{path}: expected a .csv table, a results_*.json file of lm-eval, or a folder of such files")
    found: list[Score] = []
    known: dict[str, None] = {}
    for file in files:
        read = _from_csv if file.suffix == ".csv" else _from_lm_eval
        scores, names = read(file, name)
        found += scores
        known |= dict.fromkeys(names)
    if not found:
        raise ValueError(
            f"--score: expected one of {', '.join(known) or 'none'}, got {name!r}{did_you_mean(name, known)}"
        )
    # If a model was evaluated again, the last score counts. Files are in order of time, because lm-eval ends their
    # names with the time.
    return list({(score.model, score.revision): score for score in found}.values())


def files_of_scores(path: Path) -> list[Path]:
    """The files that `load_scores` reads: all known files of a folder, otherwise the path itself."""
    if not path.is_dir():
        return [path]
    return sorted([*path.rglob("*.csv"), *path.rglob("results_*.json")], key=lambda file: (file.name, file))


def _from_csv(file: Path, name: str) -> tuple[list[Score], list[str]]:
    with file.open(newline="", encoding="utf-8-sig") as stream:
        table = csv.DictReader(stream, skipinitialspace=True)
        columns = [column.strip() for column in table.fieldnames or []]
        table.fieldnames = columns
        if "model" not in columns:
            raise ValueError(f"{file}: expected a column named model, got {', '.join(columns) or 'no header'}")
        scores = []
        for number, row in enumerate(table, 2):
            text = (row.get(name) or "").strip()
            if text.casefold() in ("", "-", "nan", "na", "n/a"):
                continue
            try:
                value = float(text)
            except ValueError:
                raise ValueError(f"{file}:{number}: expected a number as {name}, got {text!r}") from None
            if not math.isfinite(value):
                raise ValueError(
                    f"{file}:{number}: expected a finite number as {name}, got {text!r}. Leave the cell empty if "
                    "there is no score"
                )
            scores.append(
                Score(
                    model=(row["model"] or "").strip(),
                    revision=_revision(row.get("revision")),
                    value=value,
                    source=file,
                )
            )
    return scores, [column for column in columns if column not in ("model", "revision")]


def _from_lm_eval(file: Path, name: str) -> tuple[list[Score], list[str]]:
    try:
        content = json_lines.parsed(file.read_bytes())
        results = {**content["results"], **(content.get("groups") or {})}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{file}: expected results of lm-eval, {{"results": {{task: …}}}}, got {error!r}') from error
    task, _, metric = name.partition("/")
    if name in results:  # the name of a task may contain a slash
        task, metric = name, ""
    if task not in results:
        return [], list(results)
    value = _value_of(results[task], metric, f"{file}: {task}")
    if value is None:
        return [], list(results)
    model, revision = _evaluated(content, file)
    return [Score(model=model, revision=revision, value=value, source=file)], list(results)


def _value_of(result: Mapping[str, Any], metric: str, where: str) -> float | None:
    """The number of a task: the given metric; without a metric, the only number, or else the accuracy."""
    numbers = {
        key: float(value)
        for key, value in result.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        and "stderr" not in key and "," in key
    }  # fmt: skip
    named = [key for key in numbers if key == metric or key.partition(",")[0] == metric]
    if not metric:
        named = [*numbers] if len(numbers) == 1 else [key for key in numbers if key.partition(",")[0] == "acc"]
    if len(named) == 1:
        return numbers[named[0]]
    if not numbers:
        return None
    raise ValueError(
        f"{where}: expected --score TASK/METRIC with one of the metrics {', '.join(numbers)}, got "
        f"{metric or 'no metric'!r}"
    )


def _evaluated(content: Mapping[str, Any], file: Path) -> tuple[str, str | None]:
    """The model and revision in a file of lm-eval."""
    config = content.get("config") or {}
    arguments = config.get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(part.partition("=")[::2] for part in arguments.split(","))
    model = content.get("model_name") or arguments.get("pretrained") or arguments.get("model")
    if not model:
        raise ValueError(f"{file}: expected a model_name, or pretrained= in the model_args, got neither")
    return str(model), _revision(arguments.get("revision") or config.get("model_revision"))


def _revision(text: Any) -> str | None:
    plain = str(text or "").strip()
    return None if plain in _MAIN else plain


@dataclass(frozen=True, kw_only=True)
class Matched:
    """Points with their scores.

    Attributes:
        entries: the points.
        values: the score of each point.
        without_score: measured models without a score.
        without_point: scores without a measured point, with the reason.
    """

    entries: list[Entry]
    values: list[float]
    without_score: list[str]
    without_point: list[str]


def match_scores(courses: Sequence[Course], scores: Sequence[Score]) -> Matched:
    """Find the measured point of each score: the point of its revision, or the last one.

    Names match regardless of case. If one of two names lacks the owner (`OWNER/NAME`), they match if only one model has
    that name. A revision matches the revision in the results file, or names a step: `step1000`, `checkpoint-1000`.

    Args:
        courses: measured models.
        scores: the scores.
    """
    entries: list[Entry] = []
    values: list[float] = []
    lost: list[str] = []
    used: set[str] = set()
    for score in scores:
        found, reason = _course_of(score.model, courses)
        if found is None:
            lost.append(f"{score.name} ({reason})")
            continue
        entry = _entry_of(found, score)
        if entry is None:
            lost.append(f"{score.name} (no point of this revision)")
            continue
        used.add(found.name)
        if any(other.point is entry.point for other in entries):
            lost.append(f"{score.name} (its point already has a score)")
            continue
        entries.append(entry)
        values.append(score.value)
    without = [course.name for course in courses if course.name not in used]
    return Matched(entries=entries, values=values, without_score=without, without_point=lost)


def _course_of(model: str, courses: Sequence[Course]) -> tuple[Course | None, str]:
    wanted = _plain(model)
    same = [course for course in courses if wanted in _names_of(course)]
    if not same:
        last = wanted.rpartition("/")[2]
        tails = {course.name: [name.rpartition("/")[2] for name in _names_of(course)] for course in courses}
        # Two owners may each have a model of this name.
        owned = "/" in wanted and [name for course in courses for name in _names_of(course) if "/" in name]
        same = [course for course in courses if last in tails[course.name]]
        if owned:
            same = [course for course in same if any("/" not in name for name in _names_of(course))]
    if len(same) == 1:
        return same[0], ""
    return None, "not measured" if not same else f"the name fits {' and '.join(course.name for course in same)}"


def _names_of(course: Course) -> list[str]:
    """The names of a course: its own name, that of its model and, for a run, each folder in its name."""
    models = {head.get("model") for head, _ in course.points}
    folders = course.name.split("/") if course.path is not None else []
    return list(dict.fromkeys(_plain(str(name)) for name in (course.name, *models, *folders) if name))


def _plain(name: str) -> str:
    # lm-eval writes OWNER__NAME where a slash is not possible.
    return name.replace("__", "/").rstrip("/").casefold()


def _entry_of(course: Course, score: Score) -> Entry | None:
    if score.revision is None:
        point = point_at(course, "last")
    else:
        step = _STEP.search(score.revision)
        measured = [(head, point) for head, point in course.points if point.orders]
        points = [point for head, point in measured if head.get("revision") == score.revision]
        points = points or [point for _, point in measured if step is not None and point.step == int(step[1])]
        if not points:
            return None
        point = points[0]
    head = next(head for head, other in course.points if other is point)
    name = course.name if score.revision is None else f"{course.name}@{score.revision}"
    return Entry(name=name, course=course, point=point, head=head)
