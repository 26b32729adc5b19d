r"""What a measurement costs, beside everything that a user would compare it with: tables, a JSON file and a picture.

    pip install -c constraints.txt -e ".[hf,plot]"
    python benchmarks/cost.py --json cost.json --plot cost.png
    python benchmarks/cost.py --parts sides,options --sequences 128 --text c4.jsonl.gz \
        --model smollm2=FOLDER:FILE.gguf --only 'loss|default' --json cost.json
    python benchmarks/cost.py --parts sides --device cuda --dtype bfloat16 --model llama-1b --json gpu.json
    python benchmarks/cost.py --from cost.json --plot cost.png

Parts:

- sides: a forward of the trunk without gradients (all that a measurement needs of the model), one with logits for every
  position, an evaluation step (logits and cross-entropy, as HuggingFace's Trainer makes it), and measurements;
- options: of measurements, in the same table;
- models, bins, orders, probe: cost by size of the model (`--family`), number of bins, orders, sequences of the probe;
- ranks: processes of gloo on this machine, one model each, that share a measurement, beside one by itself; on a GPU
  all of them use the same one, where NCCL does not work, because it refuses two ranks on one device;
- theirs: the paper's authors' `LLMInferrer` on the same model and texts; needs `--text`, a tokenizer, `datasets` and
  `pip install --no-deps soft-entropy==0.1.5`, and so is left out unless it is named;
- mmlu: one measurement beside one pass of MMLU, by count of tokens; nothing is run;
- share: share of training time at the default schedule, by arithmetic from constants that are printed.

All sides take turns within a round; printed are the medians of the ratios of each round (least to greatest), of
processor time on a CPU (by default one thread) and of the wall clock on a GPU, with the other beside it. Memory is what
`Meter.preflight` says beside the forward, and by how much the process (on a GPU: the allocated memory) grew at most,
the forward included. Documents are joined and cut, so that every sequence has the full length and padding does not
flatter the ratio. Where the C library is glibc, memory that was freed stays with the process.

The JSON file is written after every round, and continued: what is complete there is kept unless its part is named in
`--parts`, and what is not goes on where it stopped. Models and sizes stand in it side by side. Take a new file for a
new version of the package.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import ib_callback as ib
from _common import (
    ModelFolder,
    add_text_arguments,
    describe_machine,
    joined,
    keep_freed_memory,
    profile_beside,
    whole_sequences,
)
from _cost import counts, tables
from _cost.models import FAMILY, RANDOM, RandomModel, load, parse_model
from _cost.ranks import Crew, Work, differences
from _cost.sides import (
    BINS,
    BOTH,
    EVALUATION,
    LOGITS,
    OPTIONS,
    ORDERS,
    SIDES,
    TRUNK,
    Side,
    forwards,
    matching,
    measurements,
    take_turns,
)

Spec = ModelFolder | RandomModel
THEIRS, OURS = "LLMInferrer, run()", "ours, the same labels"
OURS_BY_DEFAULT = "ours, by default"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.read is not None:
        results = json.loads(options.read.read_text(encoding="utf-8"))
        tables.print_parts(results["parts"], options.parts or PARTS)
        draw(results, options.plot)
        return 0
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    if options.profile:
        profile(options)
        return 0
    bench = Bench(options)
    wrong = []
    for part in options.parts or [part for part in PARTS if part != "theirs"]:
        print(f"{part} …", flush=True)
        started = time.perf_counter()
        try:
            PARTS[part](bench)
        except (Exception, SystemExit) as error:  # the other parts are not to be lost
            wrong.append(part)
            print(f"{part} failed: {error}" if isinstance(error, SystemExit) else traceback.format_exc(), flush=True)
        bench.save()
        print(f"{part}: {time.perf_counter() - started:,.1f} s", flush=True)
    tables.print_parts(bench.results["parts"], options.parts or PARTS)
    if wrong:
        print(f"\nNot complete: {', '.join(wrong)}")
    draw(bench.results, options.plot)
    return 1 if wrong else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def integers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    def parts(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(PARTS):
            raise argparse.ArgumentTypeError(f"no parts {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
        return [part for part in PARTS if part in chosen]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument("--parts", type=parts, metavar="A,B", help=f"of {', '.join(PARTS)}; default: all but theirs")
    parser.add_argument(
        "--model", type=parse_model, action="append",
        help=f"NAME=FOLDER[:FILE], or of random weights {', '.join(RANDOM)}; may be repeated; default: gpt2",
    )  # fmt: skip
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--repeat", type=int, help="calls in a timing; default: 1 on a CPU, 5 on a GPU, where one is short"
    )
    parser.add_argument("--only", default="", help="regular expression: sides whose name it is found in")
    parser.add_argument("--family", default=",".join(FAMILY), help="random models of the part models")
    parser.add_argument("--sizes", type=integers, default=[8, 16, 32, 64, 128], help="sequences, of the part probe")
    parser.add_argument("--ranks", type=integers, default=[1, 2], help="numbers of processes, of the part ranks")
    parser.add_argument("--backend", default="gloo", help="of torch.distributed, for the part ranks")
    parser.add_argument("--num-bins", type=int, default=100, help="of the part theirs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--profile", action="store_true", help="print what a measurement does beside the trunk, and stop"
    )
    parser.add_argument("--json", type=Path, help="file of results; one that exists is continued")
    parser.add_argument("--plot", type=Path, help="draw a picture into this file")
    parser.add_argument("--from", dest="read", type=Path, metavar="FILE", help="print and draw a file; nothing is run")
    options = parser.parse_args(arguments)
    options.model = options.model or [RandomModel("gpt2")]
    options.repeat = options.repeat or (5 if options.device.startswith("cuda") else 1)
    return options


class Bench:
    """What all parts share: options, results and their file, and one loaded model at a time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results: dict[str, Any] = {"parts": {}}
        if options.json is not None and options.json.exists():
            self.results = json.loads(options.json.read_text(encoding="utf-8"))
        self._loaded: tuple[Spec, Any, Any] | None = None
        self._timed: tuple[dict[str, Any], float] | None = None  # the group being run, and when its seconds were 0

    def save(self) -> None:
        """Write the file, if there is one, in one step."""
        if self._timed is not None:
            group, began = self._timed
            group["seconds"] = time.perf_counter() - began
        if self.options.json is not None:
            beside = self.options.json.with_name(self.options.json.name + ".new")
            beside.write_text(json.dumps(self.results, indent=1), encoding="utf-8")
            beside.replace(self.options.json)

    def load(self, spec: Spec) -> tuple[Any, Any]:
        """Tokenizer and model; another one is let go before."""
        if self._loaded is None or self._loaded[0] != spec:
            self._loaded = None
            options = self.options
            found = load(spec, options.tokenizer, device=options.device, dtype=options.dtype, length=options.length)
            self._loaded = spec, *found
        return self._loaded[1:]

    def probe(self, spec: Spec, sequences: int) -> ib.Probe:
        """Joined documents of so many sequences, in the model's tokens."""
        return joined(self.options.text, self.load(spec)[0], sequences, self.options.length)

    @contextmanager
    def group(
        self, part: str, spec: Spec, sequences: int, names: Sequence[str], references: Sequence[str]
    ) -> Iterator[tuple[dict[str, Any], list[str]]]:
        """The group of results of a model and a size, and which of these sides are left to do; adds the time taken.

        What is complete is dropped, and left to do again, if the part was asked for by name.
        """
        options = self.options
        key = (
            f"{spec.name}, {options.dtype}, {sequences} x {options.length}, batches of {options.batch_size}, "
            f"{options.device}, {options.threads} threads"
        )
        groups = self.results["parts"].setdefault(part, {})
        group = groups.get(key, {"sides": {}, "seconds": 0.0})
        left = [name for name in names if len(group["sides"].get(name, {"wall": ()})["wall"]) < options.rounds]
        if not left and options.parts is not None:
            left = list(names)
            group["sides"] = {name: record for name, record in group["sides"].items() if name not in left}
        if left:
            model = self.load(spec)[1]
            group |= {
                "model": spec.name, "layers": len(_blocks(model)), "dtype": options.dtype, "device": options.device,
                "parameters": sum(parameter.numel() for parameter in model.parameters()), "sequences": sequences,
                "length": options.length, "batch_size": options.batch_size, "threads": options.threads,
                "text": "the built-in text" if options.text is None else options.text.name,
                "machine": describe_machine(options.device), "references": list(references),
            }  # fmt: skip
        groups[key] = group
        self._timed = group, time.perf_counter() - group["seconds"]
        try:
            yield group, left
        finally:
            self.save()
            self._timed = None
            if not group["sides"]:  # nothing was found
                del groups[key]

    def compare(
        self, part: str, spec: Spec, sequences: int, sides: Mapping[str, Side], *,
        beside: Sequence[str] = (), references: Sequence[str] = (TRUNK,),
    ) -> None:  # fmt: skip
        """Forwards and measurements of a model on a probe of so many sequences, taking turns.

        Args:
            part: that this belongs to.
            spec: of the model.
            sequences: of the probe.
            sides: measurements.
            beside: names of forwards that are sides themselves.
            references: names of forwards that all are compared with.
        """
        options = self.options
        with self.group(part, spec, sequences, [*beside, *sides], references) as (group, left):
            if not left:
                return
            print(f"{spec.name}, {sequences} x {options.length}: {', '.join(left)}", flush=True)
            model, probe = self.load(spec)[1], self.probe(spec, sequences)
            plain = forwards(model, probe, options.batch_size, options.device)
            runs, said = measurements(
                model, probe, {name: sides[name] for name in left if name in sides}, options.batch_size
            )
            take_turns(
                group["sides"],
                {name: plain[name] for name in plain if name in references or name in left} | runs,
                references,
                rounds=options.rounds,
                device=options.device,
                repeat=options.repeat,
                save=self.save,
                said=said,
            )


def _blocks(model: Any) -> Any:
    """The model's list of blocks: the longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len)


def run_sides(bench: Bench) -> None:
    """The main table."""
    for spec in bench.options.model:
        chosen = matching(SIDES, bench.options.only)
        plain = [TRUNK, LOGITS, *([EVALUATION] if re.search(bench.options.only, EVALUATION) else [])]
        bench.compare("sides", spec, bench.options.sequences, chosen, beside=plain, references=(TRUNK, LOGITS))


def run_options(bench: Bench) -> None:
    for spec in bench.options.model:
        chosen = matching(OPTIONS, bench.options.only)
        bench.compare("options", spec, bench.options.sequences, chosen, references=(TRUNK, LOGITS))


def run_models(bench: Bench) -> None:
    for name in bench.options.family.split(","):
        sides = matching(BOTH, bench.options.only)
        bench.compare("models", parse_model(name), bench.options.sequences, sides)


def run_bins(bench: Bench) -> None:
    for spec in bench.options.model:
        bench.compare("bins", spec, bench.options.sequences, matching(BINS, bench.options.only))


def run_orders(bench: Bench) -> None:
    for spec in bench.options.model:
        bench.compare("orders", spec, bench.options.sequences, matching(ORDERS, bench.options.only))


def run_probe(bench: Bench) -> None:
    for spec in bench.options.model:
        for sequences in bench.options.sizes:
            try:
                bench.compare("probe", spec, sequences, matching(BOTH, bench.options.only))
            except SystemExit as error:
                print(f"{sequences} sequences are left out: {error}")


def run_ranks(bench: Bench) -> None:
    """Processes stay alive over all rounds, so that numbers of them can take turns; those that wait do nothing."""
    options = bench.options
    if options.backend == "nccl" and options.device.startswith("cuda"):
        raise SystemExit("NCCL refuses two ranks on one device: take --backend gloo, or cpu:gloo")
    names = {1: "1 process"} | {size: f"{size} processes" for size in sorted(options.ranks) if size > 1}
    for spec in options.model:
        with bench.group("ranks", spec, options.sequences, list(names.values()), [names[1]]) as (group, left):
            if not left:
                continue
            ids = bench.probe(spec, options.sequences).input_ids
            work = Work(spec, options.tokenizer, ids, options.batch_size, {}, options.device, options.dtype,
                        options.threads, options.backend)  # fmt: skip
            crews = {size: Crew(size, work) for size in names}
            try:
                for crew in crews.values():
                    crew.ready()
                _shared_in_turns(group["sides"], crews, names, bench)
            finally:
                for crew in crews.values():
                    crew.close()


def _shared_in_turns(
    records: dict[str, Any], crews: Mapping[int, Crew], names: Mapping[int, str], bench: Bench
) -> None:
    done = min((len(records[name]["wall"]) if name in records else 0) for name in names.values())
    for number in range(done, bench.options.rounds):
        found = {size: crew.measure() for size, crew in crews.items()}
        (alone,), numbers = found[1]
        for size, (of_ranks, own) in found.items():
            new = {"wall": [], "cpu": [], "total": [], "difference": 0.0, "against": {}}
            record = records.setdefault(names[size], new)
            beside = record["against"].setdefault(names[1], {"wall": [], "cpu": []})
            for clock in ("wall", "cpu"):
                record[clock].append(max(times[clock] for times in of_ranks))
                beside[clock].append(alone[clock])
            record["total"].append(sum(times["cpu"] for times in of_ranks))
            difference, record["numbers"] = differences(numbers, own)
            record["difference"] = max(record["difference"], difference)
        bench.save()
        print(f"  round {number + 1} of {bench.options.rounds}", flush=True)


def run_theirs(bench: Bench) -> None:
    """Theirs as in agreement_llm_inferrer.py: as published, with our reference points and temperature."""
    from agreement_llm_inferrer import ORDERS as SHARED
    from agreement_llm_inferrer import give_points, inferrer, texts_of

    options = bench.options
    if options.text is None:
        raise SystemExit("theirs needs --text")
    settings = argparse.Namespace(
        text=options.text, length=options.length, num_bins=options.num_bins, batch_size=options.batch_size, double=False
    )
    sides = {
        OURS: Side(
            {"orders": tuple(SHARED), "num_bins": options.num_bins, "null": False, "baseline": False, "loss": False,
             "readout": False, "prediction": False}
        ),
        OURS_BY_DEFAULT: Side({"num_bins": options.num_bins}),
    }  # fmt: skip
    for spec in options.model:
        names, references = [TRUNK, THEIRS, *sides], [TRUNK, OURS]
        with bench.group("theirs", spec, options.sequences, names, references) as (group, left):
            if not left:
                continue
            tokenizer, model = bench.load(spec)
            if tokenizer is None:
                raise SystemExit("theirs needs a model with a tokenizer, or --tokenizer")
            probe = whole_sequences(options.text, tokenizer, options.sequences, options.length)
            texts = texts_of(probe, tokenizer, settings)
            runs, said = measurements(model, probe, sides, options.batch_size)
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                theirs = inferrer(Path(folder), model, tokenizer, texts, settings)
                plain = forwards(model, probe, options.batch_size, options.device)
                take_turns(
                    group["sides"],
                    {
                        TRUNK: plain[TRUNK],
                        **runs,
                        THEIRS: lambda: theirs.run(n_examples=len(texts), batch_size=options.batch_size),  # noqa: B023
                    },
                    references,
                    rounds=options.rounds,
                    device=options.device,
                    repeat=1,  # theirs adds up over runs
                    save=bench.save,
                    said=said,
                    before={THEIRS: lambda: give_points(theirs, settings)},  # noqa: B023
                )


def measured(parts: Mapping[str, Any], side: str, *, on_gpu: bool = False) -> counts.Constant | None:
    """The ratio of a side to the trunk, of the largest model and probe that it was measured of."""
    found = [
        (group["parameters"], group["sequences"] * group["length"], ratio, group)
        for group in parts.get("sides", {}).values()
        if (ratio := tables.median_ratio(group, side)) is not None and (not on_gpu or tables.clock(group) == "wall")
    ]
    if not found:
        return None
    *_, ratio, group = max(found, key=lambda each: each[:2])
    size = f"{group['sequences']} x {group['length']}"
    note = f"{side}, {group['model']}, {group['dtype']}, {size}, on {group['device']}"
    return counts.Constant(ratio, "forwards of the trunk", "measured", note)


def count_mmlu(bench: Bench) -> None:
    parts = bench.results["parts"]
    ratio = measured(parts, "default") or counts.BAR
    logits = measured(parts, LOGITS) or counts.NO_HEAD
    rows = counts.mmlu_rows(ratio.value, logits.value)
    parts["mmlu"] = {"ratios": {"a measurement": vars(ratio), "a forward with logits": vars(logits)}, "rows": rows}


def count_share(bench: Bench) -> None:
    """With the goal on a GPU, and with what was measured: on a GPU if there is that, else on a CPU."""
    parts = bench.results["parts"]
    found = measured(parts, "default", on_gpu=True) or measured(parts, "default")
    ratios = [counts.GOAL, *([] if found is None else [found])]
    parts["share"] = {"tables": [{"ratio": vars(ratio), "rows": counts.share_rows(ratio.value)} for ratio in ratios]}


PARTS: dict[str, Callable[[Bench], None]] = {
    "sides": run_sides,
    "options": run_options,
    "models": run_models,
    "bins": run_bins,
    "orders": run_orders,
    "probe": run_probe,
    "ranks": run_ranks,
    "theirs": run_theirs,
    "mmlu": count_mmlu,
    "share": count_share,
}


def profile(options: argparse.Namespace) -> None:
    """What measurements without and with the loss do beside a forward of the trunk."""
    bench = Bench(options)
    for spec in options.model:
        model, probe = bench.load(spec)[1], bench.probe(spec, options.sequences)
        trunk = forwards(model, probe, options.batch_size, options.device)[TRUNK]
        runs, _ = measurements(model, probe, matching(BOTH, options.only), options.batch_size)
        for run in (trunk, *runs.values()):
            run()  # warms up
        for name, run in runs.items():
            profile_beside(f"{spec.name}, {name}", run, trunk, options.device)


def draw(results: Mapping[str, Any], file: Path | None) -> None:
    """The picture, if one is asked for."""
    if file is not None:
        from _cost.picture import draw_parts

        draw_parts(results["parts"], file)
        print(f"\n{file}")


if __name__ == "__main__":
    sys.exit(main())
