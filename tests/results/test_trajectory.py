from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
import zlib
from collections.abc import Iterator

import pytest
from synthetic_runs import C, E, run

from ib_callback.common.errors import TrajectoryError
from ib_callback.common.files import write_atomically
from ib_callback.results.measurement import Measurement
from ib_callback.results.phases import DEFAULT_RULE, PhaseRule
from ib_callback.results.points import FeaturePoint, PlanePoint
from ib_callback.results.stopping import guarded_rule
from ib_callback.results.trajectory import (
    FILENAME,
    RUN_FILENAME,
    Trajectory,
    append_line,
    check_writable,
    read_run_file,
    write_run_file,
)
from ib_callback.run.trajectory_file import TrajectoryFile

SETTINGS = {"primary": "token", "num_bins": 100}


def point(step: int | None, complexity: float = 0.5, expressivity: float = 0.25) -> Measurement:
    return Measurement(
        step=step,
        entropy=0.75,
        ceiling=0.625,
        orders={
            "token": PlanePoint.from_layers(
                [complexity], [expressivity], complexity_null=0.125, expressivity_null=0.125,
                complexity_null_se=0.001, expressivity_null_se=0.001,
            ),
            "bigram": PlanePoint.from_layers([complexity], [complexity]),
        },
        features={"preference": FeaturePoint.from_layers([0.03125], num_positions=9, complexity=complexity)},
        layers=("h.0",),
        entropy_by_layer=(0.75,),
        num_positions=9810,
        seconds=1.5,
        settings=SETTINGS,
    )  # fmt: skip


def failed(step: int) -> Measurement:
    return Measurement.failed(step, "NaN\nin h.0", settings=SETTINGS)


PROBES = {"tulu_preference": "9f2c"}
FULL = SETTINGS | {
    "probe": "9f2c", "K": 4, "orders": ["token"], "features": ["genre"], "layers": ["h.0"], "temperature": "calibrated",
    "seed": 0, "weighting": "empirical", "bound": "diagonal", "dtype": "float32", "version": "0.1.0",
    "feature_probes": PROBES, "label_names": {"genre": ["news"]}, "loss": {"path": "head", "positions": 9000},
}  # fmt: skip


def of_settings(step: int | None, **changes: object) -> Measurement:
    return dataclasses.replace(point(step), settings=FULL | changes)


# --- the sequence


def test_a_trajectory_is_a_sequence_of_measurements():
    points = [point(0), failed(10), point(20)]
    trajectory = Trajectory(points)
    assert list(trajectory) == points
    assert (len(trajectory), trajectory[-1], trajectory.steps) == (3, points[2], [0, 10, 20])
    assert isinstance(trajectory[1:], Trajectory)
    assert trajectory[1:] == Trajectory(points[1:])
    assert trajectory != Trajectory(points[1:])
    assert repr(trajectory) == "Trajectory(3 points, steps 0 to 20)"
    assert repr(trajectory[:1]) == "Trajectory(1 point, step 0)"
    assert not Trajectory()


@pytest.mark.parametrize(
    "changes",
    [
        {"probe": "77aa"}, {"K": 1}, {"primary": "bigram"}, {"layers": ["h.1"]}, {"layers": ["h.0", "h.1"]},
        {"num_bins": 64}, {"temperature": 1.0}, {"seed": 1}, {"weighting": "uniform"}, {"bound": "ib_curve"},
        {"dtype": "bfloat16"}, {"baseline": "linear"}, {"weights": "final"},
        {"feature_probes": {"tulu_preference": "1"}},
        {"loss": {"path": "head", "positions": 8192}},
    ],
    ids=str,
)  # fmt: skip
def test_points_that_cannot_be_compared_are_told_and_kept(changes, tmp_path):
    trajectory = Trajectory([of_settings(0), failed(5)])
    name = next(iter(changes))
    told = f"mixes points that cannot be compared: step 0 and step 10 differ in {name}"
    with pytest.warns(RuntimeWarning, match=told) as caught:
        trajectory.append(of_settings(10, **changes))
    with warnings.catch_warnings(record=True) as again:
        trajectory.append(of_settings(20))
        trajectory.append(of_settings(30, **changes))
    assert not again, "once is enough"
    assert caught[0].filename == __file__
    assert trajectory.steps == [0, 5, 10, 20, 30]
    assert [each.partition(".")[0] for each in trajectory.mixture] == [name]
    assert trajectory.table().splitlines()[-1].startswith(f"not all points can be compared: {name}")
    trajectory.save(tmp_path / FILENAME)
    with pytest.warns(RuntimeWarning, match=told) as caught:
        assert Trajectory.load(tmp_path) == trajectory
    assert len(caught) == 1


def test_another_difference_is_told_too():
    trajectory = Trajectory([of_settings(0)])
    with pytest.warns(RuntimeWarning, match="step 0 and a point without a step differ in seed: 0 vs 1.*mixed=True"):
        trajectory.append(of_settings(None, seed=1))
    with pytest.warns(RuntimeWarning, match="differ in K: 4 vs 3"):
        trajectory.append(of_settings(None, seed=1, K=3))


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "0.2.0"}, {"orders": ["token", "bigram"]}, {"features": []}, {"label_names": {}},
        {"feature_probes": {}}, {"feature_probes": PROBES | {"other": "1"}}, {"layers": ["_orig_mod.h.0"]},
        {"draws": 4, "center": True, "last_block": True, "companions/late": ["rankme"]}, {"groups": {"texts": "0a"}},
        {"loss": None}, {"loss": {"path": "logits", "positions": 9000}},
    ],
    ids=str,
)  # fmt: skip
def test_points_that_can_be_compared_are_not_told(changes, recwarn):
    trajectory = Trajectory([of_settings(0), of_settings(10, **changes)])
    assert trajectory.mixture == {}
    assert not recwarn.list


def test_a_mixture_that_is_meant_is_not_told(recwarn):
    trajectory = Trajectory([of_settings(0), of_settings(10, seed=1)], mixed=True)
    assert trajectory[:] == trajectory
    assert "not all points can be compared: seed: 0 vs 1" in trajectory.table()
    assert not recwarn.list


@pytest.mark.parametrize("step", [20, 19])
def test_steps_must_increase(step):
    trajectory = Trajectory([point(20), point(None)])
    with pytest.raises(ValueError, match=f"step {step} cannot follow step 20.*if m.step < {step}"):
        trajectory.append(point(step))
    trajectory.append(point(21))
    assert trajectory.steps == [20, None, 21]


def test_only_measurements_can_be_appended():
    with pytest.raises(TypeError, match="expected a Measurement, got dict"):
        Trajectory([{"step": 0}])  # type: ignore[list-item]


def test_values_by_logged_name():
    trajectory = Trajectory([point(0, 0.5), failed(10), point(20, 0.25)])
    assert trajectory.values("complexity") == [0.5, None, 0.25]
    assert trajectory.values("bigram/optimality") == [1.0, None, 1.0]
    assert trajectory.values("token/complexity_above_null") == [0.375, None, 0.125]
    assert trajectory.values("preference/ratio") == [0.0625, None, 0.125]
    assert trajectory.values("bigram/complexity_null") == [None, None, None]
    assert trajectory.values("overhead") == [None, None, None]


def test_an_unknown_name_lists_those_that_exist():
    with pytest.raises(KeyError, match=r"no number 'optimalty'\. .*: complexity,.*bigram/optimality"):
        Trajectory([point(0), failed(10)]).values("optimalty")


def test_values_before_anything_was_measured():
    assert Trajectory().values("bigram/optimality") == []
    assert Trajectory([failed(0), failed(1)]).values("bigram/optimality") == [None, None]


def ends(line: str) -> list[int]:
    """Where each cell of a table's line ends."""
    return [match.end() for match in re.finditer(r"\S+", line)]


def test_table_has_aligned_columns():
    trajectory = Trajectory([point(0), point(12000, 0.375, 2e-6)])
    lines = trajectory.table(loss={0: 8.25, 12000: 4}).splitlines()
    assert [line.split() for line in lines] == [
        "step loss complexity expressivity optimality distance optimality complexity expressivity optimality "
        "optimality".split(),
        "to bound null above null above null above null local".split(),
        ["0", "8.2500", "0.5000", "0.2500", "0.5000", "0.2500", "1.0000", "0.3750", "0.1250", "0.3333", "-"],
        ["12,000", "4.0000", "0.3750", "2.00e-06", "5.33e-06", "0.3750", "1.0000", "0.2500", "-0.1250", "-0.5000", "-"],
    ]
    assert ends(lines[0]) == ends(lines[2]) == ends(lines[3])
    assert [end for end in ends(lines[0])[-6:] if end in ends(lines[1])] == ends(lines[0])[-6:]


def test_table_shows_why_a_point_is_missing():
    lines = Trajectory([point(0), failed(500)]).table(loss={0: 8.25}).splitlines()
    assert lines[3].split() == ["500", *["-"] * 10, "NaN", "in", "h.0"]
    assert ends(lines[3])[:11] == ends(lines[2])


def test_the_loss_of_the_probe_is_a_column_where_it_was_measured():
    points = [dataclasses.replace(point(0), loss=8.5), point(10), failed(20)]
    lines = Trajectory(points).table(loss={0: 8.25}).splitlines()
    assert lines[0].split()[:4] == ["step", "loss", "probe", "complexity"]
    assert lines[1].split()[:2] == ["loss", "to"]
    assert [line.split()[:4] for line in lines[2:]] == [
        ["0", "8.2500", "8.5000", "0.5000"], ["10", "-", "-", "0.5000"], ["20", "-", "-", "-"],
    ]  # fmt: skip


def test_the_prediction_of_the_model_comes_first_in_the_table():
    token, bigram = (
        PlanePoint.from_layers(
            [0.3], [0.2], complexity_local_by_layer=[0.1], expressivity_local_by_layer=[told], noise=0.01
        )
        for told in (0.05, 0.04)
    )
    views = {"prediction": {"token": token, "bigram": bigram}}
    points = [dataclasses.replace(point(0), views=views), point(10), failed(20)]
    lines = Trajectory(points).table().splitlines()
    assert lines[0].split()[:5] == ["step", *["prediction"] * 3, "complexity"]
    assert lines[1].split()[:3] == ["score", "complexity", "expressivity"]
    assert [line.split()[:5] for line in lines[2:]] == [
        ["0", "0.0250", "0.1000", "0.0500", "0.5000"], ["10", *"---", "0.5000"], ["20", *"----"],
    ]  # fmt: skip
    assert Trajectory(points).table(order="bigram").splitlines()[2].split()[1:4] == "0.0160 0.1000 0.0400".split()


def test_table_of_another_order_without_loss():
    lines = Trajectory([point(None, 0.5)]).table(order="bigram").splitlines()
    assert lines[2].split() == ["-", "0.5000", "0.5000", "1.0000", "0.0000", *["-"] * 5]


# --- saving and loading


def test_save_and_load_give_back_equal_measurements(tmp_path):
    trajectory = Trajectory([point(0, 1 / 3), failed(10), point(20, 0.1 + 0.2)])
    path = tmp_path / "copy.jsonl"
    trajectory.save(path)
    assert Trajectory.load(path) == trajectory
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 10, 20]
    assert records[0]["complexity"] == 1 / 3
    assert os.listdir(tmp_path) == ["copy.jsonl"]


def test_load_takes_a_run_directory(tmp_path):
    Trajectory([point(0), point(10)]).save(tmp_path / FILENAME)
    assert Trajectory.load(tmp_path).steps == [0, 10]


def test_what_cannot_be_read_or_written_is_named(tmp_path):
    with pytest.raises(TrajectoryError, match=r"missing\.jsonl cannot be read \(No such file"):
        Trajectory.load(tmp_path / "missing.jsonl")
    with pytest.raises(TrajectoryError, match=r"t\.jsonl cannot be written \(No such file.*Check"):
        Trajectory([point(0)]).save(tmp_path / "missing" / "t.jsonl")
    with pytest.raises(TrajectoryError, match=r"t\.jsonl cannot be written \(No such file.*Check"):
        append_line(tmp_path / "missing" / "t.jsonl", point(0))


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "t.jsonl"
    Trajectory([point(0)]).save(path)

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(TrajectoryError, match="No space left on device"):
        Trajectory([point(1)]).save(path)
    assert Trajectory.load(path).steps == [0]
    assert os.listdir(tmp_path) == ["t.jsonl"]


def test_an_atomic_write_goes_through_a_link(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_last_line_torn_at_any_byte_is_dropped_and_can_be_appended_to(tmp_path):
    whole = tmp_path / "whole.jsonl"
    Trajectory([point(0), point(10)]).save(whole)
    data = whole.read_bytes()
    first = data.index(b"\n") + 1
    path = tmp_path / "torn.jsonl"
    for size in [*range(first + 1, len(data) - 1, 41), len(data) - 2]:
        path.write_bytes(data[:size])
        with pytest.warns(RuntimeWarning, match=r"torn\.jsonl: the last line is incomplete"):
            assert Trajectory.load(path).steps == [0]
        with pytest.warns(RuntimeWarning, match=r"torn\.jsonl: the last line is incomplete"):
            append_line(path, point(20))
        assert Trajectory.load(path) == Trajectory([point(0), point(20)])
        assert path.read_bytes().startswith(data[:first] + b'{"step": 20,')


@pytest.mark.parametrize("tail", [b'{"step": 10, "entr\n', b"\0" * 300, b"\xff\xfe garbage", b'{"a":\n\n'])
def test_other_remains_of_a_crash_at_the_end_are_dropped_too(tmp_path, tail):
    path = tmp_path / "t.jsonl"
    Trajectory([point(0)]).save(path)
    path.write_bytes(path.read_bytes() + tail)
    with pytest.warns(RuntimeWarning, match="incomplete"):
        assert Trajectory.load(path).steps == [0]
    with pytest.warns(RuntimeWarning, match="incomplete"):
        append_line(path, point(20))
    assert Trajectory.load(path).steps == [0, 20]


def test_a_torn_line_longer_than_one_read_is_cut_off_whole(tmp_path):
    path = tmp_path / "t.jsonl"
    Trajectory([point(0)]).save(path)
    intact = path.read_bytes()
    path.write_bytes(intact + b'{"layers": "' + b"x" * 300_000)
    with pytest.warns(RuntimeWarning, match="incomplete"):
        append_line(path, point(20))
    assert Trajectory.load(path).steps == [0, 20]
    assert len(path.read_bytes()) < 3 * len(intact)


def test_a_whole_last_line_without_a_line_break_is_kept(tmp_path):
    path = tmp_path / "t.jsonl"
    Trajectory([point(0), point(10)]).save(path)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Trajectory.load(path).steps == [0, 10]
        append_line(path, point(20))
        assert Trajectory.load(path).steps == [0, 10, 20]


def test_a_file_of_one_torn_line_is_an_empty_trajectory(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"step": 0, "en')
    with pytest.warns(RuntimeWarning, match="incomplete"):
        assert len(Trajectory.load(path)) == 0
    with pytest.warns(RuntimeWarning, match="incomplete"):
        append_line(path, point(5))
    assert Trajectory.load(path).steps == [5]


def change(record: dict, **values: object) -> bytes:
    return json.dumps(record | values).encode()


@pytest.mark.parametrize(
    ("number", "damage", "message"),
    [
        (2, lambda record: b'{"step": 10, "entr', "2: expected one JSON object.*remove that line"),
        (2, lambda record: b"[1, 2]", "2: measurement must be an object"),
        (2, lambda record: change(record, step=25), "3: steps must increase: step 20 cannot follow step 25"),
        (1, lambda record: change(record, entropy=float("nan")), "1: entropy must be a finite number"),
        (3, lambda record: b'{"step": 20}', "3: measurement lacks the required keys entropy, ceiling"),
    ],
)
def test_other_damage_is_an_error_that_names_file_and_line(tmp_path, number, damage, message):
    path = tmp_path / "t.jsonl"
    Trajectory([point(0), point(10), point(20)]).save(path)
    lines = path.read_bytes().splitlines()
    record = json.loads(lines[number - 1])
    del record["crc32"]  # which tells any other damage
    lines[number - 1] = damage(record)
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(TrajectoryError, match=rf"t\.jsonl:{message}"):
        Trajectory.load(path)
    before = path.read_bytes()
    (tmp_path / FILENAME).write_bytes(before)
    with pytest.raises(TrajectoryError, match=rf"ib_trajectory\.jsonl:{message}"):
        TrajectoryFile(tmp_path, start_step=10)
    assert (tmp_path / FILENAME).read_bytes() == before


# --- the rule of its phases


RULE = PhaseRule(drop=0.25)  # recognises the compression of `run(C, E)` at 1800, the default one at 1500


def test_the_phases_of_a_run_are_those_of_its_own_rule():
    trajectory = Trajectory(run(C, E)[:17], phase_rule=RULE)
    assert trajectory.phases().compression_start is None
    assert trajectory.best() is None
    assert trajectory[:16].phase_rule == RULE
    assert trajectory.phases(DEFAULT_RULE).compression_start == 1000
    assert trajectory.phases(drop=0.03).compression_start == 1000
    assert trajectory.best(phase_rule=DEFAULT_RULE).step == 1600
    assert [len(t.correlations(select_from="compression")) for t in (trajectory, run(C, E)[:17])] == [0, 15]


def test_the_rule_lies_beside_the_trajectory(tmp_path):
    run(C, E).save(tmp_path / FILENAME)
    assert Trajectory.load(tmp_path).phase_rule == DEFAULT_RULE
    write_run_file(tmp_path, phase_rule=RULE)
    assert json.loads((tmp_path / RUN_FILENAME).read_text())["phase_rule"] == dataclasses.asdict(RULE)
    assert Trajectory.load(tmp_path).phase_rule == Trajectory.load(tmp_path / FILENAME).phase_rule == RULE
    assert Trajectory.load(tmp_path).phases() == run(C, E).phases(RULE)


@pytest.mark.parametrize(
    ("rule", "guard"),
    [({"drop": 0.1}, "loss"), ({"tolerance": 0.2}, 0.2), ({"tolerance": None, "plane": "plain"}, None)],
)
def test_a_run_file_of_an_earlier_version_has_the_rule_alone(tmp_path, rule, guard):
    content = {"phase_rule": {"persistence": 3, **rule}}  # a setting that there is no more
    content["crc32"] = f"{zlib.crc32(json.dumps(content['phase_rule']).encode()):08x}"
    (tmp_path / RUN_FILENAME).write_text(json.dumps(content))
    assert read_run_file(tmp_path) == (PhaseRule(**rule), guard)


@pytest.mark.parametrize("guard", ["loss", 0.2, None])
def test_a_guard_lies_beside_the_trajectory(tmp_path, guard):
    saved = Trajectory(run(C, E), phase_rule=RULE, guard=guard)
    saved.save(tmp_path / FILENAME)
    write_run_file(tmp_path, phase_rule=RULE, guards={"stopping": 0.5, "selection": guard})
    read = Trajectory.load(tmp_path)
    assert (read.guard, read.phase_rule, read[:3].guard) == (guard, RULE, guard)
    assert read.rule == guarded_rule(RULE, guard)
    assert read.phases() == saved.phases() == run(C, E).phases(read.rule)


def test_correlations_are_taken_over_points_of_every_loss():
    points = Trajectory(dataclasses.replace(m, loss=4.0 - 0.1 * i) for i, m in enumerate(run(C, E)))
    found = points.correlations({m.step: m.loss for m in points}, select_from=0)
    assert found["complexity", "score"].num_points == 31


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"phase_rule": 3}', '{"phase_rule": {"drop": 2}}', "{"])
def test_a_damaged_run_file_is_a_warning(tmp_path, content):
    run(C, E).save(tmp_path / FILENAME)
    (tmp_path / RUN_FILENAME).write_text(content)
    with pytest.warns(RuntimeWarning, match=r"ib_run\.json: the run's phase rule cannot be read .* default rule"):
        assert Trajectory.load(tmp_path).phase_rule == DEFAULT_RULE


def test_a_run_file_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(TrajectoryError, match=r"nowhere/ib_run\.json cannot be written"):
        write_run_file(tmp_path / "nowhere", phase_rule=RULE)


def test_checking_a_directory_leaves_nothing_but_the_directory(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []


def flips(content: bytes) -> Iterator[bytes]:
    """The content with one of its bits flipped, every fifth in turn."""
    for number in range(0, 8 * len(content), 5):
        position, bit = divmod(number, 8)
        yield content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def test_no_flip_of_a_bit_in_a_line_changes_a_point(tmp_path):
    path = tmp_path / FILENAME
    saved = Trajectory([Measurement.failed(0, "none", settings={"seed": 3}), point(10)])
    saved.save(path)
    first, second = path.read_bytes().splitlines(keepends=True)
    refused = 0
    for damaged in flips(first[:-1]):
        path.write_bytes(damaged + b"\n" + second)
        try:
            assert Trajectory.load(path) == saved
        except TrajectoryError:
            refused += 1
    assert refused > 0.9 * 8 * len(first) / 5


def test_no_flip_of_a_bit_changes_the_rule(tmp_path):
    run(C, E).save(tmp_path / FILENAME)
    write_run_file(tmp_path, phase_rule=RULE, guards={"selection": 0.25})
    path = tmp_path / RUN_FILENAME
    for damaged in flips(path.read_bytes()):
        path.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            rule = read_run_file(tmp_path)
        assert rule == ((DEFAULT_RULE, "loss") if told else (RULE, 0.25))


@pytest.mark.parametrize("change", [str.upper, lambda seal: seal[:-1], lambda seal: "", lambda seal: "#" * 8])
def test_a_checksum_that_is_none_is_no_missing_one(tmp_path, change):
    path = tmp_path / FILENAME
    Trajectory([point(0), point(10)]).save(path)
    content, _, seal = path.read_text().replace('"step": 10', '"step": 12').removesuffix('"}\n').rpartition('"')
    path.write_text(f'{content}"{change(seal)}"}}\n')
    with pytest.raises(TrajectoryError, match=r"jsonl:2: its checksum does not match its content"):
        Trajectory.load(path)


@pytest.mark.parametrize("end", [b"\r\n", b" \n", b"\n\n"])
def test_line_breaks_belong_to_no_checksum(tmp_path, end):
    path = tmp_path / FILENAME
    saved = Trajectory([point(0), point(10)])
    saved.save(path)
    path.write_bytes(path.read_bytes().replace(b"\n", end))
    assert Trajectory.load(path) == saved


def test_lines_and_rules_without_a_checksum_are_of_an_earlier_version(tmp_path):
    saved = Trajectory([point(0), point(10)], phase_rule=RULE)
    (tmp_path / FILENAME).write_text("".join(json.dumps(m.to_dict()) + "\n" for m in saved))
    (tmp_path / RUN_FILENAME).write_text(json.dumps({"phase_rule": RULE.to_dict()}))
    loaded = Trajectory.load(tmp_path)
    assert (loaded, loaded.phase_rule) == (saved, RULE)
