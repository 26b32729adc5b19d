"""A real HuggingFace Trainer on a model that trains in milliseconds a step."""

from __future__ import annotations

import functools
import gc
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from ib_callback import Measurement, Meter, Probe
from ib_callback.hf import IBCallback

VOCABULARY = 60
LENGTH = 16


def random_ids(rows: int, *, seed: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(0, vocabulary, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def tiny_probe(vocabulary: int = VOCABULARY) -> Probe:
    return Probe.from_tokens(random_ids(6, seed=7, vocabulary=vocabulary))


def tiny_model(seed: int = 3) -> GPT2LMHeadModel:
    set_seed(seed)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, use_cache=False, **shape))


def tiny_callback(*, every_n_steps: Any = 5, **keywords: Any) -> IBCallback:
    # Drawing takes longer than all the rest.
    settings = {"num_bins": 12, "batch_size": 3, "log_plane": False, **keywords}
    return IBCallback(tiny_probe(), every_n_steps=every_n_steps, **settings)


def tiny_trainer(
    directory: Path,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    steps: int = 12,
    model: torch.nn.Module | None = None,
    kind: type[Trainer] = Trainer,
    data: Any = None,
    **arguments: Any,
) -> Trainer:
    """Of 64 rows of ids, unless `data` is a dataset of others."""
    _leave_out_what_was_imported()
    rows = [{"input_ids": row, "labels": row} for row in random_ids(64, seed=11)]
    settings = {
        "output_dir": str(directory),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    return kind(
        model=tiny_model() if model is None else model,
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=rows if data is None else Labelled(data),
        eval_dataset=rows[:4],
        callbacks=list(callbacks),
    )


@functools.cache
def _leave_out_what_was_imported() -> None:
    """A Trainer collects garbage when it begins: half a second among all that the frameworks import, else nothing."""
    gc.collect()
    gc.freeze()


class Labelled(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of ids, each with itself as labels."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        row = self.rows[number]
        return {"input_ids": row, "labels": row}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_weights(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def numbers(point: Measurement) -> dict[str, float]:
    """All that is measured of a model, without how long it took, and without what its training told."""
    told = ("ib/seconds", "ib/overhead", "ib/train_loss")
    return {name: value for name, value in point.metrics().items() if name not in told}


def measured(model: torch.nn.Module, step: int, **keywords: Any) -> dict[str, float]:
    """The numbers of a model, by a meter of its own."""
    settings = {"num_bins": 12, "batch_size": 3, **keywords}
    return numbers(Meter(tiny_probe(), **settings).measure(model, step=step))


def random_states() -> tuple[Any, ...]:
    """Of Python, NumPy and torch, as values that can be compared."""
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()


class Each(TrainerCallback):
    """Calls a function of (state, control, model) at one event."""

    def __init__(self, event: str, act: Any) -> None:
        def call(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            act(state, control, kwargs["model"])

        setattr(self, event, call)


def pairs(vocabulary: int = 60) -> Probe:
    """A probe of three pairs of a preferred and a rejected text."""
    ids = random_ids(6, seed=21, vocabulary=vocabulary)
    labels = torch.tensor([1, 0] * 3)[:, None].expand_as(ids)
    return Probe.from_tokens(ids, labels={"preference": labels}, name="pairs")
