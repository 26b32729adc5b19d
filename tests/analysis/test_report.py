"""What a report says of runs of which is known what there is to say, and that every sentence rests on numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_runs import FIT_ONLY_C, C, E, curve, failed, measured, real, run

from ib_callback.analysis.report import Report, report
from ib_callback.results.measurement import Measurement
from ib_callback.results.phases import PhaseRule
from ib_callback.results.points import FeaturePoint, PlanePoint
from ib_callback.results.trajectory import Trajectory


def point(step: int, complexity: float, expressivity: float, *, entropy: float = 0.8, null: float = 0.1) -> Measurement:
    """A token and a quadgram order, the second with nearly all of it null."""

    def order(c: float, e: float, n: float) -> PlanePoint:
        return PlanePoint.from_layers(
            [c], [e], complexity_null=n, expressivity_null=n, complexity_null_se=0.0, expressivity_null_se=0.0
        )

    return Measurement(
        step=step,
        entropy=entropy,
        ceiling=0.7,
        orders={
            "token": order(complexity, expressivity, null * complexity),
            "quadgram": order(0.5, 0.49, 0.45),
        },
        features={},
        layers=("only",),
        entropy_by_layer=(entropy,),
        num_positions=1000,
        seconds=2.0,
        settings={"primary": "token"},
        overhead=0.25,
    )


def texts(told: Report, topic: str) -> str:
    return " ".join(sentence.text for sentence in told.sentences if sentence.topic == topic)


def with_losses(trajectory: Trajectory, losses: list[float], train: list[float] | None = None) -> Trajectory:
    points = [replace(point, loss=loss) for point, loss in zip(trajectory, losses, strict=True)]
    if train is not None:
        points = [replace(point, train_loss=loss) for point, loss in zip(points, train, strict=True)]
    return Trajectory(points)


def test_a_run_that_collapses_and_fits() -> None:
    told = report(
        Trajectory(
            [
                point(0, 0.30, 0.15),
                point(10, 0.02, 0.01, entropy=0.4),
                Measurement.failed(20, "NaN", settings={}),
                point(30, 0.20, 0.16),
                point(40, 0.40, 0.24),
            ]
        )
    )
    assert "4 points were measured, from step 0 to step 40." in texts(told, "points")
    assert "1 of 5 points could not be measured, and are left out of all that follows: step 20 (NaN)." in texts(
        told, "points"
    )
    start = texts(told, "start")
    assert "at quadgrams: complexity 0.500, expressivity 0.490, optimality 0.980, as if the model were on" in start
    assert "already give 0.450, 90% of that complexity" in start
    phases = texts(told, "phases")
    # Above the null: .30 - .03, .02 - .002; .15 - .03, .16 - .02, .24 - .04; .01 - .002.
    assert "Collapse, until step 10:" in phases
    assert "On the plane above the null the complexity fell from 0.270 to 0.018" in phases
    assert "the entropy H(Z) of the layers went from 0.800 to 0.400" in phases
    assert "the most useless checkpoint is the most compressed one" in phases
    assert "Fitting, from step 10 (clear from step 30 on): on the plane above the null the expressivity" in phases
    assert "was 0.008 there and is 0.200 at step 40" in phases
    assert "No compression was recognised" in phases
    assert "No held-out loss was measured: nothing can be concluded on how good any point is" in texts(told, "loss")
    planes = texts(told, "planes")
    assert "Nothing can be concluded on the prediction plane: it was not measured." in planes
    assert "At step 40, plain, at tokens: complexity 0.400, expressivity 0.240, optimality 0.600" in planes
    assert "could reach 0.700 at most" in planes
    assert "between 0.360 and 0.400 for complexity, 0.200 and 0.240 for expressivity" in planes
    assert "Optimality above the null: 0.556" in planes
    assert "from 4 points (8 are needed) and without standard errors" not in texts(told, "points")
    assert "How noisy token/optimality is cannot be told, from 3 points (8 are needed)" in texts(told, "noise")
    assert texts(told, "cost") == (
        "4 measurements took 8 s, 2.0 s each; with files and pictures 25.0% of the time of the run."
    )
    assert "Nothing can be concluded on which point is the best: there is no loss" in texts(told, "conclusion")


def test_a_dip_while_the_model_fits_is_told_but_is_no_collapse() -> None:
    # The expressivity rises from the first point on, so the fit begins there, although the complexity falls by a tenth.
    points = [(0.30, 0.15), (0.27, 0.17), (0.30, 0.20), (0.40, 0.24), (0.45, 0.28)]
    told = report(Trajectory([point(10 * index, *values) for index, values in enumerate(points)]))
    phases = texts(told, "phases")
    assert (
        "No collapse was seen on the plane above the null: the complexity, 0.270 at the start, is lowest at" in phases
    )
    assert "step 10, 0.243. The rule for phases does not count that as one." in phases


def test_a_run_without_a_collapse_that_does_not_fit() -> None:
    told = report(Trajectory([point(0, 0.30, 0.15), point(10, 0.29, 0.14)]))
    # Above the null .15 - .03 and .14 - .029.
    assert "Fitting has not begun (read on the plane above the null): the expressivity is 0.111" in texts(
        told, "phases"
    )
    assert "was 0.120 at step 0" in texts(told, "phases")


def test_a_run_that_never_fits_after_a_collapse_is_told_not_to_be_chosen_by_complexity() -> None:
    told = texts(report(run([0.3, *[0.02] * 20], [0.03, *[0.002] * 20])), "phases")
    assert "The complexity was lowest at step 100, 0.020 after 0.300 at step 0" in told


def test_compression_is_told_from_its_maximum() -> None:
    # As in the made-up run: fit at 200, compression from 1,000, recognised at 1,500; in the end .30 and .24.
    told = texts(report(run(C, E)), "phases")
    assert "Collapse, until step 200" in told
    assert "Compression, from step 1,000 (clear from step 1,500 on): on the plane above the null" in told
    assert "complexity from 0.500 to 0.300 in the end, expressivity from 0.200 to 0.240" in told
    never = texts(report(run(FIT_ONLY_C, E)), "phases")
    assert "No compression was recognised" in never


@pytest.mark.parametrize("name", ["healthy_2x64", "healthy_4x128", "overfit_1000", "lr_spike"])
def test_real_runs_are_told_as_their_phases_say(name: str) -> None:
    trajectory = real(name)
    told, phases = report(trajectory), trajectory.phases()
    plane = "plane above the null" if phases.plane == "above_null" else f"{phases.plane} plane"
    assert f"on the {plane}" in texts(told, "phases")
    start = phases.compression_start
    assert ("Compression, from" in texts(told, "phases")) == (start is not None)
    assert ("The model memorises since" in texts(told, "generalisation")) == (phases.memorising_start is not None)
    assert start is None or f"Compression, from step {start:,} " in texts(told, "phases")


OVERFIT = [5.0, 4.0, 3.0, 3.2, 3.4, 3.6, 3.8]


@pytest.mark.parametrize(
    ("losses", "train", "expected"),
    [
        (OVERFIT, [5, 4, 3, 2.5, 2, 1.5, 1], "The model memorises since step 200: the held-out loss is 0.80 nats"),
        (OVERFIT, [5, 4, 3, 3.3, 3.5, 3.7, 4], "above its lowest for 4 points, by 0.80 nats, while the training loss"),
        ([5, 4, 3.5, 3.2, 3.0, 3.02, 3.01], None, "the held-out loss ends 0.010 nats above its lowest, and 0.03 are"),
        (
            [5, 4, 3.5, 3.2, 3.0, 3.2, 3.3],
            None,
            "but at the last 2 points only, and 3 decide: nothing can be concluded",
        ),
    ],
)
def test_memorising_divergence_and_neither(losses: list[float], train: list[float] | None, expected: str) -> None:
    # A fit from the first step on: expressivity 10 % above that of step 0 from step 100 on.
    course = run([0.5] * 7, [0.10, *curve((0, 0.11), (5, 0.16))])
    told = report(with_losses(course, losses, train))
    assert expected in texts(told, "generalisation")
    assert f"Let the loss choose: step {100 * losses.index(min(losses))} is the best" in texts(told, "conclusion")


def test_the_lowest_loss_and_what_is_as_good() -> None:
    told = report(with_losses(run([0.5] * 5, [0.1, 0.12, 0.13, 0.14, 0.15]), [5.0, 4.0, 3.01, 3.0, 3.02]))
    assert texts(told, "loss") == (
        "The held-out loss is lowest at step 300, 3.000 nats a token, and 3.020 at the last point, step 400."
    )
    assert "within 0.03 nats: step 200 and step 400" in texts(told, "conclusion")
    still = report(with_losses(run([0.5] * 3, [0.1, 0.12, 0.13]), [5.0, 4.0, 3.0]))
    assert "whether the model would go on learning is open" in texts(still, "conclusion")


def test_trained_weights_have_no_phases() -> None:
    begun = replace(measured(0, 0.4, 0.3), predictive_information=2.5, loss=3.0)
    later = [replace(measured(step, 0.4, 0.3), loss=3.0 + step / 100) for step in (10, 20, 30, 40)]
    told = report(Trajectory([begun, *later]))
    assert "predicts the next token 2.50 nats better" in texts(told, "start")
    assert texts(told, "phases") == ""
    assert "in fine-tuning on other text" in texts(told, "generalisation")
    ruled = Trajectory(later, phase_rule=PhaseRule(from_trained=True))
    assert "by its own rule" in texts(report(ruled), "start")


def test_without_step_0_nothing_is_said_of_a_collapse() -> None:
    told = report(run(C[4:], E[4:], steps=range(1000, 3700, 100)))
    assert "Step 0 was not measured: nothing can be concluded on the untrained model" in texts(told, "start")
    assert "Collapse" not in texts(told, "phases")
    assert "Fitting, from step 1,000:" in texts(told, "phases")


def test_without_nulls_nothing_is_concluded_from_plain_numbers() -> None:
    told = report(Trajectory([measured(0, 0.4, 0.3, null=None)]))
    assert "Without a null nothing can be concluded" in texts(told, "start")
    assert "Without a null nothing can be concluded from these" in texts(told, "planes")


def test_views_and_why_one_is_missing() -> None:
    def view(expressivity: float) -> PlanePoint:
        return PlanePoint.from_layers(
            [0.4], [expressivity], complexity_null=None, expressivity_null=None, complexity_baseline_by_layer=[0.0],
            expressivity_baseline_by_layer=[0.0], complexity_local_by_layer=[0.4],
            expressivity_local_by_layer=[expressivity], noise=0.001,
        )  # fmt: skip

    settings = {"primary": "token", "readout": {"why": "no output embeddings"}}
    # Scores .2² / .4 = .1 and .1² / .4 = .025.
    course = [
        replace(measured(step, 0.5, 0.3), views={"prediction": {"token": view(e)}}, settings=settings)
        for step, e in ((0, 0.2), (100, 0.1))
    ]
    told = texts(report(Trajectory(course)), "planes")
    assert "step 100: local complexity 0.400, expressivity 0.100, score 0.025" in told
    assert "the score was highest at step 0, 0.100" in told
    assert "Nothing can be concluded on the readout plane: it was not measured (no output embeddings)." in told


def test_features_are_held_against_chance() -> None:
    def with_preference(p: float) -> Trajectory:
        feature = FeaturePoint.from_layers(
            [0.02], num_positions=100, complexity=0.4, information_null=0.01, information_p_value=p
        )
        return Trajectory([replace(measured(0, 0.4, 0.3), features={"preference": feature})])

    assert "not told from chance (p 0.4), so that nothing can be concluded" in texts(
        report(with_preference(0.4)), "features"
    )
    known = texts(report(with_preference(0.01)), "features")
    assert "information 0.020, where labels at random have 0.010; told from chance (p 0.01). As a share" in known


def test_the_noise_allows_what_the_scatter_does() -> None:
    course = with_losses(run([0.5] * 12, curve((0, 0.10), (11, 0.20))), [4.0 + 0.1 * (-1) ** n for n in range(12)])
    told = texts(report(course), "noise")
    # Values that alternate by 1 about a line: the third differences are the same everywhere.
    assert "One value of loss scatters by" in told
    assert "points that differ by less than" in told
    smooth = replace(measured(0, 0.4, 0.3), loss=4.0, loss_se=0.05)
    other = replace(measured(1, 0.4, 0.3), loss=4.0, loss_se=0.04)
    assert "loss varies by 0.04 (standard error)" in texts(report(Trajectory([smooth, other])), "noise")


@pytest.mark.parametrize("errors", [(0.05, 0.04, 0.03), (0.05, 0.04, None), (0.05, None, None)])
def test_a_standard_error_is_told_with_the_number_of_its_own_point(errors: tuple[float | None, ...]) -> None:
    points = [
        replace(measured(step, 0.4, 0.3), loss=4.0 - step, loss_se=error, scheduled=step < 2)
        for step, error in enumerate(errors)
    ]
    (told,) = (s for s in report(Trajectory(points)).sentences if s.topic == "noise" and "of this size loss" in s.text)
    step, error = max((step, error) for step, error in enumerate(errors) if error is not None)
    assert f"At step {step}, loss is {4 - step:.3f}; over other probes of this size loss varies by {error}" in told.text
    cited = {(number.name, number.step): number.value for number in told.numbers}
    assert cited["loss_se", step] == error
    assert cited["loss", step] == 4.0 - step


@pytest.mark.parametrize(
    ("trajectory", "expected"),
    [
        (Trajectory(), "Nothing can be concluded: it has no points."),
        (Trajectory([failed(0), failed(10)]), "Nothing can be concluded: none of its 2 points could be measured."),
        (Trajectory([measured(None, 0.4, 0.3)]), "Nothing can be concluded on training from one point"),
        (Trajectory([measured(None, 0.4, 0.3)] * 2), "Nothing can be concluded on training from these points"),
    ],
)
def test_nothing_can_be_concluded(trajectory: Trajectory, expected: str) -> None:
    assert texts(report(trajectory), "conclusion").startswith(expected)


def test_points_without_a_step_are_called_by_their_names() -> None:
    points = Trajectory([measured(None, 0.4, 0.3), measured(None, 0.4, 0.2)])
    told = report(points, names=["dpo", None])
    assert "2 points were measured, from dpo to point 2." in texts(told, "points")


@pytest.mark.parametrize(
    "trajectory",
    [run(C, E), run(C, E, without=range(31)), run(C[4:], E[4:], steps=range(1000, 3700, 100)), Trajectory(),
     with_losses(run([0.5] * 7, [0.1] * 7), OVERFIT), Trajectory([measured(None, 0.4, 0.3, null=None)]),
     Trajectory(replace(m, loss_se=0.04) for m in with_losses(run(C, E), [5 - n / 9 + n % 3 / 99 for n in range(31)]))],
)  # fmt: skip
def test_every_sentence_names_numbers_that_the_run_has(trajectory: Trajectory, tmp_path: Path) -> None:
    told = report(trajectory, model="a run")
    values = {(point.step, name): value for point in trajectory for name, value in point.scalars().items()}
    for sentence in told.sentences:
        assert sentence.numbers, sentence
        for number in sentence.numbers:
            assert number.name in str(sentence)
            if number.point != "the run" and number.name not in ("step", "error"):
                assert values.get((number.step, number.name)) == number.value, number
        for first, last in re.findall(r"points from step ([\d,]+) to step ([\d,]+)", str(sentence)):
            assert int(first.replace(",", "")) < int(last.replace(",", ""))
    assert {row["model"] for row in told.rows()} == {"a run"}
    assert len(told.rows()) == sum(len(each["numbers"]) for each in told.objects())
