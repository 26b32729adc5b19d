"""What is not run: a multiple-choice benchmark by its tokens, and the share of training time by arithmetic.

Every constant is a row with its value, unit and origin. "assumed" is everything that no run of cost.py has found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Constant:
    """A number, and where it is from: "measured" by a run, "known" by definition or a default here, else "assumed"."""

    value: float
    unit: str
    origin: str
    note: str


# One measurement, by the package's defaults.
PROBE = {
    "sequences of the probe": Constant(512, "", "known", "default of Probe.from_c4 and from_dataset"),
    "tokens of each": Constant(512, "", "known", "the same; shorter documents make less"),
    "sequences of a batch": Constant(8, "", "known", "default of Meter"),
}
MMLU = {
    "test questions": Constant(
        14_042, "", "known", "Hendrycks et al. 2021; and lm-evaluation-harness' log has 4 x 14,042"
    ),
    "answers of each": Constant(4, "", "known", "the same"),
    "characters of a 5-shot prompt": Constant(
        3212.2, "", "assumed", "mean that evalscope's page on MMLU states; not counted"
    ),
    "characters of a 0-shot prompt": Constant(
        500, "", "assumed", "a published file of all of them has 624 bytes each, with names of fields and answers"
    ),
    "characters a token": Constant(4.0, "", "assumed", "of English with vocabularies of 50,000 to 130,000"),
}
# How often the context runs. The answers " A" to " D" are four requests of one token each.
PASSES = {
    "one forward a question": (1, "lm-evaluation-harness 0.4.13 with transformers: logits_cache=True shares a context"),
    "one forward an answer": (4, "backends without that"),
}

TRAINING = {
    "steps between measurements": Constant(
        500, "", "known", "every_n_steps of RunConfig; no overhead_budget by default"
    ),
    "tokens of a step": Constant(4e6, "", "assumed", "as in Llama 2 (Touvron et al. 2023)"),
    "FLOP of a token in training": Constant(6, "/ parameter", "assumed", "forward 2, backward 4; attention left out"),
    "FLOP of a token in a forward": Constant(2, "/ parameter", "assumed", "the same"),
    "peak of a GPU": Constant(989e12, "FLOP/s", "assumed", "H100 SXM, bfloat16, dense, by its data sheet"),
    "share of it in training": Constant(0.40, "", "assumed", "usual on such clusters"),
    "share of it in a forward": Constant(0.30, "", "assumed", "batches of 4,096 tokens, no gradients, no compilation"),
    "memory of a GPU": Constant(80e9, "bytes", "assumed", "the same data sheet"),
    "bytes of a parameter in training": Constant(16, "", "assumed", "mixed precision with Adam"),
    "bytes of a parameter gathered": Constant(2, "", "assumed", "bfloat16, all parameters once a forward, if sharded"),
    "bytes/s within 8 GPUs": Constant(450e9, "bytes/s", "assumed", "NVLink, one way"),
    "bytes/s of a GPU beyond": Constant(50e9, "bytes/s", "assumed", "400 Gbit/s"),
    "bins": Constant(100, "", "known", "default of Meter"),
    "bytes of a soft assignment": Constant(4, "", "known", "float32, sent to the rank that adds up the layer"),
}
# Parameters and layers.
MODELS = {"1B": (1.2e9, 16), "7B": (6.7e9, 32), "70B": (69e9, 80)}
SHAPES = {
    f"{what} of {model}": Constant(value, "", "known", "Llama's shape")
    for model, shape in MODELS.items()
    for what, value in zip(("parameters", "layers"), shape, strict=True)
}
GPUS = (8, 64, 1024)
GOAL = Constant(1.05, "forwards of the trunk", "assumed", "goal of loss=False on a GPU, NOT measured")
# For MMLU, where cost.py has run no sides.
BAR = Constant(1.20, "forwards of the trunk", "assumed", "what the default is held to; no sides were run")
NO_HEAD = Constant(1.0, "forwards of the trunk", "assumed", "without the head; no sides were run")


def probe_tokens() -> int:
    """Of one measurement."""
    return int(PROBE["sequences of the probe"].value * PROBE["tokens of each"].value)


def mmlu_rows(ratio: float, logits: float) -> list[dict[str, Any]]:
    """One row for each way to run MMLU.

    Args:
        ratio: a measurement in forwards of the trunk over its probe.
        logits: a forward with logits in the same unit, which an evaluation is.

    Returns:
        Tokens of the pass, one measurement's tokens as a share of it, and the same share with both ratios.
    """
    rows = []
    for shots in (5, 0):
        for name, (passes, note) in PASSES.items():
            characters = MMLU[f"characters of a {shots}-shot prompt"].value
            tokens = MMLU["test questions"].value * passes * characters / MMLU["characters a token"].value
            by_count = probe_tokens() / tokens
            rows.append(
                {"shots": shots, "way": name, "note": note, "tokens": tokens, "by_count": by_count,
                 "by_time": by_count * ratio / logits}
            )  # fmt: skip
    return rows


def share_rows(ratio: float) -> list[dict[str, Any]]:
    """Seconds of a training step and of a measurement, and the share of training time, by model and number of GPUs.

    Batches of the probe are spread over all GPUs as data-parallel ranks; with more GPUs than batches the rest idles.
    A model that does not fit on one GPU in training is sharded over all, and its parameters are gathered for each
    forward while it computes; the slower of the two counts. The assignments of a batch are sent besides. What a
    measurement does once, whatever the number of batches, is part of the ratio, and so is taken to shrink with them.

    Args:
        ratio: a measurement in forwards of the trunk.
    """
    value: Mapping[str, float] = {name: each.value for name, each in {**PROBE, **TRAINING}.items()}
    batches = math.ceil(value["sequences of the probe"] / value["sequences of a batch"])
    tokens = value["sequences of a batch"] * value["tokens of each"]
    rows = []
    for model, (parameters, layers) in MODELS.items():
        of_training = value["bytes of a parameter in training"] * parameters
        for gpus in GPUS:
            step = (
                value["FLOP of a token in training"] * parameters * value["tokens of a step"]
                / (gpus * value["peak of a GPU"] * value["share of it in training"])
            )  # fmt: skip
            compute = (
                ratio * value["FLOP of a token in a forward"] * parameters * tokens
                / (value["peak of a GPU"] * value["share of it in a forward"])
            )  # fmt: skip
            speed = value["bytes/s within 8 GPUs"] if gpus <= 8 else value["bytes/s of a GPU beyond"]
            sharded = of_training > value["memory of a GPU"]
            gather = value["bytes of a parameter gathered"] * parameters * (gpus - 1) / gpus / speed if sharded else 0.0
            sent = tokens * layers * value["bins"] * value["bytes of a soft assignment"] * (gpus - 1) / gpus / speed
            rounds = math.ceil(batches / gpus)
            measurement = rounds * (max(compute, gather) + sent)
            training = value["steps between measurements"] * step
            rows.append(
                {
                    "model": model, "gpus": gpus, "step": step, "rounds": rounds, "compute": compute, "gather": gather,
                    "sent": sent, "measurement": measurement, "share": measurement / (training + measurement),
                    "fits": of_training <= gpus * value["memory of a GPU"],
                }
            )  # fmt: skip
    return rows
