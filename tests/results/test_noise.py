from __future__ import annotations

import numpy as np
import pytest

from ib_callback.results.noise import scatter


@pytest.mark.parametrize(
    "steps", [range(400), [round(1.02**n * 1000) for n in range(400)]], ids=["even", "logarithmic"]
)
@pytest.mark.parametrize("course", [lambda t: 0 * t, lambda t: np.exp(-5 * t), lambda t: np.sin(6 * t)])
def test_scatter_is_the_standard_deviation_of_the_noise_about_a_course(steps, course):
    random = np.random.RandomState(0)
    values = course(np.linspace(0, 1, 400)) + 0.01 * random.standard_normal(400)
    values[::50] += 1.0  # outliers
    assert scatter(values, steps) == pytest.approx(0.01, rel=0.25)


def test_scatter_of_few_and_of_constant_values():
    assert scatter([1.0, 2.0] * 3 + [1.0], range(7)) is None
    assert scatter([0.1] * 8, range(8)) == 0.0
