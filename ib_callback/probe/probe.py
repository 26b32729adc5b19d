"""The probe: a frozen, tokenised, held-out sample of text on which a model is measured again and again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ib_callback.common.errors import ProbeError
from ib_callback.probe import _file, builtin_text
from ib_callback.probe._checks import check_label_names, check_name, fingerprint, normalise
from ib_callback.probe._constructors import FromDatasets, warn_caller
from ib_callback.probe._datasets import shortfall
from ib_callback.probe._labels import LabelReader
from ib_callback.probe._texts import collect, documents
from ib_callback.probe._tokenizing import describe

if TYPE_CHECKING:
    from ib_callback.probe.overlap import Overlap


class Probe(FromDatasets):
    """A frozen sample of N sequences of up to S tokens, one document each.

    Two measurements can be compared only if they are of the same probe, so a probe never changes: its
    attributes cannot be assigned, its tensors are copies, and `verify` notices edits in place.

    Attributes:
        input_ids: [N, S] long, on the CPU; 0 at padding.
        attention_mask: [N, S] bool, true at real tokens. Padding is at the ends of a sequence, not within.
        labels: {name: [N, S] long} in the order of the names; -1 where a position has no label.
        label_names: {name: the names of its numbers from 0 on}, of labels that have names.
        name: short name, for messages and files.
        fingerprint: hex SHA-256 over ids, mask and labels, with their shapes and the labels' names. What
            padding holds makes no difference, nor does the platform; nor do the names of the labels' numbers.
        source: how the probe was made, as strings by name.
        tokenizer: class, name and size of the tokenizer; None if it is not known.

    Examples:
        >>> probe = Probe.from_tokens([[5, 6, 7], [8, 9, 0]], [[1, 1, 1], [1, 1, 0]])
        >>> probe
        Probe('tokens', 2 sequences of up to 3 tokens, fingerprint ...)
        >>> probe.num_tokens
        5
        >>> other_padding = Probe.from_tokens([[5, 6, 7], [8, 9, 50256]], [[1, 1, 1], [1, 1, 0]])
        >>> other_padding.fingerprint == probe.fingerprint
        True
    """

    __slots__ = ("_fingerprint", "_input_ids", "_label_names", "_labels", "_mask", "_name", "_source", "_tokenizer")

    def __init__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        labels: Mapping[str, Any] | None = None,
        label_names: Mapping[str, Sequence[str]] | None = None,
        name: str,
        source: Mapping[str, str],
        tokenizer: str | None = None,
    ) -> None:
        check_name(name)
        self._input_ids, self._mask, self._labels = normalise(input_ids, attention_mask, labels)
        self._label_names = check_label_names(label_names, self._labels)
        self._name = name
        self._source = dict(source)
        self._tokenizer = tokenizer
        self._fingerprint = fingerprint(self._input_ids, self._mask, self._labels)

    @classmethod
    def from_tokens(
        cls,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        labels: Mapping[str, Any] | None = None,
        label_names: Mapping[str, Sequence[str]] | None = None,
        name: str = "tokens",
    ) -> Probe:
        """A probe of text that is tokenised already.

        Args:
            input_ids: [N, S] integers: tensor, array or nested lists. One document a sequence, not packed.
            attention_mask: [N, S], true or 1 at real tokens; None: all are real.
            labels: {name: [N, S] integers}, -1 where a position has none.
            label_names: {name of a label: names of its numbers, from 0 on}.
            name: short name, for messages and files.

        Raises:
            ProbeError: wrong shapes or dtypes, negative ids at real tokens, labels under -1, a sequence with
                padding amid its tokens or without a real token, or no sequence at all.
        """
        source = {"constructor": "from_tokens"}
        return cls(input_ids, attention_mask, labels=labels, label_names=label_names, name=name, source=source)

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        tokenizer: Any,
        *,
        num_sequences: int | None = None,
        max_length: int = 512,
        min_length: int = 16,
        labels: Mapping[str, Iterable[Any]] | None = None,
        name: str = "texts",
    ) -> Probe:
        """A probe of the first texts that are long enough, one document a sequence, cut at `max_length`.

        Special tokens are those that the tokenizer adds by default, and they count. The sequences are padded
        on the right with id 0; no pad token is needed. The tokenizer's settings stay as they are.

        Args:
            texts: documents; read in order, and no further than needed.
            tokenizer: of transformers (fast or slow), or a `tokenizers.Tokenizer`.
            num_sequences: how many to take; None: all.
            max_length: most tokens of a sequence.
            min_length: texts with fewer tokens are skipped.
            labels: {name: a label or None for each text, skipped ones too}. Integers or strings, which are
                numbered by the alphabet; a text's label becomes that of all its tokens, None is no label. Or for
                each text a list of spans `(start, end, label)`, in characters: see `from_dataset`.
            name: short name, for messages and files.

        Raises:
            ProbeError: no text is long enough, or lengths or labels cannot be used.
            TypeError: `texts` is a single string or holds something else, or `tokenizer` is not a tokenizer.

        Warns:
            UserWarning: fewer than `num_sequences` texts are long enough.
        """
        collected = collect(
            documents(texts, labels),
            tokenizer,
            num_sequences=num_sequences,
            max_length=max_length,
            min_length=min_length,
            readers=[LabelReader(feature) for feature in labels or {}],
        )
        source = {
            "constructor": "from_texts",
            "num_sequences": str(num_sequences),
            "max_length": str(max_length),
            "min_length": str(min_length),
            "texts_read": str(collected.texts_read),
            "texts_too_short": str(collected.texts_read - len(collected.input_ids)),
        }
        probe = cls(
            collected.input_ids,
            collected.attention_mask,
            labels=collected.labels,
            label_names=collected.label_names,
            name=name,
            source=source,
            tokenizer=describe(tokenizer),
        )
        warn_caller(shortfall(probe, num_sequences))
        return probe

    @staticmethod
    def for_tokenizers(texts: Iterable[str], tokenizers: Mapping[str, Any], **options: Any) -> dict[str, Probe]:
        """A probe for each of several tokenizers, all of the same documents, for models of different families.

        Args:
            texts: documents; one counts if it is long enough under every tokenizer.
            tokenizers: by a name of your choice.
            **options: `num_sequences`, `max_length`, `min_length`, `labels` and `name`, as for `from_texts`; see
                `ib_callback.probe._several_tokenizers.probes_for`.
        """
        from ib_callback.probe._several_tokenizers import probes_for  # it needs this class

        return probes_for(texts, tokenizers, **options)

    @classmethod
    def builtin(cls, tokenizer: Any = None, *, num_sequences: int = 256, max_length: int = 128) -> Probe:
        """A probe that needs no network: documentation text that comes with Python, NumPy, SciPy and torch.

        The text depends on the installed versions, which `source` records; to measure on the same probe
        elsewhere, save it. A model trained on `builtin_text.split()[0]` has not seen the text of the probe.

        Args:
            tokenizer: as for `from_texts`; None: a small byte-level BPE of 4096 entries, trained on the
                training part of the text when first needed.
            num_sequences: at most 512 are there.
            max_length: most tokens of a sequence. With the small BPE all sequences reach 128 tokens.

        Raises:
            ImportError: the package `tokenizers` is missing.
            ProbeError: the installation has no source files to take the text from.

        Warns:
            UserWarning: fewer than `num_sequences` documents are there.
        """
        held_out = builtin_text.split()[1]
        collected = collect(
            documents(held_out, None),
            builtin_text.default_tokenizer() if tokenizer is None else tokenizer,
            num_sequences=num_sequences,
            max_length=max_length,
            min_length=min(16, max_length),
        )
        source = {
            "constructor": "builtin",
            "corpus": builtin_text.CORPUS,
            "corpus_fingerprint": builtin_text.corpus_fingerprint(),
            "num_sequences": str(num_sequences),
            "max_length": str(max_length),
            "min_length": str(min(16, max_length)),
            "texts_read": str(collected.texts_read),
            "texts_too_short": str(collected.texts_read - len(collected.input_ids)),
            **builtin_text.versions(),
        }
        probe = cls(
            collected.input_ids,
            collected.attention_mask,
            name="builtin",
            source=source,
            tokenizer=builtin_text.TOKENIZER if tokenizer is None else describe(tokenizer),
        )
        warn_caller(shortfall(probe, num_sequences))
        return probe

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Probe:
        """Read a probe file and verify its content against its fingerprint.

        Raises:
            ProbeError: not a probe file, cut short, damaged, changed, or of a newer format.
            FileNotFoundError: there is no such file.
            ImportError: the package `safetensors` is missing.
        """
        content = _file.read(path)
        try:
            probe = cls(
                content.input_ids,
                content.attention_mask,
                labels=content.labels,
                label_names=content.label_names,
                name=content.name,
                source=content.source,
                tokenizer=content.tokenizer,
            )
        except ProbeError as error:
            raise ProbeError(f"{path}: its content is not a probe: {error}") from error
        if probe.fingerprint != content.fingerprint:
            raise ProbeError(
                f"{path}: its padding holds ids or labels, which no probe that was saved has. "
                "Make the probe again with Probe.from_tokens and save it."
            )
        return probe

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the probe to one safetensors file, in one step; a file that is there already is replaced.

        Raises:
            ProbeError: the probe was changed in place.
            ImportError: the package `safetensors` is missing.
        """
        self.verify()
        _file.write(
            path,
            _file.Content(
                self._input_ids,
                self._mask,
                self._labels,
                self._label_names,
                self._name,
                self._tokenizer,
                self._source,
                self._fingerprint,
            ),
        )

    def verify(self) -> None:
        """Recompute the fingerprint, and refuse content that was edited in place.

        Raises:
            ProbeError: ids, mask or labels were changed in place since the probe was made.
        """
        found = fingerprint(self._input_ids, self._mask, self._labels)
        if found != self._fingerprint:
            raise ProbeError(
                f"probe {self._name!r} was changed in place: expected fingerprint {self._fingerprint}, "
                f"got {found}. Make a new probe with Probe.from_tokens, and edit clones of the tensors."
            )

    def overlap(self, data: Any, tokenizer: Any = None, **options: Any) -> Overlap:
        """What this probe shares with training text: whole sequences, and runs of 13 tokens.

        Args:
            data: texts, sequences of token ids, one long array of them, or rows such as those of a dataset.
            tokenizer: for texts; that of the probe.
            **options: `text_column`, `n`, `max_texts`; see `ib_callback.probe.overlap.overlap`.
        """
        from ib_callback.probe.overlap import overlap  # it needs this class

        return overlap(self, data, tokenizer, **options)

    @property
    def input_ids(self) -> Tensor:
        """Token ids [N, S], long; 0 at padding."""
        return self._input_ids

    @property
    def attention_mask(self) -> Tensor:
        """True at real tokens [N, S], bool."""
        return self._mask

    @property
    def labels(self) -> Mapping[str, Tensor]:
        """Labels [N, S], long, by name; -1 where a position has none. The mapping is read-only."""
        return MappingProxyType(self._labels)

    @property
    def label_names(self) -> dict[str, tuple[str, ...]]:
        """Names of the numbers of labels, from 0 on, of those labels that have names (a copy)."""
        return dict(self._label_names)

    @property
    def name(self) -> str:
        """Short name, for messages and files."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the content; equal for equal content."""
        return self._fingerprint

    @property
    def source(self) -> dict[str, str]:
        """How the probe was made (a copy)."""
        return dict(self._source)

    @property
    def tokenizer(self) -> str | None:
        """What tokenizer the ids are of, in words; None if that is not known."""
        return self._tokenizer

    @property
    def num_tokens(self) -> int:
        """Number of real tokens."""
        return int(self._mask.sum())

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._input_ids)

    def __repr__(self) -> str:
        labels = f", labels {', '.join(self._labels)}" if self._labels else ""
        return (
            f"Probe({self._name!r}, {len(self)} sequences of up to {self._input_ids.shape[1]} tokens"
            f"{labels}, fingerprint {self._fingerprint[:12]}…)"
        )
