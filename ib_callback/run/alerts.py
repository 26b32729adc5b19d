"""Alerts of W&B and Trackio: messages to people who are not watching the run."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from ib_callback.common.messages import describe, warn
from ib_callback.results.phases import Phase
from ib_callback.run.rules import LiveRules


class Alerts:
    """Tells each kind of trouble once, to every tracker that has an open run."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def begin(self, rules: LiveRules) -> None:
        """Treat everything that a resumed run has already come to as told."""
        self._told = set(_kinds(rules))

    def update(self, rules: LiveRules, step: int, wandb_runs: Iterable[Any], *, stem: str) -> None:
        """Send what is new at the last point. A tracker that fails causes a warning.

        Args:
            rules: the rules of the run, after they have taken the point.
            step: the step of the point.
            wandb_runs: open runs of W&B.
            stem: the prefix without its slash, for the title.
        """
        for kind, text in _kinds(rules).items():
            if kind not in self._told:
                self._told.add(kind)
                self._send(f"{stem}: {kind} at step {step:,}", text, wandb_runs)

    def _send(self, title: str, text: str, wandb_runs: Iterable[Any]) -> None:
        sent = False
        for name, alert in _targets(wandb_runs):
            try:
                alert(title, text)
                sent = True
            except Exception as error:  # a failing tracker must not end the run
                warn(f"The alert {title!r} could not be sent to {name}. Training goes on. {describe(error)}")
        if not sent and "no tracker" not in self._told:
            self._told.add("no tracker")
            warn(
                f"The alert {title!r} reached nobody: expected an open run of Weights & Biases or Trackio, got none. "
                "Open one (report_to=, wandb.init or trackio.init), or pass alert=False. Training goes on."
            )


def _kinds(rules: LiveRules) -> dict[str, str]:
    """The trouble that the run is in at its last point: a text for each kind."""
    found: dict[str, str] = {}
    decision = rules.decision
    if decision is not None and decision.would_stop:
        told = "training stops" if decision.stop else "training would stop"
        found[decision.reason.value] = f"{told}: {decision.message}"
    if rules.phase is Phase.MEMORISING:
        found.setdefault("memorising", "the held-out loss rises while the training loss falls")
    if rules.collapsed:
        found.setdefault("collapsed", "the expressivity has fallen far below its maximum since the fit began")
    return found


def _targets(wandb_runs: Iterable[Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for run in wandb_runs:
        if hasattr(run, "alert"):
            found.append(("Weights & Biases", lambda title, text, run=run: run.alert(title=title[:63], text=text)))
    trackio = sys.modules.get("trackio")
    if trackio is not None and open_trackio_run() is not None:
        found.append(("Trackio", lambda title, text: trackio.alert(title=title, text=text)))
    return found


def open_trackio_run() -> Any | None:
    """The run of Trackio that is open in this process, or None. This does not import Trackio."""
    variables = getattr(sys.modules.get("trackio"), "context_vars", None)
    current = getattr(variables, "current_run", None)
    return None if current is None else current.get()
