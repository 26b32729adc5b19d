"""A tokenizer whose ids can be told by hand."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors


def word_tokenizer() -> Tokenizer:
    """[CLS] 1, [SEP] 2, the letters a … j 3 … 12, anything else 0; [CLS] and [SEP] are added to each text."""
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2} | {letter: 3 + i for i, letter in enumerate("abcdefghij")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer
