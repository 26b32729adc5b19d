"""HuggingFace's Trainer on two processes, here of a CPU.

accelerate launch --multi_gpu --num_processes 2 accelerate_launch.py
"""

import _tiny
from transformers import Trainer, TrainingArguments, default_data_collator

import ib_callback as ib
from ib_callback.hf import IBCallback

callback = IBCallback(ib.Probe.builtin(_tiny.tokenizer(), num_sequences=32, max_length=64), every_n_steps=5)
arguments = TrainingArguments(
    output_dir="ib_out/accelerate_launch",
    max_steps=15,
    per_device_train_batch_size=4,
    learning_rate=2e-3,
    ddp_backend="gloo",
    use_cpu=True,
)
data = {"train_dataset": _tiny.rows(), "data_collator": default_data_collator}
trainer = Trainer(_tiny.model(), arguments, **data, callbacks=[callback])
assert arguments.world_size == 2, "start it with `accelerate launch`"
trainer.train()
if trainer.is_world_process_zero():
    print(callback.trajectory.table())
