from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from ib_callback import Measurement
from ib_callback.common.errors import RanksError
from ib_callback.common.ranks import Kept, Ranks, first_different, first_failure, is_launched, of_rank_zero

# What two processes make of it: tests/run/trainers/test_ranks.py.


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_alone_it_is_the_value_itself() -> None:
    value = object()
    assert of_rank_zero(value) is value


@pytest.mark.parametrize("value", [None, True, (1, "text"), Measurement.failed(3, "NaN in h.0", settings={"seed": 0})])
def test_in_a_group_any_value_can_be_sent(value: object, group_of_one: None) -> None:
    assert of_rank_zero(value) == value


def test_a_failure_is_that_of_the_lowest_rank_that_has_one(group_of_one: None) -> None:
    assert first_failure(None) is None
    assert first_failure("out of luck") == (0, "out of luck")


def test_alone_a_failure_is_that_of_this_process() -> None:
    assert first_failure(None) is None
    assert first_failure("out of luck") == (0, "out of luck")


def test_a_single_process_differs_from_nobody(group_of_one: None) -> None:
    assert first_different(["a" * 64]) is None


def test_what_the_first_finds_is_found_by_each(group_of_one: None) -> None:
    assert Ranks().by_first(lambda: 7) == 7
    with pytest.raises(KeyError, match="lost"):
        Ranks().by_first(lambda: {}["lost"])


def test_what_is_kept_is_the_first_failure_and_is_raised_once() -> None:
    kept = Kept()
    assert kept(lambda: 7) == 7
    assert kept(lambda: 1 / 0) is None
    kept(lambda: int("x"))
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        kept.release()
    kept.release()
    with pytest.raises(RanksError, match="rank 1 is gone"):  # nobody survives it
        kept(lambda: _lose())


def _lose() -> None:
    raise RanksError("rank 1 is gone")


def test_only_a_launcher_of_several_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert not is_launched()
    monkeypatch.setenv("WORLD_SIZE", "4")  # as a scheduler may, without a launcher
    assert not is_launched()
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert is_launched()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not is_launched()
