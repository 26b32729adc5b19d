"""The results of a run: what it cost to follow, the selected checkpoint, and a summary for a logger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ib_callback.results.measurement import Measurement
from ib_callback.results.metrics import FIRST_SHOWN, FIRST_VIEW, PRIMARY_SCALARS
from ib_callback.results.selection import Choice
from ib_callback.results.trajectory import Trajectory
from ib_callback.run.names import DEFAULT_PREFIX
from ib_callback.run.rules import LiveRules


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of following a run so far, in this process.

    Attributes:
        points: number of measurements.
        seconds: wall-clock time of everything that the callback did: measuring, writing, drawing.
        share: this time as a share of the wall-clock time since training began.
        skipped: scheduled points that were left out to stay within `overhead_budget`.
    """

    points: int
    seconds: float
    share: float
    skipped: int

    def __str__(self) -> str:
        text = f"{self.points} measurements took {self.seconds:.1f} s, {self.share:.1%} of the time"
        return f"{text}; {self.skipped} more were skipped to save time" if self.skipped else text


@dataclass(frozen=True, kw_only=True)
class Selected:
    """The checkpoint that is the best one so far.

    Attributes:
        step: optimizer steps taken before it.
        value: the value by which it was selected. For a fallback, its held-out loss, or None without a loss.
        path: where it is; None if it has yet to be written.
        fallback: whether it is kept only because nothing could be selected. The fallback is the checkpoint with the
            lowest held-out loss or, without a loss, the latest.
    """

    step: int
    value: float | None
    path: Path | None
    fallback: bool = False

    @classmethod
    def of(cls, choice: Choice, existing: Mapping[int, Path] | Mapping[int, Path | None]) -> Selected | None:
        """The chosen one of the checkpoints, which are given by step; None if none was chosen."""
        chosen = choice.best or choice.fallback
        if chosen is None:
            return None
        step, fallback = chosen.measurement.step, choice.best is None
        assert step is not None  # without a step it could not have been selected
        value = chosen.measurement.loss if fallback else chosen.value
        return cls(step=step, value=value, path=existing.get(step), fallback=fallback)


def summarise(
    trajectory: Trajectory,
    rules: LiveRules,
    cost: Cost,
    selected: Selected | None,
    final: Measurement | None = None,
    *,
    prefix: str = DEFAULT_PREFIX,
) -> dict[str, float | str]:
    """Best point, phases, last values, what stopped the run and what following it cost, by full name.

    If no point has the weights of the `final` model, its numbers have their own names, such as `ib/final/optimality`.

    A value that does not exist is left out, such as the start of a phase that was not reached.
    """
    phases = rules.phases()
    best = rules.selection.best(trajectory)
    primary = next((point.primary for point in reversed(trajectory) if point.orders), None)
    first = [f"{FIRST_VIEW}/{primary}/{name}" for name in FIRST_SHOWN]
    values: dict[str, float | str | None] = {
        "best_step": None if best is None else best.step,
        "best_by": rules.selection.by,
        "best_value": None if best is None else rules.selection.value(best),
        "fit_start": phases.fit_start,
        "compression_start": phases.compression_start,
        "memorising_start": phases.memorising_start,
        "phases_read_on": phases.plane,
        "guard_stopping": None if rules.stopping is None else str(rules.stopping.guard),
        "guard_selection": str(rules.selection.guard),
        **{f"final_{name}": rules.numbers().get(name) for name in (*first, "loss", *PRIMARY_SCALARS)},
        "selected_step": None if selected is None else selected.step,
        "selected_as_fallback": None if selected is None or not selected.fallback else "yes",
        "selected_checkpoint": None if selected is None else str(selected.path),
        "stop_reason": None if rules.decision is None else rules.decision.reason.value,
        "would_stop": None if rules.decision is None or not rules.decision.would_stop else "yes",
        "stop_message": None if rules.decision is None else rules.decision.message,
        "cost_seconds": cost.seconds,
        "cost_share": cost.share,
        "skipped_points": cost.skipped,
        **({} if final is None else final.metrics("final/")),
    }
    return {f"{prefix}{name}": value for name, value in values.items() if value is not None}
