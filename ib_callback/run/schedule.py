"""When to measure: a schedule is a value that answers `schedule(step) -> bool`.

The first and the last step of a run are measured even if the schedule leaves them out. `at_start=False` and
`at_finish=False` switch this off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeGuard

from ib_callback.common.checks import check_integer

Schedule = Callable[[int], bool]
# How many steps of a list are named one by one.
_SHOWN = 6


@dataclass(frozen=True)
class Every:
    """Every `interval` steps; made by `every`."""

    interval: int

    def __call__(self, step: int) -> bool:
        """Whether to measure at this step."""
        return step % self.interval == 0


@dataclass(frozen=True)
class Logarithmic:
    """`per_decade` steps in each power of ten, evenly spaced on a logarithmic axis; made by `logarithmic`."""

    per_decade: int

    def __call__(self, step: int) -> bool:
        """Whether to measure at this step."""
        if step <= 0:
            return step == 0
        # If any k gives this step after rounding, one of the k next to the exact exponent does.
        nearest = round(math.log10(step) * self.per_decade)
        candidates = range(max(nearest - 1, 0), nearest + 2)
        return any(round(10 ** (k / self.per_decade)) == step for k in candidates)


@dataclass(frozen=True)
class At:
    """At these steps; made from a list of steps."""

    steps: frozenset[int]

    def __call__(self, step: int) -> bool:
        """Whether to measure at this step."""
        return step in self.steps


def every(n: int) -> Every:
    """The steps 0, n, 2n, …

    >>> [step for step in range(11) if every(5)(step)]
    [0, 5, 10]

    Raises:
        TypeError: n is not an integer.
        ValueError: n is less than 1.
    """
    return Every(check_integer("n", n, minimum=1, cure="500 is the default of the callbacks"))


def logarithmic(per_decade: int = 8) -> Logarithmic:
    """The steps 10^(k / per_decade), k = 0, 1, …, rounded, and step 0.

    Much happens in the first steps of a training run, and less and less later. For example, representations collapse
    and spread again within the first hundred steps. This schedule follows all of it with few measurements. At the
    default it makes 40 for 100,000 steps.

    >>> [step for step in range(101) if logarithmic(per_decade=4)(step)]
    [0, 1, 2, 3, 6, 10, 18, 32, 56, 100]

    Raises:
        TypeError: per_decade is not an integer.
        ValueError: per_decade is less than 1.
    """
    return Logarithmic(check_integer("per_decade", per_decade, minimum=1, cure="8 is the default"))


def never_fires(schedule: Schedule, step: int, max_steps: int) -> bool:
    """Whether a schedule wants none of the steps after `step` up to `max_steps`. False if there are no such steps.

    A schedule that is a callable is asked step by step until it wants a step, for at most a million steps.
    """
    if max_steps <= step:
        return False
    if isinstance(schedule, At):
        return not any(step < wanted <= max_steps for wanted in schedule.steps)
    if isinstance(schedule, Every):
        return step // schedule.interval == max_steps // schedule.interval
    return not any(schedule(s) for s in range(step + 1, min(max_steps, step + 1_000_000) + 1))


def count(schedule: Schedule, step: int, max_steps: int) -> int | None:
    """How many of the steps after `step` up to `max_steps` a schedule wants; None for a user's own callable.

    >>> count(every(500), 0, 2_000), count(logarithmic(per_decade=4), 0, 100), count(lambda step: True, 0, 100)
    (4, 9, None)
    """
    if isinstance(schedule, At):
        return sum(step < wanted <= max_steps for wanted in schedule.steps)
    if isinstance(schedule, Every):
        return max(0, max_steps // schedule.interval - step // schedule.interval)
    if isinstance(schedule, Logarithmic):
        most = math.ceil(math.log10(max(max_steps, 1)) * schedule.per_decade) + 1
        wanted = {round(10 ** (k / schedule.per_decade)) for k in range(most + 1)}
        return sum(step < each <= max_steps for each in wanted)
    return None


def in_words(schedule: Schedule) -> str:
    """When a schedule measures, as part of a sentence.

    >>> in_words(every(500)), in_words(as_schedule([1, 10])), in_words(logarithmic())
    ('every 500 steps', 'at steps 1, 10', 'at 8 steps in each power of ten')
    """
    if isinstance(schedule, Every):
        return "after every step" if schedule.interval == 1 else f"every {schedule.interval:,} steps"
    if isinstance(schedule, Logarithmic):
        return f"at {schedule.per_decade} steps in each power of ten"
    if isinstance(schedule, At):
        steps = sorted(schedule.steps)
        shown = ", ".join(f"{step:,}" for step in steps[:_SHOWN])
        return f"at steps {shown}" + (f", … ({len(steps)} steps)" if len(steps) > _SHOWN else "")
    return "when your schedule says so"


def is_list(schedule: object) -> TypeGuard[Iterable[int]]:
    """Whether a schedule was given as a list of steps, or as another iterable of them."""
    return isinstance(schedule, Iterable) and not callable(schedule) and not isinstance(schedule, (str, bytes))


def as_steps(steps: Iterable[int]) -> tuple[int, ...]:
    """Check a list of steps and return it.

    Raises:
        TypeError: the value is not a list of integers.
        ValueError: there is no step, or a step is less than 0.
    """
    cure = "it is a number of optimizer steps taken"
    try:
        given = iter(steps)
    except TypeError:  # an array without a dimension
        raise TypeError(
            f"every_n_steps: expected an integer, a list of steps or a callable step -> bool, got {steps!r}; "
            "of a single number pass int(…)."
        ) from None
    found = tuple(check_integer("every_n_steps", step, minimum=0, cure=cure) for step in given)
    if not found:
        raise ValueError("every_n_steps: expected at least one step, got none; [0] measures before the first step.")
    return found


def as_schedule(schedule: int | Iterable[int] | Schedule) -> Schedule:
    """Turn a number of steps into `every(n)`, and a list of steps into `At`. A callable step → bool stays.

    >>> as_schedule([10, 100, 1000])(100)
    True

    Raises:
        TypeError: the value is neither an integer, nor a list of integers, nor such a callable.
        ValueError: an integer less than 1, a step less than 0, or an empty list.
    """
    for name, function in (("every", every), ("logarithmic", logarithmic)):
        if schedule is function:
            raise TypeError(f"every_n_steps expects a schedule, got the function {name} itself; call it: {name}(…).")
    if callable(schedule):
        return schedule
    if is_list(schedule):
        return At(frozenset(as_steps(schedule)))
    cure = "or pass a list of steps, or a callable step -> bool such as ib.logarithmic()"
    return every(check_integer("every_n_steps", schedule, minimum=1, cure=cure))
