"""Constructors of probes of datasets: what their arguments mean is said here, what they do in `_probe_datasets`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from ib_callback.probe._datasets import (
    C4,
    TULU,
    Reading,
    ReadingOptions,
    SplitOptions,
    left_out,
    one_label,
    preferences_probe,
    shortfall,
    texts_probe,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ib_callback.probe.probe import Probe


class FromDatasets:
    """A part of `Probe`."""

    __slots__ = ()

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        tokenizer: Any,
        *,
        text_column: str = "text",
        label_columns: Sequence[str] | Mapping[str, str] = (),
        num_sequences: int | None = 512,
        max_length: int = 512,
        min_length: int = 16,
        name: str | None = None,
        **reading: Unpack[SplitOptions],
    ) -> Probe:
        """A probe of the first rows of a dataset that are long enough, streamed, and cached.

        Args:
            dataset: a name on the HuggingFace hub; a local file (.json, .jsonl, .parquet, .csv, or .txt with a
                document a line; also .gz) or folder; an object of `datasets`; or an iterable of dicts, one a row.
            tokenizer: as for `from_texts`.
            text_column: the column with the text: strings, or lists of words, which are joined by spaces.
            label_columns: columns with labels, or {feature: column}. A label is an integer (-1 or None: none) or
                a string, for all tokens of its row; or a list with one of these for each word; or a list of spans
                `(start, end, label)` in characters of the text. Strings are numbered by the alphabet, and
                `label_names` keeps their names, as those of `datasets.ClassLabel`. A token has the label of the
                span that its first character lies in.
            num_sequences: how many rows to take; None: all.
            max_length: most tokens of a sequence.
            min_length: rows with fewer tokens are skipped.
            name: short name, for messages and files; None: that of the dataset.
            **reading: `config=None`, `split=None` (needed where there are several) and `revision=None` of datasets
                on the hub; `skip=0` rows to leave out first; `retries=5`, how often to try again, with growing
                pauses, when a connection is lost; `cache=True`, `cache_dir=None` (the user's cache directory) and
                `progress=None` (a bar on terminals).

        A probe of a named dataset, of files or of a `datasets.Dataset` is kept in the cache, by all that decides its
        content, and read from there the next time, by any process, without a network.

        Raises:
            ProbeError: the dataset cannot be reached or read, has no such columns, or no row is long enough.
            TypeError: not a dataset or tokenizer.
            ImportError: the package `datasets` is missing.

        Warns:
            UserWarning: fewer than `num_sequences` rows are long enough, or all that were taken have the same label.
        """
        probe = texts_probe(
            cast("type[Probe]", cls),
            dataset,
            tokenizer,
            text_column=text_column,
            label_columns=label_columns,
            num_sequences=num_sequences,
            max_length=max_length,
            min_length=min_length,
            name=name,
            reading=Reading.of(reading),
        )
        warn_caller(shortfall(probe, num_sequences))
        warn_caller(one_label(probe))
        return probe

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
        """A probe of English C4 (allenai/c4, "en"), the validation split, which models must not be trained on.

        For arguments, errors and caching see `from_dataset`.
        """
        probe = texts_probe(
            cast("type[Probe]", cls),
            C4,
            tokenizer,
            text_column="text",
            label_columns=(),
            num_sequences=num_sequences,
            max_length=max_length,
            min_length=min_length,
            name="c4",
            reading=Reading.of(reading, config="en", split=split),
        )
        warn_caller(shortfall(probe, num_sequences))
        return probe

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
        """A probe of preference pairs: sequence 2i is the preferred text of pair i, 2i + 1 the rejected one.

        `labels["preference"]` is 1 (preferred) or 0 (rejected) at the tokens of the continuation, and -1 at those of
        the prompt. Both members of a pair are there or neither is: left out are pairs of equal texts (or equal
        `score_chosen` and `score_rejected`), with an empty continuation, or with a prompt that leaves no room for
        one within `max_length`. `source` counts them, by reason.

        Args:
            pairs: as `dataset` in `from_dataset`, with columns `chosen` and `rejected`, and perhaps `prompt`: strings,
                or lists of messages `{"role": …, "content": …}`, which are written by the tokenizer's chat template
                where it has one, and else as `Role: content` with blank lines between. Without a prompt, it is what
                both begin with.
            tokenizer: as for `from_texts`.
            num_sequences: how many to take, two a pair; None: all.
            max_length: most tokens of a sequence.
            name: short name, for messages and files.
            **reading: see `from_dataset`.

        Raises:
            ProbeError: an odd `num_sequences`, no usable pair, or as for `from_dataset`.

        Warns:
            UserWarning: pairs were left out.
        """
        probe = preferences_probe(
            cast("type[Probe]", cls),
            pairs,
            tokenizer,
            num_sequences=num_sequences,
            max_length=max_length,
            name=name,
            reading=Reading.of(reading),
        )
        warn_caller(shortfall(probe, num_sequences) or left_out(probe.source))
        return probe

    @classmethod
    def from_tulu(
        cls,
        tokenizer: Any,
        *,
        num_sequences: int | None = 512,
        max_length: int = 512,
        **reading: Unpack[ReadingOptions],
    ) -> Probe:
        """A probe of preference pairs of Tulu 3 (allenai/llama-3.1-tulu-3-8b-preference-mixture).

        The dataset has a train split only. Leave the rows of the probe out of preference tuning: they are the
        first ones, after `skip=`. For arguments, errors and caching see `from_preferences` and `from_dataset`.
        """
        probe = preferences_probe(
            cast("type[Probe]", cls),
            TULU,
            tokenizer,
            num_sequences=num_sequences,
            max_length=max_length,
            name="tulu",
            reading=Reading.of(reading, split="train"),
        )
        warn_caller(shortfall(probe, num_sequences) or left_out(probe.source))
        return probe


def warn_caller(message: str | None) -> None:
    """Warn whoever called the constructor that calls this, if there is something to say."""
    if message:
        warnings.warn(message, stacklevel=3)
