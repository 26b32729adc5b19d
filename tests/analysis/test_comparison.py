"""Which models can be compared, which point of each, and their ranks."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from synthetic_runs import C, E, course, entry, model, run

from ib_callback.analysis.comparison import check_comparable, compared, entries_of
from ib_callback.analysis.courses import Course, point_at


def test_the_point_of_a_model() -> None:
    trained = course("a", model(0.5, 0.4, step=0), model(0.4, 0.3, step=1000), model(0.3, 0.25))
    assert point_at(trained, "last").complexity == 0.3
    assert point_at(trained, "1,000").complexity == 0.4
    assert point_at(course("one", model(0.5, 0.4)), "best").complexity == 0.5
    whole = run(C, E)
    assert point_at(Course(name="run", trajectory=whole, curve=None, points=[], path=None), "best").step == 2000
    with pytest.raises(ValueError, match="nearest measured steps are 0, 1000"):
        point_at(trained, "7")
    with pytest.raises(ValueError, match="expected a number, last or best"):
        point_at(trained, "first")


def test_several_points_of_several_models() -> None:
    both = course("a", model(0.5, 0.4, step=0), model(0.4, 0.3, step=1000), model(0.3, 0.25))
    single = course("b", model(0.6, 0.2))
    with pytest.warns(RuntimeWarning, match="b lacks the chosen point"):
        found = entries_of([both, single], ["0", "1000", "last"])
    assert [each.name for each in found] == ["a, untrained", "a, step 1,000", "a", "b"]
    with pytest.raises(ValueError, match="lacks the chosen point"):
        entries_of([single], ["0"])


OTHER_TOKENIZER = {"probe": "b" * 64}


@pytest.mark.parametrize(
    ("settings", "caution"),
    [
        ({}, ""),
        ({"dtype": "bfloat16"}, "precisions"),
        (OTHER_TOKENIZER, "same documents, but with different"),
        (OTHER_TOKENIZER | {"feature_probes": {"preference": "c" * 64}}, "same documents, but with different"),
    ],
)
def test_what_can_be_compared(settings: dict[str, object], caution: str) -> None:
    first = entry("a", model(0.5, 0.4, settings={"dtype": "float32", "feature_probes": {"preference": "f" * 64}}))
    other = entry(
        "b", model(0.4, 0.3, settings={"dtype": "float32", "feature_probes": {"preference": "f" * 64}} | settings)
    )
    assert [caution in each for each in check_comparable([first, other])] == [True] * bool(caution)


def test_what_is_measured_on_other_texts_is_named() -> None:
    settings = [{"feature_probes": {"preference": letter * 64}} for letter in "fg"]
    entries = [entry(str(number), model(0.5, 0.4, settings=each)) for number, each in enumerate(settings)]
    (caution,) = check_comparable(entries)
    assert "preference was measured on different texts" in caution


@pytest.mark.parametrize(
    ("settings", "layers", "message"),
    [
        (
            {"probe": "b" * 64, "documents": "e" * 64},
            None,
            "same documents, got a on .*dddddddd.* b on .*eeeeeeee.*--documents",
        ),
        ({"probe": "b" * 64, "documents": None}, None, "expected measurements of the same documents"),
        ({"num_bins": 50}, None, "expected .* same settings, got a and b .*num_bins: 100 vs 50.* Measure both"),
        ({"seed": 1}, None, "seed"),
        ({}, ("embed", "h.0", "norm"), "layers: hidden_states vs h.0, norm"),
    ],
)
def test_what_cannot_be_compared(settings: dict[str, object], layers: tuple[str, ...] | None, message: str) -> None:
    other = model(0.4, 0.3, settings=settings, **({} if layers is None else {"layers": layers}))
    with pytest.raises(ValueError, match=message):
        check_comparable([entry("a", model(0.5, 0.4)), entry("b", other)])


def test_models_are_ranked_by_their_distance() -> None:
    entries = [
        entry("far", model(0.5, 0.25), family="x", num_parameters=1000),
        entry("near", model(0.5, 0.45), family="y"),
        entry("lost", replace(model(0.5, 0.4), orders={"bigram": model(0.5, 0.4)["token"]}, settings={
            **model(0.5, 0.4).settings, "primary": "bigram"})),
    ]  # fmt: skip
    found = compared(entries[:2])
    assert [(row["rank"], row["model"], row["token/distance_to_bound"]) for row in found.rows] == [
        (1, "near", pytest.approx(0.05)), (2, "far", 0.25)
    ]  # fmt: skip
    assert "near ranks first of 2 models by token/distance_to_bound" in found.conclusion
    assert "No standard errors were measured" in found.conclusion
    lines = found.table().splitlines()
    assert re.split(r"\s{2,}", lines[2].strip())[:4] == ["2", "far", "x", "1,000"]
    assert compared(entries[:1]).conclusion == "Fewer than two models have this number, so there is nothing to compare."
    with pytest.raises(ValueError, match="--order"):
        compared(entries[:2], order="trigram")
    with pytest.raises(ValueError, match="same settings"):
        compared(entries)


def test_an_untrained_model_that_comes_first_is_no_success() -> None:
    both = course("a", model(0.5, 0.5, step=0), model(0.5, 0.25, step=1000))
    told = compared(entries_of([both], ["0", "last"])).conclusion
    assert "An untrained model ranks above a trained one" in told


def test_neighbours_that_errors_do_not_tell_apart() -> None:
    # Complexity varies by .01 from group to group, and expressivity does not.
    noisy = [0.50, 0.51, 0.49, 0.50, 0.505, 0.5, 0.5]
    constant = [0.25] * 7
    same = [[value - 0.001 for value in noisy], constant]
    entries = [
        entry("a", model(0.5, 0.25, jackknife=(noisy, constant))),
        entry("b", model(0.499, 0.25, jackknife=(same[0], same[1]))),
        entry("c", model(0.499, 0.05, jackknife=(noisy, [0.05] * 7))),
    ]
    found = compared(entries)
    assert [row["model"] for row in found.rows] == ["b", "a", "c"]
    # Paired, .001 is the same in all groups: real as a number.
    assert [row["differs from the next"] for row in found.rows] == ["yes", "yes", None]
