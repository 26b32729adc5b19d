"""The probe: a frozen, tokenised, held-out sample of text. Every measurement of a model uses the same one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ib_callback.common.errors import ProbeError
from ib_callback.probe import _file, builtin_text
from ib_callback.probe._datasets import (
    ReadingOptions,
    SplitOptions,
    check_keywords,
    dataset_content,
    preferences_content,
    remarks,
)
from ib_callback.probe._rows import C4, TULU
from ib_callback.probe._texts import Sizes, texts_content
from ib_callback.probe.content import Content, fingerprint, normalised
from ib_callback.probe.overlap import NGRAM, Overlap, overlap
from ib_callback.probe.several_tokenizers import contents_for

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Probe:
    """A frozen sample of N sequences of up to S tokens, one document each.

    Two measurements can be compared only if they use the same probe. So a probe never changes: its
    attributes cannot be assigned, its tensors are copies, and `verify` notices edits in place.

    Attributes:
        input_ids: [N, S] long, on the CPU; 0 at padding.
        attention_mask: [N, S] bool, true at real tokens. Padding is at the start or end of a sequence, never between
            real tokens.
        labels: {label: [N, S] long}, sorted by label; -1 where a position has no label.
        label_names: {label: names of its values 0, 1, …}, for labels whose values have names.
        name: short name, for messages and files.
        fingerprint: hex SHA-256 over ids, mask and labels, with their shapes and the names of the labels. It is the
            same on every platform. It does not depend on what padding holds, on `label_names` or on `groups`.
        groups: number of the source of each sequence, counted from 0; None if each sequence has a source of its own.
        source: how the probe was made, as strings by name.
        tokenizer: class, name and size of the tokenizer; None if unknown.
        num_bytes: UTF-8 bytes of the text of all real tokens except the first of each sequence; None if unknown.

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

    __slots__ = ("_content", "_fingerprint")

    def __init__(self, content: Content) -> None:
        self._content = normalised(content)
        self._fingerprint = self._found()

    @classmethod
    def _warned(cls, content: Content) -> Probe:
        """Make the probe, and give its warnings at the line that called the public constructor."""
        for message in remarks(content):
            warnings.warn(message, stacklevel=3)
        return cls(content)

    @classmethod
    def from_tokens(
        cls,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        labels: Mapping[str, Any] | None = None,
        label_names: Mapping[str, Sequence[str]] | None = None,
        groups: Iterable[Any] | None = None,
        name: str = "tokens",
        num_bytes: int | None = None,
    ) -> Probe:
        """Make a probe of text that is tokenised already.

        Args:
            input_ids: [N, S] integers: tensor, array or nested lists. One document a sequence, not packed.
            attention_mask: [N, S], true or 1 at real tokens; None: all are real.
            labels: {label: [N, S] integers}, -1 where a position has no label.
            label_names: {label: names of its values 0, 1, …}.
            groups: [N] integers or strings: the source of each sequence (a book, a user). Pass them if several
                sequences share a source. Such sequences are not independent, so the null of a feature permutes them
                together, and standard errors leave them out together. See docs/features.md.
            name: short name, for messages and files.
            num_bytes: UTF-8 bytes of the text of all real tokens except the first of each sequence, for bits per byte.

        Raises:
            ProbeError: wrong shapes or dtypes, negative ids at real tokens, labels under -1, a sequence with
                padding between its tokens or without a real token, or no sequence at all.
            TypeError, ValueError: `num_bytes` is not an integer of at least 0.
        """
        return cls(
            Content(
                input_ids=input_ids,
                attention_mask=attention_mask,
                labels=labels,
                label_names=label_names,
                groups=groups,
                name=name,
                source={"constructor": "from_tokens"},
                num_bytes=num_bytes,
            )
        )

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
        groups: Iterable[Any] | None = None,
        name: str = "texts",
    ) -> Probe:
        """Make a probe of the first texts that are long enough, one document a sequence, cut at `max_length`.

        The tokenizer adds its default special tokens, and they count as tokens. Sequences are padded on the right
        with id 0; no pad token is needed. The tokenizer's settings do not change.

        Args:
            texts: documents; read in order, and no further than needed.
            tokenizer: of transformers (fast or slow), or a `tokenizers.Tokenizer`.
            num_sequences: how many to take; None: all.
            max_length: largest number of tokens in a sequence.
            min_length: texts with fewer tokens are skipped.
            labels: {label: one value for each text, also for skipped texts}. A value is an integer, a string, or
                None for no label. Strings are numbered in alphabetical order. All tokens of a text get its value. A
                value can also be a list of spans `(start, end, label)` in characters: see `from_dataset`.
            groups: the source of each text, also of skipped texts, as for `from_tokens`.
            name: short name, for messages and files.

        Raises:
            ProbeError: no text is long enough, or lengths or labels cannot be used.
            TypeError: `texts` is a single string or holds something else, or `tokenizer` is not a tokenizer.

        Warns:
            UserWarning: fewer than `num_sequences` texts are long enough.
        """
        sizes = Sizes(num_sequences, max_length, min_length)
        return cls._warned(texts_content(texts, tokenizer, sizes, name=name, labels=labels, groups=groups))

    @classmethod
    def for_tokenizers(
        cls,
        texts: Iterable[str],
        tokenizers: Mapping[str, Any],
        *,
        num_sequences: int | None = None,
        max_length: int = 512,
        min_length: int = 16,
        labels: Mapping[str, Iterable[Any]] | None = None,
        groups: Iterable[Any] | None = None,
        name: str = "texts",
    ) -> dict[str, Probe]:
        """Make one probe for each tokenizer, all of the same documents, to compare models of different families.

        A document is used only if it has `min_length` tokens under every tokenizer. Every tokenizer cuts a document
        after `max_length` of its own tokens, so the cuts lie at different characters. If that matters, pass texts
        that are cut already. `source["documents"]`, the SHA-256 over the texts, is the same in all probes.

        Args:
            texts: documents; read in order, and no further than needed. Documents that are used stay in memory
                meanwhile.
            tokenizers: {name of your choice: tokenizer}. The name becomes part of the probe's name.
            num_sequences: how many to take; None: all.
            max_length: largest number of tokens in a sequence.
            min_length: smallest number of tokens, under each tokenizer.
            labels: as for `Probe.from_texts`, one value for each text, also for skipped texts.
            groups: as for `Probe.from_texts`.
            name: first part of the probes' names; the name of the tokenizer follows.

        Raises:
            ProbeError: no document is long enough under every tokenizer, or lengths or labels cannot be used.
            TypeError: `tokenizers` is not a mapping, or as for `Probe.from_texts`.

        Warns:
            UserWarning: fewer than `num_sequences` documents are long enough.
        """
        sizes = Sizes(num_sequences, max_length, min_length)
        contents = contents_for(texts, tokenizers, sizes, name=name, labels=labels, groups=groups)
        return {key: cls(content) for key, content in contents.items()}

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        tokenizer: Any,
        *,
        text_column: str = "text",
        label_columns: Sequence[str] | Mapping[str, str] = (),
        group_column: str | None = None,
        num_sequences: int | None = 512,
        max_length: int = 512,
        min_length: int = 16,
        name: str | None = None,
        **reading: Unpack[SplitOptions],
    ) -> Probe:
        """Make a probe of the first rows of a dataset that are long enough. Rows are streamed; the probe is cached.

        Args:
            dataset: a name on the HuggingFace hub; a local file (.json, .jsonl, .parquet, .csv, or .txt with a
                document a line; also .gz) or folder; an object of `datasets`; or an iterable of dicts, one a row.
            tokenizer: as for `from_texts`.
            text_column: the column with the text: strings, or lists of words, which are joined by spaces.
            label_columns: columns with labels, or {feature: column}. A label is an integer (-1 or None: none) or
                a string, for all tokens of its row; or a list with one of these for each word; or a list of spans
                `(start, end, label)` in characters of the text. A token has the label of the span that contains its
                first character. Strings are numbered in alphabetical order. `label_names` keeps these strings, or
                the names of a `datasets.ClassLabel`.
            group_column: a column with the source of each row; it becomes `groups` as in `from_tokens`.
            num_sequences: how many rows to take; None: all.
            max_length: largest number of tokens in a sequence.
            min_length: rows with fewer tokens are skipped.
            name: short name, for messages and files; None: that of the dataset.
            **reading: `config=None`, `split=None` (needed if there are several) and `revision=None` of datasets
                on the hub; `skip=0`, the number of rows to leave out first; `cache=True`, `cache_dir=None` (the
                user's cache directory) and `progress=None` (a bar on terminals).

        A probe of a named dataset, of files or of a `datasets.Dataset` is cached under a key of everything that decides
        its content. The next call with the same key, in any process, reads it from there without a network.

        Raises:
            ProbeError: the dataset cannot be reached or read, a column is missing, or no row is long enough.
            TypeError: `dataset` is not a dataset, or `tokenizer` is not a tokenizer.
            ImportError: the package `datasets` is missing.

        Warns:
            UserWarning: fewer than `num_sequences` rows are long enough, or all rows taken have the same label.
        """
        check_keywords("from_dataset", reading, SplitOptions)
        content = dataset_content(
            dataset,
            tokenizer,
            Sizes(num_sequences, max_length, min_length),
            probe_name=name,
            text_column=text_column,
            label_columns=label_columns,
            group_column=group_column,
            **reading,
        )
        return cls._warned(content)

    @classmethod
    def from_c4(
        cls,
        tokenizer: Any,
        *,
        num_sequences: int | None = 512,
        max_length: int = 512,
        min_length: int = 16,
        split: str = "validation",
        **reading: Unpack[ReadingOptions],
    ) -> Probe:
        """Make a probe of English C4 (allenai/c4, "en"), by default of its validation split.

        Do not train the model on that split. For arguments, errors and caching see `from_dataset`.
        """
        check_keywords("from_c4", reading, ReadingOptions)
        sizes = Sizes(num_sequences, max_length, min_length)
        reading.setdefault("config", "en")
        return cls._warned(dataset_content(C4, tokenizer, sizes, probe_name="c4", split=split, **reading))

    @classmethod
    def from_preferences(
        cls,
        pairs: Any,
        tokenizer: Any,
        *,
        num_sequences: int | None = 512,
        max_length: int = 512,
        name: str = "preferences",
        **reading: Unpack[SplitOptions],
    ) -> Probe:
        """Make a probe of preference pairs: sequence 2i is the preferred text of pair i, 2i + 1 the rejected text.

        `labels["preference"]` is 1 (preferred) or 0 (rejected) at the tokens of the continuation, and -1 at the tokens
        of the prompt. A pair is always used or left out as a whole. A pair is left out if its texts (or its
        `score_chosen` and `score_rejected`) are equal, if a continuation is empty, or if the prompt leaves no room for
        a continuation within `max_length`. `source` counts these pairs by reason.

        Args:
            pairs: as `dataset` in `from_dataset`, with the columns `chosen`, `rejected` and optionally `prompt`.
                They hold strings or lists of messages `{"role": …, "content": …}`. The tokenizer's chat template
                writes messages; without a template they become `Role: content` with blank lines between. Without a
                prompt column, the prompt is the common beginning of both texts.
            tokenizer: as for `from_texts`.
            num_sequences: how many to take, two for each pair; None: all.
            max_length: largest number of tokens in a sequence.
            name: short name, for messages and files.
            **reading: see `from_dataset`.

        Raises:
            ProbeError: an odd `num_sequences`, no usable pair, or as for `from_dataset`.

        Warns:
            UserWarning: pairs were left out.
        """
        check_keywords("from_preferences", reading, SplitOptions)
        sizes = Sizes(num_sequences, max_length)
        return cls._warned(preferences_content(pairs, tokenizer, sizes, probe_name=name, **reading))

    @classmethod
    def from_tulu(
        cls,
        tokenizer: Any,
        *,
        num_sequences: int | None = 512,
        max_length: int = 512,
        **reading: Unpack[ReadingOptions],
    ) -> Probe:
        """Make a probe of preference pairs of Tulu 3 (allenai/llama-3.1-tulu-3-8b-preference-mixture).

        The dataset has only a train split, and the probe takes its first rows, after `skip=`. Leave these rows out
        of preference tuning. For arguments, errors and caching see `from_preferences` and `from_dataset`.
        """
        check_keywords("from_tulu", reading, ReadingOptions)
        sizes = Sizes(num_sequences, max_length)
        options: SplitOptions = {"split": "train", **reading}
        return cls._warned(preferences_content(TULU, tokenizer, sizes, probe_name="tulu", **options))

    @classmethod
    def builtin(cls, tokenizer: Any = None, *, num_sequences: int = 256, max_length: int = 128) -> Probe:
        """Make a probe without a network: from the documentation text of Python, NumPy, SciPy and torch.

        The text depends on the installed versions, which `source` records. To measure on the same probe
        elsewhere, save it. A model trained on `builtin_text.split()[0]` has not seen the text of the probe.

        Args:
            tokenizer: as for `from_texts`; None: a small byte-level BPE of 4096 entries, trained on the
                training part of the text when first needed.
            num_sequences: how many to take; there are at most 512.
            max_length: largest number of tokens in a sequence. With the small BPE all sequences reach 128 tokens.

        Raises:
            ImportError: the package `tokenizers` is missing.
            ProbeError: the installation has no source files to take the text from.

        Warns:
            UserWarning: there are fewer than `num_sequences` documents.
        """
        held_out = builtin_text.split()[1]
        own = builtin_text.default_tokenizer() if tokenizer is None else tokenizer
        content = texts_content(held_out, own, Sizes(num_sequences, max_length, min(16, max_length)), name="builtin")
        described = builtin_text.TOKENIZER if tokenizer is None else content.tokenizer
        source = {**content.source, **builtin_text.source()}
        return cls._warned(replace(content, source=source, tokenizer=described))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Probe:
        """Read a probe file and verify its content against its fingerprint.

        Raises:
            ProbeError: not a probe file, cut short, damaged, changed, or of a newer format.
            FileNotFoundError: there is no such file.
            ImportError: the package `safetensors` is missing.
        """
        return cls(_file.read(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the probe to one safetensors file, in one step. An existing file is replaced.

        Raises:
            ProbeError: the probe was changed in place.
            ImportError: the package `safetensors` is missing.
        """
        self.verify()
        _file.write(path, self._content)

    def verify(self) -> None:
        """Recompute the fingerprint, and raise if the content was edited in place.

        Raises:
            ProbeError: ids, mask or labels were changed in place since the probe was made.
        """
        found = self._found()
        if found != self._fingerprint:
            raise ProbeError(
                f"probe {self.name!r} was changed in place: expected fingerprint {self._fingerprint}, "
                f"got {found}. Make a new probe with Probe.from_tokens, and edit clones of the tensors."
            )

    def _found(self) -> str:
        return fingerprint(self._content.input_ids, self._content.attention_mask, self._content.labels)

    def overlap(
        self,
        data: Any,
        tokenizer: Any = None,
        *,
        text_column: str = "text",
        n: int = NGRAM,
        max_texts: int | None = None,
    ) -> Overlap:
        """Find what this probe shares with training text: whole sequences, and runs of `n` tokens (n-grams).

        The text is read once, in order, and not kept. Memory holds only the probe's n-grams, under 100 bytes each.

        Args:
            data: texts (with `tokenizer`); sequences of token ids; rows with a column of either, such as a dataset of
                `datasets` (`input_ids` is used if present, else `text_column`); or one long array of token ids.
            tokenizer: the tokenizer of the probe, as for `Probe.from_texts`.
            text_column: the column with the text, for rows that are not tokenised.
            n: number of tokens in an n-gram. Shorter n-grams match more often by chance.
            max_texts: look at no more than this many texts; None: look at all of them.

        Raises:
            ProbeError: texts without a tokenizer, or rows without tokens and text.
            TypeError: data of another kind.

        >>> probe = Probe.from_tokens([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
        >>> found = probe.overlap([[0, 0, 2, 3, 4, 0]], n=3)
        >>> found.sequences, found.duplicates, found.share
        ((0,), (0,), 0.16666666666666666)
        """
        return overlap(
            self.input_ids, self.attention_mask, data, tokenizer, text_column=text_column, n=n, max_texts=max_texts
        )

    @property
    def input_ids(self) -> Tensor:
        """Token ids [N, S], long; 0 at padding."""
        return self._content.input_ids

    @property
    def attention_mask(self) -> Tensor:
        """True at real tokens [N, S], bool."""
        return self._content.attention_mask

    @property
    def labels(self) -> Mapping[str, Tensor]:
        """Labels [N, S], long, by name; -1 where a position has none. The mapping is read-only."""
        return MappingProxyType(self._content.labels)

    @property
    def label_names(self) -> dict[str, tuple[str, ...]]:
        """For each label whose values have names: the names of the values 0, 1, … (a copy)."""
        return dict(self._content.label_names)

    @property
    def groups(self) -> tuple[int, ...] | None:
        """Number of the source of each sequence, counted from 0; None if each sequence has a source of its own.

        Not part of the fingerprint.
        """
        return self._content.groups

    @property
    def name(self) -> str:
        """Short name, for messages and files."""
        return self._content.name

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the content; equal for equal content."""
        return self._fingerprint

    @property
    def source(self) -> dict[str, str]:
        """How the probe was made (a copy)."""
        return dict(self._content.source)

    @property
    def tokenizer(self) -> str | None:
        """Class, name and size of the tokenizer that made the ids, as text; None if unknown."""
        return self._content.tokenizer

    @property
    def num_bytes(self) -> int | None:
        """UTF-8 bytes of the text of all real tokens except the first of each sequence: the tokens that are predicted.

        None if the tokenizer does not say where in the text its tokens come from. Not part of the fingerprint. If a
        byte-level tokenizer cuts a character at the end of a sequence, all its bytes count: at most 3 too many.
        """
        return self._content.num_bytes

    @property
    def num_tokens(self) -> int:
        """Number of real tokens."""
        return int(self._content.attention_mask.sum())

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._content.input_ids)

    def __repr__(self) -> str:
        labels = f", labels {', '.join(self._content.labels)}" if self._content.labels else ""
        return (
            f"Probe({self._content.name!r}, {len(self)} sequences of up to {self._content.input_ids.shape[1]} tokens"
            f"{labels}, fingerprint {self._fingerprint[:12]}…)"
        )
