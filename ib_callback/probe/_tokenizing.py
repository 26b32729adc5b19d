"""One call for tokenizers of every kind: it turns texts into ids, cut to a length, and says where they come from."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any, NamedTuple

import numpy as np

from ib_callback.common.errors import ProbeError

# A text on which tokenizers differ: words, digits, white space, accents, other scripts, special tokens.
_SAMPLE = "Tell me: what is 12 + 345?\n\n\tÜber Café 北京 🙂 don't  <|endoftext|> </s> [SEP] <unk>"


class Encoded(NamedTuple):
    """One encoded text: ids [n] int32; on request, and if known, offsets [n, 2] in characters and special [n] bool.

    special: true for tokens that the tokenizer added to the text.
    """

    ids: np.ndarray
    offsets: np.ndarray | None
    special: np.ndarray | None


class Encoder:
    """Turns a text into ids, cut to `max_length`. It uses a copy, so the settings of the given tokenizer do not change.

    Args:
        tokenizer: of transformers (fast or slow), or a `tokenizers.Tokenizer`.
        max_length: largest number of tokens of a text; None: no limit.

    Raises:
        TypeError: `tokenizer` is not a tokenizer.
        ProbeError: the tokenizer draws at random. When called: the text is not valid Unicode, or the special tokens
            alone are more than `max_length`, so the tokenizer cannot cut to it.
    """

    def __init__(self, tokenizer: Any, max_length: int | None) -> None:
        self._max_length = max_length
        self._raw = _is_raw(tokenizer)
        if not self._raw and not (callable(tokenizer) and hasattr(tokenizer, "model_max_length")):
            raise TypeError(
                "tokenizer: expected a transformers tokenizer, e.g. AutoTokenizer.from_pretrained(...), or a "
                f"tokenizers.Tokenizer, got {type(tokenizer).__name__}. From a processor, pass its .tokenizer. If you "
                "tokenise texts in another way, use Probe.from_tokens."
            )
        backend = _backend(tokenizer)
        dropout = getattr(getattr(backend, "model", None), "dropout", None)
        if dropout:
            raise ProbeError(
                f"tokenizer: expected one that gives the same ids each time, got one with dropout={dropout}, so the "
                "probe could not be built again. Set .model.dropout = None on a copy of the tokenizers.Tokenizer."
            )
        self.has_offsets = self._raw or bool(getattr(tokenizer, "is_fast", False))
        self._tokenizer = tokenizer if backend is None else copy.deepcopy(tokenizer)
        if self._raw:
            direction = (tokenizer.truncation or {}).get("direction", "right")
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            if max_length is not None:
                self._tokenizer.enable_truncation(max_length, direction=direction)

    def __call__(self, text: str, *, places: bool = False, special_tokens: bool = True) -> Encoded:
        """Encode a text.

        Args:
            text: what is to become a sequence.
            places: also say where in the text tokens come from, if the tokenizer knows.
            special_tokens: add the tokenizer's default special tokens.
        """
        try:
            encoded = self._encode(text, places, special_tokens)
        except TypeError as error:  # `tokenizers` raises it as if the text were not a string
            raise ProbeError(
                f"texts: expected valid Unicode, got {text[:40]!r}, perhaps because of half a surrogate pair. "
                "Clean it first: text.encode('utf-8', 'replace').decode()."
            ) from error
        if self._max_length is not None and len(encoded.ids) > self._max_length:
            raise ProbeError(
                f"max_length: expected room for the tokenizer's special tokens and some text, got {self._max_length}, "
                "which is too small for this tokenizer. Raise max_length."
            )
        return encoded

    def _encode(self, text: str, places: bool, special_tokens: bool) -> Encoded:
        if self._raw:
            raw = self._tokenizer.encode(text, add_special_tokens=special_tokens)
            return _encoded(raw.ids, raw.offsets, raw.special_tokens_mask)
        encoding = self._tokenizer(
            text,
            truncation=self._max_length is not None,
            max_length=self._max_length,
            padding=False,
            add_special_tokens=special_tokens,
            return_attention_mask=False,
            return_offsets_mapping=places and self.has_offsets,
            return_special_tokens_mask=places,
            verbose=False,
        )
        return _encoded(encoding["input_ids"], encoding.get("offset_mapping"), encoding.get("special_tokens_mask"))


def bytes_predicted(text: str, encoded: Encoded) -> int | None:
    """UTF-8 bytes of the text after the first token, up to the end of the last; None if places of tokens are unknown.

    White space between tokens counts, whether or not the tokenizer assigns it to a token. If the tokenizer added the
    first token, the text begins with the next one. If a character was cut into several tokens, the tokenizer reports
    all of it for each of them. Such a character counts as a whole at the last token, and not at all at the first.
    """
    if encoded.offsets is None or encoded.special is None:
        return None
    own = encoded.offsets[~encoded.special]
    if not len(own):
        return 0
    begin = own[0, 0] if encoded.special[0] else own[0, 1]
    return len(text[begin : own[-1, 1]].encode())


def _is_raw(tokenizer: Any) -> bool:
    """Whether `tokenizer` is a `tokenizers.Tokenizer` rather than a tokenizer of transformers."""
    return hasattr(tokenizer, "enable_truncation") and hasattr(tokenizer, "encode")


def _backend(tokenizer: Any) -> Any:
    """The `tokenizers.Tokenizer` inside a fast tokenizer; None for a slow one."""
    return tokenizer if _is_raw(tokenizer) else getattr(tokenizer, "backend_tokenizer", None)


def describe(tokenizer: Any) -> str:
    """Class, name if it has one, and number of entries of a tokenizer."""
    kind = type(tokenizer).__name__
    if hasattr(tokenizer, "get_vocab_size"):
        return f"tokenizers.{kind}, {tokenizer.get_vocab_size()} entries"
    name = getattr(tokenizer, "name_or_path", "")
    return f"{kind} {name}, {len(tokenizer)} entries" if name else f"{kind}, {len(tokenizer)} entries"


def tokenizer_hash(tokenizer: Any) -> str:
    """Hex SHA-256 of everything that decides which ids a tokenizer gives. Its name and origin do not count.

    For a fast tokenizer the hash covers its serialised form, without truncation and padding, which callers set. For a
    slow one it covers the vocabulary, the SentencePiece model and the special tokens. The ids of a sample text stand
    for behaviour that is in code.
    """
    parts: dict[str, Any] = {"class": type(tokenizer).__name__}
    inner = _backend(tokenizer)
    model: Any = getattr(tokenizer, "sp_model", None)
    if inner is not None:
        parts["backend"] = json.loads(inner.to_str()) | {"truncation": None, "padding": None}
    elif hasattr(tokenizer, "get_vocab"):
        parts["vocabulary"] = sorted(tokenizer.get_vocab().items())
        parts["special"] = {key: str(token) for key, token in getattr(tokenizer, "special_tokens_map", {}).items()}
    if hasattr(model, "serialized_model_proto"):
        parts["model"] = hashlib.sha256(model.serialized_model_proto()).hexdigest()
    if _is_raw(tokenizer):
        parts["side"] = (tokenizer.truncation or {}).get("direction", "right")
        parts["split"] = getattr(tokenizer, "encode_special_tokens", False)
    else:
        parts["side"] = getattr(tokenizer, "truncation_side", "right")
        # Whether special tokens that occur in a text are treated as text. The serialised form does not hold this.
        parts["split"] = bool(getattr(tokenizer, "split_special_tokens", False))
    parts["sample"] = Encoder(tokenizer, None)(_SAMPLE).ids.tolist()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def template_hash(tokenizer: Any) -> str:
    """Hex SHA-256 of everything that decides what a chat template writes; empty without a template.

    This includes special tokens that the template names (`{{ bos_token }}`), because they can differ from those in the
    vocabulary.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return ""
    special = getattr(tokenizer, "special_tokens_map", {})
    return hashlib.sha256(json.dumps([template, special], sort_keys=True, default=str).encode()).hexdigest()


def _encoded(ids: Any, offsets: Any, special: Any) -> Encoded:
    return Encoded(
        np.array(ids, np.int32),
        None if offsets is None else np.array(offsets, np.int64).reshape(-1, 2),
        None if special is None else np.array(special, bool),
    )
