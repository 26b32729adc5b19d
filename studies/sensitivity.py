"""What the numbers depend on beside the model, and other measures of the same states, from weights that runs kept.

pip install -e ".[hf]" scikit-dimension
python studies/sensitivity.py                                  # tables from the committed results, seconds
python studies/sensitivity.py --data FOLDER --work FOLDER      # measures what is missing: an hour on one core
python studies/sensitivity.py --text c4_sample.jsonl.gz --versions FOLDER --model NAME=FOLDER[:FILE] …

`--work` is the folder of `validation.py`, whose runs keep the weights of every measured point. Results are written
after each point, and a point that is there is not measured again. The last line is for versions of real models: of each
what was measured, NAME/VERSION.json, and its states, states/NAME/VERSION.npz, are in the folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

import ib_callback as ib
from _comparators import shuffle_corrections, two_nn
from _ranking import APART, filled, pairs_right, spearman
from _runs import Config, Data
from _tables import heading, prose, table
from _versions import shared
from ib_callback.common.files import write_atomically
from ib_callback.measuring.companions import COMPANIONS
from validation import AFTER
from validation import RUNS as CONFIGS

RESULTS = Path(__file__).parent / "results" / "sensitivity"
RUNS = ("gpt2_3x96_s1", "gpt2_3x96_overfit_160_s1", "llama_4x128_s1", "llama_4x128_overfit_1000_s1")
# Real models, of which versions were damaged; their losses are further apart.
MODELS = ("smollm2", "gemma")
APART_OF_VERSIONS = 0.1
ORDERS = ("token", "bigram")
# In models of up to four layers the late ones are the last one.
PLACES = {"mean": "", "last": "last"}
AIMED = ("readout", "prediction")
SIDES = ("complexity", "expressivity")
OF_LAYERS = ("optimality", "optimality_above_null", "expressivity_local", "optimality_local", "score_local")
OF_OUTPUT = ("complexity_local", "expressivity_local", "optimality_local", "score_local")
CANDIDATES = [
    f"{place}/{quantity}"
    for places, quantities in ((PLACES, OF_LAYERS), (AIMED, OF_OUTPUT))
    for place, quantity in itertools.product(places, quantities)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="measure what is missing")
    parser.add_argument("--work", type=Path, default=Path("study-work"))
    parser.add_argument("--text", type=Path, help="that the real models were measured on")
    parser.add_argument("--versions", type=Path, help="folder of what was kept of them")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER[:FILE]")
    options = parser.parse_args()
    if options.data is not None:
        train(options.data, options.work)
    for model in options.model:
        of_versions(model, options.text, options.versions)
    for part in report():
        print(part)


# Measuring


@dataclass(frozen=True)
class Setting:
    """One way to measure: changes of the keywords of a `Meter`, which sequences, and how to read the measurement.

    sequences: the first of the 256 of the probe, and every how many are taken.
    tokens: number of codewords of readout and prediction, which the package fixes at 100.
    aimed: whether these two depend on the setting.
    read: by name of the setting in the results, the order and the variant of the layers' views.
    """

    read: dict[str, tuple[str, str]]
    keywords: dict[str, Any] = field(default_factory=dict)
    sequences: tuple[int, int] = (0, 4)
    tokens: int = 100
    aimed: bool = True

    def chosen(self, probe: Tensor) -> Tensor:
        """The sequences."""
        first, every = self.sequences
        return probe[first::every]

    def measure(self, probe: Tensor, model: nn.Module) -> ib.Measurement:
        """The measurement of a model."""
        keywords = {"orders": ORDERS, "loss": False, "readout": self.aimed, "prediction": self.aimed} | self.keywords
        meter = ib.Meter(ib.Probe.from_tokens(self.chosen(probe)), **keywords)
        with patch("ib_callback.measuring.meter.NUMBER", self.tokens):
            return meter.measure(model)

    def values(self, measurement: ib.Measurement) -> dict[str, dict[str, float | None]]:
        """By name in the results, the candidates."""
        found: dict[str, dict[str, float | None]] = {}
        for name, (order, variant) in self.read.items():
            own = found.setdefault(name, {})
            for place, quantity in itertools.product(PLACES, OF_LAYERS):
                view = "/".join(filter(None, (variant, PLACES[place], order)))
                own[f"{place}/{quantity}"] = rounded(getattr(measurement[view], quantity))
            for view, quantity in itertools.product(AIMED if self.aimed and not variant else (), OF_OUTPUT):
                own[f"{view}/{quantity}"] = rounded(getattr(measurement[f"{view}/{order}"], quantity))
        return found


BASE = Setting(
    {"base": ("token", ""), "bigram": ("bigram", ""), "centred": ("token", "centred")},
    {"center": True, "loss": "all", "companions": ("rankme", "alpha_req"), "companion_layers": "all"},
)


def changed(width: int) -> list[Setting]:
    """The others, for a model of this width."""

    def one(name: str, variant: str = "", **other: Any) -> Setting:
        own = {part: other.pop(part) for part in ("sequences", "tokens") if part in other}
        return Setting({name: ("token", variant)}, other, aimed=bool(own), **own)

    calibrated = ib.calibrated_temperature(width, 100)
    return [
        one("30 bins", num_bins=30, tokens=30),
        one("300 bins", num_bins=300, tokens=300),
        one("seed 1", seed=1),
        one("seed 2", seed=2),
        one("4 draws", "averaged", draws=4),
        *(one(f"{256 // step} seq.", sequences=(0, step)) for step in (16, 8, 2)),
        one("half b", sequences=(2, 4)),
        one("temp. / 2", temperature=calibrated / 2),
        one("temp. x 2", temperature=calibrated * 2),
        one("temp. 1", temperature=1.0),
        Setting({"trigram": ("trigram", "")}, {"orders": (*ORDERS, "trigram")}),
    ]


def rounded(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.5g}")


def train(data: Path, work: Path) -> None:
    """Measure all kept points of the runs that are not in the results yet."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    configs = {config.name: config for config in CONFIGS}
    probe = Data.load(data, work).probe
    for name in RUNS:
        path, losses = RESULTS / f"{name}.json", work / name / "losses.json"
        if not losses.exists():
            continue
        told = {int(step): each for step, each in json.loads(losses.read_text()).items()}
        run = json.loads(path.read_text()) if path.exists() else {"package": ib.__version__, "step": []}
        for step in sorted(step for step in told if step == 0 or step > AFTER):
            if step in run["step"]:
                continue
            model = loaded(configs[name], work, step)
            append(run, step, told[step], point(probe, model, configs[name].width))
            write(path, run)
            print(f"{name}: step {step}", flush=True)
        if run["step"] and run.get("control", {}).get("step") != max(run["step"]):
            step = max(run["step"])
            run["control"] = {"step": step} | control(probe, loaded(configs[name], work, step))
            write(path, run)


def loaded(config: Config, work: Path, step: int) -> nn.Module:
    """The model of a run as it was."""
    model = config.model()
    model.load_state_dict(torch.load(work / config.name / "weights" / f"{step}.pt", weights_only=True))
    return model.eval()


def write(path: Path, found: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(found, separators=(",", ":")).encode())


def append(run: dict[str, Any], step: int, losses: Mapping[str, float], parts: Mapping[str, Mapping[str, Any]]) -> None:
    run["step"].append(step)
    for name, value in losses.items():
        run.setdefault(name, []).append(rounded(value))
    for part, values in parts.items():
        for name, value in values.items():
            run.setdefault(part, {}).setdefault(name, []).append(value)


def point(probe: Tensor, model: nn.Module, width: int) -> dict[str, dict[str, float | None]]:
    """Candidates by setting, and under "comparators" the other measures."""
    base = BASE.measure(probe, model)
    found = BASE.values(base)
    for setting in changed(width):
        found |= setting.values(setting.measure(probe, model))
    found["comparators"] = {name: rounded(value) for name, value in comparators(probe, model, base)}
    return found


def comparators(probe: Tensor, model: nn.Module, base: ib.Measurement) -> Iterator[tuple[str, float | None]]:
    """Other measures by name, of the last layer, the middle one and the mean of all."""
    tokens = BASE.chosen(probe)
    parts = {"last": len(base.layers) - 1, "middle": (len(base.layers) - 1) // 2}
    yield "loss", base.loss
    yield "mean/dispersion", base.dispersion
    for place, index in parts.items():
        yield f"{place}/dispersion", base.dispersion_by_layer[index]
        for name, by_layer in base.companions.items():
            yield f"{place}/{name}", by_layer[base.layers[index]]
    with torch.no_grad():
        states = [model(part, output_hidden_states=True).hidden_states for part in tokens.split(16)]
    for place, index in parts.items():
        # The first of the hidden states are embeddings.
        yield f"{place}/twonn", two_nn(torch.cat([each[1 + index] for each in states]).flatten(0, 1))
    yield from shuffle_corrections(assignments(probe, model), token_labels(probe), parts | {"mean": None}).items()


def control(probe: Tensor, model: nn.Module) -> dict[str, float | None]:
    """The shuffle corrections with labels permuted over the positions, where the truth is 0; mean over layers."""
    generator = np.random.RandomState(1)
    labels = [generator.permutation(own) for own in token_labels(probe)]
    found = shuffle_corrections(assignments(probe, model), labels, {"mean": None})
    return {name: rounded(value) for name, value in found.items()}


def assignments(probe: Tensor, model: nn.Module) -> Tensor:
    """[T, L, 100] of the positions of the base."""
    meter = ib.Meter(ib.Probe.from_tokens(BASE.chosen(probe)), orders=ORDERS)
    return torch.stack([table for _, table in meter.assignments(model)], 1)


def token_labels(probe: Tensor) -> list[np.ndarray]:
    """[T] of these positions, the preceding and the trailing token."""
    own = ib.Probe.from_tokens(BASE.chosen(probe))
    return [
        ib.ngram_labels(own, "token", side=side, widest=ORDERS[-1])[1].numpy() for side in ("preceding", "trailing")
    ]


def of_versions(spec: str, text: Path, versions: Path) -> None:
    """Other measures of a real model's versions whose states were kept, and the candidates that were measured then."""
    folder = shared().ModelFolder.parse(spec)
    path = RESULTS / f"{folder.name}.json"
    found = json.loads(path.read_text()) if path.exists() else {"version": []}
    kept = {each.stem: each for each in sorted((versions / "states" / folder.name).glob("*.npz"))}
    probe = None
    for name, where in kept.items():
        of_version = versions / folder.name / f"{name}.json"
        if name in found["version"] or not of_version.exists():
            continue
        arrays, told = np.load(where), json.loads(of_version.read_text())
        probe = probe or shared().whole_sequences(text, folder.load()[0], *arrays["last"].shape[:2])
        measurement = ib.Measurement.from_dict(told["measurement"])
        found["version"].append(name)
        for loss in ("loss", "refitted"):
            found.setdefault(loss, []).append(rounded(float(np.mean(told["losses"][loss]))))
        parts = Setting({"base": ("token", "")}).values(measurement) | {"comparators": dict(of_states(arrays, probe))}
        for part, values in parts.items():
            for each, value in values.items():
                found.setdefault(part, {}).setdefault(each, []).append(rounded(value))
        write(path, found)
        print(f"{folder.name}: {name}", flush=True)


def of_states(arrays: Mapping[str, np.ndarray], probe: ib.Probe) -> Iterator[tuple[str, float | None]]:
    """The same measures as `comparators`, of the last and the middle layer, from states [N, S, dim] alone."""
    places, _ = ib.ngram_labels(probe, "token", widest=ORDERS[-1])
    labels = [
        ib.ngram_labels(probe, "token", side=side, widest=ORDERS[-1])[1].numpy() for side in ("preceding", "trailing")
    ]
    parts = ("last", "middle")
    tables = []
    for place in parts:
        whole = torch.from_numpy(arrays[place].astype(np.float32))
        states = whole[places[:, 0], places[:, 1]]
        unit = nn.functional.normalize(states.double(), dim=1)
        total = len(states)
        yield f"{place}/dispersion", 1 - (float(unit.sum(0).square().sum()) - total) / (total * (total - 1))
        second = states.double().T @ states.double()
        for name, measure in COMPANIONS.items():
            yield f"{place}/{name}", measure(states.double().sum(0), second, total)
        yield f"{place}/twonn", two_nn(whole.flatten(0, 1))
        tables.append(ib.soft_assign(states, ib.reference_points(states.shape[1]), "calibrated"))
    yield from shuffle_corrections(torch.stack(tables, 1), labels, {name: k for k, name in enumerate(parts)}).items()


# Tables


def report() -> Iterator[str]:
    """All tables, as markdown."""
    runs = {name: json.loads(path.read_text()) for name in RUNS if (path := RESULTS / f"{name}.json").exists()}
    models = {name: json.loads(path.read_text()) for name in MODELS if (path := RESULTS / f"{name}.json").exists()}
    yield heading("Sensitivity and other measures", 1)
    # A run that has just begun says nothing yet.
    runs = {name: run for name, run in runs.items() if counted(run).sum() > 2}
    for name, run in runs.items():
        loss = np.array(run["val_loss"])[counted(run)]
        between = f"held-out losses {loss.min():.3f} to {loss.max():.3f}"
        yield prose(f"{name}: {len(loss)} points after step {AFTER}, {between}.")
    yield from signs(runs)
    yield from comparisons(runs, models)
    yield from dimension(runs)
    for name, run in runs.items():
        yield from of_settings(name, run)


@dataclass(frozen=True)
class Held:
    """A column held against a loss."""

    ranks: float
    right: float
    pairs: int

    @classmethod
    def of(cls, results: Mapping[str, Any], name: str, values: Sequence[float | None]) -> Held:
        """Over the points of a run that count, or all versions of a model. An undefined value counts as the worst."""
        better = direction(name)
        column = filled(values, better)
        if "version" in results:
            loss, apart = np.array(results["refitted"]), APART_OF_VERSIONS
        else:
            loss, apart = np.array(results["val_loss"])[counted(results)], APART
            column = column[counted(results)]
        return cls(spearman(column, loss), *pairs_right(column, loss, better, apart))

    def __str__(self) -> str:
        return f"{self.ranks:+.2f} / {self.right:.2f}"


def counted(run: Mapping[str, Any]) -> np.ndarray:
    """Which points of a run."""
    return np.array(run["step"]) > AFTER


def direction(name: str) -> int:
    """+1 where more is better, as for all measures but these."""
    return -1 if name.rpartition("/")[2] in ("loss", "complexity", "complexity_local", "alpha_req") else 1


def settings_of(run: Mapping[str, Any]) -> list[str]:
    return [name for name, part in run.items() if isinstance(part, dict) and name not in ("comparators", "control")]


def signs(runs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield heading("On which settings the sign of the rank correlation depends", 2)
    yield prose("""Spearman with held-out loss at the base (token order, 100 bins or codewords, one draw, seed 0,
        64 × 128 tokens, calibrated temperature), then from the least to the greatest over all settings, their number,
        and those whose sign is another than at the base. Settings are changed one at a time; readout and prediction
        have no draws, seed, temperature or centring. Right is + for complexity, − for all others.""")
    rows = []
    for candidate in CANDIDATES:
        cells = [candidate]
        for run in runs.values():
            found = {
                each: Held.of(run, candidate, run[each][candidate]).ranks
                for each in settings_of(run)
                if candidate in run[each]
            }
            other = [each for each, value in found.items() if value * found["base"] < 0]
            between = f"{min(found.values()):+.2f} to {max(found.values()):+.2f}"
            cells.append(f"{found['base']:+.2f}; {between} ({len(found)}); {', '.join(other) or 'none'}")
        rows.append(cells)
    yield table(["", *runs], rows)
    right = [
        candidate
        for candidate in CANDIDATES
        if all(
            Held.of(run, candidate, run[each][candidate]).ranks * direction(candidate) < 0
            for run in runs.values()
            for each in settings_of(run)
            if candidate in run[each]
        )
    ]
    yield f"Right in every run at every setting: {', '.join(right) or 'none'}.\n"


def of_settings(name: str, run: Mapping[str, Any]) -> Iterator[str]:
    """Candidates in rows, settings in columns."""
    names = settings_of(run)
    yield heading(f"All settings: {name}", 2)
    yield prose(f"""Spearman with held-out loss / share of the {Held.of(run, "loss", run["val_loss"]).pairs} pairs over
        {APART} nats apart that are ordered rightly.""")
    rows = []
    for candidate in CANDIDATES:
        found = [str(Held.of(run, candidate, run[each][candidate])) if candidate in run[each] else "" for each in names]
        rows.append([candidate, *found])
    yield table(["", *names], rows)


def comparisons(runs: Mapping[str, Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield heading("Other measures of the same states", 2)
    versions = ", ".join(f"{len(model['version'])} versions of {name}" for name, model in models.items())
    yield prose(f"""Spearman with held-out loss / share of pairs ordered rightly: of a run's points over {APART} nats
        apart, and of {versions or "versions of real models"} over {APART_OF_VERSIONS} nats apart in the loss after one
        scale on the logits was fitted. Of loss, complexity and α-ReQ less counts as better, of all others more. The
        candidates at the base stand above; ssr is scaled shuffle reduction, bae bounded asymptotic extrapolation
        (Sheintuch et al. 2022), of token order; ratio and score are made of these.""")
    results = dict(runs) | dict(models)
    columns = {name: {each: part["base"][each] for each in CANDIDATES} | others(part) for name, part in results.items()}
    rows = []
    for name in dict.fromkeys(each for of_one in columns.values() for each in of_one):
        found = [
            str(Held.of(part, name, columns[each][name])) if name in columns[each] else ""
            for each, part in results.items()
        ]
        rows.append([name, *found])
    yield table(["", *results], rows)
    yield from fits(results)


def fits(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield heading("Whether the corrections correct", 3)
    yield prose("""Least R² of the extrapolation over the points that count, of complexity and of expressivity of the
        last layer. Then what both corrections leave where labels are permuted over the positions, so that the truth is
        0 (mean over layers; last point).""")
    rows = []
    for name, part in results.items():
        chosen = counted(part) if "step" in part else slice(None)
        least = [
            np.nanmin(np.array(part["comparators"][f"last/bae/{side}_fit"], dtype=np.float64)[chosen]) for side in SIDES
        ]
        left = part.get("control")
        cells = [
            "not run" if left is None else " / ".join(f"{left[f'mean/{way}/{side}']:.4f}" for side in SIDES)
            for way in ("ssr", "bae")
        ]
        rows.append([name, " / ".join(f"{value:.4f}" for value in least), *cells])
    yield table(["", "least R²", "ssr of permuted labels", "bae of permuted labels"], rows)


# By how much the intrinsic dimension must be above its running minimum.
ALARMS = (0.1, 0.2, 0.3)


def dimension(runs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield heading("Intrinsic dimension and overfitting", 3)
    yield prose("""TwoNN after step 100: least, last; then the step at which it is first 10, 20 and 30 % above its
        running minimum, and in brackets the held-out loss there above its lowest so far.""")
    rows = []
    for (name, run), place in itertools.product(runs.items(), ("last", "middle")):
        steps, loss = np.array(run["step"])[counted(run)], np.array(run["val_loss"])[counted(run)]
        values = filled(run["comparators"][f"{place}/twonn"], -1)[counted(run)]
        above = values / np.minimum.accumulate(values) - 1
        cells = [name, place, str(steps[loss.argmin()]), f"{values.min():.1f}, {values[-1]:.1f}"]
        for level in ALARMS:
            raised = np.flatnonzero(above > level)
            lost = loss - np.minimum.accumulate(loss)
            cells.append(f"{steps[raised[0]]} ({lost[raised[0]]:+.3f})" if len(raised) else "never")
        rows.append(cells)
    yield table(["", "layer", "lowest loss at", "least, last", *(f"{level:.0%}" for level in ALARMS)], rows)


DERIVED: dict[str, Callable[[float, float], float]] = {
    "ratio": lambda c, e: e / c,
    "score": lambda c, e: e * e / c,
}


def others(part: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Columns of the other measures by name; ratios and scores of the corrected information with them."""
    found = {name: values for name, values in part["comparators"].items() if not name.endswith("_fit")}
    for name in [name for name in found if name.endswith("/complexity")]:
        stem = name.removesuffix("complexity")
        for kind, of in DERIVED.items():
            pairs = zip(found[name], found[f"{stem}expressivity"], strict=True)
            # Without any complexity there is neither.
            found[stem + kind] = [None if not c or c < 0 or e is None else of(c, e) for c, e in pairs]
    return found


if __name__ == "__main__":
    main()
