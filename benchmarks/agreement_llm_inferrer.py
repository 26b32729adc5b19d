"""Agreement with the paper's authors' `LLMInferrer` (soft-entropy 0.1.5) on a real model and real text, layer by layer.

    pip install -c constraints.txt -e ".[hf]" datasets gguf && pip install --no-deps soft-entropy==0.1.5
    python benchmarks/agreement_llm_inferrer.py --text c4.jsonl.gz --model smollm2=FOLDER[:FILE.gguf]

Theirs runs as it is published, from the loading of the model to the table of results: its own tokenizing, batching,
choice of positions, labels and sums. Ours is one `Meter.measure`. Both get the same texts, float32 weights and batch
size. Each draws its own reference points and solves the temperature in its own way (soft-entropy bounds the
divergence, this package computes it exactly), so theirs are set to ours. Compared are the entropy and, for token,
bigram and trigram, the information about what is before and about what follows, of every layer, of the input
embeddings (their row 0, which we measure when named) and in the mean. The exit status is 1 on disagreement.

Read closely, the two agree in convention:

- positions: i of 0 … L-1 with n - 1 tokens before it and n after it, n the widest order; ours are the same;
- labels: the n-gram that ends at i, itself included, and the n-gram that begins at i + 1; theirs are integers to the
  base of `tokenizer.vocab_size`, so that special tokens above it could be taken for others: none is in these texts;
- layers: `output_hidden_states`, so that the last one is after the final norm; the mean leaves out the embeddings;
- weights of labels: by frequency; entropies as fractions of log(num_bins).

and differ in this, none of which matters here:

- theirs takes texts of any length and pads them, where we take those of at least `--length` tokens and hand them over;
- special tokens: both take what the tokenizer adds by default (SmolLM2's adds none); the ids are compared first;
- a probability under 1e-9 has the logarithm of 1e-9 in theirs;
- theirs keeps sums in the dtype of the weights and reads them in float32; ours are float64. `--double` gives theirs
  float64 sums, which leaves float32 in the reading alone.

Times are of processor and wall clock, the sides taking turns: `run()` of theirs against `measure()` of ours, a forward
pass included in both, and a bare forward pass beside them.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import ib_callback as ib
from _common import HEADING, ModelFolder, Times, describe_machine, read_texts, whole_sequences

ORDERS = {"token": "unigram", "bigram": "bigram", "trigram": "trigram"}
SIDES = {"complexity": "input", "expressivity": "output"}
TOLERANCE = 2e-6


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help='.txt, .jsonl or .jsonl.gz with a "text" field')
    parser.add_argument("--model", type=ModelFolder.parse, required=True, metavar="NAME=FOLDER[:FILE]")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=64, help="tokens of each")
    parser.add_argument("--num-bins", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--double", action="store_true", help="sums of theirs in float64")
    options = parser.parse_args(arguments)

    tokenizer, model = options.model.load()
    probe = whole_sequences(options.text, tokenizer, options.sequences, options.length)
    texts = texts_of(probe, tokenizer, options)
    keywords: dict[str, Any] = {
        "orders": tuple(ORDERS), "num_bins": options.num_bins, "batch_size": options.batch_size,
        "null": False, "baseline": False, "loss": False, "readout": False, "prediction": False,
    }  # fmt: skip
    meter = ib.Meter(probe, **keywords)
    embeddings = ib.Meter(probe, layers=[embedding_name(model)], forward=embed, **keywords)
    meter.plan()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        theirs = inferrer(Path(folder), model, tokenizer, texts, options)
        ours_time, theirs_time, forward = Times(), Times(), Times()
        for _ in range(options.rounds):
            give_points(theirs, options)
            measured = ours_time.add(lambda: meter.measure(model))
            results = theirs_time.add(lambda: theirs.run(n_examples=len(texts), batch_size=options.batch_size))
            forward.add(lambda: [model.model(ids) for ids in probe.input_ids.split(options.batch_size)])
        embedded = embeddings.measure(model)

    print(describe_machine())
    print(
        f"{options.model.name}: {len(probe)} x {options.length} tokens of {options.text.name}, "
        f"{measured.num_positions} positions, {len(measured.layers)} layers and the embeddings, {options.num_bins} bins"
    )
    worst, number = differences(results, measured, embedded)
    agree = number > 0
    for name, difference in worst.items():
        agree &= difference <= TOLERANCE
        verdict = "agrees" if difference <= TOLERANCE else "DISAGREES"
        print(f"{name:24} {verdict}: greatest |difference| {difference:.2e}, allowed {TOLERANCE:.0e}")
    print(f"{number} numbers compared")
    print("\ninformation by layer, from the embeddings on, as theirs has it, and the ratio of both sides")
    for order, label in ORDERS.items():
        for side in SIDES.values():
            ratios = [row[f"I(X;Z)/{side}_{label}"] for row in results["per_layer"]]
            print(f"{order:8} {side:7}" + " ".join(f"{value:.3f}" for value in ratios))
        ratios = [row[f"I(X;Z)/output_{label}"] / row[f"I(X;Z)/input_{label}"] for row in results["per_layer"]]
        print(f"{order:8} ratio  " + " ".join(f"{value:.3f}" for value in ratios))
    print(f"\n{options.rounds} rounds, taking turns: median (least to greatest)")
    print(HEADING)
    print(ours_time.row("ours, measure()", " s"))
    print(theirs_time.row("LLMInferrer, run()", " s"))
    print(forward.row("a forward pass of the trunk", " s"))
    print((theirs_time / ours_time).row("ratio, LLMInferrer / ours"))
    print((ours_time / forward).row("ratio, ours / forward"))
    return 0 if agree else 1


def texts_of(probe: ib.Probe, tokenizer: Any, options: argparse.Namespace) -> list[str]:
    """The documents of the probe, as text; checked to be the same tokens as LLMInferrer makes of them."""
    texts = []
    for text in dict.fromkeys(read_texts(options.text)):
        ids = tokenizer([text], truncation=True, max_length=options.length)["input_ids"][0]
        if len(ids) == options.length:
            if ids != probe.input_ids[len(texts)].tolist():
                raise SystemExit(f"document {len(texts)} has other tokens in the two")
            texts.append(text)
            if len(texts) == len(probe):
                return texts
    raise SystemExit("the probe has documents that LLMInferrer would not have")


def inferrer(folder: Path, model: Any, tokenizer: Any, texts: list[str], options: argparse.Namespace) -> Any:
    """Theirs, made as published from a folder with these weights and one with these texts."""
    from soft_entropy.llm import LLMInferrer

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):  # of a GGUF file, with which a model is not saved
        del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    lines = (json.dumps({"text": text}) for text in texts)
    (folder / "texts" / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    theirs = LLMInferrer(
        str(folder / "model"),
        str(folder / "texts"),
        label_types=list(ORDERS.values()),
        n_bins=options.num_bins,
        max_length=options.length,
    )
    for (name, a), (_, b) in zip(model.state_dict().items(), theirs.model.state_dict().items(), strict=True):
        if not torch.equal(a, b.to(a)):
            raise SystemExit(f"{name} has other values in the model that LLMInferrer has loaded")
    return theirs


def give_points(theirs: Any, options: argparse.Namespace) -> None:
    """Our reference points and temperature for theirs, and no sums of an earlier round."""
    from soft_entropy import SoftEntropyAccumulator

    dim = theirs.model.config.hidden_size
    points = ib.reference_points(dim, options.num_bins)
    kind = torch.float64 if options.double else next(theirs.model.parameters()).dtype
    for layer in range(len(theirs.accs)):
        theirs.accs[layer] = SoftEntropyAccumulator(d=dim, n_bins=options.num_bins, backend="torch", dtype=kind)
        theirs.accs[layer].w = points.to(theirs.accs[layer].w)
        theirs.accs[layer].temp = ib.calibrated_temperature(dim, options.num_bins)


def embedding_name(model: Any) -> str:
    """Of the module that embeds token ids."""
    table = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is table)


def embed(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
    return model.get_input_embeddings()(input_ids)


def differences(
    results: dict[str, Any], measured: ib.Measurement, embedded: ib.Measurement
) -> tuple[dict[str, float], int]:
    """The greatest difference by kind of number, and how many numbers there were."""
    worst: dict[str, float] = {}
    number = 0

    def compare(name: str, ours: float, theirs: float) -> None:
        nonlocal number
        number += 1
        difference = abs(ours - theirs)
        worst[name] = max(worst.get(name, 0.0), difference if difference == difference else float("inf"))

    rows = [(embedded, 0), *((measured, layer) for layer in range(len(measured.layers)))]
    for row, (own, layer) in zip(results["per_layer"], rows, strict=True):
        compare("entropy", own.entropy_by_layer[layer], row["H(Z)"])
        for (order, label), (name, side) in ((a, b) for a in ORDERS.items() for b in SIDES.items()):
            ours = getattr(own[order], f"{name}_by_layer")[layer]
            compare(f"{order}, {side}", ours, row[f"I(X;Z)/{side}_{label}"])
    compare("means over layers", measured.entropy, results["mean"]["H(Z)"])
    for (order, label), (name, side) in ((a, b) for a in ORDERS.items() for b in SIDES.items()):
        compare("means over layers", getattr(measured[order], name), results["mean"][f"I(X;Z)/{side}_{label}"])
    return worst, number


if __name__ == "__main__":
    sys.exit(main())
