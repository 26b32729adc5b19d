from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from synthetic_runs import C, E, run

from ib_callback.results.correlation import Correlation, correlation
from ib_callback.results.trajectory import Trajectory


def test_correlation_of_values_and_of_ranks():
    # Ranks 1, 2.5, 2.5, 4 and 2, 1, 3, 4: deviations -1.5, 0, 0, 1.5 and -.5, -1.5, .5, 1.5.
    found = correlation([1.0, 2.0, 2.0, 30.0], [0.2, 0.1, 0.3, 0.4])
    assert found.spearman == pytest.approx(3.0 / np.sqrt(4.5 * 5.0))
    # Deviations -7.75, -6.75, -6.75, 21.25 and -.05, -.15, .05, .15.
    product, squares = 0.3875 + 1.0125 - 0.3375 + 3.1875, (60.0625 + 2 * 45.5625 + 451.5625, 0.05)
    assert found.pearson == pytest.approx(product / np.sqrt(squares[0] * squares[1]))
    assert found.num_points == 4


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2]), ([1, 2, 3], [5, 5, 5]), ([], []), ([1, None, 3], [1, 2, 3])])
def test_correlation_that_is_undefined(x, y):
    pairs = sum(a is not None for a in x)
    assert correlation(x, y) == Correlation(pearson=None, spearman=None, num_points=pairs)


def test_correlations_of_the_main_metrics_with_each_other():
    found = run(C, E, without=[25]).correlations()
    names = ["step", "complexity", "expressivity", "optimality", "distance_to_bound", "entropy"]
    assert set(found) == {(a, b) for i, a in enumerate(names) for b in names[i + 1 :]}
    # The collapse, before the fit at 400, would dominate them all.
    assert found["step", "complexity"].num_points == 26
    assert run(C, E, without=[25]).correlations(select_from=0)["step", "complexity"].num_points == 30
    assert run(C[:3], E[:3]).correlations()["step", "complexity"].num_points == 3, "no fit yet"
    assert found["step", "entropy"].spearman is None  # .9 everywhere
    # From the maximum at 10 to 20 complexity falls as expressivity rises, both along straight lines.
    compression = run(C, E)[:21].correlations(select_from="compression")
    assert compression["complexity", "expressivity"].pearson == pytest.approx(-1.0)
    assert compression["complexity", "distance_to_bound"].spearman == pytest.approx(1.0)
    assert compression["step", "complexity"].num_points == 11


def test_correlations_with_scores():
    loss = {1000: 4.0, 1200: 3.5, 1500: 3.25, 9999: 0.0}
    found = run(C, E).correlations(loss, select_from="fit")
    assert {metric for metric, _ in found} >= {"complexity", "token/expressivity_above_null", "ceiling"}
    assert {score for _, score in found} == {"score"}
    # .20, .208, .22 against 4, 3.5, 3.25.
    assert found["expressivity", "score"].spearman == pytest.approx(-1.0)
    assert found["expressivity", "score"].num_points == 3


@pytest.mark.parametrize("scores", [[1, 2], 3, "ab", object(), {"0": 1.0}, {0: "high"}, {0: [1.0]}, {None: 1.0}])
def test_scores_that_are_no_numbers_by_step_are_refused(scores: Any) -> None:
    with pytest.raises(TypeError, match=r"scores: expected a number by step, got .*Pass \{step: score\}"):
        Trajectory().correlations(scores)
