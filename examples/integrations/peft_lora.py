"""PEFT: LoRA adapters are trained, and the model is measured with its adapters."""

import _tiny
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, default_data_collator

import ib_callback as ib
from ib_callback.hf import IBCallback

model = get_peft_model(_tiny.model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
callback = IBCallback(
    ib.Probe.builtin(_tiny.tokenizer(), num_sequences=32, max_length=64), every_n_steps=5, from_trained=True
)
trainer = Trainer(
    model,
    TrainingArguments(
        output_dir="ib_out/peft_lora",
        max_steps=15,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        use_cpu=True,
    ),
    train_dataset=_tiny.rows(),
    data_collator=default_data_collator,
    callbacks=[callback],
)
trainer.train()
print(callback.trajectory.table())
