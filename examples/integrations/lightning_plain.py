"""Lightning's Trainer with a model of plain torch: `layers` names its blocks, `forward` says how to call it."""

import _tiny
import torch
from lightning.pytorch import LightningModule, Trainer

import ib_callback as ib
from ib_callback.lightning import IBCallback


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = _tiny.PlainTorch()  # forward(ids) returns logits; its blocks are model.blocks.0 and model.blocks.1

    def training_step(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


probe = ib.Probe.builtin(num_sequences=32, max_length=64)
how = {"layers": ["model.blocks.*"], "forward": lambda net, ids, mask: net.model(ids)}
callback = IBCallback(probe, every_n_steps=5, output_dir="ib_out/lightning_plain", **how)
trainer = Trainer(max_steps=15, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback])
trainer.fit(Net(), torch.utils.data.DataLoader(_tiny.token_rows(), batch_size=8))
