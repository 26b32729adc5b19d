"""Watches the checkpoints that a Lightning strategy writes and removes, and keeps one from being removed."""

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
    """Sees every checkpoint come and go, whichever callback makes it, until `close` or the end of the strategy.

    Lightning does not tell callbacks where a checkpoint goes or when it is complete. `ModelCheckpoint` removes its own
    checkpoints by its own rules. All checkpoints pass through two public methods of the strategy, so these methods are
    replaced here, on this one object. A plugin that writes in its own thread (`AsyncCheckpointIO`) returns before the
    file is there. Such a checkpoint is kept from removal until `settle` finds it complete.

    Only checkpoints that Lightning has asked to remove are removed. If it asked in an earlier part of the run, two
    conditions must hold. The checkpoint is in a directory of a `ModelCheckpoint` of this Trainer, and the record of
    this very run says that the run wrote it.

    Args:
        trainer: the Trainer. Its strategy saves, and its checkpoint callbacks decide what to remove.
        before: called on every rank with what is about to be written and its path. It may still change the content.
        after: called on every rank with step and path when a checkpoint is complete. If the checkpoint is written in
            the background, `settle` calls it.
        copied: called on rank 0 with step and path of a copy, made when the checkpoint to keep is about to be
            overwritten.
        directory: directory of the run. Paths in `state_dict()` are relative to it.
        own_step: gives the step of a checkpoint that this run wrote, by its own record; None for any other path.
        state: `state_dict()` of an earlier part of the run.
        lasting: steps by path of checkpoints that must never be removed. These are the best ones of an earlier part
            that cannot be compared with later ones.
        compares: whether kept checkpoints can be compared with those that the earlier part kept. If not, those are
            never removed either.
        unexchanged: a context in which the model has the weights in training, because what is saved refers to them.
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
        self._pending: dict[
            Path, tuple[int, _Version]
        ] = {}  # checkpoints being written: the step, and what was there before
        self._removable = False  # whether a callback might remove the kept one, at the time it was chosen
        # By absolute path: the path as the strategy was given it.
        self._withheld: dict[Path, Any] = {}
        self._lasting = {path: step for path, step in (lasting or {}).items() if _may_exist(path)}
        earlier = [path for path in map(self.absolute, state.get("withheld", ())) if _may_exist(path)]
        if compares:
            self._withheld.update((path, str(path)) for path in earlier if path not in self._lasting)
        else:
            self._lasting = {**{path: own_step(path) or 0 for path in earlier}, **self._lasting}
        # Some ranks may not see the files, and only one has the record.
        self._withheld, self._lasting = strategy.broadcast((self._withheld, self._lasting))
        self._unproven = set(self._withheld)  # known only from the state of an earlier part of the run
        if trainer.is_global_zero:
            self._remove_partial_copies()
        self._original = {name: getattr(strategy, name) for name in _WATCHED}
        # A method of the class returns by itself. A replacement by somebody else has to be put back.
        self._in_front = {name: vars(strategy).get(name) for name in _WATCHED}
        for name, own in _WATCHED.items():
            setattr(strategy, name, getattr(self, own))

    def state_dict(self) -> dict[str, Any]:
        """Checkpoints that `keep` has saved from removal, or will have once this one has been saved."""
        paths = list(self._withheld)
        if self._kept is not None and self._removable and self._kept not in {*paths, *self._may_be_removed()}:
            # A callback first takes it off its list, then saves the next one, and removes this one last.
            paths.append(self._kept)
        lasting = [{"step": step, "path": self.relative(path)} for path, step in self._lasting.items()]
        return {"withheld": [self.relative(path) for path in paths], **({"lasting": lasting} if lasting else {})}

    def relative(self, path: Path) -> str:
        """A path as the state has it. It is relative, so that a copy of the run does not name files of the original."""
        try:
            return Path(os.path.relpath(path, self._directory)).as_posix()
        except ValueError:  # another drive
            return str(path)

    def absolute(self, name: str) -> Path:
        """The path that `relative` was given. States of earlier versions have absolute paths."""
        return _absolute(self._directory / name)

    def keep(self, path: Path | None, step: int = 0, *, certain: bool = True) -> None:
        """Keep this checkpoint instead of any earlier one. Removals that were held back are made now.

        Args:
            path: the checkpoint; None to keep none.
            step: the step whose weights it holds.
            certain: whether it is known that no other checkpoint is the best. While it is not, nothing is removed.

        Raises:
            Exception: the strategy could not remove a checkpoint. The next call tries again.
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
        """Call `after` for checkpoints in the background that are complete by now. Call this on every rank.

        Args:
            wait: whether to wait until all checkpoints in the background are complete.
        """
        if not self._pending:
            return
        if wait:
            for plugin in self._background():
                with suppress(Exception):  # the strategy raises this as well, at its end
                    plugin.teardown()  # the plugin starts anew when it is needed again
        complete: list[Path] = []
        if self._trainer.is_global_zero:
            complete = [path for path, (_, before) in self._pending.items() if self._is_written(path, before)]
        complete = self._strategy.broadcast(complete)
        for path in complete:
            step, _ = self._pending.pop(path)
            self._after(step, path)
        if complete:  # perhaps they were held back only because they were being written
            with suppress(Exception):  # a checkpoint that cannot be removed stays
                self.keep(self._kept, self._kept_step, certain=self._certain)

    def _is_written(self, path: Path, before: _Version) -> bool:
        try:
            return _version_of(path) != before and is_complete(path)
        except OSError:
            return True  # this cannot be told now; the record handles such a checkpoint when it is asked

    def _background(self) -> list[Any]:
        """The plugins of either package that write in the background."""
        found, plugin = [], getattr(self._strategy, "checkpoint_io", None)
        while plugin is not None:  # plugins may contain each other
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
        if is_remote(filepath):  # such a file cannot be kept, copied or looked for as on a disk
            self._original["save_checkpoint"](checkpoint, filepath, *args, **kwargs)
            return
        self.settle()
        step, path = int(checkpoint["global_step"]), _absolute(filepath)
        if path in self._pending or (path == self._kept and self._background()):
            self.settle(wait=True)  # the file there must be complete before it is copied or overwritten
        held = self._lasting.get(path, self._kept_step if path == self._kept else step)
        if held != step:
            self._copy_held(path, held)
        # The path is written again, so it no longer holds what was to be removed.
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
        # A checkpoint that is still being written may be the best. Also, there would be no file to remove yet.
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
            # After an error, this may be the only rank that gets here. It would wait for the others in vain.
            if not self._trainer.interrupted or self._trainer.world_size == 1:
                self.settle()

    def _remove(self, withheld: Path) -> None:
        if withheld in self._lasting or size_of(withheld) is None:
            return
        if withheld not in self._unproven or self._is_own(withheld):
            # Do not call the original method, because another callback of ours may keep this checkpoint.
            self._strategy.remove_checkpoint(self._withheld[withheld])
        elif self._trainer.is_global_zero:
            warn(
                f"{withheld} is no longer the best checkpoint, by what the one resumed from says. It is left alone, "
                "for no record shows that this run wrote it to a directory of its own: remove it yourself if you like."
            )

    def _is_own(self, path: Path) -> bool:
        """Whether this run wrote it to a directory of a `ModelCheckpoint` of this Trainer, with links followed."""
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
        """Copy a kept checkpoint before it is overwritten. A run killed now may resume from it, so do not move it."""
        copy: Path | None = None
        if self._trainer.is_global_zero:
            name = f"step={step}-{path.name}"
            try:
                try:
                    copy = _copy(path, name, self._partial_ending)
                except Exception:
                    # Move it then. To resume from an earlier checkpoint is better than to lose this one.
                    copy = _free_name(path, name)
                    os.replace(path, copy)
            except Exception as error:  # the next checkpoint has to be saved nevertheless
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
        """The ending of incomplete copies. It differs between runs, because two may save in one directory."""
        return f".{zlib.crc32(os.fsencode(self._directory)):08x}.partial"

    def _remove_partial_copies(self) -> None:
        """Remove the incomplete copies that this run left when it was killed."""
        ours = re.compile(rf"\.step=\d+-.*{re.escape(self._partial_ending)}")
        with suppress(OSError):
            for callback in self._checkpoint_callbacks():
                folder = Path(callback.dirpath)
                for path in [folder / name for name in os.listdir(folder) if ours.fullmatch(name)]:
                    _remove_partial(path)

    def _may_be_removed(self) -> set[Path]:
        """All checkpoints that a `ModelCheckpoint` may still remove by its own rules."""
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
    """Copy a file or folder completely, in the same directory, under a name that is not taken."""
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
    """An unused path in the same directory as another path."""
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
    """A value that changes when a file or the content of a folder is written again; None if there is nothing."""
    try:
        files = [path, *path.rglob("*")]
        return frozenset((str(f), (s := f.stat()).st_ino, s.st_size, s.st_mtime_ns) for f in files)
    except OSError:
        return None


def _absolute(path: Any) -> Path:
    try:
        return Path(os.path.abspath(expanded(path)))  # Lightning writes through fsspec, which does the same
    except Exception:  # the working directory may be gone; the checkpoint is still saved
        return Path(path)
