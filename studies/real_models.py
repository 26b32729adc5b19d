"""Real models, trained, damaged more and more, and untrained: which numbers are in the order of their loss.

    python studies/real_models.py                      # tables from the committed results, seconds
    python studies/real_models.py --data FOLDER --work FOLDER --model smollm2=FOLDER:FILE.gguf --model gemma=…

The second measures the versions that are missing: an hour on one core. The folder of the data holds
`c4_sample.jsonl.gz`; benchmarks/README.md says where the models are to be had. All weight matrices, embeddings
included, are damaged: by normal noise, in standard deviations of the matrix, by setting the smallest entries to zero,
by shuffling the entries. Damaged models are confidently wrong, so that one scale on the logits is fitted to each before
its loss is taken ("refitted").
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from _ranking import filled, pairs_right, spearman
from _tables import heading, prose, table

RESULTS = Path(__file__).parent / "results" / "real_models"
MODELS = ("smollm2", "gemma")
NOISE, PRUNED = (0.05, 0.1, 0.15, 0.2, 0.3), (0.2, 0.3, 0.4, 0.5, 0.6)
SEQUENCES, LENGTH, GROUPS = 64, 256, 16
# Losses closer than this, in nats a token, are not ordered.
APART = 0.1
DRAWS = 1000
VIEWS = {"": "mean", "late/": "late", "last/": "last"}
QUANTITIES = {
    "optimality": "plain ratio",
    "optimality_above_null": "ratio above null",
    "expressivity_local": "local E",
    "optimality_local": "local ratio",
    "score_local": "local score",
}
AIMED = {
    "complexity_local": "C",
    "expressivity_local": "E",
    "optimality_local": "ratio",
    "score_local": "score",
}
WHOLE = {"dispersion": "dispersion", "rankme": "RankMe", "alpha_req": "α-ReQ"}


def names() -> dict[str, str]:
    """Candidates by their logged name, and what tables call them."""
    found = {
        f"{view}token/{quantity}": f"{title}, {where}"
        for view, where in VIEWS.items()
        for quantity, title in QUANTITIES.items()
    }
    found |= {
        f"{view}/token/{q}": f"{view} {title}" for view in ("readout", "prediction") for q, title in AIMED.items()
    }
    return found | WHOLE


def direction(name: str) -> int:
    """+1 where more is taken to be better."""
    return -1 if name == "alpha_req" or name.endswith("complexity_local") else 1


def condense(kept: Path, model: str) -> None:
    """Write the scalars of each measured version, with values of which each group of sequences is left out."""
    import ib_callback as ib
    from ib_callback.common.files import write_atomically
    from ib_callback.results.points import replicates_of

    def rounded(value: float | None) -> float | None:
        return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")

    found = []
    for path in sorted((kept / model).glob("*.json")):
        raw = json.loads(path.read_text())
        measurement = ib.Measurement.from_dict(raw["measurement"])
        scalars = measurement.scalars()
        values: dict[str, Any] = {}
        for name in names():
            each: dict[str, Any] = {"value": rounded(scalars.get(name))}
            if name not in WHOLE:
                where, _, quantity = name.rpartition("/")
                each["se"] = rounded(getattr(measurement[where], f"{quantity}_se"))
                without = replicates_of(measurement[where], quantity) if each["value"] is not None else None
                each["without"] = None if without is None else [rounded(v) for v in without[:GROUPS]]
            values[name] = each
        losses = {}
        for name in ("loss", "refitted"):
            of_groups = np.array(raw["losses"][name]).reshape(GROUPS, -1).mean(1)
            without = (of_groups.sum() - of_groups) / (GROUPS - 1)
            losses[name] = {"value": rounded(of_groups.mean()), "without": [rounded(v) for v in without]}
        found.append(
            {
                **{name: raw[name] for name in ("kind", "level", "num_tokens", "num_bytes")},
                "scale": rounded(raw["losses"]["scale"]),
                "loss": losses["loss"],
                "refitted": losses["refitted"],
                "values": values,
            }
        )
    if found:
        RESULTS.mkdir(parents=True, exist_ok=True)
        order = ["trained", "noise", "pruned", "shuffled", "untrained"]
        found.sort(key=lambda each: (order.index(each["kind"]), each["level"]))
        settings = {"sequences": SEQUENCES, "length": LENGTH, "package": ib.__version__, "versions": found}
        write_atomically(RESULTS / f"{model}.json", json.dumps(settings, separators=(",", ":")).encode())


@dataclass(frozen=True)
class Versions:
    """Some versions of a model.

    Attributes:
        rows: of the results.
        z: [DRAWS, GROUPS] standard normal numbers, by which the values left out are moved.
    """

    rows: list[dict[str, Any]]
    z: np.ndarray

    def drawn(self, of: Sequence[dict[str, Any]]) -> np.ndarray:
        """[DRAWS, P] values as they might be on other text like this.

        Normal, with the covariance that leaving out groups of sequences has (delete-a-group jackknife): what moves one
        version moves the others and the loss as well, since the text is the same.
        """
        values = np.array([np.nan if each["value"] is None else each["value"] for each in of])
        moved = np.zeros((len(of), GROUPS))
        for row, each in zip(moved, of, strict=True):
            if each.get("without") and None not in each["without"]:
                without = np.array(each["without"])
                row[:] = math.sqrt((GROUPS - 1) / GROUPS) * (without - without.mean())
        return values + self.z @ moved.T

    def loss(self) -> np.ndarray:
        """[P] refitted."""
        return np.array([row["refitted"]["value"] for row in self.rows])

    def losses(self) -> np.ndarray:
        """[DRAWS, P]"""
        return self.drawn([row["refitted"] for row in self.rows])

    def of(self, name: str) -> list[dict[str, Any]]:
        """A candidate of each version."""
        return [row["values"][name] for row in self.rows]


@dataclass(frozen=True)
class Held:
    """A candidate held against the refitted loss: each with a 95 % interval."""

    ranks: float
    right: float
    pairs: int
    of_ranks: tuple[float, float]
    of_right: tuple[float, float]

    @classmethod
    def against_loss(cls, versions: Versions, name: str) -> Held:
        """Of some versions."""
        better, loss, many = direction(name), versions.loss(), versions.losses()
        values = filled([each["value"] for each in versions.of(name)], better)
        right, pairs = pairs_right(values, loss, better, APART)
        drawn = versions.drawn(versions.of(name))
        drawn[~np.isfinite(drawn)] = -np.inf * better
        ranks = [rankdata(each, axis=1) for each in (drawn, many)]
        ranks = [each - each.mean(1, keepdims=True) for each in ranks]
        size = np.sqrt((ranks[0] ** 2).sum(1) * (ranks[1] ** 2).sum(1))
        spread = np.divide((ranks[0] * ranks[1]).sum(1), size, out=np.full(len(size), np.nan), where=size > 0)
        first, second = np.triu_indices(len(loss), 1)
        apart = many[:, first] - many[:, second]
        order = better * np.sign(np.nan_to_num(drawn[:, first] - drawn[:, second]))
        shares = np.where(order == 0, 0.5, order * apart < 0)
        counted = np.abs(apart) > APART
        shares = (shares * counted).sum(1) / counted.sum(1)
        low, high = np.nanquantile(spread, [0.025, 0.975])
        worst, best = np.quantile(shares, [0.025, 0.975])
        return cls(spearman(values, loss), right, pairs, (low, high), (worst, best))

    def __str__(self) -> str:
        low, high = self.of_ranks
        worst, best = self.of_right
        return f"{self.ranks:+.2f} ({low:+.2f} to {high:+.2f}), {self.right:.2f} ({worst:.2f} to {best:.2f})"


def told_from_untrained(rows: Sequence[dict[str, Any]], name: str) -> str:
    """Whether the untrained model is below the trained one, and by how many standard errors of the difference."""
    pair = [
        next((row["values"][name] for row in rows if row["kind"] == kind), None) for kind in ("trained", "untrained")
    ]
    if None in pair:
        return ""
    trained, untrained = pair
    if untrained["value"] is None:
        return "yes (undefined)"
    if trained["value"] is None:
        return "**no** (undefined)"
    difference = direction(name) * (trained["value"] - untrained["value"])
    verdict = "yes" if difference > 0 else "**no**"
    if not (trained.get("without") and untrained.get("without") and None not in untrained["without"]):
        return verdict
    without = np.array(trained["without"]) - np.array(untrained["without"])
    error = math.sqrt((GROUPS - 1) * without.var())
    return f"{verdict} ({difference / error:+.1f} SE)"


def of_version(row: dict[str, Any]) -> str:
    return f"{row['kind']} {row['level']:g}" if row["level"] else row["kind"]


def shown(each: dict[str, Any]) -> str:
    if each["value"] is None:
        return "none"
    number = f"{each['value']:.4f}" if abs(each["value"]) < 1 else f"{each['value']:.4g}"
    return f"{number} ± {each['se']:.4f}" if each.get("se") is not None else number


def tables_of(model: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Each version with its numbers."""
    yield heading(f"{model}: {rows[0]['num_tokens']:,} tokens, {rows[0]['num_bytes']:,} bytes", 3)
    losses = []
    for row in rows:
        bits = row["refitted"]["value"] * row["num_tokens"] / row["num_bytes"] / math.log(2)
        losses.append(
            [
                of_version(row),
                *(f"{row[n]['value']:.3f}" for n in ("loss", "refitted")),
                f"{row['scale']:.3f}",
                f"{bits:.3f}",
            ]
        )
    titles = names()
    groups = [["late/" not in name and "last/" not in name and name.startswith("token/") for name in titles]]
    groups += [[name.startswith(part) for name in titles] for part in ("late/", "last/", "readout", "prediction")]
    groups += [[name in WHOLE for name in titles]]
    yield table(["version", "loss", "refitted", "scale", "bits/byte"], losses)
    for chosen in groups:
        some = [name for name, wanted in zip(titles, chosen, strict=True) if wanted]
        yield table(
            ["version", *(titles[name] for name in some)],
            [[of_version(row), *(shown(row["values"][name]) for name in some)] for row in rows],
        )


KINDS = {
    "noise": ("trained", "noise"),
    "pruned": ("trained", "pruned"),
    "all": ("trained", "noise", "pruned", "shuffled", "untrained"),
}


def report() -> Iterator[str]:
    """All tables, as markdown."""
    loaded = {m: json.loads((RESULTS / f"{m}.json").read_text()) for m in MODELS if (RESULTS / f"{m}.json").exists()}
    yield heading("Real models, trained, damaged and untrained", 1)
    yield prose(
        f"""C4, {SEQUENCES} sequences of {LENGTH} tokens, ± standard errors from {GROUPS} groups of sequences. Against
        the refitted loss: Spearman's rank correlation, and the share of pairs over {APART} nats apart that the number
        orders rightly, undefined counted as worst; more is taken to be better, but for C and α-ReQ. In brackets 95 % of
        {DRAWS:,} normal draws with the joint covariance that leaving out groups gives all versions and the loss.
        RankMe, α-ReQ and dispersion have no error of their own: their interval is that of the loss. Each kind has the
        trained model in it, "all" the untrained one too."""
    )
    held: dict[tuple[str, str, str], Held] = {}
    z = np.random.RandomState(0).standard_normal((DRAWS, GROUPS))
    for model, (kind, members) in itertools.product(loaded, KINDS.items()):
        versions = Versions([row for row in loaded[model]["versions"] if row["kind"] in members], z)
        if len(versions.rows) > 2:
            held |= {(name, model, kind): Held.against_loss(versions, name) for name in names()}
    yield heading("Summary", 2)
    cells = sorted(
        {(model, kind) for _, model, kind in held}, key=lambda cell: (MODELS.index(cell[0]), [*KINDS].index(cell[1]))
    )
    lines = []
    for name, title in names().items():
        shares = [held[(name, *cell)].right for cell in cells]
        ranks = [held[(name, *cell)].ranks * direction(name) for cell in cells]
        told = [told_from_untrained(loaded[model]["versions"], name) for model in loaded]
        lines.append(
            (
                min(shares),
                [title, f"{min(shares):.2f}", f"{-max(ranks):+.2f}", *(f"{share:.2f}" for share in shares), *told],
            )
        )
    lines.sort(key=lambda line: -line[0])
    yield table(
        [
            "number",
            "least share",
            "least rank agreement",
            *(f"{m}, {k}" for m, k in cells),
            *(f"untrained below, {m}" for m in loaded),
        ],
        [line for _, line in lines],
    )
    for model in loaded:
        yield heading(f"{model}: against the refitted loss", 3)
        own = [cell for cell in cells if cell[0] == model]
        pairs = {cell: held[("token/optimality", *cell)].pairs for cell in own}
        yield table(
            [
                "number",
                *(f"{kind} ({pairs[cell]} pairs)" for cell in own for kind in [cell[1]]),
                "untrained below trained",
            ],
            [
                [
                    title,
                    *(str(held[(name, *cell)]) for cell in own),
                    told_from_untrained(loaded[model]["versions"], name),
                ]
                for name, title in names().items()
            ],
        )
        yield from tables_of(model, loaded[model]["versions"])


def train(data: Path, work: Path, models: Sequence[str] = (), only: Sequence[str] = ()) -> None:
    """Measure the versions that are missing; `models` are NAME=FOLDER:FILE, without any nothing is to be done."""
    if not models:
        return
    import _versions

    kept = work / "real_models"
    for each in models:
        name = _versions.compute(
            each,
            data / "c4_sample.jsonl.gz",
            kept,
            sequences=SEQUENCES,
            length=LENGTH,
            groups=GROUPS,
            noise=NOISE,
            pruned=PRUNED,
            only=only,
        )
        condense(kept, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="measure what is missing")
    parser.add_argument("--work", type=Path, default=Path("study-work"))
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER[:FILE]")
    parser.add_argument("--only", nargs="*", default=(), help="versions, as in trained noise_0.05")
    options = parser.parse_args()
    if options.data is not None:
        train(options.data, options.work, options.model, options.only)
    for part in report():
        print(part)


if __name__ == "__main__":
    main()
