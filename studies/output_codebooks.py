"""Codebooks aimed at the output in healthy and in overfitting runs: what readout and prediction do beside the loss.

    pip install -e ".[hf,plot]"
    python studies/output_codebooks.py --data FOLDER --work FOLDER      # half an hour on one core
    python studies/output_codebooks.py                                  # table and figure from the committed results

`--data` holds `novels.jsonl.gz` and `c4_sample.jsonl.gz`. Runs whose result is in `studies/results` are not run again,
and one that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from _tables import heading, prose, table

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "output_codebooks"
FIGURE = HERE.parent / "docs" / "images" / "output_codebooks.png"
AIMED = ("readout", "prediction")
QUANTITIES = ("complexity_local", "expressivity_local", "optimality_local", "score_local")
NAMES = {
    "llama_4x128": "Llama 4 × 128, tied",
    "llama_4x128_overfit_400": "the same, 400 sequences",
    "gpt2_3x96": "GPT-2 3 × 96, untied",
    "gpt2_3x96_overfit_400": "the same, 400 sequences",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="train what is missing")
    parser.add_argument("--work", type=Path, default=Path("study-work"))
    options = parser.parse_args()
    if options.data is not None:
        train(options.data, options.work)
    for part in report():
        print(part)


def train(data: Path, work: Path) -> None:
    """The four runs, those whose result is missing."""
    from _runs import Config, run_all

    llama = {"architecture": "llama", "layers": 4, "width": 128}
    gpt2 = {"architecture": "gpt2", "layers": 3, "width": 96, "tied": False}
    overfit = {"sequences": 400, "schedule": "constant", "steps": 600}
    RESULTS.mkdir(parents=True, exist_ok=True)
    runs = [
        Config("llama_4x128", **llama),
        Config("gpt2_3x96", **gpt2),
        Config("llama_4x128_overfit_400", **llama, **overfit),
        Config("gpt2_3x96_overfit_400", **gpt2, **overfit),
    ]
    run_all(runs, data, work, RESULTS)


def report() -> Iterator[str]:
    """Every table, as markdown; the figure on the way."""
    runs = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in NAMES}
    yield heading("Codebooks aimed at the output", 1)
    yield prose("""Token order, probe of held-out novels; after step 100: value at the lowest loss, greatest, last;
        Spearman's rank correlation with the held-out loss on novels, of the novels probe and of the C4 probe.""")
    for name, run in runs.items():
        yield from of_run(NAMES[name], run)
    figure(runs)


def column(run: dict[str, Any], name: str, probe: str = "novels") -> np.ndarray:
    return np.array([np.nan if value is None else value for value in run[probe][name]])


def of_run(name: str, run: dict[str, Any]) -> Iterator[str]:
    """Largest value after step 100, value at the end, at the lowest loss, and rank correlation with the loss."""
    steps, loss = np.array(run["step"]), np.array(run["val_loss"])
    late = steps >= 100
    best = int(loss.argmin())
    yield heading(f"{name}: loss {loss[best]:.3f} at step {steps[best]}, {loss[-1]:.3f} at step {steps[-1]}", 2)
    rows = []
    for view, quantity in [*itertools.product(AIMED, QUANTITIES), ("", "optimality")]:
        named = f"{view}/token/{quantity}".lstrip("/")
        values = column(run, named)
        top = int(np.nanargmax(np.where(late, values, np.nan)))
        ranks = [
            spearmanr(column(run, named, probe)[late], loss[late], nan_policy="omit").statistic
            for probe in ("novels", "c4")
        ]
        figures = (values[best], values[top], steps[top], values[-1], values[-1] / values[top] - 1, *ranks)
        formats = (".4f", ".4f", "d", ".4f", "+.1%", "+.2f", "+.2f")
        rows.append([view or "plain", quantity, *(format(*each) for each in zip(figures, formats, strict=True))])
    yield table(["", "", "at the lowest loss", "greatest", "at step", "last", "fall", "novels", "C4"], rows)


def figure(runs: dict[str, dict[str, Any]]) -> None:
    """Loss, complexity, expressivity and score of both codebooks over steps, a column for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = ("loss", "complexity_local", "expressivity_local", "score_local")
    size = (3.1 * len(runs), 7.5)
    sheet, axes = plt.subplots(len(rows), len(runs), figsize=size, sharex="col", sharey="row")
    colours = {"readout": "#0072b2", "prediction": "#d55e00"}
    for place, (name, run) in enumerate(runs.items()):
        steps, loss = np.array(run["step"]), np.array(run["val_loss"])
        for row, quantity in enumerate(rows):
            axis = axes[row, place]
            if quantity == "loss":
                axis.plot(steps, loss, color="black", label="held-out loss")
                axis.plot(steps, run["train_loss"], color="black", lw=0.8, ls=":", label="training loss")
                axis.set_title(NAMES[name], fontsize=9)
            for view in AIMED if quantity != "loss" else ():
                axis.plot(steps, column(run, f"{view}/token/{quantity}"), color=colours[view], label=view)
            axis.axvline(steps[loss.argmin()], color="grey", lw=0.8, ls="--")
            axis.grid(alpha=0.25)
            if place == 0:
                axis.set_ylabel(quantity.replace("_", " ").replace("local", "(local)"), fontsize=8)
                if row < 2:
                    axis.legend(fontsize=7)
        axes[-1, place].set_xlabel("step", fontsize=8)
    sheet.tight_layout()
    sheet.savefig(FIGURE, dpi=110)


if __name__ == "__main__":
    main()
