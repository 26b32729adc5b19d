"""The sides that take turns: forwards of a model, and measurements with their settings and what they are held to."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import ib_callback as ib
from _common import Peak, Times

TRUNK, LOGITS, EVALUATION = "forward of the trunk", "forward with logits", "evaluation step"
PLAIN = "without baseline, loss or readout"
Run = Callable[[], Any]


@dataclass(frozen=True)
class Side:
    """A measurement.

    Attributes:
        settings: of its Meter.
        held: at most so many of the reference of this name, at 128 x 512 on a CPU.
        held_on_gpu: the same on a GPU, with a model of 1B.
        features: whether its probe has labels.
        x: where it stands on the axis of its part, if that has one.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    held: tuple[float, str] | None = None
    held_on_gpu: tuple[float, str] | None = None
    features: bool = False
    x: float | None = None


SIDES = {
    PLAIN: Side({"baseline": False, "loss": False, "readout": False}),
    "loss=False": Side({"loss": False}, held=(1.10, TRUNK), held_on_gpu=(1.05, TRUNK)),
    "default": Side({}, held=(1.20, TRUNK)),
    'loss="all"': Side({"loss": "all"}, held=(1.10, LOGITS)),
}
OPTIONS = {
    "loss=False, null=False": Side({"loss": False, "null": False}),
    "loss=False, baseline=False": Side({"loss": False, "baseline": False}),
    "loss=False, readout=False": Side({"loss": False, "readout": False}),
    "default, prediction=False": Side({"prediction": False}),
    "loss=False, a feature of 8 classes": Side({"loss": False}, features=True),
    "loss=False, standard_errors=True": Side({"loss": False, "standard_errors": True}),
    "loss=False, both companions": Side({"loss": False, "companions": ("rankme", "alpha_req")}),
    "loss=False, draws=4": Side({"loss": False, "draws": 4}),
    "loss=False, center=True": Side({"loss": False, "center": True}),
}
BINS = {f"loss=False, {bins} bins": Side({"loss": False, "num_bins": bins}, x=bins) for bins in (50, 100, 300, 1000)}
_NGRAMS = ("token", "bigram", "trigram", "quadgram")
ORDERS = {
    "loss=False, " + (_NGRAMS[0] if n == 1 else f"{_NGRAMS[0]} to {_NGRAMS[n - 1]}"): Side(
        {"loss": False, "orders": _NGRAMS[:n]}, x=n
    )
    for n in range(1, 5)
}
BOTH = {name: SIDES[name] for name in ("loss=False", "default")}


def matching(sides: Mapping[str, Side], pattern: str) -> dict[str, Side]:
    """Those whose name the regular expression is found in."""
    return {name: side for name, side in sides.items() if re.search(pattern, name)}


def labelled(probe: ib.Probe, classes: int = 8) -> ib.Probe:
    """The same probe with a label on every token: one of so many classes for each sequence."""
    rows = torch.arange(len(probe)) % classes
    label = rows[:, None].expand(probe.input_ids.shape).clone()
    return ib.Probe.from_tokens(probe.input_ids, probe.attention_mask, labels={"class": label}, name=probe.name)


def forwards(model: nn.Module, probe: ib.Probe, batch_size: int, device: str) -> dict[str, Run]:
    """The trunk, the model with all logits, and an evaluation step as HuggingFace's Trainer makes it, over a probe.

    An evaluation step is a forward with labels, which makes all logits and their cross-entropy in float32.
    """
    batches = [
        (ids.to(device), mask.to(device, torch.long))
        for ids, mask in zip(probe.input_ids.split(batch_size), probe.attention_mask.split(batch_size), strict=True)
    ]

    def over_batches(step: Callable[[torch.Tensor, torch.Tensor], Any]) -> Run:
        @torch.no_grad()
        def run() -> None:
            for ids, mask in batches:
                step(ids, mask)

        return run

    trunk: Any = model.base_model
    return {
        TRUNK: over_batches(lambda ids, mask: trunk(ids, attention_mask=mask, use_cache=False)),
        LOGITS: over_batches(lambda ids, mask: model(ids, attention_mask=mask, use_cache=False)),
        EVALUATION: over_batches(
            lambda ids, mask: (
                model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False).loss
            )
        ),
    }


def measurements(
    model: nn.Module, probe: ib.Probe, sides: Mapping[str, Side], batch_size: int
) -> tuple[dict[str, Run], dict[str, int]]:
    """What measures, by side, and the bytes that `Meter.preflight` says; that also makes plans and reference points."""
    runs: dict[str, Run] = {}
    said: dict[str, int] = {}
    for name, side in sides.items():
        meter = ib.Meter(labelled(probe) if side.features else probe, batch_size=batch_size, **side.settings)
        said[name] = meter.preflight(model).memory
        runs[name] = lambda meter=meter: meter.measure(model)
    return runs, said


def take_turns(
    records: dict[str, Any],
    runs: Mapping[str, Run],
    references: Sequence[str],
    *,
    rounds: int,
    device: str,
    repeat: int,
    save: Callable[[], None],
    said: Mapping[str, int],
    before: Mapping[str, Run] | None = None,
) -> None:
    """Time all sides in turns, round by round, until each record has as many rounds as asked for.

    Args:
        records: by side: seconds of each round on the wall clock and of processor time, those of the references in the
            same round, and by how many bytes memory grew at most. Those of an earlier run go on where they stopped.
        runs: by side, references among them.
        references: what the others are compared with; run in every round in which any side is missing.
        rounds: of each.
        device: "cpu" or "cuda…".
        repeat: calls in one timing, which is divided by it.
        said: bytes by side, to be put down beside what it grew by.
        before: what has to be done before a side, outside its clock.
        save: called after each round, so that a run that is cut off loses no more than one.
    """
    if device.startswith("cuda"):  # kernels are loaded, and memory is taken, by the first call; of a CPU it is round 1
        for name, run in runs.items():
            if before is not None and name in before:
                before[name]()
            run()
    for number in range(rounds):
        due = [name for name in runs if name not in records or len(records[name]["wall"]) <= number]
        if not due:
            continue
        times, grew = {}, {}
        names = [*runs]
        first = number % len(names)  # so that none is always the first, or behind the same one
        for name in names[first:] + names[:first]:
            if name in due or name in references:
                if before is not None and name in before:
                    before[name]()
                times[name] = Times()
                with Peak(device) as peak:
                    times[name].add(runs[name], device, repeat)
                grew[name] = peak.bytes
        for name in due:
            record = records.setdefault(name, {"wall": [], "cpu": [], "grew": 0, "said": said.get(name), "against": {}})
            record["wall"] += times[name].wall
            record["cpu"] += times[name].cpu
            record["grew"] = max(record["grew"], 0 if grew[name] != grew[name] else int(grew[name]))
            for reference in references:
                beside = record["against"].setdefault(reference, {"wall": [], "cpu": []})
                beside["wall"] += times[reference].wall
                beside["cpu"] += times[reference].cpu
        save()
        print(f"  round {number + 1} of {rounds}: {sum(sum(spent.wall) for spent in times.values()):.1f} s", flush=True)
