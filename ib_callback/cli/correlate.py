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
    plain_metric,
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
        help="correlate metrics of models with their scores on a benchmark",
        description="Correlate every metric of many models with a score from elsewhere. The first table has Pearson's "
        "and Spearman's correlations, and the share of pairs of models that the metric orders as the score does, all "
        "with 95 % intervals. p-values are also corrected for the number of tested metrics. The second table has "
        "partial correlations given loss and size, and correlations within and across families.",
        **examples(
            "ib-callback correlate results.jsonl scores.csv --score mmlu_pro -o scatter.png",
            "ib-callback correlate results.jsonl lm_eval_output/ --score mmlu_pro/exact_match --csv correlations.csv",
            "ib-callback correlate results.jsonl scores.csv --score mmlu_pro --metric preference/ratio",
            more="SCORES is a table with a column model, a column for each score and perhaps a column revision; a "
            "results_*.json of lm-eval; or a folder of these.",
        ),
    )
    add_run_arguments(parser)
    parser.add_argument(
        "scores", metavar="SCORES", help="a .csv table, results_*.json of lm-eval, or a folder of these"
    )
    parser.add_argument(
        "--score",
        required=True,
        metavar="NAME",
        help="column of the table; for lm-eval: TASK, TASK/METRIC or TASK/METRIC,FILTER",
    )
    parser.add_argument(
        "--metric", action="append", metavar="NAME",
        help="metric to test, named as in the logs, or a feature; repeatable; by default all",
    )  # fmt: skip
    parser.add_argument("--sort", choices=SORTS, default="pearson", help="sort by the size of this number")
    parser.add_argument("--top", type=positive, default=20, metavar="N", help="number of metrics in the printed table")
    add_picture_arguments(parser)
    add_table_arguments(parser, row="metric")
    parser.set_defaults(run=guarded(_correlate))


def _correlate(options: argparse.Namespace) -> int:
    check_outputs(options, [*options.runs, *files_of_scores(Path(options.scores))])
    courses, status = courses_of(options)
    matched = match_scores(courses, load_scores(Path(options.scores), options.score))
    if not matched.entries:
        raise ValueError(
            f"expected scores of the measured models {', '.join(course.name for course in courses)}, got none of "
            f"them: {'; '.join(matched.without_point)}. Use the same names in the column model"
        )
    if options.metric is not None:
        options.metric = [plain_metric(metric, courses) for metric in options.metric]
    cautions = check_comparable(matched.entries)
    found = _sorted(correlate(matched.entries, matched.values, options.metric), options.sort)
    several = "models" if len(matched.entries) > 1 else "model"
    told = [
        f"{len(matched.entries)} {several} with {options.score}: {', '.join(entry.name for entry in matched.entries)}",
        f"Measured but without a score: {', '.join(matched.without_score) or 'none'}",
        f"With a score but not measured: {', '.join(matched.without_point) or 'none'}",
        "",
        _table(found[: options.top], len(matched.entries)),
    ]
    if len(found) > options.top:
        told.append(f"… and {len(found) - options.top} more, shown by --top {len(found)}, --csv or --json")
    told += [f"Caution: {caution}" for caution in cautions]
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
    note = [f"{few} of these metrics are undefined for some models. n counts the models that are left."]
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
        f"given loss: partial r with {loss_control(entries)} held fixed; given size: with log num_parameters held "
        "fixed; within: pooled within families; across: over the means of families. Intervals of r come from Fisher's "
        "z, the others from the bootstrap."
    ]
    if None in sizes:
        told.append("Some models have no known number of parameters. Numbers given size leave them out.")
    elif len(sizes) < 2:
        told.append("All models have the same size, so there are no numbers given size.")
    if any(getattr(entry.point, loss_control(entries)) is None for entry in entries):
        told.append("Some points have no loss. Numbers given loss leave them out.")
    families = {entry.head.get("family") for entry in entries}
    if None in families:
        told.append("Some models have no known family. Numbers within and across families leave them out.")
    elif len(families) < 3:
        told.append("There are fewer than three families, so there are no numbers across families.")
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
    families = [entry.head.get("family") or "unknown family" for entry in entries]
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
