"""A real Lightning Trainer, of either package, on the tiny model of `tiny_hf`."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from tiny_hf import random_ids, tiny_model, tiny_probe
from torch.utils.data import DataLoader

from ib_callback.lightning import IBCallback

ROWS = 48
BATCH = 4


class Batches(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self) -> None:
        self.rows = random_ids(ROWS, seed=11)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


def tiny_module(
    package: ModuleType = lightning.pytorch, model: torch.nn.Module | None = None, **attributes: Any
) -> Any:
    """A LightningModule of the package that holds the model as `net`; `losses` and `seen` are what it went through."""

    class TinyModule(package.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny_model()
            self.losses: list[float] = []
            self.logs = True
            for name, value in attributes.items():
                setattr(self, name, value)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss = self.net(input_ids=batch, labels=batch).loss
            self.note(loss)
            if self.logs:
                self.log("loss", loss)
            return loss

        @torch.compiler.disable  # else the step is compiled anew for each length of the list
        def note(self, loss: torch.Tensor) -> None:
            self.losses.append(loss.item())

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("val_loss", self.net(input_ids=batch, labels=batch).loss)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)]

        def train_dataloader(self) -> Any:
            return DataLoader(Batches(), batch_size=BATCH, shuffle=True)

        def val_dataloader(self) -> Any:
            return DataLoader(Batches(), batch_size=ROWS // 2)

    return TinyModule()


def tiny_callback(*, every_n_steps: Any = 5, **keywords: Any) -> IBCallback:
    # Drawing takes longer than all the rest.
    return IBCallback(
        tiny_probe(), every_n_steps=every_n_steps, **{"num_bins": 12, "batch_size": 3, "log_plane": False, **keywords}
    )


def tiny_trainer(
    directory: Path,
    callbacks: Sequence[Any] | Any = (),
    *,
    steps: int = 12,
    package: ModuleType = lightning.pytorch,
    **arguments: Any,
) -> Any:
    settings = {
        "default_root_dir": str(directory),
        "max_steps": steps,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
    }
    callbacks = list(callbacks) if isinstance(callbacks, Sequence) else callbacks
    return package.Trainer(callbacks=callbacks, **{**settings, **arguments})


def two_devices() -> dict[str, Any]:
    """Arguments of a Trainer in the processes of `two_ranks`."""
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
    return {"devices": 2, "strategy": strategy}


def saving(directory: Path, every: int, **arguments: Any) -> ModelCheckpoint:
    """Every checkpoint there is, called by its step, in the folder `saved`; unless the arguments say otherwise."""
    settings = {"every_n_train_steps": every, "save_top_k": -1, "filename": "{step}", **arguments}
    return ModelCheckpoint(directory / "saved", **settings)


def saved_steps(directory: Path) -> set[str]:
    """Names of the checkpoints on the disk, without the ending."""
    return {path.stem for path in (directory / "saved").iterdir()}


def published(trainer: Any) -> dict[str, float]:
    """The numbers of a point as stock callbacks see them; one that is undefined is NaN, and left out here."""
    values = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("ib/")}
    derived = ("ib/phase", "ib/selectable/")
    return {name: value for name, value in values.items() if not math.isnan(value) and not name.startswith(derived)}


def csv_rows(directory: Path) -> list[dict[str, str]]:
    with open(directory / "metrics.csv", newline="") as handle:
        return list(csv.DictReader(handle))


def environment(**variables: str) -> dict[str, str]:
    """Of a process that is to find the package and these helpers."""
    support = Path(__file__).parent
    path = os.pathsep.join([str(support.parents[1]), str(support), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
