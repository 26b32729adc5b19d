"""Tables of what cost.py has found, from its JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from _common import spread
from _cost.counts import MMLU, PROBE, SHAPES, TRAINING, Constant
from _cost.sides import BINS, OPTIONS, ORDERS, SIDES, TRUNK, Side

Group = Mapping[str, Any]
_ALL: dict[str, Side] = {**SIDES, **OPTIONS, **BINS, **ORDERS}
# Parts whose groups of one model stand in one table.
TOGETHER = {"options": "sides"}
TITLES = {
    "sides": "A measurement and its options, beside forwards and an evaluation step",
    "models": "By size of the model",
    "bins": "By number of bins",
    "orders": "By n-gram orders",
    "probe": "By size of the probe",
    "ranks": "Shared by processes of one machine",
    "theirs": "Beside LLMInferrer of soft-entropy",
}


def clock(group: Group) -> str:
    """Which times count: of a GPU those on the wall clock."""
    return "wall" if group["device"].startswith("cuda") else "cpu"


def ratios(record: Mapping[str, Any], reference: str, which: str) -> list[float]:
    """By round; empty if there is no such reference."""
    beside = record.get("against", {}).get(reference)
    return [] if beside is None else [a / b for a, b in zip(record[which], beside[which], strict=True)]


def median_ratio(group: Group, side: str, reference: str = TRUNK) -> float | None:
    """Of a side, on the clock that counts; None if it was not run."""
    found = ratios(group["sides"].get(side, {}), reference, clock(group))
    return statistics.median(found) if found else None


def limit(group: Group, side: str) -> tuple[float, str] | None:
    """What a side is held to, and of which reference."""
    known = _ALL.get(side)
    if known is None:
        return None
    return known.held if clock(group) == "cpu" else known.held_on_gpu


def merged(parts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups by part and key; of parts that stand in one table together."""
    found: dict[str, dict[str, Any]] = {}
    for part, groups in parts.items():
        if part not in {**TITLES, **TOGETHER}:
            continue
        for key, group in groups.items():
            there = found.setdefault(TOGETHER.get(part, part), {})
            before = there.get(key, {"sides": {}, "seconds": 0.0})
            sides = {**group["sides"], **before["sides"]}
            # In the order in which they are defined, whichever was run first; forwards go ahead.
            order = [*(name for name in sides if name not in _ALL), *(name for name in _ALL if name in sides)]
            seconds = group["seconds"] + before["seconds"]
            there[key] = {**group, "seconds": seconds, "sides": {name: sides[name] for name in order}}
    return found


def print_parts(parts: Mapping[str, Any], wanted: Sequence[str]) -> None:
    """All tables of the parts wanted."""
    tables = merged({part: parts[part] for part in wanted if part in parts})
    for part, title in TITLES.items():
        if part in tables:
            print(f"\n{title}")
            for group in tables[part].values():
                print_group(part, group)
    for part, show in COUNTED.items():
        if part in wanted and part in parts:
            show(parts[part])


def describe(group: Group) -> str:
    """One line about model, probe and machine."""
    return (
        f"{group['model']} ({group['layers']} layers, {group['parameters'] / 1e6:,.1f} M parameters), "
        f"{group['dtype']}, {group['sequences']} x {group['length']} tokens of {group['text']}, "
        f"batches of {group['batch_size']}; {group['machine']}; took {group['seconds']:,.0f} s"
    )


def print_group(part: str, group: Group) -> None:
    """The table of one model and probe: medians of the ratios of each round, least to greatest."""
    print(describe(group))
    if part == "ranks":
        _print_ranks(group)
        return
    which = clock(group)
    other = "cpu" if which == "wall" else "wall"
    named = {"cpu": "processor", "wall": "wall clock"}
    references = group["references"]
    heads = ["rounds", f"s, {named[which]}", f"/ trunk, {named[which]}", f"/ trunk, {named[other]}"]
    heads += [f"/ {reference.removeprefix('forward ')}" for reference in references if reference != TRUNK]
    heads += ["said MiB", "grew MiB"]
    rows = []
    for name, record in group["sides"].items():
        cells = [str(len(record["wall"])), f"{statistics.median(record[which]):.2f}"]
        cells += [spread(ratios(record, TRUNK, each)) for each in (which, other)]
        cells += [_spread(ratios(record, reference, which)) for reference in references if reference != TRUNK]
        cells += [f"{record[kind] / 2**20:,.0f}" if record.get(kind) else "" for kind in ("said", "grew")]
        rows.append([name, *cells, *([verdict(group, name)] if part == "sides" else [])])
    print_table(["", *heads, *(["held to"] if part == "sides" else [])], rows, left=(0, len(heads) + 1))


def verdict(group: Group, side: str) -> str:
    """What a side is held to and whether it keeps to it, where that is meant: bars are of one size of probe each."""
    bar = limit(group, side)
    if bar is None:
        return ""
    most, reference = bar
    found = median_ratio(group, side, reference)
    text = f"{most:.2f} x the {reference}"
    on_gpu = clock(group) == "wall"
    size = (16, 512) if on_gpu else (128, 512)
    models = ("llama-1b",) if on_gpu else ("smollm2", "gpt2")
    is_other = (group["sequences"], group["length"]) != size or group["model"] not in models
    if is_other or (not on_gpu and (group["threads"], group["dtype"]) != (1, "float32")):
        return f"{text}, at {size[0]} x {size[1]} of {' and '.join(models)}{'' if on_gpu else ', one thread, float32'}"
    return f"{text}: {'kept' if found is not None and found <= most else 'MISSED'}"


def _print_ranks(group: Group) -> None:
    which = clock(group)
    rows = []
    for name, record in group["sides"].items():
        one = next(iter(record["against"]))
        total = [a / b for a, b in zip(record["total"], record["against"][one]["cpu"], strict=True)]
        rows.append(
            [
                name,
                str(len(record["wall"])),
                f"{statistics.median(record['wall']):.2f}",
                f"{statistics.median(record['cpu']):.2f}",
                spread(ratios(record, one, which)),
                spread(total),
                f"{record['difference']:.1e} of {record['numbers']:,} numbers",
            ]
        )
    named = "wall clock" if which == "wall" else "processor"
    heads = [
        "",
        "rounds",
        "s, wall clock",
        "s, slowest rank",
        f"slowest / one, {named}",
        "sum of processor / one",
        "greatest difference",
    ]
    print_table(heads, rows)


def print_mmlu(found: Mapping[str, Any]) -> None:
    print("\nOne measurement beside one pass of MMLU of the same model, by count of tokens; nothing of this is run")
    print_constants({**PROBE, **MMLU, **_constants(found["ratios"])})
    rows = [
        [
            f"{row['shots']}-shot, {row['way']}",
            f"{row['tokens'] / 1e6:.1f} M",
            f"{row['by_count']:.2%}",
            f"{row['by_time']:.2%}",
            row["note"],
        ]
        for row in found["rows"]
    ]
    print_table(["", "tokens of MMLU", "tokens of a measurement", "with both ratios", ""], rows)


def print_share(found: Mapping[str, Any]) -> None:
    print("\nShare of training time at the default schedule, by arithmetic")
    print_constants({**PROBE, **TRAINING, **SHAPES})
    print("Left out: the first and the last step, which are measured besides, and the plan, which is made once.")
    for table in found["tables"]:
        constant = Constant(**table["ratio"])
        print(f"\na measurement = {constant.value:.3g} {constant.unit} ({constant.origin}: {constant.note})")
        rows = [
            [
                f"{row['model']} on {row['gpus']:,} GPUs",
                f"{row['step']:.2f}",
                f"{row['rounds']}",
                f"{row['compute']:.3f}",
                f"{row['gather']:.3f}",
                f"{row['sent']:.4f}",
                f"{row['measurement']:.2f}",
                f"{row['share']:.3%}",
                "" if row["fits"] else "does not fit in their memory",
            ]
            for row in table["rows"]
        ]
        heads = [
            "",
            "s a step",
            "batches a rank",
            "s a batch",
            "s to gather",
            "s to send",
            "s a measurement",
            "share",
            "",
        ]
        print_table(heads, rows)


COUNTED: dict[str, Callable[[Mapping[str, Any]], None]] = {"mmlu": print_mmlu, "share": print_share}


def print_constants(constants: Mapping[str, Constant]) -> None:
    """Each with its origin."""
    rows = [
        [name, f"{each.value:,.10g}" if each.value < 1e6 else f"{each.value:.3g}", each.unit, each.origin, each.note]
        for name, each in constants.items()
    ]
    print_table(["constant", "value", "", "", ""], rows, left=(0, 2, 3, 4))


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> None:
    """Columns as wide as they have to be; the first and the last are aligned left."""
    left = left or (0, len(heads) - 1)
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    for row in [heads, *rows]:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _constants(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Constant]:
    return {name: Constant(**each) for name, each in values.items()}


def _spread(values: list[float]) -> str:
    return spread(values) if values else ""
