"""Quantities of a measurement with each group of sequences left out, from the sums of a pass."""

from __future__ import annotations

import numpy as np

from ib_callback.measuring.accumulate import Sums
from ib_callback.measuring.jackknife_sums import JackknifeSums
from ib_callback.measuring.plan.null import SubsetCurve
from ib_callback.measuring.plan.plan import FeaturePlan, Plan
from ib_callback.results.uncertainty import Array, jackknife_error


class LeftOut:
    """Means over layers, as fractions of log(num_bins), [2 G - 1]: one value for each omission (jackknife_plan.py)."""

    def __init__(self, plan: Plan, sums: Sums, jackknife: JackknifeSums) -> None:
        assert plan.jackknife is not None
        self._plan, self._jackknife = plan, plan.jackknife
        self._conditional = sums.conditional.mean(1).numpy()
        self._removed = jackknife.removed.mean(2).numpy()
        self._totals = jackknife.totals.mean(2).numpy()
        self._entropy = self._totals[0]
        single = sums.single.mean().item() - self._jackknife.taken @ jackknife.single.mean(1).numpy()
        self._single = single / self._jackknife.rest

    def information(self, label_set: int, total: int = 0) -> Array:
        """I(X;Z) for the labels of a set, over the positions of the plan's kept `total`."""
        rest = self._jackknife.rest_of_set[label_set]
        return self._totals[total] - (self._conditional[label_set] - self._removed[label_set]) / rest

    def null(self, label_set: int, curve: SubsetCurve, single: float) -> Array:
        """Null information of a set's label counts without each omission.

        The curve d(c) of a smaller probe is taken to be that of the whole in another scale, the ratio of the two
        d(1), which are exact: benchmarks/coverage.py compares this with what it stands for.

        Args:
            label_set: its number.
            curve: of the whole probe.
            single: d(1) of the whole, H(Z) minus the mean entropy of one assignment.
        """
        scale = (self._entropy - self._single) / single if single > 0 else np.ones_like(self._entropy)
        return scale * [curve.null(counts)[0] for counts in self._jackknife.counts[label_set]]

    def feature_error(self, feature: FeaturePlan, information: float) -> float | None:
        """Standard error of the information about a feature; None if an omission takes all of its labels."""
        label_set = next(i for i, s in enumerate(self._plan.label_sets) if s.name == feature.label_set.name)
        if (self._jackknife.rest_of_set[label_set] == 0).any():
            return None
        return jackknife_error(information, self.information(label_set, self._jackknife.totals.index(feature.total)))
