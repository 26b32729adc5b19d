"""A fault at a call into others ends no training and changes none: a fixed sample of the sweep.

The sweep itself, over all calls, is `tests/support/kills/broken_calls.py`, and its table lies beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from kills import broken_calls
from kills.runs import ForkServer
from lightning.pytorch import Callback
from transformers import TrainerCallback

from ib_callback import hf, lightning


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    made = ForkServer("kills.broken_calls")
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(server: ForkServer) -> Any:
    """By trainer: how it ends, and its calls."""
    return {trainer: broken_calls.sites(server, trainer) for trainer in ("hf", "lightning")}


SAMPLE = [
    ("hf", "tell -> _io.write", "mute"),
    ("hf", "_append -> posix.fsync", "EIO"),
    ("hf", "log_by_itself -> kills.broken_calls.on_log", "mute"),
    ("hf", "log -> kills.broken_calls.log", "strict"),
    ("hf", "at_work -> time.perf_counter", "mute"),
    ("lightning", "_set_wandb_runs -> kills.broken_calls.experiment", "EIO"),
    ("lightning", "_set_wandb_runs -> lightning.pytorch.trainer.trainer.loggers", "mute"),
    ("lightning", "log_numbers -> lightning_utilities.core.rank_zero.wrapped_fn", "strict"),
    ("lightning", "_absolute -> posixpath.abspath", "EIO"),
    ("lightning", "release -> filelock._api.release", "mute"),
]


@pytest.mark.parametrize(("trainer", "call", "kind"), SAMPLE)
def test_a_fault_in_a_call_ends_and_changes_nothing(
    trainer: str, call: str, kind: str, server: ForkServer, undisturbed: Any
) -> None:
    whole, sites = undisturbed[trainer]
    site, number = [place for place in sites if place[0].endswith(f" {call}")][-1]
    outcome = broken_calls.run(server, trainer, fault=(site, number, kind))
    assert outcome["raised"]
    assert broken_calls.verdict(whole, outcome) in ("nothing lost", "told")


# Before the first step mistakes are raised; two are guarded inside, for something must be given back.
UNGUARDED = {"on_train_begin", "on_train_start", "on_load_checkpoint", "load_state_dict", "setup", "state_key"} | {
    "on_evaluate", "on_fit_end", "state_dict"
}  # fmt: skip


@pytest.mark.parametrize(("callback", "base"), [(hf.IBCallback, TrainerCallback), (lightning.IBCallback, Callback)])
def test_every_event_is_guarded(callback: type, base: type) -> None:
    events = {name for name in vars(callback) if not name.startswith("_") and hasattr(base, name)}
    unguarded = {name for name in events if not hasattr(inspect.getattr_static(callback, name), "__wrapped__")}
    assert len(events) > 5
    assert unguarded <= UNGUARDED
