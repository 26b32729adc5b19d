from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from synthetic_runs import (
    CASES,
    COLLAPSE_AT_THE_END,
    FALLEN,
    TABLE_TOKEN,
    C,
    Case,
    E,
    curve,
    failed,
    measured,
    real,
    replaced,
    run,
    with_others,
)

from ib_callback.results.measurement import Measurement
from ib_callback.results.phases import Phase, PhaseRule, PhaseTracker, find_phases, plane_values
from ib_callback.results.trajectory import Trajectory


@pytest.mark.parametrize("case", CASES, ids=str)
def test_phases_of(case: Case):
    phases = case.trajectory.phases()
    assert phases.fit_start == case.fit
    assert phases.compression_start == case.compression
    assert phases.compression_recognised == case.recognised


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_growing_run_never_changes_its_mind(case: Case):
    whole = find_phases(case.trajectory)
    for length in range(len(case.trajectory)):
        part = find_phases(case.trajectory[:length])
        assert part.known == whole.known[:length]
        assert part.collapsed == whole.collapsed[:length]
        for name in ("fit_start", "fit_recognised", "compression_start", "compression_recognised"):
            # What looked like a fit before the collapse is taken back when that is over.
            earlier = {100} if "a lot before" in case.name and name.startswith("fit") else set()
            seen = getattr(part, name)
            assert seen in (None, getattr(whole, name)) or (earlier and seen < getattr(whole, name))
    assert list(whole.known) == sorted(whole.known)
    assert list(whole.phases) == sorted(whole.phases)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("complexity", "expressivity"), [(0.01, 0.001), (0.9, 0.8), (0.5, 0.2)])
def test_points_off_the_schedule_change_no_phase(case: Case, complexity: float, expressivity: float):
    """They are judged by the others: collapsed ones are told, and each has the phase of the point before."""
    mixed = with_others(case.trajectory, complexity, expressivity)
    own, others = find_phases(case.trajectory), find_phases(mixed)
    steps = ("fit_start", "fit_recognised", "compression_start", "compression_recognised")
    assert [getattr(others, name) for name in steps] == [getattr(own, name) for name in steps]
    scheduled = [index for index, point in enumerate(mixed) if point.scheduled]
    for name in ("phases", "known", "collapsed", "learned"):
        assert tuple(getattr(others, name)[index] for index in scheduled) == getattr(own, name)
    for index, point in enumerate(mixed):
        if point.scheduled:
            continue
        assert others.known[index] == others.known[index - 1]
        assert (others.learned[index] is None) == (others.phases[index] == Phase.INITIAL)
        if others.known[index] != Phase.INITIAL and expressivity == 0.001:
            # Until there is a median nothing tells.
            before = [p for p in mixed[:index] if p.scheduled and p.error is None and p.step is not None]
            assert others.collapsed[index] or sum(p.step >= own.fit_start for p in before) < 3


def test_the_phase_of_each_point_in_hindsight_and_as_known_then():
    phases = find_phases(run(C, E))
    assert phases.phases == (Phase.INITIAL,) * 2 + (Phase.FITTING,) * 8 + (Phase.COMPRESSION,) * 21
    assert phases.known == (Phase.INITIAL,) * 4 + (Phase.FITTING,) * 11 + (Phase.COMPRESSION,) * 16
    assert not any(phases.collapsed)


def test_a_rise_is_dated_back_to_the_lowest_complexity_before_it():
    # 5 % above .10 is passed at point 5, and for the third time in succession at point 7; it began at 1.
    phases = find_phases(run([0.5] * 10, curve((0, 0.10), (5, 0.1055), (9, 0.12))))
    assert (phases.fit_start, phases.fit_recognised) == (0, 700)
    assert phases.known[:8] == (0, 0, 0, 0, 0, 0, 0, 1)
    assert phases.phases[:8] == (1,) * 8


def test_a_run_that_begins_later_has_no_initial_phase_even_if_its_first_point_failed():
    phases = find_phases([failed(1000), failed(1100), measured(1200, 0.5, 0.2)])
    assert phases.fit_start == 1000
    assert phases.phases == phases.known == (1, 1, 1)


def test_a_run_whose_step_0_failed_has_an_initial_phase():
    phases = find_phases([failed(0), failed(100), measured(200, 0.5, 0.2)])
    assert phases.fit_start is None
    assert phases.phases == (0, 0, 0)


def test_without_a_null_the_plain_expressivity_is_used_with_a_warning():
    points = [measured(step, c, e, null=None) for step, c, e, _ in TABLE_TOKEN]
    # .143 at step 0, .080 at 64, .174 at 384; the complexity is lowest at 32.
    with pytest.warns(RuntimeWarning, match="plain expressivity.*null=True") as caught:
        found = find_phases(points)
    assert (found.plane, found.fit_start, found.fit_recognised) == ("plain", 32, 384)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_collapsed_points_are_named():
    collapsed = find_phases(COLLAPSE_AT_THE_END).collapsed
    assert [index for index, bad in enumerate(collapsed) if bad] == list(FALLEN)


@pytest.mark.parametrize(
    ("drop", "recognised"),
    # On the line from .50 at 10 down to .30 at 20, below the highest running median, .48: by 16.7 % at 15, 20.8 at 16.
    [(0.0, 1500), (0.15, 1500), (0.2, 1600), (0.5, None)],
)
def test_how_far_the_complexity_must_fall(drop, recognised):
    phases = run(C, E).phases(drop=drop)
    assert phases.compression_recognised == recognised
    assert phases.compression_start == (None if recognised is None else 1000)


def test_collapse_is_a_parameter():
    # .12 at 25 is half of the highest, .24.
    dip = run(C, replaced(E, {25: 0.119}))
    assert [bool(any(dip.phases(collapse=share).collapsed)) for share in (0.4, 0.5)] == [False, True]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"drop": 1.0}, "drop must be at least 0 and less than 1, got 1.0"),
        ({"collapse": 2}, "collapse must be at least 0 and less than 1, got 2"),
        ({"tolerance": -0.1}, "tolerance must be at least 0"),
        ({"plane": "local plane"}, "plane must be one of readout, .*, or None, got 'local plane'"),
    ],
)
def test_parameters_out_of_range(parameters, message):
    with pytest.raises(ValueError, match=message):
        PhaseRule(**parameters)


def test_wrong_parameters():
    with pytest.raises(TypeError, match="from_trained must be True, False or None, got 'yes'"):
        PhaseRule(from_trained="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'patience'"):
        Trajectory().phases(patience=3)


def test_a_rule_is_written_and_read():
    rule = PhaseRule(drop=0.1, plane="plain", tolerance=None, from_trained=True)
    assert PhaseRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    assert PhaseRule.from_dict({"drop": 0.1, "from_a_later_version": 3}) == PhaseRule(drop=0.1)
    # As versions before the guard wrote it.
    assert PhaseRule.from_dict({"drop": 0.1, "noise": 5.0, "persistence": 3, "rise": 0.05}) == PhaseRule(drop=0.1)
    with pytest.raises(ValueError, match="drop must be at least 0"):
        PhaseRule.from_dict({"drop": -1.0})


def test_a_tracker_tells_the_phase_at_each_point():
    tracker = PhaseTracker()
    found = [tracker.update(point) for point in run(C, E)]
    assert tuple(found) == find_phases(run(C, E)).known
    assert tracker.phase is Phase.COMPRESSION
    assert not tracker.collapsed


# --- noise


def noisy(complexity: list[float], expressivity: list[float], size: float, seed: int) -> Trajectory:
    """Independent noise of `size`, a share of each value."""
    random = np.random.RandomState(seed)
    factors = 1 + size * random.standard_normal((2, len(complexity)))
    return run(*(np.array([complexity, expressivity]) * factors).clip(1e-6))


@pytest.mark.parametrize("size", [0.005, 0.02])
def test_noise_is_hardly_ever_taken_for_compression(size):
    long_c, long_e = [*C[:10], *[0.5] * 50], [*E[:10], *[0.2] * 50]
    found = [noisy(long_c, long_e, size, seed).phases().compression_start for seed in range(50)]
    assert sum(start is not None for start in found) <= 1


@pytest.mark.parametrize(("size", "by"), [(0.005, 1900), (0.01, 2200)])
def test_compression_is_found_in_noise(size, by):
    found = [noisy(C, E, size, seed).phases() for seed in range(40)]
    assert sum(p.compression_start is not None and abs(p.compression_start - 1000) <= 200 for p in found) >= 38
    assert sum(p.compression_recognised is not None and p.compression_recognised <= by for p in found) >= 38


def test_the_fit_is_found_in_noise():
    found = [noisy(C, E, 0.05, seed).phases().fit_start for seed in range(50)]
    # The complexity is .02 at 2 and .08 at 3.
    assert found.count(200) >= 48


# --- what falls along with the complexity, and the loss


def test_a_fall_along_with_the_expressivity_leaves_the_bound():
    # Both fall to 60 % from 10 to 20.
    fallen = [*E[:10], *curve((0, 0.20), (10, 0.12), (20, 0.12))]
    phases = find_phases(run(C, fallen))
    assert phases.compression_start is None
    assert phases.off_bound_start == 1000
    assert "expressivity has fallen too" in phases.notes[0]


@pytest.mark.parametrize(
    ("name", "compression", "memorising"),
    [
        ("healthy_2x64", range(160, 401), None),
        ("healthy_4x128", range(160, 401), None),
        ("healthy_6x192", None, None),
        ("small", None, None),
        ("lr_spike", None, None),
        # Minimum of the held-out loss, and one measurement before and after.
        ("overfit", None, range(125, 156)),
        ("overfit_160", None, range(96, 129)),
        ("overfit_1000", range(160, 560), range(500, 621)),
    ],
)
def test_phases_of_real_runs(name, compression, memorising):
    phases = real(name).phases()
    assert (phases.compression_start in compression) if compression else phases.compression_start is None
    assert (phases.memorising_start in memorising) if memorising else phases.memorising_start is None


def test_the_highest_complexity_of_all_lies_before_the_end_of_the_collapse_and_does_not_count():
    run_of = real("healthy_4x128")
    values = {m.step: plane_values(m, "readout")[0] for m in run_of}
    assert max(values, key=values.get) == 32
    phases = run_of.phases()
    assert phases.plane == "readout"
    assert phases.fit_start == 64
    assert phases.compression_start == 160


def test_a_run_that_begins_in_the_collapse_is_not_compressing():
    """From step 16 to 64 the complexity halves; nobody saw its maximum."""
    assert Trajectory(real("healthy_2x64")[2:7]).phases().compression_start is None


@pytest.mark.parametrize(
    ("losses", "train", "start", "recognised"),
    [
        # .04 above 3.0 at 6, 7 and 8.
        ([5, 4, 3.5, 3.2, 3.1, 3.0, 3.04, 3.05, 3.06], None, 500, 800),
        ([5, 4, 3.5, 3.2, 3.1, 3.0, 3.04, 3.05, 3.06], [5, 4, 3.4, 3.1, 2.9, 2.8, 2.7, 2.6, 2.5], 500, 800),
        # The trainer had logged none by the minimum.
        ([5, 4, 3.5, 3.2, 3.1, 3.0, 3.04, 3.05, 3.06], [*[None] * 6, 2.7, 2.6, 2.5], 500, 800),
        # The training loss rises too: an accident.
        ([5, 4, 3.5, 3.2, 3.1, 3.0, 3.04, 3.05, 3.06], [5, 4, 3.4, 3.1, 2.9, 2.8, 2.9, 3.0, 3.1], None, None),
        # Within the tolerance, at two points only, or with a new minimum after it.
        ([5, 4, 3.5, 3.2, 3.1, 3.0, 3.02, 3.02, 3.02], None, None, None),
        ([5, 4, 3.5, 3.2, 3.1, 3.0, 3.04, 3.05, 3.01], None, None, None),
        ([5, 4, 3.5, 3.2, 3.0, 3.1, 3.1, 3.1, 2.9], None, None, None),
    ],
)
def test_memorising(losses, train, start, recognised):
    course = run([0.3, 0.02, *curve((0, 0.3), (6, 0.5))], [0.03, 0.002, *curve((0, 0.1), (6, 0.2))])
    told = train or [None] * len(losses)
    points = [replace(m, loss=x, train_loss=t) for m, x, t in zip(course, losses, told, strict=True)]
    phases = find_phases(points)
    assert (phases.memorising_start, phases.memorising_recognised) == (start, recognised)
    if start is not None:
        assert phases.phases[start // 100 :] == (Phase.MEMORISING,) * (len(losses) - start // 100)
        known = "is lower than there" if train and train[5] else "was not known yet there" if train else "is not known"
        assert f"the training loss {known}" in phases.notes[0]
        assert "complexity +" in phases.notes[0]
    assert find_phases(points, PhaseRule(tolerance=None)).memorising_start is None


@pytest.mark.parametrize(
    ("information", "declared", "trained"),
    [(2.0, None, True), (-0.4, None, False), (None, None, False), (None, True, True), (2.0, False, False)],
)
def test_a_run_from_trained_weights_has_no_phases(information, declared, trained):
    points = [replace(m, predictive_information=information) for m in run(C, E)]
    phases = find_phases(points, PhaseRule(from_trained=declared))
    assert phases.trained is trained
    assert (set(phases.phases) == {None}) is trained
    assert (phases.compression_start is None) is trained


def test_the_plane_is_the_first_that_the_first_point_has():
    point = real("healthy_2x64")[3]
    assert find_phases([point]).plane == "readout"
    assert find_phases([point], PhaseRule(plane="plain")).plane == "plain"
    assert find_phases([replace(point, views={})]).plane == "above_null"


def test_a_fall_within_its_own_errors_is_not_sure():
    """Of points with errors: the groups of sequences disagree about it."""

    def with_replicates(trajectory: Trajectory, spread: float) -> list[Measurement]:
        random = np.random.RandomState(0)
        points = []
        for m in trajectory:
            near = m["token"].complexity + spread * random.standard_normal(31)
            values = {f"{name}_jackknife": tuple(near) for name in ("complexity", "expressivity")}
            nulls = {f"{name}_null_jackknife": (0.0,) * 31 for name in ("complexity", "expressivity")}
            points.append(replace(m, orders={"token": replace(m["token"], **values, **nulls)}))
        return points

    assert find_phases(with_replicates(run(C, E), 1e-4)).compression_start == 1000
    assert find_phases(with_replicates(run(C, E), 0.1)).compression_start is None


def test_a_plane_may_turn_up_in_the_first_points():
    """Undefined at step 0, as where all states are equal: the same phases as without that point on the plane."""
    whole = real("healthy_4x128")
    for lacking in (1, 2):
        points = [replace(m, views={}) if n < lacking else m for n, m in enumerate(whole)]
        phases = find_phases(points)
        assert phases.plane == "readout"
        assert phases.compression_start == find_phases(whole).compression_start == 160
    late = [replace(m, views={}) if n < 5 else m for n, m in enumerate(whole)]
    assert find_phases(late).plane == "above_null"


def test_points_that_lack_the_plane_are_said():
    points = [m if n < 5 else replace(m, views={}) for n, m in enumerate(real("healthy_4x128"))]
    phases = find_phases(points)
    assert phases.plane == "readout"
    assert phases.notes[-1].startswith(f"The last {len(points) - 5} points have no numbers on the readout plane")
