"""Measure checkpoint after checkpoint into a file of results. This is called a *sweep*.

One model is in memory at a time, and the next one is fetched meanwhile.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ib_callback.checkpoints.load import Loading, family_of, loaded, num_parameters
from ib_callback.checkpoints.material import Material
from ib_callback.checkpoints.place import Checkpoint, Tell
from ib_callback.common.errors import RanksError, TrajectoryError
from ib_callback.common.files import size_of
from ib_callback.common.messages import describe
from ib_callback.common.ranks import Kept, Ranks
from ib_callback.measuring.increments import mean_increments
from ib_callback.measuring.meter import Meter
from ib_callback.results.lines import Origin, Row, read_rows
from ib_callback.results.measurement import Measurement
from ib_callback.results.metrics import FIRST_SHOWN, FIRST_VIEW
from ib_callback.results.results import append_result

_LONGEST_REASON = 800  # long enough for the remedies, which come last
# Keywords of a meter that do not change what a number means.
_HOW = ("batch_size", "memory_budget", "progress")
_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(Meter).parameters.items()}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How to measure checkpoints.

    Attributes:
        material: the probes of each model, by its name.
        meter: keywords of `Meter`.
        loading: how to load models.
        family: family of all models; None: taken from their configuration.
        tokens_per_step: number of tokens in a step. It gives the tokens of a checkpoint unless the trainer counted
            them, because names round them.
        evict: whether to remove each checkpoint from the cache after it is measured.
        increments: number of permutations that test what each order adds (`Measurement.increments`); 0: no test.
        tell: function that shows a message to the user.
        ranks: the processes that share each measurement; only the first one reads and writes the file.
    """

    material: Mapping[str, Material]
    meter: Mapping[str, Any] = field(default_factory=dict)
    loading: Loading = field(default_factory=Loading)
    family: str | None = None
    tokens_per_step: int | None = None
    evict: bool = False
    increments: int = 0
    tell: Tell = lambda _: None
    ranks: Ranks = field(default_factory=Ranks.alone)


@dataclass(frozen=True)
class Report:
    """The result of a sweep.

    Attributes:
        measured: number of checkpoints measured now.
        known: number of checkpoints that the file already had, with the same probe and settings.
        failed: names of the other checkpoints, each with the reason.
    """

    measured: int
    known: int
    failed: tuple[tuple[str, str], ...]


def run_sweep(checkpoints: Sequence[Checkpoint], path: Path, sweep: Sweep) -> Report:
    """Measure every checkpoint that the file does not hold yet, and append each as soon as it is measured.

    For a checkpoint that cannot be fetched, loaded or measured, the file gets a line with the reason. The next call
    tries it again.

    Raises:
        TypeError, ValueError: a setting of the meter is invalid.
        TrajectoryError: the file is damaged, cannot be written, is not a file of results, or has other checkpoints with
            these names; or another process writes it.
    """
    measuring, ranks = Measuring(sweep), sweep.ranks
    requests = {model: _request(each, sweep) for model, each in sweep.material.items()}
    old: list[Row] = []

    def left() -> list[Checkpoint]:
        old.extend(read_rows(path) if size_of(path) else [])
        _check_names(old, checkpoints, path)
        # The step is included because a file such as best.ckpt is overwritten again and again.
        done = {(o.model, o.revision, m.step, o.request) for o, m in old if o is not None and m.error is None}
        return [c for c in checkpoints if (c.model, c.revision, c.step, requests[c.model]) not in done]

    with ExitStack() as lock:
        ranks.by_first(lambda: lock.enter_context(_alone_with(path)) and None)
        todo = ranks.by_first(left)
        if len(todo) < len(checkpoints):
            sweep.tell(f"{len(checkpoints) - len(todo)} of {len(checkpoints)} checkpoints are already in {path}")
        failed = []
        clock = _Clock(len(todo))
        for number, (checkpoint, folder) in enumerate(_fetched(todo, evict=sweep.evict and ranks.is_local_first), 1):
            origin, measurement = measuring.of(checkpoint, folder)
            origin = replace(origin, request=requests[checkpoint.model])
            ranks.by_first(partial(_append, path, old, origin, measurement))
            if measurement.error is not None:
                failed.append((checkpoint.name, measurement.error))
            sweep.tell(f"[{number}/{len(todo)}] {checkpoint.name}: {_brief(measurement)}{clock.left(number)}")
        return Report(len(todo) - len(failed), len(checkpoints) - len(todo), tuple(failed))


def _append(path: Path, old: list[Row], origin: Origin, measurement: Measurement) -> None:
    """Append a measurement, unless the file has the same failure already."""
    if measurement.error is None or not _is_known(old, origin, measurement):
        append_result(path, origin, measurement)


def _fetched(checkpoints: Sequence[Checkpoint], *, evict: bool) -> Iterator[tuple[Checkpoint, Path | Exception]]:
    """Each checkpoint with its path, or with the error of fetching it. The next is fetched while one is in use.

    Files are evicted only while nothing is fetched, because two revisions may share files of the cache.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="ib_callback_fetch")
    try:
        ahead: Future[Path] | None = None
        for index, checkpoint in enumerate(checkpoints):
            now = ahead or pool.submit(checkpoint.place.fetch)
            error = now.exception()
            if evict and index and checkpoints[index - 1].place.source != checkpoint.place.source:
                checkpoints[index - 1].place.evict()
            following = checkpoints[index + 1] if index + 1 < len(checkpoints) else None
            ahead = None if following is None else pool.submit(following.place.fetch)
            if error is not None and not isinstance(error, Exception):
                raise error
            yield checkpoint, now.result() if error is None else error
        if evict and checkpoints:
            checkpoints[-1].place.evict()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Measuring:
    """Loads and measures checkpoints one at a time. It keeps the meter of only one model, because plans may be large.

    Args:
        sweep: how to measure.

    Raises:
        TypeError, ValueError: a setting of the meter is invalid.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        for material in sweep.material.values():
            _meter(material, sweep)  # reports invalid settings before anything is loaded
        self._material: Material | None = None
        self._meter: Meter | None = None

    def of(self, checkpoint: Checkpoint, folder: Path | Exception) -> tuple[Origin, Measurement]:
        """Measure a checkpoint; return its origin and the measurement, a missing point if anything goes wrong.

        Args:
            checkpoint: the checkpoint.
            folder: its path, or the reason why it could not be fetched.
        """
        sweep, tokens = self._sweep, checkpoint.tokens
        if (tokens is None or checkpoint.rounded) and checkpoint.step is not None and sweep.tokens_per_step is not None:
            tokens = checkpoint.step * sweep.tokens_per_step
        origin = Origin(
            model=checkpoint.model, revision=checkpoint.revision, family=sweep.family, stage=checkpoint.stage,
            tokens=tokens, source=None if checkpoint.untrained else checkpoint.place.source,
        )  # fmt: skip
        kept = Kept()
        try:
            with ExitStack() as loading:
                # Every rank loads the model before they measure together.
                model: Any = kept(lambda: loading.enter_context(self._loaded(checkpoint, folder)))
                sweep.ranks.agree_on(kept)
                known: dict[str, Any] = {"num_parameters": num_parameters(model)}
                known["family"] = sweep.family or family_of(model)
                meter = self._meter_of(checkpoint.model)
                measurement = meter.measure(model, step=checkpoint.step)
                if sweep.increments:
                    test = partial(mean_increments, meter, num_permutations=sweep.increments)
                    tested = sweep.ranks.by_first(partial(test, model))
                    measurement = replace(measurement, increments=tested)
                del model
            return replace(origin, **known), replace(measurement, tokens_seen=tokens)
        except RanksError:
            raise
        except Exception as error:
            reason = " ".join(describe(error).split())[:_LONGEST_REASON]
            return origin, Measurement.failed(checkpoint.step, reason, settings={})
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _loaded(self, checkpoint: Checkpoint, folder: Path | Exception) -> AbstractContextManager[Any]:
        if isinstance(folder, Exception):
            raise folder
        return loaded(folder, self._sweep.loading, untrained=checkpoint.untrained)

    def _meter_of(self, model: str) -> Meter:
        material = self._sweep.material[model]
        if self._meter is None or material is not self._material:
            self._material, self._meter = material, None
            self._meter = _meter(material, self._sweep)
        return self._meter


def _check_names(old: Iterable[Row], checkpoints: Iterable[Checkpoint], path: Path) -> None:
    """Check that a file holds results, and no other checkpoints with the names of these."""
    sources = {}
    for origin, _ in old:
        if origin is None:
            raise TrajectoryError(
                f"{path}: expected a file of results, got the trajectory of a run, which names no models. Give another "
                "file with -o"
            )
        if origin.source is not None:
            sources[origin.model, origin.revision] = origin.source
    for checkpoint in checkpoints:
        before, now = sources.get((checkpoint.model, checkpoint.revision)), checkpoint.place.source
        if before is not None and not checkpoint.untrained and _is_elsewhere(before, now):
            raise TrajectoryError(
                f"{path}: expected a different name for each checkpoint. The file has {checkpoint.name} from {before}, "
                f"and now the name stands for {now}. Give another --name or another -o. If both belong to one model, "
                "name both places in one command"
            )


def _is_elsewhere(before: str, now: str) -> bool:
    """Whether two sources are different. A branch may move to another commit, and a folder may be moved."""
    if os.path.isabs(before) and os.path.isabs(now):
        return before != now and os.path.exists(before)
    return before.rpartition("@")[0] != now.rpartition("@")[0]


def _brief(measurement: Measurement) -> str:
    """A short text of a measurement that shows whether it went as expected."""
    if measurement.error is not None:
        return f"not measured: {measurement.error}"
    shown = {f"{FIRST_VIEW} score": measurement.shown_first()[FIRST_SHOWN[0]], "loss": measurement.loss}
    plain = {name: getattr(measurement, name) for name in ("complexity", "expressivity", "optimality")}
    shown |= {f"{measurement.primary} {name}" if name == "complexity" else name: plain[name] for name in plain}
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)
    return f"{numbers}, {measurement.seconds or 0.0:.1f} s"


def _meter(material: Material, sweep: Sweep) -> Meter:
    meter = Meter(material.probe, feature_probes=material.features, **sweep.meter)
    if sweep.increments and len(meter.orders) < 2:
        raise ValueError(
            f"--increments: expected at least two orders, got only {', '.join(meter.orders)}. Add another with --order"
        )
    return meter


def _request(material: Material, sweep: Sweep) -> str:
    """A digest of everything that is requested, except the model."""
    features: Any = material.features
    named = features.items() if isinstance(features, Mapping) else enumerate(features)
    # A keyword that equals its default counts as left out.
    meter = {name: _plain(value) for name, value in sorted(sweep.meter.items()) if name not in _HOW}
    asked = {
        "probe": material.probe.fingerprint,
        "features": [[str(name), probe.fingerprint] for name, probe in named],
        "meter": {name: value for name, value in meter.items() if value != _plain(_DEFAULTS.get(name))},
        "dtype": sweep.loading.dtype,
        # Left out if not requested, so digests in existing files stay valid.
        **({"increments": sweep.increments} if sweep.increments else {}),
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


def _is_known(old: Iterable[Row], origin: Origin, failure: Measurement) -> bool:
    """Whether the file has the same failure of the same checkpoint already."""
    key = (origin.model, origin.revision, failure.step, origin.request, failure.error)
    return any(o is not None and (o.model, o.revision, m.step, o.request, m.error) == key for o, m in old)


class _Clock:
    """Estimates the remaining time from the time so far."""

    def __init__(self, total: int) -> None:
        self._total, self._start = total, time.monotonic()

    def left(self, done: int) -> str:
        if done == self._total:
            return ""
        seconds = (time.monotonic() - self._start) / done * (self._total - done)
        return f"; about {_duration(seconds)} left"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def _alone_with(path: Path) -> Iterator[None]:
    """Make sure that no other sweep writes the file meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # If the file system has no locks, no marker file is used instead, because it would outlive a killed sweep.
    lock = FileLock(path.with_name(f".{path.name}.lock"), blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise TrajectoryError(
            f"{path}: another process is writing results to this file. Wait until it ends, or give another file with "
            "-o. Files of results can be concatenated later"
        ) from None
    except OSError:  # the file system has no locks
        pass
    try:
        yield
    finally:
        lock.release()
