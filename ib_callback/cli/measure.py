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
    positive,
    read_files,
    write_tables,
)
from ib_callback.common.files import expanded, size_of
from ib_callback.common.optional import is_installed
from ib_callback.common.ranks import Ranks, is_launched, launched
from ib_callback.measuring.meter import Meter
from ib_callback.results.lines import is_measured
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
        description="Measure trained models and checkpoints one after another. Each result is appended to a file as "
        "soon as it is known. Checkpoints that the file already has, with the same probe and settings, are skipped, so "
        "the same command continues where it was stopped. Processes that torchrun starts share each measurement.",
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
        help="the output directory of a run, to measure every checkpoint in it; a model folder in HuggingFace's "
        "layout, with a GGUF file or with shards of torch.distributed; a .ckpt, .pt or .gguf file; or a name on the "
        "hub, OWNER/NAME or OWNER/NAME@REVISION",
    )  # fmt: skip
    parser.add_argument("-o", "--output", metavar="FILE", help="file of results, .jsonl; new results are appended")

    on = parser.add_argument_group("text to measure on")
    on.add_argument("--probe", metavar="FILE", help="probe of token ids, such as ib-callback probe build writes")
    on.add_argument(
        "--documents", metavar="FILE|c4|tulu|builtin",
        help="texts, from which each model's own tokenizer makes a probe: .jsonl, .json, .csv, .parquet (column text) "
        "or .txt (one document per line)",
    )  # fmt: skip
    on.add_argument(
        "--feature-probe", action="append", default=[], metavar="[NAME=]FILE|tulu",
        help="labels to measure information about: a probe file, or preference pairs (columns chosen, rejected); "
        "repeatable",
    )  # fmt: skip
    on.add_argument(
        "--num-sequences",
        type=positive,
        default=512,
        metavar="N",
        help="number of documents in a probe that this command makes",
    )
    on.add_argument("--max-length", type=positive, default=512, metavar="N", help="use at most N tokens of a document")
    on.add_argument("--text-column", default="text", metavar="COLUMN", help="column of the texts in --documents")
    on.add_argument(
        "--tokenizer", metavar="NAME|DIR|JSON", help="tokenizer for all models; by default each model's own"
    )

    which = parser.add_argument_group("which checkpoints")
    which.add_argument(
        "--revisions", action="append", default=[], metavar="GLOB",
        help="measure these branches and tags on the hub, by default main; repeatable",
    )  # fmt: skip
    which.add_argument(
        "--max-points",
        type=positive,
        metavar="N",
        help="measure at most N checkpoints of a model, spread logarithmically over its steps",
    )
    which.add_argument(
        "--initial", action="store_true", help="also measure the untrained model of the same configuration, as step 0"
    )
    which.add_argument(
        "--initial-seed", type=int, default=0, metavar="N", help="seed for the weights of the untrained model"
    )
    which.add_argument("--name", help="one name for all checkpoints, which makes them one training run")
    which.add_argument(
        "--family", help="family of the models, by default their architecture; existing lines keep theirs"
    )
    which.add_argument(
        "--stage",
        help="stage of their training, such as dpo; by default taken from their names; existing lines keep theirs",
    )
    which.add_argument(
        "--tokens-per-step",
        type=positive,
        metavar="N",
        help="tokens in a step, which give exact counts where names round them (tokens5B) or lack them",
    )
    which.add_argument("--shard", type=_shard, metavar="I/N", help="measure only the I-th of N shares, for a job array")

    live = parser.add_argument_group(
        "a live run",
        "A second process on another device or machine measures the checkpoints of a live run. This costs the training "
        "nothing. Only one process may write the run's trajectory: this command is refused while a callback writes it, "
        "and a callback is refused while this command writes it.",
    )
    live.add_argument(
        "--watch", metavar="RUN_DIR",
        help="measure the checkpoints of a run as they appear, and write them into its ib_trajectory.jsonl; replaces "
        "MODEL and -o",
    )  # fmt: skip
    live.add_argument(
        "--every", type=_seconds, default=60.0, metavar="SECONDS", help="time between two looks for checkpoints"
    )
    live.add_argument("--until", type=positive, metavar="STEP", help="end after the checkpoint of this step")
    live.add_argument("--idle", type=_seconds, metavar="SECONDS", help="end after this time without a new checkpoint")
    live.add_argument("--wandb-project", metavar="NAME", help="log the points to a separate W&B run, over ib/step")
    live.add_argument("--wandb-group", metavar="NAME", help="group of that run, such as the group of the live run")
    live.add_argument(
        "--wandb-shared-run", metavar="[[ENTITY/]PROJECT/]ID",
        help="log the points into the live W&B run, over ib/step; that run must have been opened with "
        'wandb.Settings(mode="shared")',
    )  # fmt: skip

    load = parser.add_argument_group("how models are loaded")
    load.add_argument("--device", default="auto", help="device for the models; auto: cuda if there is one, else cpu")
    load.add_argument(
        "--device-map", metavar="auto", help="spread a model over GPUs, memory and disk, as in transformers"
    )
    load.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16; auto: as the weights are stored")
    load.add_argument(
        "--factory", metavar="MODULE:FUNCTION", help="function that makes the model for weights of Lightning or torch"
    )
    load.add_argument("--config", metavar="DIR|NAME", help="where the config.json is, for weights without one")
    load.add_argument("--gguf", metavar="GLOB", help="which GGUF file to use, if there are several")
    load.add_argument(
        "--evict", action="store_true", help="remove each checkpoint from the cache of the hub after it was measured"
    )
    load.add_argument(
        "--allow-pickle", action="store_true", help="load torch files that can run code; only for files that you trust"
    )
    load.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with models on the hub; only for models that you trust",
    )

    _add_meter_arguments(parser.add_argument_group("how models are measured (the keywords of Meter)"))
    parser.add_argument(
        "--increments", type=_permutations, default=0, metavar="N",
        help="test with N permutations, 20 or more, whether each order adds more than chance to the order before; "
        "ib-callback context shows the result. This needs one more pass, and each permutation takes as long as the "
        "sums of one order",
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

    add("--preset", "preset", "published definition to use", metavar="paper|paper-calibrated")
    add("--order", "orders", "n-gram order to measure; repeatable", action="append", metavar="NAME")
    add("--primary", "primary", "order of the headline numbers, by default token", metavar="NAME")
    add(
        "--layer", "layers", "layers to measure: hidden_states, blocks, or a name or glob; repeatable", action="append",
        metavar="NAME",
    )  # fmt: skip
    add("--num-bins", "num_bins", "number of reference points", type=int, metavar="N")
    add(
        "--temperature",
        "temperature",
        "temperature of soft assignments",
        type=_number_or_text,
        metavar="calibrated|NUMBER",
    )
    add("--seed", "seed", "seed of reference points and nulls", type=int, metavar="N")
    add("--weighting", "weighting", "weighting of labels", metavar="empirical|uniform")
    add("--bound", "bound", "bound to which distances are measured", metavar="diagonal|ib_curve")
    add(
        "--baseline", "baseline", "how labels from far away in the document are found", type=_switch,
        metavar="circular|linear|no",
    )  # fmt: skip
    add("--draws", "draws", "number of sets of reference points to average over", type=int, metavar="N")
    add("--center", "center", "also measure states without their mean", action="store_true")
    add("--last-block", "last_block", "also measure the last block before the final norm", action="store_true")
    add("--companion", "companions", "also compute rankme or alpha_req; repeatable", action="append", metavar="NAME")
    add("--batch-size", "batch_size", "number of sequences in a forward pass", type=int, metavar="N")
    add(
        "--memory-budget", "memory_budget", "memory to use beside the model; layers are then measured in groups",
        metavar="BYTES|8GiB",
    )  # fmt: skip
    add(
        "--standard-errors", "standard_errors", "estimate standard errors, from 16 or this many groups of sequences",
        nargs="?", type=int, const=True, metavar="GROUPS",
    )  # fmt: skip
    add(
        "--loss", "loss", "measure the next-token loss; all: on every pair of tokens", type=_switch,
        metavar="yes|all|no",
    )  # fmt: skip
    add("--no-null", "null", "leave out the null, which chance alone would give", action="store_false")
    add("--no-readout", "readout", "leave out the view through the output embeddings", action="store_false")
    add("--no-prediction", "prediction", "leave out the view through the predictions", action="store_false")


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
            raise ValueError("--watch replaces MODEL and -o, got one of them as well. Leave it out")
        _check_unused(options, _NOT_WATCHING, "has no effect with --watch")
        loading.check()
        return _watch(options, loading)
    _check_unused(options, _WATCHING, "only works with --watch")
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
            tell(f"{left_out.name} is left out because it holds the same weights as {kept.revision or kept.name}")
        if options.tokens_per_step is None and any(c.rounded for c in checkpoints):
            tell("the numbers of tokens come from names, which round them; --tokens-per-step N gives exact ones")
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
        tell(f"equal weights: {left_out.name} and {kept.revision or kept.name}")
    return _end(report.failed)


def _check_files(options: argparse.Namespace) -> None:
    """Check that results can be appended to their file, and tables can be written."""
    features = [expanded(text.rpartition("=")[2]) for text in options.feature_probe]
    given = (options.probe, options.documents, options.tokenizer, options.config)
    read = [path for path in (*options.models, *features, *given) if path is not None and Path(path).exists()]
    check_place("-o", options.output, read_files(*read))
    output = Path(options.output)
    if size_of(output) and not is_measured(output):
        raise ValueError(
            f"-o {output}: expected a new file, or a file of results, got something else. Give another path"
        )
    check_outputs(options, [*read, output], pictures=[])


def _check_unused(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Check that no option was given that would have no effect."""
    if given := [name for name in names if getattr(options, name) not in (None, False, [])]:
        raise ValueError(f"--{given[0].replace('_', '-')} {why}. Leave it out")


def _watch(options: argparse.Namespace, loading: Loading) -> int:
    if is_launched():
        raise ValueError(
            "--watch: expected one process, got several from a launcher. Start the command without the launcher"
        )
    run = Path(options.watch)
    if not run.is_dir():
        raise ValueError(f"--watch: expected the directory of a run, got {run}, which is not a directory")
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
                "--wandb-shared-run does not work with --wandb-project or --wandb-group, because that run exists "
                f"already. Name its project as PROJECT/{shared}, and leave the other option out"
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
