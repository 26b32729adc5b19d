"""How often the 95 % interval covers the expected statistic, in simulation, through the whole of `Meter`.

    python benchmarks/coverage.py                 # some ten minutes on one core
    python benchmarks/coverage.py --repeats 100

A world makes probes: each sequence has a topic that reweights a Zipf vocabulary, half of the tokens follow from their
predecessor, and a hidden state is the sum of the token's vector, a vector of the sequence, and noise. Each setting
draws many probes of one size from one world, measures each with `standard_errors`, and counts how often statistic ± t
times its standard error contains the mean of the statistic over all probes. Printed are this coverage and, in
brackets, the root mean square of the standard errors over the standard deviation of the statistic (1 is perfect).

"No link" gives every probe the tokens of one sample and the hidden states of another, so that labels say nothing of Z:
the case in which a jackknife without the correction for pairs would be 1.4 times too wide.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor, nn

import ib_callback as ib

NAMES = (
    "complexity", "expressivity", "optimality", "distance_to_bound",
    "complexity_above_null", "expressivity_above_null", "optimality_above_null", "distance_above_null",
)  # fmt: skip
SHORT = ("C", "E", "E/C", "C-E", "C-null", "E-null", "ratio of these", "difference")


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
        return ids, vectors[seen] + shift + noise


class Emit(nn.Module):
    """A model with one layer, which puts out states made beforehand."""

    def __init__(self, ids: Tensor, states: Tensor) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.weight = nn.Parameter(torch.zeros(1))
        self._rows = {row.numpy().tobytes(): state for row, state in zip(ids, states, strict=True)}

    def forward(self, ids: Tensor) -> Tensor:
        """Look up the states of these sequences."""
        states = torch.stack([self._rows[row.numpy().tobytes()] for row in ids])
        return self.layer(states)


METER: dict[str, Any] = {"layers": ["layer"], "forward": lambda model, ids, mask: model(ids), "num_bins": 20}

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
)


def simulate(world: World, repeats: int, groups: int | bool) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and relative size of the standard errors, one of each for every name."""
    parameters = world.parameters()
    values, errors = [], []
    for seed in range(repeats):
        ids, states = world.draw(parameters, seed)
        probe = ib.Probe.from_tokens(ids)
        meter = ib.Meter(probe, orders=world.order, standard_errors=groups, batch_size=32, **METER)
        point = meter.measure(Emit(ids, states)).orders[world.order]
        values.append([getattr(point, name) for name in NAMES])
        errors.append([getattr(point, f"{name}_se") for name in NAMES])
    number = meter.plan().jackknife.num_groups  # type: ignore[union-attr]
    v, e = np.array(values, dtype=float), np.array(errors, dtype=float)
    # A ratio of numbers that are zero in truth is undefined in some probes.
    defined = np.isfinite(v).all(0) & np.isfinite(e).all(0)
    with np.errstate(invalid="ignore"):
        covered = np.where(defined, (np.abs(v - v.mean(0)) < stdtrit(number - 1, 0.975) * e).mean(0), np.nan)
        size = np.where(defined, np.sqrt((e**2).mean(0)) / v.std(0, ddof=1), np.nan)
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
        meter = ib.Meter(ib.Probe.from_tokens(ids), orders=world.order, standard_errors=True, batch_size=32, **METER)
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--groups", type=int, default=True, help="default: 16")
    parser.add_argument("--only", help="worlds whose name contains this")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{options.repeats} probes each; coverage of the 95 % interval (standard error / standard deviation)")
    print(f"{'':26}" + "".join(f"{name:>16}" for name in SHORT))
    every = []
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
        cells = ", ".join(f"{name} {covered:.1%} ({size:.2f})" for name, (covered, size) in pairs.items())
        print(f"{world.name}: {cells}", flush=True)
    print(f"least {min(every):.1%}, greatest {max(every):.1%}; wanted: 90 % to 99 %")
    if not 0.90 <= min(every) <= max(every) <= 0.99:
        sys.exit(1)


if __name__ == "__main__":
    main()
