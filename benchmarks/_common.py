"""What the benchmarks share: real text, a probe of an exact size, a stand-in model that replays states."""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import gzip
import json
import math
import os
import platform
import pstats
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ib_callback as ib


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """`--text` and `--tokenizer`, which every benchmark takes; without them it needs no file at all."""
    parser.add_argument(
        "--text", type=Path, help='.txt (documents between blank lines) or .jsonl(.gz) with a "text" field'
    )
    parser.add_argument("--tokenizer", help="folder or name for AutoTokenizer.from_pretrained")


def read_texts(path: Path) -> Iterator[str]:
    """Yield the documents of a .txt, .jsonl or .jsonl.gz file."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        if ".jsonl" in path.suffixes:
            for line in file:
                yield json.loads(line)["text"]
        else:
            yield from (document for document in file.read().split("\n\n") if document.strip())


def load_probe(
    text: Path | None, tokenizer: str | None, *, num_sequences: int, max_length: int, min_length: int = 16
) -> ib.Probe:
    """A probe of real text: of `text` if given, else of the text that comes with the package.

    Raises:
        SystemExit: if the text is too short for `num_sequences`, or a file is given without a tokenizer.
    """
    loaded = None
    if tokenizer is not None:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(tokenizer)
    if text is None:
        probe = ib.Probe.builtin(loaded, num_sequences=num_sequences, max_length=max_length)
    elif loaded is None:
        raise SystemExit("--text needs --tokenizer: the built-in tokenizer knows the built-in text only")
    else:
        probe = ib.Probe.from_texts(
            read_texts(text),
            loaded,
            num_sequences=num_sequences,
            max_length=max_length,
            min_length=min_length,
            name=text.name,
        )
    if len(probe) < num_sequences:
        raise SystemExit(
            f"the text has {len(probe)} documents of at least {min_length} tokens, {num_sequences} are "
            "needed: give a longer --text or a smaller size"
        )
    return probe


def joined(text: Path | None, tokenizer: Any, num_sequences: int, length: int) -> ib.Probe:
    """Documents one behind the other, cut into whole sequences. Raises SystemExit if they are too short."""
    if text is None:
        documents = ib.Probe.builtin(tokenizer)
    elif tokenizer is None:
        raise SystemExit("--text needs --tokenizer or --model: the built-in tokenizer knows the built-in text only")
    else:
        documents = ib.Probe.from_texts(read_texts(text), tokenizer, max_length=length, name=text.name)
    tokens = documents.input_ids[documents.attention_mask.bool()]
    if len(tokens) < num_sequences * length:
        raise SystemExit(f"the text has {len(tokens)} tokens, {num_sequences} x {length} are needed: give a longer one")
    return ib.Probe.from_tokens(tokens[: num_sequences * length].view(num_sequences, length), name=documents.name)


@dataclass(frozen=True)
class ModelFolder:
    """`NAME=FOLDER` of `--model`, or `NAME=FOLDER:FILE` with the name of a .gguf file in it."""

    name: str
    folder: str
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelFolder:
        """For `type=` of an argument."""
        name, equals, where = text.partition("=")
        folder, _, file = where.partition(":")
        if not (name and equals and folder):
            raise argparse.ArgumentTypeError(f"expected NAME=FOLDER or NAME=FOLDER:FILE.gguf, got {text!r}")
        return cls(name, folder, file or None)

    def load(self) -> tuple[Any, nn.Module]:
        """Tokenizer and model, in float32 and in evaluation mode."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        where: dict[str, Any] = {} if self.file is None else {"gguf_file": self.file}
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, **where)
        return AutoTokenizer.from_pretrained(self.folder, **where), model.eval()


def untrained(model: Any, seed: int = 0) -> nn.Module:
    """A model of the same architecture as it would begin its training."""
    torch.manual_seed(seed)
    return type(model)(model.config).eval().float()


def _matrices(model: nn.Module) -> list[Tensor]:
    """Weights of two and more dimensions; tied ones once."""
    return [parameter.data for parameter in model.parameters() if parameter.ndim > 1]


@torch.no_grad()
def damage(model: nn.Module, kind: str, level: float, seed: int = 0) -> None:
    """Damage each matrix in place; a function of kind, level and seed.

    Args:
        model: to be damaged.
        kind: "noise", normal, of so many standard deviations of the matrix; "pruned", that share of the smallest
            entries set to zero; "shuffled", all its entries; of any other kind it stays as it is.
        level: see there.
        seed: of noise and shuffling.
    """
    for place, weight in enumerate(_matrices(model)):
        generator = torch.Generator().manual_seed(1000 * seed + place)
        if kind == "noise":
            weight += level * weight.std() * torch.randn(weight.shape, generator=generator)
        elif kind == "pruned":
            size = weight.abs()
            weight[size <= size.flatten().kthvalue(max(1, int(level * size.numel()))).values] = 0.0
        elif kind == "shuffled":
            weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(weight))


def versions(
    model: nn.Module, kinds: Iterable[tuple[str, float]]
) -> Iterator[tuple[str, float, Callable[[], nn.Module]]]:
    """Kind and level of each version of a model, and what makes it.

    Those that are damaged share their memory with `model`. "untrained" has its seed for a level.
    """
    whole = [weight.clone() for weight in _matrices(model)]

    def damaged_by(kind: str, level: float) -> nn.Module:
        for weight, original in zip(_matrices(model), whole, strict=True):
            weight.copy_(original)
        damage(model, kind, level)
        return model

    for kind, level in kinds:
        if kind == "untrained":
            yield kind, level, lambda level=level: untrained(model, int(level))
        else:
            yield kind, level, lambda kind=kind, level=level: damaged_by(kind, level)


def whole_sequences(text: Path, tokenizer: Any, num_sequences: int, length: int) -> ib.Probe:
    """The first documents of at least so many tokens, cut there. Raises SystemExit if there are too few."""
    probe = ib.Probe.from_texts(
        dict.fromkeys(read_texts(text)),  # none twice
        tokenizer,
        num_sequences=num_sequences,
        max_length=length,
        min_length=length,
        name=text.name,
    )
    if len(probe) < num_sequences:
        raise SystemExit(f"{text} has {len(probe)} documents of at least {length} tokens, {num_sequences} are needed")
    return probe


def views(measurement: ib.Measurement, order: str) -> dict[str, ib.PlanePoint]:
    """The points of an order by view: "mean" is the plain one, over all layers."""
    return {"mean": measurement[order]} | {view: points[order] for view, points in measurement.views.items()}


def cut_to_positions(probe: ib.Probe, num_positions: int, width: int) -> ib.Probe:
    """The first documents of `probe`, the last one shortened, so that exactly `num_positions` are valid.

    Args:
        probe: right-padded probe.
        num_positions: valid positions wanted.
        width: widest n-gram order; a sequence of n tokens has n - 2 width + 1 valid positions.
    """
    mask = probe.attention_mask.bool().clone()
    left = num_positions
    for row in range(len(probe)):
        valid = max(0, int(mask[row].sum()) - 2 * width + 1)
        if valid >= left:
            mask[row, left + 2 * width - 1 :] = False
            return ib.Probe.from_tokens(probe.input_ids[: row + 1], mask[: row + 1], name=probe.name)
        left -= valid
    raise SystemExit(f"the text has {num_positions - left} valid positions, {num_positions} are needed: give more text")


def valid_positions(mask: Tensor, width: int) -> Tensor:
    """Where the `width` tokens ending at a position and the `width` after it are all real, [N, S] bool."""
    valid = torch.zeros_like(mask)
    inside = mask.unfold(1, 2 * width, 1).all(-1)
    valid[:, width - 1 : width - 1 + inside.shape[1]] = inside
    return valid


def ngram_codes(input_ids: Tensor, valid: Tensor, order: int, side: str) -> Tensor:
    """The n-gram at each valid position as one integer: ending there ("input") or after it ("output")."""
    base = int(input_ids.max()) + 1
    assert base**order < 2**63, "n-gram codes would overflow 64 bits"
    sequence, offset = valid.nonzero(as_tuple=True)
    steps = range(1 - order, 1) if side == "input" else range(1, order + 1)
    codes = torch.zeros(len(offset), dtype=torch.long)
    for step in steps:
        codes = codes * base + input_ids[sequence, offset + step]
    return codes


class Replay(nn.Module):
    """A stand-in for a model: its layers return states made beforehand, so that only measuring takes time.

    The state at a position is a function of its token, the token before, the position and the layer. A
    batch is recognised by its token ids; its states are made when it is first seen, and kept.
    """

    def __init__(self, vocabulary: int, dim: int, num_layers: int, *, length: int = 1024, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(_Emit() for _ in range(num_layers))
        self.tokens = nn.Parameter(torch.randn(vocabulary, dim, generator=generator))
        self.positions = nn.Parameter(torch.randn(length, dim, generator=generator))
        self.mixes = nn.Parameter(torch.randn(num_layers, dim, dim, generator=generator) / dim**0.5)
        self._kept: dict[bytes, list[Tensor]] = {}

    @torch.no_grad()
    def states(self, input_ids: Tensor) -> list[Tensor]:
        """Hidden states of a batch [B, S]: one [B, S, dim] tensor a layer."""
        key = input_ids.numpy().tobytes()
        if key not in self._kept:
            here = self.tokens[input_ids]
            around = torch.roll(here, 1, dims=1) + 0.3 * self.positions[: input_ids.shape[1]]
            self._kept[key] = [here + around @ mix for mix in self.mixes]
        return self._kept[key]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Send each layer's states through the module that stands for that layer."""
        for layer, state in zip(self.layers, self.states(input_ids), strict=True):
            layer(state)
        return state


class _Emit(nn.Module):
    def forward(self, state: Tensor) -> Tensor:
        return state


# How a Meter has to be told about a Replay.
REPLAY: dict[str, Any] = {
    "layers": ["layers.*"],
    "forward": lambda model, input_ids, attention_mask: model(input_ids),
}


def record_batches(model: nn.Module, probe: ib.Probe, **meter_keywords: Any) -> list[tuple[Tensor, Tensor]]:
    """The batches that a Meter with these settings feeds the model: (input_ids, attention_mask) pairs."""
    batches: list[tuple[Tensor, Tensor]] = []
    forward = meter_keywords.pop("forward", lambda model, input_ids, mask: model(input_ids, attention_mask=mask))

    def recording(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Any:
        batches.append((input_ids.clone(), attention_mask.clone()))
        return forward(model, input_ids, attention_mask)

    ib.Meter(probe, null=False, forward=recording, **meter_keywords).measure(model)
    return batches


def describe_machine(device: str = "cpu") -> str:
    """One line about where the numbers were taken."""
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    return (
        f"{where}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, ib_callback {ib.__version__}"
    )


@dataclass
class Times:
    """Seconds of each round: on the wall clock, and of processor time over all threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, function: Callable[[], Any], device: str = "cpu", repeat: int = 1) -> Any:
        """Time a call, or the mean of several, the device's queue empty before and after; return what it returns."""
        _synchronise(device)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeat):
            result = function()
        _synchronise(device)
        self.wall.append((time.perf_counter() - wall) / repeat)
        self.cpu.append((time.process_time() - cpu) / repeat)
        return result

    def __add__(self, other: Times) -> Times:
        """Round by round."""
        return Times(
            [a + b for a, b in zip(self.wall, other.wall, strict=True)],
            [a + b for a, b in zip(self.cpu, other.cpu, strict=True)],
        )

    def __truediv__(self, other: Times) -> Times:
        """Round by round: the ratios."""
        return Times(
            [a / b for a, b in zip(self.wall, other.wall, strict=True)],
            [a / b for a, b in zip(self.cpu, other.cpu, strict=True)],
        )

    def row(self, name: str, unit: str = "") -> str:
        """One line of a table: median (least to greatest) of both clocks."""
        return f"{name:38} {spread(self.wall) + unit:>28} {spread(self.cpu) + unit:>28}"


HEADING = f"{'':38} {'wall clock':>28} {'processor time':>28}"


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def spread(values: list[float]) -> str:
    """Median, then least to greatest."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def keep_freed_memory() -> None:
    """Take all memory from the heap, and give none back, where the C library is glibc.

    To fetch fresh pages for each large tensor took up to a third of a forward's time on a virtual machine, of all
    sides alike, and varied by more than what is measured.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        trim_threshold, mmap_max = -1, -4  # malloc.h
        set_option(trim_threshold, 2**31 - 1)
        set_option(mmap_max, 0)


class Peak:
    """By how many bytes memory grew at most within a block: of the process (Linux), or what a GPU has allocated."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._cuda = device.startswith("cuda")
        self._known = Path("/proc/self/clear_refs").exists()
        self.bytes = math.nan

    def __enter__(self) -> Peak:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        elif self._known:
            ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would hide what is used again
            Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
            self._before = self._status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        elif self._known:
            self.bytes = self._status("VmHWM") - self._before

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def operators(function: Callable[[], Any], device: str) -> tuple[dict[str, float], dict[str, int]]:
    """What one call runs: milliseconds of each operator by itself (on a GPU: of each kernel), and how often it runs.

    On a GPU calls of the runtime (launches, copies, waiting) are counted as well.
    """
    on_gpu = device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        Times().add(function, device)
    spent: dict[str, float] = {}
    counted: dict[str, int] = {}
    for event in profiler.key_averages():
        if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.key] = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
        elif not event.key.startswith(("cuda", "cuLaunch")):
            continue  # an operator, whose kernels are there themselves
        counted[event.key] = counted.get(event.key, 0) + event.count
    return spent, counted


def profile_beside(name: str, function: Callable[[], Any], plain: Callable[[], Any], device: str) -> None:
    """Print what one call does that another one does not, and the Python functions in which it spends its time."""
    (base, base_counts), (whole, counts) = operators(plain, device), operators(function, device)
    rest = {key: spent - base.get(key, 0.0) for key, spent in whole.items()}
    print(f"\n{name}: {sum(whole.values()):,.1f} ms, of which a forward of the trunk has {sum(base.values()):,.1f}")
    print("milliseconds and calls more than in that")
    for key, spent in sorted(rest.items(), key=lambda item: -item[1])[:20]:
        print(f"{spent:10.2f} {counts[key] - base_counts.get(key, 0):8,d}  {key[:100]}")
    for key in sorted(counts.keys() - whole.keys()):
        print(f"{key}: {counts[key]:,} calls, {base_counts.get(key, 0):,} in a forward of the trunk")
    functions = cProfile.Profile()
    functions.runcall(Times().add, function, device)
    pstats.Stats(functions).sort_stats("tottime").print_stats(15)
