"""The rules of phases, stopping and selection on every run: those of the validation study, recorded ones, one more.

    python studies/rules.py                                # tables from the committed results, seconds
    python studies/rules.py --data FOLDER --work FOLDER    # trains the one more, a run that goes on after its end

The guard sees the loss on the probe. Checkpoints are judged by losses that it does not see: on the other half of the
probe where that was measured, else on other novels, and on C4. Every measured point counts as a checkpoint.

Runs from trained weights, those of `fine_tuning.py`, are in tables of their own: nothing is demanded of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import ib_callback as ib
from _runs import Config, run_all
from _tables import heading, prose, table
from ib_callback.results.guard import TOLERANCE
from ib_callback.results.measurement import Measurement
from ib_callback.results.points import PlanePoint
from ib_callback.results.selection import SelectFrom, Selection
from ib_callback.results.stopping import StopReason
from ib_callback.run.config import RunConfig
from ib_callback.run.rules import SELECTABLE, LiveRules

HERE = Path(__file__).parent
VALIDATION = HERE / "results" / "validation"
RESULTS = HERE / "results" / "rules"
FINE_TUNING = HERE / "results" / "fine_tuning"
# Older runs: columns by name, by run.
RECORDED = HERE.parent / "tests" / "results" / "real_runs.json"
# Its loss is flat from a quarter of it on, for its rate has decayed to a hundredth by then.
RUNS = [
    Config(
        "llama_2x64_decayed_s1", architecture="llama", layers=2, width=64, rate=2e-3, seed=1, steps=2400,
        schedule="decayed", points=40,
    )
]  # fmt: skip
METRICS = (
    "optimality",
    "distance_to_bound",
    "token/expressivity_local",
    "readout/token/score_local",
    "prediction/token/score_local",
)
# A loss is flat from the first measurement on that stays so near its minimum, in nats.
FLAT = 0.05
_PROBES = {"novels": "novels", "c4": "C4"}
# What a stock callback can monitor: of the metric, and from when on.
STOCK = (
    ("optimality", "compression"),
    ("optimality", "fit"),
    ("distance_to_bound", "compression"),
    ("distance_to_bound", "fit"),
    ("loss", 0),
)
WITHIN = 8  # measurements


@dataclass(frozen=True)
class Course:
    """A run: its measurements, and losses that the guard does not see, by name, [points]."""

    name: str
    points: ib.Trajectory
    unseen: dict[str, list[float]]

    @property
    def losses(self) -> list[float]:
        """Of the probe, [points]: what the guard sees; NaN where there is none."""
        return [float("nan") if m.loss is None else m.loss for m in self.points]

    @property
    def kind(self) -> str:
        """Of the run, by its name, or because it begins from trained weights."""
        if self.points.phase_rule.from_trained:
            return "fine-tuning"
        return next((kind for kind in ("overfit", "spike", "wsd") if kind in self.name), "healthy")

    @property
    def flat(self) -> int:
        """The first measurement from which the loss stays within .05 nats of its minimum."""
        losses, least = self.losses, min(self.losses)
        return max((number + 1 for number, loss in enumerate(losses) if loss > least + FLAT), default=0)

    def lost(self, number: int | None) -> dict[str, float]:
        """How many nats the checkpoint of a point is above the best one, by each loss that the guard does not see."""
        return {} if number is None else {name: told[number] - min(told) for name, told in self.unseen.items()}


def _point(row: Mapping[str, float | None], view: str) -> PlanePoint | None:
    prefix = f"{view}/token/" if view else "token/"
    names = [each.name for each in fields(PlanePoint)]
    found: dict[str, Any] = {name: row[prefix + name] for name in names if prefix + name in row}
    if found.get("complexity") is None:
        return None
    needed = [
        *("complexity", "expressivity", "optimality", "distance_to_bound", "complexity_null", "expressivity_null"),
        *("complexity_above_null", "expressivity_above_null", "optimality_above_null", "distance_above_null"),
    ]
    return PlanePoint(
        **{**dict.fromkeys(needed), **found},
        complexity_by_layer=(),
        expressivity_by_layer=(),  # type: ignore[arg-type]
    )


def measurement(step: int, row: Mapping[str, float | None]) -> Measurement:
    """A point of numbers by their logged names."""
    views = {view: {"token": point} for view in ("readout", "prediction") if (point := _point(row, view)) is not None}
    plain = _point(row, "")
    assert plain is not None
    return Measurement(
        step=step,
        entropy=row.get("entropy"),
        ceiling=row.get("ceiling"),
        orders={"token": plain},
        features={},
        layers=(),
        entropy_by_layer=(),
        num_positions=None,
        seconds=None,
        settings={"primary": "token"},
        views=views,
        loss=row.get("loss"),
        predictive_information=row.get("predictive_information"),
        train_loss=row.get("train_loss"),
    )


def of_study(path: Path) -> Course:
    """A run of `validation.py`."""
    run = json.loads(path.read_text())
    columns = {**run["novels"], "train_loss": run["train_loss"]}
    points = ib.Trajectory(
        measurement(step, {name: values[number] for name, values in columns.items()})
        for number, step in enumerate(run["step"])
    )
    unseen = {"novels": run["novels_b"]["loss"] if "novels_b" in run else run["val_loss"], "c4": run["c4_loss"]}
    return Course(run["config"]["name"], points, unseen)


def of_fine_tuning(path: Path, probe: str = "novels") -> Course:
    """A run of `fine_tuning.py`, from trained weights, as a probe of novels or of C4 sees it.

    Judged by the loss on other novels, on C4, and of preferred answers that were not trained on, where they are.
    """
    run = json.loads(path.read_text())
    columns = {**run[probe], "train_loss": run["train_loss"]}
    points = ib.Trajectory(
        (
            measurement(step, {name: values[number] for name, values in columns.items()})
            for number, step in enumerate(run["step"])
        ),
        phase_rule=ib.PhaseRule(from_trained=True),
    )
    unseen = {"novels": run["val_loss"], "c4": run["c4_loss"]}
    if "held_chosen_loss" in run:
        unseen["answers"] = run["held_chosen_loss"]
    return Course(f"{run['config']['name']}, probe of {_PROBES[probe]}", points, unseen)


def of_recorded(path: Path) -> list[Course]:
    """Runs with their columns by name; those without a held-out loss say nothing here."""
    courses = []
    for name, run in json.loads(path.read_text()).items():
        loss = run.get("loss")
        if loss is None:
            continue
        rows = []
        for number in range(len(run["step"])):
            c, e = run["complexity"][number], run["expressivity"][number]
            null = run["complexity_null"][number]
            row = {"token/complexity": c, "token/expressivity": e, "token/complexity_null": null}
            row |= {"token/optimality": e / c, "token/distance_to_bound": c - e}
            row |= {"token/complexity_above_null": c - null, "token/expressivity_above_null": e - null}
            row |= {"loss": loss[number], "train_loss": run["train_loss"][number] if "train_loss" in run else None}
            if "readout_complexity" in run:
                local = {axis: run[f"readout_{axis}"][number] for axis in ("complexity", "expressivity")}
                row |= {f"readout/token/{axis}": value for axis, value in local.items()}
                row |= {f"readout/token/{axis}_local": value for axis, value in local.items()}
                row["readout/token/score_local"] = local["expressivity"] ** 2 / local["complexity"]
            rows.append(measurement(run["step"][number], row))
        courses.append(Course(f"{name} (recorded)", ib.Trajectory(rows), {"probe": loss}))
    return courses


# --- selection


def chosen(course: Course, metric: str, **settings: Any) -> tuple[int | None, bool]:
    """The number of the point that is kept, and whether only as a fallback."""
    selection = Selection(metric, phase_rule=course.points.phase_rule, **settings)
    choice = selection.choose(course.points, available=set(course.points.steps))
    kept = choice.best or choice.fallback
    return (None, False) if kept is None else (choice.candidates.index(kept), choice.best is None)


def selection_rows(course: Course) -> dict[str, dict[str, float]]:
    """Nats lost, by what chooses: the metric from the fit on, with the guard (the defaults), the loss, the last, …"""
    losses = course.losses
    least = min(losses)
    guarded = [number for number, loss in enumerate(losses) if loss <= least + TOLERANCE]
    rows = {
        "loss alone": course.lost(losses.index(least)),
        "last": course.lost(len(losses) - 1),
        "random guarded": {
            name: statistics.fmean(course.lost(number)[name] for number in guarded) for name in course.unseen
        },
    }
    known = {name for point in course.points for name in point.scalars()}
    for metric in (each for each in METRICS if each in known):
        alone, _ = chosen(course, metric, select_from="fit", guard=None)
        both, fallback = chosen(course, metric)
        from_fit, _ = chosen(course, metric, select_from="fit")
        rows[f"{metric}: alone"] = course.lost(alone)
        rows[f"{metric}: guard"] = course.lost(both) | {"fallback": float(fallback)}
        rows[f"{metric}: guard, from fit"] = course.lost(from_fit)
    return rows


def best_of_selectable(course: Course, metric: str, select_from: SelectFrom) -> int | None:
    """The point that a stock callback has in the end, which monitors `ib/selectable/<metric>`; None if it has none.

    It takes the best of what is logged while the run goes on, and cannot let go of it when the loss falls later.
    """
    config = RunConfig(select=metric, select_from=select_from, phase_rule=course.points.phase_rule)
    views = dict.fromkeys(view for point in course.points for view in point.views)
    live = LiveRules(["token"], config=config, views=tuple(views))
    best: tuple[int, float] | None = None
    for number, point in enumerate(course.points):
        live.update(point)
        value = live.numbers()[f"{SELECTABLE}{metric}"]
        if value is not None and (best is None or live.selection.better(value, than=best[1])):
            best = (number, value)
    return None if best is None else best[0]


# --- stopping


def stopped(course: Course, rule: ib.PlateauStopping) -> tuple[int | None, StopReason | None]:
    """The number of the point at which a rule stops, and its reason."""
    rule = replace(rule, phase_rule=course.points.phase_rule)
    for number, point in enumerate(course.points):
        decision = rule.update(point)
        if decision.stop:
            return number, decision.reason
    return None, None


def patience_on_loss(course: Course, patience: int = 5) -> int | None:
    """Where plain patience on the loss stops."""
    losses = course.losses
    for number in range(patience, len(losses)):
        if min(losses[number - patience + 1 : number + 1]) >= min(losses[: number - patience + 1]):
            return number
    return None


def stopping_row(course: Course, number: int | None) -> dict[str, float]:
    """Share of the steps saved by ending at a point, and nats by which the best checkpoint until then is worse."""
    steps = [step or 0 for step in course.points.steps]
    last = len(steps) - 1 if number is None else number
    kept = course.losses.index(min(course.losses[: last + 1]))
    return {"saved": 1 - steps[last] / steps[-1], **course.lost(kept)}


# --- what must hold


def checks(course: Course) -> list[tuple[str, bool, str]]:
    """Demands on the defaults: what, whether it holds, and the number behind it."""
    found = []
    losses, points = course.losses, course.points
    number, reason = stopped(course, ib.PlateauStopping())
    best = losses.index(min(losses))
    if course.kind in ("overfit", "spike"):
        own = (StopReason.MEMORISING, StopReason.COLLAPSED, StopReason.DIVERGING)
        worse = losses[-1] > min(losses) + FLAT
        if worse or course.kind == "overfit":
            told = "not stopped" if number is None else f"{number - best} measurements after it, {_name(reason)}"
            holds = number is not None and reason in own and number - best <= WITHIN
            found.append(("stopped with a reason of its own within 8 measurements of the minimum", holds, told))
            lost = losses[number or 0] - min(losses[: (number or 0) + 1])
            holds = number is not None and number - best <= WITHIN
            found.append(("stopped within 8 measurements of the minimum, whatever the reason", holds, f"{lost:.2f}"))
    elif course.kind == "healthy":
        gain = 0.0 if number is None else losses[number] - min(losses)
        told = (
            "not stopped" if number is None else f"step {points[number].step}, {_name(reason)}, {gain:.3f} nats to go"
        )
        found.append(
            ("a healthy run is not stopped early", gain <= FLAT and reason in (None, StopReason.PLATEAU), told)
        )
        if len(losses) - 1 >= course.flat + WITHIN:
            late = None if number is None else number - course.flat
            holds = late is not None and late <= WITHIN
            found.append(("stopped within 8 measurements of becoming flat", holds, f"{late}"))
    phases = points.phases()
    if course.kind == "overfit":
        steps = [points[max(0, best - 1)].step or 0, points[min(len(points) - 1, best + 1)].step or 0]
        at = phases.memorising_start
        told = f"{at}, minimum at {points[best].step}"
        found.append(
            ("memorising dated to the minimum of the loss", at is not None and steps[0] <= at <= steps[1], told)
        )
    elif course.kind == "healthy":
        found.append(("no memorising in a healthy run", phases.memorising_start is None, f"{phases.memorising_start}"))
    for metric in ("optimality", "distance_to_bound"):
        kept, fallback = chosen(course, metric)
        lost = course.lost(kept)
        name = f"kept by {metric} within .05 nats of the best{', as a fallback' if fallback else ''}"
        found.append((name, bool(lost) and next(iter(lost.values())) <= FLAT, _numbers(lost)))
    return found


def _numbers(values: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:+.3f}" for name, value in values.items()) or "none"


def _name(reason: StopReason | None) -> str:
    return "" if reason is None else reason.value


# --- the tables


_SHOWN = {
    "optimality": "optimality",
    "distance_to_bound": "distance",
    "prediction/token/score_local": "prediction score",
}


def courses_of_all() -> list[Course]:
    """Every run there is."""
    paths = [*sorted(VALIDATION.glob("*.json")), *sorted(RESULTS.glob("*.json"))]
    return [*map(of_study, paths), *of_recorded(RECORDED)]


def _lost(values: Mapping[str, float]) -> str:
    """Nats lost by each loss, the first one first."""
    return " / ".join(f"{value:.3f}" for name, value in values.items() if name != "fallback") or "-"


def _phases(courses: Sequence[Course]) -> Iterator[str]:
    yield heading("Phases", 2)
    yield prose("""By the defaults, on the plane that is named. Steps at which the phase began, in brackets at which
        that was known. The loss is least at the step of the last column but one.""")
    rows = []
    for course in courses:
        found, losses = course.points.phases(), course.losses
        starts = [
            "-" if at is None else f"{at} ({known})"
            for at, known in (
                (found.fit_start, found.fit_recognised),
                (found.compression_start, found.compression_recognised),
                (found.memorising_start, found.memorising_recognised),
            )
        ]
        off = "-" if found.off_bound_start is None else str(found.off_bound_start)
        least = course.points[losses.index(min(losses))].step
        rows.append([course.name, course.kind, str(found.plane), *starts, off, str(least), str(course.points[-1].step)])
    titles = ("run", "kind", "plane", "fit", "compression", "memorising", "off the bound", "least loss", "last step")
    yield table(titles, rows)


def _selection(courses: Sequence[Course], found: Mapping[str, Mapping[str, dict[str, float]]]) -> Iterator[str]:
    yield heading("Selection: nats lost", 2)
    yield prose("""By which the checkpoint kept is above the best one, on other novels / C4 (of recorded runs: on the
        probe, which the guard sees). Alone: guard=None, from the fit on. Guard: the defaults; f: as a fallback.
        Random: the mean of all within the guard's tolerance.""")
    titles = ["run", *(f"{short}: {how}" for short in _SHOWN.values() for how in ("alone", "guard"))]
    titles += ["loss alone", "last", "random guarded"]
    rows = []
    for course in courses:
        lost = found[course.name]
        row = [course.name]
        for metric in _SHOWN:
            guard = lost.get(f"{metric}: guard", {})
            row += [_lost(lost.get(f"{metric}: alone", {})), _lost(guard) + (" f" if guard.get("fallback") else "")]
        rows.append([*row, *(_lost(lost[name]) for name in ("loss alone", "last", "random guarded"))])
    yield table(titles, rows)
    yield prose("Median and greatest, on novels, by what chooses, over the runs of the studies:")
    names = dict.fromkeys(name for lost in found.values() for name in lost)
    rows = []
    for name in names:
        row = [name]
        for kind in ("healthy", "overfit", "spike", "wsd"):
            values = [
                lost[name]["novels"]
                for course in courses
                if course.kind == kind and "novels" in (lost := found[course.name]).get(name, {})
            ]
            row.append(f"{statistics.median(values):.3f}, {max(values):.3f} ({len(values)})" if values else "-")
        rows.append(row)
    yield table(["", "healthy", "overfit", "spike", "wsd"], rows)


def _stock(courses: Sequence[Course]) -> Iterator[str]:
    yield heading("What a stock callback keeps: nats lost", 2)
    yield prose("""EarlyStopping, ModelCheckpoint and load_best_model_at_end take the best that `ib/selectable/<metric>`
        has had, as it was logged, and cannot let go of it when the loss falls later. Nats by which that checkpoint is
        above the best one, on other novels / C4 (of recorded runs: on the probe); -: nothing was ever selectable.""")
    lost = {
        key: [course.lost(best_of_selectable(course, metric, start)) for course in courses]
        for metric, start in STOCK
        for key in [f"{metric}, {start if isinstance(start, str) else f'step {start}'}"]
    }
    rows = [[course.name, *(_lost(values[i]) for values in lost.values())] for i, course in enumerate(courses)]
    yield table(("run", *lost), rows)
    yield prose("Over all runs, on novels or the probe:")
    rows = []
    for key, told in lost.items():
        first = [next(iter(values.values())) for values in told if values]
        row = [f"{statistics.median(first):.3f}", f"{max(first):.3f}"] if first else ["-", "-"]
        rows.append([key, *row, f"{len(told) - len(first)} of {len(told)}"])
    yield table(("metric, from", "median", "most", "never selectable"), rows)


def _fine_tuning(courses: Sequence[Course]) -> Iterator[str]:
    yield heading("From trained weights", 2)
    yield prose("""Declared by `from_trained=True`: no phases, rules act from the first point, and the guard is off
        unless it is a number. First where training ends, and each loss there; in the first and the last row of a run
        at its beginning and at its end.""")
    rows = []
    for course in courses:
        names = list(course.unseen)
        for what, number, reason in (
            ("begin", 0, None),
            ("defaults", *stopped(course, ib.PlateauStopping())),
            ("guard=0.03", *stopped(course, ib.PlateauStopping(guard=TOLERANCE))),
            ("end", len(course.points) - 1, None),
        ):
            step = "goes on" if number is None else f"{course.points[number].step}"
            losses = ["-" if number is None else f"{course.unseen[name][number]:.2f}" for name in names]
            rows.append([course.name, what, step, _name(reason) or "-", *losses, *["-"] * (3 - len(names))])
    yield table(("run", "rule", "step", "reason", "novels", "C4", "answers"), rows)
    yield prose("""Step of the checkpoint that is kept, and in brackets the nats by which it is above the best one, on
        novels / C4 / answers. Loss: of the probe, lowest.""")
    rows = []
    for course in courses:
        for metric in ("optimality", "distance_to_bound", "prediction/token/score_local", "loss"):
            row = [course.name, metric]
            for settings in ({}, {"guard": TOLERANCE}):
                kept, _ = chosen(course, metric, **settings)
                row.append("-" if kept is None else f"{course.points[kept].step} ({_lost(course.lost(kept))})")
            rows.append(row)
    yield table(("run", "by", "defaults", "guard=0.03"), rows)


def _stopping(courses: Sequence[Course]) -> Iterator[str]:
    yield heading("Stopping", 2)
    yield prose("""Step (share of the steps saved; nats, on other novels or the probe, by which the best checkpoint
        until then is worse than the best of the whole run). Oracle: the least loss.""")
    rows = []
    for course in courses:
        at, reason = stopped(course, ib.PlateauStopping())
        row = [course.name, _name(reason) or "-"]
        for number in (at, patience_on_loss(course), course.losses.index(min(course.losses))):
            told = stopping_row(course, number)
            lost = next(value for name, value in told.items() if name != "saved")
            step = "-" if number is None else str(course.points[number].step)
            row.append(step if number is None else f"{step} ({told['saved']:.0%}; {lost:.3f})")
        rows.append([*row, str(course.points[-1].step)])
    yield table(("run", "reason", "defaults", "patience on the loss", "oracle", "last step"), rows)


def _checks(courses: Sequence[Course]) -> Iterator[str]:
    yield heading("What must hold", 2)
    made = [(course.name, *check) for course in courses for check in checks(course)]
    kinds = dict.fromkeys(what.removesuffix(", as a fallback") for _, what, _, _ in made)
    rows = []
    for kind in kinds:
        of_kind = [
            (name, holds, told) for name, what, holds, told in made if what.removesuffix(", as a fallback") == kind
        ]
        failed = "; ".join(f"{name}: {told}" for name, holds, told in of_kind if not holds)
        rows.append([kind, f"{sum(holds for _, holds, _ in of_kind)} of {len(of_kind)}", failed or "-"])
    yield table(("demand on the defaults", "holds", "where not"), rows)


def report() -> Iterator[str]:
    """The tables, from the committed results."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        courses = courses_of_all()
        yield heading("Rules: phases, stopping, selection", 1)
        yield from _phases(courses)
        yield from _selection(courses, {course.name: selection_rows(course) for course in courses})
        yield from _stock(courses)
        yield from _stopping(courses)
        yield from _checks(courses)
        files = sorted(FINE_TUNING.glob("llama_*.json"))
        yield from _fine_tuning([of_fine_tuning(path, probe) for path in files for probe in _PROBES])


def train(data: Path, work: Path) -> None:
    """The run whose result is missing."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    run_all(RUNS, data, work, RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="train what is missing")
    parser.add_argument("--work", type=Path, default=Path("study-work"))
    options = parser.parse_args()
    if options.data is not None:
        train(options.data, options.work)
    print("\n".join(report()))


if __name__ == "__main__":
    main()
