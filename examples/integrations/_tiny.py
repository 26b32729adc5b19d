"""What the examples beside this file share: a tokenizer, a tiny model, text and preference pairs, all offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ib_callback.probe import builtin_text

LENGTH = 64


def tokenizer() -> PreTrainedTokenizerFast:
    """The small tokenizer of the built-in text."""
    end = builtin_text.END_OF_TEXT
    return PreTrainedTokenizerFast(
        tokenizer_object=builtin_text.default_tokenizer(), bos_token=end, eos_token=end, pad_token=end
    )


def model(vocabulary: int = 4096) -> LlamaForCausalLM:
    """A Llama of two layers with random weights, which are the same at each call."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, pad_token_id=0, **shape))


class PlainTorch(torch.nn.Module):
    """A transformer of plain torch that predicts the next token; its weights are the same at each call."""

    def __init__(self, vocabulary: int = 4096) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(vocabulary, 32), torch.nn.Linear(32, vocabulary)
        self.blocks = torch.nn.ModuleList(torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True) for _ in "ab")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits, shape (texts, tokens, vocabulary)."""
        x, mask = self.embed(ids), torch.nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def texts(count: int = 200) -> list[str]:
    """Training text. `Probe.builtin` holds other documents."""
    return [text[:400] for text in builtin_text.split()[0][:count]]


def token_rows(count: int = 400) -> torch.Tensor:
    """Training text as rows of LENGTH token ids, shape (rows, LENGTH)."""
    ids = torch.tensor([i for text in tokenizer()(texts(count))["input_ids"] for i in text])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def rows(count: int = 400) -> list[dict[str, torch.Tensor]]:
    """Training text as rows for HuggingFace's Trainer."""
    return [{"input_ids": row, "labels": row} for row in token_rows(count)]


def pairs(count: int, skip: int = 0) -> list[dict[str, str]]:
    """Preference pairs: the true continuation of a text is preferred to the same words in reverse order."""
    found = []
    for text in builtin_text.split()[0][skip : skip + count]:
        words = text.split()
        prompt, answer = words[:10], words[10:40]
        found.append({"prompt": " ".join(prompt), "chosen": " " + " ".join(answer),
                      "rejected": " " + " ".join(answer[::-1])})  # fmt: skip
    return found


def olmo_core(work_dir: str) -> tuple[Any, Any]:
    """A train module of OLMo-core with a model of four layers, and a data loader of the training text."""
    from olmo_core.data import NumpyDataLoaderConfig, NumpyFSLDatasetConfig, TokenizerConfig
    from olmo_core.nn.transformer import TransformerConfig
    from olmo_core.optim import AdamWConfig
    from olmo_core.train.train_module import TransformerTrainModuleConfig

    torch.manual_seed(0)
    Path(work_dir).mkdir(parents=True, exist_ok=True)
    token_rows().numpy().astype("uint16").tofile(f"{work_dir}/tokens.npy")  # OLMo-core reads it without a header
    data = NumpyFSLDatasetConfig(
        paths=[f"{work_dir}/tokens.npy"],
        sequence_length=LENGTH,
        tokenizer=TokenizerConfig(4096, 0, 0),
        work_dir=work_dir,
    )
    loader = NumpyDataLoaderConfig(global_batch_size=8 * LENGTH, seed=0, work_dir=work_dir).build(data.build())
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=4 * LENGTH, max_sequence_length=LENGTH, optim=AdamWConfig(lr=2e-3)
    )
    net = TransformerConfig.olmo2_1M(vocab_size=4096).build(init_device="cpu")
    return module.build(net, device=torch.device("cpu")), loader
