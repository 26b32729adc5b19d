"""`ib-callback probe`: build a probe and save it to a file, show the content of a probe, convert it."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ib_callback.checkpoints.tokenizers import load_tokenizer
from ib_callback.cli._command import check_place, examples, guarded, positive, read_files
from ib_callback.cli._probe_lines import read_lines, write_lines
from ib_callback.measuring.statistics import DIM, ProbeStatistics, probe_statistics
from ib_callback.probe.probe import Probe
from ib_callback.results.lines import is_measured

_MUCH_SOURCE = ("tokenizer_sha256", "chat_template", "corpus_fingerprint")
# Keywords of the constructors: {name: (flag, arguments of add_argument)}. Options not given keep the default.
_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "config": ("--config", {"help": "configuration of the dataset"}),
    "split": (
        "--split",
        {"help": "a split that is not trained on. Default for c4: validation, for tulu: train"},
    ),
    "revision": ("--revision", {"help": "commit, branch or tag of a dataset on the hub"}),
    "skip": ("--skip", {"type": int, "metavar": "N", "help": "number of rows to skip at the start, by default 0"}),
    "cache": (
        "--no-cache",
        {"action": "store_const", "const": False, "help": "do not use the cache"},
    ),
    "min_length": (
        "--min-length",
        {"type": int, "metavar": "N", "help": "skip texts with fewer tokens, by default 16"},
    ),
    "text_column": (
        "--text-column",
        {"metavar": "COLUMN", "help": "column of strings or lists of words, by default text"},
    ),
    "label_columns": (
        "--label-column",
        {"action": "append", "metavar": "COLUMN", "help": "column of labels for rows, words or spans; repeatable"},
    ),
    "group_column": (
        "--group-column",
        {"metavar": "COLUMN", "help": "column of the source of each row, such as its author"},
    ),
    "name": ("--name", {"help": "name of the probe, for messages"}),
}
_KEYWORDS = ("num_sequences", "max_length", *_OPTIONS)
_NOTHING = ("", "{}", "None")


def add_probe_command(commands: Any) -> None:
    """Add `probe` and its sub-commands to the parser of `ib-callback`."""
    command = commands.add_parser(
        "probe",
        help="build, show and convert probe files",
        description="A probe is the fixed held-out text on which a run is measured. Build it on a machine with a "
        "network, and load it anywhere with Probe.load.",
        **examples(
            "ib-callback probe build --dataset c4 --tokenizer EleutherAI/pythia-14m -o probe.safetensors",
            "ib-callback probe show probe.safetensors",
        ),
    )
    # Another spelling, for users who look for an option.
    command.add_argument("--show", dest="file", metavar="FILE", help="same as show FILE")
    _add_show_arguments(command)
    command.set_defaults(run=guarded(_show_or_help), help_of=command)
    actions = command.add_subparsers(metavar="build|show|convert")
    build = actions.add_parser(
        "build",
        help="make a probe from a dataset",
        description="Make a probe from a dataset on the HuggingFace hub or from local files.",
        **examples(
            "ib-callback probe build --dataset c4 --tokenizer EleutherAI/pythia-14m -o probe.safetensors",
            "ib-callback probe build --dataset held_out.jsonl --tokenizer RUN_DIR -o probe.safetensors",
            "ib-callback probe build --dataset tulu --tokenizer RUN_DIR -o pairs.safetensors",
        ),
    )
    build.add_argument(
        "--dataset",
        required=True,
        metavar="c4|tulu|builtin|NAME|PATH",
        help="dataset: a known one, a name on the hub, a file or a folder",
    )
    build.add_argument(
        "--tokenizer", required=True, metavar="NAME|DIR|JSON", help="the model's tokenizer; -: the one of builtin"
    )
    build.add_argument("-o", "--output", required=True, metavar="FILE", help=".safetensors file to write")
    build.add_argument(
        "--preferences",
        action="store_true",
        help="rows are preference pairs, with columns chosen, rejected and perhaps prompt",
    )
    build.add_argument(
        "--num-sequences",
        type=int,
        default=512,
        metavar="N",
        help="number of sequences; a preference pair makes two",
    )
    build.add_argument("--max-length", type=int, default=512, metavar="N", help="use at most N tokens of a text")
    for name, (flag, keywords) in _OPTIONS.items():
        build.add_argument(flag, dest=name, **keywords)
    build.set_defaults(run=guarded(_build))
    show = actions.add_parser(
        "show",
        help="show what a probe contains, and what to expect of measuring on it",
        **examples("ib-callback probe show probe.safetensors --layers 16"),
    )
    show.add_argument("file", metavar="FILE", help="probe file")
    _add_show_arguments(show)
    show.set_defaults(run=guarded(_show))
    convert = actions.add_parser(
        "convert",
        help="convert a probe between .safetensors and .jsonl",
        description="Convert a probe from .safetensors to .jsonl or back. The .jsonl file has a header and then one "
        "object per sequence, with input_ids and labels of its real tokens. On the way back the header may be missing.",
        **examples("ib-callback probe convert probe.safetensors probe.jsonl"),
    )
    convert.add_argument("input", metavar="IN", help="probe file to read")
    convert.add_argument("output", metavar="OUT", help="probe file to write")
    convert.set_defaults(run=guarded(_convert))


def describe_probe(probe: Probe, statistics: ProbeStatistics, options: argparse.Namespace) -> str:
    """Everything that `show` prints."""
    lengths = probe.attention_mask.sum(1)
    described = {key: value for key, value in probe.source.items() if key not in _MUCH_SOURCE}
    described["tokenizer"] = probe.tokenizer or "not known"
    lines = [
        f"probe {probe.name!r}: {len(probe):,} sequences, {probe.num_tokens:,} tokens, {int(lengths.min())} to "
        f"{int(lengths.max())} per sequence (median {int(lengths.median())})",
        f"fingerprint {probe.fingerprint}",
        "",
        *(f"{key:<20} {value}" for key, value in sorted(described.items()) if value not in _NOTHING),
        "",
        f"{statistics.num_positions:,} valid positions, with 4 tokens on either side:",
        "",
        _row("order", "side", "labels", "once", "positions", "null"),
    ]
    for order, sides in statistics.orders.items():
        for name, side in zip(("before", "after"), sides, strict=True):
            share, null = f"{side.singleton_share:.1%}", f"{side.expected_null:.3f}"
            lines.append(_row(order, name, f"{side.labels:,}", f"{side.singletons:,}", share, null))
    lines += [
        "",
        "once: number of labels that occur only once; positions: share of the positions that have such a label.",
        "null: complexity (before) and expressivity (after) that states in random directions would have, although they",
        f"know nothing about the labels, with {options.dim} dimensions and {options.bins} bins. A run measures the "
        "null of its model, which is usually lower.",
    ]
    for name, feature in statistics.features.items():
        lines += ["", f"feature {name}, {feature.null}:"]
        for label, (sequences, positions) in feature.counts.items():
            lines.append(f"  {label:<20} {sequences:>9,} sequences {positions:>12,} valid positions")
    memory = (
        f"{statistics.memory / 2**20:,.0f} MiB" if statistics.memory < 2**32 else f"{statistics.memory / 2**30:.1f} GiB"
    )
    lines += [
        "",
        f"memory beside the forward pass: {memory} for {options.layers} layers, {options.bins} bins and batches of "
        f"{options.batch_size}",
        "(less with memory_budget=, which measures the layers in groups)",
    ]
    return "\n".join(lines)


def _add_show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layers", type=positive, default=32, metavar="N", help="number of layers that are measured together"
    )
    parser.add_argument("--bins", type=positive, default=100, metavar="N", help="number of reference points")
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="number of sequences in a forward pass"
    )
    parser.add_argument(
        "--dim", type=positive, default=DIM, metavar="N", help="dimensions of the states, for the expected null"
    )


def _build(options: argparse.Namespace) -> int:
    if Path(options.output).suffix == ".jsonl" or Path(options.output).is_dir():
        raise ValueError(
            f"-o: expected a .safetensors file, got {options.output}. To get .jsonl, use probe convert afterwards"
        )
    _check_file("-o", options.output, options.dataset, options.tokenizer)
    if options.preferences and options.dataset in ("c4", "builtin"):
        raise ValueError(
            f"--preferences does not work with --dataset {options.dataset}, which has no pairs. Leave it out"
        )
    known: dict[str, Callable[..., Probe]] = {"builtin": Probe.builtin, "c4": Probe.from_c4, "tulu": Probe.from_tulu}
    by_name = partial(Probe.from_preferences if options.preferences else Probe.from_dataset, options.dataset)
    make = known.get(options.dataset, by_name)
    keywords = {name: getattr(options, name) for name in _KEYWORDS if getattr(options, name) is not None}
    own = options.dataset == "builtin" and options.tokenizer == "-"
    # An option that this kind of probe cannot use raises a TypeError, so it is not silently ignored.
    probe = make(None if own else load_tokenizer(options.tokenizer), **keywords)
    if Path(options.tokenizer).is_file():
        warnings.warn(
            "the probe has the ids of a bare tokenizer.json; if the tokenizer is loaded by name or from a folder, it "
            "may add other special tokens",
            stacklevel=1,
        )
    probe.save(options.output)
    print(f"{options.output}: {probe}")
    return 0


def _show_or_help(options: argparse.Namespace) -> int:
    if options.file is None:
        options.help_of.print_help()
        return 2
    return _show(options)


def _show(options: argparse.Namespace) -> int:
    probe = Probe.load(options.file)
    statistics = probe_statistics(
        probe, num_layers=options.layers, num_bins=options.bins, batch_size=options.batch_size, dim=options.dim
    )
    print(describe_probe(probe, statistics, options))
    return 0


def _convert(options: argparse.Namespace) -> int:
    _check_file("OUT", options.output, options.input)
    kinds = [Path(name).suffix for name in (options.input, options.output)]
    if kinds == [".safetensors", ".jsonl"]:
        write_lines(options.output, Probe.load(options.input))
    elif kinds == [".jsonl", ".safetensors"]:
        read_lines(options.input).save(options.output)
    else:
        raise ValueError(
            f"expected IN and OUT to be a .safetensors and a .jsonl file, in either order, got {options.input} and "
            f"{options.output}"
        )
    print(options.output)
    return 0


def _check_file(option: str, text: str, *read: str) -> None:
    """Check that a probe can be written, and replaces neither measurements nor a file that is read."""
    check_place(option, text, read_files(*(path for path in read if Path(path).exists())), makes_folders=True)
    if is_measured(Path(text)):
        raise ValueError(f"{option} {text}: expected a new file, or a probe, got measurements. Give another path")


def _row(*cells: str) -> str:
    order, side, *numbers = cells
    return f"{order:<9} {side:<6}" + "".join(f"{number:>12}" for number in numbers)
