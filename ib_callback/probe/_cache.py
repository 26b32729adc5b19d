"""Probes that were built before, found by all that decides their content, without asking anyone."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ib_callback.common.cache import build_once, user_cache_directory
from ib_callback.common.optional import require
from ib_callback.probe import _file

if TYPE_CHECKING:
    from ib_callback.probe.probe import Probe

# To be raised when the same arguments begin to give another probe.
BUILD_RULES = 2


def probe_path(request: Mapping[str, str], name: str, directory: str | os.PathLike[str] | None) -> Path:
    """The file of the probe that these arguments give.

    Args:
        request: everything that decides its content, as it was asked for: what a hub would answer is no part of
            it, so that the file is found without a network. A probe of a dataset's newest revision thus stays the
            one that was frozen first; the revision it is of is in its `source`.
        name: of the probe; a part of the file's name, for people.
        directory: of the cache; None: `probes` in the user's cache directory.
    """
    everything = {**request, "name": name, "format": str(_file.FORMAT_VERSION), "rules": str(BUILD_RULES)}
    key = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()
    folder = user_cache_directory() / "probes" if directory is None else Path(directory)
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")[:40] or "probe"
    return folder / f"{readable}-{key[:32]}.safetensors"


def cached(path: Path, build: Callable[[], Probe], load: Callable[[Path], Probe], what: str) -> Probe:
    """The probe in the file, or a new one, which is kept there; one process at a time builds.

    Raises:
        ImportError: the package `safetensors` is missing; before anything is built.
    """
    require("safetensors.torch", extra="hf", purpose="Keeping a probe in the cache (cache=False does without)")
    return build_once(path, build, write=lambda partial, probe: probe.save(partial), read=load, what=what)
