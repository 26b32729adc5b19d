"""`ib-callback compare`: many models in one plane, changes between two models, and the layers of models."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ib_callback.analysis.comparison import Entry, check_comparable, compared, entries_of
from ib_callback.analysis.courses import Course, point_at
from ib_callback.analysis.pairs import changes, conclusion_of_changes, table_of_changes
from ib_callback.analysis.profile import conclusion_of_profiles, rows_of_profiles, table_of_profiles
from ib_callback.cli._command import (
    NOT_ALL,
    add_picture_arguments,
    add_run_arguments,
    add_table_arguments,
    check_outputs,
    check_picture_options,
    check_useless,
    courses_of,
    examples,
    finish,
    guarded,
    plain_metric,
)
from ib_callback.plot.models import Placed, models_in_plane
from ib_callback.plot.planes import NAMES
from ib_callback.plot.profile import layer_profile

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_compare_command(commands: Any) -> None:
    """Add `compare` to the parser of `ib-callback`."""
    parser = commands.add_parser(
        "compare",
        help="compare many models: ranked, in pairs, or layer by layer",
        description=(
            "Compare models that were measured on the same documents with the same settings. By default they are "
            "ranked by their distance to the bound. --pair shows what changed from one model to another, with "
            "intervals. --profile shows their layers."
        ),
        **examples(
            "ib-callback compare results.jsonl -o models.png",
            "ib-callback compare results.jsonl --pair OLMo-2-1B:OLMo-2-1B-DPO --metric preference/ratio",
            "ib-callback compare results.jsonl --profile --step 0 --step last --order token -o layers.png",
            "ib-callback compare results.jsonl --pair SmolLM2@0:SmolLM2",
        ),
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--step", action="append", metavar="N|last|best",
        help="point of each model, by default the last; best: the highest optimality among points that can be "
        "selected; repeatable",
    )  # fmt: skip
    parser.add_argument("--order", action="append", metavar="NAME", help="n-gram order; repeatable")
    parser.add_argument("--plane", action="append", choices=NAMES, help="plane of the picture; repeatable")
    parser.add_argument("--by", metavar="METRIC", help="metric to rank by, by default the distance to the bound")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--pair", action="append", metavar="BASE:POST",
        help="show what changed from BASE to POST; MODEL@STEP is one point of a model; repeatable",
    )  # fmt: skip
    what.add_argument("--profile", action="store_true", help="show entropy, information and ratio layer by layer")
    parser.add_argument(
        "--metric", action="append", metavar="NAME",
        help="metric for --pair, named as in the logs; repeatable; by default ratio and information of each feature, "
        "and the main numbers of the primary order",
    )  # fmt: skip
    add_picture_arguments(parser)
    add_table_arguments(parser, row="model, change or layer")
    parser.set_defaults(run=guarded(_compare))


def _compare(options: argparse.Namespace) -> int:
    _check_options(options)
    check_outputs(options, options.runs)
    courses, status = courses_of(options)
    if options.by is not None:
        options.by = plain_metric(options.by, courses)
    if options.metric is not None:
        options.metric = [plain_metric(metric, courses) for metric in options.metric]
    if options.pair:
        return _pairs(options, courses, status)
    entries = entries_of(courses, options.step or ("last",))
    if len({entry.course.name for entry in entries}) < len(courses):
        status = NOT_ALL
    return (_profile if options.profile else _rank)(options, entries, status)


def _check_options(options: argparse.Namespace) -> None:
    """Check that no option is given that would be ignored."""
    if not options.pair:
        check_useless(options, ["metric"], "without --pair", "Give --pair BASE:POST, or --by METRIC to rank")
    if options.pair or options.profile:
        what = "pair" if options.pair else "profile"
        check_useless(options, ["by"], f"with --{what}", "Leave one of the two out")
    if options.pair:
        check_useless(options, ["step"], "with --pair", "Name points as MODEL@STEP instead")
    if options.profile:
        check_useless(options, ["plane"], "with --profile", "Leave one of the two out")
    check_picture_options(options, ["plane", "order"] if options.pair else ["plane"])


def _rank(options: argparse.Namespace, entries: Sequence[Entry], status: int) -> int:
    found = compared(entries, order=options.order[0] if options.order else None, by=options.by)
    told = [found.table(), *_beware(found.cautions), found.conclusion]
    return finish(options, "\n".join(told), found.rows, _planes(options, entries, found.cautions), status)


def _pairs(options: argparse.Namespace, courses: Sequence[Course], status: int) -> int:
    told, rows, cautions, entries = [], [], [], []
    for text in options.pair:
        base, post = _pair(text, courses)
        found, beware = changes(base, post, options.metric)
        told += [f"{base.name} -> {post.name}", table_of_changes(found), *_beware(beware)]
        told += [conclusion_of_changes(base.name, post.name, found), ""]
        rows += [{"pair": text, "model_base": base.name, "model_post": post.name, **asdict(each)} for each in found]
        cautions += beware
        entries += [base, post]
    return finish(options, "\n".join(told[:-1]), rows, _planes(options, entries, cautions), status)


def _profile(options: argparse.Namespace, entries: Sequence[Entry], status: int) -> int:
    cautions = check_comparable(entries)
    rows = rows_of_profiles(entries, options.order)
    by_model = {entry.name: [row for row in rows if row["model"] == entry.name] for entry in entries}
    told = [table_of_profiles(entries, options.order), *_beware(cautions)]
    told.append(conclusion_of_profiles(entries, options.order))
    return finish(
        options, "\n".join(told), rows, lambda: layer_profile(by_model, notes=cautions, theme=options.theme), status
    )


def _pair(text: str, courses: Sequence[Course]) -> tuple[Entry, Entry]:
    """Both sides of BASE:POST; the names may contain colons too."""
    known = {course.name: course for course in courses}
    for place in [index for index, letter in enumerate(text) if letter == ":"]:
        sides = [_side(side, known) for side in (text[:place], text[place + 1 :])]
        if None not in sides:
            base, post = (_entry(*side) for side in sides if side)
            return base, post
    raise ValueError(
        f"--pair: expected BASE:POST with two of the models {', '.join(known)}, got {text!r}. For another point than "
        "the last, add @STEP to the name"
    )


def _side(text: str, known: dict[str, Course]) -> tuple[Course, str] | None:
    name, _, step = text.rpartition("@")
    if text in known:
        return known[text], "last"
    return (known[name], step) if name in known and step else None


def _entry(course: Course, step: str) -> Entry:
    point = point_at(course, step)
    head = next(head for head, other in course.points if other is point)
    return Entry(name=course.name if step == "last" else f"{course.name}@{step}", course=course, point=point, head=head)


def _planes(options: argparse.Namespace, entries: Sequence[Entry], cautions: Sequence[str]) -> Callable[[], Figure]:
    models = [
        Placed(name=entry.name, family=entry.family, point=entry.point, course=list(entry.course.trajectory))
        for entry in {entry.name: entry for entry in entries}.values()
    ]
    notes = list(dict.fromkeys(cautions))
    return lambda: models_in_plane(models, orders=options.order, planes=options.plane, notes=notes, theme=options.theme)


def _beware(cautions: Sequence[str]) -> list[str]:
    return [f"Caution: {caution}" for caution in cautions]
