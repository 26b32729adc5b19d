"""LightningCLI: the callback and its probe stand in the configuration, which is usually a file."""

import _tiny
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI

CONFIG = """
trainer: {max_steps: 15, accelerator: cpu, logger: false, enable_checkpointing: false, callbacks: [
  {class_path: ib_callback.lightning.IBCallback, init_args: {every_n_steps: 5, output_dir: ib_out/lightning_cli,
    probe: {class_path: ib_callback.Probe.builtin, init_args: {num_sequences: 32, max_length: 64}}}}]}
"""


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = _tiny.model()
        self.train_dataloader = lambda: torch.utils.data.DataLoader(_tiny.token_rows(), batch_size=8)

    def training_step(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


LightningCLI(Net, save_config_callback=None, args={"fit": yaml.safe_load(CONFIG)})
