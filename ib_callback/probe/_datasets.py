"""The content of probes of datasets: read from the cache, or built from rows of any kind."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ib_callback.common.cache import build_once, cache_file
from ib_callback.common.checks import check_integer
from ib_callback.common.errors import ProbeError
from ib_callback.common.files import expanded
from ib_callback.common.network import trouble
from ib_callback.common.optional import require
from ib_callback.common.progress import progress_bar
from ib_callback.probe import _file
from ib_callback.probe._labels import LabelReader
from ib_callback.probe._preferences import COLUMNS, REASONS, collect_pairs
from ib_callback.probe._rows import Rows, rows_of
from ib_callback.probe._texts import Document, Sizes, check_group, collect
from ib_callback.probe._tokenizing import Encoder, template_hash, tokenizer_hash
from ib_callback.probe.content import Content, check_name

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Raise this number when a change makes the same arguments give a different probe.
BUILD_RULES = 2


class ReadingOptions(TypedDict, total=False):
    """Keywords of every constructor that reads a dataset: see `Probe.from_dataset` for each."""

    config: str | None
    revision: str | None
    skip: int
    cache: bool
    cache_dir: str | os.PathLike[str] | None
    progress: bool | None


class SplitOptions(ReadingOptions, total=False):
    """Keywords of constructors that leave the choice of the split to the user."""

    split: str | None


def check_keywords(constructor: str, given: Iterable[str], options: type) -> None:
    """Raise a TypeError if a constructor of `Probe` was given a keyword that is not among these options."""
    known = list(options.__annotations__)
    for name in given:
        if name not in known:
            raise TypeError(
                f"Probe.{constructor}: unexpected keyword {name}=. Expected those of its signature, or "
                f"{', '.join(known)}."
            )


def dataset_content(
    dataset: Any,
    tokenizer: Any,
    sizes: Sizes,
    *,
    probe_name: str | None,
    text_column: str = "text",
    label_columns: Sequence[str] | Mapping[str, str] = (),
    group_column: str | None = None,
    **reading: Unpack[SplitOptions],
) -> Content:
    """The content for `Probe.from_dataset`."""
    features = _features(label_columns)
    groups = [] if group_column is None else [group_column]
    columns = list(dict.fromkeys([text_column, *features.values(), *groups]))

    def build(rows: Rows, stream: Iterator[Mapping[str, Any]], **keywords: Any) -> Content:
        first = next(stream, None)
        if first is None:
            skipped = f" after skip={reading['skip']}" if reading.get("skip") else ""
            raise ProbeError(f"{rows.what}: expected rows, got none{skipped}.")
        absent = [column for column in columns if column not in first]
        if absent:
            raise ProbeError(
                f"{rows.what}: expected a column {', '.join(map(repr, absent))}, got the columns "
                f"{', '.join(rows.columns or map(str, first)) or '(none)'}. Name the column of the text in "
                "text_column=, columns of labels in label_columns=, and a column of sources in group_column=."
            )
        missing = 0

        def documents() -> Iterator[Document]:
            nonlocal missing
            for index, row in enumerate(chain([first], stream)):
                text = row.get(text_column)
                words = text if isinstance(text, (list, tuple)) and all(isinstance(w, str) for w in text) else None
                if text is not None and words is None and not isinstance(text, str):
                    raise TypeError(
                        f"{rows.what}: expected strings or lists of words in column {text_column!r}, got "
                        f"{type(text).__name__} in row {index}."
                    )
                missing += text is None
                labels = {feature: row.get(column) for feature, column in features.items()}
                group = None if group_column is None else row.get(group_column)
                if group_column is not None:
                    check_group(group, f"{rows.what}: row {index}, column {group_column!r}")
                yield Document(" ".join(words) if words is not None else text or "", words, labels, group)

        readers = [LabelReader(feature, rows.class_names.get(column)) for feature, column in features.items()]
        content = collect(documents(), tokenizer, sizes, readers=readers, **keywords)
        too_short = int(content.source["texts_too_short"]) - missing
        counts = {"texts_without_text": str(missing), "texts_too_short": str(too_short)}
        return replace(content, source={**content.source, **counts})

    asked = {
        "constructor": "from_dataset",
        "text_column": text_column,
        "label_columns": json.dumps(features, sort_keys=True),
        **({} if group_column is None else {"group_column": group_column}),
    }
    name = probe_name or (Path(dataset).name if isinstance(dataset, (str, Path)) else "") or "dataset"
    return cached_content(dataset, tokenizer, columns, sizes, name, asked, build, **reading)


def preferences_content(
    pairs: Any, tokenizer: Any, sizes: Sizes, *, probe_name: str, **reading: Unpack[SplitOptions]
) -> Content:
    """The content for `Probe.from_preferences`."""

    def build(rows: Rows, stream: Iterator[Mapping[str, Any]], **keywords: Any) -> Content:
        return collect_pairs(stream, tokenizer, sizes, **keywords)

    asked = {"constructor": "from_preferences", "chat_template": template_hash(tokenizer)}
    return cached_content(pairs, tokenizer, COLUMNS, sizes, probe_name, asked, build, **reading)


def remarks(content: Content) -> Iterator[str]:
    """Warnings: fewer sequences than requested, pairs that were left out, labels that are all the same."""
    source, found = content.source, len(content.input_ids)
    left_out = ""
    if "pairs_read" in source:
        counts = {reason: int(source[f"pairs_dropped_{reason}"]) for reason in REASONS}
        reasons = ", ".join(f"{number} {REASONS[reason]}" for reason, number in counts.items() if number)
        left_out = f"left out {sum(counts.values())} of {source['pairs_read']} pairs: {reasons}" if reasons else ""
        why = f"there were {source['pairs_read']} pairs; {left_out or 'no pair was left out'}"
    else:
        short, empty = (int(source.get(key, 0)) for key in ("texts_too_short", "texts_without_text"))
        have = "has" if short == 1 else "have"
        reasons = f", and {short} of them {have} fewer than min_length={source['min_length']} tokens" if short else ""
        reasons += f", and {empty} of them {'has' if empty == 1 else 'have'} no text" if empty else ""
        why = f"there were {source['texts_read']} texts{reasons}"
    if source["num_sequences"] != "None" and found < int(source["num_sequences"]):
        yield f"asked for {source['num_sequences']} sequences, got {found}: {why}."
    elif left_out:
        yield left_out
    alone = list(_single_labels(content)) if "label_columns" in source else []
    if alone:
        yield (
            f"the whole probe has a single label: {', '.join(alone)}. The information about it is 0. Rows are taken in "
            "order. If the dataset is sorted, shuffle it with a seed, or take more rows."
        )


def _single_labels(content: Content) -> Iterator[str]:
    """Descriptions of features for which all sequences have the same label, or no label, for a warning."""
    for feature, table in content.labels.items():
        numbers = table[table >= 0].unique().tolist()
        if len(numbers) < 2:
            names = content.label_names.get(feature)
            found = [names[number] if names else number for number in numbers]
            yield f"{feature!r} (all {found[0]!r})" if found else f"{feature!r} (all without a label)"


def cached_content(
    dataset: Any,
    tokenizer: Any,
    columns: Sequence[str],
    sizes: Sizes,
    probe_name: str,
    asked: Mapping[str, str],
    build: Callable[..., Content],
    *,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    skip: int = 0,
    cache: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Content:
    """The content from the cache, or from `build(rows, stream of rows, name=, source=, progress=)`."""
    check_integer("skip", skip, minimum=0, cure="pass how many rows to leave out at the start")
    # Checked before anything is read, because reading may take long.
    check_name(probe_name)
    Encoder(tokenizer, sizes.max_length)
    rows = rows_of(dataset, columns=columns, config=config, split=split, revision=revision)
    request = {**asked, **sizes.noted(), "skip": str(skip), "tokenizer_sha256": tokenizer_hash(tokenizer)}
    what = f"probe {probe_name!r} of {rows.what}"
    path = None
    if rows.identity is not None and cache:
        path = _path(request | rows.identity, probe_name, cache_dir, what)

    def built() -> Content:
        try:
            with progress_bar(what, total=sizes.num_sequences, unit="seq", shown=progress) as advance:
                content = build(rows, islice(rows, skip, None), name=probe_name, source=request, progress=advance)
        except ProbeError as error:
            in_the_way = trouble(error)
            if in_the_way is None:
                raise
            raise ProbeError(f"{error} {_ways_out(in_the_way, path)}") from error
        return replace(content, source={**content.source, **rows.source})

    if path is None:
        return built()
    require("safetensors.torch", extra="hf", purpose="Keeping a probe in the cache, which cache=False turns off,")
    return build_once(path, built, write=_file.write, read=_file.read, what=what)


def _path(request: Mapping[str, str], name: str, directory: str | os.PathLike[str] | None, what: str) -> Path | None:
    """The cached file for these arguments; None, with a warning, if there is no cache.

    Args:
        request: everything that decides the content of the probe, as requested. Answers of a hub are not part of it, so
            the file is found without a network. Therefore a probe of a dataset's newest revision stays the one that was
            built first; its `source` names the revision.
        name: name of the probe; it is part of the file's name, for human readers.
        directory: directory of the cache; None: `probes` in the user's cache directory.
        what: what is built, for messages.
    """
    everything = {**request, "name": name, "format": str(_file.FORMAT_VERSION), "rules": str(BUILD_RULES)}
    key = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")[:40] or "probe"
    file = f"{readable}-{key[:32]}.safetensors"
    if directory is None:
        return cache_file("probes", file, what=what)
    return expanded(directory) / file


def _ways_out(in_the_way: str, path: Path | None) -> str:
    where = (
        f"The cache has no probe with these arguments ({path})" if path is not None else "The cache was not searched"
    )
    return (
        f"{in_the_way}: build the probe on a machine with a network, with `ib-callback probe build` and the same "
        "arguments, and load the file with Probe.load. Or use local files, Probe.from_dataset('held_out.jsonl', "
        f"tokenizer), or Probe.builtin(tokenizer). {where}."
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
