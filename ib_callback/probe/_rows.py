"""Rows of a dataset of any kind, one after another, and again from where a connection was lost."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ib_callback.common.errors import ProbeError
from ib_callback.common.optional import require

_log = logging.getLogger(__name__)

BACKOFF_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
# By the ending of a file, without .gz: the loader of `datasets` that reads it.
_LOADERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".csv": "csv",
}


@dataclass
class Rows:
    """Where rows come from.

    open: begins reading at the first row.
    what: the dataset, for messages.
    remote: whether reading may fail for a moment, so that it is worth another try.
    identity: what decides the content, known without a network; None: unknown, so nothing built of it is cached.
    source: what to note about it in a probe; filled in when it is opened.
    columns: all that there are, as far as the dataset knows; filled in when it is opened.
    class_names: {column: names of its integers}, likewise.
    """

    open: Callable[[], Iterable[Any]]
    what: str
    remote: bool
    identity: dict[str, str] | None
    source: dict[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)


def rows_of(
    dataset: Any, *, columns: Sequence[str], config: str | None, split: str | None, revision: str | None
) -> Rows:
    """Rows of a `datasets` object, a name on the hub, a local file or folder, or an iterable of dicts.

    Args:
        dataset: see `Probe.from_dataset`.
        columns: that are read; others are left out where that saves work.
        config: the dataset's configuration, for names and folders.
        split: for names, folders and dicts of splits; None: the only one there is.
        revision: of a dataset on the hub; None: the newest.

    Raises:
        ProbeError: no such file, or options that do not go with this kind.
        TypeError: not a dataset.
    """
    if isinstance(dataset, (str, Path)):
        if not str(dataset):  # as a path it would be the current folder
            raise ProbeError("dataset: expected a file, a folder or a name on the hub, got an empty string.")
        path = Path(dataset).expanduser()
        if path.is_file():
            _no_options("a file", config=config, split=split, revision=revision)
            return _file(path, columns)
        if path.is_dir():
            _no_options("a folder", revision=revision)
            return _folder(path, columns, config, split)
        if isinstance(dataset, Path) or path.is_absolute() or _loader(path) or str(dataset).startswith((".", "~")):
            raise ProbeError(f"dataset: expected a file, a folder or a name on the hub, got {dataset}: no such file.")
        return _hub(dataset, columns, config, split, revision)
    _no_options(type(dataset).__name__, config=config, revision=revision)
    if isinstance(dataset, Mapping) and type(dataset).__module__.startswith("datasets"):
        dataset = _one_split(dataset, split, "dataset")
    else:
        _no_options(type(dataset).__name__, split=split)
    if isinstance(dataset, Mapping) or not isinstance(dataset, Iterable):
        raise TypeError(
            "dataset: expected a datasets.Dataset or IterableDataset, a name on the hub, a file or folder, or an "
            f"iterable of dicts, one a row, got {type(dataset).__name__}."
        )
    return _loaded(dataset, columns)


def resumed(rows: Rows, retries: int) -> Iterator[Mapping[str, Any]]:
    """Each row once, in order, whatever the connection does; rows that come twice are compared and left out.

    Args:
        rows: of a dataset.
        retries: how often to try again without getting any further; with pauses of 1, 2, 4, … seconds.

    Raises:
        ProbeError: it cannot be reached or read, or gives other rows than at the first time.
        TypeError: rows that are not dicts.
    """
    seen = failures = reached = 0
    before = hashlib.blake2b()  # of the rows that were given on
    iterator: Iterator[Any] | None = None
    while True:
        try:
            if iterator is None:
                # First, for `datasets` raises StopIteration already when it opens a file without rows.
                reached, again = 0, hashlib.blake2b()
                iterator = iter(rows.open())
            row = next(iterator)
        except StopIteration:
            if reached < seen:
                raise ProbeError(_not_the_same(rows, seen)) from None
            return
        except (ProbeError, ImportError):
            raise
        except Exception as error:
            failures += 1
            if not rows.remote or failures > retries or not _worth_a_retry(error):
                raise ProbeError(_unreadable(rows, seen, error)) from error
            pause = BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS)) - 1]
            _log.warning(
                "%s: reading stopped after %d rows (%s); trying again in %.0f s [%d/%d]",
                *(rows.what, seen, _said(error), pause, failures, retries),
            )
            time.sleep(pause)
            iterator = None
            continue
        if not isinstance(row, Mapping):
            raise TypeError(f"{rows.what}: expected rows that are dicts, got {type(row).__name__} {row!r}")
        reached += 1
        if rows.remote:
            (again if reached <= seen else before).update(repr(sorted(row.items())).encode())
        if reached > seen:
            seen, failures = reached, 0
            yield row
        elif reached == seen and again.digest() != before.digest():
            raise ProbeError(_not_the_same(rows, seen))


def is_network_error(error: BaseException) -> bool:
    """Whether it says that a server cannot be reached, or must not be (offline mode)."""
    return any(
        isinstance(cause, (ConnectionError, TimeoutError))
        or type(cause).__module__.split(".")[0] in ("httpx", "httpcore", "aiohttp")
        or type(cause).__name__ in ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "FSTimeoutError")
        for cause in _causes(error)
    )


def _hub(name: str, columns: Sequence[str], config: str | None, split: str | None, revision: str | None) -> Rows:
    # Without `datasets` a cached probe can still be read, so it is imported when the dataset is opened.
    identity = {"dataset": name, "config": str(config), "split": str(split), "revision": str(revision)}

    def open_rows() -> Iterable[Any]:
        datasets = require("datasets", extra="hf", purpose=f"Reading {name}")
        if "revision" not in rows.source:
            from huggingface_hub import HfApi

            # One commit for all tries, so that a change on the hub in the meantime cannot mix two versions.
            rows.source["revision"] = HfApi().dataset_info(name, revision=revision).sha or revision or "main"
        loaded = datasets.load_dataset(name, config, split=split, revision=rows.source["revision"], streaming=True)
        return _opened(_one_split(loaded, split, name), columns, rows)

    source = {key: value for key, value in identity.items() if key != "revision"}
    rows = Rows(open_rows, name, remote=True, identity=identity, source=source)
    return rows


def _file(path: Path, columns: Sequence[str]) -> Rows:
    loader = _loader(path)
    if loader is None:
        raise ProbeError(
            f"dataset: expected a file that ends in {', '.join(_LOADERS)}, or one of these and .gz, got {path.name}."
        )

    def open_rows() -> Iterable[Any]:
        datasets = require("datasets", extra="hf", purpose=f"Reading {path}")
        loaded = datasets.load_dataset(loader, data_files=str(path.resolve()), split="train", streaming=True)
        return _opened(loaded, columns, rows)

    rows = Rows(open_rows, str(path), remote=False, identity=_of_files([path]), source={"dataset": path.name})
    return rows


def _folder(path: Path, columns: Sequence[str], config: str | None, split: str | None) -> Rows:
    saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))

    def open_rows() -> Iterable[Any]:
        datasets = require("datasets", extra="hf", purpose=f"Reading {path}")
        if saved:
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path.resolve()), config, split=split, streaming=True)
        return _opened(_one_split(loaded, split, str(path)), columns, rows)

    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    source = {"dataset": path.name, "config": str(config), "split": str(split)}
    identity = _of_files(files) | {"config": str(config), "split": str(split)}
    rows = Rows(open_rows, str(path), remote=False, identity=identity, source=source)
    return rows


def _loaded(dataset: Any, columns: Sequence[str]) -> Rows:
    """Rows of an object that is there already."""
    kind = type(dataset).__name__
    ours = type(dataset).__module__.startswith("datasets")
    fingerprint = getattr(dataset, "_fingerprint", None)
    identity = {"dataset": kind, "fingerprint": fingerprint} if isinstance(fingerprint, str) else None
    # Reading an iterator again would go on where it stopped.
    remote = ours and not hasattr(dataset, "__len__")

    def open_rows() -> Iterable[Any]:
        return _opened(dataset, columns, rows) if ours else dataset

    rows = Rows(open_rows, f"the {kind}", remote=remote, identity=identity, source=identity or {"dataset": kind})
    return rows


def _opened(dataset: Any, columns: Sequence[str], rows: Rows) -> Iterable[Any]:
    """A dataset of `datasets` with the wanted columns alone, as Python objects, and its class names noted."""
    for column, feature in (dataset.features or {}).items():
        names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
        if names and column in columns:
            rows.class_names[column] = tuple(names)
    if (getattr(dataset, "format", None) or {}).get("type") == "custom":  # set_transform: it makes the rows
        return dataset
    if hasattr(dataset, "with_format"):
        dataset = dataset.with_format(None)
    known = dataset.column_names
    rows.columns = tuple(known or ())
    if known and any(column in known for column in columns):
        return dataset.select_columns([column for column in columns if column in known])
    return dataset


def _one_split(loaded: Any, split: str | None, what: str) -> Any:
    if not isinstance(loaded, Mapping):
        return loaded
    if split is not None and split in loaded:
        return loaded[split]
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    raise ProbeError(
        f"{what}: expected split= to be one of {', '.join(loaded)}, got {split}. Name one that is not trained on."
    )


def _loader(path: Path) -> str | None:
    return _LOADERS.get(Path(path.name.removesuffix(".gz")).suffix.lower())


def _of_files(files: Sequence[Path]) -> dict[str, str]:
    entries = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return {"files": hashlib.sha256(json.dumps(entries).encode()).hexdigest()}


def _no_options(kind: str, **options: str | None) -> None:
    given = [f"{name}=" for name, value in options.items() if value is not None]
    if given:
        raise ProbeError(f"{' and '.join(given)}: expected with a dataset on the hub, got {kind}. Leave it out.")


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _worth_a_retry(error: Exception) -> bool:
    """Whether time may heal it: a connection, or data that were cut off on their way."""
    causes = list(_causes(error))
    if any("OfflineModeIsEnabled" in (type(cause).__name__ + str(cause)) for cause in causes):
        return False
    if isinstance(error, FileNotFoundError):  # also what `datasets` says of a name that does not exist
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status >= 500 or status in (408, 429)
    cut_off = (EOFError, OSError, zlib.error)
    return is_network_error(error) or any(
        isinstance(cause, cut_off) or type(cause).__module__.startswith("pyarrow") for cause in causes
    )


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _not_the_same(rows: Rows, seen: int) -> str:
    return (
        f"{rows.what}: expected the same {seen} rows when reading it again after an interruption, got others. A probe "
        "needs a fixed order: leave out shuffling without a seed, or save the rows to a file and use that."
    )


def _unreadable(rows: Rows, seen: int, error: BaseException) -> str:
    where = f"after {seen} rows" if seen else "at the start"
    return f"{rows.what}: cannot be read, {where} ({_said(error)})."
