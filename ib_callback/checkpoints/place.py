"""A checkpoint: the model to which it belongs, and the place of its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ib_callback.common.errors import ModelError


class Place(Protocol):
    """The place of a checkpoint's files."""

    @property
    def source(self) -> str:
        """The path, or `repository@commit`."""

    def fetch(self) -> Path:
        """A folder or a file on this machine with the whole checkpoint; downloaded if needed."""

    def fetch_tokenizer(self) -> list[Path]:
        """Folders on this machine that may have the checkpoint's tokenizer, the nearest first."""

    def evict(self) -> None:
        """Remove the files from the cache that `fetch` put there."""


@dataclass(frozen=True)
class Local:
    """A folder or a file on this machine.

    Attributes:
        path: path of the folder or file.
        run: the directory in which it was found.
    """

    path: Path
    run: Path | None = None

    @property
    def source(self) -> str:
        """The absolute path, so it can be found from anywhere."""
        return str(self.path.resolve())

    def fetch(self) -> Path:
        """The path itself; there is nothing to fetch."""
        return self.path

    def fetch_tokenizer(self) -> list[Path]:
        """The folder itself, the folder in which it was found, and the folder above."""
        first = self.path if self.path.is_dir() else self.path.parent
        return list(dict.fromkeys([first, *([] if self.run is None else [self.run]), first.parent]))

    def evict(self) -> None:
        """Nothing was put anywhere."""


@dataclass(frozen=True)
class Broken:
    """The place of a checkpoint that is known to be unavailable, with the reason."""

    source: str
    why: str

    def fetch(self) -> Path:
        """Raise a ModelError."""
        raise ModelError(self.why)

    def fetch_tokenizer(self) -> list[Path]:
        """None."""
        return []

    def evict(self) -> None:
        """Nothing was put anywhere."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The weights of a model at one time.

    Attributes:
        model: name of the model (the course of training) to which it belongs.
        revision: name of the checkpoint within the model; None if it is the only one.
        step, tokens, stage: see `ib_callback.results.lines.Origin`.
        place: place of the files.
        rounded: whether the tokens come from a name such as "tokens5B", which rounds them.
        untrained: whether the weights are new random ones, and only the configuration comes from the place.
        weights: hashes of all files of weights, if known without reading the files.
        number: number among all checkpoints that were found, measured or not; it decides which shard measures this one.
    """

    model: str
    revision: str | None
    step: int | None
    tokens: int | None
    stage: str | None
    place: Place = field(repr=False)
    rounded: bool = False
    untrained: bool = False
    weights: tuple[str, ...] = ()
    number: int = 0

    @property
    def name(self) -> str:
        """Model and revision, for messages."""
        return self.model if self.revision is None else f"{self.model} {self.revision}"


Tell = Callable[[str], None]
