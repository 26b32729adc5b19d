"""TRL's DPOTrainer with a second probe of held-out preference pairs, beside the one of plain text."""

import _tiny
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import ib_callback as ib
from ib_callback.hf import IBCallback

tokenizer = _tiny.tokenizer()
text = ib.Probe.builtin(tokenizer, num_sequences=32, max_length=64)
held_out = ib.Probe.from_preferences(_tiny.pairs(32, skip=100), tokenizer, num_sequences=64, max_length=64)
callback = IBCallback(text, feature_probes=[held_out], every_n_steps=5, from_trained=True)
trainer = DPOTrainer(
    _tiny.model(),
    ref_model=_tiny.model(),  # a model of the hub needs none here: TRL loads it again
    args=DPOConfig(
        output_dir="ib_out/trl_dpo",
        max_steps=10,
        per_device_train_batch_size=4,
        max_length=64,
        learning_rate=1e-3,
        use_cpu=True,
    ),
    train_dataset=Dataset.from_list(_tiny.pairs(100)),
    processing_class=tokenizer,
    callbacks=[callback],
)
trainer.train()
print([point.features["preference"].information for point in callback.trajectory])
