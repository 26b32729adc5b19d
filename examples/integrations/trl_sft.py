"""TRL's SFTTrainer: the callback is the one for HuggingFace's Trainer."""

import _tiny
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import ib_callback as ib
from ib_callback.hf import IBCallback

tokenizer = _tiny.tokenizer()
callback = IBCallback(ib.Probe.builtin(tokenizer, num_sequences=32, max_length=64), every_n_steps=5)
trainer = SFTTrainer(
    _tiny.model(),
    args=SFTConfig(
        output_dir="ib_out/trl_sft",
        max_steps=15,
        per_device_train_batch_size=4,
        max_length=64,
        learning_rate=2e-3,
        use_cpu=True,
    ),
    train_dataset=Dataset.from_dict({"text": _tiny.texts()}),
    processing_class=tokenizer,
    callbacks=[callback],
)
trainer.train()
print(callback.trajectory.table())
