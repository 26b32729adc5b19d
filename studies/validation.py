"""The validation study: training runs on which every quantity is held against held-out loss (README.md has the plan).

python studies/validation.py                                   # tables and figure from the committed results, seconds
python studies/validation.py --data FOLDER --work FOLDER       # trains what is missing: some four hours on one core
python studies/validation.py --data FOLDER --work FOLDER --retrace    # two short runs, measured from their checkpoints
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from _ranking import APART, filled, interval_over_runs, nats_lost, pairs_right, partial_spearman, spearman
from _runs import Config, Data, retrace, run_all
from _tables import heading, prose, table

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "validation"
FIGURE = HERE.parent / "docs" / "images" / "evidence.png"

_SIZES: dict[str, dict[str, Any]] = {
    "llama_2x64": {"architecture": "llama", "layers": 2, "width": 64, "rate": 2e-3},
    "llama_4x128": {"architecture": "llama", "layers": 4, "width": 128},
    "llama_4x128_untied": {"architecture": "llama", "layers": 4, "width": 128, "tied": False},
    "llama_6x192": {"architecture": "llama", "layers": 6, "width": 192, "heads": 6},
    "gpt2_2x64": {"architecture": "gpt2", "layers": 2, "width": 64, "rate": 2e-3, "tied": False},
    "gpt2_3x96": {"architecture": "gpt2", "layers": 3, "width": 96, "tied": False},
    "gpt2_4x128_tied": {"architecture": "gpt2", "layers": 4, "width": 128},
}


def _run(size: str, kind: str = "", *, seed: int = 1, **changes: Any) -> Config:
    name = "_".join(filter(None, (size, kind, f"s{seed}")))
    return Config(name, seed=seed, **({"steps": 1500, "halves": True} | _SIZES[size] | changes))


def _overfit(size: str, sequences: int, steps: int) -> Config:
    return _run(size, f"overfit_{sequences}", sequences=sequences, steps=steps, schedule="constant")


# Those that decide most come first.
RUNS = [
    _run("gpt2_3x96"),
    _overfit("gpt2_3x96", 160, 300),
    _run("llama_4x128"),
    _overfit("llama_4x128", 1000, 700),
    _run("llama_2x64", steps=2000),
    _run("gpt2_2x64", steps=2000),
    _overfit("gpt2_3x96", 1000, 700),
    _overfit("llama_4x128", 160, 300),
    _run("gpt2_4x128_tied"),
    _run("llama_4x128_untied", steps=1000),
    _run("llama_4x128", "spike", schedule="spike", steps=800),
    _run("gpt2_3x96", "wsd", schedule="wsd", steps=800),
    _run("llama_2x64", "warmup", warmup=500, steps=1000),
    _overfit("gpt2_4x128_tied", 400, 500),
    _overfit("llama_4x128_untied", 400, 500),
    _run("llama_2x64", seed=2, steps=1000),
    _run("gpt2_2x64", seed=2, steps=1000),
    _run("llama_6x192", steps=400),
    _run("llama_4x128", seed=2, steps=800),
    _run("gpt2_3x96", seed=2, steps=800),
]

# Trained with a checkpoint at every measured step, from which the callback's trajectory is to come out again.
RETRACED = [_run(size, "retraced", steps=300, points=5, halves=False) for size in ("llama_2x64", "gpt2_2x64")]

# Points after this step count: the collapse at the beginning is no choice that anybody has.
AFTER = 100
# Each probe is judged by the held-out loss of its own domain.
PROBES = {"novels": "val_loss", "novels_b": "val_loss", "c4": "c4_loss"}


@dataclass(frozen=True)
class Run:
    """A finished run, from step 0 on."""

    name: str
    config: dict[str, Any]
    steps: np.ndarray
    raw: dict[str, Any]

    @classmethod
    def load_all(cls) -> list[Run]:
        """Those whose results are there, in the order of `RUNS`."""
        found = []
        for run in RUNS:
            path = RESULTS / f"{run.name}.json"
            if path.exists():
                raw = json.loads(path.read_text())
                found.append(cls(run.name, raw["config"], np.array(raw["step"]), raw))
        return found

    @property
    def kind(self) -> str:
        """Healthy, overfitting (data seen again and again) or disturbed (a schedule unlike the others')."""
        if self.config["sequences"] is not None:
            return "overfitting"
        return "healthy" if self.config["schedule"] == "cosine" and self.config["warmup"] < 500 else "disturbed"

    @property
    def group(self) -> str:
        """Architecture and kind."""
        return f"{self.config['architecture']} {self.kind}"

    @property
    def late(self) -> np.ndarray:
        """Which points count."""
        return self.steps > AFTER

    def loss(self, name: str) -> np.ndarray:
        """A held-out loss at each point."""
        return np.array(self.raw[name])

    def column(self, name: str, probe: str = "novels", direction: int = 1) -> np.ndarray:
        """A number at each point."""
        return filled(self.raw[probe].get(name, [None] * len(self.steps)), direction)


def candidates() -> dict[str, int]:
    """Logged names and which way is better (+1: more); as written down in README.md before the runs were looked at."""
    found: dict[str, int] = {}
    ratios = ("optimality", "optimality_above_null", "expressivity_local", "optimality_local", "score_local")
    for view, order in itertools.product(
        ("", "late/", "last/", "centred/", "centred/late/", "centred/last/"), ("token", "bigram")
    ):
        found |= {f"{view}{order}/{quantity}": 1 for quantity in ratios}
    for view, order in itertools.product(("readout", "prediction"), ("token", "bigram")):
        found[f"{view}/{order}/complexity_local"] = -1
        found |= {f"{view}/{order}/{quantity}": 1 for quantity in ratios[2:]}
    return found | {"dispersion": 1, "rankme": 1, "alpha_req": -1}


# Shown in the tables of single runs: the others are in the summary.
SHORT = {
    "token/optimality": "plain ratio",
    "last/token/optimality": "plain ratio, last",
    "token/optimality_above_null": "ratio above null",
    "token/expressivity_local": "local E",
    "token/expressivity_scaled": "scaled E",
    "token/optimality_local": "local ratio",
    "late/token/optimality_local": "local ratio, late",
    "last/token/score_local": "local score, last",
    "centred/late/token/score_local": "local score, centred, late",
    "readout/token/expressivity_local": "readout E",
    "readout/token/optimality_local": "readout ratio",
    "readout/token/score_local": "readout score",
    "prediction/bigram/expressivity_local": "prediction E, bigram",
    "prediction/token/expressivity_local": "prediction E",
    "prediction/token/optimality_local": "prediction ratio",
    "prediction/token/score_local": "prediction score",
    "rankme": "RankMe",
    "loss": "loss of the probe",
}


# Beside the candidates that were written down.
FURTHER = {"token/expressivity_scaled": 1}


def direction_of(name: str) -> int:
    return -1 if name == "loss" else (candidates() | FURTHER)[name]


@dataclass(frozen=True)
class Held:
    """A number held against a loss over the late points of one run."""

    ranks: float
    right: float
    pairs: int
    lost: float

    @classmethod
    def of(cls, run: Run, name: str, probe: str, judge: str | None = None) -> Held:
        """`judge`: name of the loss; that of the probe's own domain if not given."""
        direction = direction_of(name)
        values = run.column(name, probe, direction)[run.late]
        loss = run.loss(judge or PROBES[probe])[run.late]
        right, pairs = pairs_right(values, loss, direction)
        return cls(spearman(values, loss), right, pairs, nats_lost(values, loss, direction))


def held_everywhere(runs: list[Run], names: list[str]) -> dict[tuple[str, str, str], Held]:
    return {
        (name, run.name, probe): Held.of(run, name, probe)
        for name, run, probe in itertools.product(names, runs, PROBES)
    }


def has_right_sign(name: str, held: Held) -> bool:
    return bool(held.ranks * direction_of(name) < 0)


def single_runs(runs: list[Run], held: dict[tuple[str, str, str], Held]) -> Iterator[str]:
    yield heading("Rank correlation with held-out loss, each run", 2)
    yield prose("""Spearman over the points after step 100; probe of novels / its other half / C4, each against
        the held-out loss of its domain. Right is + for losses, − for all others.""")
    titles = ["", *(run.name for run in runs)]
    yield table(
        titles,
        [
            [SHORT[name], *(" ".join(f"{held[name, run.name, probe].ranks:+.2f}" for probe in PROBES) for run in runs)]
            for name in SHORT
        ],
    )
    yield heading("Nats lost by the checkpoint at which the number is best, each run", 2)
    yield table(
        titles,
        [
            [SHORT[name], *(" ".join(f"{held[name, run.name, probe].lost:.2f}" for probe in PROBES) for run in runs)]
            for name in SHORT
        ],
    )
    yield heading("Runs", 2)
    yield table(
        ["run", "kind", "points after 100", "lowest held-out loss", "at step", "last", "lowest C4 loss", "at step"],
        [
            [
                run.name,
                run.kind,
                str(int(run.late.sum())),
                f"{run.loss('val_loss').min():.3f}",
                str(run.steps[run.loss("val_loss").argmin()]),
                f"{run.loss('val_loss')[-1]:.3f}",
                f"{run.loss('c4_loss').min():.3f}",
                str(run.steps[run.loss("c4_loss").argmin()]),
            ]
            for run in runs
        ],
    )


def summary(runs: list[Run], held: dict[tuple[str, str, str], Held]) -> Iterator[str]:
    """All candidates by the rule, and the choice."""
    groups = sorted({run.group for run in runs})
    yield heading("All candidates", 2)
    number = len(runs) * len(PROBES)
    yield prose(f"""{len(runs)} runs × {len(PROBES)} probes. *right sign*: of these {number}; *runs*: with the
        right sign on all three probes. Then the least / median share of pairs over {APART} nats apart that are
        ordered rightly, in each group, and the most and mean nats lost. Sorted by the least share.""")
    rows = []
    for name in [*candidates(), "loss"]:
        of_name = {(run.name, probe): held[name, run.name, probe] for run in runs for probe in PROBES}
        right = [has_right_sign(name, each) for each in of_name.values()]
        whole = sum(all(has_right_sign(name, of_name[run.name, probe]) for probe in PROBES) for run in runs)
        shares = {
            group: [of_name[run.name, probe].right for run in runs if run.group == group for probe in PROBES]
            for group in groups
        }
        least = float(np.nanmin([value for each in shares.values() for value in each]))
        lost = [each.lost for each in of_name.values()]
        cells = [f"{np.nanmin(shares[group]):.2f} / {np.nanmedian(shares[group]):.2f}" for group in groups]
        rows.append(
            (
                least,
                whole,
                [
                    name,
                    f"{sum(right)}",
                    f"{whole}",
                    f"{least:.2f}",
                    *cells,
                    f"{max(lost):.2f}",
                    f"{np.mean(lost):.3f}",
                ],
            )
        )
    rows.sort(key=lambda row: (-row[0], -row[1]))
    yield table(
        ["", "right sign", "runs", "least share", *groups, "most lost", "mean lost"], [cells for _, _, cells in rows]
    )
    passing = [cells[0] for _, whole, cells in rows if whole == len(runs) and cells[0] != "loss"]
    yield f"With the right sign in every run on every probe: {', '.join(passing) or 'none'}.\n"


def by_group(runs: list[Run], held: dict[tuple[str, str, str], Held]) -> Iterator[str]:
    """Means over runs, with intervals."""
    groups = sorted({run.group for run in runs if run.kind != "disturbed"})
    yield heading("By architecture and kind", 2)
    yield prose("""Rank correlation with held-out loss, mean over the three probes of a run, then over runs; in brackets
        the 95 % interval of a bootstrap over runs.""")
    rows = []
    for name, label in SHORT.items():
        cells = [label]
        for group in groups:
            means = [
                float(np.mean([held[name, run.name, probe].ranks for probe in PROBES]))
                for run in runs
                if run.group == group
            ]
            low, high = interval_over_runs(means)
            cells.append(f"{np.mean(means):+.2f} ({low:+.2f} to {high:+.2f})")
        rows.append(cells)
    numbers = [sum(run.group == group for run in runs) for group in groups]
    yield table(["", *(f"{group}, {number} runs" for group, number in zip(groups, numbers, strict=True))], rows)


def judged_by_the_other(runs: list[Run]) -> Iterator[str]:
    yield heading("The other domain as judge", 2)
    yield prose("""Spearman of the number on the novels probe with the loss on C4 / of that on the C4 probe with
        the loss on novels.""")
    yield table(
        ["", *(run.name for run in runs)],
        [
            [
                SHORT[name],
                *(
                    " ".join(
                        f"{Held.of(run, name, probe, judge).ranks:+.2f}"
                        for probe, judge in (("novels", "c4_loss"), ("c4", "val_loss"))
                    )
                    for run in runs
                ),
            ]
            for name in SHORT
        ],
    )


# Held against the loss beside the candidates: what any number that only grows with time would say, and what every
# trainer knows.
CLOCK, TRAINING = "step (a clock)", "training loss"


def beyond_the_loss(runs: list[Run]) -> Iterator[str]:
    """Partial rank correlations given the loss of the probe."""
    yield heading("Beyond the loss", 2)
    yield prose("""Partial rank correlation of the number on the novels probe, given the loss of that probe:
        with the loss on C4 at the same point, and with the held-out loss a fifth of the run later. Mean over
        runs that were not disturbed, in brackets the 95 % interval of a bootstrap over runs, and in how many
        runs it is defined: where the loss of the probe falls all along, as that of the healthy runs does, its
        ranks leave nothing to say. It says more than the loss where both architectures' intervals leave out 0
        on the same side; more than time where it also goes beyond the clock.""")
    architectures = sorted({run.config["architecture"] for run in runs})
    rows = []
    for name in [*(name for name in SHORT if name != "loss"), CLOCK, TRAINING]:
        cells = [SHORT.get(name, name)]
        for target, architecture in itertools.product(("c4", "later"), architectures):
            found = [
                _partial(run, name, target)
                for run in runs
                if run.config["architecture"] == architecture and run.kind != "disturbed"
            ]
            known = [value for value in found if np.isfinite(value)]
            low, high = interval_over_runs(known)
            interval = f"{low:+.2f} to {high:+.2f}; " if len(known) > 1 else ""
            cells.append(f"{np.mean(known):+.2f} ({interval}{len(known)} of {len(found)})" if known else "none")
        rows.append(cells)
    yield table(["", *(f"{a} / {b}" for a, b in itertools.product(("C4", "later"), architectures))], rows)


def _partial(run: Run, name: str, target: str) -> float:
    given = run.column("loss")
    if name == CLOCK:
        values = run.steps.astype(float)
    else:
        values = run.loss("train_loss") if name == TRAINING else run.column(name, "novels", direction_of(name))
    if target == "c4":
        counted, other = run.late, run.loss("c4_loss")
    else:
        later = run.steps + run.config["steps"] / 5
        counted = run.late & (later <= run.steps[-1])
        other = np.interp(later, run.steps, run.loss("val_loss"))
    return partial_spearman(values[counted], other[counted], given[counted])


PLANES = {
    "plain": "token/{}",
    "plain, last": "last/token/{}",
    "above null": "token/{}_above_null",
    "local": "token/{}_local",
    "local, late": "late/token/{}_local",
    "local, last": "last/token/{}_local",
    "scaled": "token/{}_scaled",
    "centred local": "centred/token/{}_local",
    "readout": "readout/token/{}_local",
    "prediction": "prediction/token/{}_local",
}


def phases(runs: list[Run]) -> Iterator[str]:
    """Whether complexity falls after its maximum, and what expressivity does meanwhile."""
    yield heading("Two phases", 2)
    yield prose("""Novels probe, token order, points after step 100: the step at which complexity is greatest;
        from there to the end the change of complexity, of expressivity, of their ratio, in per cent. A
        compression as published is a fall of the first with the others kept or risen.""")
    rows = []
    for plane, pattern in PLANES.items():
        cells = [plane]
        for run in runs:
            c, e = (run.column(pattern.format(side))[run.late] for side in ("complexity", "expressivity"))
            top = int(c.argmax())
            fall, rise = (100 * (side[-1] / side[top] - 1) for side in (c, e))
            ratio = 100 * (e[-1] / c[-1] / (e[top] / c[top]) - 1)
            cells.append(f"{run.steps[run.late][top]}: {fall:+.0f} {rise:+.0f} {ratio:+.0f}")
        rows.append(cells)
    yield table(["", *(run.name for run in runs)], rows)
    yield heading("By layer", 3)
    yield "Fall of complexity from its maximum after step 100 to the end, in per cent, layer by layer: plain; local.\n"
    rows = []
    for run in runs:
        cells = [run.name]
        for name in ("complexity", "complexity_local"):
            values = np.array(run.raw["by_layer"][name])[run.late]
            cells.append(
                " ".join(f"{100 * (1 - last / top):.0f}" for last, top in zip(values[-1], values.max(0), strict=True))
            )
        rows.append(cells)
    yield table(["run", "plain", "local"], rows)


# By how much a number must be under its running maximum for an alarm.
ALARMS = (0.05, 0.1)


def overfitting(runs: list[Run]) -> Iterator[str]:
    """How soon each number tells memorising from health."""
    yield heading("Overfitting told from health", 2)
    names = {name: label for name, label in SHORT.items() if name != "loss"}
    over = [run for run in runs if _overfits(run)]
    groups = {"overfitting": over} | {
        kind: [run for run in runs if run.kind == kind] for kind in ("healthy", "disturbed")
    }
    yield prose("""Last value under the maximum after step 100, in per cent, least to greatest over runs: those
        that overfit (held-out loss ends over .05 nats above its minimum), healthy ones, and those with another
        schedule (of which the spike does lasting damage). Then alarms at 5 and at 10 % under the running
        maximum on the novels probe: in how many overfitting runs, the median of nats of held-out loss above its
        lowest so far when it comes, how many came before the minimum, and in how many healthy runs (false).""")
    rows = []
    for name, label in names.items():
        cells = [label]
        for of_group in groups.values():
            falls = [_fall(run, name) for run in of_group]
            cells.append(" to ".join(f"{f(falls, default=np.nan):.0f}" for f in (min, max)))
        for level in ALARMS:
            raised = [place for run in over if (place := _alarm(run, name, level)) is not None]
            false = sum(_alarm(run, name, level) is not None for run in groups["healthy"])
            when = f", {np.median([nats for nats, _ in raised]):+.3f}" if raised else ""
            before = sum(points < 0 for _, points in raised)
            said = f"{len(raised)} of {len(over)}{when} ({before} before the minimum)"
            cells.append(f"{said}; false {false} of {len(groups['healthy'])}")
        rows.append(cells)
    yield table(["", *groups, *(f"alarm at {level:.0%}" for level in ALARMS)], rows)
    yield heading("What comes first", 3)
    yield prose("""Step of the maximum of readout expressivity (novels probe, after step 100), of the lowest
        loss on C4 and on novels; nats lost on C4 by stopping at the first, and by stopping at the lowest novels
        loss.""")
    rows = []
    for run in over:
        steps, c4 = run.steps[run.late], run.loss("c4_loss")[run.late]
        top = int(run.column("readout/token/expressivity_local")[run.late].argmax())
        low = int(run.loss("val_loss")[run.late].argmin())
        rows.append(
            [
                run.name,
                *(str(steps[i]) for i in (top, c4.argmin(), low)),
                *(f"{c4[i] - c4.min():.3f}" for i in (top, low)),
            ]
        )
    yield table(["run", "readout E", "C4 loss", "novels loss", "lost at the first", "lost at the last"], rows)


def _overfits(run: Run) -> bool:
    loss = run.loss("val_loss")
    return bool(loss[-1] - loss.min() > 0.05 and run.kind == "overfitting")


def _fall(run: Run, name: str) -> float:
    values = run.column(name)[run.late]
    top = values[np.isfinite(values)].max()
    return float(100 * (1 - values[-1] / top))


def _alarm(run: Run, name: str, level: float) -> tuple[float, int] | None:
    """Nats above the lowest held-out loss so far and points after the lowest of all, at the alarm."""
    values, loss = run.column(name)[run.late], run.loss("val_loss")[run.late]
    top = np.maximum.accumulate(values)
    under = np.flatnonzero(values < top - level * np.abs(top))
    if not len(under):
        return None
    place = int(under[0])
    return float(loss[place] - loss[: place + 1].min()), place - int(loss.argmin())


def across_models(runs: list[Run]) -> Iterator[str]:
    """The last checkpoints of different models, by their loss."""
    yield heading("Across sizes and families", 2)
    healthy = [run for run in runs if run.kind == "healthy"]
    groups = {"llama": [r for r in healthy if r.config["architecture"] == "llama"]}
    groups |= {"gpt2": [r for r in healthy if r.config["architecture"] == "gpt2"], "together": healthy}
    yield prose("""Last checkpoints of the healthy runs: Spearman with held-out loss and share of pairs over .02
        nats apart ordered rightly, novels; C4. Few models: by chance alone a rank correlation of five has a
        standard deviation of .5.""")
    rows = []
    for name, label in SHORT.items():
        cells, direction = [label], direction_of(name)
        for of_group in groups.values():
            said = []
            for probe in ("novels", "c4"):
                values = np.array([run.column(name, probe, direction)[-1] for run in of_group])
                loss = np.array([run.loss(PROBES[probe])[-1] for run in of_group])
                right, number = pairs_right(values, loss, direction)
                said.append(f"{spearman(values, loss):+.2f} {right:.2f}")
            cells.append("; ".join(said) + f" ({number} pairs)")
        rows.append(cells)
    yield table(["", *(f"{name}, {len(each)} models" for name, each in groups.items())], rows)


def figure(runs: list[Run], held: dict[tuple[str, str, str], Held]) -> None:
    """Rank correlation with held-out loss, a row a quantity, a column a run: blue where it has the right sign."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    order = sorted(runs, key=lambda run: (run.kind != "healthy", run.kind, run.config["architecture"], run.name))
    names = list(SHORT)
    worst = np.array(
        [
            [min(-direction_of(name) * held[name, run.name, probe].ranks for probe in PROBES) for run in order]
            for name in names
        ]
    )
    sheet, axis = plt.subplots(figsize=(2.6 + 0.5 * len(order), 1.9 + 0.3 * len(names)))
    image = axis.imshow(worst, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(worst):
        axis.text(column, row, f"{value:+.1f}".replace("-", "−"), ha="center", va="center", fontsize=6,
                  color="white" if abs(value) > 0.6 else "black")  # fmt: skip
    axis.set_yticks(range(len(names)), [SHORT[name] for name in names], fontsize=7)
    axis.set_xticks(
        range(len(order)), [run.name.removesuffix("_s1") for run in order], fontsize=7, rotation=60, ha="right"
    )
    sheet.colorbar(image, ax=axis, label="agreement with held-out loss, worst of three probes", fraction=0.03)
    sheet.tight_layout()
    sheet.savefig(FIGURE, dpi=110)


def train(data: Path, work: Path, only: str = "") -> None:
    """The runs whose name contains `only` and whose result is missing."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    run_all([run for run in RUNS if only in run.name], data, work, RESULTS)


def retraced(data: Path, work: Path) -> bool:
    """Print how far trajectories from checkpoints are from the callbacks'; whether all of them are within 1e-6."""
    loaded, met = Data.load(data, work), True
    for run in RETRACED:
        found = retrace(run, loaded, work / run.name)
        met &= found.largest <= 1e-6
        print(
            f"{run.name}: {found.points} points, {found.numbers} numbers, {found.equal} of them bitwise equal; "
            f"greatest difference {found.largest:.1e} ({found.where})"
        )
    return met


def report() -> Iterator[str]:
    """Every table, as markdown; the figure on the way."""
    runs = Run.load_all()
    held = held_everywhere(runs, [*candidates(), *FURTHER, "loss"])
    yield heading("Validation runs", 1)
    for part in (
        single_runs(runs, held),
        by_group(runs, held),
        summary(runs, held),
        judged_by_the_other(runs),
        beyond_the_loss(runs),
    ):
        yield from part
    for each in (phases, overfitting, across_models):
        yield from each(runs)
    figure(runs, held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="train what is missing")
    parser.add_argument("--work", type=Path, default=Path("study-work"))
    parser.add_argument("--only", default="", help="train only runs whose name contains this")
    parser.add_argument("--retrace", action="store_true", help="measure two short runs again, from their checkpoints")
    options = parser.parse_args()
    if options.retrace:
        if options.data is None:
            parser.error("--retrace: expected --data as well, to train on")
        sys.exit(0 if retraced(options.data, options.work) else 1)
    if options.data is not None:
        train(options.data, options.work, options.only)
    for part in report():
        print(part)


if __name__ == "__main__":
    main()
