from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import recorded_runs
import tiny_hf
import tiny_lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from synthetic_runs import COLLAPSE_AT_THE_END, C, E, measured, real, recorded, run

import ib_callback as ib
from ib_callback.cli.select import SelectReport, select_report
from ib_callback.results.points import FeaturePoint, PlanePoint
from ib_callback.results.trajectory import Trajectory, write_run_file
from ib_callback.run import checkpoints
from ib_callback.run.checkpoints import FILENAME, CheckpointFile


def make_checkpoint(directory: Path, step: int) -> Path:
    folder = directory / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "trainer_state.json", "optimizer.pt"):
        (folder / name).write_bytes(b"{}")
    return folder


def save(directory: Path, trajectory: Trajectory, steps: tuple[int, ...] = ()) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    trajectory.save(directory / "ib_trajectory.jsonl")
    for step in steps:
        make_checkpoint(directory, step)
    return directory


def rows(report: SelectReport) -> dict[str, tuple[list[str], str]]:
    """By what is in the first column: value, phase and checkpoint, and the remark."""
    found = {}
    by_chance = "by chance" in report.table.splitlines()[0]
    for line in report.table.splitlines()[1:]:
        if not line.startswith("("):
            step, value, *others = line.split(maxsplit=4 + by_chance)
            phase, checkpoint, *remark = others[by_chance:]
            found[step] = ([value, phase, checkpoint], " ".join(remark))
    return found


def remarks(report: SelectReport) -> dict[str, str]:
    return {step: remark for step, (_, remark) in rows(report).items()}


# --- the choice


@pytest.mark.parametrize(
    ("by", "bound", "chance"),
    [
        ("optimality", "diagonal", 0.8),
        ("token/expressivity", "diagonal", 0.08),
        ("distance_to_bound", "diagonal", 0.02),
        ("distance_to_bound", "ib_curve", None),
        ("token/optimality_above_null", "diagonal", None),
        ("entropy", "diagonal", None),
        ("preference", "diagonal", 0.03),
    ],
)
def test_what_chance_alone_would_give_stands_beside(tmp_path, by, bound, chance):
    nulls = {"complexity_null": 0.1, "expressivity_null": 0.08, "complexity_null_se": 0.0, "expressivity_null_se": 0.0}
    point = dataclasses.replace(
        next(iter(run([0.5], [0.3]))),
        orders={"token": PlanePoint.from_layers([0.5], [0.3], **nulls)},
        features={"preference": FeaturePoint.from_layers([0.05], num_positions=9, information_null=0.03)},
        settings={"primary": "token", "bound": bound},
    )
    table = select_report(save(tmp_path, Trajectory([point]), (0,)), by=by, select_from=0, mode="max").table
    heads, row = (line.split() for line in table.splitlines()[:2])
    assert ("chance" in heads) == (chance is not None)
    if chance is not None:
        assert float(row[2]) == pytest.approx(chance)


def test_the_best_of_those_that_exist(tmp_path):
    save(tmp_path, run(C, E), (500, 1500, 1800, 2500))
    (tmp_path / "checkpoint-2500" / "trainer_state.json").unlink()  # half-deleted
    report = select_report(tmp_path)
    assert report.path == tmp_path / "checkpoint-1800"
    assert list(report.checkpoints) == [500, 1500, 1800]
    table = rows(report)
    assert len(table) == 31
    # .232 / .34, .22 / .40 and .0885 / .177.
    assert table["1,800"] == (["0.6824", "compression", "checkpoint-1800"], "best")
    assert table["1,500"] == (["0.5500", "compression", "checkpoint-1500"], "runner-up")
    assert table["500"][0][1:] == ["fitting", "checkpoint-500"]
    assert table["500"][1] == "not in the compression phase"
    assert table["0"] == (["0.1000", "initial", "-"], "not in the compression phase")
    assert table["2,500"] == (["0.8000", "compression", "-"], "no checkpoint")
    assert report.verdict.splitlines()[0].startswith(
        "The best point is step 1,800, with optimality 0.6824. The next best is step 1,5"
    )
    # 1900 to 3000; of those from 2000 on, which are equal, the first.
    assert (
        "12 points would be better but have no checkpoint; the best of them is step 2,000 with 0.8 (no checkpoint)."
        in report.text
    )
    assert report.text.splitlines()[-1] == f"The best checkpoint: {tmp_path / 'checkpoint-1800'}"
    assert report.text == f"{report.table}\n\n{report.verdict}"


def test_the_phases_are_those_of_the_run(tmp_path):
    save(tmp_path, run(C, E)[:17], (1500, 1600))
    assert select_report(tmp_path).path == tmp_path / "checkpoint-1600"
    write_run_file(tmp_path, phase_rule=ib.PhaseRule(drop=0.25))
    strict = select_report(tmp_path)
    assert strict.path is None
    assert rows(strict)["1,600"][0][1] == "fitting"
    assert "The compression phase was not recognised in this run" in strict.verdict


def test_a_point_that_overfits_is_not_recommended_for_a_checkpoint(tmp_path):
    save(tmp_path, real("overfit_1000"), (256, 560, 620, 1220))
    report = select_report(tmp_path, guard="loss")
    assert "1,160" not in report.verdict
    assert re.fullmatch(r"loss \d\.\d\d nats above the lowest", remarks(report)["1,160"])


@pytest.mark.parametrize(("of_run", "guard"), [(None, "loss"), (0.2, "loss"), ("loss", None), ("loss", 0.2)])
def test_another_guard_than_that_of_the_run_has_its_own_phases(tmp_path, of_run, guard):
    steps = (256, 560, 620, 1220)
    told = {}
    for name, recorded_with in (("other", of_run), ("same", guard)):
        save(tmp_path / name, real("overfit_1000"), steps)
        write_run_file(tmp_path / name, phase_rule=ib.PhaseRule(), guards={"selection": recorded_with})
        told[name] = select_report(tmp_path / name, guard=guard, select_from="fit").table
    assert told["other"] == told["same"]
    read = [Trajectory.load(tmp_path / name) for name in ("other", "same")]
    assert read[0].best(select_from="fit", guard=guard) == read[1].best(select_from="fit")
    assert [trajectory.guard for trajectory in read] == [of_run, guard]
    # By default that of the run.
    assert read[0].best(select_from="fit") == real("overfit_1000").best(select_from="fit", guard=of_run)


def test_columns_are_aligned(tmp_path):
    lines = select_report(save(tmp_path, run(C, E), (900, 2000))).table.splitlines()
    head = lines[0]
    assert head.split() == ["step", "optimality", "phase", "checkpoint"]
    for line in lines[1:]:
        # Numbers end below the end of their heading, words begin below its beginning.
        step, value, *_ = line.split()
        assert line.index(step) + len(step) == len("2,000")
        assert line[: head.index("phase")].rstrip().endswith(value)
        assert line[: head.index("optimality") + len("optimality")].endswith(value)
        assert line[head.index("phase") :].startswith(("initial ", "fitting ", "compression "))
        assert line[head.index("checkpoint") :].startswith(("checkpoint-", "- "))


def test_a_better_point_must_really_be_better(tmp_path):
    # .8 from 2000 to 3000: the earlier is preferred, but none is better.
    assert "would be better" not in select_report(save(tmp_path, run(C, E), (2500,))).verdict


def test_one_better_point(tmp_path):
    report = select_report(save(tmp_path, run(C[:21], E[:21]), (1500, 1900)))
    assert "Another point would be better but has no checkpoint: step 2,000 with 0.8 (no checkpoint)." in report.verdict


def test_every_reason_why_a_point_is_none(tmp_path):
    trajectory = Trajectory([*run(C, E, without=[14])[:30], *COLLAPSE_AT_THE_END[30:]])
    found = remarks(select_report(save(tmp_path, trajectory, (1500, 1600, 1700))))
    assert found["900"] == "not in the compression phase"
    assert found["1,200"] == "no checkpoint"
    assert found["1,400"] == "not measured: NaN in h.0"
    assert [found[step] for step in ("1,500", "1,600", "1,700")] == ["", "runner-up", "best"]
    assert found["3,000"] == "collapsed"
    from_step = remarks(select_report(tmp_path, select_from=1550))
    assert from_step["1,500"] == "before step 1,550"
    assert from_step["1,600"] == "runner-up"


def test_a_metric_that_is_undefined_at_a_point(tmp_path):
    # Within three standard errors (.001) of the null there is no ratio to it.
    points = [measured(0, 0.5, 0.2), measured(1, 0.5, 0.5, null=0.499), measured(None, 0.5, 0.3), measured(2, 0.5, 0.3)]
    report = select_report(save(tmp_path, Trajectory(points), (0, 1)), by="token/optimality_above_null", select_from=0)
    # Nearly nothing above the null: the end of a collapse, with which the fit begins.
    assert rows(report)["1"] == (["-", "fitting", "checkpoint-1"], "the metric is undefined")
    assert remarks(report)["-"] == "no step"
    assert report.path == tmp_path / "checkpoint-0"
    assert "No other point can be selected." in report.verdict


def test_a_long_reason_is_cut(tmp_path):
    trajectory = Trajectory([measured(0, 0.5, 0.2), ib.Measurement.failed(1, "NaN " * 100, settings={})])
    line = select_report(save(tmp_path, trajectory, (0,)), select_from=0).table.splitlines()[-1]
    assert line.split()[4:8] == ["not", "measured:", "NaN", "NaN"]
    assert line.endswith("…")
    assert len(line) < 140


@pytest.mark.parametrize(
    ("by", "mode", "best"),
    [("complexity", None, 2000), ("complexity", "max", 1500), ("token/expressivity", None, 2000)],
)
def test_by_any_metric(tmp_path, by, mode, best):
    report = select_report(save(tmp_path, run(C, E), (1500, 1800, 2000)), by=by, mode=mode)
    assert report.path == tmp_path / f"checkpoint-{best}"
    assert by in report.table.splitlines()[0]


def test_by_a_feature(tmp_path):
    information = [0.01, 0.04, 0.0002, 0.03]
    trajectory = Trajectory(measured(100 * i, 0.5, 0.2, preference=p) for i, p in enumerate(information))
    report = select_report(save(tmp_path, trajectory, (0, 200, 300)), by="preference", select_from=0)
    assert report.path == tmp_path / "checkpoint-300"
    # As it would be with four digits: 0.0002 is an information all the same.
    assert rows(report)["200"][0][0] == "2.00e-04"
    assert "Another point would be better but has no checkpoint: step 100 with 0.04 (no checkpoint)." in report.verdict


def test_a_recorded_run_of_the_demonstration(tmp_path):
    trajectory = recorded(recorded_runs.WIDTH_128)
    report = select_report(save(tmp_path, trajectory, tuple(range(0, 801, 100))), select_from="fit")
    # .1554 / .2528 = .6147 and .2413 / .3975 = .6070; above these without a checkpoint .6221 at 120, .6218 at 140,
    # .6223 at 160 and .6196 at 180. .6986 at 40, soon after the collapse, is the highest of the run.
    assert (remarks(report)["100"], remarks(report)["300"]) == ("best", "runner-up")
    assert rows(report)["40"] == (["0.6986", "fitting", "-"], "expressivity below 50% of the highest so far")
    assert "4 points would be better but have no checkpoint; the best of them is step 160 with 0.6223" in report.verdict
    none = select_report(tmp_path)
    assert none.path is None
    assert set(remarks(none).values()) == {"not in the compression phase"}
    assert "The compression phase was not recognised in this run. Short runs often never compress." in none.verdict
    assert "--from fit or --from STEP." in none.verdict


# --- the verdict


@pytest.mark.parametrize(("best", "within"), [(0.53, False), (0.501, True)])
def test_noise_is_told_from_a_difference_and_how_it_is_estimated(tmp_path, best, within):
    # Scatter of .002 about .5, by turns, and one point that differs from all others by .03 or by next to nothing.
    values = [0.5 + (0.002 if i % 4 in (1, 2) else 0.0) for i in range(40)]
    values[20] = best + (0.0015 if within else 0.0)
    report = select_report(
        save(tmp_path, run([0.8] * 40, values), (1000, 2000, 3000)), by="expressivity", select_from=0
    )
    assert report.choice.within_noise is within
    first, second, *_ = report.verdict.splitlines()
    assert first.startswith("The best point is step 2,000")
    assert ("Noise alone can explain this" in first) is within
    assert ("Noise alone does not explain this" in first) is not within
    assert second.startswith("The noise is estimated from the scatter of successive values about a")


def test_too_few_points_for_an_estimate(tmp_path):
    report = select_report(save(tmp_path, run(C, E)[:20], (1800, 1900)), select_from=1500)
    assert "at least 8 points are needed to estimate the noise" in report.verdict
    assert "The noise is estimated" not in report.verdict


def test_why_there_is_none_and_what_to_do(tmp_path):
    save(tmp_path, run(C, E))
    none = select_report(tmp_path)
    assert (none.path, none.choice.best) == (None, None)
    assert none.verdict.splitlines() == [
        "No point can be selected: not in the compression phase; no checkpoint.",
        "The best point has no checkpoint: step 2,000 with 0.8 (no checkpoint).",
    ]
    save(tmp_path, run(C[:3], E[:3]), (200,))
    for select_from in ("compression", "fit"):
        verdict = select_report(tmp_path, select_from=select_from).verdict
        assert "phase was not recognised in this run" in verdict
        assert verdict.endswith("give --from STEP.")
        assert "--from fit" not in verdict
    save(tmp_path, Trajectory())
    verdict = select_report(tmp_path).verdict
    assert verdict.startswith("No point can be selected: nothing was measured.")
    assert "phase" not in verdict


def test_checkpoints_of_steps_that_were_not_measured(tmp_path):
    verdict = select_report(save(tmp_path, run(C, E), (950, 1050, 1500, 1650, 1750))).verdict
    assert (
        "4 of 5 checkpoints are not candidates because their steps were not measured (checkpoint-950, "
        "checkpoint-1050, checkpoint-1650, …)."
    ) in verdict
    assert "not measured" not in select_report(save(tmp_path / "b", run(C, E), (1500,))).verdict


# --- which checkpoints are those of the run


def test_the_record_alone_tells_whose_checkpoints_they_are(tmp_path):
    save(tmp_path, run(C, E))
    record = CheckpointFile(tmp_path, start_step=0)
    for step in (1500, 1800, 2500, 2700):
        record.add(step, make_checkpoint(tmp_path, step))
    make_checkpoint(tmp_path, 2600)
    (tmp_path / "checkpoint-2500" / "model.safetensors").unlink()
    (tmp_path / "checkpoint-2700").rename(tmp_path / "checkpoint-away")
    report = select_report(tmp_path)
    assert report.path == tmp_path / "checkpoint-1800"
    found = remarks(report)
    assert (found["2,500"], found["2,600"], found["2,700"]) == ("deleted", f"not in {FILENAME}", "deleted")
    assert found["2,800"] == "no checkpoint"
    assert f"Checkpoints not in {FILENAME} are assumed to belong to another run" in report.verdict
    assert "There is no" not in report.verdict


def test_of_a_run_that_saved_nothing_those_of_the_run_before_it_are_none(tmp_path):
    save(tmp_path, run(C, E))
    CheckpointFile(tmp_path, start_step=0).add(2000, make_checkpoint(tmp_path, 2000))
    CheckpointFile(tmp_path, start_step=0)
    report = select_report(tmp_path)
    assert report.path is None
    assert remarks(report)["2,000"] == f"not in {FILENAME}"


def test_without_a_record_the_report_says_so(tmp_path):
    report = select_report(save(tmp_path, run(C, E), (2000,)))
    assert f"There is no {FILENAME}: every checkpoint in {tmp_path} is assumed to belong to this run." in report.verdict


# --- where the trajectory is


def test_a_run_below_the_directory(tmp_path):
    version = save(tmp_path / "lightning_logs" / "version_0", run(C, E))
    (version / "checkpoints").mkdir()
    saved = version / "checkpoints" / "epoch=0-step=2000.ckpt"
    saved.write_bytes(b"not a checkpoint that could be read")
    for run_dir in (tmp_path, tmp_path / "lightning_logs", version, version / "ib_trajectory.jsonl", str(tmp_path)):
        assert select_report(run_dir).path == saved
    (tmp_path / "latest").symlink_to(version)
    assert select_report(tmp_path).choice.best is not None


def test_several_runs_are_listed(tmp_path):
    below = [save(tmp_path / "a", run(C, E)), save(tmp_path / "b" / "c" / "d" / "e", run(C, E))]
    with pytest.raises(ib.TrajectoryError, match=r"has several runs\. Give the directory of one of them:") as caught:
        select_report(tmp_path)
    assert str(caught.value).splitlines()[1:] == [f"  {path}" for path in below]
    # One in the directory itself is the one that is meant.
    save(tmp_path, run(C, E), (2000,))
    assert select_report(tmp_path).path == tmp_path / "checkpoint-2000"


def test_how_far_is_looked(tmp_path):
    save(tmp_path / "1" / "2" / "3" / "4" / "5", run(C, E))
    with pytest.raises(ib.TrajectoryError, match=r"no ib_trajectory\.jsonl in .*nor up to 4 levels below it"):
        select_report(tmp_path)
    assert len(select_report(tmp_path / "1").choice.candidates) == 31
    for folder in ("checkpoint-5", "checkpoints", "epoch=0.ckpt"):
        save(tmp_path / "other" / folder, run(C, E))
    with pytest.raises(ib.TrajectoryError, match=r"no ib_trajectory\.jsonl in .*Give the output directory of a run"):
        select_report(tmp_path / "other")


def test_a_directory_that_is_none_or_cannot_be_searched(tmp_path, monkeypatch):
    with pytest.raises(ib.TrajectoryError, match=r"there is no file or directory .*nowhere\. Give the output"):
        select_report(tmp_path / "nowhere")

    def refused(directory: Path) -> None:
        raise PermissionError(13, "Permission denied", str(directory))

    monkeypatch.setattr(checkpoints, "find_checkpoints", refused)
    with pytest.raises(ib.TrajectoryError, match=r"cannot be searched \(.*Permission denied.*Check its permissions"):
        select_report(save(tmp_path, run(C, E)))


@pytest.mark.parametrize("by", ["optimallity", "bigram/optimality", "token/bogus", "preference"])
def test_an_unknown_metric_lists_those_that_exist(tmp_path, by):
    message = f"no metric '{by}' is measured. Measured metrics: complexity, .*token/optimality_above_null"
    with pytest.raises(ValueError, match=message):
        select_report(save(tmp_path, run(C, E)), by=by)


def test_a_metric_without_a_better_direction_needs_one(tmp_path):
    save(tmp_path, run(C, E), (2000,))
    with pytest.raises(ValueError, match=r'neither high nor low entropy is known to be better\. Pass mode="min"'):
        select_report(tmp_path, by="entropy")
    assert select_report(tmp_path, by="entropy", mode="min").path == tmp_path / "checkpoint-2000"


# --- real runs


def test_a_run_of_huggingface(tmp_path):
    callback = tiny_hf.tiny_callback(every_n_steps=3, orders="token", select="optimality", select_from=3)
    saving = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}
    tiny_hf.tiny_trainer(tmp_path, [callback], steps=15, **saving).train()
    report = select_report(tmp_path, select_from=3)
    assert callback.selected is not None
    assert report.path == tmp_path / f"checkpoint-{callback.selected.step}"
    found = remarks(report)
    assert list(found) == ["0", "3", "6", "9", "12", "15"]
    assert found["0"] == "before step 3"
    assert found[str(callback.selected.step)] == "best"
    kept = {path.name.rpartition("-")[2] for path in tmp_path.glob("checkpoint-*")}
    assert {step for step, remark in found.items() if remark == "deleted"} == {"3", "6", "9", "12", "15"} - kept
    assert 2 <= len(kept) <= 3  # the last, and the best, which may be a third


@pytest.mark.parametrize("recorded", [True, False])
def test_a_run_of_lightning(tmp_path, recorded):
    callbacks = [
        tiny_lightning.tiny_callback(every_n_steps=4, orders="token"),
        ModelCheckpoint(save_top_k=-1, every_n_train_steps=4, save_last=True),
    ]
    trainer = tiny_lightning.tiny_trainer(
        tmp_path, callbacks, steps=12, logger=CSVLogger(tmp_path), enable_checkpointing=True
    )
    trainer.fit(tiny_lightning.tiny_module())
    version = tmp_path / "lightning_logs" / "version_0"
    if not recorded:  # as in a run of which only the trajectory was measured, afterwards
        (version / FILENAME).unlink()
    report = select_report(tmp_path, select_from=5)
    values = {point.step: point.optimality or 0.0 for point in callbacks[0].trajectory}
    best = max((8, 12), key=values.__getitem__)
    assert report.path is not None
    assert report.path.parent == version / "checkpoints"
    assert report.path.match(f"epoch=*-step={best}.ckpt")
    assert list(report.checkpoints) == [4, 8, 12]
    found = remarks(report)
    assert (found["0"], found["4"]) == ("before step 5", "before step 5")
    assert {found["8"], found["12"]} == {"best", "runner-up"}
