"""Which estimate of the information itself to trust where: plain, above null, and what extrapolates or corrects.

    python benchmarks/extrapolation.py

Worlds in which I(X;Z) is known: labels by Zipf's law, soft assignments softmax(strength × a vector of the label + a
vector of the sequence + noise). The truth takes the mean assignment of each label over 4,000 draws. Per world, a number
of probes of one size; printed are the truth, and of every estimate the mean error and, in brackets, the root mean
square error, all in per cent of the truth; the smallest of the latter is starred.

plain        the measured I
above null   I - null
half         2 I - mean of I over two halves of the sequences: linear in 1/n (Treves and Panzeri 1995)
quadratic    8/3 I - 2 I(halves) + 1/3 I(quarters): quadratic in 1/n (Strong et al. 1998)
jackknife    G I - (G - 1) mean of I without each of 16 groups
adjusted     (I - null) / (1 - null / ceiling), `ib_callback.adjusted_information`

    python benchmarks/extrapolation.py --text c4.jsonl.gz --tokenizer gpt2

instead measures a small random GPT-2 on the first 16, 64, 256 … documents of a text: an estimate of the information
itself must not depend on how many there are.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch

import ib_callback as ib
from _common import add_text_arguments, load_probe
from ib_callback.estimator.histogram import divergence
from ib_callback.measuring.plan.null import LabelCounts, SubsetCurve, design_subsets
from ib_callback.results.uncertainty import adjusted_information

Array = npt.NDArray[np.float64]
BINS = 50
NAMES = ("plain", "above null", "half", "quadratic", "jackknife", "adjusted")


@dataclass(frozen=True)
class World:
    """vocabulary: labels. strength: of the label in Z; alike: of the sequence in Z; clumped: of topics in labels.

    tilt: from the most frequent label to the rarest, strength goes from 1 - tilt to 1 + tilt times its value.
    """

    vocabulary: int
    strength: float
    alike: float = 0.0
    clumped: float = 0.0
    tilt: float = 0.0
    sequences: int = 64
    length: int = 64

    def __post_init__(self) -> None:
        draw = np.random.default_rng(self.vocabulary)
        logits = -1.1 * np.log(np.arange(1, self.vocabulary + 1))
        topics = np.exp(logits + self.clumped * draw.normal(size=(10, self.vocabulary)))
        object.__setattr__(self, "topics", topics / topics.sum(1, keepdims=True))
        rank = np.log(np.arange(1, self.vocabulary + 1)) / np.log(self.vocabulary)
        strength = self.strength * (1 + self.tilt * (2 * rank - 1))
        object.__setattr__(self, "vectors", strength[:, None] * draw.normal(size=(self.vocabulary, BINS)))

    def truth(self, draws: int = 4000) -> float:
        """I(X;Z) of endless text, in fractions of log(BINS)."""
        draw = np.random.default_rng(1)
        noise = draw.normal(size=(draws, BINS)) * np.sqrt(1 + self.alike**2)
        share = self.topics.mean(0)
        # exp(a + b) = exp(a) exp(b): one matrix product for every thousand labels.
        factors = np.exp(noise)
        given = np.empty((self.vocabulary, BINS))
        for begin in range(0, self.vocabulary, 1000):
            labels = np.exp(self.vectors[begin : begin + 1000])
            given[begin : begin + 1000] = labels * ((1 / (labels @ factors.T)) @ factors) / draws
        return float(entropy(share @ given) - share @ entropy(given))

    def draw(self, seed: int) -> tuple[Array, Array, Array]:
        """Labels [T], assignments [T, BINS], sequences [T] of one probe."""
        draw = np.random.default_rng(seed)
        topic = draw.integers(10, size=self.sequences)
        labels = np.stack([draw.choice(self.vocabulary, self.length, p=self.topics[t]) for t in topic])
        scores = self.vectors[labels] + draw.normal(size=(*labels.shape, BINS))
        scores += self.alike * draw.normal(size=(self.sequences, 1, BINS))
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        return labels.ravel(), p.reshape(-1, BINS), np.repeat(np.arange(self.sequences), self.length)


def entropy(p: Array) -> Array:
    """Entropies of the rows, normalised or not, divided by log(BINS)."""
    q = p / p.sum(-1, keepdims=True)
    return -(q * np.log(np.maximum(q, 1e-300))).sum(-1) / np.log(BINS)


def information(labels: Array, p: Array) -> float:
    _, label, count = np.unique(labels, return_inverse=True, return_counts=True)
    sums = scipy.sparse.csr_matrix((np.ones(len(label)), (label, np.arange(len(label))))) @ p
    return float(entropy(p.sum(0)) - count @ entropy(sums) / len(label))


def null_information(labels: Array, p: Array) -> float:
    counts = LabelCounts.of(np.unique(labels, return_counts=True)[1])
    design = design_subsets(len(p), [counts], 0)
    whole = p.sum(0)
    subsets = np.stack([p[rows].sum(0) for rows in design.subsets])
    parts = np.stack([p[rows].sum(0) for rows in design.parts]) if design.parts else np.zeros((0, BINS))
    spread = [divergence(*map(torch.from_numpy, (rows, whole))).numpy() for rows in (subsets, design.unions @ parts)]
    return SubsetCurve.estimate(design, *spread, float(entropy(whole) - entropy(p).mean())).null(counts)[0]


def estimates(labels: Array, p: Array, sequence: Array) -> list[float]:
    """One value for each of NAMES."""

    def mean_of_parts(number: int) -> float:
        part = sequence * number // (sequence.max() + 1)
        return float(np.mean([information(labels[part == i], p[part == i]) for i in range(number)]))

    whole, null = information(labels, p), null_information(labels, p)
    group = sequence * 16 // (sequence.max() + 1)
    without = np.mean([information(labels[group != g], p[group != g]) for g in range(16)])
    half, quarter = mean_of_parts(2), mean_of_parts(4)
    ceiling = float(entropy(p.sum(0)) - entropy(p).mean())
    adjusted = adjusted_information(whole, null, ceiling)
    return [
        whole,
        whole - null,
        2 * whole - half,
        8 / 3 * whole - 2 * half + quarter / 3,
        16 * whole - 15 * float(without),
        np.nan if adjusted is None else adjusted,
    ]


WORLDS = [
    World(v, strength, alike, clumped)
    for strength in (1.5, 0.3)
    for alike, clumped in ((0.0, 0.0), (0.7, 1.0))
    for v in (30, 300, 3000, 30000)
] + [
    World(v, 0.8, tilt=tilt, alike=alike, clumped=clumped)
    for tilt, alike, clumped in ((0.8, 0.0, 0.0), (-0.8, 0.0, 0.0), (0.0, 1.5, 3.0))
    for v in (300, 30000)
]


def by_size_of_probe(text: Path, tokenizer: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=128, n_head=4)).eval()
    print(
        "documents  order      "
        + "".join(f"{n:>12}" for n in ("plain C", "null", "above null", "adjusted", "adjusted E/C"))
    )
    for number in (16, 64, 256, 1024):
        probe = load_probe(text, tokenizer, num_sequences=number, max_length=256)
        point = ib.measure(model, probe)
        for order in ("token", "bigram", "trigram"):
            of_order = ib.adjusted(point, order)
            values = [getattr(point[order], f"complexity{name}") for name in ("", "_null", "_above_null")]
            values += [of_order.complexity, of_order.optimality]
            print(
                f"{number:9}  {order:10}" + "".join(f"{'-' if v is None else f'{v:.4f}':>12}" for v in values),
                flush=True,
            )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.text is not None:
        by_size_of_probe(options.text, options.tokenizer)
        return
    print("label   within a   labels per   once   truth   null   error: mean (root mean square), % of the truth")
    print("in Z    sequence    position" + " " * 28 + "".join(f"{name:>16}" for name in NAMES))
    for world in WORLDS:
        truth = world.truth()
        probes = [world.draw(seed) for seed in range(options.repeats)]
        values = np.array([estimates(*probe) for probe in probes])
        counts = [np.unique(labels, return_counts=True)[1] for labels, _, _ in probes]
        kinds = np.mean([len(c) / c.sum() for c in counts])
        once = np.mean([(c == 1).sum() / c.sum() for c in counts])
        null = np.mean(values[:, 0] - values[:, 1])
        mean = (values.mean(0) - truth) / truth
        size = np.sqrt(((values - truth) ** 2).mean(0)) / truth
        cells = [f"{m:+.0%} ({s:.0%})" + ("*" if s == size.min() else " ") for m, s in zip(mean, size, strict=True)]
        kind = "strong" if world.strength > 1 else "weak" if world.strength < 0.5 else "middle"
        alike = "free" if not world.alike else "alike" if world.alike < 1 else "much alike"
        kind = "rare +" if world.tilt > 0 else "rare -" if world.tilt < 0 else kind
        print(
            f"{kind:8}{alike:11}{kinds:9.3f}{once:7.0%}{truth:8.4f}{null:7.4f}    "
            + "".join(f"{cell:>16}" for cell in cells),
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
