"""`ib-callback measure`: measure trained models and checkpoints into a file of results."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ib_callback.checkpoints.find import Wanted, find_checkpoints, shard_of
from ib_callback.checkpoints.load import Loading
from ib_callback.checkpoints.material import Asked, Material, material_for
from ib_callback.checkpoints.place import Checkpoint, Local
from ib_callback.checkpoints.sweep import Sweep, run_sweep
from ib_callback.checkpoints.watch import Log, shared_wandb_log, wandb_log, watch
from ib_callback.cli._command import (
    DONE,
    NOT_ALL,
    add_table_arguments,
    check_outputs,
    check_place,
    examples,
    guarded,
    is_measured,
    positive,
    read_files,
    write_tables,
)
from ib_callback.common.files import expanded, size_of
from ib_callback.common.optional import is_installed
from ib_callback.common.ranks import Ranks, is_launched, launched
from ib_callback.measuring.meter import Meter
from ib_callback.results.measurement import Measurement
from ib_callback.results.results import Results

_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(Meter).parameters.items()}
_LEAST_PERMUTATIONS = 20
# Options that do not work with --watch, and options that work only with it.
_NOT_WATCHING = ("revisions", "max_points", "initial", "name", "stage", "shard", "evict", "csv", "json")
_WATCHING = ("until", "idle", "wandb_project", "wandb_group", "wandb_shared_run")


def add_measure_command(commands: Any) -> None:
    """Add `measure` to the parser of `ib-callback`."""
    parser = commands.add_parser(
        "measure",
        usage="%(prog)s MODEL [MODEL ...] -o FILE (--documents FILE|c4|tulu|builtin | --probe FILE) [options]\n"
        "       %(prog)s --watch RUN_DIR (--documents ... | --probe FILE) [options]",
        help="measure trained models, or every checkpoint of a run, into a file of results",
        description="Measure trained models and checkpoints, one after another, and append each to a file of results "
        "as soon as it is measured. Points that the file already has, with the same probe and settings, are skipped, "
        "so the same command continues where it was stopped. Processes that torchrun starts share each measurement.",
        **examples(
            "ib-callback measure RUN_DIR -o results.jsonl --documents held_out.jsonl",
            "ib-callback plot results.jsonl --csv results.csv",
            "ib-callback measure EleutherAI/pythia-14m --revisions 'step*' --max-points 20 --initial \\",
            "    -o results.jsonl --documents c4",
            "ib-callback measure allenai/OLMo-2-0425-1B allenai/OLMo-2-0425-1B-early-training --name OLMo-2-1B \\",
            "    --revisions 'stage1-*' -o results.jsonl --documents c4 --feature-probe tulu --evict",
            "ib-callback measure lightning_logs/version_0 --factory my_module:make_model -o results.jsonl \\",
            "    --probe probe.safetensors",
            "torchrun --nproc-per-node 8 -m ib_callback measure RUN_DIR -o results.jsonl --documents c4",
            "ib-callback measure --watch RUN_DIR --probe probe.safetensors --device cuda:1 --idle 3600",
        ),
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL",
        help="a folder of HuggingFace's layout, with a GGUF file or with shards of torch.distributed; a file .ckpt, "
        ".pt or .gguf; the directory of a run, to measure every checkpoint in it; or a name on the hub, OWNER/NAME "
        "or OWNER/NAME@REVISION",
    )  # fmt: skip
    parser.add_argument("-o", "--output", metavar="FILE", help="of results, .jsonl; appended to")

    on = parser.add_argument_group("on what")
    on.add_argument("--probe", metavar="FILE", help="a probe of token ids, as ib-callback probe build makes them")
    on.add_argument(
        "--documents", metavar="FILE|c4|tulu|builtin",
        help="texts; each model's own tokenizer makes its probe of them: .jsonl, .json, .csv, .parquet (column text) "
        "or .txt (a document a line)",
    )  # fmt: skip
    on.add_argument(
        "--feature-probe", action="append", default=[], metavar="[NAME=]FILE|tulu",
        help="labels to measure information about: a probe file, or preference pairs (chosen, rejected); repeatable",
    )  # fmt: skip
    on.add_argument("--num-sequences", type=positive, default=512, metavar="N", help="documents of a probe made here")
    on.add_argument("--max-length", type=positive, default=512, metavar="N", help="most tokens of a document")
    on.add_argument("--text-column", default="text", metavar="COLUMN", help="of a file of documents")
    on.add_argument("--tokenizer", metavar="NAME|DIR|JSON", help="of all models; by default what lies with each")

    which = parser.add_argument_group("which checkpoints")
    which.add_argument(
        "--revisions", action="append", default=[], metavar="GLOB",
        help="branches and tags on the hub, by default main; repeatable",
    )  # fmt: skip
    which.add_argument("--max-points", type=positive, metavar="N", help="the most of a model, thinned logarithmically")
    which.add_argument("--initial", action="store_true", help="add the untrained model of the configuration, as step 0")
    which.add_argument("--initial-seed", type=int, default=0, metavar="N", help="of its weights")
    which.add_argument("--name", help="one name for everything given, which makes it one course of training")
    which.add_argument(
        "--family", help="of these models; by default their architecture. Lines already written keep theirs"
    )
    which.add_argument(
        "--stage", help="of their training, such as dpo; by default what names say. Lines already written keep theirs"
    )
    which.add_argument(
        "--tokens-per-step",
        type=positive,
        metavar="N",
        help="tokens = steps × N, exactly, where names round them (tokens5B) or say none",
    )
    which.add_argument("--shard", type=_shard, metavar="I/N", help="the I-th of N shares, for a job array")

    live = parser.add_argument_group(
        "of a live run",
        "A second process on another device or machine, which costs the training nothing. Only one may write the "
        "run's trajectory: this command is refused while a callback writes it, and a callback is refused while this "
        "command does.",
    )
    live.add_argument(
        "--watch", metavar="RUN_DIR",
        help="measure the checkpoints of a run as they appear, instead of MODEL and -o, into its ib_trajectory.jsonl",
    )  # fmt: skip
    live.add_argument("--every", type=_seconds, default=60.0, metavar="SECONDS", help="between two looks")
    live.add_argument("--until", type=positive, metavar="STEP", help="end with the checkpoint of this step")
    live.add_argument("--idle", type=_seconds, metavar="SECONDS", help="end after so long without a new checkpoint")

    live.add_argument("--wandb-project", metavar="NAME", help="log the points to a W&B run of its own, over ib/step")
    live.add_argument("--wandb-group", metavar="NAME", help="of that run, such as the live run's")
    live.add_argument(
        "--wandb-shared-run", metavar="[[ENTITY/]PROJECT/]ID",
        help="log the points into the live run itself, over ib/step; it must have been opened with "
        'wandb.Settings(mode="shared")',
    )  # fmt: skip

    load = parser.add_argument_group("how they are loaded")
    load.add_argument("--device", default="auto", help="cuda where there is one, else cpu; or a name of torch's")
    load.add_argument("--device-map", metavar="auto", help="spread a model over GPUs, memory and disk, as transformers")
    load.add_argument("--dtype", default="auto", help="that of the weights, or float32, bfloat16, float16")
    load.add_argument("--factory", metavar="MODULE:FUNCTION", help="makes the model for weights of Lightning or torch")
    load.add_argument("--config", metavar="DIR|NAME", help="has the config.json of weights without one")
    load.add_argument("--gguf", metavar="GLOB", help="which of several GGUF files")
    load.add_argument("--evict", action="store_true", help="remove each from the cache of the hub when it is measured")
    load.add_argument("--allow-pickle", action="store_true", help="load files of torch that can run code: trust them")
    load.add_argument("--trust-remote-code", action="store_true", help="run code that comes with models of the hub")

    _add_meter_arguments(parser.add_argument_group("how they are measured, as the keywords of Meter"))
    parser.add_argument(
        "--increments", type=_permutations, default=0, metavar="N",
        help="test by N permutations, 20 or more, whether each order adds more than chance to the one before, which "
        "context shows; a further pass, and each permutation takes as long as the sums of one order",
    )  # fmt: skip
    add_table_arguments(parser)
    parser.set_defaults(run=guarded(_measure))


def _add_meter_arguments(group: Any) -> None:
    """Add the options of `Meter`; options that are not given keep its defaults."""

    def add(flag: str, keyword: str, text: str, **more: Any) -> None:
        default = _DEFAULTS[keyword]
        shown = " ".join(default) if isinstance(default, tuple) else default
        known = "" if default is None or isinstance(default, bool) or default == () else f" (default: {shown})"
        group.add_argument(flag, dest=f"meter_{keyword}", default=argparse.SUPPRESS, help=text + known, **more)

    add("--preset", "preset", "a published definition", metavar="paper|paper-calibrated")
    add("--order", "orders", "an n-gram order; repeatable", action="append", metavar="NAME")
    add("--primary", "primary", "the order of the headline numbers, by default token", metavar="NAME")
    add("--layer", "layers", "hidden_states, blocks, or a name or glob; repeatable", action="append", metavar="NAME")
    add("--num-bins", "num_bins", "reference points", type=int, metavar="N")
    add("--temperature", "temperature", "of soft assignments", type=_number_or_text, metavar="calibrated|NUMBER")
    add("--seed", "seed", "of reference points and nulls", type=int, metavar="N")
    add("--weighting", "weighting", "of labels", metavar="empirical|uniform")
    add("--bound", "bound", "that distances are taken to", metavar="diagonal|ib_curve")
    add("--baseline", "baseline", "how labels from far away are found", type=_switch, metavar="circular|linear|no")
    add("--draws", "draws", "sets of reference points", type=int, metavar="N")
    add("--center", "center", "measure states without their mean, too", action="store_true")
    add("--last-block", "last_block", "measure the last block before the final norm, too", action="store_true")
    add("--companion", "companions", "rankme or alpha_req; repeatable", action="append", metavar="NAME")
    add("--batch-size", "batch_size", "sequences in a forward pass", type=int, metavar="N")
    add("--memory-budget", "memory_budget", "beside the model; layers are measured in groups", metavar="BYTES|8GiB")
    add(
        "--standard-errors", "standard_errors", "estimate them, from 16 groups of sequences or so many", nargs="?",
        type=int, const=True, metavar="GROUPS",
    )  # fmt: skip
    add("--loss", "loss", "of the next token; all: on every pair of tokens", type=_switch, metavar="yes|all|no")
    add("--no-null", "null", "leave out what finite sampling alone yields", action="store_false")
    add("--no-readout", "readout", "leave out the view by output embeddings", action="store_false")
    add("--no-prediction", "prediction", "leave out the view by predictions", action="store_false")


def _measure(options: argparse.Namespace) -> int:
    if is_installed("transformers"):
        import transformers

        # Otherwise transformers shows a bar for each model, for work that takes no time, between the lines of output.
        transformers.utils.logging.disable_progress_bar()
    device = _device(options.device)
    loading = Loading(
        factory=options.factory, config=options.config, dtype=options.dtype, device=device,
        device_map=options.device_map, gguf=options.gguf, allow_pickle=options.allow_pickle,
        trust_remote_code=options.trust_remote_code, seed=options.initial_seed,
    )  # fmt: skip
    if options.watch is not None:
        if options.models or options.output:
            raise ValueError("--watch: expected to be given alone, got MODEL or -o as well. Leave them out")
        _check_unused(options, _NOT_WATCHING, "is of no use with --watch")
        loading.check()
        return _watch(options, loading)
    _check_unused(options, _WATCHING, "is of use with --watch alone")
    if not options.models or options.output is None:
        raise ValueError("expected at least one MODEL and -o FILE, or --watch RUN_DIR; see ib-callback measure --help")
    with launched("cuda" if device.startswith("cuda") else "cpu") as ranks:
        return _measure_all(options, loading, ranks)


def _measure_all(options: argparse.Namespace, loading: Loading, ranks: Ranks) -> int:
    """Run on every rank; the first one reads, writes and prints for all."""
    tell = _tell if ranks.is_first else _say_nothing
    wanted = Wanted(
        models=options.models, revisions=options.revisions, name=options.name, stage=options.stage,
        max_points=options.max_points, untrained=options.initial, seed=options.initial_seed, gguf=options.gguf,
    )  # fmt: skip

    def found() -> tuple[list[Checkpoint], list[tuple[Checkpoint, Checkpoint]], dict[str, Material]]:
        _check_files(options)
        loading.check()
        checkpoints, equal = find_checkpoints(wanted, tell)
        for left_out, kept in equal:
            tell(f"{left_out.name} holds the same weights as {kept.revision or kept.name}, and is left out")
        if options.tokens_per_step is None and any(c.rounded for c in checkpoints):
            tell("tokens are as names say them, which are rounded; --tokens-per-step N gives exact ones")
        return checkpoints, equal, material_for(checkpoints, _asked(options), loading, tell)

    checkpoints, equal, material = ranks.by_first(found)
    output = Path(options.output)
    sweep = replace(_sweep(options, material, loading), ranks=ranks, tell=tell)
    report = run_sweep(shard_of(checkpoints, options.shard), output, sweep)
    if not ranks.is_first:
        return NOT_ALL if report.failed else DONE
    results = Results.load(output) if output.exists() else Results()
    if "-" not in (options.csv, options.json):
        print(results.table())
    for path in [*([output] if output.exists() else []), *write_tables(options, results.rows())]:
        tell(f"written: {path}")
    for left_out, kept in equal:
        tell(f"equal weights: {left_out.name} is {kept.revision or kept.name}")
    return _end(report.failed)


def _check_files(options: argparse.Namespace) -> None:
    """Check that results can be appended to their file, and tables can be written."""
    features = [expanded(text.rpartition("=")[2]) for text in options.feature_probe]
    given = (options.probe, options.documents, options.tokenizer, options.config)
    read = [path for path in (*options.models, *features, *given) if path is not None and Path(path).exists()]
    check_place("-o", options.output, read_files(*read))
    output = Path(options.output)
    if size_of(output) and not is_measured(output):
        raise ValueError(f"-o {output}: expected no file, or one of results, got something else. Give another path")
    check_outputs(options, [*read, output], pictures=[])


def _check_unused(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Check that no option was given that would have no effect."""
    if given := [name for name in names if getattr(options, name) not in (None, False, [])]:
        raise ValueError(f"--{given[0].replace('_', '-')}: {why}. Leave it out")


def _watch(options: argparse.Namespace, loading: Loading) -> int:
    if is_launched():
        raise ValueError("--watch: expected one process, got several of a launcher. Start it without one")
    run = Path(options.watch)
    if not run.is_dir():
        raise ValueError(f"--watch: expected the directory of a run, got {run}, which is not one")
    # The first checkpoint may not exist yet; only the tokenizer is needed here.
    name = run.resolve().name
    stand_in = Checkpoint(model=name, revision=None, step=None, tokens=None, stage=None, place=Local(run, run))
    material = material_for([stand_in], _asked(options), loading, _tell)
    with _log(options, f"{name} ib") as log:
        sweep = _sweep(options, material, loading)
        failed = watch(run, sweep, every=options.every, until=options.until, idle=options.idle, log=log)
    return _end(failed)


def _log(options: argparse.Namespace, name: str) -> AbstractContextManager[Log]:
    project, group, shared = options.wandb_project, options.wandb_group, options.wandb_shared_run
    if shared is not None:
        if project is not None or group is not None:
            raise ValueError(
                "--wandb-shared-run: expected to be given without --wandb-project and --wandb-group, because that run "
                f"exists already, got one of them as well. Name its project as PROJECT/{shared}, or leave it out"
            )
        *where, run_id = shared.split("/")
        if len(where) > 2 or not all((*where, run_id)):
            raise ValueError(f"--wandb-shared-run: expected ID, PROJECT/ID or ENTITY/PROJECT/ID, got {shared!r}")
        entity, project = [None, None, *where][-2:]
        return shared_wandb_log(run_id, project, entity)
    return nullcontext(_no_log) if project is None else wandb_log(project, group, name)


def _asked(options: argparse.Namespace) -> Asked:
    return Asked(
        probe=options.probe, documents=options.documents, features=tuple(options.feature_probe),
        num_sequences=options.num_sequences, max_length=options.max_length, text_column=options.text_column,
        tokenizer=options.tokenizer,
    )  # fmt: skip


def _sweep(options: argparse.Namespace, material: dict[str, Material], loading: Loading) -> Sweep:
    meter = {name.removeprefix("meter_"): value for name, value in vars(options).items() if name.startswith("meter_")}
    if meter.get("layers") in (["hidden_states"], ["blocks"]):
        meter["layers"] = meter["layers"][0]
    return Sweep(
        material=material, meter={"progress": sys.stderr.isatty(), **meter}, loading=loading, family=options.family,
        tokens_per_step=options.tokens_per_step, evict=options.evict, increments=options.increments, tell=_tell,
    )  # fmt: skip


def _end(failed: Sequence[tuple[str, str]]) -> int:
    for name, reason in failed:
        _tell(f"not measured: {name}: {reason}")
    return NOT_ALL if failed else DONE


def _no_log(_: Measurement) -> None:
    pass


def _say_nothing(_: str) -> None:
    pass


def _tell(text: str) -> None:
    print(f"ib-callback: {text}", file=sys.stderr, flush=True)


def _device(name: str) -> str:
    import torch

    if name != "auto":
        return name
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if is_launched() else "cuda"


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected more than 0, got {text}")
    return value


def _permutations(text: str) -> int:
    if not text.isdigit() or 0 < int(text) < _LEAST_PERMUTATIONS:
        least = f"{_LEAST_PERMUTATIONS} permutations or more, because fewer give no p below .05, or 0 for no test"
        raise argparse.ArgumentTypeError(f"expected {least}; got {text}")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    first, _, last = text.partition("/")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"expected I/N with 1 ≤ I ≤ N, got {text!r}")
    return int(first), int(last)


def _switch(text: str) -> bool | str:
    return {"yes": True, "no": False}.get(text, text)


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
