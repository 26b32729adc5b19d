"""HuggingFace's Trainer with the callback added: it measures, stops on a plateau and keeps the best checkpoint.

    python examples/hf_trainer.py

trains a small GPT-2 from scratch for some seconds on the CPU and needs no network. In a real run, use
`Probe.from_c4(tokenizer)`: its text is held out of the usual training text, and is the same for everybody.
"""

from __future__ import annotations

import argparse

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import ib_callback as ib
from ib_callback.hf import IBCallback
from ib_callback.probe import builtin_text

LENGTH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--output-dir", default="ib_example")
    options = parser.parse_args()

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=builtin_text.default_tokenizer(), eos_token=builtin_text.END_OF_TEXT
    )
    training_texts, _ = builtin_text.split()
    ids = [token for text in tokenizer(training_texts[:500])["input_ids"] for token in (*text, tokenizer.eos_token_id)]
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)

    shape = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": LENGTH}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **shape))
    probe = ib.Probe.builtin(tokenizer, num_sequences=64, max_length=LENGTH)

    callback = IBCallback(
        probe,
        every_n_steps=ib.logarithmic(),
        # Models as small as this one never compress. For a real one, leave out arm= and select_from=.
        early_stopping=ib.PlateauStopping("token/expressivity_above_null", mode="max", arm="fit"),
        select="optimality",
        select_from="fit",
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output_dir,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=2e-3,
            logging_steps=10,
            save_steps=20,
            save_total_limit=2,  # the last one and the best one
            report_to="none",  # "wandb" adds the numbers and the information plane to the Trainer's run
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[callback],  # the added line
    )
    trainer.train()

    print(callback.trajectory.table())
    print(f"\nThe best checkpoint: {callback.selected and callback.selected.path}")
    print(f"All of them: ib-callback select {options.output_dir} --by optimality --from fit")


if __name__ == "__main__":
    main()
