"""Lightning's Trainer with the callback: it measures, stops on a plateau and tells stock ModelCheckpoint the best.

    python examples/lightning_trainer.py

trains a small GPT-2 from scratch for some seconds on the CPU and needs no network. In a real run, use
`Probe.from_c4(tokenizer)`: its text is held out of the usual training text, and is the same for everybody. A script
that imports `pytorch_lightning` uses the same callback.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import ib_callback as ib
from ib_callback.lightning import IBCallback
from ib_callback.probe import builtin_text

LENGTH = 64


class LanguageModel(LightningModule):
    """The callback finds the transformers model inside. For any other model, name its modules with `layers=`."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        shape = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": LENGTH}
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **shape))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """The loss of predicting each next token."""
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, as usual."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--output-dir", default="ib_example")
    options = parser.parse_args()

    seed_everything(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=builtin_text.default_tokenizer(), eos_token=builtin_text.END_OF_TEXT
    )
    training_texts, _ = builtin_text.split()
    ids = [token for text in tokenizer(training_texts[:500])["input_ids"] for token in (*text, tokenizer.eos_token_id)]
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    probe = ib.Probe.builtin(tokenizer, num_sequences=64, max_length=LENGTH)

    callback = IBCallback(
        probe,
        every_n_steps=10,
        early_stopping=ib.PlateauStopping(act=False),  # only says when it would stop; leave act= out to stop
        select_from=0,
    )
    # Stock callbacks see the numbers. Select by the loss on the probe: an untrained model can have the best optimality,
    # and a collapsed one the smallest distance to the bound.
    watched = "ib/selectable/loss"
    checkpoint = ModelCheckpoint(monitor=watched, mode="min", every_n_train_steps=10, filename="{step}")
    trainer = Trainer(
        max_steps=options.steps,
        accelerator="cpu",
        logger=CSVLogger(options.output_dir),  # a WandbLogger gets the numbers and the information plane
        callbacks=[callback, checkpoint],
        log_every_n_steps=10,
    )
    trainer.fit(LanguageModel(len(tokenizer)), DataLoader(rows, batch_size=8, shuffle=True))

    print(callback.trajectory.table())
    print(f"\nThe best checkpoint: {checkpoint.best_model_path} ({checkpoint.best_model_score:.4f})")
    print(f"Written to {trainer.log_dir}: ib_trajectory.jsonl, information_plane.png and metrics.csv")


if __name__ == "__main__":
    main()
