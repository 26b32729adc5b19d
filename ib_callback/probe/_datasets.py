"""Probes of datasets: found in the cache, or built from rows of any kind."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ib_callback.common.checks import check_integer
from ib_callback.common.errors import ProbeError
from ib_callback.probe._cache import cached, probe_path
from ib_callback.probe._checks import check_name
from ib_callback.probe._labels import LabelReader
from ib_callback.probe._preferences import REASONS, collect_pairs
from ib_callback.probe._rows import Rows, is_network_error, resumed, rows_of
from ib_callback.probe._texts import Collected, Document, check_lengths, collect
from ib_callback.probe._tokenizing import Encoder, describe, template_hash, tokenizer_hash

if TYPE_CHECKING:
    from ib_callback.probe.probe import Probe

C4 = "allenai/c4"
TULU = "allenai/llama-3.1-tulu-3-8b-preference-mixture"


class ReadingOptions(TypedDict, total=False):
    """Keywords of every constructor that reads a dataset: see `Probe.from_dataset` for each."""

    config: str | None
    revision: str | None
    skip: int
    retries: int
    cache: bool
    cache_dir: str | os.PathLike[str] | None
    progress: bool | None


class SplitOptions(ReadingOptions, total=False):
    """Those of constructors that leave the split open."""

    split: str | None


@dataclass(frozen=True)
class Reading:
    """Which rows are read, and how."""

    config: str | None = None
    split: str | None = None
    revision: str | None = None
    skip: int = 0
    retries: int = 5
    cache: bool = True
    cache_dir: str | os.PathLike[str] | None = None
    progress: bool | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any], **defaults: str) -> Reading:
        """From keywords, and what is to hold where there is none.

        Raises:
            TypeError: one that is not known.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(
                    f"unexpected keyword {name}=. Expected, beside those of the signature: {', '.join(known)}."
                )
        return cls(**{**defaults, **options})


def texts_probe(
    make: type[Probe],
    dataset: Any,
    tokenizer: Any,
    *,
    text_column: str,
    label_columns: Sequence[str] | Mapping[str, str],
    num_sequences: int | None,
    max_length: int,
    min_length: int,
    name: str | None,
    reading: Reading,
) -> Probe:
    """The probe of `Probe.from_dataset`."""
    check_lengths(num_sequences, max_length, min_length)
    features = _features(label_columns)
    columns = list(dict.fromkeys([text_column, *features.values()]))
    rows = _rows(dataset, columns, reading)
    asked = {
        "constructor": "from_dataset",
        "text_column": text_column,
        "label_columns": json.dumps(features, sort_keys=True),
        "min_length": str(min_length),
    }

    def build(
        stream: Iterator[Mapping[str, Any]], progress: Callable[[int], object]
    ) -> tuple[Collected, dict[str, str]]:
        first = next(stream, None)
        if first is None:
            raise ProbeError(f"{rows.what}: expected rows, got none{_skipped(reading)}.")
        absent = [column for column in columns if column not in first]
        if absent:
            there = _columns(rows, first)
            raise ProbeError(
                f"{rows.what}: expected a column {', '.join(map(repr, absent))}, got the columns {there}. "
                "Name the one with the text, text_column=, and those with labels, label_columns=."
            )
        missing = 0

        def documents() -> Iterator[Document]:
            nonlocal missing
            for index, row in enumerate(_chained(first, stream)):
                text = row.get(text_column)
                words = text if isinstance(text, (list, tuple)) and all(isinstance(w, str) for w in text) else None
                if text is not None and words is None and not isinstance(text, str):
                    raise TypeError(
                        f"{rows.what}: expected strings or lists of words in column {text_column!r}, got "
                        f"{type(text).__name__} in row {index}."
                    )
                missing += text is None
                labels = {feature: row.get(column) for feature, column in features.items()}
                yield Document(" ".join(words) if words is not None else text or "", words, labels)

        readers = [LabelReader(feature, rows.class_names.get(column)) for feature, column in features.items()]
        collected = collect(
            documents(),
            tokenizer,
            num_sequences=num_sequences,
            max_length=max_length,
            min_length=min_length,
            readers=readers,
            progress=progress,
        )
        skipped = collected.texts_read - missing - len(collected.input_ids)
        counts = {"texts_read": collected.texts_read, "texts_without_text": missing, "texts_too_short": skipped}
        return collected, {key: str(value) for key, value in counts.items()}

    default = Path(dataset).name if isinstance(dataset, (str, Path)) else "dataset"
    return _probe(make, rows, tokenizer, asked, build, num_sequences, max_length, name or default or "dataset", reading)


def preferences_probe(
    make: type[Probe],
    pairs: Any,
    tokenizer: Any,
    *,
    num_sequences: int | None,
    max_length: int,
    name: str,
    reading: Reading,
) -> Probe:
    """The probe of `Probe.from_preferences`."""
    check_lengths(num_sequences, max_length)
    columns = ["prompt", "chosen", "rejected", "score_chosen", "score_rejected"]
    rows = _rows(pairs, columns, reading)
    asked = {"constructor": "from_preferences", "chat_template": template_hash(tokenizer)}

    def build(
        stream: Iterator[Mapping[str, Any]], progress: Callable[[int], object]
    ) -> tuple[Collected, dict[str, str]]:
        found = collect_pairs(stream, tokenizer, num_sequences=num_sequences, max_length=max_length, progress=progress)
        counts = {"pairs_read": found.collected.texts_read}
        counts |= {f"pairs_dropped_{reason}": number for reason, number in found.dropped.items()}
        return found.collected, {key: str(value) for key, value in counts.items()}

    return _probe(make, rows, tokenizer, asked, build, num_sequences, max_length, name, reading)


def shortfall(probe: Probe, num_sequences: int | None) -> str | None:
    """What to warn of: that there are fewer sequences than asked for; None if there are not."""
    if num_sequences is None or len(probe) >= num_sequences:
        return None
    source = probe.source
    if "pairs_read" in source:
        why = f"there were {source['pairs_read']} pairs; {left_out(source) or 'none was left out'}"
    else:
        why = f"there were {source['texts_read']} texts, and {source['texts_too_short']} have fewer than "
        why += f"min_length={source['min_length']} tokens"
        if source.get("texts_without_text", "0") != "0":
            why += f"; {source['texts_without_text']} have no text at all"
    return f"asked for {num_sequences} sequences, got {len(probe)}: {why}."


def one_label(probe: Probe) -> str | None:
    """What to warn of: features of which the probe has a single label, or none; None if there are none such."""
    alone = []
    for feature, table in probe.labels.items():
        numbers = table[table >= 0].unique().tolist()
        if len(numbers) < 2:
            names = probe.label_names.get(feature)
            found = [names[number] if names else number for number in numbers]
            alone.append(f"{feature!r} (all {found[0]!r})" if found else f"{feature!r} (all without)")
    if not alone:
        return None
    return (
        f"a single label throughout the probe: {', '.join(alone)}. Information about it is 0. Rows are taken in order, "
        "so if the dataset is sorted, shuffle it with a seed, or take more rows."
    )


def left_out(source: Mapping[str, str]) -> str:
    """How many pairs were left out, and why, from the source of a probe; empty if none was."""
    counts = {reason: int(source.get(f"pairs_dropped_{reason}", "0")) for reason in REASONS}
    total = sum(counts.values())
    reasons = ", ".join(f"{number} {REASONS[reason]}" for reason, number in counts.items() if number)
    return f"left out {total} of {source['pairs_read']} pairs: {reasons}" if total else ""


def _rows(dataset: Any, columns: Sequence[str], reading: Reading) -> Rows:
    check_integer("skip", reading.skip, minimum=0, cure="it is how many rows to leave out at the start")
    check_integer("retries", reading.retries, minimum=0, cure="it is how often to try again")
    return rows_of(dataset, columns=columns, config=reading.config, split=reading.split, revision=reading.revision)


def _probe(
    make: type[Probe],
    rows: Rows,
    tokenizer: Any,
    asked: dict[str, str],
    collect_rows: Callable[[Iterator[Mapping[str, Any]], Callable[[int], object]], tuple[Collected, dict[str, str]]],
    num_sequences: int | None,
    max_length: int,
    name: str,
    reading: Reading,
) -> Probe:
    # Refused before anything is read, for that may take long.
    check_name(name)
    Encoder(tokenizer, max_length)
    asked = asked | {
        "num_sequences": str(num_sequences),
        "max_length": str(max_length),
        "skip": str(reading.skip),
        "tokenizer_sha256": tokenizer_hash(tokenizer),
    }
    what = f"probe {name!r} of {rows.what}"

    def build() -> Probe:
        with _progress(reading.progress, num_sequences, what) as progress:
            try:
                stream = islice(resumed(rows, reading.retries), reading.skip, None)
                collected, counts = collect_rows(stream, progress)
            except ProbeError as error:
                if rows.remote and is_network_error(error):
                    raise ProbeError(f"{error} {_ways_out(path)}") from error
                raise
        return make(
            collected.input_ids,
            collected.attention_mask,
            labels=collected.labels,
            label_names=collected.label_names,
            name=name,
            source=asked | rows.source | counts,
            tokenizer=describe(tokenizer),
        )

    path = None
    if rows.identity is None or not reading.cache:
        return build()
    path = probe_path(asked | rows.identity, name, reading.cache_dir)
    return cached(path, build, make.load, what)


def _ways_out(path: Any) -> str:
    where = f"the cache has no probe of these arguments ({path})" if path is not None else "the cache was not asked"
    return (
        f"Without a network (or in offline mode, HF_HUB_OFFLINE=1): {where}; build it where there is a network, with "
        "`ib-callback probe build` and the same arguments, and pass the file to Probe.load; or take local files, "
        "Probe.from_dataset('held_out.jsonl', tokenizer); or Probe.builtin(tokenizer)."
    )


def _features(label_columns: Any) -> dict[str, str]:
    """{feature: column}."""
    if isinstance(label_columns, Mapping):
        return dict(label_columns)
    if isinstance(label_columns, str) or not isinstance(label_columns, Sequence):
        raise ProbeError(
            "label_columns: expected a list of column names, or {feature: column}, got "
            f"{type(label_columns).__name__} {label_columns!r}."
        )
    return {column: column for column in label_columns}


def _columns(rows: Rows, first: Mapping[str, Any]) -> str:
    return ", ".join(rows.columns or map(str, first)) or "(none)"


def _chained(first: Mapping[str, Any], rest: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    yield first
    yield from rest


def _skipped(reading: Reading) -> str:
    return f" after the first {reading.skip} were skipped" if reading.skip else ""


@contextmanager
def _progress(shown: bool | None, total: int | None, what: str) -> Iterator[Callable[[int], object]]:
    """A bar of sequences, where `tqdm` is installed; None: on a terminal."""
    if shown is None:
        shown = sys.stderr.isatty()
    try:
        from tqdm import tqdm
    except ImportError:
        shown = False
    if not shown:
        yield lambda _: None
        return
    with tqdm(total=total, desc=what, unit="seq") as bar:
        yield bar.update
