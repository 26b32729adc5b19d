"""Preference information in a real model: how many pairs it takes, and how much of it the words alone already give.

    python studies/preference.py                                              # tables, seconds
    python studies/preference.py --data FOLDER --model smollm2=FOLDER:FILE.gguf    # measures: a quarter of an hour

The folder of the data holds `preferences_sample.jsonl.gz` (lines with `prompt`, `chosen`, `rejected`). The product
makes the probe and the soft assignments (`Meter.assignments`); their sums over each answer are all that is needed for
the information and its null, labels being swapped within pairs, for any choice of pairs. What has no weights is held
to the same measure, each position being assigned to one bin: its token (the 99 most frequent, and the rest), or its
place in the answer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ib_callback as ib
from _tables import heading, prose, table
from ib_callback.common.files import write_atomically

RESULTS = Path(__file__).parent / "results" / "preference"
BINS = 100
# Tokens of the prompt, and of prompt and answer together.
PROMPT, LENGTH = 32, 128
NUMBERS = (25, 50, 100, 200)
SUBSETS, SWAPS, GROUPS = 50, 200, 20


def read_pairs(data: Path) -> list[dict[str, Any]]:
    """Rows with `prompt`, `chosen`, `rejected` of `preferences_sample.jsonl.gz` in a folder."""
    from _runs import lines  # with transformers, which the tables do without

    return lines(data / "preferences_sample.jsonl.gz")


def probe_of(pairs: Sequence[dict[str, Any]], tokenizer: Any, name: str = "pairs") -> ib.Probe:
    """Of each pair the end of the prompt, and as much of both answers as there is room for: most have one length then.

    Args:
        pairs: as read.
        tokenizer: of transformers.
        name: of the probe.
    """
    rows = []
    for pair in pairs:
        ids = tokenizer(pair["prompt"], add_special_tokens=False)["input_ids"][-PROMPT:]
        prompt = tokenizer.decode(ids).strip() + "\n\n"
        rows.append({"prompt": prompt, **{side: pair[side].strip() for side in ("chosen", "rejected")}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pairs that are alike in what is left of them are left out
        return ib.Probe.from_preferences(rows, tokenizer, num_sequences=None, max_length=LENGTH, name=name)


@dataclass(frozen=True)
class Answers:
    """What soft assignments of the answers' positions add up to.

    Attributes:
        difference, total: [P, L, BINS] of pair p and layer l, preferred minus rejected answer and their sum.
        longer, length: [P] the same of the number of positions.
    """

    difference: np.ndarray
    total: np.ndarray
    longer: np.ndarray
    length: np.ndarray

    @classmethod
    def of(cls, layers: list[np.ndarray], sequence: np.ndarray, number: int) -> Answers:
        """From assignments [T, BINS] of each layer at positions of these sequences [T], of which 2p is preferred."""
        sums = np.zeros((number, len(layers), BINS))
        for place, each in enumerate(layers):
            np.add.at(sums[:, place], sequence, each)
        count = np.bincount(sequence, minlength=number).astype(float)
        first, second = sums[::2], sums[1::2]
        return cls(first - second, first + second, count[::2] - count[1::2], count[::2] + count[1::2])

    def information(self, signs: np.ndarray, pairs: np.ndarray | None = None) -> np.ndarray:
        """[R, L] of I(preference; Z), as a fraction of log BINS; signs [R, P] say which answer is called preferred."""
        pairs = np.arange(len(self.longer)) if pairs is None else pairs
        flat = self.difference[pairs].reshape(len(pairs), -1)
        difference = (signs @ flat).reshape(len(signs), *self.difference.shape[1:])
        total, length = self.total[pairs].sum(0), self.length[pairs].sum()
        longer = (signs @ self.longer[pairs])[:, None]
        found = _entropy(total / length)[None]
        for side in (1.0, -1.0):
            count = (length + side * longer) / 2
            found = found - count / length * _entropy((total + side * difference) / 2 / count[..., None])
        return found

    def above_null(self, pairs: np.ndarray | None = None, *, swaps: int = SWAPS, seed: int = 0) -> dict[str, Any]:
        """Information, its null, by how much it is above, and the p-value; in the mean over layers and by layer."""
        number = len(self.longer if pairs is None else pairs)
        signs = np.random.RandomState(seed).choice((-1.0, 1.0), size=(swaps, number))
        values = self.information(np.concatenate([np.ones((1, number)), signs]), pairs)
        measured, null = values[0], values[1:]
        mean = null.mean(1)
        return {
            "information": float(measured.mean()),
            "null": float(mean.mean()),
            "std": float(mean.std(ddof=1)),
            "z": float(_in_spreads(measured.mean() - mean.mean(), mean.std(ddof=1))),
            "p": float((1 + (mean >= measured.mean() - 1e-14).sum()) / (1 + swaps)),
            "by_layer": [float(v) for v in measured - null.mean(0)],
            "by_layer_z": _in_spreads(measured - null.mean(0), null.std(0, ddof=1)).tolist(),
        }


def _in_spreads(difference: Any, spread: Any) -> Any:
    """0 where every permutation gives the same."""
    return np.where(spread > 0, difference / np.where(spread > 0, spread, 1.0), 0.0)


def _entropy(p: np.ndarray) -> np.ndarray:
    p = np.maximum(p, 0.0)
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(-1) / math.log(p.shape[-1])


def studied(answers: Answers) -> dict[str, Any]:
    """All pairs, fewer of them at random, and all but a group in turn."""
    number = len(answers.longer)
    found: dict[str, Any] = {"pairs": number, "all": answers.above_null(swaps=1000)}
    random = np.random.RandomState(1)
    for few in NUMBERS:
        some = [answers.above_null(random.permutation(number)[:few], seed=k) for k in range(SUBSETS)]
        found[str(few)] = {
            name: float(np.mean([each[name] for each in some])) for name in ("information", "null", "std", "z")
        }
        found[str(few)] |= {
            "told": float(np.mean([each["p"] <= 0.05 for each in some])),
            "above": float(np.std([each["information"] - each["null"] for each in some])),
        }
    group = np.arange(number) % GROUPS
    without = [answers.above_null(np.flatnonzero(group != g)) for g in range(GROUPS)]
    found["without"] = [each["information"] - each["null"] for each in without]
    return found


def train(data: Path, work: Path, model: str = "") -> None:
    """Measure; with no model nothing is to be done."""
    if not model or (RESULTS / f"{model.partition('=')[0]}.json").exists():
        return
    import torch

    import _versions

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder = _versions.shared().ModelFolder.parse(model)
    tokenizer, trained = folder.load()
    probe = probe_of(read_pairs(data), tokenizer)
    places = ib.ngram_labels(probe, "token")[0].numpy()
    answered = probe.labels["preference"].numpy()[places[:, 0], places[:, 1]] >= 0
    sequence = places[answered, 0]

    def summed(made: Any, **keywords: Any) -> tuple[list[str], Answers]:
        meter = ib.Meter(probe, orders="token", loss=False, readout=False, memory_budget=1 << 32, **keywords)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            layers = {name: table.numpy()[answered] for name, table in meter.assignments(made)}
        return [*layers], Answers.of([*layers.values()], sequence, len(probe))

    found: dict[str, Any] = {
        "package": ib.__version__,
        "prompt": f"last {PROMPT} tokens",
        "length": probe.input_ids.shape[1],
    }
    words: dict[str, Any] = {
        "layers": ["model.embed_tokens"],
        "forward": lambda m, ids, mask: m.model.embed_tokens(ids),
    }
    made: dict[str, Callable[[], Any]] = {"trained": lambda: trained}
    made |= {f"untrained {seed}": lambda seed=seed: _versions.shared().untrained(trained, seed) for seed in (0, 1)}
    sources: dict[str, Any] = {}
    for name, make in made.items():
        one = make()
        for part, keywords in (("", {}), (", embeddings", words)):
            layers, answers = summed(one, **keywords)
            sources[name + part] = {"layers": layers} | studied(answers)
            print(f"{name}{part}: {sources[name + part]['all']['z']:.2f}", flush=True)
            if part:
                # As `Meter` has it: what is read from the sums is the same number.
                other = {"orders": "token", "loss": False, "readout": False, "feature_probes": [probe]}
                own = ib.measure(one, ib.Probe.builtin(tokenizer, num_sequences=8), **other, **keywords)
                sources[name + part]["product"] = own.features["preference"].information
    ids = probe.input_ids.numpy()[places[answered, 0], places[answered, 1]]
    frequent = np.argsort(-np.bincount(ids))[: BINS - 1]
    token = np.full(ids.max() + 1, BINS - 1)
    token[frequent] = np.arange(BINS - 1)
    start = (probe.labels["preference"].numpy() >= 0).argmax(1)
    offset = np.minimum(places[answered, 1] - start[sequence], BINS - 1)
    for name, bins in (("tokens", token[ids]), ("place in the answer", offset)):
        sources[name] = {"layers": [name]} | studied(Answers.of([np.eye(BINS)[bins]], sequence, len(probe)))
    found["sources"] = sources
    lengths = np.bincount(sequence, minlength=len(probe)).reshape(-1, 2)
    found["longer"] = [float((lengths[:, 0] > lengths[:, 1]).mean()), float((lengths[:, 0] < lengths[:, 1]).mean())]
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomically(RESULTS / f"{folder.name}.json", json.dumps(_rounded(found), separators=(",", ":")).encode())


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _error(without: np.ndarray) -> float:
    return math.sqrt((len(without) - 1) * float(np.var(without)))


def report() -> Iterator[str]:
    """All tables, as markdown."""
    for path in sorted(RESULTS.glob("*.json")):
        yield from _tables(path.stem, json.loads(path.read_text()))


def _tables(model: str, found: dict[str, Any]) -> Iterator[str]:
    sources = found["sources"]
    yield heading(f"Preference information: {model}", 1)
    yield prose(
        f"""{sources["trained"]["pairs"]} pairs, {found["length"]} tokens with the {found["prompt"]} of the prompt; of
        the preferred answers {found["longer"][0]:.0%} are longer within these, {found["longer"][1]:.0%} shorter.
        Information in units of 1e-5 log(100), mean over layers. Null: preferred and rejected swapped in random pairs.
        Errors: jackknife over {GROUPS} groups of pairs."""
    )
    rows = []
    for name, one in sources.items():
        whole, without = one["all"], np.array(one["without"])
        above = whole["information"] - whole["null"]
        base = sources["trained"]
        paired = without - np.array(base["without"])
        apart = above - (base["all"]["information"] - base["all"]["null"])
        rows.append(
            [
                name,
                *(f"{1e5 * whole[part]:.1f}" for part in ("information", "null", "std")),
                f"{1e5 * above:+.1f} ± {1e5 * _error(without):.1f}",
                f"{whole['z']:+.2f}",
                f"{whole['p']:.3f}",
                "" if name == "trained" else f"{1e5 * apart:+.1f} ± {1e5 * _error(paired):.1f}",
            ]
        )
    yield table(["states", "information", "null", "its std", "above null", "z", "p", "above null, minus trained"], rows)
    yield prose(
        f"""Fewer pairs, drawn {SUBSETS} times from all of them: mean z, and in how many draws p is at most .05. Draws
        of 200 share most of their pairs."""
    )
    rows = [
        [
            name,
            *(f"{one[str(n)]['z']:+.2f}, {one[str(n)]['told']:.0%}" for n in NUMBERS),
            f"{one['all']['z']:+.2f}, p {one['all']['p']:.3f}",
        ]
        for name, one in sources.items()
    ]
    yield table(["states", *(f"{n} pairs" for n in NUMBERS), "all"], rows)
    yield prose("By layer, all pairs: information above null in 1e-5 log(100), and z.")
    rows = []
    for name, one in sources.items():
        if len(one["layers"]) > 1:
            some = np.unique(np.linspace(0, len(one["layers"]) - 1, 7).astype(int))
            cells = [
                f"{one['layers'][k].rpartition('.')[2]}: "
                f"{1e5 * one['all']['by_layer'][k]:+.1f}, {one['all']['by_layer_z'][k]:+.1f}"
                for k in some
            ]
            rows.append([name, *cells])
    if rows:
        yield table(["states", *(f"layer {k + 1} of 7" for k in range(len(rows[0]) - 1))], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="measure what is missing")
    parser.add_argument("--model", default="", metavar="NAME=FOLDER[:FILE]")
    options = parser.parse_args()
    if options.data is not None:
        train(options.data, Path(), options.model)
    for part in report():
        print(part)


if __name__ == "__main__":
    main()
