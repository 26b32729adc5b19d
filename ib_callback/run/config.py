"""How to follow a run: the keywords that `ib.Run` and the callbacks of all trainers share."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from types import NoneType
from typing import Any, TypeVar, get_type_hints

from ib_callback.common.checks import check_integer
from ib_callback.common.files import on_this_machine
from ib_callback.measuring.meter import Meter
from ib_callback.results.guard import Guard, check_guard, is_left_open
from ib_callback.results.phases import DEFAULT_RULE, PhaseRule
from ib_callback.results.selection import SelectFrom, Selection
from ib_callback.results.stopping import PlateauStopping
from ib_callback.run.names import DEFAULT_PREFIX, check_prefix
from ib_callback.run.schedule import Schedule, as_schedule, as_steps, is_list

Init = TypeVar("Init", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How to follow a run, with any trainer or training loop.

    Args:
        every_n_steps: when to measure: an int, a list of steps, `ib.logarithmic()`, or any callable step -> bool.
        at_start: whether to measure the model when the run begins, at step 0 or at the step where it resumes. The
            phases use this point. False leaves it out, unless `every_n_steps` is your own list or callable and names
            this step. With `select` it is measured anyway, and one warning says so.
        at_finish: whether to measure the last step even if the schedule leaves it out.
        early_stopping: a rule such as `ib.PlateauStopping()`. None never stops the training.
        select: the number that chooses the best checkpoint: `"optimality"`, another metric or a feature. An
            `ib.Selection` also works; its own `select_from` counts then, and its own `guard` if it has one. While no
            point can be selected, the checkpoint with the lowest held-out loss is kept (`.selected.fallback`).
        select_from: when selection begins: "compression", "fit" or a step. The `ib/selectable/...` numbers use it too.
            They hold what could be selected when they were logged. A stock callback that keeps the best of them still
            keeps it when the loss falls later. `ib/selectable/loss` from step 0 on (lower is better) avoids this.
        guard: the check on the loss on held-out text. With "loss", no run is stopped as converged, and no checkpoint is
            selected, if this loss speaks against it. A number does the same with that tolerance in nats per token. None
            applies exactly the published rules. A guard given to `early_stopping` or `select` itself, even "loss",
            replaces this one for that rule.
        from_trained: whether the run begins from trained weights, as fine-tuning does. Such a run has no phases. Its
            rules act from the first point, without the guard unless the guard is a tolerance. None: step 0 decides.
        phase_rule: when a phase counts as recognised. Stopping, selection, summary, tables and pictures all use this
            rule. By default it is the rule of `early_stopping` and `select`, which must agree.
        output_dir: where the files go. By default, a callback writes where its trainer's own files go.
        log_plane: whether to draw the information plane, as a file and for Weights & Biases, which gets two more
            pictures. This needs Matplotlib.
        overhead_budget: the share of the wall-clock time that measuring may take. While it has taken more, scheduled
            points are skipped. The budget does not skip other measurements: the first and the last step, every
            checkpoint with `select`, and evaluations by which a trainer judges. These may exceed it, and a line at the
            end says so. Which points are skipped depends on the clock, so an interrupted run may have different points.
        tokens_per_step: training tokens of one optimizer step, summed over all devices and accumulated batches.
            `ib/tokens_seen` is computed from it if the trainer does not count tokens.
        mix_settings: whether to continue the trajectory of a resumed run even if its settings have changed.
        check_overlap: how many training examples to search for the probes at the start. Any overlap is a warning. 0
            searches none.
        prefix: start of all logged keys, such as `"code/"`. Two callbacks with two probes need a prefix each. Files and
            saved state are named after it: `"code/"` writes `code_trajectory.jsonl`.
        console: whether to print one line when the run begins and one line for each measurement. The lines go through
            the logger `ib_callback` or, if logging is not set up, to standard error. None follows the trainer's own
            switch; `ib.Run` then prints. Decisions, warnings and the total cost are printed in any case.
        alert: whether to call `wandb.run.alert` and `trackio.alert`, as far as they have an open run. An alert is sent
            when a rule says to stop, and when the model memorises, has collapsed or diverges. Each kind is sent once.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, or two different rules for phases.
    """

    every_n_steps: int | Iterable[int] | Schedule = 500
    at_start: bool = True
    at_finish: bool = True
    early_stopping: PlateauStopping | None = None
    select: str | Selection | None = None
    select_from: SelectFrom = "compression"
    guard: Guard = "loss"
    from_trained: bool | None = None
    phase_rule: PhaseRule | None = None
    output_dir: str | os.PathLike[str] | None = None
    log_plane: bool = True
    overhead_budget: float | None = None
    tokens_per_step: int | None = None
    mix_settings: bool = False
    check_overlap: int = 0
    prefix: str = DEFAULT_PREFIX
    console: bool | None = None
    alert: bool = False

    def __post_init__(self) -> None:
        if is_list(self.every_n_steps):
            # Read the steps once, because a generator would have none left for the schedule.
            object.__setattr__(self, "every_n_steps", as_steps(self.every_n_steps))
        as_schedule(self.every_n_steps)
        object.__setattr__(self, "guard", check_guard(self.guard))
        check_prefix(self.prefix)
        if not isinstance(self.console, (bool, NoneType)):
            raise TypeError(f"console: expected True, False or None, got {self.console!r}.")
        for name in ("at_start", "at_finish", "alert"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}.")
        if not isinstance(self.from_trained, (bool, NoneType)):
            raise TypeError(f"from_trained: expected True, False or None, got {self.from_trained!r}.")
        if self.early_stopping is not None and not isinstance(self.early_stopping, PlateauStopping):
            raise TypeError(
                f"early_stopping: expected an ib.PlateauStopping or None, got {self.early_stopping!r}; "
                "ib.PlateauStopping() stops on the distance to the bound"
            )
        if self.select is not None and not isinstance(self.select, (str, Selection)):
            raise TypeError(
                f"select: expected the name of a metric or feature, or an ib.Selection, got {self.select!r}"
            )
        if self.tokens_per_step is not None:
            cure = "all devices and accumulated batches together; None if unknown"
            check_integer("tokens_per_step", self.tokens_per_step, minimum=1, cure=cure)
        if self.overhead_budget is not None and not 0 < self.overhead_budget < 1:
            raise ValueError(
                "overhead_budget is a share of the wall-clock time: expected a number between 0 and 1, such as 0.01, "
                f"or None for no limit, got {self.overhead_budget!r}"
            )
        check_integer(
            "check_overlap",
            self.check_overlap,
            minimum=0,
            cure="it is a number of training examples, 0 to look at none",
        )
        if self.phase_rule is not None and not isinstance(self.phase_rule, PhaseRule):
            raise TypeError(f"phase_rule: expected an ib.PhaseRule or None, got {self.phase_rule!r}.")
        if not isinstance(self.output_dir, (str, os.PathLike, NoneType)):
            raise TypeError(f"output_dir: expected a path or None, got {self.output_dir!r}.")
        if self.output_dir is not None:
            object.__setattr__(self, "output_dir", on_this_machine("output_dir", self.output_dir))
        self.rule_of_phases()

    @property
    def schedule(self) -> Schedule:
        """`every_n_steps` as a callable."""
        return as_schedule(self.every_n_steps)

    def rule_of_phases(self) -> PhaseRule:
        """The one phase rule of the run, as given. Stopping and selection each add what follows from their guard.

        Raises:
            ValueError: `early_stopping`, `select` and `phase_rule` were given different rules.
        """
        given = {"phase_rule": self.phase_rule}
        if self.early_stopping is not None:
            given["early_stopping"] = self.early_stopping.phase_rule
        if isinstance(self.select, Selection):
            given["select"] = self.select.phase_rule
        # A rule that nobody chose gives way to one that somebody did.
        chosen = {name: rule for name, rule in given.items() if rule not in (None, DEFAULT_RULE)}
        if len(set(chosen.values())) > 1:
            raise ValueError(
                f"phase_rule: expected one rule for the whole run, got different ones of {' and '.join(chosen)}. Give "
                "it once, as phase_rule="
            )
        rule = next((rule for rule in chosen.values() if rule is not None), DEFAULT_RULE)
        return rule if self.from_trained is None else replace(rule, from_trained=self.from_trained)

    @property
    def stopping(self) -> PlateauStopping | None:
        """`early_stopping` with the guard and the phase rule of the run, where it has none of its own."""
        rule = self.early_stopping
        if rule is None:
            return None
        guard, phases = self._guard_of(rule), self.rule_of_phases()
        # Keep the given object if possible, because its user may look into it.
        kept = guard == rule.guard and phases == rule.phase_rule
        return rule if kept else replace(rule, guard=guard, phase_rule=phases)

    @property
    def selection(self) -> Selection:
        """`select` as a rule. If it is None, the rule behind the `ib/selectable/...` numbers."""
        chosen = self.select
        if not isinstance(chosen, Selection):
            chosen = Selection(chosen or "optimality", select_from=self.select_from)
        return replace(chosen, guard=self._guard_of(chosen), phase_rule=self.rule_of_phases())

    @property
    def guards(self) -> dict[str, Guard]:
        """The guard of each rule of the run, by the rule's name. Selection is always there, for `ib/selectable/...`."""
        stopping = self.stopping
        return {**({} if stopping is None else {"stopping": stopping.guard}), "selection": self.selection.guard}

    def _guard_of(self, rule: PlateauStopping | Selection) -> Guard:
        return self.guard if is_left_open(rule.guard) else rule.guard


def takes_keywords_of(*owners: type) -> Callable[[Init], Init]:
    """Show the keywords that an `__init__` with `**keywords` really takes, to help(), editors and command lines."""

    def with_signature(init: Init) -> Init:
        own = [p for p in inspect.signature(init).parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = {name: p for owner in owners for name, p in inspect.signature(owner).parameters.items()}
        keywords = [p for name, p in taken.items() if p.kind is p.KEYWORD_ONLY and name not in {p.name for p in own}]
        # Types rather than strings, because other modules could not resolve the strings.
        hints: dict[str, Any] = {}
        for taker in (*(owner.__init__ for owner in owners), init):  # type: ignore[misc]
            hints |= get_type_hints(taker)
        parameters = [p.replace(annotation=hints.get(p.name, p.annotation)) for p in (*own, *keywords)]
        init.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        init.__annotations__ = {p.name: hints[p.name] for p in parameters if p.name in hints}
        return init

    return with_signature


def split_keywords(owner: str, keywords: Mapping[str, Any]) -> tuple[RunConfig, dict[str, Any]]:
    """Split the keywords of a callback into its configuration and the keywords of `Meter`.

    Raises:
        TypeError: a keyword that neither of them takes, or a value of the wrong type.
        ValueError: a value out of range.
    """
    of_meter = [name for name, p in inspect.signature(Meter).parameters.items() if p.kind is p.KEYWORD_ONLY]
    own = {name: value for name, value in keywords.items() if name not in of_meter}
    return run_config(owner, own, f", and those of Meter: {', '.join(of_meter)}"), {
        name: value for name, value in keywords.items() if name in of_meter
    }


def run_config(owner: str, keywords: Mapping[str, Any], others: str) -> RunConfig:
    """Build a configuration from keywords.

    Args:
        owner: who takes the keywords; for the error message.
        keywords: their values by name.
        others: what else the owner takes, or where else a keyword may belong; for the error message.

    Raises:
        TypeError: an unknown keyword, or a value of the wrong type.
        ValueError: a value out of range.
    """
    own = [field.name for field in fields(RunConfig)]
    unknown = [name for name in keywords if name not in own]
    if unknown:
        raise TypeError(
            f"{owner} got the unknown keyword{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}; it takes "
            f"{', '.join(own)}{others}."
        )
    return RunConfig(**keywords)
