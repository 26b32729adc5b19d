r"""Every number of the last layer of one model of a results file, computed again in float64 by code of its own.

    ib-callback measure MODEL OTHER --documents c4.jsonl.gz --num-sequences 128 --max-length 128 --dtype float32 \
        -o results.jsonl
    python benchmarks/agreement_one_layer.py --results results.jsonl --text c4.jsonl.gz --model FOLDER[:FILE.gguf] \
        --other FOLDER[:FILE.gguf]

Nothing of the package is imported. transformers loads the model and the tokenizers, and gives the states; the documents
are chosen by the rule of the docs; the rest is `tests/support/brute_force.py`, which works position by position in
NumPy and mpmath, and a few formulas here. The document baseline's shifts are drawn again as the package describes them.

Compared are the entropy, the ceiling and the dispersion, and of every order both sides: plain, null, document baseline,
local, and what follows from these; the same of the readout, whose states are those of the last layer. Nulls are
expected values, which the package estimates and this script takes from permutations: they are to agree within four
standard errors of both, and what is above a null is computed with the file's. Not computed again: standard errors, the
loss, and the view `prediction`. The exit status is 1 on disagreement.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
import brute_force as bf

# The package quantises in float32.
TOLERANCE = 1e-6
ERRORS = 4.0
# Of the document baseline: labels come from so many positions away, in sequences with so many of them.
NEAREST, FEWEST = 16, 48


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="as ib-callback measure writes them")
    parser.add_argument("--text", type=Path, required=True, help='.jsonl or .jsonl.gz with a "text" field')
    parser.add_argument("--model", required=True, metavar="FOLDER[:FILE.gguf]", help="as it was given to measure")
    parser.add_argument(
        "--other", action="append", default=[], metavar="FOLDER[:FILE.gguf]", help="of the same command"
    )
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=128, help="most tokens of a document")
    parser.add_argument("--min-length", type=int, default=16)
    parser.add_argument("--permutations", type=int, default=100, help="for each null")
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args(arguments)

    folder, keywords = place(options.model)
    row = row_of(options.results, Path(folder).name)
    orders = row["settings"]["orders"]
    ids, mask = probe(options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **keywords).eval()
    states, table = last_states(model, ids, mask, options.batch_size), model.get_output_embeddings().weight
    positions = bf.valid_positions(mask, max(bf.order_width(name) for name in orders))
    assert len(positions) == row["num_positions"], (len(positions), row["num_positions"])
    check = Check()

    dim, bins = states.shape[-1], row["settings"]["num_bins"]
    points, temperature = bf.reference_points(dim, bins, row["settings"]["seed"]), bf.calibrated_temperature(dim, bins)
    random = np.array([bf.soft_assignment(states[p], points, temperature) for p in positions])
    check("entropy", row["entropy_by_layer"][-1], bf.overall_entropy(random))
    check("ceiling", row["ceiling_by_layer"][-1], bf.ceiling(random))
    unit = np.array([states[p] / math.sqrt(math.fsum(states[p] ** 2)) for p in positions])
    number = len(unit)
    check("dispersion", row["dispersion_by_layer"][-1],
          1 - (float((unit.sum(0) ** 2).sum()) - number) / (number * (number - 1)))  # fmt: skip
    for order in orders:
        found = row["orders"][order]
        for name in (f"{side}_{kind}" for side in ("complexity", "expressivity") for kind in ("baseline", "local")):
            assert found[f"{name}_by_layer"][-1] == row["views"]["last"][order][name]
    frequent = bf.frequent_tokens(ids, mask, row["settings"]["readout"]["tokens"])
    rows = table[torch.tensor(frequent)].double().detach().numpy()
    readout = bf.readout_assignments(states, rows, positions)
    for view, assignments in (("last", random), ("readout", readout)):
        for order in orders:
            plane(check, view, order, row["views"][view][order], assignments, ids, positions, row, options.permutations)
    return check.end()


def place(text: str) -> tuple[str, dict[str, str]]:
    """A folder, and how transformers is told which file in it."""
    folder, _, file = text.partition(":")
    return folder, {"gguf_file": file} if file else {}


def row_of(results: Path, model: str) -> dict[str, Any]:
    """The line of a model as it was trained."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    (row,) = [row for row in rows if row["model"] == model and row["source"] is not None]
    return row


def probe(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of the first documents that are long enough under all tokenizers, each cut; padded with 0."""
    tokenizers = []
    for each in (options.model, *options.other):
        folder, keywords = place(each)
        tokenizers.append(AutoTokenizer.from_pretrained(folder, **keywords))
    found: list[list[int]] = []
    for text in texts(options.text):
        tokens = [tokenizer(text)["input_ids"] for tokenizer in tokenizers]
        if min(map(len, tokens)) >= options.min_length:
            found.append(tokens[0][: options.length])
        if len(found) == options.sequences:
            break
    longest = max(map(len, found))
    ids = np.array([each + [0] * (longest - len(each)) for each in found])
    return ids, np.array([[1] * len(each) + [0] * (longest - len(each)) for each in found], dtype=bool)


def texts(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


@torch.no_grad()
def last_states(model: Any, ids: np.ndarray, mask: np.ndarray, batch: int) -> np.ndarray:
    """[N, S, dim], behind the final norm."""
    parts = []
    for begin in range(0, len(ids), batch):
        given, real = (torch.from_numpy(each[begin : begin + batch]) for each in (ids, mask))
        parts.append(model.base_model(given, attention_mask=real.long()).last_hidden_state.double().numpy())
    return np.concatenate(parts)


class Check:
    """The greatest difference of each kind of number."""

    def __init__(self) -> None:
        self.worst: dict[str, tuple[float, float]] = {}
        self.number = self.wrong = 0

    def __call__(self, name: str, theirs: float | None, ours: float | None, allowed: float = TOLERANCE) -> None:
        """Hold one number of the file against one computed again."""
        self.number += 1
        if theirs is None or ours is None:
            share, difference = (0.0, 0.0) if theirs is ours else (math.inf, math.inf)
        else:
            difference = abs(theirs - ours)
            share = difference / allowed
        if not share <= 1:
            self.wrong += 1
            print(f"{name}: {theirs}, computed again {ours}, allowed {allowed:.1e}")
        kind = name.rpartition("/")[2]
        self.worst[kind] = max(self.worst.get(kind, (0.0, 0.0)), (share, difference))

    def end(self) -> int:
        """Print the table; the exit status."""
        print(f"{'':28}{'difference':>14}{'of what is allowed':>20}")
        for kind, (share, difference) in self.worst.items():
            print(f"{kind:28}{difference:14.1e}{share:20.2f}")
        print(f"{self.number} numbers, {self.wrong} of them otherwise")
        return 1 if self.wrong else 0


def plane(
    check: Check, view: str, order: str, theirs: dict[str, Any], assignments: np.ndarray, ids: np.ndarray,
    positions: Sequence[bf.Position], row: dict[str, Any], permutations: int,
) -> None:  # fmt: skip
    """Hold one order of one view against its own recomputation."""
    width = bf.order_width(order)
    labels = {
        "complexity": [bf.input_label(ids, p, width) for p in positions],
        "expressivity": [bf.output_label(ids, p, width) for p in positions],
    }
    kept, partner = far_away(positions, row["settings"]["seed"])
    inside = assignments[kept]
    baseline = bf.mutual_information(inside, [labels["complexity"][i] for i in partner])
    named = f"{view}/{order}/"
    own: dict[str, float] = {}
    for side, given in labels.items():
        own[side] = bf.mutual_information(assignments, given)
        local = bf.mutual_information(inside, [given[i] for i in kept]) - baseline
        null = bf.permutation_null([assignments], given, repeats=permutations)
        own |= {f"{side}_local": local, f"{side}_baseline": baseline}
        for name in (side, f"{side}_local", f"{side}_baseline"):
            check(named + name, theirs[name], own[name], 2 * TOLERANCE if name.endswith("local") else TOLERANCE)
        error = math.hypot(null.standard_error, theirs[f"{side}_null_se"])
        check(f"{named}{side}_null", theirs[f"{side}_null"], null.mean, ERRORS * error)
        own[f"{side}_null"] = theirs[f"{side}_null"]
        for name, value in (("above_null", own[side]), ("document", baseline)):
            check(f"{named}{side}_{name}", theirs[f"{side}_{name}"], value - own[f"{side}_null"])
    check(named + "num_positions_local", theirs["num_positions_local"], len(kept))
    check(named + "distance_to_bound", theirs["distance_to_bound"], own["complexity"] - own["expressivity"], 2e-6)
    for kind in ("", "_above_null", "_local"):
        sides = [own[side] - (own[f"{side}_null"] if kind == "_above_null" else 0.0) for side in labels]
        if kind == "_local":
            sides = [own[f"{side}_local"] for side in labels]
        # Undefined by rules that rest on standard errors: then there is nothing to compare.
        if theirs[f"optimality{kind}"] is not None:
            ratio = sides[1] / sides[0]
            check(f"{named}optimality{kind}", theirs[f"optimality{kind}"], ratio,
                  2 * TOLERANCE * (1 + abs(ratio)) / abs(sides[0]))  # fmt: skip
            if kind == "_local":
                check(named + "score_local", theirs["score_local"], sides[1] ** 2 / sides[0],
                      2 * TOLERANCE * abs(ratio) * (2 + abs(ratio)))  # fmt: skip
    if view == "last":
        room = 1 - baseline / row["ceiling_by_layer"][-1]
        for side in labels:
            scaled = (own[side] - baseline) / room
            check(f"{named}{side}_scaled", theirs[f"{side}_scaled"], scaled,
                  2 * TOLERANCE * (1 + abs(scaled) / row["ceiling_by_layer"][-1]) / room)  # fmt: skip


def far_away(positions: Sequence[bf.Position], seed: int) -> tuple[list[int], list[int]]:
    """Which positions the document baseline is of, and from which each of them has its label.

    Along the circle of their sequence all are shifted by one offset, uniform over those of at least 16 positions both
    ways: a function of the seed and the number of the sequence.
    """
    of_sequence: dict[int, list[int]] = {}
    for place, (sequence, _) in enumerate(positions):
        of_sequence.setdefault(sequence, []).append(place)
    uniform = np.random.RandomState([seed, NEAREST]).random_sample(max(of_sequence) + 1)
    kept, partner = [], []
    for sequence, places in of_sequence.items():
        if len(places) >= FEWEST:
            offset = NEAREST + math.floor(uniform[sequence] * (len(places) - 2 * NEAREST + 1))
            kept += places
            partner += [places[(k + offset) % len(places)] for k in range(len(places))]
    return kept, partner


if __name__ == "__main__":
    sys.exit(main())
