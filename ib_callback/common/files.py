"""Writing files so that nothing is ever half-written, and looking for them."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path that a user gives, with `~` for the user's home; as it is where nobody knows the home."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises where there is no home


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace a file's content in one step: a reader, even after a crash, finds the old or the new.

    Raises:
        OSError: it cannot be written; it names this path.
    """
    # Through a link: the file that it points to is replaced, not the link.
    target = Path(os.path.realpath(expanded(path)))
    # Not by tempfile: its files are readable by their owner alone, and so would be the result.
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            # Of the partial file nobody has heard, and an error of writing names none.
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


_REMOTE = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+:(//|:.*://)")


def is_remote(path: object) -> bool:
    """Whether a path is an address on a file system that is not this machine's, as fsspec has them ("s3://…")."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    return isinstance(text, str) and _REMOTE.match(text) is not None


def on_this_machine(name: str, path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """A path with `~` for the user's home, and without `file://`; any other one as it is.

    Args:
        name: of the argument, for the message.
        path: of a file or a folder.

    Raises:
        ValueError: it is on another file system, under which name a local folder would be made.
    """
    if is_remote(path):
        raise ValueError(
            f"{name}: expected a folder on this machine, got {os.fspath(path)}, where files cannot be appended to "
            "or locked. Pass a local folder as output_dir=, and copy it there after the run"
        )
    text = os.fspath(path)
    if text.startswith("file:"):
        return url2pathname(urlsplit(text).path)
    return os.path.expanduser(text) if text.startswith("~") else path


def remove_partial_files(directory: Path, names: str) -> None:
    """Remove what `write_atomically` left when it was killed, of files in a directory whose names match `names`.

    Args:
        directory: in which nobody else writes such files now.
        names: a regular expression.

    Raises:
        OSError: the directory cannot be searched, or a file not be removed.
    """
    ours = re.compile(rf"\.(?:{names})\.[0-9a-f]{{32}}\.partial")
    remove_matching(directory, ours)


def remove_matching(directory: Path, names: re.Pattern[str]) -> None:
    """Remove the files, no folders and no links, in a directory that have such names."""
    for name in os.listdir(directory):
        path = directory / name
        if names.fullmatch(name) and path.is_file() and not path.is_symlink():
            os.unlink(path)


def size_of(path: str | os.PathLike[str]) -> int | None:
    """Bytes of what is there; None if nothing is.

    Raises:
        OSError: nobody can tell, which is not the same (`Path.exists` takes it for the same in some versions).
    """
    try:
        return os.stat(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def told_apart(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """As much of each path, from its end, as tells it from the others; equal ones stay equal.

    >>> told_apart([("runs", "a", "out"), ("runs", "b", "out"), ("runs", "c")])
    ['a/out', 'b/out', 'c']
    """
    different = set(paths)
    names = []
    for path in paths:
        length = 1
        while length < len(path) and sum(other[-length:] == path[-length:] for other in different) > 1:
            length += 1
        names.append("/".join(path[-length:]))
    return names


def first_of(names: Iterable[Path]) -> Path:
    """The first path at which nothing is."""
    return next(path for path in names if size_of(path) is None)
