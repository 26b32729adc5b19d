"""What a model is fine-tuned on: C4, preferred answers, and preference pairs with the loss of DPO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers as tf
from tokenizers import Tokenizer
from torch import Tensor, nn

import _runs as runs
import ib_callback as ib
from preference import probe_of, read_pairs


def on_c4(data: Path, work: Path, config: runs.Config) -> runs.Task:
    """C4, without any document that a probe or the held-out sequences have a part of."""
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    ids = [
        each.ids for each in tokenizer.encode_batch([each["text"] for each in runs.lines(data / "c4_sample.jsonl.gz")])
    ]
    size = sum(map(len, ids)) // runs.LENGTH * runs.LENGTH
    flat = np.concatenate([np.array(each, np.uint16) for each in ids])[:size].reshape(-1, runs.LENGTH)
    document = np.repeat(np.arange(len(ids)), [len(each) for each in ids])[:size].reshape(-1, runs.LENGTH)
    half = len(flat) // 2
    number = np.arange(len(flat))[:, None]
    taken = np.concatenate(
        [
            runs.spread(number[:half], 4 * runs.PROBE_SEQUENCES)[:, 0],
            runs.spread(number[half:], runs.VALIDATION_SEQUENCES)[:, 0],
        ]
    )
    free = ~np.isin(document, np.unique(document[taken])).any(1)
    return runs.Task(runs.Sequences(flat[free], config))


class Pairs(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Preference pairs in the order of a seed, again and again; the rejected answers with what DPO needs, or without.

    Args:
        probe: sequence 2i is preferred to 2i + 1.
        config: of the run.
        reference: [N] log-probabilities of all answers under the model that DPO begins with; None: preferred answers
            alone, for supervised training.
    """

    def __init__(self, probe: ib.Probe, config: runs.Config, reference: Tensor | None) -> None:
        self._tables = inputs_of(probe)
        self._reference = reference
        generator = np.random.RandomState(config.seed)
        number, total = len(probe) // 2, config.steps * config.batch
        rounds = -(-total // number)
        self._order = np.concatenate([generator.permutation(number) for _ in range(rounds)])[:total]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = 2 * int(self._order[index])
        if self._reference is None:
            return {name: each[row] for name, each in self._tables.items()}
        return {name: each[row : row + 2] for name, each in self._tables.items()} | {
            "reference": self._reference[row : row + 2]
        }


def inputs_of(probe: ib.Probe) -> dict[str, Tensor]:
    """Ids, mask, and labels of the answers' tokens (-100 elsewhere), each [N, S]."""
    labels = probe.input_ids.masked_fill(probe.labels["preference"] < 0, -100)
    return {"input_ids": probe.input_ids, "attention_mask": probe.attention_mask.long(), "labels": labels}


def log_probabilities(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """[N] of the answers as a whole, in nats."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    each = F.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100, reduction="none")
    return -each.view(len(logits), -1).sum(1)


class DPOTrainer(tf.Trainer):
    """-log sigmoid of beta times how much more the margin within a pair is than the reference's.

    Rafailov et al., "Direct preference optimization", NeurIPS 2023, eq. 7.
    """

    beta = 0.1

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        flat = {name: table.flatten(0, 1) for name, table in inputs.items()}
        gain = (log_probabilities(model, flat) - flat["reference"]).view(-1, 2)
        return -F.logsigmoid(self.beta * (gain[:, 0] - gain[:, 1])).mean()


@torch.no_grad()
def _in_parts(model: nn.Module, probe: ib.Probe, size: int = 40) -> Tensor:
    tables = inputs_of(probe)
    parts = [{name: each[at : at + size] for name, each in tables.items()} for at in range(0, len(probe), size)]
    return torch.cat([log_probabilities(model, part) for part in parts])


def judges(probe: ib.Probe, reference: Tensor, name: str) -> Callable[[nn.Module], dict[str, float]]:
    """How a model judges pairs: share of pairs with the greater gain in the preferred answer, and mean difference of
    gains in nats, each against the reference; and share with the likelier token in the preferred answer.
    """
    length = (inputs_of(probe)["labels"][:, 1:] >= 0).sum(1)

    def judge(model: nn.Module) -> dict[str, float]:
        found = _in_parts(model, probe)
        gain = (found - reference).view(-1, 2)
        margin = gain[:, 0] - gain[:, 1]
        mean = (found / length).view(-1, 2)
        return {
            f"{name}_accuracy": float(((margin > 0).float() + 0.5 * (margin == 0)).mean()),
            f"{name}_margin": float(margin.mean()),
            f"{name}_likelier": float((mean[:, 0] > mean[:, 1]).float().mean()),
            f"{name}_chosen_loss": float(-mean[:, 0].mean()),
        }

    return judge


def split(data: Path, work: Path, held_out: int) -> dict[str, ib.Probe]:
    """Pairs that are held out, as many of those that are trained on, all of these, and all there are."""
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(work / "tokenizer.json")), eos_token="<|end|>"
    )
    pairs = read_pairs(data)
    parts = {
        "held": pairs[held_out - 1 :: held_out],
        "seen": pairs[::held_out],
        "training": [pair for n, pair in enumerate(pairs) if n % held_out != held_out - 1],
        "all": pairs,
    }
    return {name: probe_of(part, tokenizer, name) for name, part in parts.items()}


def control(data: Path, work: Path, configs: dict[str, runs.Config], held_out: int) -> dict[str, Any]:
    """Preference information before any training, in models with random weights, and after each of these runs.

    Args:
        data: folder with the pairs.
        work: folder of the runs.
        configs: of models; the last weights are taken where there are some, else random ones.
        held_out: one in so many pairs.
    """
    found: dict[str, Any] = {}
    probes = split(data, work, held_out)
    for name, config in configs.items():
        model = config.model().eval()
        if (work / config.name / "weights").exists():
            model.load_state_dict(runs.weights_of(work / config.name))
        for part in ("held", "seen", "all"):
            point = ib.measure(model, probes[part], orders=("token", "bigram"), loss=False, readout=False)
            feature = point.features["preference"]
            found.setdefault(name, {})[part] = {
                "pairs": len(probes[part]) // 2,
                "information": feature.information,
                "null": feature.information_null,
                "std": feature.information_null_std,
                "p": feature.information_p_value,
            }
    return found


def on_pairs(data: Path, work: Path, config: runs.Config, *, beta: float | None, held_out: int) -> runs.Task:
    """Preferred answers, or with a `beta` whole pairs; every so many pairs are held out, and as many others looked at.

    Preference information is measured on the pairs that are held out, and on as many of those trained on.
    """
    probes = split(data, work, held_out)
    looked_at = {name: probes[name] for name in ("held", "seen")}
    model = config.model().eval()
    assert config.base is not None
    model.load_state_dict(runs.weights_of(work / config.base))
    trainer = tf.Trainer
    if beta is not None:
        trainer = type("DPOTrainer", (DPOTrainer,), {"beta": beta})
    return runs.Task(
        Pairs(probes["training"], config, None if beta is None else _in_parts(model, probes["training"])),
        trainer,
        [judges(probe, _in_parts(model, probe), name) for name, probe in looked_at.items()],
        looked_at,
    )
