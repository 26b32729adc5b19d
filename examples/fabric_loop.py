"""A loop on Lightning Fabric, litgpt style: it measures, stops on a plateau, keeps the best checkpoint and resumes.

    python examples/fabric_loop.py [STEPS]    # and again, to go on from the last checkpoint

With `devices=8` in a real run every rank makes these calls; rank 0 writes the files.
"""

import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import ib_callback as ib
from ib_callback.probe import builtin_text

LENGTH = 64


def main(steps: int, out: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    fabric.seed_everything(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=builtin_text.default_tokenizer())
    ids = torch.tensor([i for text in tokenizer(builtin_text.split()[0][:500])["input_ids"] for i in text])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    loader = fabric.setup_dataloaders(DataLoader(rows, batch_size=8, shuffle=True, drop_last=True))
    shape = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": LENGTH, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape))
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=2e-3))
    state = {"model": model, "optimizer": optimizer, "step": 0}
    if saved := sorted(out.glob("step-*.ckpt")):
        fabric.load(saved[-1], state)

    meter = ib.Meter(ib.Probe.builtin(tokenizer, num_sequences=64, max_length=LENGTH))
    # Models as small as this one never compress; for a real one: ib.PlateauStopping() and select_from="compression".
    stopping = ib.PlateauStopping("token/expressivity_above_null", mode="max", arm="fit")
    with ib.Run(
        meter, output_dir=out, every_n_steps=20, early_stopping=stopping, select="optimality", select_from="fit"
    ) as run:
        batches = iter(loader)
        while True:
            stop = run.step(model, state["step"])
            if stop or state["step"] >= steps:
                break
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                continue
            fabric.backward(model(input_ids=batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            state["step"] += 1
            if state["step"] % 20 == 0:
                path = out / f"step-{state['step']:06}.ckpt"
                fabric.save(path, state)
                run.step(model, state["step"])
                run.saved(state["step"], path)
                for old in out.glob("step-*.ckpt"):
                    if fabric.global_rank == 0 and old != path and not run.keeps(old):
                        old.unlink()
    fabric.print(run.trajectory.table())
    fabric.print(f"The best checkpoint: {run.selected}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200, Path("ib_example"))
