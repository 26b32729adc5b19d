"""Trainer.hyperparameter_search with optuna: each trial is a run of its own, with its files in run-0, run-1, …"""

import _tiny
import optuna
from transformers import Trainer, TrainingArguments, default_data_collator

import ib_callback as ib
from ib_callback.hf import IBCallback


def space(trial: optuna.Trial) -> dict[str, float]:
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)}


rows = _tiny.rows()
callback = IBCallback(ib.Probe.builtin(_tiny.tokenizer(), num_sequences=32, max_length=64), every_n_steps=5)
arguments = TrainingArguments(
    output_dir="ib_out/hyperparameter_search",
    max_steps=10,
    eval_strategy="steps",
    eval_steps=10,
    use_cpu=True,
)
data = {"train_dataset": rows[32:], "eval_dataset": rows[:32], "data_collator": default_data_collator}
trainer = Trainer(args=arguments, model_init=lambda _: _tiny.model(), **data, callbacks=[callback])
sampler = optuna.samplers.TPESampler(seed=0)
print(trainer.hyperparameter_search(space, n_trials=2, direction="minimize", backend="optuna", sampler=sampler))
