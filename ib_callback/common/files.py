"""Writing files so that nothing is ever half-written."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace a file's content in one step: a reader, even after a crash, finds the old or the new."""
    # Through a link: the file that it points to is replaced, not the link.
    target = Path(os.path.realpath(path))
    # Not by tempfile: its files are readable by their owner alone, and so would be the result.
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
