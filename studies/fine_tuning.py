"""A trained model fine-tuned on other text, on preferred answers, and by DPO: what the numbers do beside the losses.

    python studies/fine_tuning.py                                   # tables from the committed results, seconds
    python studies/fine_tuning.py --data FOLDER --work FOLDER       # trains what is missing: half an hour on one core

All begin with the last weights of a run of the validation study, which is trained where they are missing. The folder
of the data holds `preferences_sample.jsonl.gz` (lines with `prompt`, `chosen`, `rejected`), too. Every fifth pair is
held out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from _ranking import filled, pairs_right, spearman
from _runs import Config, run_all
from _tables import heading, prose, table
from ib_callback.common.files import write_atomically

RESULTS = Path(__file__).parent / "results" / "fine_tuning"
BASE = "llama_4x128"
SEEDS = (1, 2)
# Of DPO: how strongly the model is held to the one it began as.
BETA = 0.1
HELD_OUT = 5


def _runs(seed: int) -> list[Config]:
    shape: dict[str, Any] = {"architecture": "llama", "layers": 4, "width": 128, "seed": seed}
    base = f"{BASE}_s{seed}"
    supervised = f"{BASE}_sft_s{seed}"
    return [
        Config(f"{BASE}_c4_s{seed}", **shape, base=base, steps=300, points=10, warmup=20, rate=3e-4),
        Config(supervised, **shape, base=base, steps=96, points=8, batch=16, warmup=10, rate=3e-4),
        Config(f"{BASE}_dpo_s{seed}", **shape, base=supervised, steps=120, points=10, batch=16, warmup=10, rate=1e-4),
    ]


# Preference information in the models as the runs left them, and in others with random weights.
CONTROL = RESULTS / "control.json"
RUNS = [run for seed in SEEDS for run in _runs(seed)]


def train(data: Path, work: Path, only: str = "") -> None:
    """The runs whose name contains `only` and whose result is missing, and what they begin with."""
    import validation

    RESULTS.mkdir(parents=True, exist_ok=True)
    wanted = [run for run in RUNS if only in run.name and not (RESULTS / f"{run.name}.json").exists()]
    for run in validation.RUNS:
        is_base = any(run.name == each.base for each in wanted)
        if is_base and not (work / run.name / "weights" / f"{run.steps}.pt").exists():
            run_all([run], data, work, validation.RESULTS)
    run_all(wanted, data, work, RESULTS, partial(_task, data, work))
    if not CONTROL.exists():
        import _tuning

        shape: dict[str, Any] = {"architecture": "llama", "layers": 4, "width": 128}
        configs = {f"random weights, {seed}": Config("", **shape, seed=seed) for seed in (11, 12, 13)}
        configs |= {"base": Config(f"{BASE}_s1", **shape)}
        configs |= {name: Config(f"{BASE}_{name}_s1", **shape) for name in ("c4", "sft", "dpo")}
        write_atomically(CONTROL, json.dumps(_tuning.control(data, work, configs, HELD_OUT), indent=1).encode())


def _task(data: Path, work: Path, config: Config) -> Any:
    """What a run is trained on, and what it is judged by."""
    import _tuning

    if "_c4_" in config.name:
        return _tuning.on_c4(data, work, config)
    return _tuning.on_pairs(data, work, config, beta=BETA if "_dpo_" in config.name else None, held_out=HELD_OUT)


# Held against the losses, and which way is taken to be better.
CANDIDATES = {
    "token/optimality": ("plain ratio", 1),
    "token/optimality_above_null": ("ratio above null", 1),
    "token/expressivity_local": ("local E", 1),
    "token/optimality_local": ("local ratio", 1),
    "last/token/optimality_local": ("local ratio, last", 1),
    "last/token/score_local": ("local score, last", 1),
    "readout/token/complexity_local": ("readout C", -1),
    "readout/token/expressivity_local": ("readout E", 1),
    "readout/token/optimality_local": ("readout ratio", 1),
    "readout/token/score_local": ("readout score", 1),
    "prediction/token/complexity_local": ("prediction C", -1),
    "prediction/token/expressivity_local": ("prediction E", 1),
    "prediction/token/optimality_local": ("prediction ratio", 1),
    "prediction/token/score_local": ("prediction score", 1),
    "dispersion": ("dispersion", 1),
    "rankme": ("RankMe", 1),
    "alpha_req": ("α-ReQ", -1),
    "loss": ("loss of the probe", -1),
}
PROBES = {"novels": "val_loss", "c4": "c4_loss"}
SHOWN = ("token/optimality", "token/expressivity_local", "readout/token/expressivity_local",
         "readout/token/score_local", "prediction/token/expressivity_local",
         "prediction/token/score_local")  # fmt: skip
PAIRS = ("held", "seen")


def report() -> Iterator[str]:
    """All tables, as markdown."""
    yield heading("Fine-tuning and DPO", 1)
    if CONTROL.exists():
        yield from _control(json.loads(CONTROL.read_text()))
    for run in RUNS:
        path = RESULTS / f"{run.name}.json"
        if path.exists():
            found = json.loads(path.read_text())
            yield heading(run.name, 2)
            yield prose(
                f"""{run.steps} steps of {run.batch}, rate {run.rate:g}, from the last weights of {run.base};
                {len(found["step"])} points."""
            )
            yield from _losses(found)
            yield from _ranked(found)
            if "held_accuracy" in found:
                yield from _preference(found)


def _control(found: dict[str, Any]) -> Iterator[str]:
    """Preference information of models as they are."""
    yield heading("Preference information before, after, and with random weights", 2)
    yield prose("Information above its null in 1e-5 log(100), in standard deviations of the null, and p.")
    parts = list(next(iter(found.values())))
    rows = []
    for name, one in found.items():
        cells = []
        for each in one.values():
            above = each["information"] - each["null"]
            cells.append(f"{1e5 * above:.2f}, {above / each['std']:+.2f}, {each['p']:.3f}")
        rows.append([name, *cells])
    pairs = [next(iter(found.values()))[part]["pairs"] for part in parts]
    yield table(["model", *(f"{part} ({n} pairs)" for part, n in zip(parts, pairs, strict=True))], rows)


def _losses(found: dict[str, Any]) -> Iterator[str]:
    """Losses, and some numbers on both probes, at every point."""
    titles = [f"{CANDIDATES[name][0]}, {probe}" for probe in PROBES for name in SHOWN]
    rows = []
    for k, step in enumerate(found["step"]):
        losses = [found[name][k] for name in ("train_loss", "val_loss", "c4_loss")]
        numbers = [found[probe][name][k] for probe in PROBES for name in SHOWN]
        rows.append([f"{step}", *("" if v is None else f"{v:.3f}" for v in losses), *(f"{v:.4f}" for v in numbers)])
    yield table(["step", "training loss", "novels", "C4", *titles], rows)


def _ranked(found: dict[str, Any]) -> Iterator[str]:
    """Each number against the held-out loss of its probe's domain."""
    yield prose("Spearman with the held-out loss of the probe's own domain; share of pairs over .02 nats apart.")
    rows = []
    for name, (title, better) in CANDIDATES.items():
        cells = []
        for probe, judge in PROBES.items():
            loss = np.array(found[judge])
            values = filled(found[probe][name], better)
            right, number = pairs_right(values, loss, better)
            share = f"{right:.2f} of {number}" if number else "no pair"
            cells.append(f"{spearman(values, loss):+.2f}, {share}")
        rows.append([title, *cells])
    yield table(["number", *PROBES], rows)


def _preference(found: dict[str, Any]) -> Iterator[str]:
    """Preference information on pairs that are held out and that were trained on, beside how these are judged."""
    yield prose(
        """Pairs that are held out and as many that are trained on: share with the greater gain over the first weights
        of this run in the preferred answer (accuracy), mean difference of gains in nats (margin), share with the
        likelier tokens in it; preference information in 1e-5 log(100), its null and z, p, ratio above null in 1e-3."""
    )
    columns: dict[str, np.ndarray] = {}
    for name in PAIRS:
        own = {key.rpartition("/")[2]: np.array(v, float) for key, v in found["novels"].items() if key.startswith(name)}
        columns |= {
            f"{name} {judge}": np.array(found[f"{name}_{judge}"]) for judge in ("accuracy", "margin", "likelier")
        }
        above = own["information"] - own["information_null"]
        columns |= {
            f"{name} information": 1e5 * own["information"],
            f"{name} null": 1e5 * own["information_null"],
            f"{name} above null": 1e5 * above,
            f"{name} z": above / own["information_null_std"],
            f"{name} p": own["information_p_value"],
            f"{name} ratio above null": 1e3 * own["ratio_above_null"],
        }
    digits = {"accuracy": 3, "likelier": 3, "margin": 2, "p": 3, "above null": 2, "z": 2}
    rows = [
        [f"{step}", *(f"{column[k]:.{digits.get(title.partition(' ')[2], 2)}f}" for title, column in columns.items())]
        for k, step in enumerate(found["step"])
    ]
    yield table(["step", *columns], rows)
    yield prose("Spearman over these points, of how the pairs are judged with what is known of preference:")
    known = ("above null", "z", "ratio above null")
    rows = [
        [
            f"{name} {judge}",
            *(f"{spearman(columns[f'{name} {one}'], columns[f'{name} {judge}']):+.2f}" for one in known),
        ]
        for name in PAIRS
        for judge in ("accuracy", "margin", "likelier")
    ]
    yield table(["judged", *known], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="train what is missing")
    parser.add_argument("--work", type=Path, default=Path("study-work"))
    parser.add_argument("--only", default="", help="train only runs whose name contains this")
    options = parser.parse_args()
    if options.data is not None:
        train(options.data, options.work, options.only)
    for part in report():
        print(part)


if __name__ == "__main__":
    main()
