"""A loop in plain PyTorch, nanoGPT style: it measures, stops on a plateau, keeps the best checkpoint, logs to W&B.

python examples/plain_loop.py [STEPS]    # and again, to go on from the last checkpoint
"""

import sys
from pathlib import Path

import torch
import wandb
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import ib_callback as ib
from ib_callback.probe import builtin_text

steps, out = int(sys.argv[1]) if len(sys.argv) > 1 else 400, Path("ib_example")
torch.manual_seed(0)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=builtin_text.default_tokenizer())
data = torch.tensor([i for ids in tokenizer(builtin_text.split()[0][:500])["input_ids"] for i in ids])
shape = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
saved = sorted(out.glob("step-*.pt"))
last = torch.load(saved[-1]) if saved else {"step": 0, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
model.load_state_dict(last["model"]), optimizer.load_state_dict(last["optimizer"])

wandb.init(project="ib_example", mode="offline")
meter = ib.Meter(ib.Probe.builtin(tokenizer, num_sequences=64, max_length=64))
# Models as small as this one never compress; for a real one: ib.PlateauStopping() and select_from="compression".
stopping = ib.PlateauStopping("token/expressivity_above_null", mode="max", arm="fit")
keywords = {"every_n_steps": ib.logarithmic(), "early_stopping": stopping, "select": "optimality", "select_from": "fit"}
with ib.Run(meter, output_dir=out, **keywords) as run:
    for step in range(last["step"], steps + 1):
        stop = run.step(model, step)
        if step % 20 == 0 and step > last["step"]:
            path = out / f"step-{step:06}.pt"
            torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
            run.saved(step, path)
            [old.unlink() for old in out.glob("step-*.pt") if old != path and not run.keeps(old)]
        if stop or step == steps:
            break
        batch = torch.stack([data[i : i + 64] for i in torch.randint(len(data) - 64, (8,))])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step(), optimizer.zero_grad()
print(run.trajectory.table(), "The best checkpoint:", run.selected, sep="\n")
