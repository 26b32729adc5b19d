"""Features by which the Trainer judges, and a look at training data that are texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hf import pairs, random_ids, tiny_callback, tiny_trainer

import ib_callback as ib
from ib_callback.hf import IBCallback


def test_the_trainer_judges_by_a_feature(tmp_path: Path) -> None:
    callback = tiny_callback(feature_probes=[pairs()], orders="token")
    trainer = tiny_trainer(
        tmp_path, [callback], eval_strategy="steps", eval_steps=6, save_strategy="best", steps=6,
        metric_for_best_model="ib_preference_information", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric == callback.trajectory[-1].features["preference"].information


# --- the look at the training data


def test_a_dataset_of_texts_is_read_with_the_trainers_tokenizer(tmp_path: Path) -> None:
    class Tokenizer:
        model_max_length = 16

        def __call__(self, text: str, **keywords: Any) -> dict[str, list[int]]:
            return {"input_ids": [int(word) for word in text.split()]}

    rows = random_ids(64, seed=11)
    texts = [" ".join(map(str, row.tolist())) for row in rows]
    callback = IBCallback(
        ib.Probe.from_tokens(rows[:2]), orders="token", num_bins=12, log_plane=False, every_n_steps=2, check_overlap=64
    )
    trainer = tiny_trainer(tmp_path, [callback], steps=2, remove_unused_columns=False)
    trainer.train_dataset = [{"text": text} for text in texts]
    trainer.processing_class = trainer.callback_handler.processing_class = Tokenizer()

    def collate(examples: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([Tokenizer()(example["text"])["input_ids"] for example in examples])
        return {"input_ids": ids, "labels": ids}

    trainer.data_collator = collate
    with pytest.warns(RuntimeWarning, match="2 of 2 sequences share a run of 13 tokens with the 64 texts"):
        trainer.train()
