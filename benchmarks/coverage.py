"""How often the 95 % interval covers the expected statistic, in simulation and on real text, through all of `Meter`.

    python benchmarks/coverage.py                 # some ten minutes on one core
    python benchmarks/coverage.py --repeats 100
    python benchmarks/coverage.py --text c4.jsonl.gz --model smollm2=FOLDER:FILE.gguf       # half an hour

A world makes probes: each sequence has a topic that reweights a Zipf vocabulary, half of the tokens follow from their
predecessor, and a hidden state is the sum of the token's vector, a vector of the sequence, and noise. Each setting
draws many probes of one size from one world, measures each with `standard_errors`, and counts how often statistic ± t
times its standard error contains the mean of the statistic over all probes. Printed are this coverage and, in
brackets, the root mean square of the standard errors over the standard deviation of the statistic (1 is perfect).

"No link" gives every probe the tokens of one sample and the hidden states of another, so that labels say nothing of Z:
the case in which a jackknife without the correction for pairs would be 1.4 times too wide.

On real text, the states of some layers of a real model over all documents that are long enough are computed once, and
a stand-in for the model puts them out. Probes are random documents of these, none twice in one probe. What a standard
error states is how far the number would move with other documents of the same source, so the target is the mean over
the probes. Documents of a finite pool do not come twice in a probe, and two probes share some: numbers vary less by
about sqrt(1 - probe / pool), which is printed, so that coverage is by so much too high. The value on all documents is
the target of `ib.adjusted` alone: of it and of the plain values the bias is printed; it has no error of its own, so
that of its replicates is taken, with the ceiling as known. With `--draws 4` each probe has reference points of its own,
and averages over draws, of which the error covers that too, stand in the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor, nn

import ib_callback as ib
from _common import ModelFolder, views, whole_sequences
from ib_callback.results.metrics import PLANE
from ib_callback.results.uncertainty import adjusted_information, jackknife_error, num_groups

NAMES = (
    "complexity", "expressivity", "optimality", "distance_to_bound",
    "complexity_above_null", "expressivity_above_null", "optimality_above_null", "distance_above_null",
    "complexity_local", "expressivity_local", "optimality_local",
)  # fmt: skip
SHORT = (
    "C",
    "E",
    "E/C",
    "C-E",
    "C-null",
    "E-null",
    "ratio of these",
    "difference",
    "local C",
    "local E",
    "local ratio",
)


@dataclasses.dataclass(frozen=True)
class World:
    """sequences, length, vocabulary: of a probe. alike: how alike positions of one sequence are; linked: see above."""

    name: str
    sequences: int
    length: int
    vocabulary: int
    alike: float = 0.5
    linked: bool = True
    order: str = "token"
    dim: int = 16

    def parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits by topic, three successors of every token, vectors of tokens: the same for all probes."""
        generator = torch.Generator().manual_seed(self.vocabulary)
        zipf = -1.1 * torch.arange(1.0, self.vocabulary + 1).log()
        topics = zipf + 2 * self.alike * torch.randn(10, self.vocabulary, generator=generator)
        successors = torch.multinomial(zipf.exp(), 3 * self.vocabulary, replacement=True, generator=generator)
        vectors = torch.randn(self.vocabulary, self.dim, generator=generator)
        return topics, successors.view(-1, 3), vectors

    def draw(self, parameters: tuple[Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor]:
        """Token ids [N, S] and hidden states [N, S, dim] of one probe."""
        topics, successors, vectors = parameters
        generator = torch.Generator().manual_seed(seed)

        def tokens() -> Tensor:
            topic = torch.randint(len(topics), (self.sequences,), generator=generator)
            ids = torch.multinomial(topics[topic].exp(), self.length, replacement=True, generator=generator)
            follow = torch.rand(ids.shape, generator=generator) < 0.5
            which = torch.randint(3, ids.shape, generator=generator)
            for s in range(1, self.length):
                ids[:, s] = torch.where(follow[:, s], successors[ids[:, s - 1], which[:, s]], ids[:, s])
            return ids

        ids = tokens()
        seen = ids if self.linked else tokens()
        shift = self.alike * torch.randn(self.sequences, 1, self.dim, generator=generator)
        noise = torch.randn(self.sequences, self.length, self.dim, generator=generator)
        return ids, (vectors[seen] + shift + noise).unsqueeze(2)


class Emit(nn.Module):
    """A model that puts out states made beforehand: `states` [N, S, L, dim] of L layers, for sequences `ids`."""

    def __init__(self, ids: Tensor, states: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(states.shape[2]))
        self.weight = nn.Parameter(torch.zeros(1))
        self._rows = {row.numpy().tobytes(): state for row, state in zip(ids, states, strict=True)}

    def forward(self, ids: Tensor) -> Tensor:
        """Look up the states of these sequences."""
        states = torch.stack([self._rows[row.numpy().tobytes()] for row in ids])
        for layer, state in zip(self.layers, states.unbind(2), strict=True):
            layer(state)
        return state


EMITTED: dict[str, Any] = {"layers": ["layers.*"], "forward": lambda model, ids, mask: model(ids), "loss": False}
METER: dict[str, Any] = {**EMITTED, "num_bins": 20, "batch_size": 32}

WORLDS = (
    World("well sampled", 64, 64, 50),
    World("undersampled", 64, 64, 2000),
    World("hardly sampled", 64, 32, 20000),
    World("bigrams, hardly sampled", 64, 32, 2000, order="bigram"),
    World("sequences very alike", 64, 64, 500, alike=1.5),
    World("independent positions", 64, 64, 500, alike=0.0),
    World("no link, well sampled", 64, 64, 50, linked=False),
    World("no link, undersampled", 64, 64, 2000, linked=False),
    World("few sequences", 16, 64, 500),
    World("many sequences", 256, 64, 2000),
    World("default size", 512, 512, 20000),
)


def simulate(world: World, repeats: int, groups: int | bool) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and relative size of the standard errors, one of each for every name."""
    parameters = world.parameters()
    values, errors = [], []
    for seed in range(repeats):
        ids, states = world.draw(parameters, seed)
        probe = ib.Probe.from_tokens(ids)
        meter = ib.Meter(probe, orders=world.order, standard_errors=groups, **METER)
        point = meter.measure(Emit(ids, states)).orders[world.order]
        values.append([getattr(point, name) for name in NAMES])
        errors.append([getattr(point, f"{name}_se") for name in NAMES])
    number = num_groups(point.complexity_jackknife)
    return coverage(np.array(values, dtype=float), np.array(errors, dtype=float), number - 1)


def coverage(values: np.ndarray, errors: np.ndarray, freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and relative size of the standard errors of each column; NaN where some probe has no value."""
    # A ratio of numbers that are zero in truth is undefined in some probes.
    defined = np.isfinite(values).all(0) & np.isfinite(errors).all(0)
    reach = stdtrit(freedom, 0.975) * errors
    with np.errstate(invalid="ignore"):
        covered = np.where(defined, (np.abs(values - values.mean(0)) < reach).mean(0), np.nan)
        size = np.where(defined, np.sqrt((errors**2).mean(0)) / values.std(0, ddof=1), np.nan)
    return covered, size


PAIRED = ("complexity", "optimality", "complexity_above_null", "optimality_above_null")


def simulate_differences(world: World, repeats: int) -> dict[str, tuple[float, float]]:
    """Coverage of `ib.difference` between two models on the same probe, and how much narrower than unpaired it is.

    The second model's states are those of the first, the part that the sequence gives weakened, with noise of its own.
    """
    parameters = world.parameters()
    found = []
    for seed in range(repeats):
        ids, states = world.draw(parameters, seed)
        meter = ib.Meter(ib.Probe.from_tokens(ids), orders=world.order, standard_errors=True, **METER)
        generator = torch.Generator().manual_seed(10**6 + seed)
        other = states - 0.3 * states.mean(1, keepdim=True) + 0.3 * torch.randn(states.shape, generator=generator)
        a, b = (meter.measure(Emit(ids, each)) for each in (states, other))
        row = []
        for metric in PAIRED:
            difference = ib.difference(a, b, metric)
            alone = [getattr(m[world.order], f"{metric}_se") for m in (a, b)]
            row.append([difference.value, *difference.interval, difference.standard_error / np.hypot(*alone)])
        found.append(row)
    value, low, high, narrower = np.moveaxis(np.array(found), 2, 0)
    mean = value.mean(0)
    covered = ((low <= mean) & (mean <= high)).mean(0)
    return dict(zip(PAIRED, zip(covered, np.median(narrower, 0), strict=True), strict=True))


@torch.no_grad()
def record(model: Any, ids: Tensor, layers: list[int] | None) -> Tensor:
    """States [N, S, L, dim] behind some blocks, the last one after the final norm."""
    states = []
    for batch in ids.split(8):
        every = model.base_model(batch, output_hidden_states=True, use_cache=False).hidden_states[1:]
        chosen = np.linspace(0, len(every) - 1, 5).round().astype(int) if layers is None else layers
        states.append(torch.stack([every[layer] for layer in chosen], 2))
    return torch.cat(states)


def real_text(folder: ModelFolder, options: argparse.Namespace) -> list[float]:
    """Print the table of one model; the coverages of all errors that are stated."""
    tokenizer, model = folder.load()
    pool = whole_sequences(options.text, tokenizer, options.pool, options.length)
    emit = Emit(pool.input_ids, record(model, pool.input_ids, options.layers))
    del model
    keywords: dict[str, Any] = {"orders": ("token", "bigram"), "center": True, **EMITTED}
    whole = ib.Meter(pool, **keywords).measure(emit)
    names = [quantity.name for quantity in PLANE if quantity.has_error]
    rows: dict[tuple[str, str], list[list[float | None]]] = {}
    corrected: dict[str, list[list[float]]] = {order: [] for order in whole}
    for seed in range(options.repeats):
        chosen = np.random.RandomState(seed).choice(len(pool), options.sequences, replace=False)
        probe = ib.Probe.from_tokens(pool.input_ids[chosen])
        drawn = {"draws": options.draws, "seed": seed} if options.draws > 1 else {}
        measurement = ib.Meter(probe, standard_errors=options.groups, **drawn, **keywords).measure(emit)
        for order, point in measurement.orders.items():
            for view, of_view in views(measurement, order).items():
                if drawn and not view.startswith(("averaged", "centred")):
                    continue  # an error of one draw is one for the same reference points
                values = [getattr(of_view, name) for name in (*names, *(f"{name}_se" for name in names))]
                rows.setdefault((order, view), []).append(values)
            if not drawn:
                corrected[order].append(corrected_values(point, measurement.ceiling))
    number = num_groups(point.complexity_jackknife)
    share = math.sqrt(1 - options.sequences / len(pool))
    print(
        f"{folder.name}: {options.repeats} probes of {options.sequences} x {options.length} tokens out of {len(pool)}"
    )
    print(f"documents (numbers vary {share:.3f} times as much as those of new documents), {len(whole.layers)} layers")
    every: list[float] = []
    for (order, view), of_probes in rows.items():
        table = np.array(of_probes, dtype=float)
        v, e = np.split(table, 2, axis=1)
        covered, size = coverage(v, e, number - 1)
        print(f"{order}, {view}: mean, standard deviation, coverage (standard error / standard deviation)")
        for place, name in enumerate(names):
            missing = int((~np.isfinite(v[:, place])).sum())
            if missing == len(v) or not np.isfinite(e[:, place]).any():
                continue
            text = f"undefined in {missing} probes"
            if np.isfinite(covered[place]):
                every.append(covered[place])
                miss = "" if 0.90 <= covered[place] <= 0.99 else "  MISSED"
                text = f"{covered[place]:6.1%} ({size[place]:.2f}){miss}"
            mean, sd = np.nanmean(v[:, place]), np.nanstd(v[:, place], ddof=1)
            print(f"  {name:30}{mean:10.5f}{sd:10.5f}  {text}", flush=True)
    for order, of_probes in corrected.items():
        if not of_probes:
            continue
        print(f"{order}, against the value on all {len(pool)} documents: that value, bias, coverage")
        truth = corrected_values(whole[order], whole.ceiling)
        table = np.array(of_probes)
        for place, name in enumerate(CORRECTED):
            value, error = table[:, 2 * place], table[:, 2 * place + 1]
            target = truth[2 * place]
            text = ""
            if np.isfinite(error).all():
                text = f"{(np.abs(value - target) < stdtrit(number - 1, 0.975) * error).mean():6.1%}"
            print(f"  {name:30}{target:10.5f}{value.mean() / target - 1:+10.1%}  {text}")
    return every


CORRECTED = ("adjusted complexity", "adjusted expressivity", "adjusted optimality",
             "plain complexity", "plain expressivity", "plain optimality")  # fmt: skip


def corrected_values(point: Any, ceiling: float | None) -> list[float]:
    """Value and standard error of each of `CORRECTED`."""
    assert ceiling is not None
    sides = ("complexity", "expressivity")
    plain = [np.array([getattr(point, s), *getattr(point, f"{s}_jackknife")]) for s in sides]
    nulls = [[getattr(point, f"{s}_null"), *getattr(point, f"{s}_null_jackknife")] for s in sides]
    right = [
        np.array([adjusted_information(*each, ceiling) for each in zip(i, n, strict=True)], dtype=float)
        for i, n in zip(plain, nulls, strict=True)
    ]
    found: list[float] = []
    for values in (*right, right[1] / right[0], *plain, plain[1] / plain[0]):
        found += [values[0], jackknife_error(values[0], values[1:]) if len(values) > 1 else math.nan]
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--groups", type=int, default=True, help="default: 16")
    parser.add_argument("--only", help="worlds whose name contains this")
    parser.add_argument("--text", type=Path, help='real text: .txt, .jsonl or .jsonl.gz with a "text" field')
    parser.add_argument("--model", type=ModelFolder.parse, action="append", metavar="NAME=FOLDER[:FILE]")
    parser.add_argument("--pool", type=int, default=1700, help="documents of real text")
    parser.add_argument("--sequences", type=int, default=64, help="in a probe of real text")
    parser.add_argument("--length", type=int, default=128, help="of documents of real text, in tokens")
    parser.add_argument("--layers", type=int, nargs="+", help="numbers of the model's layers; default: five, evenly")
    parser.add_argument("--draws", type=int, default=1, help="of reference points, on real text; new ones each time")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if (options.text is None) != (options.model is None):
        parser.error("--text and --model go together")
    if options.model:
        every = [covered for folder in options.model for covered in real_text(folder, options)]
    else:
        every = simulated(options)
    print(f"least {min(every):.1%}, greatest {max(every):.1%}; wanted: 90 % to 99 %")
    if not 0.90 <= min(every) <= max(every) <= 0.99:
        sys.exit(1)


def simulated(options: argparse.Namespace) -> list[float]:
    """Print the tables of the worlds; all coverages."""
    print(f"{options.repeats} probes each; coverage of the 95 % interval (standard error / standard deviation)")
    print(f"{'':26}" + "".join(f"{name:>16}" for name in SHORT))
    every: list[float] = []
    for world in WORLDS:
        if options.only and options.only not in world.name:
            continue
        covered, size = simulate(world, options.repeats, options.groups)
        every.extend(covered[np.isfinite(covered)])
        cells = [f"{c:.1%} ({s:.2f})" if np.isfinite(c) else "undefined" for c, s in zip(covered, size, strict=True)]
        print(f"{world.name:26}" + "".join(f"{cell:>16}" for cell in cells), flush=True)
    print("paired differences of two models on the same probe: coverage (error / that of independent probes)")
    for world in (WORLDS[0], WORLDS[1]):
        pairs = simulate_differences(world, options.repeats)
        every.extend(covered for covered, _ in pairs.values())
        cells = [f"{name} {covered:.1%} ({size:.2f})" for name, (covered, size) in pairs.items()]
        print(f"{world.name}: {', '.join(cells)}", flush=True)
    return every


if __name__ == "__main__":
    main()
