"""TRL's GRPOTrainer: text is generated and rewarded while the callback follows the policy."""

import _tiny
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import ib_callback as ib
from ib_callback.hf import IBCallback

tokenizer = _tiny.tokenizer()
callback = IBCallback(ib.Probe.builtin(tokenizer, num_sequences=32, max_length=64), every_n_steps=2, from_trained=True)
trainer = GRPOTrainer(
    _tiny.model(),
    reward_funcs=lambda completions, **_: [float(text.count("e")) for text in completions],
    args=GRPOConfig(
        output_dir="ib_out/trl_grpo",
        max_steps=4,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=16,
        learning_rate=1e-3,
        use_cpu=True,
    ),
    train_dataset=Dataset.from_list([{"prompt": pair["prompt"]} for pair in _tiny.pairs(16)]),
    processing_class=tokenizer,
    callbacks=[callback],
)
trainer.train()
print(callback.trajectory.table())
