"""`ib-callback correlate`: correlate metrics of many models with their scores on a benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ib_callback.analysis.comparison import Entry, check_comparable
from ib_callback.analysis.correlation import Coefficient, MetricCorrelation, conclusion_of, correlate, loss_control
from ib_callback.analysis.scores import files_of_scores, load_scores, match_scores
from ib_callback.cli._command import (
    add_picture_arguments,
    add_run_arguments,
    add_table_arguments,
    check_outputs,
    courses_of,
    examples,
    finish,
    guarded,
    positive,
)
from ib_callback.plot.scatter import Panel, scatter
from ib_callback.results.trajectory import aligned

SORTS = ("pearson", "spearman", "accuracy", "given_loss", "given_size", "within", "name")
# Metrics that are drawn by default if they were measured, together with the ratio of each feature.
_DRAWN = ("complexity", "expressivity", "optimality", "loss")
_MOST_DRAWN = 9


def add_correlate_command(commands: Any) -> None:
    """Add `correlate` to the parser of `ib-callback`."""
    parser = commands.add_parser(
        "correlate",
        help="how metrics of models correlate with their scores on a benchmark",
        description="Correlate every metric of many models with a score from elsewhere: Pearson, Spearman, and the "
        "share of pairs of models that the metric orders as the scores do, with 95 % intervals; p corrected for "
        "testing several; partial correlations given loss and size; within and across families.",
        **examples(
            "ib-callback correlate results.jsonl scores.csv --score mmlu_pro -o scatter.png",
            "ib-callback correlate results.jsonl lm_eval_output/ --score mmlu_pro/exact_match --csv correlations.csv",
            "ib-callback correlate results.jsonl scores.csv --score mmlu_pro --metric preference/ratio",
            more="SCORES is a table with the columns model, perhaps revision, and one for each score; a results_*.json "
            "of lm-eval; or a folder of these.",
        ),
    )
    add_run_arguments(parser)
    parser.add_argument("scores", metavar="SCORES", help="a table .csv, lm-eval's results_*.json, or a folder of these")
    parser.add_argument(
        "--score", required=True, metavar="NAME", help="the column; of lm-eval TASK, TASK/METRIC or TASK/METRIC,FILTER"
    )
    parser.add_argument(
        "--metric", action="append", metavar="NAME",
        help="as logged, or a feature; may be given several times; by default all. p is corrected for those tested",
    )  # fmt: skip
    parser.add_argument("--sort", choices=SORTS, default="pearson", help="by the size of what")
    parser.add_argument("--top", type=positive, default=20, metavar="N", help="how many the table on the screen has")
    add_picture_arguments(parser)
    add_table_arguments(parser, row="a metric")
    parser.set_defaults(run=guarded(_correlate))


def _correlate(options: argparse.Namespace) -> int:
    check_outputs(options, [*options.runs, *files_of_scores(Path(options.scores))])
    courses, status = courses_of(options)
    matched = match_scores(courses, load_scores(Path(options.scores), options.score))
    if not matched.entries:
        raise ValueError(
            f"expected scores of the measured models {', '.join(course.name for course in courses)}, got none: "
            f"{'; '.join(matched.without_point)}. Name them alike in the column model"
        )
    cautions = check_comparable(matched.entries)
    found = _sorted(correlate(matched.entries, matched.values, options.metric), options.sort)
    told = [
        f"{len(matched.entries)} models with {options.score}: {', '.join(entry.name for entry in matched.entries)}",
        f"Measured, without a score: {', '.join(matched.without_score) or 'none'}",
        f"With a score, not measured: {', '.join(matched.without_point) or 'none'}",
        "",
        _table(found[: options.top], len(matched.entries)),
    ]
    if len(found) > options.top:
        told.append(f"… and {len(found) - options.top} more: --top {len(found)}, --csv or --json")
    told += [f"Beware: {caution}" for caution in cautions]
    told += ["", *_explained(matched.entries), conclusion_of(found, matched.entries, options.score)]
    return finish(
        options, "\n".join(told), [each.row() for each in found],
        lambda: _picture(options, found, matched.entries, matched.values, cautions), status,
    )  # fmt: skip


def _sorted(found: Sequence[MetricCorrelation], by: str) -> list[MetricCorrelation]:
    if by == "name":
        return sorted(found, key=lambda each: each.metric)

    def size(each: MetricCorrelation) -> float:
        value = getattr(each, by).value
        # An ordering that is always wrong is as informative as one that is always right.
        return -1.0 if value is None else abs(2 * value - 1) if by == "accuracy" else abs(value)

    return sorted(found, key=size, reverse=True)


def _table(found: Sequence[MetricCorrelation], number: int) -> str:
    """Two tables, because one would be too wide: the correlations, and the correlations given other numbers."""
    plain = [["metric", "n", "Pearson r", "95 %", "p", "Holm", "FDR", "Spearman", "95 %", "p", "pairs", "95 %"]]
    given = [["Pearson r", "given loss", "given size", "given both", "within", "across"]]
    for each in found:
        r, rho, accuracy = each.pearson, each.spearman, each.accuracy
        plain.append([each.metric, str(each.num_models), _short(r.value), _interval(r), _p(r.p), _p(each.p_holm),
                      _p(each.p_fdr), _short(rho.value), _interval(rho), _p(rho.p), _share(accuracy.value),
                      _interval(accuracy, _share)])  # fmt: skip
        others = (each.given_loss, each.given_size, each.given_both, each.within, each.across)
        given.append([each.metric, *map(_with_p, others)])
    few = sum(each.num_models < number for each in found)
    note = [f"{few} of these are undefined for some models, which are left out there: n says how many are not."]
    return "\n".join(
        [
            *aligned(plain, [str.ljust, *[str.rjust] * 11]),
            *(note if few else []),
            "",
            *aligned(given, [str.ljust, *[str.rjust] * 5]),
        ]
    )


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _interval(found: Coefficient, text: Any = _short) -> str:
    return "-" if found.low is None or found.high is None else f"{text(found.low)} to {text(found.high)}"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"


def _with_p(found: Coefficient) -> str:
    return "-" if found.value is None else f"{found.value:+.2f} (p {_p(found.p)})"


def _explained(entries: Sequence[Entry]) -> list[str]:
    sizes = {entry.head.get("num_parameters") for entry in entries}
    told = [
        f"given loss: partial r given {loss_control(entries)}; given size: given log num_parameters; within: pooled "
        "within families; across: over means of families. Intervals: r by Fisher's z, others by the bootstrap."
    ]
    if None in sizes:
        told.append("The number of parameters of some models is not known: they are left out of what is given size.")
    elif len(sizes) < 2:
        told.append("All models have one size: nothing is given size.")
    if any(getattr(entry.point, loss_control(entries)) is None for entry in entries):
        told.append("Some points have no loss: they are left out of what is given loss.")
    families = {entry.head.get("family") for entry in entries}
    if None in families:
        told.append("The family of some models is not known: they are left out of what is within and across families.")
    elif len(families) < 3:
        told.append("There are fewer than three families: nothing is known across them.")
    return told


def _picture(
    options: argparse.Namespace, found: Sequence[MetricCorrelation], entries: Sequence[Entry],
    scores: Sequence[float], cautions: Sequence[str],
) -> Any:  # fmt: skip
    by_name = {each.metric: each for each in found}
    drawn = [each for each in found if options.metric]
    if not drawn:
        ratios = [f"{feature}/ratio" for entry in entries for feature in entry.point.features]
        drawn = [by_name[name] for name in dict.fromkeys([*_DRAWN, *ratios]) if name in by_name] or list(found)
    scalars = [entry.point.scalars() for entry in entries]
    families = [entry.head.get("family") or "no family known" for entry in entries]
    panels = [
        Panel(
            metric=each.metric,
            values=np.array([row.get(each.metric) for row in scalars], dtype=float).tolist(),
            text=f"r {_short(each.pearson.value)} ({_interval(each.pearson)}), p {_p(each.pearson.p)}, "
            f"n {each.num_models}",
        )
        for each in drawn[:_MOST_DRAWN]
    ]
    return scatter(
        panels, scores, score=options.score, names=[entry.name for entry in entries],
        families=families, notes=cautions, theme=options.theme,
    )  # fmt: skip
