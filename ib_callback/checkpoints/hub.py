"""Models on the HuggingFace hub: their revisions, which of these hold the same weights, and their files."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ib_callback.checkpoints.names import said_by, stage_of_repository
from ib_callback.checkpoints.place import Broken, Checkpoint, Place
from ib_callback.common.errors import ModelError
from ib_callback.common.json_lines import is_too_deep
from ib_callback.common.messages import describe
from ib_callback.common.network import patiently, trouble
from ib_callback.common.optional import require

MAIN = "main"
_ID = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*(?:@[^@\s]+)?")
# Files that are needed in addition to the weights, as patterns of huggingface_hub, which match whole paths.
_TOKENIZER = (
    "tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "spiece.model", "*.tiktoken",
)  # fmt: skip
_CONFIGURATION = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py")
# Files of weights, in order of preference; one kind is enough.
_WEIGHTS = (
    r"model(-\d+-of-\d+)?\.safetensors",
    r"pytorch_model(-\d+-of-\d+)?\.bin",
    r"[^/]+\.gguf",
)
# Number of tries for a download. huggingface_hub itself resumes a file that stopped in the middle.
_TRIES = 3
TOO_DEEP = "One of its JSON files has brackets that are nested too deep. Save the model again, or download it again"
_WAYS = (
    "download it on another machine with `hf download {name}` and copy that machine's cache (HF_HOME) to this one, or "
    "give a local folder instead. HF_ENDPOINT sets another hub"
)


@dataclass(frozen=True)
class OnHub:
    """A commit of a repository.

    Attributes:
        repository: "owner/name".
        revision: the branch or tag that led to the commit.
        commit: hash of the commit, or its name if the hub could not be asked.
        files: all files that are needed; empty: unknown.
        weights: the files among them that hold the weights.
    """

    repository: str
    revision: str
    commit: str
    files: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    _fetched: set[str] = field(default_factory=set, repr=False, compare=False)

    @property
    def source(self) -> str:
        """`repository@commit`."""
        return f"{self.repository}@{self.commit}"

    def fetch(self) -> Path:
        """The folder of the commit in the cache of huggingface_hub; downloaded if needed.

        Raises:
            Exception: the download failed; the error comes from huggingface_hub.
        """
        hub = _hub()
        if not self.files:  # without a network
            return _cached(self.repository, self.commit)
        before = [hub.try_to_load_from_cache(self.repository, name, revision=self.commit) for name in self.weights]
        if not all(isinstance(path, str) for path in before):
            self._fetched.add(self.commit)
        for last_try in (*[False] * (_TRIES - 1), True):
            try:
                return self._download(list(map(_literally, self.files)))
            except Exception as error:
                # An error of the connection, or a file that is too short. Everything that has arrived is kept.
                known = isinstance(error, (OSError, RuntimeError)) or trouble(error) is not None
                if last_try or not known:
                    _raise_explained(self.source, self.repository, error)
                    raise
        raise AssertionError

    def fetch_tokenizer(self) -> list[Path]:
        """The folder in the cache with only the tokenizer; a GGUF file itself contains its tokenizer."""
        if any(name.endswith(".gguf") for name in self.weights):
            return [self.fetch()]
        try:
            wanted = [*_TOKENIZER, "config.json"]
            return [self._download(wanted) if self.files else _cached(self.repository, self.commit)]
        except Exception as error:
            _raise_explained(f"{self.source}: its tokenizer", self.repository, error)
            raise

    def _download(self, patterns: list[str]) -> Path:
        # Downloaded by the name of the revision, so it can be found by that name later without a network.
        for revision in (self.revision, self.commit):
            keywords = {"revision": revision, "allow_patterns": patterns}
            path = Path(patiently(partial(_hub().snapshot_download, self.repository, **keywords), self.source))
            if path.name == self.commit:
                break  # otherwise the branch has moved in the meantime
        return path

    def evict(self) -> None:
        """Remove the files from the cache, if they were not there before."""
        if self.commit in self._fetched:
            _hub().scan_cache_dir(_hub().constants.HF_HUB_CACHE).delete_revisions(self.commit).execute()
            self._fetched.clear()


def is_id(name: str) -> bool:
    """Whether a text can be the name of a repository, with or without `@revision`."""
    return _ID.fullmatch(name) is not None


def find_on_hub(name: str, model: str, globs: Sequence[str]) -> list[Checkpoint]:
    """The revisions of a repository whose names match, in the order of their steps. Their content is not known yet.

    Args:
        name: "owner/name", or "owner/name@revision" for a single revision.
        model: name for the model.
        globs: globs of branches and tags; empty: the revision in the name, or "main".

    Raises:
        ModelError: there is no such repository, no revision matches, or the hub cannot be reached.
    """
    repository, _, revision = name.partition("@")
    wanted = [revision] if revision else list(globs) or [MAIN]
    try:
        refs = patiently(lambda: _hub().HfApi().list_repo_refs(repository), repository)
    except Exception as error:
        cached = _in_cache(repository, wanted)
        if cached:
            return _in_order(
                replace(
                    _checkpoint(model, repository, name, OnHub(repository, name, commit), len(cached)), weights=weights
                )
                for name, (commit, weights) in cached.items()
            )
        raise ModelError(
            f"{repository}: there is no such path, the hub cannot be reached ({_shortened(error)}), and the cache on "
            f"this machine has no revision that matches {' or '.join(map(repr, wanted))}. {ways_out(repository, error)}"
        ) from error
    commits = {ref.name: ref.target_commit for ref in (*refs.branches, *refs.tags)}
    chosen = [name for name in commits if any(fnmatch.fnmatchcase(name, glob) for glob in wanted)]
    if not chosen and revision and re.fullmatch(r"[0-9a-f]{7,40}", revision):
        commits, chosen = {revision: revision}, [revision]
    if not chosen:
        some = ", ".join(list(commits)[:8]) + (", …" if len(commits) > 8 else "")
        raise ModelError(
            f"{repository}: expected a revision that matches {' or '.join(map(repr, wanted))}, but none of its "
            f"{len(commits)} revisions does: {some}"
        )
    return _in_order(
        _checkpoint(model, repository, name, OnHub(repository, name, commits[name]), len(chosen)) for name in chosen
    )


def ways_out(repository: str, error: BaseException) -> str:
    """A text that says what to do if the hub does not provide something."""
    in_the_way = trouble(error)
    if in_the_way is None:
        return "Check the name, HF_ENDPOINT, and whether the repository asks for a login"
    return f"{in_the_way}: {_WAYS.format(name=repository)}"


def by_name(option: str, name: str, load: Callable[..., Any], file: str) -> Any:
    """Load something by name with transformers, from a folder or from the hub. The hub is asked here first.

    transformers would ask ten times, for over a minute, and then not say what the problem was. After a download that
    was cut off, it says that there is no such file.

    Args:
        option: the option with the name, as it was given, for messages.
        name: name of a folder or a repository.
        load: function of transformers that loads it; takes `local_files_only`.
        file: a file that is needed.

    Raises:
        ValueError: it cannot be loaded. If the cause is the network, the message says what to do.
        ImportError: a package is needed that is not installed.
    """
    asks = is_id(name) and not (Path(name).is_dir() or Path(name).is_file())
    # Asking for the file alone is not enough, because without a network it may come from the cache.
    questions = (lambda: _hub().HfApi().model_info(name), lambda: _hub().hf_hub_download(name, file))
    in_the_way = next(filter(None, (_in_the_way(ask, name) for ask in questions if asks)), None)
    try:
        return load(**({} if in_the_way is None else {"local_files_only": True}))
    except ImportError:
        raise
    except Exception as error:
        if in_the_way is None and trouble(error) is not None:
            in_the_way = error
        if in_the_way is not None:
            raise ValueError(
                f"{option}: cannot be loaded ({_shortened(in_the_way)}), and its copy in the cache is not complete. "
                f"{ways_out(name, in_the_way)}. You can also give a local file: {option.split()[0]} {file}"
            ) from error
        if is_too_deep(error):
            raise ValueError(f"{option}: cannot be loaded. {TOO_DEEP}") from error
        # For a damaged file, transformers and `tokenizers` raise errors of any kind.
        raise ValueError(f"{option}: cannot be loaded ({' '.join(str(error).split())})") from error


def _in_the_way(ask: Callable[[], Any], name: str) -> Exception | None:
    """The error that keeps the hub from answering; None if it answers, whatever the answer."""
    try:
        patiently(ask, name)
    except Exception as error:
        return error if trouble(error) is not None else None
    return None


def _raise_explained(what: str, repository: str, error: Exception) -> None:
    """If an error comes from the network, raise a ModelError that says what to do."""
    if trouble(error) is not None:
        raise ModelError(
            f"{what}: cannot be downloaded ({_shortened(error)}). {ways_out(repository, error)}"
        ) from error


def _in_order(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    return sorted(checkpoints, key=lambda each: (each.step is None, each.step or 0))


def _in_cache(repository: str, wanted: Sequence[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The content of the cache for a repository, for use without a network: matching names, with commits and hashes.

    A name without a wildcard must be in the cache. The hashes are those of the files of weights; the cache names the
    files by them.
    """
    if _is_plain(wanted):
        return {name: (name, ()) for name in wanted} if all(_is_cached(repository, name) for name in wanted) else {}
    hub = _hub()
    try:
        repositories = hub.scan_cache_dir(hub.constants.HF_HUB_CACHE).repos
    except hub.CacheNotFound:
        return {}
    found = {}
    for each in repositories:
        for revision in each.revisions if (each.repo_id, each.repo_type) == (repository, "model") else ():
            files = [f for f in revision.files if any(re.fullmatch(pattern, f.file_name) for pattern in _WEIGHTS)]
            hashes = tuple(sorted(file.blob_path.name for file in files))
            for name in revision.refs if files else ():
                if any(fnmatch.fnmatchcase(name, glob) for glob in wanted):
                    found[name] = (revision.commit_hash, hashes)
    return found


def with_files(checkpoint: Checkpoint, gguf: str | None = None) -> Checkpoint:
    """Add the needed files and the hashes of the weights to a checkpoint, as the hub lists them.

    Args:
        checkpoint: any checkpoint; one that is not on the hub is returned unchanged.
        gguf: which GGUF file to use, for a repository with several.
    """
    place: Place = checkpoint.place
    if not isinstance(place, OnHub) or checkpoint.untrained:
        return checkpoint
    try:
        tree = partial(_hub().HfApi().list_repo_tree, place.repository, revision=place.commit)
        listed = patiently(lambda: [file for file in tree() if _is_file(file)], place.source)
        weights = _weights(listed, gguf)
        needed = [f.path for f in listed if any(fnmatch.fnmatchcase(f.path, p) for p in _CONFIGURATION)]
        needed += [f.path for f in weights]
    except ModelError as error:
        return replace(checkpoint, place=Broken(place.source, str(error)))
    except Exception as error:
        if _is_cached(place.repository, place.commit):
            return checkpoint
        why = f"its files cannot be listed: {_shortened(error)}. {ways_out(place.repository, error)}"
        return replace(checkpoint, place=Broken(place.source, why))
    hashes = tuple(sorted(f.lfs.sha256 if f.lfs is not None else f.blob_id for f in weights))
    there = replace(place, files=tuple(needed), weights=tuple(f.path for f in weights))
    return replace(checkpoint, place=there, weights=hashes)


def without_equal(checkpoints: Iterable[Checkpoint]) -> tuple[list[Checkpoint], list[tuple[Checkpoint, Checkpoint]]]:
    """Remove checkpoints of a model with equal weights; return the kept ones, and pairs of a removed and a kept one.

    The first of several equal ones is kept; one with a step is preferred to one without.
    """
    everything = list(checkpoints)
    kept: dict[tuple[str, tuple[str, ...]], Checkpoint] = {}
    left_out = []
    for checkpoint in sorted(everything, key=lambda each: each.step is None):
        if not checkpoint.weights or checkpoint.untrained:
            continue
        first = kept.setdefault((checkpoint.model, checkpoint.weights), checkpoint)
        if first is not checkpoint:
            left_out.append((checkpoint, first))
    gone = {id(checkpoint) for checkpoint, _ in left_out}
    return [checkpoint for checkpoint in everything if id(checkpoint) not in gone], left_out


def _checkpoint(model: str, repository: str, revision: str, place: OnHub, number: int) -> Checkpoint:
    said = said_by(revision)
    alone = number == 1 and revision == MAIN
    return Checkpoint(
        model=model,
        revision=None if alone else revision,
        step=said.step,
        tokens=said.tokens,
        rounded=said.tokens is not None,
        stage=said.stage or (stage_of_repository(repository) if said.step is None else None),
        place=place,
    )


def _weights(listed: Sequence[Any], gguf: str | None) -> list[Any]:
    """The files with the weights; only one of several GGUF files, because each is a whole model."""
    for pattern in _WEIGHTS:
        found = [file for file in listed if re.fullmatch(pattern, file.path)]
        if found and pattern.endswith("gguf"):
            chosen = [file for file in found if gguf is None or fnmatch.fnmatchcase(file.path, gguf)]
            if len(chosen) != 1:
                names = ", ".join(file.path for file in found)
                matching = "" if gguf is None else f" that match {gguf!r}"
                raise ModelError(
                    f"expected one GGUF file, got {len(chosen)}{matching}. Choose one with --gguf. The files: {names}"
                )
            return chosen
        if found:
            return found
    raise ModelError(
        "expected weights in files named model*.safetensors, pytorch_model*.bin or *.gguf, found none among "
        f"{len(listed)} files"
    )


def _is_file(entry: Any) -> bool:
    return hasattr(entry, "blob_id")


def _is_plain(names: Iterable[str]) -> bool:
    return not any(character in name for name in names for character in "*?[")


def _is_cached(repository: str, revision: str) -> bool:
    try:
        _cached(repository, revision)
    except Exception:
        return False
    return True


def _cached(repository: str, revision: str) -> Path:
    """The folder of a downloaded revision; raises huggingface_hub's error if there is none."""
    for name in ("config.json", "tokenizer.json"):
        path = _hub().try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return Path(_hub().snapshot_download(repository, revision=revision, local_files_only=True))


def _literally(path: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", path)


def _shortened(error: BaseException) -> str:
    return " ".join(describe(error).split())[:300]


def _hub() -> Any:
    return require("huggingface_hub", extra="hf", purpose="Loading a model of the hub")
