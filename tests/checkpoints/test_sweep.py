from __future__ import annotations

import gc
import threading
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from plot_runs import run as synthetic_run
from tiny_hf import pairs, tiny_model, tiny_probe

from ib_callback import Meter, Results
from ib_callback.checkpoints import sweep
from ib_callback.checkpoints.load import Loading
from ib_callback.checkpoints.material import Material
from ib_callback.checkpoints.place import Checkpoint
from ib_callback.checkpoints.sweep import Report, Sweep, run_sweep
from ib_callback.common.errors import TrajectoryError
from ib_callback.measuring.increments import mean_increments

METER = {"num_bins": 12, "orders": ("token",), "loss": False, "readout": False}


@dataclass
class Fake:
    """A place that notes what is asked of it; its model is that of the seed."""

    seed: int
    log: list[str] = field(default_factory=list)
    error: Exception | None = None
    wait: threading.Event | None = None
    path: str | None = None

    @property
    def source(self) -> str:
        return self.path or f"made/{self.seed}"

    def fetch(self) -> Path:
        if self.wait is not None:
            assert self.wait.wait(20)
        self.log.append(f"fetch {self.seed}")
        if self.error is not None:
            raise self.error
        return Path(str(self.seed))

    def fetch_tokenizer(self) -> list[Path]:
        return []

    def evict(self) -> None:
        self.log.append(f"evict {self.seed}")


def checkpoint(seed: int, model: str = "m", **place: Any) -> Checkpoint:
    return Checkpoint(
        model=model, revision=f"step{seed}", step=seed, tokens=None, stage=None, place=Fake(seed, **place)
    )


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Models are made of the seed that stands for their path; whether an earlier one is alive is looked at."""
    alive: list[weakref.ref[Any]] = []

    @contextmanager
    def loaded(path: Path, loading: Loading, *, untrained: bool = False) -> Any:
        gc.collect()
        assert not any(other() for other in alive), "one model in memory at a time"
        model = tiny_model(int(str(path)))
        alive.append(weakref.ref(model))
        yield model.eval()

    monkeypatch.setattr(sweep, "loaded", loaded)
    return alive


def swept(path: Path, *checkpoints: Checkpoint, **options: Any) -> Report:
    material = dict.fromkeys({c.model for c in checkpoints}, Material(tiny_probe(), ()))
    return run_sweep(checkpoints, path, Sweep(**{"material": material, "meter": METER, **options}))


def test_each_is_measured_as_a_meter_does(tmp_path, models):
    assert swept(tmp_path / "r.jsonl", checkpoint(1), checkpoint(2), tokens_per_step=10) == Report(2, 0, ())
    results = Results.load(tmp_path / "r.jsonl")
    for step, point in zip((1, 2), results["m"], strict=True):
        expected = Meter(tiny_probe(), **METER).measure(tiny_model(step), step=step)
        assert (point.step, point.orders, point.settings) == (step, expected.orders, expected.settings)
    assert [point.tokens_seen for point in results["m"]] == [10, 20]
    assert [(o.family, o.source) for o in results.origins("m")] == [("gpt2", "made/1"), ("gpt2", "made/2")]
    assert len(models) == 2


def test_the_next_one_is_fetched_while_one_is_measured_and_the_last_one_evicted(tmp_path, monkeypatch):
    log: list[str] = []
    measured = threading.Event()
    checkpoints = [checkpoint(1, log=log), checkpoint(2, log=log), checkpoint(3, log=log, wait=measured)]
    measure = Meter.measure

    def watched(self: Meter, model: Any, *, step: int | None = None) -> Any:
        if step == 2:
            measured.set()  # 3 cannot have been fetched before, so that it is fetched meanwhile
        found = measure(self, model, step=step)
        log.append(f"measured {step}")
        return found

    monkeypatch.setattr(Meter, "measure", watched)
    swept(tmp_path / "r.jsonl", *checkpoints, evict=True)
    # At most two are there, and what is evicted is so while nothing is fetched.
    assert [entry for entry in log if not entry.startswith("measured")] == [
        "fetch 1", "fetch 2", "evict 1", "fetch 3", "evict 2", "evict 3"
    ]  # fmt: skip
    assert log.index("measured 1") < log.index("evict 1")
    assert log.index("measured 2") < log.index("evict 2")


def test_what_the_file_holds_is_not_measured_again(tmp_path):
    path = tmp_path / "r.jsonl"
    log: list[str] = []
    assert swept(path, checkpoint(1), checkpoint(2)) == Report(2, 0, ())
    before = path.read_bytes()
    assert swept(path, checkpoint(1, log=log), checkpoint(2, log=log), checkpoint(3, log=log)) == Report(1, 2, ())
    assert log == ["fetch 3"]
    assert path.read_bytes().startswith(before)
    assert swept(path, checkpoint(1, log=log)) == Report(0, 1, ())


@pytest.mark.parametrize(
    ("options", "again"),
    [
        ({"meter": {**METER, "seed": 1}}, True),
        ({"meter": {**METER, "batch_size": 2}}, False),
        ({"meter": {**METER, "seed": 0}}, False),
        ({"loading": Loading(dtype="float32")}, True),
        ({"loading": Loading(device="cpu")}, False),
        ({"material": {"m": Material(tiny_probe(), {"tulu": pairs()})}}, True),
        ({"material": {"m": Material(pairs(), ())}}, True),
    ],
)
def test_other_settings_are_measured_anew(tmp_path, options, again):
    path = tmp_path / "r.jsonl"
    swept(path, checkpoint(1))
    assert swept(path, checkpoint(1), **options) == Report(int(again), 1 - int(again), ())


def test_a_file_that_is_written_again_at_a_later_step_is_measured_again(tmp_path):
    path = tmp_path / "r.jsonl"
    best, later = (replace(checkpoint(step), revision="best.ckpt") for step in (1, 2))
    assert [swept(path, c) for c in (best, best, later)] == [Report(1, 0, ()), Report(0, 1, ()), Report(1, 0, ())]
    assert Results.load(path)["m"].steps == [1, 2]


def test_the_trajectory_of_a_run_is_no_file_of_results(tmp_path):
    path = tmp_path / "ib_trajectory.jsonl"
    synthetic_run([0, 10]).save(path)
    before = path.read_bytes()
    with pytest.raises(
        TrajectoryError, match=r"expected a file of results, got the trajectory of a run.*another file with -o"
    ):
        swept(path, checkpoint(1))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("before", "now", "is_refused"),
    [
        ("{0}/a/out", "{0}/b/out", True),
        ("{0}/a/out", "{0}/a/out", False),
        ("{0}/gone/out", "{0}/b/out", False),  # moved, or measured on another machine
        ("made/one@1111", "made/other@1111", True),
        ("made/one@1111", "made/one@2222", False),  # a branch that has moved
        ("{0}/a/out", "made/one@1111", True),
    ],
)
def test_another_checkpoint_of_the_same_name_is_not_taken_for_known(tmp_path, before, now, is_refused):
    path = tmp_path / "r.jsonl"
    for name in "ab":
        (tmp_path / name / "out").mkdir(parents=True)
    first, second = (checkpoint(1, path=source.format(tmp_path)) for source in (before, now))
    swept(path, first)
    if is_refused:
        with pytest.raises(
            TrajectoryError, match=r"has m step1 from .* now the name stands for .*\. Give another --name or another"
        ):
            swept(path, second)
    else:
        assert swept(path, second) == Report(0, 1, ())
    assert len(path.read_bytes().splitlines()) == 1


def test_a_sweep_that_was_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    append = sweep.append_result

    def killed(file: Path, origin: Any, measurement: Any) -> None:
        append(file, origin, measurement)
        if measurement.step == 2:
            with open(file, "ab") as handle:
                handle.write(b'{"model": "m", "revision": "ste')  # as if it had died in the next line
            raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "append_result", killed)
    with pytest.raises(KeyboardInterrupt):
        swept(path, *map(checkpoint, (1, 2, 3)))
    monkeypatch.setattr(sweep, "append_result", append)
    with pytest.warns(RuntimeWarning, match="the last line is incomplete"):
        assert swept(path, *map(checkpoint, (1, 2, 3))) == Report(1, 2, ())
    assert len(path.read_bytes().splitlines()) == 3
    assert Results.load(path)["m"].steps == [1, 2, 3]


def test_a_broken_one_is_a_line_with_the_reason_and_tried_again(tmp_path):
    path = tmp_path / "r.jsonl"
    told: list[str] = []
    broken = checkpoint(2, error=OSError("connection lost"))
    report = swept(path, checkpoint(1), broken, checkpoint(3), tell=told.append)
    assert report == Report(2, 0, (("m step2", "OSError: connection lost"),))
    assert told[1].startswith("[2/3] m step2: not measured: OSError: connection lost; about ")
    assert [point.error for point in Results.load(path)["m"]] == [None, "OSError: connection lost", None]
    # The same failure is not said twice.
    assert swept(path, checkpoint(1), broken, checkpoint(3)).failed == report.failed
    assert len(path.read_bytes().splitlines()) == 3
    assert swept(path, *map(checkpoint, (1, 2, 3))) == Report(1, 2, ())
    assert [point.error for point in Results.load(path)["m"]] == [None] * 3


def test_a_model_that_cannot_be_measured_does_not_end_the_sweep(tmp_path):
    path = tmp_path / "r.jsonl"
    report = swept(path, checkpoint(1), checkpoint(2), meter={**METER, "layers": ["nothing.*"]})
    assert [name for name, _ in report.failed] == ["m step1", "m step2"]
    assert all("ModelError" in reason for _, reason in report.failed)


def test_nobody_else_may_write_the_file(tmp_path):
    path = tmp_path / "r.jsonl"
    with (
        sweep._alone_with(path),
        pytest.raises(
            TrajectoryError, match=r"another process is writing results to this file.*give another file with -o"
        ),
    ):
        swept(path, checkpoint(1))
    assert swept(path, checkpoint(1)) == Report(1, 0, ())


def test_increments_are_tested_where_they_are_asked_for_which_is_another_request(tmp_path):
    orders = {"meter": {**METER, "orders": ("token", "bigram")}}
    assert swept(tmp_path / "r.jsonl", checkpoint(1), **orders).measured == 1
    assert Results.load(tmp_path / "r.jsonl")["m"][0].increments is None
    assert swept(tmp_path / "r.jsonl", checkpoint(1), **orders, increments=20) == Report(1, 0, ())
    assert swept(tmp_path / "r.jsonl", checkpoint(1), **orders, increments=20) == Report(0, 1, ())
    (point,) = Results.load(tmp_path / "r.jsonl")["m"]
    meter = Meter(tiny_probe(), **orders["meter"])
    assert point.increments == mean_increments(meter, tiny_model(1), num_permutations=20)
    with pytest.raises(ValueError, match="--increments: expected at least two orders, got only token"):
        swept(tmp_path / "other.jsonl", checkpoint(1), increments=20)
