"""Helpers of the layout of groups over batches."""

import numpy as np

from ib_callback.measuring.plan.batches import first_of_run, ranges


def test_ranges():
    assert ranges(np.array([3, 0, 7]), np.array([5, 0, 8])).tolist() == [3, 4, 7]


def test_first_of_run():
    assert first_of_run(np.array([1, 1, 2, 2]), np.array([0, 0, 0, 5])).tolist() == [True, False, True, True]
