from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest

from ib_callback.run import schedule as module
from ib_callback.run.schedule import Schedule, as_schedule, every, logarithmic, never_fires


def steps_of(schedule: object, last: int) -> list[int]:
    return [step for step in range(last + 1) if schedule(step)]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("schedule", "last", "expected"),
    [
        (every(1), 4, [0, 1, 2, 3, 4]),
        (every(5), 14, [0, 5, 10]),
        (every(100), 99, [0]),
        (as_schedule(3), 7, [0, 3, 6]),
        (as_schedule([4, 1, 4]), 7, [1, 4]),
        (as_schedule(range(2, 6, 2)), 7, [2, 4]),
        (logarithmic(1), 12_345, [0, 1, 10, 100, 1000, 10_000]),
        (logarithmic(3), 1000, [0, 1, 2, 5, 10, 22, 46, 100, 215, 464, 1000]),
        (logarithmic(), 100, [0, 1, 2, 3, 4, 6, 7, 10, 13, 18, 24, 32, 42, 56, 75, 100]),
    ],
    ids=repr,
)
def test_steps(schedule: object, last: int, expected: list[int]) -> None:
    assert steps_of(schedule, last) == expected


@pytest.mark.parametrize("per_decade", [1, 2, 3, 7, 8, 10, 50, 1000])
def test_logarithmic_has_every_rounded_power(per_decade: int) -> None:
    powers = {round(10 ** (k / per_decade)) for k in range(4 * per_decade + 1)}
    assert steps_of(logarithmic(per_decade), 10_000) == [0, *sorted(powers)]


def test_a_callable_is_taken_as_it_is() -> None:
    def powers_of_two(step: int) -> bool:
        return step & (step - 1) == 0

    assert as_schedule(powers_of_two) is powers_of_two


def test_a_list_of_steps_that_holds_none() -> None:
    with pytest.raises(TypeError, match=r"every_n_steps: expected an integer .*got 'often'"):
        as_schedule([10, "often"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="every_n_steps: expected an integer of at least 0, got -1"):
        as_schedule([-1])


@pytest.mark.parametrize(("steps", "never"), [([3], True), ([10], False), ([5, 11], True)])
def test_a_list_of_steps_that_never_comes(steps: list[int], never: bool) -> None:
    assert never_fires(as_schedule(steps), 5, 10) is never


def test_schedules_are_values() -> None:
    assert every(5) == as_schedule(5) != every(6)
    assert pickle.loads(pickle.dumps(logarithmic(4))) == logarithmic(4)
    assert repr(every(5)) == "Every(interval=5)"


@pytest.mark.parametrize("value", [0, -1, -500])
@pytest.mark.parametrize("make", [every, logarithmic, as_schedule])
def test_no_interval_below_one(make: object, value: int) -> None:
    with pytest.raises(ValueError, match=f"expected an integer of at least 1, got {value};"):
        make(value)  # type: ignore[operator]


@pytest.mark.parametrize("value", [True, False, 500.0, "500", None])
@pytest.mark.parametrize("make", [every, logarithmic, as_schedule])
def test_only_integers(make: object, value: object) -> None:
    with pytest.raises(TypeError, match=f"expected an integer of at least 1, got {value!r} "):
        make(value)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["every", "logarithmic"])
def test_a_schedule_that_was_not_called(name: str) -> None:
    with pytest.raises(TypeError, match=rf"got the function {name} itself; call it: {name}\("):
        as_schedule(getattr(module, name))


def only(wanted: int) -> Callable[[int], bool]:
    return lambda step: step == wanted


@pytest.mark.parametrize(
    ("schedule", "step", "max_steps", "never"),
    [
        (every(5), 0, 4, True),
        (every(5), 0, 5, False),
        (every(5), 4, 5, False),
        (every(5), 5, 9, True),
        (every(5), 5, 10, False),
        (every(10**12), 0, 10**12 - 1, True),
        (every(10**12), 0, 10**12, False),
        (logarithmic(1), 0, 9, False),
        (logarithmic(1), 10, 99, True),
        (logarithmic(1), 10, 100, False),
        (only(7), 0, 6, True),
        (only(7), 0, 7, False),
        (only(7), 7, 20, True),
        # No steps are left, as where a finished run is resumed.
        (every(5), 10, 10, False),
        (only(7), 10, 10, False),
        (every(5), 12, 10, False),
    ],
)
def test_a_schedule_that_never_fires(schedule: Schedule, step: int, max_steps: int, never: bool) -> None:
    assert never_fires(schedule, step, max_steps) is never


def test_a_schedule_is_not_asked_for_ever() -> None:
    asked = []

    def late(step: int) -> bool:
        asked.append(step)
        return step == 10**9

    assert never_fires(late, 5, 10**10)
    assert (asked[0], asked[-1]) == (6, 1_000_005)
