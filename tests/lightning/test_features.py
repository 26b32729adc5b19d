"""Feature probes and the look at the training data, in Lightning's Trainer."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
import transformers as tf
from tiny_hf import pairs, random_ids, random_states, same_weights, tiny_probe, weights
from tiny_lightning import Batches, saving, tiny_callback, tiny_module, tiny_trainer
from torch.utils.data import DataLoader, IterableDataset

import ib_callback as ib
from ib_callback.lightning import IBCallback


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda package: package.__name__)
def test_features_are_measured_beside_the_plane(package: Any, tmp_path: Path) -> None:
    stopping = ib.PlateauStopping(monitor="preference/information", mode="max", arm="fit")
    callback = tiny_callback(
        feature_probes=[pairs()], select="preference", select_from=1, early_stopping=stopping, orders="token"
    )
    monitor = package.callbacks.ModelCheckpoint(
        tmp_path / "monitored", monitor="ib/selectable/preference/information", mode="max", every_n_train_steps=5
    )
    module = tiny_module(package)
    callbacks = [callback, monitor] if package is pytorch_lightning else [callback, saving(tmp_path, 5), monitor]
    trainer = tiny_trainer(tmp_path, callbacks, package=package, enable_checkpointing=True)
    trainer.fit(module)
    alone = tiny_module(package)
    tiny_trainer(tmp_path / "without", package=package).fit(alone)
    assert same_weights(weights(module), weights(alone))
    last = callback.trajectory[-1]
    expected = ib.measure(module.net, tiny_probe(), feature_probes=[pairs()], orders="token", num_bins=12, batch_size=3)
    assert last.features == expected.features
    assert trainer.callback_metrics["ib/preference/ratio"].item() == last.features["preference"].ratio
    best = max(
        (p for p in callback.trajectory if p.step in (5, 10)), key=lambda p: p.features["preference"].information
    )
    assert callback.selected is not None
    assert callback.selected.step == best.step
    assert monitor.best_model_score.item() == pytest.approx(best.features["preference"].information)


def test_a_feature_probe_of_another_tokenizer_is_refused_before_the_first_step(tmp_path: Path) -> None:
    module = tiny_module()
    trainer = tiny_trainer(tmp_path, [tiny_callback(feature_probes=[pairs(vocabulary=900)])])
    with pytest.raises(ib.ModelError, match=r"probe 'pairs': token id .* is outside the model's vocabulary"):
        trainer.fit(module)
    assert module.losses == []


# --- models of other kinds


def small(config: Any) -> Any:
    return config(vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def test_an_encoder_is_measured_with_a_warning(tmp_path: Path) -> None:
    callback = tiny_callback(orders="token", feature_probes=[pairs()])
    with pytest.warns(RuntimeWarning, match="hidden states of BertForMaskedLM change with the tokens that follow"):
        tiny_trainer(tmp_path, [callback], steps=2).fit(tiny_module(net=tf.BertForMaskedLM(small(tf.BertConfig))))
    assert [point.error for point in callback.trajectory] == [None, None]


@pytest.mark.parametrize("keywords", [{}, {"layers": ["decoder.block.*"]}])
def test_an_encoder_decoder_is_refused_before_the_first_step(keywords: dict[str, Any], tmp_path: Path) -> None:
    config = tf.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    module = tiny_module(net=tf.T5ForConditionalGeneration(config))
    with pytest.raises(ib.ModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        tiny_trainer(tmp_path, [tiny_callback(**keywords)]).fit(module)
    assert module.losses == []


class Noisy(Batches):
    """Draws random numbers at every example, as augmentation does."""

    def __getitem__(self, index: int) -> torch.Tensor:
        random.random(), np.random.rand(), torch.rand(1)
        return super().__getitem__(index)


def fit(directory: Path, dataset: Any, callback: IBCallback) -> Any:
    module = tiny_module()
    shuffle = not isinstance(dataset, IterableDataset)
    tiny_trainer(directory, [callback], steps=6).fit(module, DataLoader(dataset, batch_size=4, shuffle=shuffle))
    return module


def test_a_look_at_the_training_data_changes_nothing(tmp_path: Path) -> None:
    left = {}
    for check_overlap in (0, 40):
        torch.manual_seed(2)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", module="ib_callback")
            warnings.filterwarnings("error", message=".*probe")
            module = fit(tmp_path / str(check_overlap), Noisy(), tiny_callback(check_overlap=check_overlap))
        left[check_overlap] = weights(module), random_states()
    assert same_weights(left[0][0], left[40][0])
    assert left[0][1] == left[40][1]


def test_training_on_the_probe_is_a_warning(tmp_path: Path) -> None:
    leaked = ib.Probe.from_tokens(random_ids(48, seed=11)[:6], name="leaked")
    callback = IBCallback(leaked, orders="token", num_bins=12, log_plane=False, every_n_steps=6, check_overlap=48)
    with pytest.warns(RuntimeWarning, match="Probe 'leaked' is not held out from the training data: 6 of 6 sequences"):
        fit(tmp_path, Batches(), callback)


class Stream(IterableDataset[torch.Tensor]):
    starts = 0

    def __iter__(self) -> Any:
        Stream.starts += 1
        return iter(random_ids(48, seed=11))


def test_a_stream_is_not_begun_for_it(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="was not searched for the probe: Stream can only be iterated"):
        fit(tmp_path, Stream(), tiny_callback(check_overlap=48))
    assert Stream.starts == 1
