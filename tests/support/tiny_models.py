"""A small model and a probe for it, for tests without a trainer."""

import torch
import transformers as tf

import ib_callback as ib


def make_probe(num_sequences=10, length=16, highest=40, **keywords):
    ids = torch.randint(2, highest, (num_sequences, length), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(length) < torch.tensor([[length - i % 4] for i in range(num_sequences)])
    return ib.Probe.from_tokens(ids, mask, **keywords)


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"vocab_size": 40, "max_position_embeddings": 24, "pad_token_id": None, "attention_dropout": 0.1} | sizes
    return tf.LlamaForCausalLM(tf.LlamaConfig(**(config | changes)))


def numbers(measurement):
    return {k: v for k, v in measurement.to_dict().items() if k != "seconds"}
