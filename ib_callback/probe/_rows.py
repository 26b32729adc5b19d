"""Rows of a dataset of any kind, one after another."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any

from ib_callback.common.errors import ProbeError
from ib_callback.common.files import expanded
from ib_callback.common.json_lines import parsed
from ib_callback.common.messages import describe
from ib_callback.common.network import patiently
from ib_callback.common.optional import require

C4 = "allenai/c4"
TULU = "allenai/llama-3.1-tulu-3-8b-preference-mixture"
# By dataset and configuration: the files of datasets that are downloaded as whole files, in order and no more than
# needed. `huggingface_hub` resumes a download that broke off, and compares its size. A stream of `datasets` would start
# again from the beginning.
_SHARDS = {(C4, "en"): "en/c4-{split}.*.json.gz", (TULU, None): "data/{split}-*.parquet"}
# By the suffix of a file, without .gz: the loader of `datasets` that reads it.
_LOADERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".csv": "csv",
}


_LIST_OF_NULL = re.compile(rb"\[\s*null\b")
_LOOKED_AT = 1 << 20  # bytes checked at the start of a JSON file; pyarrow reads blocks of a third of that
_TRIES = {"STREAMING_READ_MAX_RETRIES": 2, "STREAMING_OPEN_MAX_RETRIES": 2}


@dataclass
class Rows:
    """Where rows come from. Opening the rows fills in some of these fields; they are complete at the first row.

    open: begins reading at the first row.
    what: the dataset, for messages.
    identity: everything that decides the content and is known without a network; None if that is unknown, and then
        no probe of it is cached.
    source: what a probe records about the dataset.
    columns: all columns, if the dataset knows them.
    class_names: {column: names of its integers}.
    """

    open: Callable[[Rows], Iterable[Any]]
    what: str
    identity: dict[str, str] | None
    source: dict[str, str]
    columns: tuple[str, ...] = ()
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """Each row, in order.

        Raises:
            ProbeError: the dataset cannot be reached or read, or a row is not a dict. A stream that breaks off raises
                too, because the probe would otherwise be too short.
        """
        seen = 0
        try:
            for row in self.open(self):
                if not isinstance(row, Mapping):
                    raise ProbeError(f"{self.what}: expected rows that are dicts, got {type(row).__name__} {row!r}")
                seen += 1
                yield row
        except StopIteration:  # `datasets` raises it when it opens a file without rows
            return
        except (ProbeError, ImportError):
            raise
        except Exception as error:
            where = f"after {seen} rows" if seen else "at the start"
            said = " ".join(describe(error).split())[:300]
            raise ProbeError(f"{self.what}: reading failed {where} ({said}).") from error


def rows_of(
    dataset: Any, *, columns: Sequence[str], config: str | None, split: str | None, revision: str | None
) -> Rows:
    """Rows of a `datasets` object, a name on the hub, a local file or folder, or an iterable of dicts.

    Args:
        dataset: see `Probe.from_dataset`.
        columns: the columns to read; others are left out if that saves work.
        config: the dataset's configuration, for names and folders.
        split: for names, folders and dicts of splits; None if there is only one.
        revision: revision of a dataset on the hub; None: the newest.

    Raises:
        ProbeError: there is no such file, or an option does not apply to this kind of dataset.
        TypeError: `dataset` is not a dataset.
    """
    if isinstance(dataset, (str, Path)):
        if not str(dataset):  # as a path, empty text would mean the current folder
            raise ProbeError("dataset: expected a file, a folder or a name on the hub, got an empty string.")
        path = expanded(dataset)
        if path.is_file():
            _no_options("a file", config=config, split=split, revision=revision)
            return _file(path, columns)
        if path.is_dir():
            _no_options("a folder", revision=revision)
            return _folder(path, columns, config, split)
        if isinstance(dataset, Path) or path.is_absolute() or _loader(path) or str(dataset).startswith((".", "~")):
            raise ProbeError(f"dataset: expected a file, a folder or a name on the hub, got {dataset}: no such file.")
        return _hub(dataset, columns, config, split, revision)
    kind = type(dataset).__name__
    ours = type(dataset).__module__.startswith("datasets")
    _no_options(kind, config=config, revision=revision)
    if isinstance(dataset, Mapping) and ours:
        dataset = _one_split(dataset, split, "dataset")
        kind = type(dataset).__name__
    else:
        _no_options(kind, split=split)
    if ours and not isinstance(dataset, Mapping) and not hasattr(dataset, "select_columns"):
        raise TypeError(
            f"dataset: expected a datasets.Dataset or IterableDataset, got {kind}, which is one column. Pass the "
            "dataset and the name of the column, text_column=; or the texts alone, Probe.from_texts(dataset[name], "
            "tokenizer)."
        )
    if isinstance(dataset, Mapping) or not isinstance(dataset, Iterable):
        raise TypeError(
            "dataset: expected a datasets.Dataset or IterableDataset, a name on the hub, a file or folder, or an "
            f"iterable of dicts, one per row, got {kind}."
        )
    fingerprint = getattr(dataset, "_fingerprint", None)
    identity = {"dataset": kind, "fingerprint": fingerprint} if isinstance(fingerprint, str) else None
    return Rows(
        lambda rows: _opened(dataset, columns, rows) if ours else dataset,
        f"the {kind}",
        identity=identity,
        source=identity or {"dataset": kind},
    )


def _hub(name: str, columns: Sequence[str], config: str | None, split: str | None, revision: str | None) -> Rows:
    asked = {"dataset": name, "config": str(config), "split": str(split)}

    # `datasets` is imported when the dataset is opened, because a cached probe can be read without it.
    def open_rows(rows: Rows) -> Iterable[Any]:
        datasets = require("datasets", extra="hf", purpose=f"Reading {name}")
        import huggingface_hub

        # One commit for all files, so a change on the hub in the meantime cannot mix two versions.
        info = patiently(lambda: huggingface_hub.HfApi().dataset_info(name, revision=revision), name)
        commit = rows.source["revision"] = info.sha or revision or "main"
        pattern = _SHARDS.get((name, config), "").format(split=split)
        shards = sorted(file.rfilename for file in info.siblings or () if fnmatchcase(file.rfilename, pattern))
        if not shards:
            with _few_tries(datasets.config):
                loaded = datasets.load_dataset(name, config, split=split, revision=commit, streaming=True)
                opened = _opened(_one_split(loaded, split, name), columns, rows)
            return _streamed(opened, datasets.config)
        paths = (huggingface_hub.hf_hub_download(name, shard, repo_type="dataset", revision=commit) for shard in shards)
        return chain.from_iterable(_file(Path(path), columns) for path in paths)

    return Rows(open_rows, name, identity=asked | {"revision": str(revision)}, source=asked)


@contextmanager
def _few_tries(config: Any) -> Iterator[None]:
    """Fewer tries: `datasets` tries 20 times, and each time huggingface_hub six times in 23 s: ten silent minutes."""
    before = {name: getattr(config, name) for name in _TRIES}
    vars(config).update({name: min(tries, _TRIES[name]) for name, tries in before.items()})
    try:
        yield
    finally:
        vars(config).update(before)


def _streamed(rows: Iterable[Any], config: Any) -> Iterator[Any]:
    iterator, end = iter(rows), object()
    while True:
        with _few_tries(config):  # only here, because the user may stream other data in the meantime
            row = next(iterator, end)
        if row is end:
            return
        yield row


def _file(path: Path, columns: Sequence[str]) -> Rows:
    loader = _loader(path)
    if loader is None:
        raise ProbeError(
            f"dataset: expected a file that ends in {', '.join(_LOADERS)}, or one of these and .gz, got {path.name}."
        )

    def open_rows(rows: Rows) -> Iterable[Any]:
        datasets = require("datasets", extra="hf", purpose=f"Reading {path}")
        if loader == "json":
            _check_objects(path)
        # The path is not resolved, because in the hub's cache the name with the suffix is a link.
        loaded = datasets.load_dataset(loader, data_files=str(path.absolute()), split="train", streaming=True)
        return _opened(loaded, columns, rows)

    return Rows(open_rows, str(path), identity=_of_files([path]), source={"dataset": path.name})


def _folder(path: Path, columns: Sequence[str], config: str | None, split: str | None) -> Rows:
    def open_rows(rows: Rows) -> Iterable[Any]:
        datasets = require("datasets", extra="hf", purpose=f"Reading {path}")
        if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(str(path))
        else:
            for file in files:
                if _loader(file) == "json":
                    _check_objects(file)
            loaded = datasets.load_dataset(str(path.resolve()), config, split=split, streaming=True)
        return _opened(_one_split(loaded, split, str(path)), columns, rows)

    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    asked = {"config": str(config), "split": str(split)}
    return Rows(open_rows, str(path), identity=_of_files(files) | asked, source={"dataset": path.name, **asked})


def _check_objects(path: Path) -> None:
    """Check that the first lines of a JSON file are objects, because pyarrow ends the process if they are null.

    A list, or one object over several lines, is not checked: `datasets` reads these too.

    Raises:
        ProbeError: a line is not an object; the message names it.
        OSError: the file cannot be read.
    """
    with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
        start = file.read(_LOOKED_AT) + file.readline()
    lines = enumerate(start.removeprefix(codecs.BOM_UTF8).splitlines(), start=1)
    numbered = [(number, text) for number, line in lines if (text := line.strip())]
    first = numbered[0][1] if numbered else b"{"
    wrong: tuple[int, bytes] | None = None
    if not first.startswith((b"{", b"[")):
        wrong = numbered[0]
    elif _LIST_OF_NULL.match(b"".join(line for _, line in numbered[:2])):
        wrong = numbered[0][0], b"a list that begins with null"
    elif _says(first, dict):
        wrong = next((each for each in numbered if not each[1].startswith(b"{") and _says(each[1], object)), None)
    if wrong is not None:
        number, said = wrong[0], wrong[1][:40].decode(errors="replace")
        raise ProbeError(
            f'{path}: expected one JSON object per line, such as {{"text": "…"}}, got {said} in line {number}. Remove '
            "such lines."
        )


def _says(line: bytes, kind: type) -> bool:
    try:
        return isinstance(parsed(line), kind)
    except ValueError:
        return False


def _opened(dataset: Any, columns: Sequence[str], rows: Rows) -> Iterable[Any]:
    """Reduce a dataset of `datasets` to the wanted columns, as Python objects, and record its class names."""
    for column, feature in (dataset.features or {}).items():
        names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
        if names and column in columns:
            rows.class_names[column] = tuple(names)
    if (getattr(dataset, "format", None) or {}).get("type") == "custom":  # a set_transform function makes the rows
        return dataset
    if hasattr(dataset, "with_format"):
        dataset = dataset.with_format(None)
    rows.columns = tuple(dataset.column_names or ())
    wanted = [column for column in columns if column in rows.columns]
    return dataset.select_columns(wanted) if wanted else dataset


def _one_split(loaded: Any, split: str | None, what: str) -> Any:
    if not isinstance(loaded, Mapping):
        return loaded
    if split is not None and split in loaded:
        return loaded[split]
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    raise ProbeError(
        f"{what}: expected split= to be one of {', '.join(loaded)}, got {split}. Name one that the training does not "
        "use."
    )


def _loader(path: Path) -> str | None:
    return _LOADERS.get(Path(path.name.removesuffix(".gz")).suffix.lower())


def _of_files(files: Sequence[Path]) -> dict[str, str]:
    entries = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return {"files": hashlib.sha256(json.dumps(entries).encode()).hexdigest()}


def _no_options(kind: str, **options: str | None) -> None:
    given = [f"{name}=" for name, value in options.items() if value is not None]
    if given:
        raise ProbeError(f"{' and '.join(given)}: expected only with a dataset on the hub, got {kind}. Leave it out.")
