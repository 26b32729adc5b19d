"""Write files in one step, so none is ever half-written; and find, compare and remove files."""

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
    """A user's path with `~` replaced by the home directory; unchanged if the home directory is unknown."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises if there is no home directory


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace a file's content in one step. Even after a crash, a reader finds the old or the new content.

    Raises:
        OSError: the file cannot be written; the error names this path.
    """
    # If the path is a link, the file that it points to is replaced, not the link.
    target = Path(os.path.realpath(expanded(path)))
    # Not with tempfile, because only the owner can read its files, and so the result.
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
            # The user does not know the partial file, and an error of writing names no file at all.
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


_REMOTE = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+:(//|:.*://)")


def is_remote(path: object) -> bool:
    """Whether a path is an address on another machine's file system, in fsspec's form ("s3://…")."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    return isinstance(text, str) and _REMOTE.match(text) is not None


def on_this_machine(name: str, path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """A path with `~` replaced by the home directory, and without `file://`; any other path unchanged.

    Args:
        name: name of the argument, for the message.
        path: path of a file or a folder.

    Raises:
        ValueError: the path is on another file system. Otherwise a local folder of that name would be made.
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
    """Remove partial files that a killed `write_atomically` left, for files in a directory whose names match `names`.

    Args:
        directory: a directory to which no other process writes such files now.
        names: a regular expression.

    Raises:
        OSError: the directory cannot be searched, or a file cannot be removed.
    """
    ours = re.compile(rf"\.(?:{names})\.[0-9a-f]{{32}}\.partial")
    remove_matching(directory, ours)


def remove_matching(directory: Path, names: re.Pattern[str]) -> None:
    """Remove the files in a directory whose names match; folders and links stay."""
    for name in os.listdir(directory):
        path = directory / name
        if names.fullmatch(name) and path.is_file() and not path.is_symlink():
            os.unlink(path)


def size_of(path: str | os.PathLike[str]) -> int | None:
    """Size of a file in bytes; None if it does not exist.

    Raises:
        OSError: it is unknown whether the file exists (in some versions `Path.exists` treats this as missing).
    """
    try:
        return os.stat(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def told_apart(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """The shortest ending of each path that distinguishes it from the others; equal paths stay equal.

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
    """The first path that does not exist."""
    return next(path for path in names if size_of(path) is None)
