"""Models: real ones from a folder, or random ones by the name of their shape, for values do not change the cost."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from _common import ModelFolder

# Layers and width of random GPT-2 models; heads of 64, GPT-2's vocabulary.
_GPT2 = {"gpt2-128": (4, 128), "gpt2-256": (6, 256), "gpt2-512": (8, 512), "gpt2": (12, 768)}
# Of random Llama models: layers, width, width between, heads, heads of keys and values, vocabulary.
_LLAMA = {
    "llama-tiny": (2, 64, 128, 4, 2, 8192),
    "llama-1b": (16, 2048, 8192, 32, 8, 128_256),  # the shape of Llama 3.2 1B
}
FAMILY = tuple(_GPT2)
RANDOM = (*_GPT2, *_LLAMA)


@dataclass(frozen=True)
class RandomModel:
    """A model with random weights, by the name of its shape."""

    name: str

    def config(self, length: int) -> Any:
        """Of transformers, for sequences of so many tokens."""
        from transformers import GPT2Config, LlamaConfig

        if self.name in _LLAMA:
            layers, width, between, heads, of_keys, vocabulary = _LLAMA[self.name]
            return LlamaConfig(
                vocab_size=vocabulary, hidden_size=width, intermediate_size=between, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=of_keys, max_position_embeddings=max(2048, length),
                tie_word_embeddings=True,
            )  # fmt: skip
        layers, width = _GPT2[self.name]
        return GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, n_positions=max(1024, length))


def parse_model(text: str) -> ModelFolder | RandomModel:
    """For `type=` of an argument: a name of `RANDOM`, or NAME=FOLDER[:FILE]."""
    if text in RANDOM:
        return RandomModel(text)
    try:
        return ModelFolder.parse(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; or one of {', '.join(RANDOM)}") from error


def load(
    spec: ModelFolder | RandomModel, tokenizer: str | None, *, device: str, dtype: str, length: int
) -> tuple[Any, nn.Module]:
    """Tokenizer (None: that of the built-in text) and model, in evaluation mode on its device.

    A random model is made where it will be, in its type, so that a large one takes no memory elsewhere.
    """
    kind = getattr(torch, dtype)
    if isinstance(spec, ModelFolder):
        own, model = spec.load()
        return own, model.to(device, kind)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(spec.config(length), dtype=kind)
    loaded = None if tokenizer is None else AutoTokenizer.from_pretrained(tokenizer)
    return loaded, model.eval()
