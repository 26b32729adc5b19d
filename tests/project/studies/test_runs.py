"""A training run of the studies, from nothing to its result: whole, killed and begun again, finished, and taken."""

from __future__ import annotations

import fcntl
import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import _runs as runs
import ib_callback as ib

# The trainer logs its loss every ten steps, over those since it began.
STEPS, SAVED = 20, 10
MEASURED = [0, 8, 12, STEPS]
CONFIG = runs.Config("tiny", "llama", 1, 16, heads=2, steps=STEPS, batch=4, rate=0.01, warmup=2)


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    """The machinery as it is, with smaller numbers."""
    sizes = {"LENGTH": 64, "VOCABULARY": 400, "PROBE_SEQUENCES": 4, "VALIDATION_SEQUENCES": 8, "SAVE_EVERY": SAVED}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(runs, name, value)
        patch.setattr(runs.Config, "measured_steps", lambda config: MEASURED)
        yield


def texts(number: int, seed: int) -> list[str]:
    """Of words that have their habitual followers, so that there is something to learn."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("aeioulmnrst", k=generator.randint(2, 7))) for _ in range(150)]
    followers = {word: generator.choices(words, k=4) for word in words}
    found = []
    for _ in range(number):
        text = [generator.choice(words)]
        while len(text) < 400:
            text.append(generator.choice(followers[text[-1]]))
        found.append(" ".join(text))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, number in (("novels", runs.HELD_OUT + 4), ("c4_sample", 8)):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts(number, seed=number))
    return folder


def result_of(data: Path, folder: Path) -> dict[str, Any]:
    """After all that is left to do there."""
    (folder / "results").mkdir(exist_ok=True)
    runs.run_all([CONFIG], data, folder, folder / "results")
    return json.loads((folder / "results" / "tiny.json").read_text())


@pytest.fixture(scope="module")
def whole(_small: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The result of a run that nothing happened to, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return result_of(data, folder), folder


def test_a_result_has_every_number_at_every_measured_step(whole: tuple[dict[str, Any], Path]) -> None:
    result, _ = whole
    assert result["step"] == MEASURED
    assert result["config"]["width"] == 16
    for probe in ("novels", "c4"):
        columns = result[probe]
        assert {"loss", "token/optimality", "readout/token/score_local", "prediction/bigram/score_local"} <= set(
            columns
        )
        assert {name for name, values in columns.items() if len(values) != len(MEASURED)} == set()
    assert [len(result[name]) for name in ("val_loss", "c4_loss", "train_loss")] == [len(MEASURED)] * 3
    assert result["val_loss"][-1] < result["val_loss"][0]


def test_losses_and_weights_are_those_of_the_measured_points(whole: tuple[dict[str, Any], Path], data: Path) -> None:
    result, folder = whole
    model = CONFIG.model()
    model.load_state_dict(runs.torch.load(folder / "tiny" / "weights" / f"{STEPS}.pt", weights_only=True))
    probe = ib.Probe.from_tokens(runs.Data.load(data, folder).probe[::4])
    point = ib.measure(model, probe, **runs.meter_keywords())
    assert result["novels"]["loss"][-1] == pytest.approx(point.loss, rel=1e-4)
    assert result["novels"]["last/token/expressivity_local"][-1] == pytest.approx(
        point["last/token"].expressivity_local, rel=1e-4
    )


class KilledError(BaseException):
    pass


def test_a_killed_run_goes_on_to_the_same_result(
    whole: tuple[dict[str, Any], Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before there is a checkpoint, and after.
    fatal = [SAVED - 1, SAVED + 5]

    def on_step_begin(callback: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if fatal and state.global_step == fatal[0]:
            raise KilledError(fatal.pop(0))

    monkeypatch.setattr(runs.Losses, "on_step_begin", on_step_begin, raising=False)
    for step in tuple(fatal):
        with pytest.raises(KilledError, match=str(step)):
            result_of(data, tmp_path)
        assert list((tmp_path / "results").iterdir()) == []
    assert result_of(data, tmp_path) == whole[0]


def test_a_finished_run_is_not_run_again(
    whole: tuple[dict[str, Any], Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, folder = whole
    monkeypatch.setattr(runs, "train", None)
    assert result_of(data, folder) == result


def test_a_run_that_another_process_is_at_is_left_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "train", None)
    (tmp_path / "tiny").mkdir()
    # A lock belongs to the open file: another one is as another process is.
    with (tmp_path / "tiny" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs.run_all([CONFIG], data, tmp_path, tmp_path)
    assert not (tmp_path / "tiny.json").exists()


def test_a_run_comes_out_again_of_its_checkpoints(data: Path, tmp_path: Path) -> None:
    found = runs.retrace(CONFIG, runs.Data.load(data, tmp_path), tmp_path / "tiny")
    assert found.points == len(MEASURED)
    assert found.numbers > 1000
    assert found.largest <= 1e-6


def test_what_differs_between_two_trajectories_is_found() -> None:
    probe = ib.Probe.from_tokens(runs.torch.arange(96).view(4, 24) % 50)
    points = [
        ib.measure(runs.Config("tiny", "llama", 1, 16, heads=2, seed=seed).model(), probe, orders="token", num_bins=8)
        for seed in (0, 0, 1)
    ]
    first, same, other = (ib.Trajectory([replace(point, step=0)]) for point in points)
    assert runs.compared(first, same).largest == 0
    assert runs.compared(first, other).largest > 1e-3
    with pytest.raises(ValueError, match="expected the same steps"):
        runs.compared(first, ib.Trajectory([replace(points[0], step=1)]))
