"""Every checkpoint that a Lightning strategy writes or removes, and one of them kept from being removed."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from ib_callback.common.files import expanded, first_of, is_remote, size_of
from ib_callback.common.messages import describe, warn
from ib_callback.run.checkpoints import is_complete

_WATCHED = {"save_checkpoint": "_save_and_tell", "remove_checkpoint": "_remove_unless_kept", "teardown": "_tear_down"}


class SavingWatch:
    """Sees checkpoints come and go, whichever callback makes them; until `close`, or until the strategy ends.

    Lightning tells callbacks neither where a checkpoint goes nor when it is complete, and `ModelCheckpoint` removes
    its own by its own rules. All of them go through two public methods of the strategy, which are put in
    front here, on this one object. A plugin that writes in a thread of its own (`AsyncCheckpointIO`) returns before the
    file is there: such a checkpoint waits, kept from removal, until `settle` finds it whole.

    Nothing is removed that Lightning has not asked for. What it asked of an earlier part of the run is removed if it
    lies in a directory of a `ModelCheckpoint` of this Trainer, and the record of this very run says that it wrote it.

    Args:
        trainer: whose strategy saves and whose checkpoint callbacks decide what to remove.
        before: called with what is going to be written and its path, on every rank; it may still be changed.
        after: called with step and path when it is complete, on every rank; where it is written in the background,
            within `settle`.
        copied: called with step and path of a copy, on rank 0: the checkpoint to keep is about to be overwritten.
        directory: of the run, to which paths in `state_dict()` are relative.
        own_step: the step of a checkpoint that the record of this run says it wrote; None for any other path.
        state: `state_dict()` of an earlier part of the run.
        lasting: steps by path of checkpoints that are never to be removed: the best of an earlier part, with which
            nothing can be compared any more.
        compares: whether what is kept is compared with what the earlier part kept; else that is never removed either.
        unexchanged: a context in which the model has the weights of its training, to which what is saved refers.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        before: Callable[[dict[str, Any], Path], None],
        after: Callable[[int, Path], None],
        copied: Callable[[int, Path], None],
        directory: Path,
        own_step: Callable[[Path], int | None],
        state: Mapping[str, Any],
        lasting: Mapping[Path, int] | None = None,
        compares: bool = True,
        unexchanged: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._trainer = trainer
        self._strategy = strategy = trainer.strategy
        self._before = before
        self._after = after
        self._copied = copied
        self._unexchanged = unexchanged
        self._directory = _absolute(directory)
        self._own_step = own_step
        self._kept: Path | None = None
        self._kept_step = 0
        self._certain = True
        self._pending: dict[Path, tuple[int, _Version]] = {}  # being written: the step, and what was there before
        self._removable = False  # whether a callback might remove what is kept, when it was chosen
        # By absolute path: as the strategy was given it.
        self._withheld: dict[Path, Any] = {}
        self._lasting = {path: step for path, step in (lasting or {}).items() if _may_exist(path)}
        earlier = [path for path in map(self.absolute, state.get("withheld", ())) if _may_exist(path)]
        if compares:
            self._withheld.update((path, str(path)) for path in earlier if path not in self._lasting)
        else:
            self._lasting = {**{path: own_step(path) or 0 for path in earlier}, **self._lasting}
        # Not every rank may see the files, and only one has the record.
        self._withheld, self._lasting = strategy.broadcast((self._withheld, self._lasting))
        self._unproven = set(self._withheld)  # only what an earlier part of the run says of them is known
        if trainer.is_global_zero:
            self._remove_partial_copies()
        self._original = {name: getattr(strategy, name) for name in _WATCHED}
        # A method of the class comes back by itself; what somebody else has put in front has to be put back.
        self._in_front = {name: vars(strategy).get(name) for name in _WATCHED}
        for name, own in _WATCHED.items():
            setattr(strategy, name, getattr(self, own))

    def state_dict(self) -> dict[str, Any]:
        """Checkpoints that would have been removed but for `keep`, or will be when this one has been saved."""
        paths = list(self._withheld)
        if self._kept is not None and self._removable and self._kept not in {*paths, *self._may_be_removed()}:
            # A callback takes it off its list first, saves the next one then, and removes this one last.
            paths.append(self._kept)
        lasting = [{"step": step, "path": self.relative(path)} for path, step in self._lasting.items()]
        return {"withheld": [self.relative(path) for path in paths], **({"lasting": lasting} if lasting else {})}

    def relative(self, path: Path) -> str:
        """A path as it is kept in the state: a copy of the run must not name files of the original."""
        try:
            return Path(os.path.relpath(path, self._directory)).as_posix()
        except ValueError:  # another drive
            return str(path)

    def absolute(self, name: str) -> Path:
        """What `relative` was given; earlier versions kept absolute paths."""
        return _absolute(self._directory / name)

    def keep(self, path: Path | None, step: int = 0, *, certain: bool = True) -> None:
        """Keep this checkpoint, and no earlier one any longer: those that should have been removed now are.

        Args:
            path: the checkpoint; None for none.
            step: whose weights it holds.
            certain: whether it is known that no other one is the best; else nothing is removed until it is.

        Raises:
            Exception: what the strategy raises that could not remove one; the next call tries again.
        """
        kept = None if path is None else _absolute(path)
        if kept != self._kept:
            self._removable = kept in self._may_be_removed()
        self._kept, self._kept_step, self._certain = kept, step, certain
        failure: Exception | None = None
        waiting = self._pending.keys() | {kept}
        for withheld in [path for path in self._withheld if path not in waiting] if certain else []:
            try:
                self._remove(withheld)
            except Exception as error:
                failure = error
            else:
                del self._withheld[withheld]
        if failure is not None:
            raise failure

    def settle(self, *, wait: bool = False) -> None:
        """Tell of the checkpoints that were being written and are complete by now; on every rank.

        Args:
            wait: until all that are being written in the background are.
        """
        if not self._pending:
            return
        if wait:
            for plugin in self._background():
                with suppress(Exception):  # which the strategy raises as well, at its end
                    plugin.teardown()  # it starts anew when it is needed again
        complete: list[Path] = []
        if self._trainer.is_global_zero:
            complete = [path for path, (_, before) in self._pending.items() if self._is_written(path, before)]
        complete = self._strategy.broadcast(complete)
        for path in complete:
            step, _ = self._pending.pop(path)
            self._after(step, path)
        if complete:  # which may have been withheld for no other reason than that it was being written
            with suppress(Exception):  # what cannot be removed stays
                self.keep(self._kept, self._kept_step, certain=self._certain)

    def _is_written(self, path: Path, before: _Version) -> bool:
        try:
            return _version_of(path) != before and is_complete(path)
        except OSError:
            return True  # nobody can tell; the record says so when it is asked

    def _background(self) -> list[Any]:
        """The plugins that write in the background, of either package."""
        found, plugin = [], getattr(self._strategy, "checkpoint_io", None)
        while plugin is not None:  # they may be in one another
            if any(base.__name__ == "AsyncCheckpointIO" for base in type(plugin).__mro__):
                found.append(plugin)
            plugin = getattr(plugin, "checkpoint_io", None)
        return found

    def close(self) -> None:
        """Give the strategy its own methods back."""
        in_front, self._in_front = self._in_front, {}
        for name, earlier in in_front.items():
            if earlier is None:
                vars(self._strategy).pop(name, None)
            else:
                setattr(self._strategy, name, earlier)

    def _save_and_tell(self, checkpoint: dict[str, Any], filepath: Any, *args: Any, **kwargs: Any) -> None:
        if is_remote(filepath):  # nothing of it can be kept, copied or looked for by the means of a disk
            self._original["save_checkpoint"](checkpoint, filepath, *args, **kwargs)
            return
        self.settle()
        step, path = int(checkpoint["global_step"]), _absolute(filepath)
        if path in self._pending or (path == self._kept and self._background()):
            self.settle(wait=True)  # what is there must be whole before it is copied or written over
        held = self._lasting.get(path, self._kept_step if path == self._kept else step)
        if held != step:
            self._copy_held(path, held)
        # Written again, it is no longer what was to be removed.
        self._withheld.pop(path, None)
        self._unproven.discard(path)
        background = bool(self._background())
        there = _version_of(path) if background else None
        with self._unexchanged():
            self._before(checkpoint, path)
            self._original["save_checkpoint"](checkpoint, filepath, *args, **kwargs)
        if background:
            self._pending[path] = (step, there)
            self.settle()
        else:
            self._after(step, path)

    def _remove_unless_kept(self, filepath: Any) -> None:
        if is_remote(filepath):
            self._original["remove_checkpoint"](filepath)
            return
        path = _absolute(filepath)
        if path in self._lasting:
            return
        # One that is still being written may be the best; nor would anything be found to be removed.
        if path == self._kept or not self._certain or path in self._pending:
            self._withheld[path] = filepath
            self._unproven.discard(path)
        else:
            self._original["remove_checkpoint"](filepath)

    def _tear_down(self) -> None:
        self.close()
        try:
            self._original["teardown"]()
        finally:
            # After an error this may be the only rank that gets here, and would wait for the others.
            if not self._trainer.interrupted or self._trainer.world_size == 1:
                self.settle()

    def _remove(self, withheld: Path) -> None:
        if withheld in self._lasting or size_of(withheld) is None:
            return
        if withheld not in self._unproven or self._is_own(withheld):
            # Not by the original: another callback of ours may keep it.
            self._strategy.remove_checkpoint(self._withheld[withheld])
        elif self._trainer.is_global_zero:
            warn(
                f"{withheld} is no longer the best checkpoint, by what the one resumed from says. It is left alone, "
                "for no record shows that this run wrote it to a directory of its own: remove it yourself if you like."
            )

    def _is_own(self, path: Path) -> bool:
        """Whether this run wrote it, to where a `ModelCheckpoint` of this Trainer writes, links followed."""
        if self._own_step(path) is None:
            return False
        real = Path(os.path.realpath(path))
        folders = {Path(os.path.realpath(callback.dirpath)): callback for callback in self._checkpoint_callbacks()}
        if any(real == other or real in other.parents for other in [Path(os.path.realpath(self._directory)), *folders]):
            return False
        return any(
            folder in real.parents and real.name.endswith(getattr(callback, "FILE_EXTENSION", ".ckpt"))
            for folder, callback in folders.items()
        )

    def _checkpoint_callbacks(self) -> list[Any]:
        return [callback for callback in self._trainer.checkpoint_callbacks if getattr(callback, "dirpath", None)]

    def _copy_held(self, path: Path, step: int) -> None:
        """Save what is held from being overwritten. It is not moved: a run killed now may resume from it."""
        copy: Path | None = None
        if self._trainer.is_global_zero:
            name = f"step={step}-{path.name}"
            try:
                try:
                    copy = _copy(path, name, self._partial_ending)
                except Exception:
                    # Better that one must resume from an earlier one than that this one is lost.
                    copy = _free_name(path, name)
                    os.replace(path, copy)
            except Exception as error:  # the next one has to be saved all the same
                copy = None
                warn(
                    f"The best checkpoint, {path}, is about to be overwritten, and could not be copied. "
                    f"{describe(error)}"
                )
            else:
                self._copied(step, copy)
        copy = self._strategy.broadcast(copy)
        lasts = self._lasting.pop(path, None) is not None
        if copy is None:
            return
        if lasts:
            self._lasting[copy] = step
        else:
            self._withheld[copy] = str(copy)
        if path == self._kept:
            self._kept = copy

    @property
    def _partial_ending(self) -> str:
        """Of names of copies that are not complete. Two runs may save in one directory."""
        return f".{zlib.crc32(os.fsencode(self._directory)):08x}.partial"

    def _remove_partial_copies(self) -> None:
        """Those that this run left when it was killed."""
        ours = re.compile(rf"\.step=\d+-.*{re.escape(self._partial_ending)}")
        with suppress(OSError):
            for callback in self._checkpoint_callbacks():
                folder = Path(callback.dirpath)
                for path in [folder / name for name in os.listdir(folder) if ours.fullmatch(name)]:
                    _remove_partial(path)

    def _may_be_removed(self) -> set[Path]:
        """All that a `ModelCheckpoint` may yet remove by its own rules."""
        resumed_from = self._trainer.ckpt_path
        spared = None if resumed_from is None else _absolute(resumed_from)
        found: set[Path] = set()
        for callback in self._checkpoint_callbacks():
            if getattr(callback, "save_top_k", -1) != -1:
                paths = (*callback.best_k_models, callback.best_model_path, callback.last_model_path)
                below = _absolute(callback.dirpath)
                found |= {path for path in map(_absolute, filter(None, paths)) if below in path.parents}
        return found - {spared}


def _copy(path: Path, name: str, partial_ending: str) -> Path:
    """A complete copy of a file or folder beside it, under a name that is not taken."""
    partial = path.with_name(f".{name}{partial_ending}")
    try:
        if path.is_dir():
            shutil.copytree(path, partial, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, partial)
        copy = _free_name(path, name)
        os.replace(partial, copy)
    except BaseException:
        with suppress(OSError):
            _remove_partial(partial)
        raise
    return copy


def _free_name(path: Path, name: str) -> Path:
    """A path beside another one at which nothing is."""
    later = (path.with_name(f"{Path(name).stem}-v{number}{path.suffix}") for number in itertools.count(1))
    return first_of(itertools.chain([path.with_name(name)], later))


def _remove_partial(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def _may_exist(path: Path) -> bool:
    try:
        return size_of(path) is not None
    except OSError:
        return True


_Version = frozenset[tuple[str, int, int, int]] | None


def _version_of(path: Path) -> _Version:
    """What changes when a file, or what is in a folder, is written anew; None where nothing is."""
    try:
        files = [path, *path.rglob("*")]
        return frozenset((str(f), (s := f.stat()).st_ino, s.st_size, s.st_mtime_ns) for f in files)
    except OSError:
        return None


def _absolute(path: Any) -> Path:
    try:
        return Path(os.path.abspath(expanded(path)))  # as fsspec does, by which Lightning writes
    except Exception:  # as where the working directory is gone; a checkpoint is saved all the same
        return Path(path)
