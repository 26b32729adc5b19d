"""A checkpoint: which model it is of, and where its files are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ib_callback.common.errors import ModelError


class Place(Protocol):
    """Where the files of a checkpoint are."""

    @property
    def source(self) -> str:
        """The path, or `repository@commit`."""

    def fetch(self) -> Path:
        """A folder or a file on this machine with all of it; downloaded if need be."""

    def fetch_tokenizer(self) -> list[Path]:
        """Folders on this machine that may have its tokenizer, the nearest first."""

    def evict(self) -> None:
        """Remove from the cache what `fetch` put there."""


@dataclass(frozen=True)
class Local:
    """A folder or a file of this machine.

    Attributes:
        path: of it.
        run: the directory in which it was found.
    """

    path: Path
    run: Path | None = None

    @property
    def source(self) -> str:
        """Absolute, so that it can be found from anywhere."""
        return str(self.path.resolve())

    def fetch(self) -> Path:
        """Nothing to do."""
        return self.path

    def fetch_tokenizer(self) -> list[Path]:
        """The folder itself, the one that it was found in, and the one above."""
        first = self.path if self.path.is_dir() else self.path.parent
        return list(dict.fromkeys([first, *([] if self.run is None else [self.run]), first.parent]))

    def evict(self) -> None:
        """Nothing was put anywhere."""


@dataclass(frozen=True)
class Broken:
    """A checkpoint of which is known already that it cannot be had, and why."""

    source: str
    why: str

    def fetch(self) -> Path:
        """Raises a ModelError."""
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
        model: the name of the course of training that it is part of.
        revision: its own name within the model; None if there is one alone.
        step, tokens, stage: see `ib_callback.results.lines.Origin`.
        place: where its files are.
        rounded: whether the tokens are those that its name says, "tokens5B", which are rounded.
        untrained: whether weights are drawn anew, and only the configuration is that of the place.
        weights: hashes of all files of weights, where they are known without reading them.
        number: among all that were found, whether or not they are measured; by it shards share the work.
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
        """For messages."""
        return self.model if self.revision is None else f"{self.model} {self.revision}"


Tell = Callable[[str], None]
