"""Every checkpoint that a Lightning strategy writes or removes, and one of them kept from being removed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class SavingWatch:
    """Sees checkpoints come and go, whichever callback makes them; until `close`.

    Lightning tells callbacks neither where a checkpoint goes nor when it is complete, and `ModelCheckpoint` removes
    its own by its own rules. All of them go through two public methods of the strategy, which are put in
    front here, on this one object.

    Args:
        strategy: of the Trainer.
        before: called before a checkpoint is written, on every rank.
        after: called with step and path when it is complete, on every rank.
        withheld: checkpoints kept from removal in an earlier part of the run.
    """

    def __init__(
        self,
        strategy: Any,
        *,
        before: Callable[[], None],
        after: Callable[[int, Path], None],
        withheld: Iterable[str] = (),
    ) -> None:
        self._strategy = strategy
        self._before = before
        self._after = after
        self._kept: Path | None = None
        # By absolute path: as the strategy was given it.
        self._withheld: dict[Path, Any] = {_absolute(path): path for path in withheld}
        self._save, self._remove = strategy.save_checkpoint, strategy.remove_checkpoint
        strategy.save_checkpoint, strategy.remove_checkpoint = self._save_and_tell, self._remove_unless_kept

    @property
    def withheld(self) -> list[str]:
        """Checkpoints that would have been removed but for `keep`."""
        return [os.fspath(path) for path in self._withheld.values()]

    def keep(self, path: Path | None) -> None:
        """Keep this checkpoint, and no earlier one any longer: those that should have been removed now are."""
        self._kept = None if path is None else _absolute(path)
        for withheld in [path for path in self._withheld if path != self._kept]:
            original = self._withheld.pop(withheld)
            if withheld.exists():
                self._remove(original)

    def close(self) -> None:
        """Give the strategy its own methods back."""
        for name in ("save_checkpoint", "remove_checkpoint"):
            vars(self._strategy).pop(name, None)

    def _save_and_tell(self, checkpoint: dict[str, Any], filepath: Any, *args: Any, **kwargs: Any) -> None:
        self._before()
        # Written again, it is no longer what was to be removed.
        self._withheld.pop(_absolute(filepath), None)
        self._save(checkpoint, filepath, *args, **kwargs)
        self._after(int(checkpoint["global_step"]), _absolute(filepath))

    def _remove_unless_kept(self, filepath: Any) -> None:
        path = _absolute(filepath)
        if path == self._kept:
            self._withheld[path] = filepath
        else:
            self._remove(filepath)


def _absolute(path: Any) -> Path:
    return Path(os.path.abspath(path))
