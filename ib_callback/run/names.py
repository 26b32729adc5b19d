"""The names of a run's keys and files. With different prefixes, two callbacks can be used side by side."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DEFAULT_PREFIX = "ib/"
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_-]*/")
# A trajectory that was moved away has a number in its name.
_TRAJECTORY = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)_trajectory(\.\d+)?\.jsonl")
# Trainers log their own numbers under these.
_TAKEN = ("train/", "trainer/", "eval/", "test/", "val/")


def check_prefix(prefix: object) -> str:
    """Check a prefix of logged keys and return it.

    Raises:
        TypeError: the prefix is not a text.
        ValueError: it is not one word and a slash, or trainers log their own numbers under this word.
    """
    if not isinstance(prefix, str):
        raise TypeError(f'prefix: expected a text such as "ib/" or "code/", got {prefix!r}.')
    if not _WORD.fullmatch(prefix):
        raise ValueError(
            f'prefix: expected one word and a slash at its end, such as "code/", got {prefix!r}. Letters, digits, "_" '
            'and "-" can be used.'
        )
    if prefix.lower() in _TAKEN:
        raise ValueError(
            f"prefix: expected a word of its own, got {prefix!r}, under which trainers log their own numbers. Use "
            'another one, such as "code/".'
        )
    return prefix


def same_prefix(owner: str, prefix: str) -> str:
    """The message for two callbacks of one trainer that have the same prefix."""
    return (
        f"expected a prefix= of its own for each {owner} of a Trainer, got {prefix!r} twice: they would log under the "
        f'same keys. Give one of them another, such as {owner}(probe, prefix="code/").'
    )


@dataclass(frozen=True)
class Names:
    """The names of a run's files, and its stem for names that cannot have a slash.

    Args:
        prefix: prefix of its logged keys.

    >>> Names("ib/").trajectory, Names("code/").trajectory, Names("code/").plane
    ('ib_trajectory.jsonl', 'code_trajectory.jsonl', 'code_information_plane.png')
    """

    prefix: str = DEFAULT_PREFIX

    @classmethod
    def of(cls, trajectory: Path) -> Names:
        """The names of the files that belong to a trajectory file.

        They have the prefix in its name if another file of a run with this prefix lies beside it. For a file of another
        name, such as a copy, they are the default names.

        >>> Names.of(Path("run/copy.jsonl")).curve
        'ib_curve.json'
        """
        found = _TRAJECTORY.fullmatch(trajectory.name)
        names = cls() if found is None else cls(f"{found[1]}/")
        written = (names.run, names.checkpoints)  # by every run; and by one whose checkpoints are known
        return names if any((trajectory.parent / name).is_file() for name in written) else cls()

    @staticmethod
    def prefix_of(name: str) -> str | None:
        """The prefix of a run whose trajectory file has this name; None if no run writes a trajectory of this name.

        >>> Names.prefix_of("code_trajectory.jsonl"), Names.prefix_of("code_trajectory.1.jsonl")
        ('code/', None)
        """
        found = _TRAJECTORY.fullmatch(name)
        return None if found is None or found[2] else f"{found[1]}/"

    @property
    def stem(self) -> str:
        """The prefix without its slash."""
        return self.prefix.removesuffix("/")

    @property
    def is_default(self) -> bool:
        """Whether nobody has chosen another prefix."""
        return self.prefix == DEFAULT_PREFIX

    @property
    def trajectory(self) -> str:
        """The file of all points, one line per point."""
        return f"{self.stem}_trajectory.jsonl"

    @property
    def checkpoints(self) -> str:
        """The record of which checkpoint holds the weights of which step."""
        return f"{self.stem}_checkpoints.jsonl"

    @property
    def run(self) -> str:
        """The file of what holds for the whole run: phase rule and guards."""
        return f"{self.stem}_run.json"

    @property
    def final(self) -> str:
        """The file of the model that training leaves behind, if no point has its weights."""
        return f"{self.stem}_final.jsonl"

    @property
    def curve(self) -> str:
        """The file of the IB curve, if that is the bound."""
        return f"{self.stem}_curve.json"

    @property
    def plane(self) -> str:
        """The picture of the information plane."""
        return "information_plane.png" if self.is_default else f"{self.stem}_information_plane.png"

    @property
    def lock(self) -> str:
        """The lock of a live run."""
        return ".ib_callback.lock" if self.is_default else f".{self.stem}_callback.lock"

    @property
    def replaced(self) -> str:
        """A regular expression for the files that are replaced as a whole."""
        stem = re.escape(self.stem)
        return rf"{stem}_(trajectory|checkpoints|final)(\.\d+)?\.jsonl|{stem}_(run|curve)\.json|{re.escape(self.plane)}"
