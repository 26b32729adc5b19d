"""Find the requested checkpoints, in the order in which they are measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ib_callback.checkpoints import hub
from ib_callback.checkpoints.local import find_runs, gguf_in
from ib_callback.checkpoints.names import thinned
from ib_callback.checkpoints.place import Checkpoint, Local, Tell
from ib_callback.common.errors import ModelError
from ib_callback.common.files import told_apart


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which checkpoints to measure.

    Attributes:
        models: paths, or names on the hub, "owner/name" or "owner/name@revision".
        revisions: globs of branches and tags, for names on the hub; empty: "main".
        name: one name for all models, which then form one course (the checkpoints of one training); None: each has its
            own name.
        stage: stage of the training; None: taken from names.
        max_points: largest number of checkpoints of each model, spread evenly over the logarithm of the step; None:
            all.
        untrained: whether the untrained model of each configuration is measured as step 0.
        seed: seed of the untrained weights.
        gguf: which of several GGUF files to use, as a glob.
    """

    models: Sequence[str]
    revisions: Sequence[str] = ()
    name: str | None = None
    stage: str | None = None
    max_points: int | None = None
    untrained: bool = False
    seed: int = 0
    gguf: str | None = None


def find_checkpoints(wanted: Wanted, tell: Tell) -> tuple[list[Checkpoint], list[tuple[Checkpoint, Checkpoint]]]:
    """Return all checkpoints, ordered by step within each model, and those left out because of equal weights.

    Raises:
        ModelError: a model does not exist, or nothing matches.
    """
    found: list[Checkpoint] = []
    for source, name in zip(wanted.models, _names(wanted), strict=True):
        if Path(source).exists():
            each = find_runs(Path(source), name)
            several = dict.fromkeys(checkpoint.model for checkpoint in each)
            if len(several) > 1 and wanted.name is None:
                names = ", ".join(several)
                tell(f"{source} holds several runs. Each counts as a model: {names}. --name makes them one model")
            found += each if wanted.name is None else [replace(checkpoint, model=name) for checkpoint in each]
        elif hub.is_id(source):
            found += hub.find_on_hub(source, name, wanted.revisions)
        else:
            raise ModelError(
                f"{source}: expected a folder, a file, or a name on the hub. There is no such folder or file, and the "
                "hub has no names of this form"
            )
    by_model: dict[str, list[Checkpoint]] = {}
    for checkpoint in _told_apart(_once(found)):
        by_model.setdefault(checkpoint.model, []).append(checkpoint)
    chosen = [c for model in by_model.values() for c in _thinned(_staged(model, wanted.stage), wanted.max_points)]
    chosen = [replace(checkpoint, number=number) for number, checkpoint in enumerate(chosen)]
    asked = sum(isinstance(checkpoint.place, hub.OnHub) for checkpoint in chosen)
    if asked > 1:
        tell(f"asking the hub for the files of {asked} revisions")
    listed = [hub.with_files(checkpoint, wanted.gguf) for checkpoint in chosen]
    chosen, equal = hub.without_equal(listed if wanted.gguf is None else [_with_gguf(c, wanted.gguf) for c in listed])
    if wanted.untrained:
        chosen = _with_untrained(chosen, wanted.seed)
    return chosen, equal


def shard_of(checkpoints: Sequence[Checkpoint], shard: tuple[int, int] | None) -> list[Checkpoint]:
    """The checkpoints that process k of n measures: every n-th one, from the k-th on (k counts from 1).

    Checkpoints that were left out because of equal weights keep their numbers. If the hub does not answer one process,
    that process cannot detect equal weights. With places in the list instead of numbers, it would then measure other
    checkpoints than intended.
    """
    return [c for c in checkpoints if shard is None or c.number % shard[1] == shard[0] - 1]


def _names(wanted: Wanted) -> list[str]:
    """A name for each model: its name on the hub, or the shortest ending of its path that distinguishes it."""
    if wanted.name is not None:
        return [wanted.name] * len(wanted.models)
    local = [Path(source) for source in wanted.models if Path(source).exists()]
    whole = [path.resolve() for path in local]
    # The name of the run instead of "checkpoints", which is what Lightning and others call the folder.
    parts = [path.parent.parts if path.name == "checkpoints" else path.parts for path in whole]
    names = dict(zip(local, told_apart(parts), strict=True))
    return [names.get(Path(source), source.partition("@")[0]) for source in wanted.models]


def _once(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Remove checkpoints that were given several times; branches at one commit stay, because they are reported."""
    found: dict[object, Checkpoint] = {}
    for c in checkpoints:
        name = c.revision if isinstance(c.place, hub.OnHub) else None
        found.setdefault((c.model, name, c.place.source), c)
    return list(found.values())


def _told_apart(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Add the source to the names of equal revisions of one model, such as revisions from two repositories."""
    count = Counter((checkpoint.model, checkpoint.revision) for checkpoint in checkpoints)
    return [
        replace(c, revision=f"{_whence(c)}{'' if c.revision is None else f'@{c.revision}'}")
        if count[c.model, c.revision] > 1
        else c
        for c in checkpoints
    ]


def _whence(checkpoint: Checkpoint) -> str:
    place = checkpoint.place
    return place.repository if isinstance(place, hub.OnHub) else place.source


def _staged(checkpoints: Sequence[Checkpoint], stage: str | None) -> list[Checkpoint]:
    """Add stages: if some steps name their stage, a step that names none belongs to the first stage."""
    stages = sorted({c.stage for c in checkpoints if c.stage is not None and c.step is not None})
    first = stage or (stages[0] if stages else None)
    return [
        replace(c, stage=stage or (first if c.stage is None and c.step is not None else c.stage)) for c in checkpoints
    ]


def _with_gguf(checkpoint: Checkpoint, glob: str) -> Checkpoint:
    """Add the GGUF file to the name, because files beside it with another quantisation hold other weights."""
    place = checkpoint.place
    names = [] if checkpoint.revision is None else [checkpoint.revision]
    if isinstance(place, hub.OnHub):
        names += [name for name in place.weights if name.endswith(".gguf")]
    elif isinstance(place, Local) and place.path.is_dir():
        with suppress(ModelError):  # raised for several files; loading reports this
            file = gguf_in(place.path, glob)
            names += [] if file is None else [file.name]
    return replace(checkpoint, revision=" ".join(names) or None)


def _thinned(checkpoints: Sequence[Checkpoint], most: int | None) -> list[Checkpoint]:
    """Sort by stage and step, with checkpoints without a step last; keep at most `most` steps of each stage."""
    by_stage: dict[str | None, list[int]] = {}
    for c in checkpoints:
        if c.step is not None:
            by_stage.setdefault(c.stage, []).append(c.step)
    kept = {stage: thinned(steps, most) for stage, steps in by_stage.items()}
    chosen = [c for c in checkpoints if c.step is None or c.step in kept[c.stage]]
    return sorted(chosen, key=lambda c: (c.step is None, c.stage or "", c.step or 0))


def _with_untrained(checkpoints: Iterable[Checkpoint], seed: int) -> list[Checkpoint]:
    """Put the untrained model of its first checkpoint's configuration before each model that has no step 0."""
    found: list[Checkpoint] = []
    seen: set[str] = set()
    everything = list(checkpoints)
    begun = {c.model for c in everything if c.step == 0}
    for checkpoint in everything:
        if checkpoint.model not in seen | begun:
            revision = f"untrained, seed {seed}"
            found.append(replace(checkpoint, revision=revision, step=0, tokens=0, untrained=True, weights=()))
        seen.add(checkpoint.model)
        found.append(checkpoint)
    return found
