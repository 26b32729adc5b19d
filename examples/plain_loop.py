"""A loop in plain PyTorch that measures, stops on a plateau and keeps the best model: plain_loop.py [STEPS]"""

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import ib_callback as ib
from ib_callback.probe import builtin_text

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400
torch.manual_seed(0)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=builtin_text.default_tokenizer())
data = torch.tensor([i for ids in tokenizer(builtin_text.split()[0][:500])["input_ids"] for i in ids])
shape = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

meter = ib.Meter(ib.Probe.builtin(tokenizer, num_sequences=64, max_length=64))
trajectory, due = ib.Trajectory(), ib.logarithmic(per_decade=8)
# Models as small as this one never compress; for a real one: ib.PlateauStopping() and select_from="compression".
stopping = ib.PlateauStopping("token/expressivity_above_null", mode="max", arm="fit")

for step in range(steps + 1):
    if due(step) or step == steps:
        point = meter.measure(model, step=step)
        trajectory.append(point)
        trajectory.save("ib_trajectory.jsonl")
        decision = stopping.update(point)
        print(point, "|", decision.reason.value)
        if trajectory.best("optimality", select_from="fit") is point:
            torch.save(model.state_dict(), "best.pt")
        if decision.stop:
            break
    batch = torch.stack([data[i : i + 64] for i in torch.randint(len(data) - 64, (8,))])
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(trajectory.table())
