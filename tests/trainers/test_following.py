"""When a run is measured, what that leaves, and that the training is what it would be without."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Loop, checkpoints
from scripted import COURSE, follow
from synthetic_runs import STOPPING
from tiny_hf import pairs, random_ids, random_states, same_weights, tiny_model, tiny_probe, weights

import ib_callback as ib
from ib_callback.common.errors import ModelError, TrajectoryError

SLOW = ib.PhaseRule(drop=0.2)


def numbers(point: ib.Measurement) -> dict[str, float]:
    """All that is measured, without how long it took."""
    return {name: value for name, value in point.metrics().items() if name not in ("ib/seconds", "ib/overhead")}


def test_weights_and_random_states_are_the_same_with_and_without(loop: Loop, tmp_path: Path) -> None:
    left = {}
    for follows in (False, True):
        out = loop.train(tmp_path / str(follows), steps=30, follows=follows, every_n_steps=4, save_every=10)
        left[follows] = out.weights, random_states(), out.hooks
    assert not same_weights(left[True][0], weights(tiny_model())), "nothing was learned, so nothing was tested"
    assert same_weights(left[True][0], left[False][0])
    assert left[True][1:] == left[False][1:]
    assert out.followed.trajectory.steps == [*range(0, 29, 4), 30]


def test_measures_at_the_start_by_schedule_and_at_the_end(loop: Loop, tmp_path: Path) -> None:
    out = loop.train(tmp_path, every_n_steps=5, log_plane=True)
    trajectory = out.followed.trajectory
    assert trajectory.steps == [0, 5, 10, 12]
    assert ib.Trajectory.load(tmp_path) == trajectory
    assert (tmp_path / "information_plane.png").read_bytes().startswith(b"\x89PNG")
    meter = ib.Meter(tiny_probe(), num_bins=12, batch_size=3)
    assert numbers(trajectory[-1]) == numbers(meter.measure(out.model, step=12))
    assert numbers(trajectory[0]) == numbers(meter.measure(tiny_model(), step=0))
    shares = trajectory.values("overhead")
    assert all(0 < share < 1 for share in shares if share is not None) and len(shares) == 4
    assert out.followed.cost.points == 4


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ib.logarithmic(per_decade=2), [0, 1, 3, 10, 12]),
        (lambda step: step in (4, 7), [0, 4, 7, 12]),
        (500, [0, 12]),
        (6, [0, 6, 12]),
    ],
    ids=["logarithmic", "callable", "beyond the run", "divides the run"],
)
@pytest.mark.filterwarnings("ignore:The schedule .* never fires:RuntimeWarning")
def test_schedules(loop: Loop, schedule: Any, expected: list[int], tmp_path: Path) -> None:
    out = loop.train(tmp_path, every_n_steps=schedule, orders="token", null=False)
    assert out.followed.trajectory.steps == expected


def test_features_are_measured_beside_the_plane(loop: Loop, tmp_path: Path) -> None:
    out = loop.train(tmp_path, feature_probes=[pairs()], orders="token", every_n_steps=6)
    features = {"feature_probes": [pairs()], "orders": "token", "num_bins": 12, "batch_size": 3}
    assert out.followed.trajectory[-1].features == ib.measure(out.model, tiny_probe(), **features).features


def test_a_fresh_run_moves_the_files_of_an_old_one_away(loop: Loop, tmp_path: Path) -> None:
    old = loop.train(tmp_path, save_every=6).followed.trajectory
    new = loop.train(tmp_path, steps=5, save_every=5).followed.trajectory
    assert ib.Trajectory.load(tmp_path) == new
    assert ib.Trajectory.load(tmp_path / "ib_trajectory.1.jsonl") == old
    steps = [json.loads(line)["step"] for line in (tmp_path / "ib_checkpoints.jsonl").read_text().splitlines()]
    assert steps == [5]


def test_a_resumed_run_continues_the_trajectory(loop: Loop, tmp_path: Path) -> None:
    keywords = {"every_n_steps": 2, "save_every": 5, "orders": "token"}
    whole = loop.train(tmp_path / "whole", **keywords).followed.trajectory
    # It ends at 8, and goes on from the checkpoint at 5: the points at 6 and 8 are not of weights that it ever had.
    begun = loop.train(tmp_path / "run", steps=8, **keywords).followed.trajectory
    if (last := checkpoints(tmp_path / "run").get(8)) is not None:  # HuggingFace's saves its last step, too
        shutil.rmtree(last)
    resumed = loop.train(tmp_path / "run", resume=True, **keywords).followed.trajectory
    assert begun.steps == [0, 2, 4, 6, 8]
    assert resumed.steps == whole.steps == [0, 2, 4, 6, 8, 10, 12]
    assert resumed[:3] == begun[:3]
    assert ib.Trajectory.load(tmp_path / "run") == resumed
    assert ib.Trajectory.load(tmp_path / "run" / "ib_trajectory.1.jsonl") == begun, "nothing that was measured is lost"


def test_a_run_of_other_settings_begins_a_new_trajectory_unless_they_may_mix(loop: Loop, tmp_path: Path) -> None:
    keywords = {"every_n_steps": 3, "save_every": 6, "orders": "token"}
    for mix in (False, True):
        loop.train(tmp_path / str(mix), steps=6, **keywords)
        with pytest.warns(RuntimeWarning, match="measured with other settings: num_bins: 12 vs 13"):
            out = loop.train(tmp_path / str(mix), resume=True, mix_settings=mix, **{**keywords, "num_bins": 13})
        assert out.followed.trajectory.steps == ([0, 3, 6, 9, 12] if mix else [6, 9, 12])


def test_a_model_that_goes_bad_costs_one_point(loop: Loop, tmp_path: Path) -> None:
    def damage(model: torch.nn.Module, step: int) -> None:
        parameter = next(model.parameters())
        if step == 5:
            damage.kept = parameter.detach().clone()
            parameter.data.fill_(float("nan"))
        elif step == 6:
            parameter.data.copy_(damage.kept)

    # The gradients of step 6 are those of the damage: they are let pass by without an update of what is measured.
    with pytest.warns(RuntimeWarning, match=r"Nothing could be measured at step 5; training goes on"):
        out = loop.train(tmp_path, steps=5, every_n_steps=1, orders="token", on_step=damage)
    trajectory = out.followed.trajectory
    assert [point.step for point in trajectory if point.error is not None] == [5]
    assert "NaN" in trajectory[5].error
    assert ib.Trajectory.load(tmp_path) == trajectory


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"probe": ib.Probe.from_tokens(random_ids(3, seed=0, vocabulary=300))}, ModelError, "outside the model's"),
        ({"layers": ["nothing.*"]}, ModelError, "no module of .* is called 'nothing"),
    ],
    ids=["tokenizer", "layers"],
)
def test_mistakes_are_raised_before_the_first_step(
    loop: Loop, keywords: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    steps: list[int] = []
    with pytest.raises(error, match=message):
        loop.train(tmp_path, on_step=lambda model, step: steps.append(step), **keywords)
    assert steps == []


def test_a_directory_that_cannot_be_written(loop: Loop, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrajectoryError, match="cannot write to the output directory"):
        loop.train(tmp_path / "run", output_dir=tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"every": 5}, TypeError, "unknown keyword every; it takes every_n_steps, .* and those of Meter: orders"),
        ({"every_n_steps": 0}, ValueError, "every_n_steps: expected an integer of at least 1, got 0"),
        ({"overhead_budget": 1.5}, ValueError, "overhead_budget is a share of the wall-clock time"),
        ({"tokens_per_step": 0}, ValueError, "tokens_per_step: expected an integer of at least 1"),
        ({"early_stopping": "plateau"}, TypeError, "early_stopping: expected an ib.PlateauStopping"),
        ({"early_stopping": ib.PlateauStopping("loss")}, ValueError, "no metric 'loss' is measured; those measured"),
        ({"select": 3}, TypeError, "select: expected the name of a metric"),
        ({"select": "perplexity"}, ValueError, "no metric 'perplexity' is measured; those measured"),
        ({"select_from": "later"}, ValueError, "select_from must be"),
        ({"check_overlap": -1}, ValueError, "check_overlap: expected an integer of at least 0"),
        ({"orders": ("token", "pentagram")}, ValueError, "unknown order 'pentagram'"),
        (
            {"phase_rule": ib.PhaseRule(drop=0.1), "early_stopping": ib.PlateauStopping(phase_rule=SLOW)},
            ValueError,
            "one rule for the whole run, got different ones of phase_rule and early_stopping",
        ),
    ],
)  # fmt: skip
def test_settings_are_checked_when_it_is_made(
    loop: Loop, keywords: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        loop.train(tmp_path, **keywords)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_not_swallowed_and_the_files_are_whole(loop: Loop, tmp_path: Path) -> None:
    def interrupt(model: torch.nn.Module, step: int) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt, SystemExit):  # Lightning would end its process
        loop.train(tmp_path, every_n_steps=3, orders="token", on_step=interrupt)
    assert ib.Trajectory.load(tmp_path).steps == [0, 3, 6]


def test_no_warnings_of_our_own_in_a_good_run(loop: Loop, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.train(tmp_path, every_n_steps=4, log_plane=True)
    assert [str(warning.message) for warning in caught if "ib_callback" in warning.filename] == []


def test_scheduled_points_are_skipped_while_the_share_is_above_the_budget(loop: Loop, tmp_path: Path) -> None:
    out = loop.train(tmp_path, every_n_steps=1, orders="token", overhead_budget=1e-6)
    assert out.followed.trajectory.steps == [0, 12], "the first and the last are measured all the same"
    assert out.followed.cost.skipped in (11, 12)  # a loop of one's own does not know that its last step is the last


# --- loggers


class FakeRun:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.defined: list[tuple[str, str]] = []

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.defined.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


@pytest.fixture
def open_run(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    run = FakeRun()
    table = lambda columns, data: (columns, data)  # noqa: E731
    module = types.SimpleNamespace(run=run, Table=table, Image=lambda source: source)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return run


def test_an_open_run_of_weights_and_biases_gets_every_point(
    loop: Loop, tmp_path: Path, open_run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    out = loop.train(tmp_path, steps=30, every_n_steps=1, orders="token")
    rows = [row for row in open_run.rows if "ib/complexity" in row]
    assert [row[loop.x_axis] for row in rows] == list(range(31))
    assert [row["ib/complexity"] for row in rows] == out.followed.trajectory.values("complexity")
    assert [row["ib/phase"] for row in rows] == [0] * 4 + [1] * 11 + [2] * 16
    assert open_run.defined == [("ib/*", loop.x_axis)]
    assert open_run.summary["ib/compression_start"] == 10
    columns, data = open_run.rows[-1]["ib/trajectory"]
    assert [row[columns.index("phase")] for row in data] == [0] * 4 + [1] * 6 + [2] * 21


# --- one rule of phases


def test_the_rule_of_phases_is_one_for_all(
    loop: Loop, tmp_path: Path, open_run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    never = ib.PhaseRule(drop=0.99)
    rule = ib.PlateauStopping(**{**STOPPING, "phase_rule": never})
    out = loop.train(
        tmp_path, steps=30, every_n_steps=1, orders="token", early_stopping=rule, select="optimality", save_every=10
    )
    assert out.step == 30 and out.followed.decision.reason is ib.StopReason.NOT_ARMED
    assert out.followed.selected is None
    assert "ib/compression_start" not in open_run.summary
    for trajectory in (out.followed.trajectory, ib.Trajectory.load(tmp_path)):
        assert trajectory.phase_rule == never
        assert trajectory.phases().compression_start is None
        assert trajectory.best() is None
    assert ib.Trajectory(COURSE).phases().compression_start == 10, "by the default rule there is one"


# --- checkpoints, stopping


ENDS = "distance_to_bound: no improvement on 0.06 at step 20 for 3 measurements: a plateau"


def test_a_plateau_ends_the_run(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = follow(monkeypatch)
    out = loop.train(tmp_path, steps=30, every_n_steps=1, orders="token", early_stopping=ib.PlateauStopping(**STOPPING))
    assert out.step == 23
    assert made == out.followed.trajectory.steps == list(range(24))
    assert out.followed.decision == ib.StopDecision(True, ib.StopReason.PLATEAU, ENDS)
    assert len(re.findall(f"ib_callback: .*step 23: {re.escape(ENDS)}", capsys.readouterr().err)) == 1


def test_a_run_that_had_stopped_stays_stopped(loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)
    keywords = {"steps": 30, "every_n_steps": 1, "orders": "token", "save_every": 23}
    first = loop.train(tmp_path, early_stopping=ib.PlateauStopping(**STOPPING), **keywords)
    again = loop.train(tmp_path, early_stopping=ib.PlateauStopping(**STOPPING), resume=True, **keywords)
    assert again.followed.trajectory.steps == first.followed.trajectory.steps == list(range(24))
    assert again.followed.decision == first.followed.decision


def test_a_resumed_run_stops_and_selects_as_an_uninterrupted_one(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    keywords = {"every_n_steps": 1, "orders": "token", "save_every": 4, "select": "optimality"}

    def train(directory: Path, **settings: Any) -> Any:
        return loop.train(directory, early_stopping=ib.PlateauStopping(**STOPPING), **keywords, **settings)

    whole = train(tmp_path / "whole", steps=30)
    train(tmp_path / "run", steps=18)
    resumed = train(tmp_path / "run", steps=30, resume=True)
    assert resumed.step == whole.step == 23
    assert resumed.followed.decision == whole.followed.decision
    for out in (whole, resumed):
        assert (out.followed.selected.step, out.followed.selected.value) == (20, COURSE[20].optimality)


def test_the_best_checkpoint_outlives_the_limit_and_so_does_the_last(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = follow(monkeypatch)
    out = loop.train(
        tmp_path, steps=30, every_n_steps=1, orders="token", save_every=5, limited=True, select="optimality"
    )
    assert made == list(range(31)), "no step is measured twice"
    assert out.followed.selected.step == 20
    assert set(checkpoints(tmp_path)) == {20, 30}
    assert out.followed.selected.path == checkpoints(tmp_path)[20]
    record = [json.loads(line) for line in (tmp_path / "ib_checkpoints.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in record] == [5, 10, 15, 20, 25, 30]


def test_the_weights_that_are_kept_are_those_that_were_best(loop: Loop, tmp_path: Path) -> None:
    """Really measured, and not by phase: the tiny model goes through a collapse and out of it."""
    by_step: dict[int, dict[str, torch.Tensor]] = {}
    out = loop.train(
        tmp_path, steps=26, every_n_steps=100, orders="token", save_every=2, limited=True, select="complexity",
        select_from=1, on_step=lambda model, step: by_step.update({step: weights(model)}),
    )  # fmt: skip
    assert out.followed.trajectory.steps == list(range(0, 27, 2)), "every checkpoint, whatever the schedule"
    best = min(out.followed.trajectory[1:], key=lambda point: point.complexity)
    assert best.step < 26
    assert (out.followed.selected.step, out.followed.selected.value) == (best.step, best.complexity)
    out.model.load_state_dict(by_step[best.step])
    meter = ib.Meter(tiny_probe(), orders="token", num_bins=12, batch_size=3)
    assert numbers(meter.measure(out.model, step=best.step)) == numbers(best)
    assert best.step in checkpoints(tmp_path)


def test_a_run_in_which_nothing_could_be_selected_says_why(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch)
    with pytest.warns(RuntimeWarning, match="No checkpoint could be selected. No point can be selected: not in the"):
        out = loop.train(tmp_path, steps=12, every_n_steps=1, orders="token", save_every=4, select="optimality")
    assert out.followed.selected is None
