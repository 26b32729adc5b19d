"""Feature probes and the look at the training data, in HuggingFace's Trainer."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_hf import pairs, random_ids, random_states, same_weights, tiny_callback, tiny_probe, tiny_trainer, weights

import ib_callback as ib
from ib_callback.hf import IBCallback


def test_features_are_measured_beside_the_plane(tmp_path: Path) -> None:
    stopping = ib.PlateauStopping(monitor="preference/information", mode="max", arm="fit")
    keywords: dict[str, Any] = {"orders": ("token",), "select_from": 0}
    callback = tiny_callback(feature_probes=[pairs()], select="preference", early_stopping=stopping, **keywords)
    trainer = tiny_trainer(tmp_path / "with", [callback], save_strategy="steps", save_steps=6)
    # Of three pairs at least a quarter of all labellings says as much as any other.
    with pytest.warns(RuntimeWarning, match="The best point is step .* That may be chance: labels at random say as"):
        trainer.train()
    without = tiny_trainer(tmp_path / "without")
    without.train()
    assert same_weights(weights(trainer.model), weights(without.model))
    last = callback.trajectory[-1]
    assert last.step == 12
    expected = ib.measure(
        trainer.model, tiny_probe(), feature_probes=[pairs()], orders="token", num_bins=12, batch_size=3
    )
    assert last.features == expected.features
    row = next(row for row in trainer.state.log_history if row["step"] == 12 and "ib/preference/ratio" in row)
    assert row["ib/preference/information"] == last.features["preference"].information
    assert row["ib/selectable/preference/information"] == last.features["preference"].information
    best = max(
        (p for p in callback.trajectory if p.step in (6, 12)), key=lambda p: p.features["preference"].information
    )
    assert callback.selected is not None
    assert callback.selected.step == best.step
    assert ib.Trajectory.load(tmp_path / "with")[-1].features == last.features


def test_the_trainer_judges_by_a_feature(tmp_path: Path) -> None:
    callback = tiny_callback(feature_probes=[pairs()], orders="token")
    trainer = tiny_trainer(
        tmp_path, [callback], eval_strategy="steps", eval_steps=6, save_strategy="best", steps=6,
        metric_for_best_model="ib_preference_information", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric == callback.trajectory[-1].features["preference"].information


def test_a_resumed_run_with_other_feature_probes_begins_anew(tmp_path: Path) -> None:
    first = tiny_callback(feature_probes=[pairs()], orders="token")
    tiny_trainer(tmp_path, [first], steps=4, save_strategy="steps", save_steps=4).train()
    second = tiny_callback(orders="token")
    trainer = tiny_trainer(tmp_path, [second], steps=6, save_strategy="steps", save_steps=4)
    with pytest.warns(RuntimeWarning, match=r"feature_probes: \{.*preference.* vs absent"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert second.trajectory.steps == [4, 5, 6]


def test_a_feature_probe_of_another_tokenizer_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [tiny_callback(feature_probes=[pairs(vocabulary=900)])])
    with pytest.raises(ib.ModelError, match=r"probe 'pairs': token id .* is outside the model's vocabulary"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_mistakes_are_found_when_the_callback_is_made() -> None:
    with pytest.raises(ValueError, match="'preference' of probe 'pairs' has the name of a label of probe 'pairs'"):
        tiny_callback(feature_probes=[pairs(), pairs()])
    with pytest.raises(ValueError, match="select='language' cannot work: no metric 'language' is measured"):
        tiny_callback(feature_probes=[pairs()], select="language")
    with pytest.raises(TypeError, match=r"unknown keyword feature_probe; it takes .*feature_probes"):
        tiny_callback(feature_probe=[pairs()])


def test_a_feature_that_cannot_be_measured_is_a_missing_point(tmp_path: Path) -> None:
    runs: list[torch.Tensor] = []

    def forward(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        runs.append(ids)
        if len(runs) > 6 and any(torch.equal(row, pairs().input_ids[0]) for row in ids):
            raise RuntimeError("no such answer")
        return model(ids, attention_mask=mask)

    callback = tiny_callback(every_n_steps=3, orders="token", feature_probes=[pairs()], forward=forward)
    with pytest.warns(RuntimeWarning, match="Nothing could be measured at step 3; .*RuntimeError: no such answer"):
        tiny_trainer(tmp_path, [callback], steps=6).train()
    assert [point.error is None for point in callback.trajectory] == [True, False, False]


# --- the look at the training data


class Noisy(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Draws random numbers at every example, as augmentation does."""

    def __init__(self) -> None:
        self.rows = random_ids(64, seed=11)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        random.random(), np.random.rand(), torch.rand(1)
        return {"input_ids": self.rows[number], "labels": self.rows[number]}


def test_a_look_at_the_training_data_changes_nothing(tmp_path: Path) -> None:
    left = {}
    for check_overlap in (0, 40):
        callback = tiny_callback(orders="token", check_overlap=check_overlap)
        trainer = tiny_trainer(tmp_path / str(check_overlap), [callback], steps=6)
        trainer.train_dataset = Noisy()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            trainer.train()
        left[check_overlap] = weights(trainer.model), random_states()
    assert same_weights(left[0][0], left[40][0])
    assert left[0][1] == left[40][1]


def test_training_on_the_probe_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = random_ids(64, seed=11)
    leaked = ib.Probe.from_tokens(rows[:6], name="leaked")
    callback = IBCallback(
        leaked, orders="token", num_bins=12, log_plane=False, every_n_steps=2, feature_probes=[pairs()],
        check_overlap=64,
    )  # fmt: skip
    with pytest.warns(RuntimeWarning, match="Probe 'leaked' is not held out from the training data: 6 of 6 sequences"):
        tiny_trainer(tmp_path, [callback], steps=2).train()
    assert "probe 'pairs' shares no run of 13 tokens with 64 examples" in capsys.readouterr().err
    with pytest.raises(ValueError, match="check_overlap: expected an integer of at least 0, got -3"):
        tiny_callback(check_overlap=-3)


def test_a_dataset_of_texts_is_read_with_the_trainers_tokenizer(tmp_path: Path) -> None:
    class Tokenizer:
        model_max_length = 16

        def __call__(self, texts: list[str], **keywords: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    rows = random_ids(64, seed=11)
    texts = [" ".join(map(str, row.tolist())) for row in rows]
    callback = IBCallback(
        ib.Probe.from_tokens(rows[:2]), orders="token", num_bins=12, log_plane=False, every_n_steps=2, check_overlap=64
    )
    trainer = tiny_trainer(tmp_path, [callback], steps=2, remove_unused_columns=False)
    trainer.train_dataset = [{"text": text} for text in texts]
    trainer.processing_class = trainer.callback_handler.processing_class = Tokenizer()

    def collate(examples: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor(Tokenizer()([example["text"] for example in examples])["input_ids"])
        return {"input_ids": ids, "labels": ids}

    trainer.data_collator = collate
    with pytest.warns(RuntimeWarning, match="2 of 2 sequences share a run of 13 tokens with the 64 texts"):
        trainer.train()
