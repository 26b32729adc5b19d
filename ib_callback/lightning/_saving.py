"""Every checkpoint that a Lightning strategy writes or removes, and one of them kept from being removed."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ib_callback.common.messages import describe, warn

_WATCHED = {"save_checkpoint": "_save_and_tell", "remove_checkpoint": "_remove_unless_kept", "teardown": "_tear_down"}


class SavingWatch:
    """Sees checkpoints come and go, whichever callback makes them; until `close`, or until the strategy ends.

    Lightning tells callbacks neither where a checkpoint goes nor when it is complete, and `ModelCheckpoint` removes
    its own by its own rules. All of them go through two public methods of the strategy, which are put in
    front here, on this one object.

    Args:
        trainer: whose strategy saves and whose checkpoint callbacks decide what to remove.
        before: called with what is going to be written, on every rank; it may still be changed.
        after: called with step and path when it is complete, on every rank.
        copied: called with step and path of a copy, on rank 0: the checkpoint to keep is about to be overwritten.
        state: `state_dict()` of an earlier part of the run.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        before: Callable[[dict[str, Any]], None],
        after: Callable[[int, Path], None],
        copied: Callable[[int, Path], None],
        state: Mapping[str, Any],
    ) -> None:
        self._trainer = trainer
        self._strategy = strategy = trainer.strategy
        self._before = before
        self._after = after
        self._copied = copied
        self._kept: Path | None = None
        self._kept_step = 0
        self._removable = False  # whether a callback might remove what is kept, when it was chosen
        # By absolute path: as the strategy was given it.
        self._withheld: dict[Path, Any] = {_absolute(path): path for path in state.get("withheld", ())}
        self._original = {name: getattr(strategy, name) for name in _WATCHED}
        # A method of the class comes back by itself; what somebody else has put in front has to be put back.
        self._in_front = {name: vars(strategy).get(name) for name in _WATCHED}
        for name, own in _WATCHED.items():
            setattr(strategy, name, getattr(self, own))

    def state_dict(self) -> dict[str, Any]:
        """Checkpoints that would have been removed but for `keep`, or will be when this one has been saved."""
        paths = {path: os.fspath(given) for path, given in self._withheld.items()}
        if self._kept is not None and self._removable and self._kept not in self._may_be_removed():
            # A callback takes it off its list first, saves the next one then, and removes this one last.
            paths.setdefault(self._kept, str(self._kept))
        return {"withheld": list(paths.values())}

    def keep(self, path: Path | None, step: int = 0) -> None:
        """Keep this checkpoint, and no earlier one any longer: those that should have been removed now are.

        Args:
            path: the checkpoint; None for none.
            step: whose weights it holds.
        """
        kept = None if path is None else _absolute(path)
        if kept != self._kept:
            self._removable = kept in self._may_be_removed()
        self._kept, self._kept_step = kept, step
        for withheld in [path for path in self._withheld if path != kept]:
            original = self._withheld.pop(withheld)
            if withheld.exists():
                self._original["remove_checkpoint"](original)

    def close(self) -> None:
        """Give the strategy its own methods back."""
        in_front, self._in_front = self._in_front, {}
        for name, earlier in in_front.items():
            if earlier is None:
                vars(self._strategy).pop(name, None)
            else:
                setattr(self._strategy, name, earlier)

    def _save_and_tell(self, checkpoint: dict[str, Any], filepath: Any, *args: Any, **kwargs: Any) -> None:
        step, path = int(checkpoint["global_step"]), _absolute(filepath)
        if path == self._kept and step != self._kept_step:
            self._copy_kept(path)
        # Written again, it is no longer what was to be removed.
        self._withheld.pop(path, None)
        self._before(checkpoint)
        self._original["save_checkpoint"](checkpoint, filepath, *args, **kwargs)
        self._after(step, path)

    def _remove_unless_kept(self, filepath: Any) -> None:
        path = _absolute(filepath)
        if path == self._kept:
            self._withheld[path] = filepath
        else:
            self._original["remove_checkpoint"](filepath)

    def _tear_down(self) -> None:
        self.close()
        self._original["teardown"]()

    def _copy_kept(self, path: Path) -> None:
        """Save what is kept from being overwritten. It is not moved: a run killed now may resume from it."""
        copy: Path | None = None
        if self._trainer.is_global_zero:
            try:
                copy = _copy(path, f"step={self._kept_step}-{path.name}")
                self._copied(self._kept_step, copy)
            except Exception as error:  # the next one has to be saved all the same
                warn(
                    f"The best checkpoint, {path}, is about to be overwritten, and could not be copied. "
                    f"{describe(error)}"
                )
        copy = self._strategy.broadcast(copy)
        if copy is not None:
            self._kept = copy
            self._withheld[copy] = str(copy)

    def _may_be_removed(self) -> set[Path]:
        """All that a `ModelCheckpoint` may yet remove by its own rules."""
        resumed_from = self._trainer.ckpt_path
        spared = None if resumed_from is None else _absolute(resumed_from)
        found: set[Path] = set()
        for callback in self._trainer.checkpoint_callbacks:
            if getattr(callback, "save_top_k", -1) != -1 and callback.dirpath is not None:
                paths = (*callback.best_k_models, callback.best_model_path, callback.last_model_path)
                below = _absolute(callback.dirpath)
                found |= {path for path in map(_absolute, filter(None, paths)) if below in path.parents}
        return found - {spared}


def _copy(path: Path, name: str) -> Path:
    """A complete copy of a file or folder beside it, under a name that is not taken."""
    partial = path.with_name(f".{name}.partial")
    if path.is_dir():
        shutil.copytree(path, partial, dirs_exist_ok=True)
    else:
        shutil.copyfile(path, partial)
    numbers = itertools.count(1)
    copy = path.with_name(name)
    while copy.exists():
        copy = path.with_name(f"{Path(name).stem}-v{next(numbers)}{path.suffix}")
    os.replace(partial, copy)
    return copy


def _absolute(path: Any) -> Path:
    try:
        return Path(os.path.abspath(path))
    except Exception:  # as where the working directory is gone; a checkpoint is saved all the same
        return Path(path)
