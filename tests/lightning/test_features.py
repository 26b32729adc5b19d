"""Feature probes for stock callbacks, models of other kinds, and a stream of training data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import transformers as tf
from tiny_hf import pairs, random_ids
from tiny_lightning import saving, tiny_callback, tiny_module, tiny_trainer
from torch.utils.data import DataLoader, IterableDataset

import ib_callback as ib
from ib_callback.lightning import IBCallback


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda package: package.__name__)
def test_features_are_published_and_can_be_monitored(package: Any, tmp_path: Path) -> None:
    callback = tiny_callback(feature_probes=[pairs()], select="preference", select_from=1, orders="token")
    monitor = package.callbacks.ModelCheckpoint(
        tmp_path / "monitored", monitor="ib/selectable/preference/information", mode="max", every_n_train_steps=5
    )
    module = tiny_module(package)
    callbacks = [callback, monitor] if package is pytorch_lightning else [callback, saving(tmp_path, 5), monitor]
    trainer = tiny_trainer(tmp_path, callbacks, package=package, enable_checkpointing=True)
    trainer.fit(module)
    last = callback.trajectory[-1]
    assert trainer.callback_metrics["ib/preference/ratio"].item() == last.features["preference"].ratio
    best = max(
        (p for p in callback.trajectory if p.step in (5, 10)), key=lambda p: p.features["preference"].information
    )
    assert callback.selected is not None
    assert callback.selected.step == best.step
    assert monitor.best_model_score.item() == pytest.approx(best.features["preference"].information)


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


def fit(directory: Path, dataset: Any, callback: IBCallback) -> Any:
    module = tiny_module()
    shuffle = not isinstance(dataset, IterableDataset)
    tiny_trainer(directory, [callback], steps=6).fit(module, DataLoader(dataset, batch_size=4, shuffle=shuffle))
    return module


class Stream(IterableDataset[torch.Tensor]):
    starts = 0

    def __iter__(self) -> Any:
        Stream.starts += 1
        return iter(random_ids(48, seed=11))


def test_a_stream_is_not_begun_for_it(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="was not searched for the probe: Stream can only be iterated"):
        fit(tmp_path, Stream(), tiny_callback(check_overlap=48))
    assert Stream.starts == 1
