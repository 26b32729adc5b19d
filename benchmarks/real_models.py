"""What the numbers say of real models: of a trained one against its untrained self, and of damaged ones by their loss.

    python benchmarks/real_models.py --text c4.jsonl.gz --model smollm2=FOLDER:FILE.gguf --model gemma=FOLDER:FILE.gguf
    python benchmarks/real_models.py --text … --model … --damaged --sequences 64 --length 128

Without `--damaged`: each model and the same architecture with random weights, on the first whole sequences of the text;
quantities in the mean over layers, late and last, and by layer. Held to: the 95 % intervals of local expressivity are
disjoint, with the trained model above; those of the local ratio are disjoint, or the untrained model has none; the
trained model has one.

With `--damaged`: 13 versions of each model. All weight matrices, embeddings included, are damaged: five levels of
normal noise, in standard deviations of the matrix; four shares of the smallest entries set to zero; all entries of each
matrix shuffled; and two untrained models. Every number is compared with the loss. Damaged models are confidently wrong,
so one scale on the logits is fitted first, on every eighth sequence; the loss at that scale is then over all of them.
`--noise` and `--pruned` set other levels. Codebooks aimed at the output are printed beside the local numbers, and
whether their score is in the order of the loss wherever their local expressivity is over three standard errors.
A ratio that is undefined because nothing local is resolved counts as the lowest. Pairs are right if the better loss
comes with the better number, by its direction (numbers without one: higher).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import stdtrit
from scipy.stats import kendalltau, spearmanr
from torch import Tensor, nn

import ib_callback as ib
from _common import ModelFolder, describe_machine, untrained, versions, views, whole_sequences
from ib_callback.results.metrics import BOOKKEEPING, PRIMARY_SCALARS, better_direction

ORDERS = ("token", "bigram")
NOISE, PRUNED = (0.05, 0.1, 0.15, 0.2, 0.3), (0.2, 0.4, 0.5, 0.6)
# Losses closer than this, in nats a token, are not ordered.
APART = 0.1


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help='.txt, .jsonl or .jsonl.gz with a "text" field')
    parser.add_argument("--model", type=ModelFolder.parse, action="append", required=True, metavar="NAME=FOLDER[:FILE]")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--groups", type=int, default=16, help="of sequences, for standard errors")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--damaged", action="store_true", help="compare 13 versions of each model by their loss")
    parser.add_argument("--noise", type=float, nargs="*", default=NOISE, help="levels, with --damaged")
    parser.add_argument("--pruned", type=float, nargs="*", default=PRUNED, help="shares, with --damaged")
    parser.add_argument("--center", action=argparse.BooleanOptionalAction, default=True, help="of states, too")
    parser.add_argument("--keep", type=Path, help="folder of measurements to reuse; one for each setting")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"{describe_machine()}; {options.sequences} x {options.length} tokens of {options.text.name}")
    if options.damaged:
        damaged(options)
    elif not trained_and_untrained(options):
        sys.exit(1)


def measured(meter: ib.Meter, model: Callable[[], nn.Module], kept: Path | None, more: Callable[..., Any]) -> Any:
    """A measurement of the model and what `more` says of it; read from the file `kept` if it is there."""
    if kept is not None and kept.exists():
        found = json.loads(kept.read_text())
        return ib.Measurement.from_dict(found["measurement"]), found["more"]
    started = time.perf_counter()
    made = model()
    measurement = meter.measure(made)
    extra = more(made)
    print(f"  ({measurement.seconds:.0f} s to measure, {time.perf_counter() - started:.0f} s in all)", file=sys.stderr)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"measurement": measurement.to_dict(), "more": extra}))
    return measurement, extra


PLAIN = ("complexity", "expressivity", "optimality", "complexity_null", "complexity_baseline",
         "complexity_above_null", "expressivity_above_null", "optimality_above_null")  # fmt: skip
LOCAL = ("complexity_local", "expressivity_local", "optimality_local")
AIMED = ("readout", "prediction")
BY_LAYER = ("complexity", "expressivity", "complexity_null", "complexity_baseline", *LOCAL[:2])
HEADINGS = ("C", "E", "E/C", "null", "document", "C-null", "E-null", "ratio", "local C", "local E", "local ratio")


def number(point: Any, name: str) -> str:
    value, error = getattr(point, name), getattr(point, f"{name}_se")
    text = "none" if value is None else f"{value:.4f}" if name in (*LOCAL, "score_local") else f"{value:.3f}"
    return text if error is None or name not in (*LOCAL, "score_local") else f"{text} ± {error:.4f}"


def trained_and_untrained(options: argparse.Namespace) -> bool:
    """Print the tables; whether all demands are met."""
    met = True
    for folder in options.model:
        tokenizer, model = folder.load()
        probe = whole_sequences(options.text, tokenizer, options.sequences, options.length)
        meter = ib.Meter(
            probe,
            orders=ORDERS,
            batch_size=options.batch_size,
            standard_errors=options.groups,
            draws=options.draws,
            center=True,
            last_block=True,
        )
        found: dict[str, ib.Measurement] = {}
        for name, make in (("trained", lambda m=model: m), ("untrained", lambda m=model: untrained(m))):
            kept = options.keep and options.keep / f"{folder.name}-{name}-{options.sequences}x{options.length}.json"
            found[name], _ = measured(meter, make, kept, lambda _: None)
        for order in ORDERS:
            print(f"\n{folder.name}, {order}, {found['trained'].num_positions} positions")
            print(f"{'':32}" + "".join(f"{h:>9}" for h in HEADINGS[:8]) + "".join(f"{h:>18}" for h in HEADINGS[8:]))
            points = {name: views(measurement, order) for name, measurement in found.items()}
            for view, name in itertools.product(points["trained"], found):
                point = points[name][view]
                cells = [f"{number(point, q):>9}" for q in PLAIN] + [f"{number(point, q):>18}" for q in LOCAL]
                print(f"{view:22}{name:10}" + "".join(cells))
            for view in points["trained"]:
                met &= told_apart(view, points["trained"][view], points["untrained"][view], options.groups - 1)
            by_layer(found, order)
        for name, measurement in found.items():
            if getattr(measurement, "loss", None) is not None:
                print(f"loss of the {name} model: {measurement.loss:.4f}")
    print(f"\nall demands {'are met' if met else 'are NOT met'}")
    return met


def told_apart(view: str, trained: Any, other: Any, freedom: int) -> bool:
    """Print and return whether local expressivity and ratio tell the two models apart."""
    reach = float(stdtrit(freedom, 0.975))

    def interval(point: Any, name: str) -> tuple[float, float]:
        value, error = getattr(point, name), getattr(point, f"{name}_se")
        return value - reach * error, value + reach * error

    a, b = (interval(point, "expressivity_local") for point in (trained, other))
    said = [f"local E {a[0]:.4f} to {a[1]:.4f} and {b[0]:.4f} to {b[1]:.4f}: {'told' if a[0] > b[1] else 'NOT told'}"]
    met = a[0] > b[1]
    if trained.optimality_local is None:
        met, ratio = False, "NONE of the trained model"
    elif other.optimality_local is None:
        ratio = "none of the untrained model: told"
    else:
        a, b = (interval(point, "optimality_local") for point in (trained, other))
        apart = a[0] > b[1] or b[0] > a[1]
        met &= apart
        ratio = f"{a[0]:.3f} to {a[1]:.3f} and {b[0]:.3f} to {b[1]:.3f}: {'told' if apart else 'NOT told'}"
    print(f"  {view}: {said[0]}; local ratio {ratio}")
    return met


def by_layer(found: dict[str, ib.Measurement], order: str) -> None:
    """Local quantities of each layer, for each view that has them."""
    points = {name: views(measurement, order) for name, measurement in found.items()}
    number = len(found["trained"].layers)
    for view in [view for view, point in points["trained"].items() if len(point.complexity_by_layer) == number]:
        print(f"  by layer, {view}: C, E, null, document, local C, local E, local ratio of each model")
        for layer, label in enumerate(found["trained"].layers):
            cells = []
            for name in found:
                columns = [getattr(points[name][view], f"{quantity}_by_layer") for quantity in BY_LAYER]
                values = [column[layer] if column else math.nan for column in columns]
                cells.append(" ".join(f"{value:8.4f}" for value in (*values, values[5] / (values[4] or math.nan))))
            print(f"  {label:28}" + "   |".join(cells))


@torch.no_grad()
def refitted_loss(model: nn.Module, probe: ib.Probe) -> dict[str, float]:
    """Mean next-token loss in nats a token: as it is, and after one scale on the logits was fitted."""

    def tokens(row: int) -> tuple[Tensor, Tensor]:
        ids = probe.input_ids[row : row + 1]
        return model(ids).logits[0, :-1].float(), ids[0, 1:]

    def loss(logits: Tensor, ids: Tensor, scale: float) -> float:
        return float(nn.functional.cross_entropy(logits * scale, ids))

    some = [tokens(row) for row in range(0, len(probe), 8)]
    fitted = minimize_scalar(
        lambda log: float(np.mean([loss(*each, math.exp(log)) for each in some])),
        bounds=(-7, 2),
        method="bounded",
        options={"xatol": 0.01},
    )
    scale = math.exp(fitted.x)
    losses = np.array([[loss(*each, 1.0), loss(*each, scale)] for each in map(tokens, range(len(probe)))])
    plain, refitted = losses.mean(0).tolist()
    return {"scale": scale, "loss": plain, "refitted": refitted}


def damaged(options: argparse.Namespace) -> None:
    """Print the versions and how each number goes with their loss."""
    tables: dict[str, list[dict[str, float]]] = {}
    for folder in options.model:
        tokenizer, model = folder.load()
        probe = whole_sequences(options.text, tokenizer, options.sequences, options.length)
        num_bytes = sum(len(tokenizer.decode(row[1:]).encode()) for row in probe.input_ids)
        per_byte = len(probe) * (options.length - 1) / math.log(2) / num_bytes
        meter = ib.Meter(
            probe,
            orders="token",
            batch_size=options.batch_size,
            standard_errors=options.groups,
            draws=options.draws,
            center=options.center,
            last_block=True,
            companions=("rankme", "alpha_req"),
        )
        print(f"\n{folder.name}: {len(probe) * (options.length - 1)} tokens, {num_bytes} bytes")
        print(
            f"{'':16}{'loss':>9}{'scale':>9}{'refitted':>9}{'bits/byte':>10}"
            + "".join(f"{h:>18}" for h in HEADINGS[8:])
            + "".join(f"{f'{view} {h}':>24}" for view in AIMED for h in ("C", "E", "score"))
        )
        aimed: dict[str, list[tuple[float, Any]]] = {view: [] for view in AIMED}
        rows = tables[folder.name] = []
        kinds = [("trained", 0.0), *(("noise", n) for n in options.noise), *(("pruned", p) for p in options.pruned)]
        for kind, level, make in versions(model, [*kinds, ("shuffled", 0.0), ("untrained", 0.0), ("untrained", 1.0)]):
            name = f"{kind} {level:.0f}" if kind == "untrained" else f"{kind} {level}" if level else kind
            kept = options.keep and options.keep / f"{folder.name}-{name.replace(' ', '-')}.json"
            measurement, losses = measured(meter, make, kept, lambda made, probe=probe: refitted_loss(made, probe))
            points = views(measurement, "token")
            row = {name: value for name, value in measurement.scalars().items() if is_compared(name)}
            bits = losses["refitted"] * per_byte
            rows.append(row | {"refitted": losses["refitted"], "bits": bits})
            cells = [f"{losses['loss']:10.3f}{losses['scale']:10.3f}{losses['refitted']:10.3f}{bits:10.3f}"]
            cells += [f"{number(points['mean'], q):>18}" for q in LOCAL]
            for view in AIMED:
                if f"{view}/token" in measurement:
                    point = measurement[f"{view}/token"]
                    aimed[view].append((losses["refitted"], point))
                    cells += [f"{number(point, q):>24}" for q in (*LOCAL[:2], "score_local")]
            print(f"{name:16}" + "".join(cells), flush=True)
        for view, found in aimed.items():
            told = sorted(
                (
                    (loss, point)
                    for loss, point in found
                    if point.expressivity_local > 3 * point.expressivity_local_se and point.score_local is not None
                ),
                key=lambda each: each[0],
            )
            scores = [point.score_local for _, point in told]
            in_order = all(better > worse for better, worse in itertools.pairwise(scores))
            print(
                f"  {view}: the scores of {len(told)} versions are {'' if in_order else 'NOT '}in the order of the loss"
            )
    every = {"all": [row for rows in tables.values() for row in rows]} if len(tables) > 1 else {}
    print("\nSpearman and Kendall with the refitted loss (all models: with its bits per byte), pairs ordered rightly")
    print(f"{'':52}" + "".join(f"{name:>26}" for name in [*tables, *every]))
    names = [name for name in next(iter(tables.values()))[0] if name not in ("refitted", "bits")]
    for name in names:
        cells = [against_loss(rows, name, "refitted") for rows in tables.values()]
        cells += [against_loss(rows, name, "bits") for rows in every.values()]
        print(f"{name:52}" + "".join(f"{cell:>26}" for cell in cells))


def is_compared(name: str) -> bool:
    """Whether a logged number is compared with the loss: no error, and not what stands there under a longer name."""
    twice = name.rpartition("/")[2] in PRIMARY_SCALARS and "token" not in name
    return not (twice or name in BOOKKEEPING or name.endswith(("_se", "_spread")))


def against_loss(rows: list[dict[str, Any]], name: str, loss: str) -> str:
    """Both rank correlations, and the share of pairs with clearly different losses that the number orders rightly."""
    if all(row.get(name) is None for row in rows):
        return "undefined"
    sign = -1.0 if better_direction(name) == "min" else 1.0
    values = [-math.inf * sign if row.get(name) is None else row[name] for row in rows]
    ranks = spearmanr(values, [row[loss] for row in rows]).statistic
    tau = kendalltau(values, [row[loss] for row in rows]).statistic
    right = [
        0.5 if a == b else float(sign * (a - b) * (x[loss] - y[loss]) < 0)
        for (a, x), (b, y) in itertools.combinations(zip(values, rows, strict=True), 2)
        if abs(x[loss] - y[loss]) > APART
    ]
    return f"{ranks:+.2f} {tau:+.2f} {np.mean(right):.2f}"


if __name__ == "__main__":
    main()
