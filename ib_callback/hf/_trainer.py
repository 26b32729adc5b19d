"""What HuggingFace's Trainer needs from the callback: metric names, its best model, and order of callbacks."""

from __future__ import annotations

import functools
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ib_callback.common import messages
from ib_callback.results.metrics import better_direction
from ib_callback.run.names import same_prefix
from ib_callback.run.rules import LiveRules


def evaluation_key(name: str, stem: str = "ib") -> str:
    """The name of a number in the Trainer's evaluation metrics.

    >>> evaluation_key("selectable/bigram/optimality")
    'eval_ib_selectable_bigram_optimality'
    >>> evaluation_key("loss", "code")
    'eval_code_loss'
    """
    return f"eval_{stem}_" + name.replace("/", "_")


def watched_metric(
    args: TrainingArguments, names: Iterable[str], *, selects: bool = False, stem: str = "ib"
) -> str | None:
    """The key of our number by which the Trainer judges its models; None if it judges by another number.

    Args:
        args: the arguments of the Trainer.
        names: names of all numbers that are measured.
        selects: whether the callback selects checkpoints. Without evaluations the Trainer then judges nothing, but it
            still requires a name for `save_strategy="best"`.
        stem: prefix of the numbers without its slash.

    Raises:
        ValueError: there is no such number; the message lists those that exist. Or the number is better when low, but
            the Trainer has been told, or assumes, that it is better when high.
    """
    metric = args.metric_for_best_model
    if metric is None:
        return None
    known = {evaluation_key(name, stem): name for name in names}
    if not metric.removeprefix("eval_").startswith((f"{stem}_", f"{stem}/")):
        of_dataset = next((k for k in known if metric.endswith(f"_{k.removeprefix('eval_')}")), None)
        if of_dataset is not None:
            raise ValueError(
                f'metric_for_best_model="{metric}" does not exist, because the model is measured on the probe, not on '
                f'an evaluation dataset. Use "{of_dataset.removeprefix("eval_")}".'
            )
        return None
    key = metric if metric.startswith("eval_") else f"eval_{metric}"
    if key not in known:
        existing = ", ".join(name.removeprefix("eval_") for name in known)
        raise ValueError(f'metric_for_best_model="{metric}" is not measured; those measured: {existing}.')
    if args.eval_strategy == "no":
        if selects:
            return None
        raise ValueError(
            f'metric_for_best_model="{metric}" is looked up at evaluations, but eval_strategy is "no". Set '
            'eval_strategy, or choose checkpoints without evaluating: save_strategy="best" and select="optimality" of '
            "the callback."
        )
    direction = better_direction(known[key])
    if direction == "min" and args.greater_is_better:
        raise ValueError(
            f'metric_for_best_model="{metric}" is better when low, but greater_is_better is True (so it is by default '
            'for every name that does not end in "loss"): the worst model would be kept. Set greater_is_better=False.'
        )
    if direction == "max" and not args.greater_is_better:
        warn(
            f'metric_for_best_model="{metric}" is better when high, but greater_is_better is False: the worst model '
            "will be kept."
        )
    if args.lr_scheduler_type == "reduce_lr_on_plateau":
        _check_plateau_scheduler(args, known[key])
    return key


def _check_plateau_scheduler(args: TrainingArguments, name: str) -> None:
    """Warn if ReduceLROnPlateau would take the metric the wrong way round, or take its absence for a plateau."""
    keywords: Any = args.lr_scheduler_kwargs or {}
    mode = better_direction(name)
    if mode is not None and keywords.get("mode", "min") != mode:
        warn(
            f'lr_scheduler_type="reduce_lr_on_plateau" watches metric_for_best_model="{args.metric_for_best_model}", '
            f"which is better when {'high' if mode == 'max' else 'low'}, the other way round: set "
            f'lr_scheduler_kwargs={{"mode": "{mode}"}}.'
        )
    if name.startswith("selectable/"):
        warn(
            f'lr_scheduler_type="reduce_lr_on_plateau" watches metric_for_best_model="{args.metric_for_best_model}", '
            "which is NaN until it can be selected: that counts as no improvement, and the learning rate is reduced. "
            "Use another scheduler."
        )


def judges_by_itself(args: TrainingArguments) -> bool:
    """Whether the Trainer chooses a best model itself, by its metric."""
    return args.metric_for_best_model is not None and args.eval_strategy != "no"


def check_saving(args: TrainingArguments, rules: LiveRules, stem: str = "ib") -> bool:
    """Check who decides when to save, and return whether the callback does.

    Raises:
        ValueError: nobody decides, or two do.
    """
    best, evaluates, selects = args.save_strategy == "best", args.eval_strategy != "no", rules.selects
    by = rules.selection.by
    instead = f'metric_for_best_model="{stem}_selectable_{by.replace("/", "_")}"'
    if best and not evaluates and not selects:
        raise ValueError(
            'save_strategy="best" without evaluation never saves anything: expected select= of IBCallback to say '
            'which point is the best, such as select="optimality"; or set eval_strategy.'
        )
    if best and evaluates and selects:
        raise ValueError(
            f'save_strategy="best" with evaluation saves by metric_for_best_model, and select="{by}" wants to '
            f'decide as well. Use one of them: {instead} without select=, or eval_strategy="no".'
        )
    if selects and args.save_strategy == "no":
        raise ValueError(
            f'select="{by}" chooses among checkpoints, but save_strategy is "no". Set save_strategy="steps", '
            'or "best" to save whenever a point is the best so far.'
        )
    if selects and args.save_total_limit and judges_by_itself(args):
        warn(
            f'The Trainer protects its own best model (metric_for_best_model="{args.metric_for_best_model}") from '
            f'save_total_limit={args.save_total_limit}, and can protect only one: what select="{by}" chooses may '
            f"be deleted. Use {instead}."
        )
    return best and not evaluates


def for_evaluation(numbers: Mapping[str, float | int | None], stem: str = "ib") -> dict[str, float]:
    """Numbers by evaluation key. Undefined ones are left out, because JSON cannot express them."""
    named = {evaluation_key(name.removeprefix(f"{stem}/"), stem): value for name, value in numbers.items()}
    return {key: float(value) for key, value in named.items() if value is not None and math.isfinite(value)}


def keep_out_of_tables(handler: CallbackHandler | None, callback: TrainerCallback, keys: Iterable[str]) -> None:
    """Hide these numbers from a notebook's table of progress, which has a column for each metric.

    This holds for the current evaluation. A table that comes before `callback` needs no change, because it was written
    when the numbers were not there yet.
    """
    later = [] if handler is None else handler.callbacks[handler.callbacks.index(callback) + 1 :]
    for other in later:
        # Compare names, because the module of this class can be imported in notebooks only.
        if any(base.__name__ == "NotebookProgressCallback" for base in type(other).__mro__):
            _call_without(other, frozenset(keys))


def _call_without(table: Any, keys: frozenset[str]) -> None:
    show, in_front = table.on_evaluate, vars(table).get("on_evaluate")

    def on_evaluate(*args: Any, metrics: dict[str, float], **kwargs: Any) -> Any:
        if in_front is None:
            vars(table).pop("on_evaluate", None)
        else:
            table.on_evaluate = in_front
        hidden = {key: metrics.pop(key) for key in keys & metrics.keys()}
        try:
            return show(*args, metrics=metrics, **kwargs)
        finally:
            metrics.update(hidden)

    table.on_evaluate = on_evaluate


def save_without_infinity(state: TrainerState) -> None:
    """Until `save_as_it_is`, save a best metric of infinity, which means that there is none yet, as None.

    The Trainer sets infinity between an evaluation and a checkpoint, where it calls no callback.
    """
    vars(state)["save_to_json"] = _WithoutInfinity(state, vars(state).get("save_to_json"))


class _WithoutInfinity:
    """Replaces a state's `save_to_json`. It is an object, so that a deep copy of the state gets its own."""

    def __init__(self, state: TrainerState, hidden: Callable[..., None] | None) -> None:
        self.hidden = hidden  # a replacement that somebody else had put there
        self._state = state

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        best = self._state.best_metric
        self._state.best_metric = finite_best(best)
        try:
            save = self.hidden or functools.partial(type(self._state).save_to_json, self._state)
            save(*args, **kwargs)
        finally:
            self._state.best_metric = best


def save_as_it_is(state: TrainerState) -> None:
    """End `save_without_infinity`. A replacement that somebody else has made since then stays."""
    ours = vars(state).get("save_to_json")
    if isinstance(ours, _WithoutInfinity):
        del vars(state)["save_to_json"]
        if ours.hidden is not None:
            vars(state)["save_to_json"] = ours.hidden
    state.best_metric = finite_best(state.best_metric)


def finite_best(best: float | None) -> float | None:
    """The best metric; None if no evaluation has had one yet, for which the Trainer has infinity."""
    return None if best is None or math.isinf(best) else best


def callers() -> Iterator[Any]:
    """`self` of each running method, innermost first, because the Trainer does not show itself to callbacks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame.f_locals.get("self")
        frame = frame.f_back


def find_handler(callback: TrainerCallback) -> CallbackHandler | None:
    """The handler that is calling `callback`; None if something else is calling.

    The Trainer gives its callbacks everything except each other. The other callbacks are needed because of their order
    and the places that they log to.
    """
    handlers = (owner for owner in callers() if isinstance(owner, CallbackHandler))
    return next((handler for handler in handlers if callback in handler.callbacks), None)


def check_prefixes(handler: CallbackHandler | None, callback: TrainerCallback, prefix: str) -> None:
    """Raise a ValueError if another IBCallback of the Trainer has the same prefix."""
    others = [] if handler is None else handler.callbacks
    if any(other is not callback and getattr(other, "prefix", None) == prefix for other in others):
        raise ValueError(same_prefix(type(callback).__name__, prefix))


def warn_if_two_select(handler: CallbackHandler | None, callback: TrainerCallback, args: TrainingArguments) -> None:
    """Warn at the last of several callbacks that select, because the Trainer keeps the best checkpoint of one only."""
    others = [] if handler is None else handler.callbacks
    selecting = [other for other in others if isinstance(other, type(callback)) and getattr(other, "selects", False)]
    if len(selecting) < 2 or selecting[-1] is not callback:
        return
    told = f"{len(selecting)} callbacks of this Trainer have select=, expected one: the Trainer"
    if args.save_total_limit and args.save_total_limit > 0:
        warn(
            f"{told} protects one best checkpoint from save_total_limit={args.save_total_limit}. What the other "
            "callbacks choose may be deleted. Leave their select= out, or save_total_limit."
        )
    if args.load_best_model_at_end:
        warn(
            f"{told} loads one best model at the end, that of the last callback to choose. Leave the other select= out."
        )


def check_order(handler: CallbackHandler | None, callback: TrainerCallback) -> None:
    """Raise a ValueError if an EarlyStoppingCallback would look for a number before the callback adds it."""
    for other in [] if handler is None else handler.callbacks:
        if other is callback:
            return
        if isinstance(other, EarlyStoppingCallback):
            raise ValueError(
                f"{type(other).__name__} comes before {type(callback).__name__} in callbacks and would never find its "
                f"numbers. Put {type(callback).__name__} first: callbacks=[IBCallback(…), EarlyStoppingCallback(…)]."
            )


def shows_lines(args: TrainingArguments) -> bool:
    """Whether the Trainer shows progress: bars are on (`disable_tqdm`), and the log level shows warnings."""
    return not args.disable_tqdm and args.get_process_log_level() <= logging.WARNING


def warn(message: str) -> None:
    """Issue a RuntimeWarning that points to the caller of the function that calls this."""
    messages.warn(message, stacklevel=3)


def last_logged_loss(state: TrainerState) -> float | None:
    """The training loss that the Trainer logged last, a mean over its logging steps; None before the first."""
    return next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
