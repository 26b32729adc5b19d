from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from tiny_hf import LENGTH, VOCABULARY, measured, numbers, random_ids, tiny_model, tiny_probe
from tiny_lightning import tiny_callback, tiny_module, tiny_trainer

import ib_callback as ib
from ib_callback.common.errors import ModelError


def test_names_are_those_in_the_lightning_module_or_in_the_model(tmp_path: Path) -> None:
    found = []
    for layers in (["net.transformer.h.[01]"], ["transformer.h.[01]"], "net.transformer.h.?", "blocks"):
        callback = tiny_callback(layers=layers)
        tiny_trainer(tmp_path, [callback], steps=1).fit(tiny_module())
        found.append([(point.settings["layers"], point.complexity) for point in callback.trajectory])
    module = tiny_module()
    module.net = torch.compile(module.net, backend="eager")
    for layers in ("net.transformer.h.?", "blocks"):
        callback = tiny_callback(layers=layers)
        tiny_trainer(tmp_path / "compiled", [callback], steps=1).fit(copy.deepcopy(module))
        found.append([(point.settings["layers"], point.complexity) for point in callback.trajectory])
    assert found[0][0][0] == ["transformer.h.0", "transformer.h.1"]
    assert all(each[0] == found[0][0] for each in found)
    assert found[0] == found[1] == found[2] == found[3]


def test_forward_is_called_with_the_lightning_module(tmp_path: Path) -> None:
    shapes = []

    def forward(module: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        shapes.append((type(module).__name__, tuple(input_ids.shape), tuple(attention_mask.shape), module.training))
        return module.net(input_ids=input_ids, attention_mask=attention_mask)

    callback, module = tiny_callback(forward=forward), tiny_module()
    tiny_trainer(tmp_path, [callback], steps=1).fit(module)
    assert ("TinyModule", (3, LENGTH), (3, LENGTH), False) in shapes
    assert numbers(callback.trajectory[-1]) == measured(module.net, 1)


class Recurrent(torch.nn.Module):
    """No transformers model: embeds, and runs two recurrent layers, each with a dropout behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, 16)
        self.layers = torch.nn.ModuleList(torch.nn.GRU(16, 16, batch_first=True) for _ in range(2))
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(16, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        z = self.embed(tokens)
        for layer in self.layers:
            z = self.drop(layer(z)[0])
        return self.head(z)


class RecurrentModule(lightning.pytorch.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.core = Recurrent()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.core(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(random_ids(16, seed=11), batch_size=4)


def test_a_module_without_a_transformers_model(tmp_path: Path) -> None:
    callback = tiny_callback(layers=["core.layers.*"], forward=lambda m, ids, mask: m.core(ids))
    module = RecurrentModule()
    tiny_trainer(tmp_path, [callback], steps=3).fit(module)
    assert callback.trajectory[-1].layers == ("core.layers.0", "core.layers.1")
    meter = ib.Meter(tiny_probe(), num_bins=12, layers=["layers.*"], forward=lambda m, ids, mask: m(ids))
    expected = meter.measure(module.core, step=3).complexity
    assert callback.trajectory[-1].complexity == pytest.approx(expected, abs=1e-6)

    with pytest.raises(ModelError, match=r"holds no transformers model and has no forward\(\) of its own.*forward="):
        tiny_trainer(tmp_path, [tiny_callback(layers=["core.layers.*"])]).fit(RecurrentModule())
    with pytest.raises(ModelError, match=r"layers: the blocks of RecurrentModule could not be found.*core\.layers\.\*"):
        tiny_trainer(tmp_path, [tiny_callback(forward=lambda m, ids, mask: m.core(ids))]).fit(RecurrentModule())


def test_several_transformers_models(tmp_path: Path) -> None:
    module = tiny_module(teacher=tiny_model(seed=8))
    with pytest.raises(
        ModelError,
        match=r"2 transformers models: net \(GPT2LMHeadModel\), teacher \(GPT2LMHeadModel\).*layers=.*forward=",
    ):
        tiny_trainer(tmp_path, [tiny_callback()]).fit(module)

    callback = tiny_callback(layers=["teacher.transformer.h.[01]"])
    tiny_trainer(tmp_path, [callback], steps=2).fit(module)
    point, meter = callback.trajectory[-1], ib.Meter(tiny_probe(), num_bins=12, batch_size=3, layers="blocks")
    assert numbers(point) == numbers(meter.measure(module.teacher, step=2))
    assert numbers(point) == {**numbers(callback.trajectory[0])}, "a teacher does not learn"

    both = ["net.transformer.h.1", "teacher.transformer.h.1"]

    def run_both(m: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        m.net(input_ids=input_ids, attention_mask=attention_mask)
        m.teacher(input_ids=input_ids, attention_mask=attention_mask)

    callback = tiny_callback(layers=both, forward=run_both)
    tiny_trainer(tmp_path, [callback], steps=2).fit(module)
    assert callback.trajectory[-1].layers == tuple(both)
