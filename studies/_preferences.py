"""Preference pairs as the studies use them: a short end of the prompt, then both answers to one length."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ib_callback as ib

PROMPT, LENGTH = 32, 128


def read_pairs(data: Path) -> list[dict[str, Any]]:
    """Rows with `prompt`, `chosen`, `rejected` of `preferences_sample.jsonl.gz` in a folder."""
    with gzip.open(data / "preferences_sample.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def probe_of(pairs: Sequence[dict[str, Any]], tokenizer: Any, name: str = "pairs") -> ib.Probe:
    """Of each pair the last 32 tokens of the prompt and what fits of the answers into 128 tokens.

    Args:
        pairs: as read.
        tokenizer: of transformers.
        name: of the probe.
    """
    rows = []
    for pair in pairs:
        ids = tokenizer(pair["prompt"], add_special_tokens=False)["input_ids"][-PROMPT:]
        prompt = tokenizer.decode(ids).strip() + "\n\n"
        rows.append({"prompt": prompt, **{side: pair[side].strip() for side in ("chosen", "rejected")}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pairs that are alike within their first 128 tokens are left out
        return ib.Probe.from_preferences(rows, tokenizer, num_sequences=None, max_length=LENGTH, name=name)
