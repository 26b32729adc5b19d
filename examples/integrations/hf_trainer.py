"""HuggingFace's Trainer: gradient accumulation, evaluation, and the best checkpoint loaded at the end."""

import _tiny
from transformers import Trainer, TrainingArguments, default_data_collator

import ib_callback as ib
from ib_callback.hf import IBCallback

rows = _tiny.rows()
callback = IBCallback(
    ib.Probe.builtin(_tiny.tokenizer(), num_sequences=32, max_length=64), every_n_steps=5, select_from=0
)
arguments = TrainingArguments(
    output_dir="ib_out/hf_trainer",
    max_steps=20,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=2e-3,
    eval_strategy="steps",
    eval_steps=5,
    save_steps=5,
    load_best_model_at_end=True,
    metric_for_best_model="ib_selectable_loss",  # the model's loss on the probe
    greater_is_better=False,
    use_cpu=True,
)
data = {"train_dataset": rows[32:], "eval_dataset": rows[:32], "data_collator": default_data_collator}
trainer = Trainer(_tiny.model(), arguments, **data, callbacks=[callback])
trainer.train()
print(callback.trajectory.table())
