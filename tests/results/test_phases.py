from __future__ import annotations

import json

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
    replaced,
    run,
    with_others,
)

from ib_callback.results.phases import Phase, PhaseRule, PhaseTracker, find_phases
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
            assert getattr(part, name) in (None, getattr(whole, name))
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
    assert phases.phases == (Phase.INITIAL,) * 4 + (Phase.FITTING,) * 6 + (Phase.COMPRESSION,) * 21
    assert phases.known == (Phase.INITIAL,) * 4 + (Phase.FITTING,) * 11 + (Phase.COMPRESSION,) * 16
    assert not any(phases.collapsed)


def test_a_rise_is_dated_back_to_where_it_began():
    # 5 % above .10 is passed at point 5, and for the third time in succession at point 7.
    phases = find_phases(run([0.5] * 10, curve((0, 0.10), (5, 0.1055), (9, 0.12))))
    assert (phases.fit_start, phases.fit_recognised) == (100, 700)
    assert phases.known[:8] == (0, 0, 0, 0, 0, 0, 0, 1)
    assert phases.phases[:8] == (0, 1, 1, 1, 1, 1, 1, 1)


def test_a_run_that_begins_later_has_no_initial_phase_even_if_its_first_point_failed():
    phases = find_phases([failed(1000), failed(1100), measured(1200, 0.5, 0.2)])
    assert phases.fit_start == 1000
    assert phases.phases == phases.known == (1, 1, 1)


def test_a_failed_step_0_is_the_initial_phase_until_the_first_point():
    phases = find_phases([failed(0), failed(100), measured(200, 0.5, 0.2)])
    assert (phases.fit_start, phases.fit_recognised) == (200, 200)
    assert phases.phases == (0, 0, 1)


def test_without_a_null_the_plain_expressivity_is_used_with_a_warning():
    points = [measured(step, c, e, null=None) for step, c, e, _ in TABLE_TOKEN]
    # .143 at step 0, .080 at 64, .174 at 384.
    with pytest.warns(RuntimeWarning, match="plain expressivity.*null=True") as caught:
        assert find_phases(points).fit_start == 384
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_collapsed_points_are_named():
    collapsed = find_phases(COLLAPSE_AT_THE_END).collapsed
    assert [index for index, bad in enumerate(collapsed) if bad] == list(FALLEN)


@pytest.mark.parametrize(
    ("parameters", "recognised"),
    [
        # Highest median .48 at 11; on the way down the median is the value of the point before.
        ({"drop": 0.15}, 1800),  # below .408 from c15 = .40 on, seen at 16, 17, 18
        ({"drop": 0.5}, None),
        ({"persistence": 1}, 1300),
        ({"persistence": 8}, 2000),
        ({"smoothing": 1}, 1300),  # highest .50 at 10; below .485 from .48 at 11 on
        ({"smoothing": 5}, 1700),  # highest .46 at 12; c12 = .46 at 14, below .4462 from c13 = .44 at 15 on
    ],
)
def test_parameters_decide_what_is_clear_and_persistent(parameters, recognised):
    phases = run(C, E).phases(**parameters)
    assert phases.compression_recognised == recognised
    assert phases.compression_start == (None if recognised is None else 1000)


def test_a_new_maximum_starts_the_count_anew():
    # Below .6 and .5 at two points in succession each.
    trajectory = run([0.5, 0.5, 0.4, 0.4, 0.6, 0.5, 0.5, 0.6, 0.6], [0.2] * 9, steps=range(1000, 1900, 100))
    assert trajectory.phases(smoothing=1, noise=0.0).compression_start is None
    assert trajectory.phases(smoothing=1, noise=0.0, persistence=2).compression_recognised == 1300


def test_collapse_and_rise_are_parameters():
    # .12 at 25 is half of the highest, .24; .0302 is 0.7 % above .03.
    dip = run(C, replaced(E, {25: 0.119}))
    assert [bool(any(dip.phases(collapse=share).collapsed)) for share in (0.4, 0.5)] == [False, True]
    early = run([0.5] * 4, [0.03, 0.0302, 0.0302, 0.0302])
    assert [early.phases(rise=share).fit_start for share in (0.005, 0.01)] == [100, None]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"drop": 1.0}, "drop must be at least 0 and less than 1, got 1.0"),
        ({"noise": -1.0}, "noise must be at least 0"),
        ({"rise": float("nan")}, "rise must be at least 0"),
        ({"collapse": 2}, "collapse must be at least 0 and less than 1, got 2"),
        ({"persistence": 0}, "persistence: expected an integer of at least 1, got 0; it is a number of points"),
        ({"smoothing": -3}, "smoothing: expected an integer of at least 1"),
    ],
)
def test_parameters_out_of_range(parameters, message):
    with pytest.raises(ValueError, match=message):
        PhaseRule(**parameters)


def test_wrong_parameters():
    with pytest.raises(TypeError, match=r"persistence: expected an integer .*got 2\.5"):
        PhaseRule(persistence=2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'patience'"):
        Trajectory().phases(patience=3)


def test_a_rule_is_written_and_read():
    rule = PhaseRule(drop=0.1, persistence=5)
    assert PhaseRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    assert PhaseRule.from_dict({"drop": 0.1, "from_a_later_version": 3}) == PhaseRule(drop=0.1)
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


LONG_C = [*C[:10], *[0.5] * 150]
LONG_E = [*E[:10], *[0.2] * 150]


@pytest.mark.parametrize(("size", "at_most"), [(0.005, 1), (0.02, 6)])
def test_noise_is_hardly_ever_taken_for_compression(size, at_most):
    found = [noisy(LONG_C, LONG_E, size, seed).phases().compression_start for seed in range(100)]
    assert sum(start is not None for start in found) <= at_most


@pytest.mark.parametrize(("size", "at_least"), [(0.005, 198), (0.01, 190)])
def test_compression_is_found_in_noise(size, at_least):
    found = [noisy(C, E, size, seed).phases() for seed in range(200)]
    assert sum(p.compression_start is not None and abs(p.compression_start - 1000) <= 200 for p in found) >= at_least
    assert sum(p.compression_recognised is not None and p.compression_recognised <= 2200 for p in found) >= at_least


def test_the_fit_is_found_in_noise():
    found = [noisy(C, E, 0.05, seed).phases().fit_start for seed in range(200)]
    # .0267 at 3, .0300 at step 0, .0515 at 4.
    assert sum(start in (300, 400) for start in found) >= 195
