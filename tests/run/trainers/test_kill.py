"""Killed at any point and resumed, a run ends as if nothing had happened.

What is a trainer's own (a part of a run, places to die at, checkpoints that are whole) is in `tests/support/kills`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from kills import hf, lightning
from kills.runs import ForkServer, KilledRun, run_in_new_process

TRAINERS = {"hf": hf, "lightning": lightning}


class Killing(NamedTuple):
    """A trainer, where its parts run, and how a run ends that is not killed."""

    trainer: ModuleType
    server: ForkServer
    uninterrupted: dict[str, Any]

    @property
    def selected(self) -> int:
        return self.uninterrupted["selected"][0]

    @property
    def last(self) -> int:
        return self.uninterrupted["points"][-1]["step"]

    def whole(self, directory: Path, **arguments: Any) -> dict[str, Any]:
        return self.server.run("part", directory=str(directory), resume=None, **arguments).result

    def new_run(self, directory: Path) -> KilledRun:
        return KilledRun(
            directory,
            partial(self.server.run, "part"),
            self.trainer.last_checkpoint,
            self.trainer.has_model,
            lambda path, step: self.server.run("measure", path=path, step=step).result,
        )


@pytest.fixture(scope="module")
def killings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """By name of the trainer; each is set up when it is first asked for."""
    made: dict[str, Killing] = {}

    def killing(name: str) -> Killing:
        if name not in made:
            trainer = TRAINERS[name]
            directory = tmp_path_factory.mktemp(f"uninterrupted_{name}")
            made[name] = new = Killing(trainer, ForkServer(trainer.__name__), {})
            new.uninterrupted.update(new.whole(directory))
            check_uninterrupted(new, directory)
        return made[name]

    yield killing
    for each in made.values():
        each.server.close()


def check_uninterrupted(killing: Killing, directory: Path) -> None:
    """Else nothing would be tested."""
    result, save_steps = killing.uninterrupted, killing.trainer.SAVE_STEPS
    stop, reason, _ = result["decision"]
    assert stop
    assert reason in ("plateau", "diverging")
    assert killing.last == result["steps"] < 30
    assert save_steps < killing.selected < killing.last - 2 * save_steps, "it was the first, or was kept without us"
    assert all(point["error"] is None for point in result["points"])
    killing.trainer.check_uninterrupted(directory, killing.selected, killing.last)


@pytest.fixture(params=list(TRAINERS))
def killing(request: pytest.FixtureRequest, killings: Any) -> Killing:
    return killings(request.param)


PLACES = [(name, *place) for name, trainer in TRAINERS.items() for place in trainer.PLACES]


@pytest.mark.parametrize(
    ("name", "place", "when", "saved"), PLACES, ids=[f"{name}-{place}, {when}" for name, place, when, _ in PLACES]
)
def test_killed_once(name: str, place: str, when: str, saved: bool, killings: Any, tmp_path: Path) -> None:
    killing = killings(name)
    step = {"start": 0, "best": killing.selected, "stop": killing.last}[when]
    run = killing.new_run(tmp_path)
    run.killed(death=(place, step))
    run.finish_like(killing.uninterrupted)
    save_steps = killing.trainer.SAVE_STEPS
    assert run.resumed == [0, step if saved else max(0, step - 1) // save_steps * save_steps]


def test_killed_again_and_again(killing: Killing, tmp_path: Path) -> None:
    """In every part at another place; some parts come no further than the one before."""
    run = killing.new_run(tmp_path)
    deaths = [tuple(killing.last if value is None else value for value in death) for death in killing.trainer.DEATHS]
    for _, place, step in deaths:
        run.killed(death=(place, step))
    assert run.resumed == [resumed for resumed, _, _ in deaths]
    run.finish_like(killing.uninterrupted)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random(seed: int, killing: Killing, tmp_path: Path) -> None:
    chance, run = random.Random(seed), killing.new_run(tmp_path)
    for _ in range(5):
        run.killed_at_random(chance, last=killing.last)
    run.finish_like(killing.uninterrupted)
    assert run.kills == 5


@pytest.mark.parametrize(("step", "number"), [(2, 1), (8, 1), (8, 2)], ids=["moved away", "copied", "shortened"])
def test_killed_while_it_takes_up_the_old_trajectory(step: int, number: int, killing: Killing, tmp_path: Path) -> None:
    """A run that begins anew moves the file away; one that resumes copies it and then shortens it."""
    run = killing.new_run(tmp_path)
    for when in ("before", "after"):
        run.killed(death=("all of the line", step))
        run.killed(death=(f"{when} replacing", number))
    run.finish_like(killing.uninterrupted)


def test_killed_and_resumed_in_a_process_of_its_own(killing: Killing, tmp_path: Path) -> None:
    run = killing.new_run(tmp_path)
    run.killed(death=("half of the line", 9))
    run.start = partial(run_in_new_process, killing.trainer.__name__, "part")
    run.finish_like(killing.uninterrupted)
    assert run.resumed == [0, 6]
    assert "the last line is incomplete" in run.log


AT_THE_LAST_STEP = [(name, *each) for name, trainer in TRAINERS.items() for each in trainer.AT_THE_LAST_STEP.values()]
AT_THE_LAST_IDS = [f"{name}-{when}" for name, trainer in TRAINERS.items() for when in trainer.AT_THE_LAST_STEP]


@pytest.mark.parametrize(("name", "steps", "deaths", "resumed"), AT_THE_LAST_STEP, ids=AT_THE_LAST_IDS)
def test_killed_at_the_last_step_of_a_run_that_no_rule_stops(
    name: str, steps: int, deaths: list[tuple[str, int]], resumed: list[int], killings: Any, tmp_path: Path
) -> None:
    killing = killings(name)
    whole = killing.whole(tmp_path / "whole", steps=steps)
    assert whole["decision"][0] is False
    assert whole["points"][-1]["step"] == steps
    run = killing.new_run(tmp_path / "killed")
    for death in deaths:
        run.killed(death=death, steps=steps)
    run.finish_like(whole, steps=steps)
    assert run.resumed == resumed


# --- what only one of them does


def test_hf_killed_after_the_stop(killings: Any, tmp_path: Path) -> None:
    """A Trainer that resumes where it had stopped takes one more step before it sees that; it must leave no trace."""
    killing = killings("hf")
    run, last = killing.new_run(tmp_path), killing.last
    run.killed(death=("after on_save", last))
    run.killed(death=("before on_train_end", last + 1))
    run.finish_like(killing.uninterrupted)
    assert run.resumed == [0, last, last]


def test_lightning_killed_while_the_best_checkpoint_is_copied(killings: Any, tmp_path: Path) -> None:
    """Its name is about to be taken by the next one; where that tears, the copy is the last whole checkpoint."""
    killing = killings("lightning")
    name = lightning.OVERWRITTEN
    overwriting = killing.whole(tmp_path / "whole", filename=name)
    best = overwriting["selected"][0]
    assert Path(overwriting["selected"][2]).name == f"step={best}-{name}.ckpt"
    run = killing.new_run(tmp_path / "killed")
    later = best + lightning.SAVE_STEPS
    deaths = [
        (0, "half of the copy", later),
        (best, "before naming the copy", later),
        (best, "after naming the copy", later),
        (best, "half of the checkpoint line", best),
        (best, "half of the checkpoint moved", later),
        (best, "checkpoint moved", later),
        (later, "measurement", later + lightning.SAVE_STEPS),
    ]
    for _, place, step in deaths:
        run.killed(death=(place, step), filename=name)
    run.finish_like(overwriting, filename=name)
    assert run.resumed == [*(resumed for resumed, _, _ in deaths), later]
