"""The probes for models: one probe of token ids for all models, or one of the same documents for each tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ib_callback.checkpoints.load import Loading
from ib_callback.checkpoints.place import Checkpoint, Tell
from ib_callback.checkpoints.tokenizers import (
    load_tokenizer,
    quick_tokenizer_of,
    special_ids,
    there_and_back,
    tokenizer_of,
)
from ib_callback.common.errors import ProbeError
from ib_callback.measuring.settings import FeatureProbes
from ib_callback.probe.probe import Probe
from ib_callback.probe.several_tokenizers import texts_of

_TULU = "tulu"
# Smallest share of neighbouring ids that must survive decoding and encoding. For 40 texts and three tokenizers it was
# 99.9 to 100 % with the right tokenizer, and 46 to 88 % with another one.
_COMES_BACK = 0.95
_SEQUENCES_ASKED = 64


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The requested probes.

    Attributes:
        probe: the file of a probe with the same token ids for all models.
        documents: instead of `probe`: "c4", "tulu", "builtin" or a file; see
            `ib_callback.probe.several_tokenizers.texts_of`.
        features: "FILE" or "tulu", optionally with "NAME=" in front: probes with labels, or preference pairs.
        num_sequences, max_length: size of probes that are made here.
        text_column: column with the text, for a file of documents.
        tokenizer: the tokenizer for all models; None: each model has its own.
    """

    probe: str | None = None
    documents: str | None = None
    features: tuple[str, ...] = ()
    num_sequences: int = 512
    max_length: int = 512
    text_column: str = "text"
    tokenizer: str | None = None


@dataclass(frozen=True)
class Material:
    """The probe of a model, and its feature probes."""

    probe: Probe
    features: FeatureProbes


def material_for(checkpoints: Iterable[Checkpoint], asked: Asked, loading: Loading, tell: Tell) -> dict[str, Material]:
    """The probes of each model, by its name.

    A document is used only if it is long enough under the tokenizers of all these models (`Probe.for_tokenizers`). So
    pass all models at once, even if only some of them are measured. Preference pairs are written as `Role: content` for
    all models, whatever their chat templates. So a base model and its post-trained version are measured on the same
    texts.

    Raises:
        ProbeError: neither a probe nor documents are requested, or both; they cannot be read; or a model has no
            tokenizer.
    """
    if (asked.probe is None) == (asked.documents is None):
        raise ProbeError(
            "expected either --probe FILE or --documents FILE|c4|tulu|builtin, which say what text to measure on"
        )
    first: dict[str, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        first.setdefault(checkpoint.model, []).append(checkpoint)
    whole = None if asked.probe is None else Probe.load(asked.probe)
    if whole is not None:
        _check_tokenizers(whole, first, asked, loading)
    sources = dict.fromkeys(map(_source, asked.features))
    loaded = {source: Probe.load(source) for source in sources if Path(source).suffix == ".safetensors"}
    if whole is not None and len(loaded) == len(sources):
        return dict.fromkeys(first, Material(whole, _together(asked.features, loaded)))
    tokenizers, of_model = _tokenizers(first, asked, loading)
    several = f" with {len(tokenizers)} tokenizers" if len(tokenizers) > 1 else ""
    if whole is None:
        assert asked.documents is not None
        tell(f"making the probe of {asked.documents}{several}")
        texts = texts_of(asked.documents, text_column=asked.text_column)
        sizes: dict[str, Any] = {"num_sequences": asked.num_sequences, "max_length": asked.max_length}
        name = Path(asked.documents).stem
        probes = Probe.for_tokenizers(texts, tokenizers, name=name, min_length=min(16, asked.max_length), **sizes)
    else:
        probes = dict.fromkeys(tokenizers, whole)
    found = {}
    for key, tokenizer in tokenizers.items():
        made = dict(loaded)
        for source in sources:
            if source not in loaded:
                tell(f"making the feature probe of {source}{several and f', for {key}'}")
                made[source] = _pairs(source, tokenizer, asked)
        found[key] = Material(probes[key], _together(asked.features, made))
    return {model: found[key] for model, key in of_model.items()}


def _check_tokenizers(probe: Probe, models: dict[str, list[Checkpoint]], asked: Asked, loading: Loading) -> None:
    """Check that the token ids of a probe come from each model's tokenizer, if the model has one.

    If a tokenizer decodes its own ids and encodes the text again, it gets the same ids. With ids of another tokenizer
    it does not, because it joins neighbouring tokens in another way.

    Raises:
        ProbeError: the ids come from another tokenizer.
    """
    for model, checkpoints in models.items():
        try:
            tokenizer = (
                quick_tokenizer_of(checkpoints[0], trust_remote_code=loading.trust_remote_code)
                if asked.tokenizer is None
                else load_tokenizer(asked.tokenizer)
            )
            share = None if tokenizer is None else _share_that_comes_back(probe, tokenizer)
        except Exception:  # without a tokenizer there is no check; a probe of ids does not need one
            continue
        if share is not None and share < _COMES_BACK:
            raise ProbeError(
                f"--probe {asked.probe}: expected ids of the tokenizer of {model}, got ids of another tokenizer "
                f"({probe.tokenizer}). When their text is tokenised again, only {share:.0%} of the pairs of "
                "neighbouring ids stay the same. Give --documents FILE instead, and each model's tokenizer makes its "
                "own probe. Or name the right tokenizer of the model with --tokenizer"
            )


def _share_that_comes_back(probe: Probe, tokenizer: Any) -> float | None:
    """The share of pairs of neighbouring ids, in some sequences, that survives decoding and encoding.

    None if there are no pairs, or if the probe was not made from text, because made-up ids say nothing.
    """
    if probe.tokenizer is None:
        return None
    special, same, total = special_ids(tokenizer), 0, 0
    for ids, mask in list(zip(probe.input_ids, probe.attention_mask, strict=True))[:_SEQUENCES_ASKED]:
        row = [token for token in ids[mask].tolist() if token not in special]
        before, after = (Counter(pairwise(each)) for each in (row, there_and_back(tokenizer, row)))
        same += (before & after).total()
        total += before.total()
    return same / total if total else None


def _tokenizers(
    models: dict[str, list[Checkpoint]], asked: Asked, loading: Loading
) -> tuple[dict[str, Any], dict[str, str]]:
    """The different tokenizers, by the name of the first model that has each; and which of them each model has."""
    if asked.tokenizer is not None:
        given = _without_template(load_tokenizer(asked.tokenizer))
        return {next(iter(models)): given}, dict.fromkeys(models, next(iter(models)))
    tokenizers: dict[str, Any] = {}
    known: dict[str, str] = {}
    of_model = {}
    for model, checkpoints in models.items():
        tokenizer = _without_template(_first_of(checkpoints, loading))
        backend = getattr(tokenizer, "backend_tokenizer", None)
        key = f"{type(tokenizer).__name__} {model if backend is None else backend.to_str()}"
        if key not in known:
            known[key] = model
            tokenizers[model] = tokenizer
        of_model[model] = known[key]
    return tokenizers, of_model


def _first_of(checkpoints: list[Checkpoint], loading: Loading) -> Any:
    """The tokenizer of the first checkpoint of a model that has one; some checkpoints may be broken."""
    for checkpoint in checkpoints:
        try:
            return tokenizer_of(checkpoint, gguf=loading.gguf, trust_remote_code=loading.trust_remote_code)
        except Exception:
            if checkpoint is checkpoints[-1]:
                raise
    raise AssertionError


def _without_template(tokenizer: Any) -> Any:
    if getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = None
    return tokenizer


def _source(text: str) -> str:
    """The text without "NAME=" in front."""
    return text.partition("=")[2] or text


def _together(features: tuple[str, ...], probes: dict[str, Probe]) -> FeatureProbes:
    """Feature probes in the form that a meter takes: by name if names were given."""
    names = [text.partition("=")[0] if "=" in text else "" for text in features]
    if not any(names):
        return [probes[text] for text in features]
    if not all(names) or len(set(names)) < len(names):
        raise ProbeError("--feature-probe: expected a different name for each of several probes, as NAME=FILE")
    return {name: probes[_source(text)] for name, text in zip(names, features, strict=True)}


def _pairs(source: str, tokenizer: Any, asked: Asked) -> Probe:
    sizes: dict[str, Any] = {"num_sequences": asked.num_sequences, "max_length": asked.max_length}
    if source == _TULU:
        return Probe.from_tulu(tokenizer, **sizes)
    return Probe.from_preferences(Path(source), tokenizer, name=Path(source).stem, **sizes)
