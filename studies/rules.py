"""The rules of stopping and selection on every run of the study, and what the issue of them demands, as checks.

python studies/rules.py                         # the runs of results/validation
python studies/rules.py --recorded FILE         # and older ones: JSON, columns by name by run
python studies/rules.py --json FILE             # also as numbers

The guard sees the loss on the probe. Checkpoints are judged by losses that it does not see: on the other half of the
probe where that was measured, else on other novels, and on C4. Every measured point counts as a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import ib_callback as ib
from ib_callback.results.guard import TOLERANCE
from ib_callback.results.measurement import Measurement
from ib_callback.results.points import PlanePoint
from ib_callback.results.selection import Selection
from ib_callback.results.stopping import StopReason

RESULTS = Path(__file__).parent / "results" / "validation"
METRICS = (
    "optimality",
    "distance_to_bound",
    "token/expressivity_local",
    "readout/token/score_local",
    "prediction/token/score_local",
)
# A loss is flat from the first measurement on that stays so near its minimum, in nats.
FLAT = 0.05
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
        """Of the run, by its name."""
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


_RECORDED = {"val_loss": "loss", "probe_loss": "loss", "train_loss": "train_loss"}


def of_recorded(path: Path) -> list[Course]:
    """Runs with their columns by name; those without a held-out loss say nothing here."""
    courses = []
    for name, run in json.loads(path.read_text()).items():
        loss = run.get("probe_loss") or run.get("val_loss") or run.get("loss") if isinstance(run, dict) else None
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
            if "output_complexity_local" in run:
                local = [run[f"output_{axis}_local"][number] for axis in ("complexity", "expressivity")]
                row |= {
                    f"readout/token/{axis}": run[f"output_{axis}"][number] for axis in ("complexity", "expressivity")
                }
                row |= {"readout/token/complexity_local": local[0], "readout/token/expressivity_local": local[1]}
                row |= {"readout/token/score_local": local[1] ** 2 / local[0]}
            rows.append(measurement(run["step"][number], row))
        courses.append(Course(name, ib.Trajectory(rows), {"novels": run.get("val_loss", loss)}))
    return courses


# --- selection


def chosen(course: Course, metric: str, **settings: Any) -> tuple[int | None, bool]:
    """The number of the point that is kept, and whether only as a fallback."""
    choice = Selection(metric, **settings).choose(course.points, available=set(course.points.steps))
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


# --- stopping


def stopped(course: Course, rule: ib.PlateauStopping) -> tuple[int | None, StopReason | None]:
    """The number of the point at which a rule stops, and its reason."""
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
            told = "not stopped" if number is None else f"{number - best} measurements after it, {reason}"
            # A plateau is one where the loss has not risen yet.
            at_minimum = reason is StopReason.PLATEAU and losses[number or 0] <= min(losses) + FLAT
            holds = number is not None and (reason in own or at_minimum) and number - best <= WITHIN
            found.append(("stopped with its own reason, or flat, within 8 measurements of the minimum", holds, told))
    elif course.kind == "healthy":
        gain = 0.0 if number is None else losses[number] - min(losses)
        told = "not stopped" if number is None else f"step {points[number].step}, {reason}, {gain:.3f} nats to go"
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


def table(courses: Sequence[Course]) -> dict[str, Any]:
    """Everything, printed, and as numbers."""
    result: dict[str, Any] = {}
    for course in courses:
        phases = course.points.phases()
        selection = selection_rows(course)
        rules = {
            "default": stopped(course, ib.PlateauStopping()),
            "patience on the loss": (patience_on_loss(course), None),
            "oracle": (course.losses.index(min(course.losses)), None),
            "none": (None, None),
        }
        stops = {
            name: {"step": None if at is None else course.points[at].step, **stopping_row(course, at)}
            | ({"reason": why.value} if why else {})
            for name, (at, why) in rules.items()
        }
        held = checks(course)
        print(f"\n{course.name} ({course.kind}, {len(course.points)} points; loss {min(course.losses):.3f} at best, "
              f"{course.losses[-1]:.3f} in the end)")  # fmt: skip
        print(f"  phases on the {phases.plane} plane: fit {phases.fit_start}, compression {phases.compression_start} "
              f"(recognised {phases.compression_recognised}), memorising {phases.memorising_start} "
              f"(recognised {phases.memorising_recognised}), off the bound {phases.off_bound_start}")  # fmt: skip
        print("  nats lost by the checkpoint of")
        for name, lost in selection.items():
            print(f"    {name:<46} {_numbers(lost)}")
        print("  stopping: step, share saved, nats lost")
        for name, row in stops.items():
            text = _numbers({key: value for key, value in row.items() if isinstance(value, float)})
            print(f"    {name:<22} {row['step']!s:>6} {text} {row.get('reason', '')}")
        for what, holds, told in held:
            print(f"  {'ok  ' if holds else 'FAIL'} {what}: {told}")
        result[course.name] = {
            "kind": course.kind,
            "phases": {name: getattr(phases, name) for name in _PHASES},
            "selection": selection,
            "stopping": stops,
            "checks": {what: holds for what, holds, _ in held},
        }
    _overall(result)
    return result


_PHASES = ("plane", "fit_start", "compression_start", "compression_recognised", "memorising_start",
           "memorising_recognised", "off_bound_start")  # fmt: skip


def _overall(result: Mapping[str, Any]) -> None:
    print(f"\nOver {len(result)} runs: median and greatest nats lost on novels, and number of runs")
    names = dict.fromkeys(name for run in result.values() for name in run["selection"])
    for kind in ("healthy", "overfit", "spike", "wsd"):
        runs = [run for run in result.values() if run["kind"] == kind]
        for name in names if runs else ():
            lost = [
                run["selection"][name]["novels"]
                for run in runs
                if run["selection"].get(name, {}).get("novels") is not None
            ]
            if lost:
                print(f"  {kind:<8} {name:<46} {statistics.median(lost):.3f} {max(lost):.3f} {len(lost)}")
    failed = [(name, what) for name, run in result.items() for what, holds in run["checks"].items() if not holds]
    number = sum(len(run["checks"]) for run in result.values())
    print(
        f"{number - len(failed)} of {number} checks hold" + "".join(f"\n  FAIL {name}: {what}" for name, what in failed)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RESULTS, help="folder of the study's results")
    parser.add_argument("--recorded", type=Path, help="older runs")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    options = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)
    courses = [of_study(path) for path in sorted(options.runs.glob("*.json"))]
    courses += of_recorded(options.recorded) if options.recorded else []
    result = table(courses)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
