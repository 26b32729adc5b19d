"""Errors that users may want to distinguish. Each message says what was expected, what was found, and the cure."""

from __future__ import annotations


class ProbeError(ValueError):
    """A probe that cannot be built, read or measured."""


class ModelError(ValueError):
    """A model that cannot be measured as asked: no blocks found, vocabulary or position limit exceeded."""


class RepresentationError(RuntimeError):
    """Representations that have no direction, so no information can be computed: zero vectors, NaN or inf."""


class TrajectoryError(ValueError):
    """A trajectory file that cannot be read or written."""


class RanksError(RuntimeError):
    """The ranks of a distributed training have lost contact with each other. No rank can continue after this error."""
